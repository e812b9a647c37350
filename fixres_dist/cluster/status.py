"""What a person sees of the runs: rows of `status`, log files, runs by name. No torch; one squeue call for all runs."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.errors import StorageError, UserError, printable, unknown
from fixres_dist.base.files import owner
from fixres_dist.base.small_files import lines_of, read_lines
from fixres_dist.base.text import duration, one_line, table
from fixres_dist.cluster import logs, slurm, words
from fixres_dist.config import recipes
from fixres_dist.runs.results import OTHER_SIZE, Results
from fixres_dist.runs.rundir import JOBS, RunDir
from fixres_dist.runs.states import UNFINISHED, WORKING, Event, RunState, State

FULL_BELOW = 16 * 2**20  # bytes; with less, a full disk is the likely end
SLURM_EVERY_S = 30.0  # how often commands that go on looking ask Slurm; the files they read all the time
HELD = ("REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT")  # squeue's states of jobs that wait to be released
STANDING = ("PENDING", "SUSPENDED", "STOPPED", *HELD)  # of jobs that do no work
IDLE_S = 120.0  # a start compiles, and loaders wait for a file system, for so long without a batch
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
    top1: float | None  # per cent: the result's, or before there is one the newest evaluation's
    restarts: Mapping[str, int]
    nodes: list[str]
    job_id: str | None
    last_log_age_s: float | None
    expected_start: str | None = None  # of a job that waits, if Slurm says when
    time_used: str | None = None  # wall time of the job's start, such as 3:02:11
    time_limit: str | None = None
    skipped_images: int = 0  # that could not be decoded (data.on_bad=skip)
    top1_of: str = ""  # which evaluation top1 is of: `after`, the result, or a name with its resolution


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


def named(names: Iterable[str], runs_dir: Path) -> list[RunDir]:
    """The runs of these names; the name of a grid or a table stands for all its runs."""
    found: list[RunDir] = []
    for name in names:
        exact = any(RunDir(root).config_file.is_file() for root in (runs_dir / name, Path(name)))
        group = [] if exact else [run for run in every(runs_dir) if of_grid(run.name, name)]
        found += sorted(group, key=lambda run: run.name) or [find(name, runs_dir)]
    return list(dict.fromkeys(found))


def of_grid(run: str, name: str) -> bool:
    """Whether a run is one of the grid or table `name`: `name-key=value`, or `name-recipe` of a table."""
    rest = run.removeprefix(f"{name}-")
    return rest != run and (re.match(r"\w+=", rest) is not None or rest.split("-")[0] in recipes.model_names())


def every(runs_dir: Path) -> list[RunDir]:
    """The runs in a directory and the jobs of commands on them, the one changed last at the end."""
    found = [RunDir(path.parent) for form in ("*", f"*/{JOBS}/*") for path in runs_dir.glob(f"{form}/config.yaml")]
    return sorted(found, key=lambda run: run.state().updated)


def rows(runs: Iterable[RunDir], max_age_s: float = 0.0) -> list[Row]:
    """A row for each run, in this order; asks squeue once, and only if a run may be in the queue.

    `max_age_s`: squeue's last answer is good enough if it is not older, and knows the jobs that were there then.
    """
    states = [(run, run.state()) for run in runs]
    waiting = [(run, state) for run, state in states if state.slurm_job and state.state in UNFINISHED]
    owners = {owner(run.root) for run, _ in waiting}
    queue = slurm.queue(owners, max_age_s) if owners else {}
    unknown = [state for _, state in waiting if state.slurm_job not in (queue or ())]
    if max_age_s and queue is not None and any(time.time() - state.updated < max_age_s for state in unknown):
        queue = slurm.queue(owners)  # of a job that is newer than the answer
    return [readable_row(run, state, queue) for run, state in states]


def readable_row(run: RunDir, state: RunState, queue: Mapping[str, slurm.Queued] | None) -> Row:
    """The run's row; one damaged run must not hide the others."""
    try:
        return row(run, state, queue)
    except Exception as error:
        said = f"its files cannot be read ({type(error).__name__}: {error}). Next: look at {run.root}"
        reason = "; ".join(filter(None, (state.reason, said)))
    return Row(run.name, state.state, reason, state.step, None, None, None, None, None, {}, [], None, None)


def damages(run: RunDir) -> list[str]:
    """What is damaged of the small files that the run's next start, or its report, reads."""
    found = []
    for read in (run.config, lambda: Results.read(run) if run.results.exists() else None):
        try:
            read()
        except (UserError, StorageError) as error:
            found.append(str(error))
    for file, needed in ((run.metrics, {"step": int}), (run.events, {"event": str})):
        try:
            if damaged := lines_of(file, **needed).damaged:
                found.append(f"{file} has {damaged} damaged line{'s' * (damaged > 1)}, which are passed over")
        except (UserError, StorageError) as error:
            found.append(str(error))
    return found


def verdict(run: RunDir) -> tuple[Results | None, str]:
    """The results of a finished run, and what they say of one that made its weights worse."""
    try:
        result = Results.read(run)
        return result, result.verdict(run)
    except (UserError, StorageError):  # `damages` says so
        return None, ""


