"""The worker: read the run directory, train what is left of it, evaluate before and after.

One loop serves both stages: ordinary training (optional) and fixing. Everything but the tuned tensors, their momenta
and the step is a function of the configuration and the step, so a start after a kill goes on exactly where the
checkpoint stands.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fixres_dist import (
    caching,
    checkpoint,
    distributed,
    export,
    fit,
    lifecycle,
    models,
    results,
    slurm,
    stepping,
    tuning,
)
from fixres_dist import config as cfg
from fixres_dist.data import loading
from fixres_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError
from fixres_dist.evaluate import Predictions
from fixres_dist.files import no_room
from fixres_dist.meter import Meter, StartUp
from fixres_dist.precision import LossScale, sgd
from fixres_dist.preempt import StopFlag
from fixres_dist.rundir import Locked, RunDir, keep_lines, write
from fixres_dist.schedule import Stage, stages
from fixres_dist.session import Session, open_session
from fixres_dist.tracking import Tracker

LOCK_WAIT_S = 60.0  # a lost node's lock outlives its job for a while on network file systems


def run(folder: Path, flag: StopFlag | None = None) -> int:
    """Work on the run in `folder` until it is done or told to stop; returns the exit code. Safe to call again.

    A stop saves and returns; in a Slurm job with 0, because a requeued job has not failed.
    """
    here = RunDir(folder)
    config = here.config()
    again = here.command()
    try:
        return work(here, config, flag or StopFlag().install())
    except UserError as error:
        here.fail(str(error), again, final=True)
        print(f"error: {error}", flush=True)
        return EXIT_USER
    except Exception as error:
        full = no_room(error)
        next_command = f"{'make room, then' if full else 'again, from the last checkpoint:'} {again}"
        lifecycle.broke(here, full or f"{type(error).__name__}: {error}", next_command)
        raise


def work(here: RunDir, config: cfg.Config, flag: StopFlag) -> int:
    startup, in_slurm = StartUp(), slurm.own_job() is not None
    startup.mark("imports")
    if in_slurm:
        flag.deadline(0.8 * config.cluster.signal_delay_s, lambda: lifecycle.ask(here, "stop deadline"))
    ranks = distributed.start(here.root)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop, ranks)
        code = claim(here, ranks, stack) if ranks.is_main else None
        if (code := distributed.from_main(ranks, code)) is not None:
            return code
        writer = stack.enter_context(checkpoint.Writer(here.checkpoints, lambda **saved: here.event("saved", **saved)))
        startup.mark("rendezvous")
        on_skip = results.skipping(here, ranks)
        choices = here.root / "choices.json"
        session = open_session(config, ranks, not here.pretrained.exists(), on_skip, kept=choices, mark=startup.mark)
        todo = stages(config, len(session.train))
        if ranks.is_main:
            write(here.root / "class_index.json", json.dumps(dict(enumerate(session.train.classes)), indent=1) + "\n")
            here.update_state(total_steps=todo[-1].stop)
            kept = max(0, here.saved_step())
            for file in (here.root / "samples").glob("rank_*.jsonl"):
                keep_lines(file, lambda line: line["step"] < kept)
            print("decoding with {}: {}".format(*loading.choose(config.data.backend, ranks.device)), flush=True)
        distributed.barrier(ranks)
        for stage in todo:
            if stage.name == "fix" and here.pretrained.exists():
                models.fill(session.model, load_file(here.pretrained), str(here.pretrained))
            elif here.pretrained.exists():
                continue
            if not train_stage(here, session, stage, todo[-1].stop, flag, writer, startup):
                return EXIT_DONE if in_slurm else EXIT_FAILED
        if ranks.is_main:
            here.finish()
        return EXIT_DONE


def claim(here: RunDir, ranks: distributed.Ranks, stack: contextlib.ExitStack) -> int | None:
    """Rank 0 begins with the run, locked until `stack` closes; or the exit code, where it is finished or another start's.

    For all ranks, once they have met: a twin can finish the run while these start one after the other, and ranks that
    each looked for themselves would leave some and keep the others waiting.
    """
    again = slurm.own_job() is not None and here.state().get("job_id") == slurm.own_job()
    try:
        if not here.done.exists():
            stack.enter_context(here.lock(wait_s=LOCK_WAIT_S if again else 0.0))
    except Locked as error:  # this start is the twin: it must not touch the run's state
        print(f"error: {error}", flush=True)
        return EXIT_USER
    if lifecycle.finished(here):
        return EXIT_DONE
    lifecycle.begin(here, ranks.world_size, ranks.nodes)
    return None


def fingerprint(session: Session, stage: Stage, parts: tuning.Split) -> dict[str, Any]:
    """All that must match between the starts of one run."""
    return {
        "stage": stage.name,
        "configuration": cfg.identity(session.config),
        "sample lists": [session.train.fingerprint, session.val.fingerprint],
        "frozen weights": tuning.frozen_digest(parts),
    }


def train_stage(
    here: RunDir,
    session: Session,
    stage: Stage,
    total_steps: int,
    flag: StopFlag,
    writer: checkpoint.Writer,
    startup: StartUp,
) -> bool:
    """Train `stage` from its newest checkpoint, or from its start; False when told to stop before its end."""
    ranks, settings, tune = session.ranks, session.config.run, stage.tune
    parts = tuning.split(session.model, tune.policy, settings.activation_checkpointing)
    parts = session.with_fast_trunk(parts, stage.res)
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    optimizer = sgd(settings.optimizer, trainable, tune.momentum, tune.weight_decay)
    scale = LossScale(session.arithmetic, optimizer, parts.head if parts.trains_blocks else None)
    identity = fingerprint(session, stage, parts)
    progress, resumed = starting_point(here, stage, session.model, optimizer, identity)
    scale.restore(progress.loss_scale)
    session = fit.with_batch(session, stage, parts)
    startup.mark("trunk")
    tracker = Tracker(here, session.config, progress.step, total_steps, resumed) if ranks.is_main else None
    started, seconds = time.monotonic(), progress.seconds

    def evaluated(label: str, step: int) -> Predictions:
        predictions = session.evaluate(parts, stage.res, label, store=stores.get("val"))
        tuning.set_modes(parts, tune.bn_stats)
        if tracker:
            tracker.evaluation(step, label, stage.res, predictions.summary())
        return predictions

    def save() -> None:
        if tracker:
            tracker.flush()
            now = replace(progress, loss_scale=scale.state())
            writer.save(session.model, parts.tuned.tensors, optimizer, now, identity)

    def stopped(number: int) -> bool:
        if tracker:
            tracker.say(lifecycle.stopped(here, number, progress.step, session.config.cluster.signal_delay_s))
            tracker.close()
        return False

    try:
        parts, stores = caching.open_stores(session, stage, parts, lambda: flag.signal, check=not resumed)
    except caching.Stopped as stop:
        return stopped(stop.number)
    ran = {"engine": "cached" if stores else "stream", "trunk": str(getattr(parts.trunk, "how", "trained"))}
    if tracker:
        here.event("engine", stage=stage.name, step=progress.step, **ran)
    tuning.set_modes(parts, tune.bn_stats)
    if tracker:
        tracker.say(tuning.described(parts))
    if tracker and resumed:
        tracker.say(
            f"resuming {here.name} at step {progress.step} of {total_steps} ({100 * progress.step / total_steps:.0f}%)"
        )
    if not resumed:
        if stage.name == "fix":
            before = evaluated("before", stage.first)
            if ranks.is_main:
                before.save(results.predictions_file(here, "before"), session.val.fingerprint)
            startup.mark("evaluation")
        if parts.tuned.last_bn and tune.bn_stats == "exact":
            count = stepping.measure_statistics(session, stage, parts, stores.get("train"))
            if tracker:
                tracker.say(f"statistics of {parts.tuned.last_bn} measured on {count} images at {stage.res} px")
            startup.mark("statistics")
        save()
    head = stepping.distribute(session, stage, parts)

    meter, saved_at = Meter(), time.monotonic()
    for step, micro_batches in stepping.batches(session, stage, progress.step, meter, stores.get("train")):
        rate = stage.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        samples = stepping.backward(session, stage, parts, head, scale, step, micro_batches, meter)
        done = step + 1
        last, epoch_ends = done == stage.stop, (done - stage.first) % stage.per_epoch == 0
        logging = done % settings.log_every == 0 or last
        norm = float(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])) if logging else 0.0
        norm = norm if scale.step() else 0.0
        if tracker and startup.running:
            here.event("first step", **startup.stop())

        progress = replace(progress, step=done, seconds=seconds + time.monotonic() - started)
        if settings.record_samples:
            results.record(here, session, stage, step, samples)
        if logging:
            values = meter.read(ranks, learning_rate=rate, grad_norm=norm, **scale.metrics())
            if tracker:
                tracker.step(done, stage.name, (done - stage.first) / stage.per_epoch, values)
        epoch = (done - stage.first) // stage.per_epoch
        if epoch_ends:
            tuning.set_modes(parts, tune.bn_stats)
        if count := stage.averages(done):
            tuning.average_weights(optimizer, count, use=last)
        if epoch_ends and not last and settings.eval_every and epoch % settings.eval_every == 0:
            progress = progress.with_top1(evaluated(f"{stage.name} epoch {epoch}", done).summary()["top1"])
            meter.restart()
        due = ranks.is_main and time.monotonic() - saved_at >= settings.save_every_s
        stop_signal, save_now = distributed.highest(ranks, [flag.signal, int(due)])
        if stop_signal and tracker:
            here.update_state(state="stopping", step=done, eta_s=None)
        if stop_signal or save_now or last:
            save()
            saved_at = time.monotonic()
        if stop_signal and not last:
            writer.wait()
            return stopped(stop_signal)

    writer.wait()
    if tuning.frozen_digest(parts) != identity["frozen weights"]:
        raise RuntimeError(
            "a tensor that the policy keeps frozen has changed; please report this with the run's config.yaml"
        )
    if stage.name == "pretrain":
        evaluated("pretrained", stage.stop)
        if ranks.is_main:
            export.write_weights(session.model, here.pretrained, session.config, stage.res)
    else:
        after = evaluated("after", stage.stop)
        if ranks.is_main:
            after.save(results.predictions_file(here, "after"), session.val.fingerprint)
            images = sum(s.images_until(s.stop) for s in stages(session.config, stage.n))
            summary = results.write_results(here, session, progress.seconds, images, ran)
            export.write_weights(session.model, here.root / "export" / "model.safetensors", session.config, stage.res)
            if tracker:
                tracker.say(results.sentence(summary))
    distributed.barrier(ranks)
    if tracker:
        tracker.close()
    return True


def starting_point(
    here: RunDir, stage: Stage, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[checkpoint.Progress, bool]:
    """(where to go on, whether from a checkpoint of this stage)."""
    found = checkpoint.complete(here.checkpoints)
    newest = checkpoint.progress_of(found[-1]) if found else None
    if newest and newest.stage == stage.name:
        return checkpoint.restore(found[-1], model, optimizer, identity), True
    return checkpoint.Progress(stage.first, stage.name, newest.seconds if newest else 0.0), False
