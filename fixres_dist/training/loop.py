"""The training loop of one stage."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fixres_dist.base.signals import StopFlag
from fixres_dist.cluster import requeue
from fixres_dist.config import reading
from fixres_dist.models import weights
from fixres_dist.models.parts import Parts, described, frozen_digest, parts_of, set_modes
from fixres_dist.models.precision import LossScale, sgd
from fixres_dist.runs import checkpoint
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.runs.tracking import Tracker
from fixres_dist.training import auto_batch, results
from fixres_dist.training.cache.build import Stopped, open_stores
from fixres_dist.training.predict import predict
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage, stages
from fixres_dist.training.step import average_weights, backward, distribute, measure_statistics, step_batches
from fixres_dist.training.throughput import Meter, StartUp


def fingerprint(session: Session, stage: Stage, parts: Parts) -> dict[str, Any]:
    """All that must match between the starts of one run."""
    return {
        "stage": stage.name,
        "configuration": reading.identity(session.config),
        "sample lists": [session.train.fingerprint, session.val.fingerprint],
        "frozen weights": frozen_digest(parts),
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
    parts = parts_of(session.model, tune.policy, settings.activation_checkpointing)
    parts = session.with_fast_trunk(parts, stage.res)
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    optimizer = sgd(settings.optimizer, trainable, tune.momentum, tune.weight_decay)
    scale = LossScale(session.arithmetic, optimizer, parts.head if parts.trains_blocks else None)
    identity = fingerprint(session, stage, parts)
    progress, resumed = starting_point(here, stage, session.model, optimizer, identity)
    scale.restore(progress.loss_scale)
    session = auto_batch.with_batch(session, stage, parts)
    startup.mark("trunk")
    tracker = Tracker(here, session.config, progress.step, total_steps, resumed) if ranks.is_main else None
    started, seconds = time.monotonic(), progress.seconds

    def evaluated(label: str, step: int) -> Predictions:
        (predictions,) = predict(session, [parts], stage.res, label, store=stores.get("val"))
        set_modes(parts, tune.bn_stats)
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
            tracker.say(requeue.stopped(here, number, progress.step, session.config.cluster.signal_delay_s))
            tracker.close()
        return False

    try:
        stores = open_stores(session, stage, parts, lambda: flag.signal, check=not resumed)
    except Stopped as stop:
        return stopped(stop.number)
    ran = {"engine": "cached" if stores else "stream", "trunk": str(getattr(parts.trunk, "how", "trained"))}
    if tracker:
        here.event("engine", stage=stage.name, step=progress.step, **ran)
    set_modes(parts, tune.bn_stats)
    if tracker:
        tracker.say(described(parts))
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
            count = measure_statistics(session, stage, parts, stores.get("train"))
            if tracker:
                tracker.say(f"statistics of {parts.tuned.last_bn} measured on {count} images at {stage.res} px")
            startup.mark("statistics")
        save()
    head = distribute(session, stage, parts)

    meter, saved_at = Meter(), time.monotonic()
    for step, micro_batches in step_batches(session, stage, progress.step, meter, stores.get("train")):
        rate = stage.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        samples = backward(session, stage, parts, head, scale, step, micro_batches, meter)
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
            set_modes(parts, tune.bn_stats)
        if count := stage.averages(done):
            average_weights(optimizer, count, use=last)
        if epoch_ends and not last and settings.eval_every and epoch % settings.eval_every == 0:
            progress = progress.with_top1(evaluated(f"{stage.name} epoch {epoch}", done).summary()["top1"])
            meter.restart()
        due = ranks.is_main and time.monotonic() - saved_at >= settings.save_every_s
        stop_signal, save_now = ranks.highest([flag.signal, int(due)])
        if stop_signal and tracker:
            here.update_state(Event.STOP_REQUESTED, step=done, eta_s=None)
        if stop_signal or save_now or last:
            save()
            saved_at = time.monotonic()
        if stop_signal and not last:
            writer.wait()
            return stopped(stop_signal)

    writer.wait()
    if frozen_digest(parts) != identity["frozen weights"]:
        raise RuntimeError(
            "a tensor that the policy keeps frozen has changed; please report this with the run's config.yaml"
        )
    if stage.name == "pretrain":
        evaluated("pretrained", stage.stop)
        if ranks.is_main:
            weights.write_weights(session.model, here.pretrained, session.config, stage.res)
    else:
        after = evaluated("after", stage.stop)
        if ranks.is_main:
            after.save(results.predictions_file(here, "after"), session.val.fingerprint)
            images = sum(s.images_until(s.stop) for s in stages(session.config, stage.n))
            summary = results.write_results(here, session, progress.seconds, images, ran)
            weights.write_weights(session.model, here.root / "export" / "model.safetensors", session.config, stage.res)
            if tracker:
                tracker.say(results.sentence(summary))
    ranks.barrier()
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
