"""Runs as a person sees them: rows for launch/status.py, logs, and names. No torch; one squeue call for all runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import unknown
from fixres_dist.base.json_lines import read_lines
from fixres_dist.base.text import duration
from fixres_dist.cluster import slurm
from fixres_dist.runs.rundir import RunDir

UNFINISHED = ("pending", "running", "stopping", "requeued")
FULL_BELOW = 16 * 2**20  # bytes; with less, a full disk is the likely end
GRACE_S = 60.0  # a job shows up in squeue, or leaves it, a moment before its run directory says so


@dataclass(frozen=True)
class Row:
    name: str
    state: str
    reason: str
    step: int
    total_steps: int | None
    percent: float | None
    eta_s: float | None
    images_per_second: float | None
    best_top1: float | None
    restarts: dict[str, int]
    nodes: list[str]
    job_id: str | None
    last_log_age_s: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find(name: str, runs_dir: Path) -> RunDir:
    """The run of that name, or the run at that path; raises UserError with the nearest name."""
    for root in (runs_dir / name, Path(name)):
        if (root / "config.yaml").is_file():
            return RunDir(root)
    names = [run.name for run in every(runs_dir)]
    hint = "" if names else f"There is none in {runs_dir}. Next: --runs-dir DIR, or launch/submit.py."
    raise unknown("run", name, names, hint)


def every(runs_dir: Path) -> list[RunDir]:
    """The runs in a directory, the one changed last at the end."""
    found = [RunDir(path.parent) for path in runs_dir.glob("*/config.yaml")]
    return sorted(found, key=lambda run: run.state().get("updated", 0.0))


def rows(runs: Iterable[RunDir]) -> list[Row]:
    listed = list(runs)
    known = [run for run in listed if slurm_job(run) and run.state().get("state") in UNFINISHED]
    queue = slurm.queue({run.root.owner() for run in known}) if known else {}
    return [row(run, queue) for run in listed]


def slurm_job(run: RunDir) -> str | None:
    job = str(run.state().get("job_id") or "")
    return job if job and not job.startswith("local-") else None


def row(run: RunDir, queue: dict[str, slurm.Queued] | None) -> Row:
    """What the run directory says, corrected by the queue: a killed job cannot write that it has ended."""
    state = run.state()
    word, reason = state.get("state", "pending"), str(state.get("reason") or "")
    nodes = list(state.get("nodes") or []) if word in ("running", "stopping") else []
    job = slurm_job(run)
    if job and queue is None and word in UNFINISHED:
        reason = "; ".join(filter(None, (reason, "squeue does not answer")))
    elif job and queue is not None and word in UNFINISHED:
        if job in queue:
            reason = "; ".join(filter(None, (reason, slurm.in_words(queue[job]))))
            if word in ("pending", "requeued") and queue[job].state == "RUNNING":
                reason = "; ".join(filter(None, (reason, f"starting on {queue[job].nodes}")))
        elif time.time() - state.get("updated", 0.0) > GRACE_S or not run.is_locked():
            was, word = word, "failed"
            reason = f"{was}, but job {job} has left the queue{room(run)}. Next: {run.launch('resume')}"
    elif word in ("running", "stopping") and not job and not run.is_locked():
        word = "failed"
        reason = f"its process is gone{room(run)}. Next, from the last checkpoint: {run.command()}"
    step, total = int(state.get("step") or 0), state.get("total_steps")
    if word == "done" and total:
        step = total
    tops = [line["top1"] for line in read_lines(run.metrics) if "top1" in line]
    return Row(
        name=run.name,
        state=word,
        reason=reason,
        step=step,
        total_steps=total,
        percent=round(100 * step / total, 1) if total else None,
        eta_s=state.get("eta_s") if word in ("running", "done") else None,
        images_per_second=state.get("images_per_second"),
        best_top1=max(tops, default=None),
        restarts=state.get("restarts") or {},
        nodes=nodes,
        job_id=state.get("job_id"),
        last_log_age_s=log_age(run),
    )


def room(run: RunDir) -> str:
    """A full disk in words: what ended there could not write why."""
    free = shutil.disk_usage(run.root).free
    return f"; {free / 2**20:.1f} MiB are free where {run.root} is: make room first" if free < FULL_BELOW else ""


def log_age(run: RunDir) -> float | None:
    """Seconds since the run last wrote a log or a line of metrics."""
    files = [*logs(run).values(), run.metrics, run.root / "events.jsonl"]
    times = [file.stat().st_mtime for file in files if file.exists()]
    return round(time.time() - max(times), 1) if times else None


def logs(run: RunDir) -> dict[tuple[int, str], Path]:
    """Log files of the newest job by (rank, out | err)."""
    jobs = [path for path in (run.root / "submitit").glob("*") if path.is_dir()]
    if not jobs:
        return {}
    newest = max(jobs, key=lambda path: path.stat().st_mtime)
    found = {}
    for file in newest.glob("*_log.*"):
        rank = file.name.removesuffix(file.suffix).removesuffix("_log").rpartition("_")[2]
        found[int(rank), file.suffix[1:]] = file
    return found


def table(listed: list[Row]) -> str:
    """One line per run, and its reason in words below it."""
    head = ("NAME", "STATE", "STEP", "%", "ETA", "IMG/S", "TOP-1", "RESTARTS", "NODES", "LOG")
    cells = [head]
    for r in listed:
        cells.append(
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
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    for i in range(len(listed), 0, -1):
        if listed[i - 1].reason:
            lines.insert(i + 1, "  " + listed[i - 1].reason)
    return "\n".join(lines)