def row(run: RunDir, state: RunState, queue: Mapping[str, slurm.Queued] | None) -> Row:
    now, reason = as_seen(run, state, queue)
    job = (queue or {}).get(state.slurm_job or "", slurm.Queued("", "", ""))
    stands = now not in WORKING or job.state in STANDING
    idle_s = 0.0 if stands else no_progress_s(run)
    at_work = not stands and not idle_s
    idle = f"no progress for {duration(idle_s)}" if idle_s else ""
    skipped = run.skipped()
    step = state.total_steps if now == State.DONE and state.total_steps else state.step
    result, worse = verdict(run) if now == State.DONE else (None, "")
    top1, top1_of = (result.after.top1, "after") if result else newest_top1(run)
    told = (reason, worse, idle, f"{skipped} images skipped" if skipped else "", *damages(run))
    return Row(
        name=run.name,
        state=now,
        reason="; ".join(filter(None, told)),
        step=step,
        total_steps=state.total_steps,
        percent=round(100 * step / state.total_steps, 1) if state.total_steps else None,
        eta_s=state.eta_s if now == State.DONE or (now == State.RUNNING and at_work) else None,
        images_per_second=state.images_per_second
        if now in (State.DONE, State.FAILED, State.CANCELLED) or at_work
        else None,
        top1=top1,
        top1_of=top1_of,
        restarts=state.restarts,
        nodes=list(state.nodes) if now in WORKING else [],
        job_id=state.job_id,
        last_log_age_s=log_age(run),
        expected_start=job.start if job.state == "PENDING" and job.start not in ("", "N/A", "Unknown") else None,
        time_used=(job.used or None) if now in WORKING else None,
        time_limit=job.limit or None,
        skipped_images=skipped,
    )


def newest_top1(run: RunDir) -> tuple[float | None, str]:
    """Top-1 of the newest evaluation of the weights in training, and which one that is, with its resolution."""
    try:
        lines = read_lines(run.metrics, step=int, evaluation=str, top1=float, res=int)
    except (UserError, StorageError):  # `damages` says so
        return None, ""
    lines = [line for line in lines if line["evaluation"] != OTHER_SIZE]
    return (lines[-1]["top1"], f"{lines[-1]['evaluation']}, {lines[-1]['res']} px") if lines else (None, "")


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
        shown = queue[job]
        if now in WORKING and shown.state in ("PENDING", *HELD):
            now, reasons = State.REQUEUED, ["Slurm has requeued it"]  # a node was lost, and nobody could write
        reasons.append(words.in_words(job, shown))
        if now not in WORKING and shown.state == "RUNNING":
            reasons = [f"job {job} is starting on {shown.nodes}"]
    elif job and (time.time() - state.updated > GRACE_S or not run.is_locked()):
        return lost.state, f"{now}, but job {job} has left the queue{room(run)}. Next: {run.command('resume')}"
    elif now in WORKING and not job and not run.is_locked():
        return lost.state, f"its process is gone{room(run)}. Next, from the last checkpoint: {run.again()}"
    return now, "; ".join(filter(None, reasons))


def no_progress_s(run: RunDir) -> float:
    """Seconds since the last batch or phase of the start, where they are more than IDLE_S; else 0."""
    try:
        idle_s = time.time() - run.progress.stat().st_mtime
    except OSError:  # a run of an older version
        return 0.0
    return idle_s if idle_s > IDLE_S else 0.0


def room(run: RunDir) -> str:
    """A full disk in words: a process that ended on it could not write why."""
    free = shutil.disk_usage(run.root).free
    return f"; {free / 2**20:.1f} MiB are free where {run.root} is: make room first" if free < FULL_BELOW else ""


def log_age(run: RunDir) -> float | None:
    """Seconds since the run last wrote a log or a line of metrics."""
    newest = logs.folders(run)[-1:]
    written = [file for folder in newest for file in logs.files(folder).values()]
    times = [file.stat().st_mtime for file in (*written, run.metrics, run.events) if file.exists()]
    return round(time.time() - max(times), 1) if times else None


HEAD = ("NAME", "STATE", "STEP", "%", "ETA", "IMG/S", "TOP-1", "RESTARTS", "NODES", "LOG")


def cells(r: Row) -> tuple[str, ...]:
    """Under HEAD, on one line."""
    return tuple(
        map(
            one_line,
            (
                r.name,
                r.state,
                f"{r.step}/{r.total_steps or '?'}",
                "" if r.percent is None else f"{r.percent:.0f}",
                "" if r.eta_s is None else duration(r.eta_s),
                "" if r.images_per_second is None else f"{r.images_per_second:,.0f}",
                "" if r.top1 is None else f"{r.top1:.2f}{'' if r.top1_of == 'after' else f' {r.top1_of}'}",
                " ".join(f"{count} {reason}" for reason, count in r.restarts.items() if count) or "0",
                ",".join(r.nodes),
                "" if r.last_log_age_s is None else f"{duration(r.last_log_age_s)} ago",
            ),
        )
    )


def as_table(listed: list[Row]) -> str:
    """One line per run, and its reason in words below it."""
    first, *lines = table(HEAD, map(cells, listed)).splitlines()
    below = zip(lines, listed, strict=True)
    return "\n".join([first, *(line + (f"\n  {printable(r.reason)}" if r.reason else "") for line, r in below)])
