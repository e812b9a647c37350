"""The logs of a run's starts as one stream of lines in the order of time: of all ranks and of the batch script. No torch.

Every job has a folder of logs. A requeued job appends to them, so its batch script begins each start with a line of its own.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fixres_dist.base import log_times
from fixres_dist.base.small_files import read_lines
from fixres_dist.cluster import slurm
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED, Event, State

MARK = "fixres: start"
# In the batch script, on both streams, which are also those of rank 0.
MARK_LINES = (
    f'mark="{MARK} $((${{SLURM_RESTART_COUNT:-0}} + 1)) of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST at $(date +%FT%T)"',
    'echo "$mark"; echo "$mark" >&2',
)
BATCH = -1  # instead of a rank: the batch script, where its output has a file of its own
# Lines that tell the time at which they were written: of batch scripts, Slurm and submitit.
TELLS_TIME = re.compile(
    rf"(?:{MARK} .* at |slurmstepd\S* error: \*\*\* (?:JOB|STEP) .* AT |submitit \w+ \()"
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:,(\d{3}))?"
)
# What submitit says of files that it reads, and of each signal that it leaves to us.
ASIDE = re.compile(r"submitit (INFO|WARNING \([^)]*\) - Bypassing signal)")


class Line(NamedTuple):
    time: float  # Unix time at which it was written, to a second or so
    start: int  # of the run, from 1
    rank: int  # or BATCH
    text: str


def folders(run: RunDir) -> list[Path]:
    """Of the jobs, in the order in which they were submitted; one that slurm/train.sbatch could not make is not there."""

    def submitted(folder: Path) -> float:
        jobs = (folder / f"{folder.name}_{name}" for name in ("submitted.pkl", "0_log.out"))
        return min(path.stat().st_mtime for path in (*jobs, folder, batch_output(run, folder)) if path.exists())

    found = {path for path in (run.root / "submitit").glob("*") if path.is_dir()}
    found |= {run.root / "submitit" / path.stem.removeprefix("slurm-") for path in run.root.glob("slurm-*.out")}
    return sorted(found, key=submitted)


def batch_output(run: RunDir, folder: Path) -> Path:
    """Of slurm/train.sbatch, which has a file of its own; submitit's stands with rank 0's."""
    return run.root / f"slurm-{folder.name}.out"


def files(folder: Path) -> dict[tuple[int, str], Path]:
    """The logs of a job by (rank, out | err), named JOB_RANK_log.out and .err."""
    found = ((log_times.LOG.search(file.name), file) for file in folder.glob("*_log.*"))
    logs = {(int(match[1]), match[2]): file for match, file in found if match}
    return dict(sorted(logs.items(), key=lambda log: (log[0][0], log[0][1] == "err")))


def outputs(run: RunDir, folder: Path) -> dict[tuple[int, str], Path]:
    """The same with the output of the batch script, where that has a file of its own."""
    batch = batch_output(run, folder)
    return files(folder) | ({(BATCH, "out"): batch} if batch.exists() else {})


def new_lines(run: RunDir, shown: dict[Path, int], torn: bool = True) -> list[Line]:
    """The lines of all starts that are not `shown` yet, in the order of time; updates `shown`, bytes of each log.

    `torn`: also a last line that may not be whole.
    """
    found: list[Line] = []
    starts = 0
    for folder in folders(run):
        logs = [(rank, stream, file) for (rank, stream), file in outputs(run, folder).items()]
        begun = begins(file for rank, stream, file in logs if rank in (0, BATCH) and stream == "out")
        for rank, stream, file in logs:
            if file.stat().st_size == shown.get(file, 0):
                continue
            end, before = 0, b""
            for when, raw in timed(file):
                end += len(raw)
                twice = raw.startswith(MARK.encode()) and (stream == "err" or raw == before)
                if end > shown.get(file, 0) and (torn or raw.endswith(b"\n")):
                    if not twice:
                        start = starts + max(1, bisect_right(begun, when))
                        found.append(Line(when, start, rank, raw.decode(errors="replace").rstrip("\n")))
                    shown[file] = end
                before = raw
        starts += max(1, len(begun)) if any(file.stat().st_size for *_, file in logs) else 0
    return sorted(found, key=lambda line: line.time)


def timed(file: Path) -> list[tuple[float, bytes]]:
    """The lines of a log with the Unix times at which they were written, which never fall."""
    with open(file, "rb") as log:
        raws = log.readlines()
    sizes, times = zip(*log_times.read(file), strict=True)
    position, latest, found = sum(map(len, raws)), float("inf"), []
    for raw in reversed(raws):
        said = tells_time(raw)
        noted = times[min(bisect_left(sizes, position), len(times) - 1)]
        latest = min(latest, noted if said is None else said)
        found.append((latest, raw))
        if raw.startswith(MARK.encode()):
            latest -= 1e-3  # what stands before it is of the start before
        position -= len(raw)
    return found[::-1]


def tells_time(raw: bytes) -> float | None:
    match = TELLS_TIME.match(raw.decode(errors="replace"))
    if match is None:
        return None
    day, clock, milliseconds = match.groups()
    whole_s = time.mktime(time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S"))
    by_slurm_s = 0.0 if raw.startswith((MARK.encode(), b"submitit")) else 0.999  # within the second that it tells
    return whole_s + int(milliseconds or 0) / 1000 + by_slurm_s


def begins(logs: Iterable[Path]) -> list[float]:
    """The times at which a job's starts began, told by the logs of its batch script and of rank 0."""
    raws = [raw for file in logs for raw in file.read_bytes().splitlines()]
    marked = {tells_time(raw) for raw in raws if raw.startswith(MARK.encode())}
    if not marked:
        marked = {tells_time(raw) for raw in raws if b") - Starting with JobEnvironment(" in raw}
    return sorted(when for when in marked if when is not None)


