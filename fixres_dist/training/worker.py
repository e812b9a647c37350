"""The worker: read the run directory, train what is left of it, evaluate before and after.

One loop serves both stages: ordinary training (optional) and fixing. Everything but the tuned tensors, their momenta
and the step is a function of the configuration and the step, so a start after a kill goes on exactly where the
checkpoint stands.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from safetensors.torch import load_file

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError
from fixres_dist.base.files import no_room, write_text
from fixres_dist.base.json_lines import keep_lines
from fixres_dist.base.signals import StopFlag
from fixres_dist.cluster import requeue, slurm
from fixres_dist.config.schema import Config
from fixres_dist.data import backends
from fixres_dist.models import weights
from fixres_dist.runs import checkpoint
from fixres_dist.runs.rundir import Locked, RunDir
from fixres_dist.training import samples
from fixres_dist.training.loop import train_stage
from fixres_dist.training.ranks import Ranks, join
from fixres_dist.training.session import open_session
from fixres_dist.training.stages import stages
from fixres_dist.training.throughput import StartUp

LOCK_WAIT_S = 60.0  # a lost node's lock outlives its job for a while on network file systems


def run(folder: Path, flag: StopFlag | None = None) -> int:
    """Work on the run in `folder` until it is done or told to stop; returns the exit code. Safe to call again.

    A stop saves and returns; in a Slurm job with 0, because a requeued job has not failed.
    """
    here = RunDir(folder)
    config = here.config()
    again = here.submit_command()
    try:
        return work(here, config, flag or StopFlag().install())
    except UserError as error:
        here.fail(str(error), again, final=True)
        print(f"error: {error}", flush=True)
        return EXIT_USER
    except Exception as error:
        full = no_room(error)
        next_command = f"{'make room, then' if full else 'again, from the last checkpoint:'} {again}"
        requeue.broke(here, full or f"{type(error).__name__}: {error}", next_command)
        raise


def work(here: RunDir, config: Config, flag: StopFlag) -> int:
    startup, in_slurm = StartUp(), slurm.own_job() is not None
    startup.mark("imports")
    if in_slurm:
        flag.deadline(0.8 * config.cluster.signal_delay_s, lambda: requeue.leave_to_batch_script(here, "stop deadline"))
    ranks = join(here.root)
    with contextlib.ExitStack() as stack:
        stack.callback(ranks.stop)
        code = claim(here, ranks, stack) if ranks.is_main else None
        if (code := ranks.from_main(code)) is not None:
            return code
        writer = stack.enter_context(checkpoint.Writer(here.checkpoints, lambda **saved: here.event("saved", **saved)))
        startup.mark("rendezvous")
        on_skip = samples.skipping(here, ranks)
        choices = here.root / "choices.json"
        session = open_session(config, ranks, not here.pretrained.exists(), on_skip, kept=choices, mark=startup.mark)
        todo = stages(config, len(session.train))
        if ranks.is_main:
            write_text(
                here.root / "class_index.json", json.dumps(dict(enumerate(session.train.classes)), indent=1) + "\n"
            )
            here.update_state(total_steps=todo[-1].stop)
            kept = max(0, here.saved_step())
            for file in (here.root / "samples").glob("rank_*.jsonl"):
                keep_lines(file, lambda line: line["step"] < kept)
            print("decoding with {}: {}".format(*backends.choose(config.data.backend, ranks.device)), flush=True)
        ranks.barrier()
        for stage in todo:
            if stage.name == "fix" and here.pretrained.exists():
                weights.fill(session.model, load_file(here.pretrained), str(here.pretrained))
            elif here.pretrained.exists():
                continue
            if not train_stage(here, session, stage, todo[-1].stop, flag, writer, startup):
                return EXIT_DONE if in_slurm else EXIT_FAILED
        if ranks.is_main:
            here.finish()
        return EXIT_DONE


def claim(here: RunDir, ranks: Ranks, stack: contextlib.ExitStack) -> int | None:
    """Rank 0 begins with the run, locked until `stack` closes; or the exit code, where it is finished or another start's.

    For all ranks, once they have met: a twin can finish the run while these start one after the other, and ranks that
    each looked for themselves would leave some and keep the others waiting.
    """
    again = slurm.own_job() is not None and here.state().job_id == slurm.own_job()
    try:
        if not here.done.exists():
            stack.enter_context(here.lock(wait_s=LOCK_WAIT_S if again else 0.0))
    except Locked as error:  # this start is the twin: it must not touch the run's state
        print(f"error: {error}", flush=True)
        return EXIT_USER
    if requeue.finished(here):
        return EXIT_DONE
    requeue.begin(here, ranks.world_size, ranks.nodes)
    return None
