"""The training of one stage: open it, measure, the loop, close it. One loop serves ordinary training and fixing.

Everything but the tuned tensors, their momenta and the progress is a function of the configuration and the step, so a
start after a kill continues exactly from its checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fixres_dist.base.signals import StopFlag
from fixres_dist.cluster import requeue
from fixres_dist.config import reading
from fixres_dist.models.parts import described, frozen_digest, parts_of, set_modes
from fixres_dist.models.precision import LossScale, sgd
from fixres_dist.models.sizes import of_weights
from fixres_dist.models.weights import write_weights
from fixres_dist.runs import checkpoint
from fixres_dist.runs.checkpoint import Progress
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.runs.tracking import Tracker
from fixres_dist.training import auto_batch, class_order, compiled_code, results, samples
from fixres_dist.training.cache.build import Stopped, open_stores
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, other_sizes, stages
from fixres_dist.training.step import average_weights, backward, distribute, measure_statistics
from fixres_dist.training.throughput import Meter, StartUp


@dataclass
class Training:
    """A stage under way; `progress` is what the loop changes."""

    run: RunDir
    work: StageSession
    optimizer: torch.optim.Optimizer
    scale: LossScale
    fingerprint: dict[str, Any]  # what must match between the starts of one run
    progress: Progress
    resumed: bool
    tracker: Tracker | None  # rank 0's
    writer: checkpoint.Writer
    opened: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        if self.tracker:
            self.tracker.say(text)

    def set_modes(self) -> None:
        set_modes(self.work.parts, self.work.stage.tune.bn_stats)

    def evaluate(self, label: str) -> Predictions:
        """Of the validation images as the model is now; leaves the model ready to train."""
        predictions = self.work.evaluate(label)
        self.set_modes()
        if self.tracker:
            self.tracker.evaluation(self.progress.step, label, self.work.stage.res, predictions.summary())
        return predictions

    def measure_other_sizes(self) -> None:
        """Before fixing, the accuracy at the weights' own size and at timm's test size, where stage one has not told it."""
        config = self.work.session.config
        for res, why in other_sizes(config, of_weights(config.model)).items():
            if config.pretrain and res == config.pretrain.res:
                continue
            predictions = self.work.evaluate_at(res, f"before, {res} px")
            if predictions is None:
                self.say(
                    f"not measured at {res} px ({why}): {config.model.timm_name} is built for {config.data.res} px"
                )
                continue
            self.keep(f"before-{res}", predictions)
            if self.tracker:
                self.tracker.other_size(self.progress.step, res, why, predictions.summary())
        self.set_modes()

    def keep(self, when: str, predictions: Predictions) -> None:
        """predictions/WHEN.npz, so that any two runs can be compared image by image."""
        if self.tracker:
            predictions.save(results.predictions_file(self.run, when), self.work.session.val.fingerprint)

    def save(self) -> None:
        if self.tracker:
            self.tracker.flush()
            now = replace(self.progress, loss_scale=self.scale.state())
            tensors = self.work.parts.tuned.tensors
            self.writer.save(self.work.session.model, tensors, self.optimizer, now, self.fingerprint)


def train_stage(
    run: RunDir,
    session: Session,
    stage: Stage,
    total_steps: int,
    flag: StopFlag,
    writer: checkpoint.Writer,
    startup: StartUp,
) -> bool:
    """Train `stage` from its newest checkpoint, or from its start; False where a stop signal came before its end."""
    training = open_stage(run, session, stage, total_steps, writer)
    startup.mark("trunk")
    try:
        with auto_batch.naming_a_smaller_batch(training.work, in_steps=False):
            open_features(training, flag)
            if not training.resumed:
                measure(training, startup)
            keep_compiled_code(session)
        with auto_batch.naming_a_smaller_batch(training.work, in_steps=True):
            stop_signal = loop(training, flag, startup)
    except Stopped as stop:
        stop_signal = stop.number
    if stop_signal and training.tracker:
        training.say(requeue.stopped(run, stop_signal, training.progress.step, session.config.cluster.signal_delay_s))
    elif not stop_signal:
        close(training)
    if training.tracker:
        training.tracker.close()
    keep_compiled_code(session)
    return not stop_signal


def keep_compiled_code(session: Session) -> None:
    """Before the first step, for starts after a kill, and at the stage's end, for what was compiled since."""
    if session.ranks.is_main:
        compiled_code.keep(session.config.data.cache)


def open_stage(run: RunDir, session: Session, stage: Stage, total_steps: int, writer: checkpoint.Writer) -> Training:
    """The model cut for the stage, its optimizer, and where it continues: at its newest checkpoint, or at its start."""
    settings, tune = session.config.run, stage.tune
    parts = parts_of(session.model, tune.policy, settings.activation_checkpointing)
    parts = session.with_fast_trunk(parts, stage.res)
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    optimizer = sgd(settings.optimizer, trainable, tune.momentum, tune.weight_decay)
    scale = LossScale(session.arithmetic, optimizer, parts.head if parts.trains_blocks else None)
    fingerprint = {
        "stage": stage.name,
        "configuration": reading.identity(session.config),
        "sample lists": [session.train.fingerprint, session.val.fingerprint],
        "frozen weights": frozen_digest(parts),
    }
    start = Progress(stage.first, stage.name)
    progress, resumed = checkpoint.resume(run.checkpoints, start, session.model, optimizer, fingerprint)
    scale.restore(progress.loss_scale)
    work = StageSession(auto_batch.with_batch(session, stage, parts, optimizer, scale), stage, parts)
    main = session.ranks.is_main
    tracker = Tracker(run, session.config, progress.step, total_steps, resumed) if main else None
    return Training(run, work, optimizer, scale, fingerprint, progress, resumed, tracker, writer)


