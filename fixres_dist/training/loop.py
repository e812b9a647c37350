"""The training of one stage: open it, measure, the loop, close it. One loop serves ordinary training and fixing.

Everything but the tuned tensors, their momenta and the progress is a function of the configuration and the step, so a
start after a kill continues exactly from its checkpoint.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fixres_dist.base.signals import Stopped
from fixres_dist.config import reading
from fixres_dist.models.parts import described, frozen_digest, parts_of, set_modes
from fixres_dist.models.precision import LossScale, sgd
from fixres_dist.models.sizes import of_weights
from fixres_dist.models.weights import write_weights
from fixres_dist.runs import checkpoint
from fixres_dist.runs.checkpoint import Progress
from fixres_dist.runs.results import OTHER_SIZE
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.runs.tracking import Tracker
from fixres_dist.training import auto_batch, class_order, compiled_code, results, samples
from fixres_dist.training.cache.build import open_stores
from fixres_dist.training.divergence import Diverged, diverged, not_finite
from fixres_dist.training.partial import Partial
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, other_sizes, stages
from fixres_dist.training.step import average_weights, backward, distribute, measure_statistics
from fixres_dist.training.throughput import Meter, StartUp

END = {"pretrain": "pretrained", "fix": "after"}  # the evaluation after a stage's last step


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
    meter: Meter = field(default_factory=Meter)
    saved_step: int = -1  # of the newest checkpoint of this stage
    opened: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        if self.tracker:
            self.tracker.say(text)

    def set_modes(self) -> None:
        set_modes(self.work.parts, self.work.stage.tune.bn_stats)

    def evaluate(self, label: str) -> Predictions:
        """Of the validation images as the model is now; leaves the model ready to train. Raises Stopped."""
        predictions = self.work.evaluate(label, self.partial("epoch" if self.progress.pending else label, label))
        summary = predictions.summary()
        if not math.isfinite(summary.loss):
            raise self.diverged(f"the loss of the evaluation ({label}) is {summary.loss}")
        self.set_modes()
        if self.tracker:
            self.tracker.evaluation(self.progress.step, label, self.work.stage.res, summary)
        return predictions

    def measure_other_sizes(self) -> None:
        """Before fixing, the accuracy at the weights' own size and at timm's test size, where stage one has not told it."""
        config = self.work.session.config
        for res, why in other_sizes(config, of_weights(config.model)).items():
            if config.pretrain and res == config.pretrain.res:
                continue
            predictions = self.work.evaluate_at(res, f"before, {res} px", self.partial(f"before-{res}", res))
            if predictions is None:
                self.say(
                    f"not measured at {res} px ({why}): {config.model.timm_name} is built for {config.data.res} px"
                )
                continue
            self.keep(f"before-{res}", predictions)
            if self.tracker:
                self.tracker.other_size(self.progress.step, res, why, predictions.summary())
        self.set_modes()

    def evaluate_pending(self) -> None:
        """The evaluation that is due after this step; a start that found it unfinished goes on with it."""
        top1 = self.evaluate(self.progress.pending).summary().top1
        self.progress = replace(self.progress.with_top1(top1), pending="")

    def partial(self, name: str, *depends: object) -> Partial:
        """Where a pass over the images keeps what is done, for these weights at this step."""
        every_s = self.work.session.config.run.save_every_s
        depends = (self.fingerprint, self.progress.step, *depends)
        return Partial.of(self.run.partial / f"{name}.npz", every_s, self.work.parts, depends)

    def keep(self, when: str, predictions: Predictions) -> None:
        """predictions/WHEN.npz, so that any two runs can be compared image by image."""
        if self.tracker:
            predictions.save(results.predictions_file(self.run, when), self.work.session.val.fingerprint)

    def diverged(self, what: str) -> Diverged:
        session, stage = self.work.session, self.work.stage
        self.writer.wait()  # the message names the last checkpoint
        if self.meter.images:  # of this rank, since the last reading
            what += f", with loss {float(self.meter.loss) / self.meter.images:.4g},"
        return diverged(self.run, session.config, stage, self.progress.step, session.arithmetic.name, what)

    def save(self) -> None:
        """A checkpoint, which rank 0 writes. Raises Diverged where it would not be finite."""
        if name := not_finite(self.work.parts, self.optimizer):
            raise self.diverged(f"a tensor of the model or optimizer ({name}) is not finite")
        self.saved_step = self.progress.step
        if self.tracker:
            self.tracker.flush()
            now = replace(self.progress, loss_scale=self.scale.state())
            tensors = self.work.parts.tuned.tensors
            self.writer.save(self.work.session.model, tensors, self.optimizer, now, self.fingerprint)


def train_stage(
    run: RunDir, session: Session, stage: Stage, total_steps: int, writer: checkpoint.Writer, startup: StartUp
) -> None:
    """Train `stage` from its newest checkpoint, or from its start, to its end; raises Stopped, once all is saved, where a
    stop signal came before."""
    training = open_stage(run, session, stage, total_steps, writer)
    startup.mark("trunk")
    try:
        with auto_batch.naming_a_smaller_batch(training.work, in_steps=False):
            open_features(training)
            if not training.resumed:
                measure(training, startup)
            if session.ranks.is_main:
                compiled_code.keep(session.config.data.cache)  # for starts after a kill
        with auto_batch.naming_a_smaller_batch(training.work, in_steps=True):
            loop(training, startup)
        close(training)
    except Stopped:
        stop(training)
        raise
    finally:
        if training.tracker:
            training.tracker.close()
    if session.ranks.is_main:
        compiled_code.keep(session.config.data.cache)  # what was compiled since


def stop(training: Training) -> None:
    """All ranks have agreed on a stop signal, anywhere in the stage: save the last step, unless a checkpoint has it, or
    there is nothing yet but what evaluations and measurements have kept."""
    step = training.progress.step
    if training.tracker:
        training.run.update_state(Event.STOP_REQUESTED, step=step, eta_s=None)
    if training.saved_step not in (-1, step):
        training.save()
    training.writer.wait()


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
    again = (progress.pending, END[stage.name]) if resumed else ("before", OTHER_SIZE)
    tracker = Tracker(run, session.config, progress.step, total_steps, resumed, again) if main else None
    saved = progress.step if resumed else -1
    return Training(run, work, optimizer, scale, fingerprint, progress, resumed, tracker, writer, saved_step=saved)


def open_features(training: Training) -> None:
    """Cache the trunk's features where that pays (cache/rule.py)."""
    work, run, step = training.work, training.run, training.progress.step
    training.work = work = open_stores(work, check=not training.resumed)
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
        partial = training.partial("statistics", work.session.ranks.world_size, work.batch_per_device)
        count = measure_statistics(work, partial)
        names = ", ".join(work.parts.tuned.last_bns)
        training.say(f"statistics of {names} measured on {count} images at {work.stage.res} px")
        startup.mark("statistics")
    training.save()


