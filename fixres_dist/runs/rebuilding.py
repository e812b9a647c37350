"""What the other files of a run say where its state.json or config.yaml is damaged or gone. No torch."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from fixres_dist.base.errors import StorageError, UserError
from fixres_dist.base.small_files import Damaged, read_json, read_lines
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.states import Event, RunState, State

if TYPE_CHECKING:
    from fixres_dist.runs.rundir import RunDir


def state(run: RunDir, reason: str) -> RunState:
    """Of a run without its state.json; raises Damaged and StorageError where those cannot be read either."""
    events, restarts = read_lines(run.events, event=str), dict(RunState().restarts)
    for line in events:
        if line["event"] == Event.LOST or (line["event"] == Event.REQUEUED and isinstance(line.get("reason"), str)):
            counted = line["reason"] if line["event"] == Event.REQUEUED else "failure"
            restarts[counted] = restarts.get(counted, 0) + 1
    seen = (
        (State.DONE, run.done.exists()),
        (State.FAILED, run.failed.exists()),
        (State.RUNNING, run.is_locked()),
        (State.REQUEUED, bool(events) and events[-1]["event"] == Event.REQUEUED),
    )
    state = next((state for state, true in seen if true), State.CANCELLED if events else State.PENDING)
    jobs = [line["job_id"] for line in events if line["event"] == Event.STARTED and isinstance(line.get("job_id"), str)]
    steps = [max(0, run.saved_step()), *(line["step"] for line in read_lines(run.metrics, step=int))]
    step, total = (max(steps), max(steps)) if state == State.DONE else (steps[0], None)
    job = jobs[-1] if jobs else None
    return RunState(state=state, step=step, total_steps=total, reason=reason, job_id=job, restarts=restarts)


def settings(run: RunDir) -> dict[str, Any] | None:
    """The settings of the run that may not change: of its config.yaml; where that is damaged, of its newest checkpoint, or
    None where there is none either, so that nothing depends on them, and where they are those that it has chosen."""
    try:
        return reading.identity(run.submitted())
    except Damaged:
        for file in () if run.chosen.exists() else sorted(run.checkpoints.glob("step_*/meta.json"), reverse=True):
            with contextlib.suppress(OSError, UserError, StorageError, KeyError):
                kept = read_json(file, dict[str, Any], "")["fingerprint"]
                return reading.identity(reading.parse(Config, kept.get("configuration", {})))
    return None
