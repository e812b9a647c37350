"""The commands, run as users run them, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fixres_dist.base.commands import FORM

ROOT = Path(__file__).parents[2]
DEVICE = "FIXRES_TEST_DEVICE"  # cuda: commands see the GPU; conftest's fixture `device` sets it


def command(*arguments: object) -> list[str]:
    """A command as an argument list: submit through launch/, all others through the package."""
    first, *rest = map(str, arguments)
    start = [f"{ROOT}/launch/submit.py"] if first == "submit" else ["-m", "fixres_dist", first]
    return [sys.executable, *start, *rest]


def environment() -> dict[str, str]:
    """Of a user's shell, whatever commands ran in this process before."""
    kept = {name: value for name, value in os.environ.items() if name != FORM}
    hidden = {} if os.environ.get(DEVICE) == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **hidden}


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
