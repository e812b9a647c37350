"""A run's states, what each event does to them (docs/architecture.md has the table), and state.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple


class State(StrEnum):
    PENDING = "pending"  # prepared, or waiting in Slurm's queue
    RUNNING = "running"
    STOPPING = "stopping"  # a stop signal came, the ranks save
    REQUEUED = "requeued"  # its job waits in the queue again
    DONE = "done"
    FAILED = "failed"  # the file FAILED says why
    CANCELLED = "cancelled"  # stopped and saved; the submit command resumes it


class Event(StrEnum):
    SUBMITTED = "submitted"
    STARTED = "started"
    STOP_REQUESTED = "stop requested"
    REQUEUED = "requeued"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"
    DONE = "done"


WORKING = frozenset({State.RUNNING, State.STOPPING})
UNFINISHED = WORKING | {State.PENDING, State.REQUEUED}  # a process or a job works on the run, or will
NOT_DONE = frozenset(State) - {State.DONE}


class Transition(NamedTuple):
    """In one of the states `of`, the event leads to the state `to`; in any other it changes nothing."""

    of: frozenset[State]
    to: State


TRANSITIONS: Mapping[Event, Transition] = {
    Event.SUBMITTED: Transition(NOT_DONE, State.PENDING),  # to Slurm; a local start goes straight to `started`
    Event.STARTED: Transition(frozenset(State), State.RUNNING),  # also of a run killed between its state and its DONE
    Event.STOP_REQUESTED: Transition(WORKING, State.STOPPING),
    Event.REQUEUED: Transition(NOT_DONE, State.REQUEUED),
    Event.CANCELLED: Transition(UNFINISHED, State.CANCELLED),
    Event.FAILED: Transition(NOT_DONE, State.FAILED),
    # Nobody is left to write it: `status` shows it, and the next start counts it as a failure.
    Event.LOST: Transition(UNFINISHED, State.FAILED),
    Event.DONE: Transition(frozenset(State), State.DONE),
}


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of state.json."""

    state: State = State.PENDING
    step: int = 0  # optimizer steps done over both stages
    total_steps: int | None = None  # None: no start has counted the images yet
    epoch: int = 0  # of the stage
    images_per_second: float | None = None  # of the run, over all ranks
    eta_s: float | None = None  # seconds until the last step
    restarts: Mapping[str, int] = field(default_factory=lambda: {"preempted": 0, "timeout": 0, "failure": 0})
    job_id: str | None = None  # Slurm's N or N_TASK; local-N outside of Slurm
    reason: str | None = None  # of the state, in words
    updated: float = 0.0  # Unix time in seconds
    final: bool = False  # the failure is one that no retry can mend
    last_failure_step: int = -1  # the newest checkpoint's step at the last failure
    nodes: tuple[str, ...] = ()
    world_size: int | None = None  # ranks

    @property
    def slurm_job(self) -> str | None:
        """The job's id, if Slurm has the run."""
        return self.job_id if self.job_id and not self.job_id.startswith("local-") else None

    def after(self, event: Event) -> RunState | None:
        """The state that follows; None where the event changes nothing."""
        of, to = TRANSITIONS[event]
        return replace(self, state=to) if self.state in of else None

    def restarts_with(self, reason: str) -> Mapping[str, int]:
        """The restarts, one more of them for `reason`: preempted, timeout or failure."""
        return {**self.restarts, reason: self.restarts.get(reason, 0) + 1}


def details(event: Mapping[str, Any]) -> str:
    """What a line of events.jsonl has beside its time and name, in one text."""
    kept = {key: value for key, value in event.items() if key not in ("time", "event") and value not in (None, "", [])}
    return "; ".join(f"{key} {value}" for key, value in kept.items())
