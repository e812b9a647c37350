"""What a run has left at its end, compared with the undisturbed run's: files, curves, processes, locks."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixres_dist.runs.rundir import RunDir
from support.preemptions import same, written

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purged step
LEAVE_S = 30.0  # a loader process looks every five seconds for the rank that has forked it


def note_session(run: RunDir, pid: int) -> None:
    """The process `pid` leads a session of the run's."""
    with open(run.root / "sessions", "a") as file:
        file.write(f"{pid}\n")


def sessions(leaders: set[int]) -> list[tuple[int, str, int]]:
    """(id, state, ticks of CPU time with those of ended children) of the processes of these sessions, but for ended ones."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, *numbers = path.read_text().rpartition(")")[2].split()
            if int(numbers[2]) in leaders and state not in "ZX":
                found.append((int(path.parent.name), state, sum(map(int, numbers[10:14]))))
    return found


def living(run: RunDir) -> list[int]:
    """Processes that were started for the run."""
    noted = run.root / "sessions"
    return [pid for pid, *_ in sessions({int(pid) for pid in noted.read_text().split()})] if noted.exists() else []


def curves(run: RunDir) -> dict[str, list[int]]:
    """The steps of each of TensorBoard's curves, but for the marks of what happened to a run."""
    board = EventAccumulator(str(run.root / "tb"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"] if not tag.startswith("events/")
    }


def left_over(run: RunDir, cache: Path) -> list[str]:
    """Temporary files, locks and partial results that a finished run should not have, and processes."""
    kept = {".lock", ".start.lock", ".submit.lock"}
    found = [
        str(path.relative_to(folder))
        for folder in (run.root, cache)
        for path in (folder.rglob(".*") if folder.exists() else ())
        if path.name not in kept and "code" not in path.parts and "submitit" not in path.parts
    ]
    deadline = time.monotonic() + LEAVE_S
    while (left := living(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    held = [f"{name} is held" for name in kept if run.is_locked(name)]
    return found + held + [f"process {pid}" for pid in left]


def wrong_at_end(run: RunDir, calm: RunDir) -> list[str]:
    a, b = written(run), written(calm)
    found = [f"other {key}" for key in b if not same(a[key], b[key])]
    a, b = curves(run), curves(calm)
    found += [f"other TensorBoard steps of {tag}" for tag in {**a, **b} if a.get(tag) != b.get(tag)]
    return found + [f"left over: {name}" for name in left_over(run, run.root.with_name(f"{run.name}-features"))]
