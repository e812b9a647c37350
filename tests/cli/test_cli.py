"""The commands as users type them: plans without torch, refusals with help, and nothing written by either."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import ROOT, command, environment, run, tiny

from fixres_dist.base.errors import UserError
from fixres_dist.cluster import jobs
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model
from fixres_dist.runs.rundir import RunDir

NO_TORCH = """
import runpy, sys
sys.argv = {argv!r}
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = sorted(set(sys.modules) & {{"torch", "torchvision", "timm", "tensorboard", "nvidia.dali", "matplotlib"}})
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "--help"],
        ["submit", "--list"],
        ["submit", "--model", "l2", "--res", "600", "--nodes", "4", "--dry-run"],
        ["submit", "--model", "resnet50", "--res", "288", "--dry-run"],
        ["status", "--runs-dir", "nowhere"],
        ["cancel", "--help"],
    ],
    ids=["help", "list", "plan", "plan of a timm model", "status", "cancel"],
)
def test_login_node_commands_import_no_torch(arguments: list[str]) -> None:
    name, *rest = arguments
    script = f"{ROOT}/launch/{name}.py"
    code = NO_TORCH.format(argv=[script, *rest], script=script)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr


def test_the_cards_command_prints_plan_and_sbatch_text(tmp_path: Path) -> None:
    done = run("submit", "--model", "l2", "--res", "600", "--nodes", "4", "--dry-run", "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    plan, _, sbatch = done.stdout.partition("# what sbatch would get\n")
    assert len(plan.strip().splitlines()) <= 15
    for text in (
        "tf_efficientnet_l2.ns_jft_in1k_475",
        "5,516,008 trainable of 480,309,308",
        "3,337 steps",
        "32 (4 node(s) x 8)",
    ):
        assert text in plan
    for line in ("#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", "#SBATCH --requeue", "#SBATCH --signal=USR2@120"):
        assert line in sbatch.splitlines()
    assert "#SBATCH --open-mode=append" in sbatch
    assert "--kill-on-bad-exit=1" in sbatch
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("what", ["--list", "--dry-run"])
def test_a_plan_that_nobody_reads_to_its_end_is_no_error(tmp_path: Path, what: str) -> None:
    arguments = command("submit", "--model", "b0", what, "--runs-dir", tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    with subprocess.Popen(arguments, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "stream: transform test_aug draws new pictures every epoch"),
        (["data.train_transform=test", "run.engine=cached"], "1,231.7 GiB in"),
        (["data.train_transform=test", "tune.policy=classifier", "tune.epochs=9"], "13.6 GiB in"),
    ],
    ids=["stream", "cached", "cached classifier inputs"],
)
def test_the_plan_says_which_engine_runs_and_how_large_its_features_are(settings: list[str], words: str) -> None:
    done = run("submit", "--model", "l2", "--res", "600", "--dry-run", *settings)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("engine ")]
    assert words in line


def test_an_engine_that_the_transform_rules_out_is_refused() -> None:
    done = run("submit", "--model", "l2", "--res", "600", "--dry-run", "run.engine=cached")
    assert done.returncode == 2
    assert "test or test_flip" in done.stderr


def test_the_example_needs_no_model_whatever_the_profile(tmp_path: Path) -> None:
    profile = ROOT / "slurm" / "profiles" / "devcluster.yaml"
    done = run(
        "submit",
        "--data",
        "demo",
        "--nodes",
        "2",
        "--profile",
        profile,
        "--cluster",
        "slurm",
        "--dry-run",
        "--runs-dir",
        tmp_path,
    )
    assert "demo = test_efficientnet" in done.stdout, done.stderr
    assert "#SBATCH --partition=low" in done.stdout


def test_sbatch_text_is_the_recorded_one() -> None:
    """Every option of a submission, in one place to read; a change of it is made on purpose."""
    config = reading.parse(
        Config,
        reading.overrides(
            [
                *(
                    "model.name=b0",
                    "cluster.nodes=1-4",
                    "cluster.partition=gpu",
                    "cluster.account=vision",
                    "cluster.qos=high",
                ),
                *("cluster.mem=480G", "cluster.time=1-12:00:00", "cluster.exclude=n7", "cluster.constraint=h200"),
                *("cluster.env={NCCL_SOCKET_IFNAME: ib0}", "cluster.setup=[module load cuda]"),
                "cluster.srun_args=[--container-image=fixres.sqsh]",
            ]
        ),
    )
    text = jobs.sbatch_text(config, RunDir(Path("/runs/b0-320"))).replace(sys.executable, "PYTHON")
    recorded = ROOT / "tests" / "cluster" / "recorded.sbatch"
    if os.environ.get("RECORD"):
        recorded.write_text(text)
    assert text == recorded.read_text()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("0:0:30", 1)],
)
def test_slurm_times(text: str, minutes: int) -> None:
    assert jobs.minutes(text) == minutes