def silence(run: RunDir, state: State, reason: str) -> str:
    """Why the run's newest job has no line, and what to type next; empty where it has one. `state` and `reason`: as
    `status` shows them."""
    job = run.state().slurm_job
    jobs = [folder for folder in folders(run) if job in (None, folder.name)]
    if any(file.stat().st_size for folder in jobs for file in outputs(run, folder).values()):
        return ""
    places = [line.get("cluster") for line in read_lines(run.events, event=str) if line["event"] == Event.SUBMITTED]
    if places[-1:] == ["inline"]:
        return f"{run.name} has no log: the command that ran it (--cluster inline) printed it. Next: {run.command('status')}"
    if state in UNFINISHED or job is None:
        why = f": {reason}" if reason else ""
        return f"{run.name} has no log yet{why}" + ("" if "Next" in why else f". Next: {run.command('status')}")
    started = (line for line in read_lines(run.events, event=str, job_id=str) if line["event"] == Event.STARTED)
    if any(line["job_id"] == job for line in started):
        gone = f"{run.name} has no log any more: it stood in {run.root / 'submitit' / job}"
        return f"{gone}. Next: {run.command('status')}"
    return f"{run.name}: {died_silently(run, job)}. Next: {run.command('resume')}"


def died_silently(run: RunDir, job: str) -> str:
    """What is known of a job that left the queue without a line in its logs."""
    shown, said = slurm.last_state(job), "Slurm does not know it any more"
    if shown:
        nodes, code = shown.get("NodeList", ""), shown.get("ExitCode")
        where = "without a node" if nodes in ("", "(null)", "None assigned") else f"on {nodes}"
        why = " (Slurm could not write its output)" if code == "0:53" else ""
        said = f"Slurm says: {shown.get('JobState')}, reason {shown.get('Reason')}, exit code {code}{why}, {where}"
    folder = run.root.resolve() / "submitit" / job
    own = folder / f"{job}_0_log.out" if run.submission.exists() else batch_output(run, folder).resolve()
    return f"job {job} ended before its first line. {said}. Its output would be in {own}"
