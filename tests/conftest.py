"""Shared by all tests: real JPEG files, and the commands run as users run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slurm_service import devcluster, undisturbed  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: what needs Slurm, which mostly waits, goes to one process, on one cluster."""
    for item in items:
        slurm = "devcluster" in (*getattr(item, "fixturenames", ()), item.path.stem.removeprefix("test_"))
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's own cache."""
    os.environ["FIXRES_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def write_photos(root: Path, train: int, val: int, classes: tuple[str, ...] = ("ash", "birch", "cedar")) -> Path:
    """An ImageFolder of JPEGs of mixed sizes; `train` and `val` images a class. The class shows in the mean colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(70, 190, 2)
                pixels = rng.integers(0, 190, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
                pixels[..., label % 3] += 60
                image = Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 training and 33 validation images in 3 classes: neither divides over 2 or 4 ranks."""
    return write_photos(tmp_path_factory.mktemp("photos"), 28, 11)


def command(*arguments: object) -> list[str]:
    """`submit ...` or a `fixres_dist` command, as an argument list."""
    first, *rest = map(str, arguments)
    start = [f"{ROOT}/launch/submit.py"] if first == "submit" else ["-m", "fixres_dist", first]
    return [sys.executable, *start, *rest]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd or ROOT,
        timeout=600,
        check=False,
    )


def tiny(runs: Path, name: str, data: Path, processes: int, *more: str) -> list[str]:
    """Arguments of a submission of timm's smallest EfficientNet-style model, from new weights, in fp32 on any CPU."""
    where = ["--cluster", "local", "--gpus-per-node", str(processes)]
    return [
        *("submit", "--model", "test_efficientnet", "--res", "64", "--weights", "none", "--data", str(data)),
        *("--runs-dir", str(runs), "--name", name, *where),
        *("tune.global_batch=12", "tune.base_lr=0.02", "tune.epochs=2", "run.log_every=1", "run.record_samples=true"),
        *("data.workers=1", "run.precision=fp32", "run.memory_format=channels_last", *more),
    ]


def killed_when(
    arguments: list[str], condition: Callable[[], bool], number: int = signal.SIGKILL, alone: bool = False
) -> int:
    """Start a command in a session of its own and send `number` to every process of it once `condition` holds, or to the
    command `alone`; returns its exit code."""
    process = subprocess.Popen(
        command(*arguments), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (os.kill if alone else os.killpg)(process.pid, number)
    return process.wait()
