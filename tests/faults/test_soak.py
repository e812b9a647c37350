"""A seeded dozen of benchmarks/soak.py: signals to ranks, loader processes and launchers at named moments; the end is as undisturbed."""

from __future__ import annotations

import ast
import subprocess
import sys

from support.commands import ROOT, environment


def test_a_seeded_dozen_ends_as_undisturbed() -> None:
    words = [sys.executable, f"{ROOT}/benchmarks/soak.py", "--count", "12", "--seed", "5", "--images", "8"]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(
        words, env={**environment(), **paths}, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = ast.literal_eval(done.stdout.splitlines()[-1])
    assert counts["schedules"] == 12
    assert counts["faults"] >= 12, "every moment is reached"
