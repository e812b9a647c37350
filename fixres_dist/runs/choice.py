"""What a run has chosen on pictures that were held out of a first stage one (chosen.json), and what it tried. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from fixres_dist.base.commands import shell
from fixres_dist.base.small_files import read_json
from fixres_dist.base.text import markdown_table
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import BnStats


@dataclass(frozen=True)
class Candidate:
    """Settings of the fixing stage, and what they gave on the held-out pictures."""

    res: int
    bn_stats: str
    base_lr: float
    alpha: float  # between stage one's head (0: nothing is trained) and the trained one (1)
    loss: float  # cross-entropy, under a temperature that the other folds give
    top1: float  # percent; it does not choose

    def __str__(self) -> str:
        head = f"learning rate {self.base_lr:g}, alpha {self.alpha:g}" if self.alpha else "stage one's head"
        return f"{self.res} px, statistics {self.bn_stats}, {head}"


@dataclass(frozen=True)
class Choice:
    """chosen.json, and in results.json."""

    n: int  # pictures that were held out
    chosen: Candidate
    tried: tuple[Candidate, ...]

    def sentence(self) -> str:
        found = self.chosen
        return (
            f"chosen on {self.n} held-out pictures, of {len(self.tried)} candidates: {found} "
            f"(log-likelihood {-found.loss:.3f}, top-1 {found.top1:.1f})"
        )

    def best(self) -> list[Candidate]:
        """The best candidate of every size and kind of statistics, untrained and trained."""
        found: dict[tuple[int, str, bool], Candidate] = {}
        for one in self.tried:
            key = (one.res, one.bn_stats, one.alpha > 0)
            if key not in found or one.loss < found[key].loss:
                found[key] = one
        return list(found.values())

    def table(self) -> str:
        """Markdown of `best`."""
        rows = [
            (c.res, c.bn_stats, f"{c.base_lr:g}" if c.alpha else "-", f"{c.alpha:g}", f"{-c.loss:.3f}", f"{c.top1:.1f}")
            for c in self.best()
        ]
        return markdown_table(
            ("px", "BN statistics", "learning rate", "alpha", "log-likelihood", "top-1 (held out)"), rows
        )

    def applied(self, config: Config) -> Config:
        """`config`, as it was submitted, with what was chosen."""
        found = self.chosen
        tune = replace(
            config.tune, bn_stats=cast(BnStats, found.bn_stats), base_lr=found.base_lr, alpha=found.alpha or 1.0
        )
        if found.bn_stats != "kept":
            tune = replace(tune, policy="classifier+bn_stats")
        if not found.alpha:
            tune = replace(tune, epochs=0)
        return replace(config, tune=tune, data=replace(config.data, res=found.res))


def read(file: Path, again: Callable[[], str]) -> Choice | None:
    """None before a choice, and where nothing is chosen. `again`: the command that goes on with the run. Raises Damaged."""
    if not file.exists():
        return None
    return read_json(file, Choice, f"{shell('rm', file)}, then {again()}")
