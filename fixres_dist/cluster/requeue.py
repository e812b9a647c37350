"""What happens to a run around its training: a start begins, a stop signal is answered, a batch script ends.

Two places decide whether a run goes on: rank 0 after an agreed and saved stop, and, when ranks died, the last line of
the batch script: `python -m fixres_dist.cluster.requeue RUN EXIT_CODE`. Both ask Slurm why, since a cancelled job gets the
same signals as a preempted one and must stay cancelled. Plain Python: it runs on a node in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fixres_dist.base.files import write_text
from fixres_dist.cluster import slurm
from fixres_dist.runs.rundir import RunDir


def finished(run: RunDir) -> bool:
    """Whether there is nothing left to do, which is said: arrays start finished tasks again."""
    if run.done.exists():
        print(f"{run.name} is already finished. Results: {run.results}", flush=True)
    return run.done.exists()


def begin(run: RunDir, world_size: int, nodes: Sequence[str]) -> None:
    """Rank 0, once it holds the lock. A start that ended without a word (killed, node lost) is counted here."""
    state = run.state()
    if state.get("state") in ("running", "stopping"):
        count(run, "failure")
        run.event("lost", reason="the start before ended without a word: it was killed, or its node was lost")
    run.failed.unlink(missing_ok=True)
    for left in ("REQUEUE", "BROKEN"):
        (run.root / left).unlink(missing_ok=True)
    job = slurm.own_job()
    run.event("started", world_size=world_size, nodes=list(nodes), job_id=job, step=run.saved_step())
    known = {"job_id": job} if job else {}
    run.update_state(state="running", reason=None, final=False, nodes=list(nodes), world_size=world_size, **known)


def stopped(run: RunDir, number: int, step: int, signal_delay_s: float) -> str:
    """Rank 0, after the agreed stop is saved: requeue the job or leave it cancelled; returns a sentence about it."""
    name, job = signal.Signals(number).name, slurm.own_job()
    shown = slurm.show(job) if job else None
    if job and shown is None:  # a container without Slurm's programs: the batch script can ask
        run.event("stop requested", signal=name, step=step)
        run.update_state(state="stopping", reason=name, eta_s=None)
        ask(run, name)
        return f"{name}: saved at step {step}; the batch script asks Slurm why, and requeues."
    why = slurm.stop(shown, slurm.restart_count(), signal_delay_s, time.time()) if shown else slurm.Stop("cancelled")
    run.event("stop requested", signal=name, step=step, reason=why.reason)
    return settle(run, job or "", why, f"{name} at step {step}")


def broke(run: RunDir, why: str, next_command: str) -> None:
    """Any rank, with an error that a retry may mend. In a job the batch script judges it; the first rank's word is kept,
    since the others break because of it."""
    if slurm.own_job() is None:
        run.fail(why, next_command)
        return
    with contextlib.suppress(FileExistsError), open(run.root / "BROKEN", "x") as file:
        file.write(why)


def ask(run: RunDir, what: str) -> None:
    """Leave word for the batch script that a stop signal came, so that this is no failure."""
    write_text(run.root / "REQUEUE", what + "\n")


def settle(run: RunDir, job: str, why: slurm.Stop, what: str) -> str:
    """Write down and carry out what follows from a stop; the writing comes first, since a requeue kills its caller."""
    if why.reason == "cancelled":
        run.update_state(state="cancelled", reason=f"{what}; the same command goes on from there", eta_s=None)
        run.event("cancelled")
        return f"{what}: saved. The same command goes on from there."
    reason = "preempted" if why.reason == "asked" else why.reason
    count(run, reason)
    run.update_state(state="requeued", reason=f"{reason}: {what}", eta_s=None)
    run.event("requeued", reason=reason)
    refused = "" if why.by_slurm else slurm.requeue(job)
    if refused:
        run.fail(f"{reason} ({what}), and Slurm refused to requeue job {job}: {refused}", run.launch("resume"))
        return run.failed.read_text().strip()
    return f"{what}: saved; job {job} is requeued ({reason})."


def ended(run: RunDir, code: int) -> None:
    """The batch script, after srun: what the ranks decided stands; ranks that died are retried or declared failed."""
    job, state = slurm.own_job(), run.state()
    asked = run.root / "REQUEUE"
    told = asked.read_text().strip() if asked.exists() else ""
    asked.unlink(missing_ok=True)
    if job is None or run.done.exists() or state.get("job_id") not in (job, None):
        return  # another job's id: this one was a twin, and the run is not its to judge
    settled = state.get("state") in ("requeued", "cancelled", "failed")
    if code == 0 and settled and not told:
        return  # srun also ends with 0 when Slurm kills the step, so the state decides
    config = run.config()
    shown = slurm.show(job)
    if shown is None:
        failed(run, job, code, config.cluster.max_restarts)
        return
    why = slurm.stop(shown, slurm.restart_count(), config.cluster.signal_delay_s, time.time())
    if settled and (why.by_slurm or why.reason == "cancelled"):
        return  # rank 0 has settled it and was killed while leaving
    if why.by_slurm and (run.root / "BROKEN").exists() and not slurm.was_preempted(shown):
        why = slurm.Stop("failure", by_slurm=True)  # a node was lost, and Slurm noticed before the ranks did
    if why.by_slurm or why.reason in ("preempted", "cancelled") or told or shown.get("JobState") not in slurm.ALIVE:
        settle(run, job, why, told or f"srun ended with {code}")
        return
    failed(run, job, code, config.cluster.max_restarts)


def failed(run: RunDir, job: str, code: int, max_restarts: int) -> None:
    """Retry from the last checkpoint where that can help: progress since the failure before, and restarts left."""
    state, step = run.state(), run.saved_step()
    broken = run.root / "BROKEN"
    said = broken.read_text().partition("\n")[0] if broken.exists() else ""
    why = "; ".join(filter(None, (culprit(run, job) or f"srun ended with {code}", said)))
    if state.get("final"):
        return  # the user's mistake, which FAILED explains
    failures = state.get("restarts", {}).get("failure", 0)
    if failures >= max_restarts:
        why = f"{failures} restarts after failures reached cluster.max_restarts; the last: {why}"
    elif step <= state.get("last_failure_step", -1):
        since = "the failure before" if failures else "its start"
        why = f"no progress since {since}, so no retry: {why}"
    else:
        broken.unlink(missing_ok=True)
        count(run, "failure")
        run.update_state(state="requeued", reason=f"failure: {why}", last_failure_step=step, eta_s=None)
        run.event("requeued", reason="failure", why=why, step=step)
        refused = slurm.requeue(job)
        if not refused:
            return
        why = f"{why}; Slurm refused to requeue job {job}: {refused}"
    run.fail(why, f"{run.launch('logs')}, mend it, then {run.launch('resume')}")


def count(run: RunDir, reason: str) -> None:
    restarts = run.state().get("restarts") or {}
    run.update_state(
        restarts={"preempted": 0, "timeout": 0, "failure": 0, **restarts, reason: restarts.get(reason, 0) + 1}
    )


def culprit(run: RunDir, job: str) -> str:
    """What srun says of the task that died first, such as `n2: task 3: Killed`; others break because of it, or are
    terminated by srun itself.

    srun's exit code tells less: it is the highest one, so mostly 143 of a task that was terminated.
    """
    file = run.root / "submitit" / job / f"{job}_0_log.err"
    text = file.read_text(errors="replace") if file.exists() else ""
    text = re.split(r"^.*\*\*\* JOB \S+ ON \S+ CANCELLED AT ", text, flags=re.MULTILINE)[-1]  # starts before this one
    said = re.findall(r"^srun: error: (\S+: tasks? \S+: (?!Terminated).+)$", text, re.MULTILINE)
    # A task that breaks ends by itself, with a code; srun hears of it before or after the one that a signal ended.
    said.sort(key=lambda line: "Exited with" in line)
    return said[0] + (" (by hand, or out of memory)" if said[0].endswith("Killed") else "") if said else ""


if __name__ == "__main__":
    ended(RunDir(Path(sys.argv[1])), int(sys.argv[2]))
