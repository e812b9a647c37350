"""What a person sees of the runs: rows of `status`, log files, runs by name. No torch; one squeue call for all runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.errors import unknown
from fixres_dist.base.files import owner
from fixres_dist.base.json_lines import read_lines
from fixres_dist.base.text import duration, table
from fixres_dist.cluster import slurm
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED, WORKING, Event, RunState, State

FULL_BELOW = 16 * 2**20  # bytes; with less, a full disk is the likely end
GRACE_S = 60.0  # a job appears in squeue, or leaves it, a moment before its run directory says so


@dataclass(frozen=True)
class Row:
    """One run in `status`; the fields are the keys of `status --json`."""

    name: str
    state: State
    reason: str
    step: int
    total_steps: int | None
    percent: float | None  # of the steps
    eta_s: float | None
    images_per_second: float | None
    best_top1: float | None  # per cent, of the run's own evaluations
    restarts: Mapping[str, int]
    nodes: list[str]
    job_id: str | None
    last_log_age_s: float | None


def find(name: str, runs_dir: Path) -> RunDir:
    """The run of that name, or the run at that path; raises UserError with the nearest name."""
    for root in (runs_dir / name, Path(name)):
        if (run := RunDir(root)).config_file.is_file():
            return run
    names = [run.name for run in every(runs_dir)]
    raise unknown(
        "run",
        name,
        names,
        "" if names else f"There is none in {runs_dir}. Next: --runs-dir DIR, or {command('submit')}.",
    )


def every(runs_dir: Path) -> list[RunDir]:
    """The runs in a directory, the one changed last at the end."""
    found = [RunDir(path.parent) for path in runs_dir.glob("*/config.yaml")]
    return sorted(found, key=lambda run: run.state().updated)


def rows(runs: Iterable[RunDir]) -> list[Row]:
    """A row for each run, in this order; asks squeue once, and only if a run may be in the queue."""
    states = [(run, run.state()) for run in runs]
    owners = {owner(run.root) for run, state in states if state.slurm_job and state.state in UNFINISHED}
    queue = slurm.queue(owners) if owners else {}
    return [row(run, state, queue) for run, state in states]


def row(run: RunDir, state: RunState, queue: Mapping[str, slurm.Queued] | None) -> Row:
    now, reason = as_seen(run, state, queue)
    step = state.total_steps if now == State.DONE and state.total_steps else state.step
    tops = [line["top1"] for line in read_lines(run.metrics) if "top1" in line]
    return Row(
        name=run.name,
        state=now,
        reason=reason,
        step=step,
        total_steps=state.total_steps,
        percent=round(100 * step / state.total_steps, 1) if state.total_steps else None,
        eta_s=state.eta_s if now in (State.RUNNING, State.DONE) else None,
        images_per_second=state.images_per_second,
        best_top1=max(tops, default=None),
        restarts=state.restarts,
        nodes=list(state.nodes) if state.state in WORKING else [],
        job_id=state.job_id,
        last_log_age_s=log_age(run),
    )


def as_seen(run: RunDir, state: RunState, queue: Mapping[str, slurm.Queued] | None) -> tuple[State, str]:
    """State and reason of the run directory, corrected by the queue: a killed job cannot write that it has ended.

    `queue` is None where squeue does not answer.
    """
    now, job, reasons = state.state, state.slurm_job, [state.reason or ""]
    lost = state.after(Event.LOST)
    if not lost:
        return now, reasons[0]
    if job and queue is None:
        reasons.append("squeue does not answer")
    elif job and queue and job in queue:
        reasons.append(slurm.in_words(queue[job]))
        if now not in WORKING and queue[job].state == "RUNNING":
            reasons.append(f"starting on {queue[job].nodes}")
    elif job and (time.time() - state.updated > GRACE_S or not run.is_locked()):
        return lost.state, f"{now}, but job {job} has left the queue{room(run)}. Next: {run.command('resume')}"
    elif now in WORKING and not job and not run.is_locked():
        return lost.state, f"its process is gone{room(run)}. Next, from the last checkpoint: {run.submit_command()}"
    return now, "; ".join(filter(None, reasons))


def room(run: RunDir) -> str:
    """A full disk in words: a process that ended on it could not write why."""
    free = shutil.disk_usage(run.root).free
    return f"; {free / 2**20:.1f} MiB are free where {run.root} is: make room first" if free < FULL_BELOW else ""


def log_age(run: RunDir) -> float | None:
    """Seconds since the run last wrote a log or a line of metrics."""
    times = [file.stat().st_mtime for file in (*logs(run).values(), run.metrics, run.events) if file.exists()]
    return round(time.time() - max(times), 1) if times else None


def logs(run: RunDir) -> dict[tuple[int, str], Path]:
    """Log files of the newest job by (rank, out | err), named JOB_RANK_log.out and .err."""
    jobs = [path for path in (run.root / "submitit").glob("*") if path.is_dir()]
    if not jobs:
        return {}
    newest = max(jobs, key=lambda path: path.stat().st_mtime)
    return {(int(file.stem.split("_")[-2]), file.suffix[1:]): file for file in newest.glob("*_log.*")}


def as_table(listed: list[Row]) -> str:
    """One line per run, and its reason in words below it."""
    head = ("NAME", "STATE", "STEP", "%", "ETA", "IMG/S", "TOP-1", "RESTARTS", "NODES", "LOG")
    cells = [
        (
            r.name,
            r.state,
            f"{r.step}/{r.total_steps or '?'}",
            "" if r.percent is None else f"{r.percent:.0f}",
            "" if r.eta_s is None else duration(r.eta_s),
            "" if r.images_per_second is None else f"{r.images_per_second:,.0f}",
            "" if r.best_top1 is None else f"{r.best_top1:.2f}",
            " ".join(f"{count} {reason}" for reason, count in r.restarts.items() if count) or "0",
            ",".join(r.nodes),
            "" if r.last_log_age_s is None else f"{duration(r.last_log_age_s)} ago",
        )
        for r in listed
    ]
    first, *lines = table(head, cells).splitlines()
    below = zip(lines, listed, strict=True)
    return "\n".join([first, *(line + (f"\n  {r.reason}" if r.reason else "") for line, r in below)])
