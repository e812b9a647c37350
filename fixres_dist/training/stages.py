"""Steps, stages and learning rates as functions of the configuration and the number of images. No torch: plans use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import THROUGH_ALL, Pretrain, Tune
from fixres_dist.data import order
from fixres_dist.models.sizes import Sizes


@dataclass(frozen=True)
class Stage:
    """A stretch of optimizer steps [first, stop) with one policy, resolution and transform, on `n` images."""

    name: str  # head | pretrain | fix
    tune: Tune
    res: int
    transform: str
    first: int
    n: int
    seed: int  # of its order and augmentation: the stages must not repeat each other's

    @property
    def ordinary(self) -> Pretrain:
        """The settings that only ordinary training has; elsewhere the defaults, which do nothing."""
        return self.tune if isinstance(self.tune, Pretrain) else Pretrain()

    @property
    def together(self) -> int:
        """Neighbours in the order that a forward pass must not part: pairs where pictures are mixed."""
        return 2 if self.ordinary.mixes else 1

    @property
    def per_epoch(self) -> int:
        return order.steps_per_epoch(self.n, self.tune.global_batch)

    @property
    def stop(self) -> int:
        return self.first + self.tune.epochs * self.per_epoch

    def epochs_after(self, step: int) -> tuple[int, bool]:
        """(epochs that are complete after `step` steps, whether one ends there)."""
        epochs, rest = divmod(step - self.first, self.per_epoch)
        return epochs, rest == 0

    def batch_size(self, step: int) -> int:
        """Images of optimizer step `step` over all ranks; an epoch's last step may have fewer."""
        return min(self.tune.global_batch, self.n - (step - self.first) % self.per_epoch * self.tune.global_batch)

    def averages(self, done: int) -> int:
        """How many epoch ends the average of the weights holds after `done` steps, the one at `done` included."""
        epochs, ends = self.epochs_after(done)
        return max(0, epochs - self.tune.epochs + self.tune.average_epochs) if ends else 0

    def images_until(self, step: int) -> int:
        epochs, k = divmod(step - self.first, self.per_epoch)
        return epochs * self.n + k * self.tune.global_batch

    def learning_rate(self, step: int) -> float:
        """A function of the step, so there is no schedule state to save."""
        tune, k = self.tune, step - self.first
        peak, warmup = tune.peak_learning_rate(), tune.warmup_epochs * self.per_epoch
        if k < warmup:
            return peak * (k + 1) / warmup
        if tune.schedule == "step":
            return peak * 0.1 ** (k // self.per_epoch // tune.decay_epochs)
        done = (k - warmup) / max(1.0, tune.epochs * self.per_epoch - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * done))


def held_out_count(tune: Tune, n: int) -> int:
    """Of `n` training images, those that stay out of stage one."""
    return round(tune.hold_out * n)


def some_held_out(tune: Tune, n: int, classes: int) -> int:
    """The same, of images of so many classes. Raises UserError where that is none, or a class would keep none."""
    count, most = held_out_count(tune, n), n - classes
    if not 0 < count <= most:
        raise UserError(
            f"tune.hold_out={tune.hold_out:g} of {n:,} images is {count:,}; accepted: 1 to {most:,}, so that each class keeps "
            "one. Next: tune.hold_out=0"
        )
    return count


def repeats_of_held_out(tune: Tune, n: int) -> int:
    """How often each of them stands among the pictures of the fixing stage, so that they are about half of these."""
    held = held_out_count(tune, n)
    return max(1, round((n - held) / held)) if held else 0


def stages(config: Config, n: int) -> list[Stage]:
    """The stages of a run on `n` training images, in order; optimizer steps are counted through.

    Where settings are chosen on a held-out share, those that follow the choice, on all images (training/hold_out.py).
    """
    found: list[Stage] = []
    of_fixing = n
    if config.tune.hold_out and not config.tune.chooses:
        held = held_out_count(config.tune, n)
        n, of_fixing = n - held, n - held + held * repeats_of_held_out(config.tune, n)
    if config.pretrain:
        p, seed = config.pretrain, 2 * config.run.seed + 1
        if p.head_epochs:
            found.append(Stage("head", p.head(), p.res, "test", 0, n, int(order.keyed(seed, 3)[0])))
        found.append(Stage("pretrain", p, p.res, p.train_transform, found[0].stop if found else 0, n, seed))
    first = found[-1].stop if found else 0
    return [
        *found,
        Stage("fix", config.tune, config.data.res, config.data.train_transform, first, of_fixing, 2 * config.run.seed),
    ]


def evaluations_left(found: Sequence[Stage], eval_every: int, step: int) -> int:
    """Evaluations of val that follow when `step` steps are done: on the way, at each stage's end, and before fixing."""
    left = 0
    for stage in found:
        if step <= stage.stop:
            done = max(0, step - stage.first) // stage.per_epoch
            left += sum(1 for epoch in range(done + 1, stage.tune.epochs) if eval_every and epoch % eval_every == 0)
            left += 1 + (stage.name == "fix" and step <= stage.first)
    return left


def steps_left(found: Sequence[Stage], step: int) -> float:
    """Optimizer steps that follow when `step` steps are done, counted as steps of the stage under way.

    A step costs its images' pixels, and three times as much where gradients run through the whole model. What a cache of
    features saves later is not known before it is filled.
    """
    costs = [s.tune.global_batch * s.res**2 * (3 if s.tune.policy in THROUGH_ALL else 1) for s in found]
    now = next((k for k, stage in enumerate(found) if step < stage.stop), len(found) - 1)
    left = [max(0, stage.stop - max(step, stage.first)) for stage in found]
    return sum(steps * cost for steps, cost in zip(left, costs, strict=True)) / costs[now]


def other_sizes(config: Config, own: Sizes) -> dict[int, str]:
    """Resolutions other than the test's at which the weights are measured before fixing too -> why, in words.

    `own`: of the weights that the run starts from. New weights without a stage one have none.
    """
    found = {}
    if config.model.weights != "none":
        found = {own.test: "timm's test", own.train: "the weights' own"}
    if config.pretrain:
        found[config.pretrain.res] = "stage one's"
        if own.train != config.pretrain.res:
            found.pop(own.train, None)
    return {res: why for res, why in sorted(found.items()) if res not in (0, config.data.res)}


def batch_by_pixels(res: int) -> int:
    """Images that keep the pixels of a forward about constant: 64 at 320 px.

    A frozen trunk keeps no activations, so this bounds the peak of one layer, not of a graph.
    """
    return max(1, int(64 * (320 / res) ** 2))


def batch_per_device(config: Config, res: int) -> int:
    """Images per forward of a rank: as set, or by the pixels."""
    chosen = config.run.batch_per_device
    return batch_by_pixels(res) if chosen == "auto" else chosen
