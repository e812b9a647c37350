"""What a run has left at its end, compared with the undisturbed run's: files, curves, processes, locks."""

from __future__ import annotations

import logging
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixres_dist.runs.rundir import RunDir
from support.preemptions import same, written

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purged step
MARK = "SOAK_RUN"  # in the environment of a start: its run's folder


def living(run: RunDir) -> list[int]:
    """Processes that were started for the run."""
    mark, found = f"{MARK}={run.root}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def curves(run: RunDir) -> dict[str, list[int]]:
    """The steps of each of TensorBoard's curves, but for the marks of what happened to a run."""
    board = EventAccumulator(str(run.root / "tb"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"] if not tag.startswith("events/")
    }


def left_over(run: RunDir, cache: Path) -> list[str]:
    """Temporary files, locks and partial results that a finished run should not have; processes are asked for apart."""
    kept = {".lock", ".start.lock", ".submit.lock"}
    found = [
        str(path.relative_to(folder))
        for folder in (run.root, cache)
        for path in (folder.rglob(".*") if folder.exists() else ())
        if path.name not in kept and "code" not in path.parts and "submitit" not in path.parts
    ]
    return found + [f"{name} is held" for name in kept if run.is_locked(name)] + [str(pid) for pid in living(run)]


def wrong_at_end(run: RunDir, calm: RunDir) -> list[str]:
    a, b = written(run), written(calm)
    found = [f"other {key}" for key in b if not same(a[key], b[key])]
    a, b = curves(run), curves(calm)
    found += [f"other TensorBoard steps of {tag}" for tag in {**a, **b} if a.get(tag) != b.get(tag)]
    return found + [f"left over: {name}" for name in left_over(run, run.root.with_name(f"{run.name}-features"))]
