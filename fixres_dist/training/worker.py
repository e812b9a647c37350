"""The worker: read the run directory, train what is left of it, and say how that ended. What every rank of a job runs."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fixres_dist.base import log_times, watchdog
from fixres_dist.base.commands import smaller_batch
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, StorageError, UserError
from fixres_dist.base.files import no_room
from fixres_dist.base.locks import STALE_S
from fixres_dist.base.signals import StopFlag, Stopped
from fixres_dist.base.small_files import Damaged, keep_lines, read_json, write_json
from fixres_dist.cluster import requeue, slurm
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import backends
from fixres_dist.models import weights
from fixres_dist.models.precision import determinism
from fixres_dist.runs import checkpoint, starts
from fixres_dist.runs.rundir import Locked, RunDir
from fixres_dist.training import damage, estimates, hold_out, samples, stage_one
from fixres_dist.training.auto_batch import DoesNotFit
from fixres_dist.training.divergence import Diverged
from fixres_dist.training.floor import measure_floors
from fixres_dist.training.loop import train_stage
from fixres_dist.training.ranks import Ranks, abort, join, launched
from fixres_dist.training.session import Session, open_session
from fixres_dist.training.stages import stages
from fixres_dist.training.throughput import StartUp

# What a start does between the meeting of its ranks and their parting; it raises Stopped once its work is kept.
Work = Callable[[RunDir, Config, Ranks, contextlib.ExitStack, StartUp], None]
LOCK_WAIT_S = STALE_S + 30  # a lost node's lock outlives its job for a while on network file systems


def train(folder: Path, flag: StopFlag | None = None) -> int:
    """Train the run in `folder` until it is done or told to stop; returns the exit code. Safe to call again.

    A stop saves and returns: 0 in a Slurm job, because a requeued job has not failed, otherwise 1.
    """
    return serve(folder, flag or StopFlag().install(), train_stages)


def serve(folder: Path, flag: StopFlag, do: Work) -> int:
    """As `train`, for any work of a run directory that its ranks `do` together."""
    run = RunDir(folder)
    again = run.again()
    try:
        config = run.config()
    except Damaged as error:
        run.fail(str(error), again, final=True)
        raise
    try:
        with determinism(config.run):
            return work(run, config, flag, do)
    except UserError as error:
        print(f"error: {error}", flush=True)
        next_command = smaller_batch(again, error.smaller) if isinstance(error, DoesNotFit) else again
        leave(partial(run.fail, str(error), next_command, final=True))
        return EXIT_USER
    except Diverged as error:
        run.fail(error.why, error.next_command, final=True)
        print(f"error: {error.why}. Next: {error.next_command}", flush=True)
        return EXIT_FAILED
    except Exception as error:
        full = no_room(error)
        next_command = f"{'make room, then' if full else 'again, from the last checkpoint:'} {again}"
        leave(partial(requeue.broke, run, full or f"{type(error).__name__}: {error}", next_command))
        raise


def leave(write_down: Callable[[], None]) -> None:
    """Say why in the run directory, then leave the other ranks: also where nothing can be written, since they would wait."""
    try:
        write_down()
    except (OSError, StorageError) as error:
        print(f"the reason cannot be written down: {error}", file=sys.stderr, flush=True)
    finally:
        abort()


def work(run: RunDir, config: Config, flag: StopFlag, do: Work) -> int:
    startup, in_slurm = StartUp(), slurm.own_job() is not None
    startup.mark("imports")
    if in_slurm:
        seconds = 0.8 * config.cluster.signal_delay_s
        give_up = partial(requeue.leave_to_batch_script, run, "stop deadline")
        flag.deadline(seconds, give_up, heard=partial(requeue.warned, run))
    with contextlib.ExitStack() as stack:
        stack.enter_context(watched(run, config, startup))
        ranks = join(run.root, flag=flag, watched=config.run.watchdog_s > 0)
        stack.push(lambda error, *_: None if error else ranks.stop())
        if (code := ranks.from_main(lambda: claim(run, ranks, stack))) is not None:
            return code
        startup.mark("rendezvous")
        try:
            do(run, config, ranks, stack, startup)
        except Stopped as stop:
            if ranks.is_main:
                step = max(0, run.saved_step())
                print(requeue.stopped(run, stop.number, step, config.cluster.signal_delay_s), flush=True)
            return EXIT_DONE if in_slurm else EXIT_FAILED
        if ranks.is_main:
            (run.root / requeue.PREEMPTED).unlink(missing_ok=True)
            run.finish()
        return EXIT_DONE


def watched(run: RunDir, config: Config, startup: StartUp) -> contextlib.AbstractContextManager[None]:
    """Ends this rank where no batch progresses (base/watchdog.py), and says which rank stands where; rank 0 keeps the time
    of the last batch for `status`."""
    rank, world_size, *_ = launched(os.environ)

    def limit_s() -> float:
        return config.run.watchdog_s * (3 if startup.running else 1)

    def seen(idle_s: float) -> None:
        log_times.note()
        if rank == 0:
            at = time.time() - idle_s
            with contextlib.suppress(OSError):  # a full disk: the run itself will tell
                run.progress.touch()
                os.utime(run.progress, (at, at))

    def give_up(place: str, limit: float) -> None:
        since = time.time() - limit
        # Each in a file of its own: what several nodes append to one file at once can be lost on NFS.
        run.hung.mkdir(exist_ok=True)
        write_json(
            run.hung / f"rank_{rank}.json", asdict(watchdog.Standing(rank, socket.gethostname(), place, time.time()))
        )
        time.sleep(min(10.0, limit / 4))  # the other ranks tell theirs
        told = []
        for file in run.hung.glob("rank_*.json"):
            with contextlib.suppress(Damaged):
                told.append(read_json(file, watchdog.Standing, "nothing"))
        why = watchdog.reason([one for one in told if one.time > since], world_size, limit)
        requeue.broke(run, why, f"again, from the last checkpoint: {run.again()}")

    return watchdog.watching(limit_s, seen, give_up)


def train_stages(run: RunDir, config: Config, ranks: Ranks, stack: contextlib.ExitStack, startup: StartUp) -> None:
    """What is left of the run's stages; raises Stopped, once all is saved, where a stop signal has come to any rank."""
    writer = stack.enter_context(checkpoint.Writer(run.checkpoints, lambda **saved: run.event("saved", **saved)))
    # With a choice of settings that may be too new for another node's view of the folder.
    config = reading.load(ranks.from_main(lambda: reading.dump(run.config())))
    chooses = config.tune.chooses and not ranks.from_main(run.chosen.exists)
    pretrained = ranks.from_main(run.pretrained.exists)
    session = open_session(
        config,
        ranks,
        load_weights=chooses or not pretrained,
        on_skip=samples.skipping(run, ranks, config.data.max_skipped),
        kept=run.root / "choices.json",
        mark=startup.mark,
    )
    todo = stages(config, len(session.train))
    if ranks.is_main:
        begin(run, session, total_steps=todo[-1].stop)
    if chooses:
        session = hold_out.choose(run, session, startup)
        todo = stages(session.config, len(session.train))
    if config.pretrain and not pretrained and config.model.weights != "none":
        measure_floors(run, hold_out.session_of(session, "pretrain"), sorted({stage.res for stage in todo}))
    stage_one.train(run, hold_out.session_of(session, "pretrain"), todo, writer, startup)
    ranks.check_stop()
    if config.pretrain:
        weights.fill(session.model, weights.read_state(run.pretrained), str(run.pretrained))
    fix = todo[-1]
    train_stage(run, hold_out.session_of(session, "fix").for_size(fix.res), fix, todo, writer, startup)


