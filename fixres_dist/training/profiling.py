"""A trace of some optimizer steps on request (run.profile): what CPU and GPU did, and when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

from torch import profiler

from fixres_dist.runs.rundir import RunDir

FIRST, STEPS = 3, 5  # a trace begins after the first ones, which compile and fill buffers

T = TypeVar("T")


def traced(steps: Iterable[T], run: RunDir, wanted: int | Literal["steps"], main: bool) -> Iterator[T]:
    """`steps`, of which rank 0 (`main`) traces `wanted` into tb/profile/, once in a run; fewer where no more are left."""
    folder = run.root / "tb" / "profile"
    if not (wanted and main) or list(folder.glob("*.json.gz")):
        yield from steps
        return
    write = profiler.tensorboard_trace_handler(str(folder), use_gzip=True)

    def ready(found: profiler.profile) -> None:
        write(found)
        print(f"trace of training steps: {folder}. Next: open it at https://ui.perfetto.dev", flush=True)

    count = STEPS if wanted == "steps" else wanted
    plan = profiler.schedule(wait=FIRST - 1, warmup=1, active=count, repeat=1)
    with profiler.profile(schedule=plan, on_trace_ready=ready) as profile:
        for step in steps:
            yield step
            profile.step()