def loop(training: Training, startup: StartUp) -> None:
    """Optimizer steps to the stage's end."""
    work, run, tracker, optimizer = training.work, training.run, training.tracker, training.optimizer
    stage, ranks, settings = work.stage, work.session.ranks, work.session.config.run
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    if training.progress.pending:
        training.evaluate_pending()
        startup.mark("evaluation")
    head = distribute(work)
    meter, saved_at, started = training.meter, time.monotonic(), training.opened - training.progress.seconds
    meter.restart()
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
        if startup.running:
            phases = startup.stop()
            if tracker:
                run.event("first step", **phases)
        if settings.record_samples:
            samples.record(run, work, step, seen)
        if logging:
            values = meter.read(ranks, learning_rate=rate, grad_norm=norm, **training.scale.metrics())
            if not math.isfinite(values["loss"]):
                raise training.diverged(f"the training loss is {values['loss']}")
            if tracker:
                tracker.step(done, stage.name, (done - stage.first) / stage.per_epoch, values)
        if ends_epoch:
            training.set_modes()
            if count := stage.averages(done):
                average_weights(optimizer, count, use=last)
            if not last and settings.eval_every and epoch % settings.eval_every == 0:
                training.progress = replace(training.progress, pending=f"{stage.name} epoch {epoch}")
                training.save()  # an evaluation can take longer than a stop signal's warning
                training.evaluate_pending()
                meter.restart()
                saved_at = time.monotonic()
        due = training.saved_step != done and time.monotonic() - saved_at >= settings.save_every_s
        (save_now,) = ranks.check_stop(int(ranks.is_main and due))
        if save_now or last:
            training.save()
            saved_at = time.monotonic()


def close(training: Training) -> None:
    """After the last step: evaluate, and write the stage's weights; after fixing also the results."""
    work, run = training.work, training.run
    session, stage = work.session, work.stage
    training.writer.wait()
    if frozen_digest(work.parts) != training.fingerprint["frozen weights"]:
        raise RuntimeError(
            "a tensor that the policy keeps frozen has changed; please report this with the run's config.yaml"
        )
    predictions = training.evaluate(END[stage.name])
    training.keep("after" if stage.name == "fix" else f"before-{stage.res}", predictions)
    if training.tracker:
        if stage.name == "fix":
            images = sum(s.images_until(s.stop) for s in stages(session.config, stage.n))
            summary = results.write_results(run, session, training.progress.seconds, images, **work.how())
        weights = run.root / "export" / "model.safetensors" if stage.name == "fix" else run.pretrained
        write_weights(session.model, weights, session.config, stage.res, session.classes)
        shutil.rmtree(run.partial, ignore_errors=True)
        if stage.name == "fix":
            training.say(summary.sentence())
    session.ranks.barrier()