def claim(run: RunDir, ranks: Ranks, stack: contextlib.ExitStack) -> int | None:
    """Rank 0 locks the run until `stack` closes; or the exit code, where the run is finished or another start has it.

    It decides for all ranks once they have met: a duplicate job can finish the run while these start one after the
    other, and if each rank looked for itself, some would leave and the others would wait for them.
    """
    again = slurm.own_job() is not None and run.state().job_id == slurm.own_job()
    try:
        if not run.done.exists():
            stack.enter_context(run.lock(wait_s=LOCK_WAIT_S if again else 0.0))
    except Locked as error:  # the duplicate must not touch the run's state
        print(f"error: {error}", flush=True)
        return EXIT_USER
    if requeue.finished(run):
        return EXIT_DONE
    requeue.begin(run, ranks.world_size, ranks.nodes)
    damage.put_aside_damaged(run)
    return None


def begin(run: RunDir, session: Session, total_steps: int) -> None:
    """Rank 0, before the first stage: the class names, the number of steps, and no sample lines beyond the checkpoint."""
    starts.begin(run, {split: index.contents for split, index in session.splits.items()})
    names = dict(enumerate(session.classes))
    write_json(run.root / "class_index.json", names)
    config = session.config
    run.update_state(total_steps=total_steps)
    saved = max(0, run.saved_step())
    for file in (run.root / "samples").glob("rank_*.jsonl"):
        keep_lines(file, lambda line: line["step"] < saved, step=int)
    interpolation = session.resize(session.config.data.res).interpolation
    with contextlib.suppress(UserError):  # a model by a name that this version does not know
        facts = recipes.find(config.model.name, config.model.weights).facts
        counts = estimates.Counts(len(session.train), len(session.val), len(session.classes), "")
        sizes = session.ranks.world_size, session.ranks.local_size
        if (
            facts
            and session.ranks.device.type == "cpu"
            and (short := estimates.shortage(config, facts, counts, *sizes, started=True))
        ):
            print(f"warning: {short}", flush=True)
    backend, why = backends.choose(session.config.data.backend, session.ranks.device, interpolation)
    print(f"decoding with {backend}: {why}", flush=True)
