"""What happens to a run around its training: a start begins, a stop signal is answered, a batch script ends.

Two places decide whether a run goes on: rank 0 after a stop on which the ranks agreed and which is saved, and, when
ranks died, the last line of the batch script: `python -m fixres_dist.cluster.requeue RUN EXIT_CODE`. Both ask Slurm why,
since a cancelled job gets the same signals as a preempted one and must stay cancelled. No torch: it runs on a node in a
fraction of a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import create, remove, write_text
from fixres_dist.base.small_files import read_lines, read_note
from fixres_dist.base.watchdog import NO_PROGRESS
from fixres_dist.cluster import notify, reasons, slurm
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import WORKING, Event, RunState, State

# Flag files of the ranks for the batch script, with a line of text each.
STOP_UNJUDGED = "REQUEUE"  # a stop signal came, and the ranks could not ask Slurm why
FAILURES = (Event.REQUEUED, Event.FAILED)  # events that may name the node of a failure
PREEMPTED = "PREEMPTED"  # rank 0 was told so; the next start reads it, where this one was killed before it could save
TOO_SHORT = (
    "the start before was preempted, and killed before it could save: its GraceTime is shorter than a step and a save"
)
BROKEN = "BROKEN"  # a rank ended with an error that a retry may mend
# Of the seconds between a warning and the end: how long Slurm is asked again by rank 0, and then by the batch script.
RANKS_PATIENCE, BATCH_PATIENCE = 0.25, 0.5


def finished(run: RunDir) -> bool:
    """Whether nothing is left to do; says so, since Slurm starts finished tasks of a requeued array again."""
    if run.done.exists():
        print(f"{run.name} is already finished. Results: {run.result}", flush=True)
    return run.done.exists()


def begin(run: RunDir, world_size: int, nodes: Sequence[str]) -> None:
    """Rank 0, once it holds the lock. An earlier start that left no other state (killed, node lost) is counted.

    Raises UserError in a job that Slurm has started again and again without progress, since nobody else would end that.
    """
    state, job = run.state(), slurm.own_job()
    # Without a job of its own the run has left Slurm, if it was there; the command of a local start has noted its id.
    changes: dict[str, object] = {"job_id": job} if job or state.slurm_job else {}
    if state.state in WORKING:
        late = (run.root / PREEMPTED).exists()
        changes["restarts"] = state.restarts_with("preempted" if late else "failure")
        run.event(Event.LOST, reason=TOO_SHORT if late else "the start before was killed, or its node was lost")
        if job and not late:
            check_losses(run, state)
            changes["last_failure_step"] = run.saved_step()
    for left in (run.failed, run.root / STOP_UNJUDGED, run.root / BROKEN, run.root / PREEMPTED):
        remove(left)
    run.event(Event.STARTED, world_size=world_size, nodes=list(nodes), job_id=job, step=run.saved_step())
    changes |= {
        "eta_s": None,
        "images_per_second": None,
        "reason": None,
        "final": False,
        "nodes": list(nodes),
        "world_size": world_size,
    }
    run.update_state(Event.STARTED, **changes)


def check_losses(run: RunDir, state: RunState) -> None:
    """Raises UserError where the start before was lost without progress, as were more before it than may be retried."""
    losses, step = state.restarts.get("failure", 0) + 1, run.saved_step()
    if losses > run.config().cluster.max_restarts and step <= state.last_failure_step:
        nodes = f", the last one on {','.join(state.nodes)}" if state.nodes else ""
        raise UserError(
            f"{losses} starts were killed or lost their node{nodes}, and there is no progress since step {max(0, step)}; more "
            f"than cluster.max_restarts are not tried again. A node that runs out of memory ends so too (cluster.mem). "
            f"Next: {run.command('logs')}, then {run.command('resume')}"
        )


def stopped(run: RunDir, number: int, step: int, signal_delay_s: float) -> str:
    """Rank 0, after the agreed stop is saved: requeue the job or leave it cancelled; returns a sentence about it.

    `number` is the signal's, `signal_delay_s` how long before the time limit Slurm was asked to warn.
    """
    name, job = signal.Signals(number).name, slurm.own_job()
    patience_s = RANKS_PATIENCE * signal_delay_s
    shown = slurm.show(job, patience_s) if job else None
    if job and shown is None:  # a container without Slurm's programs: the batch script can ask
        run.event(Event.STOP_REQUESTED, signal=name, step=step)
        run.update_state(Event.STOP_REQUESTED, reason=name, eta_s=None)
        leave_to_batch_script(run, name)
        return f"{name}: saved at step {step}; the batch script asks Slurm why, and the job continues from there."
    why = slurm.why_stopped(shown, signal_delay_s) if shown else slurm.Stop("cancelled")
    run.event(Event.STOP_REQUESTED, signal=name, step=step, reason=why.reason)
    what = f"{name} at step {step}"
    return f"{name}: saved at step {step}; " + settle(run, job or "", why, what, patience_s, by_rank=True)


def broke(run: RunDir, why: str, next_command: str) -> None:
    """Any rank, with an error that a retry may mend. In a job the batch script judges it; the first rank's error is
    kept, since it made the others fail, unless it tells only that another rank was gone."""
    if slurm.own_job() is None:
        run.fail(why, next_command)
        return
    if "SLURM_PROCID" in os.environ and not why.startswith(NO_PROGRESS):  # that names the ranks which others wait for
        why = f"rank {os.environ['SLURM_PROCID']} on {os.environ.get('SLURMD_NODENAME', 'its node')}: {why}"
    broken = run.root / BROKEN
    try:
        create(broken, why)
    except FileExistsError:
        if reasons.consequence(read_note(broken)) and not reasons.consequence(why):
            write_text(broken, why)


def warned(run: RunDir) -> None:
    """In a thread, as soon as a stop signal has come: rank 0 notes a preemption, of which Slurm tells only until it has
    requeued the job. What is killed after that counts as preempted, not as failed."""
    job = slurm.own_job()
    if job and os.environ.get("SLURM_PROCID") == "0" and slurm.was_preempted(slurm.show(job) or {}):
        with contextlib.suppress(OSError):
            (run.root / PREEMPTED).touch()


def leave_to_batch_script(run: RunDir, what: str) -> None:
    """Tell the batch script by a flag file that a stop signal came, so that it counts no failure and asks Slurm why."""
    write_text(run.root / STOP_UNJUDGED, what + "\n")


def settle(
    run: RunDir,
    job: str,
    why: slurm.Stop,
    what: str,
    patience_s: float,
    by_rank: bool = False,
    recorded: bool = False,
) -> str:
    """Record and carry out what follows from a stop; returns a sentence. Recorded first: a requeue kills its caller.

    `by_rank`: the batch script can still do it, if Slurm does not answer. `recorded`: a rank has recorded it, and got no answer.
    """
    if why.reason == "cancelled":
        run.cancel(f"{what}; the same command goes on from there")
        return "the same command goes on from there."
    reason = "preempted" if why.reason == "asked" else why.reason
    if not recorded:
        write_requeued(run, reason, what, {})
    refused = "" if why.by_slurm else slurm.requeue(job, patience_s)
    if refused and by_rank and slurm.unanswered(refused):
        leave_to_batch_script(run, what)
        return "Slurm does not answer; the batch script asks again, and the job continues from there."
    if refused:
        run.fail(f"{reason} ({what}), and Slurm refused to requeue job {job}: {refused}", run.command("resume"))
        return read_note(run.failed)
    return f"job {job} is requeued ({reason}) and continues from there."


def write_requeued(run: RunDir, counted_as: str, what: str, details: Mapping[str, object], **changes: object) -> None:
    restarts = run.state().restarts_with(counted_as)
    run.update_state(Event.REQUEUED, reason=f"{counted_as}: {what}", eta_s=None, restarts=restarts, **changes)
    run.event(Event.REQUEUED, reason=counted_as, **details)
    with contextlib.suppress(UserError):
        # A tenth of the time to a stop's deadline, at most.
        notify.tell(run, min(notify.LIMIT_S, run.config().cluster.signal_delay_s / 10))


def ended(run: RunDir, code: int) -> None:
    """The batch script, after srun ended with `code`: a decision of rank 0 is left as it is; otherwise the job is
    requeued or declared failed."""
    job, state = slurm.own_job(), run.state()
    flag = run.root / STOP_UNJUDGED
    told = read_note(flag)
    flag.unlink(missing_ok=True)
    if job is None or run.done.exists() or state.job_id not in (job, None):
        return  # another job's id: this job was a duplicate, and the run is not its to judge
    settled = state.state in (State.REQUEUED, State.CANCELLED, State.FAILED)
    if code == 0 and settled and not told:
        return  # srun also ends with 0 when Slurm kills the step, so the state decides
    try:
        cluster = run.config().cluster
    except UserError as error:
        run.fail(str(error), run.command("status"), final=True)
        return
    patience_s = BATCH_PATIENCE * cluster.signal_delay_s
    shown = slurm.show(job, patience_s)
    if shown is None and not told:
        failed(run, job, code, cluster.max_restarts, patience_s)
        return
    why = slurm.why_stopped(shown, cluster.signal_delay_s) if shown else slurm.Stop("asked")
    if settled and (why.by_slurm or why.reason == "cancelled"):
        return  # rank 0 has settled it and was killed while leaving
    if shown and why.by_slurm and (run.root / BROKEN).exists() and not slurm.was_preempted(shown):
        why = slurm.Stop("failure", by_slurm=True)  # a node was lost, and Slurm noticed before the ranks did
    left = not shown or shown.get("JobState") not in slurm.ALIVE
    if told or left or why.by_slurm or why.reason in ("preempted", "cancelled"):
        what = told or ("Slurm ended the step" if code == 0 else f"srun ended with {code}")
        settle(run, job, why, what, patience_s, recorded=bool(told) and state.state == State.REQUEUED)
    else:
        failed(run, job, code, cluster.max_restarts, patience_s)


def failed(run: RunDir, job: str, code: int, max_restarts: int, patience_s: float) -> None:
    """Retry from the last checkpoint where that can help: progress since the failure before, or nodes that were
    busy; and restarts left."""
    state, step = run.state(), run.saved_step()
    if state.final:
        return  # the user's mistake, which FAILED explains
    broken = run.root / BROKEN
    said = read_note(broken).partition("\n")[0]
    why = reasons.first_cause(run, job, code, said)
    again = exclude(run, why)
    failures = state.restarts.get("failure", 0)
    if failures >= max_restarts:
        why = f"{failures} restarts after failures reached cluster.max_restarts; the last: {why}"
    elif step <= state.last_failure_step and reasons.NODES_BUSY not in why:
        since = "the failure before" if failures else "its start"
        why = f"no progress since {since}, so no retry: {why}"
    else:
        broken.unlink(missing_ok=True)
        write_requeued(run, "failure", why, {"why": why, "step": step}, last_failure_step=step)
        refused = slurm.requeue(job, patience_s)
        if not refused:
            return
        why = f"{why}; Slurm refused to requeue job {job}: {refused}"
    run.fail(why, f"{run.command('logs')}, mend it, then {run.command('resume', *again)}")


def exclude(run: RunDir, why: str) -> list[str]:
    """The setting that leaves out the nodes of this failure which have failed before, beside those that are left out already."""
    config, nodes = run.config(), reasons.nodes_of(why)
    if 1 < len(run.state().nodes) <= len(nodes):
        return []  # all at once: no node's fault
    told = [str(e.get("why") or e.get("reason")) for e in read_lines(run.events, event=str) if e["event"] in FAILURES]
    twice = [node for node in nodes if any(node in reasons.nodes_of(before) for before in told)]
    left_out = [*filter(None, [config.cluster.exclude]), *twice]
    return [f"cluster.exclude={','.join(left_out)}"] if twice else []


def main(run: RunDir, code: int) -> None:
    """The last line of the batch script."""
    ended(run, code)
    if slurm.own_job() == run.state().job_id:  # else a duplicate, and the run is not its to tell of
        notify.tell(run)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])), int(sys.argv[2]))