def test_a_time_that_slurm_would_not_read_is_refused() -> None:
    with pytest.raises(UserError, match="soon"):
        jobs.minutes("soon")


def refuse(tmp_path: Path, *arguments: object) -> str:
    """The one message of a submission that is refused before anything was written."""
    runs = tmp_path / "runs"
    before = sorted(runs.rglob("*")) if runs.exists() else None
    done = run("submit", "--runs-dir", runs, "--cluster", "local", "--gpus-per-node", "2", *arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ") or "usage" in lines[0]
    assert (sorted(runs.rglob("*")) if runs.exists() else None) == before
    return done.stderr


NEW = "--weights none --data PHOTOS"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (f"--model b9 --res 320 {NEW}", "Did you mean 'b8'"),
        (f"--model resnet5o --res 320 {NEW}", "Did you mean 'resnet50'"),
        (f"--model b0 --res 0 {NEW}", "res is 0; accepted: 32 or more"),
        (f"--model b0 --res abc {NEW}", "'abc'; accepted: a whole number"),
        ("--model b0 --res 64 --data TMP/nowhere", "no data set at"),
        ("--model b0 --res 64 --weights none", "no data set given"),
        (f"--model b0 {NEW} --name q/3", "a name without slashes"),
        ("--res 64 --data PHOTOS", "no --model given"),
        (f"--model mixer_b16_224 {NEW}", "no square above 224 px is known that mixer_b16_224 takes. Next: --res 224"),
        (f"--model b0 {NEW} model.num_classes=7", "num_classes is 7; the data set has 3 classes"),
        (f"--model b0 --res 224x336 {NEW}", "'224x336'; accepted: a whole number of pixels, the side of a square"),
        (f"--model b0 --res 224,256 {NEW}", "Next: --grid data.res=224,256 for several"),
        (f"--model b0 {NEW} data.crop_pct=87.5", "crop_pct is 87.5; accepted: auto, or 0.25 to 2"),
        (f"--model b0 --res 64 {NEW} tune.epoch=2", "Did you mean 'tune.epochs'"),
        (f"--model b0 --res 64 {NEW} tune.global_batch=7", "tune.global_batch=8"),
        ("--model b8 --weights ns --data PHOTOS", "accepted: ap, none"),
        (f"--model b0 --nodes 2 {NEW}", "--nodes 2 needs a cluster"),
        ("--model b0 --weights TMP/no.pth --data PHOTOS", "no weights file"),
        ("--model b0 --weights nss --dry-run", "nss. Accepted: ns, ap"),
        (f"--model b0 {NEW} data.deny_list=no.txt", "no.txt': No such file"),
        (f"--model b0 --profile TMP/no.yaml {NEW}", "no profile"),
        (f"--model b0 {NEW} --grid base_lr=1,2", "--grid is 'base_lr=1,2'; accepted: section.key=v1,v2"),
        (f"--model b0 {NEW} --at-once -1", "--at-once is -1; accepted: 0 (all) or more"),
        ("--table 1 --model b0 --data PHOTOS", "excludes --model"),
    ],
)
def test_wrong_arguments_get_one_helpful_message(tmp_path: Path, photos: Path, arguments: str, words: str) -> None:
    asked = [word.replace("PHOTOS", str(photos)).replace("TMP", str(tmp_path)) for word in arguments.split()]
    assert words in refuse(tmp_path, *asked)


