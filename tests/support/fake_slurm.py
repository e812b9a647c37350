"""Stand-ins for Slurm's programs, which note how they were called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TEST_ONLY = 'case "$*" in *--test-only*) {answer};; *) cat "$1" > "$0.text"; echo "Submitted batch job 7";; esac'
STARTS = 'echo "sbatch: Job 7 to start at 2030-01-01T00:00:00" >&2'


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, test_only: str = STARTS, **scripts: str) -> Path:
    """Programs first in PATH: a queue that takes any job as number 7, whose sbatch --test-only is `test_only`. `scripts`
    replace or add some. Every call stands as a line in PROGRAM.calls, a submitted script in sbatch.text."""
    folder.mkdir(exist_ok=True)
    parts = {
        "sbatch": TEST_ONLY.format(answer=test_only),
        "squeue": ":",
        "sinfo": "exit 1",
        "scontrol": "exit 1",
        "srun": ":",
    }
    for name, text in (parts | scripts).items():
        (folder / name).write_text(f'#!/bin/sh\necho "$*" >> "$0.calls"\n{text}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def calls(folder: Path, program: str) -> list[str]:
    file = folder / f"{program}.calls"
    return file.read_text().splitlines() if file.exists() else []
