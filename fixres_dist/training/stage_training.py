"""A stage under way: the model cut for it, its optimizer, where it continues, and what it evaluates and saves."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from timm.utils import ModelEmaV3

from fixres_dist.base.errors import StorageError, UserError
from fixres_dist.config import reading
from fixres_dist.models import tensor_files
from fixres_dist.models.optimizers import optimizer_of
from fixres_dist.models.parts import frozen_digest, parts_of, set_modes
from fixres_dist.models.precision import LossScale
from fixres_dist.models.sizes import of_weights
from fixres_dist.runs import checkpoint, restoring
from fixres_dist.runs.checkpoint import Progress
from fixres_dist.runs.results import OTHER_SIZE, Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.tracking import Left, Tracker
from fixres_dist.training import auto_batch, damage, pictures, results
from fixres_dist.training.calibration import reliability_of
from fixres_dist.training.divergence import Diverged, diverged, not_finite
from fixres_dist.training.partial import Partial
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, evaluations_left, other_sizes, steps_left
from fixres_dist.training.throughput import Meter

END = {"head": "head", "pretrain": "pretrained", "fix": "after"}  # the evaluation after a stage's last step


@dataclass
class Training:
    """A stage under way; `progress` is what the loop changes."""

    run: RunDir
    work: StageSession
    todo: list[Stage]  # all of the run
    optimizer: torch.optim.Optimizer
    scale: LossScale
    fingerprint: dict[str, Any]  # what must match between the starts of one run
    progress: Progress
    resumed: bool
    tracker: Tracker | None  # rank 0's
    writer: checkpoint.Writer
    ema: ModelEmaV3 | None = None  # the moving average of the weights
    meter: Meter = field(default_factory=Meter)
    saved_step: int = -1  # of the newest checkpoint of this stage
    # The tuned tensors at the stage's start, where they are measured again.
    tuned_before: tensor_files.Tensors = field(default_factory=dict)
    opened: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        if self.tracker:
            self.tracker.say(text)

    def draw(self, what: Literal["crops", "results"]) -> None:
        """Pictures for people, by rank 0 once; a run does not end because one cannot be drawn."""
        if not self.tracker:
            return
        session = self.work.session
        try:
            if what == "crops":
                pictures.draw_crops(self.run, session)
            else:
                pictures.draw_results(self.run, session, Predictions.read(results.predictions_file(self.run, "after")))
        except (OSError, UserError, StorageError) as error:
            self.say(f"pictures of {what} are not drawn: {error}")
        else:
            self.tracker.show_pictures()

    def show_results(self, found: Results) -> None:
        """The final numbers, and how far confidence is to be believed before and after, in TensorBoard."""
        if self.tracker:
            made = {when: Predictions.read(results.predictions_file(self.run, when)) for when in ("before", "after")}
            believed = {when: reliability_of(predictions) for when, predictions in made.items()}
            self.tracker.result(found, {when: r.percentages() for when, r in believed.items() if r}, self.progress.step)

    def set_modes(self) -> None:
        set_modes(self.work.parts, self.work.stage.tune.bn_stats)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the tuned tensors are their moving average, where the stage keeps one."""
        if not self.ema:
            yield
            return
        model = self.work.session.model
        kept = restoring.exchange(model, self.mean(self.ema))
        try:
            yield
        finally:
            restoring.put_tensors(model, kept)

    def mean(self, ema: ModelEmaV3) -> tensor_files.Tensors:
        """The tuned tensors' moving average."""
        found = ema.module.state_dict()
        return {name: found[name] for name in self.work.parts.tuned.tensors}

    def average(self, done: int, last: bool) -> None:
        """Take the weights after `done` steps into their moving average; the `last` ones become it."""
        if self.ema:
            self.ema.update(self.work.session.model, step=done - self.work.stage.first)
            if last:
                restoring.put_tensors(self.work.session.model, self.mean(self.ema))

    def evaluate(self, label: str) -> Predictions:
        """Of the validation images as the model is now; leaves the model ready to train. Raises Stopped."""
        began = time.monotonic()
        with self.averaged():
            predictions = self.work.evaluate(label, self.partial("epoch" if self.progress.pending else label, label))
        summary = predictions.summary()
        if not math.isfinite(summary.loss):
            raise self.diverged(f"the loss of the evaluation ({label}) is {summary.loss}")
        self.set_modes()
        if self.tracker:
            self.tracker.evaluation(self.progress.step, label, self.work.stage.res, summary, time.monotonic() - began)
        return predictions

    def measure_other_sizes(self, again: bool = False) -> None:
        """Before fixing, the accuracy at the weights' own size and at timm's test size, where stage one has not told it; or
        `again` where such a file was damaged."""
        config = self.work.session.config
        for res, why in other_sizes(config, of_weights(config.model)).items():
            if again:
                known = not damage.is_lost(results.predictions_file(self.run, f"before-{res}"))
            else:
                known = config.pretrain is not None and res == config.pretrain.res
            if known:
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
            mean = self.ema.module if self.ema else None
            self.writer.save(self.work.session.model, tensors, self.optimizer, now, self.fingerprint, mean)


def open_stage(run: RunDir, session: Session, stage: Stage, todo: list[Stage], writer: checkpoint.Writer) -> Training:
    """The model cut for the stage, one of `todo`, its optimizer, and where it continues: at its newest checkpoint, or at its
    start."""
    session = session.for_stage(stage)
    settings, tune = session.config.run, stage.tune
    parts = parts_of(session.model, tune.policy, settings.activation_checkpointing)
    parts = session.with_fast_trunk(parts, stage.res)
    optimizer = optimizer_of(session.model, settings, tune)
    scale = LossScale(session.arithmetic, optimizer, parts.head if parts.trains_blocks else None)
    fingerprint = {
        "stage": stage.name,
        "configuration": reading.identity(session.config),
        "sample lists": [session.train.fingerprint, session.val.fingerprint],
        "frozen weights": frozen_digest(parts),
    }
    start = Progress(stage.first, stage.name)
    lost = stage.name == "fix" and session.ranks.from_main(partial(damage.lacks_before, run, session.config))
    tuned_before = checkpoint.tuned(session.model, parts.tuned.tensors) if lost else {}
    decay = stage.ordinary.ema_decay
    ema = ModelEmaV3(session.model, decay, use_warmup=True) if decay else None
    mean = ema.module if ema else None
    progress, resumed = restoring.resume(
        run.checkpoints, start, session.model, parts.tuned.tensors, optimizer, fingerprint, mean
    )
    scale.restore(progress.loss_scale)
    work = StageSession(auto_batch.with_batch(session, stage, parts, optimizer, scale), stage, parts)
    main = session.ranks.is_main
    again = (progress.pending, END[stage.name]) if resumed else ("before", OTHER_SIZE)
    eval_every = session.config.run.eval_every

    def left(step: int) -> Left:
        return Left(steps_left(todo, step), evaluations_left(todo, eval_every, step))

    tracker = Tracker(run, session.config, progress.step, todo[-1].stop, again, left) if main else None
    saved = progress.step if resumed else -1
    return Training(
        *(run, work, todo, optimizer, scale, fingerprint, progress, resumed, tracker, writer, ema),
        saved_step=saved,
        tuned_before=tuned_before,
    )