def test_paths_are_those_of_the_shell_that_submits(tmp_path: Path, photos: Path) -> None:
    """The job starts in the run's code/, where a relative one would mean another place."""
    (tmp_path / "bad.txt").touch()
    keys = ["data.deny_list=bad.txt", "data.cache=kept", "run.feature_cache=features"]
    done = run(*tiny(tmp_path / "runs", "r", photos, 1, "--prepare", *keys), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = RunDir(tmp_path / "runs" / "r").config()
    found = (config.data.deny_list, config.data.cache, config.run.feature_cache)
    assert found == tuple(str(tmp_path / name) for name in ("bad.txt", "kept", "features"))
    script = [sys.executable, f"{ROOT}/launch/resume.py", "r", "--runs-dir", "runs", "--cluster", "inline"]
    asked = ["data.deny_list=nowhere.txt"]
    done = subprocess.run(
        [*script, *asked], capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert f"data.deny_list is '{tmp_path}/nowhere.txt': No such file" in done.stderr


@pytest.mark.parametrize("damage", ["no train", "no val", "empty class", "one class"])
def test_what_is_no_data_set_is_refused_before_submission(tmp_path: Path, photos: Path, damage: str) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    if damage in ("no train", "no val"):
        shutil.rmtree(data / damage.removeprefix("no "))
    elif damage == "empty class":
        for file in (data / "val" / "birch").iterdir():
            file.unlink()
    else:
        for name in ("birch", "cedar"):
            shutil.rmtree(data / "train" / name)
    text = refuse(tmp_path, "--model", "b0", "--res", "64", "--weights", "none", "--data", data)
    expected = {
        "no train": "no train/ folder",
        "no val": "no val/ folder",
        "empty class": "holds no image",
        "one class": "has 1 class",
    }
    assert expected[damage] in text


def test_weights_of_another_model_are_refused_with_what_differs(tmp_path: Path, photos: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({k: v.clone() for k, v in build_model("resnet18", 3).state_dict().items()}, file)
    text = refuse(tmp_path, "--model", "test_efficientnet", "--res", "64", "--weights", file, "--data", photos)
    assert "does not fit EfficientNet" in text
    assert "conv_stem.weight is missing" in text
    thousand = tmp_path / "thousand.pth"
    torch.save(build_model("test_efficientnet", 10).state_dict(), thousand)
    text = refuse(
        tmp_path,
        "--model",
        "test_efficientnet",
        "--res",
        "64",
        "--weights",
        thousand,
        "--data",
        photos,
        "--preset",
        "none",
    )
    assert "classifies 10 classes, the data set has 3" in text
    assert "pretrain.epochs" in text


@pytest.mark.parametrize("asked", [["b0"], ["test_efficientnet"], ["b0", "--dry-run"]], ids=" ".join)
def test_pretrained_weights_of_other_classes_are_refused_with_the_preset_that_trains_a_classifier(
    tmp_path: Path, photos: Path, asked: list[str]
) -> None:
    words = ["--res", "64", "--weights", "pretrained", "--data", photos, "--preset", "none", "--model", *asked]
    text = refuse(tmp_path, *words)
    assert "classifies 1000 classes, the data set has 3" in text
    assert "--preset own_classes" in text


def test_without_none_the_preset_for_own_classes_is_added(tmp_path: Path, photos: Path) -> None:
    asked = ["--model", "b0", "--data", photos, "--dry-run", "--runs-dir", tmp_path]
    plain, asked_for = run("submit", *asked), run("submit", *asked, "--preset", "own_classes")
    assert "stage one trains a new classifier (--preset none refuses)" in plain.stdout
    varying = ("own data", "engine", "memory")  # the free disk and memory of the moment
    said = [[x for x in done.stdout.splitlines() if not x.startswith(varying)] for done in (plain, asked_for)]
    assert said[0] == said[1]


def test_a_run_directory_of_another_configuration_is_refused(tmp_path: Path, photos: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    done = run(*tiny(tmp_path / "runs", "mine", photos, 1, "tune.epochs=0", "tune.bn_stats_images=3"))
    assert done.returncode == 0, done.stderr
    good = ["--model", "test_efficientnet", "--res", "64", "--weights", "none", "--data", photos]
    text = refuse(tmp_path, *good, "--name", "mine", "tune.global_batch=12", "tune.base_lr=0.5")
    assert "other settings" in text
    assert "tune.base_lr 0.02 -> 0.5" in text
    assert "--name" in text
    resume = [sys.executable, f"{ROOT}/launch/resume.py", "mine", "--runs-dir", tmp_path / "runs", "tune.base_lr=0.5"]
    done = subprocess.run(resume, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 2, "finished, and not what is asked for"
    assert "tune.base_lr 0.02 -> 0.5" in done.stderr
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "todo.txt").write_text("no run")
    assert "is no run directory" in refuse(tmp_path, *good, "--name", "notes", "tune.global_batch=12")


def test_offline_weights_name_the_command_that_fetches_them(tmp_path: Path, photos: Path) -> None:
    env = {**environment(), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    arguments = command(
        "submit",
        "--runs-dir",
        tmp_path / "runs",
        "--model",
        "b0",
        "--res",
        "64",
        "--data",
        photos,
        "--cluster",
        "inline",
    )
    done = subprocess.run(
        [*arguments, "pretrain.epochs=1"], capture_output=True, text=True, env=env, cwd=ROOT, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "python -m fixres_dist fetch --model tf_efficientnet_b0.ns_jft_in1k" in done.stdout
    failed = (tmp_path / "runs" / "b0-64-own_classes" / "FAILED").read_text()
    assert "cannot be reached" in failed
    assert "Next: python launch/submit.py" in failed
    assert json.loads((tmp_path / "runs" / "b0-64-own_classes" / "state.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("fetch --model b0 --weights nsx", "choose from"),
        ("evaluate", "--run DIR, or --model M --checkpoint FILE"),
        ("evaluate --run TMP", "no config.yaml"),
    ],
)
def test_evaluate_and_fetch_say_what_they_need(tmp_path: Path, arguments: str, words: str) -> None:
    done = run(*arguments.replace("TMP", str(tmp_path)).split())
    assert done.returncode == 2
    assert words in done.stderr