def open_features(training: Training, flag: StopFlag) -> None:
    """Cache the trunk's features where that pays (cache/rule.py); raises Stopped where a stop signal comes meanwhile."""
    work, run, step = training.work, training.run, training.progress.step
    training.work = work = open_stores(work, lambda: flag.signal, check=not training.resumed)
    if training.tracker:
        run.event("engine", stage=work.stage.name, step=step, **work.how())
    training.set_modes()
    training.say(described(work.parts))
    if work.parts.folded:
        training.say(work.parts.folded)
    if training.tracker and training.resumed:
        total = training.tracker.total_steps
        training.say(f"resuming {run.name} at step {step} of {total} ({100 * step / total:.0f}%)")


def measure(training: Training, startup: StartUp) -> None:
    """Before the first step: the accuracy before fixing, exact BN statistics, and a first checkpoint with them."""
    work = training.work
    if work.stage.name == "fix":
        training.keep("before", before := training.evaluate("before"))
        val, columns = work.session.val, work.session.columns["val"]
        if warning := class_order.doubt(before, val, columns, work.session.classes):
            training.say(warning)
        training.measure_other_sizes()
        startup.mark("evaluation")
    if work.parts.tuned.last_bns and work.stage.tune.bn_stats == "exact":
        count = measure_statistics(work)
        names = ", ".join(work.parts.tuned.last_bns)
        training.say(f"statistics of {names} measured on {count} images at {work.stage.res} px")
        startup.mark("statistics")
    training.save()


def loop(training: Training, flag: StopFlag, startup: StartUp) -> int:
    """Optimizer steps to the stage's end, or to a stop signal, which is returned once the step is saved; 0: the end."""
    work, run, tracker, optimizer = training.work, training.run, training.tracker, training.optimizer
    stage, ranks, settings = work.stage, work.session.ranks, work.session.config.run
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    head = distribute(work)
    meter, saved_at, started = Meter(), time.monotonic(), training.opened - training.progress.seconds
    for step, micro_batches in work.steps(training.progress.step, meter):
        rate = stage.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        seen = backward(work, head, training.scale, step, micro_batches, meter)
        done, epoch, ends_epoch = step + 1, *stage.epochs_after(step + 1)
        last = done == stage.stop
        logging = done % settings.log_every == 0 or last
        norm = float(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])) if logging else 0.0
        norm = norm if training.scale.step() else 0.0
        training.progress = replace(training.progress, step=done, seconds=time.monotonic() - started)
        if tracker and startup.running:
            run.event("first step", **startup.stop())
        if settings.record_samples:
            samples.record(run, work, step, seen)
        if logging:
            values = meter.read(ranks, learning_rate=rate, grad_norm=norm, **training.scale.metrics())
            if tracker:
                tracker.step(done, stage.name, (done - stage.first) / stage.per_epoch, values)
        if ends_epoch:
            training.set_modes()
            if count := stage.averages(done):
                average_weights(optimizer, count, use=last)
            if not last and settings.eval_every and epoch % settings.eval_every == 0:
                top1 = training.evaluate(f"{stage.name} epoch {epoch}").summary().top1
                training.progress = training.progress.with_top1(top1)
                meter.restart()
        due = ranks.is_main and time.monotonic() - saved_at >= settings.save_every_s
        stop_signal, save_now = ranks.highest([flag.signal, int(due)])
        if stop_signal and tracker:
            run.update_state(Event.STOP_REQUESTED, step=done, eta_s=None)
        if stop_signal or save_now or last:
            training.save()
            saved_at = time.monotonic()
        if stop_signal and not last:
            training.writer.wait()
            return stop_signal
    return 0


def close(training: Training) -> None:
    """After the last step: evaluate, and write the stage's weights; after fixing also the results."""
    work, run = training.work, training.run
    session, stage = work.session, work.stage
    training.writer.wait()
    if frozen_digest(work.parts) != training.fingerprint["frozen weights"]:
        raise RuntimeError(
            "a tensor that the policy keeps frozen has changed; please report this with the run's config.yaml"
        )
    if stage.name == "pretrain":
        training.keep(f"before-{stage.res}", training.evaluate("pretrained"))
        weights = run.pretrained
    else:
        training.keep("after", training.evaluate("after"))
        weights = run.root / "export" / "model.safetensors"
    if training.tracker:
        if stage.name == "fix":
            images = sum(s.images_until(s.stop) for s in stages(session.config, stage.n))
            summary = results.write_results(run, session, training.progress.seconds, images, **work.how())
        write_weights(session.model, weights, session.config, stage.res, session.classes)
        if stage.name == "fix":
            training.say(summary.sentence())
    session.ranks.barrier()
