"""An installed wheel lists recipes, plans and trains as a checkout does: with its recipes and profiles, without launch/."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT, environment, tiny


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel of this checkout is installed to."""
    tree, wheels, folder = (tmp_path_factory.mktemp(name) for name in ("tree", "wheels", "installed"))
    for name in ("fixres_dist", "configs", "slurm"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, tree], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, *wheels.glob("*.whl")], check=True)
    where = [sys.executable, "-c", "import fixres_dist; print(fixres_dist.__file__)"]
    found = subprocess.check_output(where, text=True, env=environment() | {"PYTHONPATH": str(folder)}, cwd=folder)
    assert Path(found.strip()) == folder / "fixres_dist" / "__init__.py"
    return folder


def fixres(installed: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fixres_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment() | {"PYTHONPATH": str(installed)},
        cwd=cwd,
        timeout=600,
        check=False,
    )
    assert "launch/" not in done.stdout + done.stderr
    return done


def test_the_wheel_lists_and_plans(installed: Path, tmp_path: Path) -> None:
    assert not (installed / "launch").exists()
    listed = fixres(installed, tmp_path, "submit", "--list")
    assert "tf_efficientnet_l2.ns_jft_in1k_475" in listed.stdout, listed.stderr
    dry = fixres(installed, tmp_path, "submit", "--model", "l2", "--res", "600", "--nodes", "4", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "5,516,008 trainable of 480,309,308" in dry.stdout
    assert "#SBATCH --nodes=4" in dry.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_the_wheel_installs_the_command(installed: Path, tmp_path: Path) -> None:
    script = [sys.executable, installed / "bin" / "fixres", "submit", "--help"]
    env = environment() | {"PYTHONPATH": str(installed)}
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.stdout.startswith("usage: fixres submit --model M"), done.stderr


def test_the_wheel_says_where_its_profiles_are(installed: Path, tmp_path: Path) -> None:
    done = fixres(installed, tmp_path, "submit", "--model", "b0", "--profile", "no.yaml")
    named = done.stderr.partition("such as ")[2].strip().removesuffix(".")
    assert Path(named).is_file(), done.stderr
    dry = fixres(installed, tmp_path, "submit", "--model", "b0", "--profile", named, "--dry-run")
    assert dry.returncode == 0, dry.stderr


def test_the_wheel_trains_from_a_snapshot_of_itself(installed: Path, tmp_path: Path, photos: Path) -> None:
    more = ["tune.epochs=1", "tune.bn_stats_images=12", "run.eval_every=0"]
    done = fixres(installed, tmp_path, *tiny(Path("runs"), "small", photos, 1, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "results.json").read_text())["n"] == 33
    assert sorted(path.name for path in (run / "code").iterdir()) == ["fixres_dist"]
    assert (run / "code" / "fixres_dist" / "configs" / "published.csv").is_file()
    assert (run / "command.txt").read_text().startswith("python -m fixres_dist submit --model test_efficientnet")
    status = fixres(installed, tmp_path, "status", "small")
    assert "done" in status.stdout, status.stderr
