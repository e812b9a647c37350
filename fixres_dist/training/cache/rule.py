"""Which engine feeds a stage: pictures through the trunk in every epoch, or its output, written once. No torch: plans use it.

A frozen trunk makes the same features of the same picture, so where pictures repeat, later epochs need only the head.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.environment import cache_folder, writable
from fixres_dist.base.errors import UserError
from fixres_dist.base.text import gib
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import THROUGH_ALL
from fixres_dist.training.stages import Stage

VIEWS = {"test": 1, "test_flip": 2}  # how many pictures of a sample a transform can show; the others draw new ones
ROOM = 0.9  # of the free space that features may take
PAYS = 1.5  # `auto` writes features if that saves a third of the pictures that the trunk would see


@dataclass(frozen=True)
class Need:
    """What the cached engine would write."""

    pictures: int  # that go through the trunk for it
    bytes: int
    free: int  # bytes
    folder: Path

    def __str__(self) -> str:
        room = f" ({gib(self.free)} free)" if self.free else ", which cannot be written to"
        return f"{gib(self.bytes)} in {self.folder}{room}"

    @property
    def fits(self) -> bool:
        return self.bytes <= ROOM * self.free


def feature_folder(config: Config) -> Path:
    return Path(os.path.expanduser(config.run.feature_cache or cache_folder(config.data.cache) / "features"))


def free_bytes(folder: Path) -> int:
    """Room on the disk where `folder` is, or will be; none for a user who cannot write there."""
    if not writable(folder):
        return 0
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def obstacle(stage: Stage) -> str:
    """Why this stage cannot be fed from features; empty if it can."""
    if stage.tune.policy in THROUGH_ALL:
        return f"policy {stage.tune.policy} leaves no frozen trunk whose output could be kept"
    if stage.transform not in VIEWS:
        return f"transform {stage.transform} draws new pictures every epoch"
    return ""


def check(setting: str, stage: Stage) -> None:
    """Raises UserError where the fixing stage is to be cached and cannot be."""
    if setting == "cached" and stage.name == "fix" and (why := obstacle(stage)):
        raise UserError(
            f"run.engine is cached, and {why}. Next: data.train_transform=test or test_flip (with a policy other than all), "
            "or run.engine=stream."
        )


def streamed_pictures(stage: Stage, val: int, evaluations: int) -> int:
    """Pictures that go through the trunk when the stage is streamed: its epochs, exact statistics and evaluations."""
    tune = stage.tune
    measured = tune.bn_stats in ("exact", "mean") and tune.policy != "classifier"
    return tune.epochs * stage.n + (min(tune.bn_stats_images, stage.n) if measured else 0) + evaluations * val


def evaluations(config: Config) -> int:
    """Before, after, and at the epoch ends between."""
    every = config.run.eval_every
    return 2 + ((config.tune.epochs - 1) // every if every else 0)


def choose(setting: str, stage: Stage, streamed: int, need: Need) -> tuple[str, str]:
    """(stream | cached, why). `streamed`: pictures through the trunk without features. Raises UserError for `cached` without room."""
    check(setting, stage)
    if why := obstacle(stage):
        return "stream", why
    if setting == "stream":
        return "stream", "run.engine=stream"
    saving = f"{need.pictures:,} pictures through the trunk instead of {streamed:,}"
    if stage.name in ("floor", "choice"):
        return "cached" if need.fits else "stream", f"{need}"
    if setting == "cached" and stage.name == "fix":
        if not need.fits:
            raise UserError(
                f"run.engine is cached, and the features need {need}. Accepted: run.feature_cache=DIR with more room; "
                "tune.policy=classifier, which keeps pooled features only; "
                f"or run.engine=stream ({streamed:,} pictures through the trunk instead of {need.pictures:,})."
            )
        return "cached", f"run.engine=cached: {need}, {saving}"
    if streamed < PAYS * need.pictures:
        return (
            "stream",
            f"writing features would save too little: {saving} (run.engine=cached does it, say for a sweep)",
        )
    if not need.fits:
        return "stream", f"no room for features: {need}; run.feature_cache=DIR names another place"
    return "cached", f"{need}, {saving}"
