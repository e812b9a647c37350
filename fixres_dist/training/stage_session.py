"""A session at work on one stage: the model cut into trunk and head, and the stage's pictures or cached features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn

from fixres_dist.data.geometry import Augment
from fixres_dist.data.requests import Pictures, Request, first_samples, micro_batches, train_steps
from fixres_dist.models.fast_trunk import FastTrunk
from fixres_dist.models.parts import Parts, described
from fixres_dist.models.resizing import takes
from fixres_dist.training.cache.store import Loaded, Store
from fixres_dist.training.partial import Partial
from fixres_dist.training.predict import predict
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage
from fixres_dist.training.throughput import Meter


@dataclass(frozen=True)
class StageSession:
    """`stores`: cached features by split; empty where the stage decodes its pictures."""

    session: Session
    stage: Stage
    parts: Parts
    stores: Mapping[str, Store] = field(default_factory=dict)

    @property
    def batch_per_device(self) -> int:
        """Images of one forward pass of this rank, at most."""
        size, pair = self.session.batch_per_device(self.stage.res), self.stage.together
        return max(pair, size - size % pair)

    @property
    def pictures(self) -> Pictures:
        """The pictures that the stage trains on."""
        made, config = (
            self.session.pictures_of(self.stage.transform, self.stage.res, self.stage.seed),
            self.stage.ordinary,
        )
        if not config.rand_augment:
            return made
        fill = cast(tuple[int, int, int], tuple(min(255, round(255 * x)) for x in self.session.spec.mean))
        return replace(made, augment=Augment(config.rand_augment, fill))

    def how(self) -> dict[str, str]:
        """What results.json and the events say of it: the engine, how the frozen trunk is arranged, and what trains."""
        trunk = str(getattr(self.parts.trunk, "how", "trained"))
        trained = described(self.parts).removeprefix("training ")
        return {"engine": "cached" if self.stores else "stream", "trunk": trunk, "trained": trained}

    def requests(self, first: int, stop: int, batch_per_device: int) -> Iterator[list[Request]]:
        """This rank's requests of the optimizer steps `first` .. `stop - 1`, counted as the run counts them."""
        stage, ranks = self.stage, self.session.ranks
        return train_steps(
            *(self.session.train, self.pictures, stage.tune.global_batch, batch_per_device),
            *(first - stage.first, stop - stage.first, ranks.rank, ranks.world_size, stage.tune.repeats),
            stage.together,
        )

    def steps(self, first: int, meter: Meter) -> Iterator[tuple[int, Iterator[Loaded]]]:
        """(step, its micro-batches) from step `first` to the stage's end.

        The loader runs ahead over the ends of steps and epochs; `meter` counts the time spent waiting for it.
        """
        stage, size = self.stage, self.batch_per_device
        requests = itertools.chain.from_iterable(self.requests(first, stage.stop, size))
        loaded = meter.waiting(self.loaded("train", requests))
        ranks = self.session.ranks
        for step in range(first, stage.stop):
            count = micro_batches(stage.batch_size(step), ranks.world_size, size, stage.together)
            parts = itertools.islice(loaded, count)
            # A step that moves statistics is done to its end: they could not be taken back.
            yield step, parts if stage.tune.bn_stats == "ema" else self.asking(parts)

    def asking(self, parts: Iterator[Loaded]) -> Iterator[Loaded]:
        """A step's micro-batches; raises Stopped where a stop signal has come before a later one than the first."""
        for k, batch in enumerate(parts):
            if k:
                self.session.ranks.check_stop()
            yield batch

    def statistics_batches(self, first: int) -> Iterator[Loaded]:
        """This rank's part of the first `bn_stats_images` samples of the order, on which exact statistics are measured,
        from its batch `first` on."""
        count, ranks = self.stage.tune.bn_stats_images, self.session.ranks
        args = (self.session.train, self.pictures, count, self.batch_per_device, ranks.rank, ranks.world_size)
        return self.loaded("train", itertools.islice(first_samples(*args), first, None))

    def loaded(self, split: str, requests: Iterator[Request]) -> Iterator[Loaded]:
        """What the head's inputs are computed from: pictures, or the cached features where there are some."""
        return self.session.batches(self.session.splits[split], requests, self.stage.res, self.stores.get(split))

    def inputs(self, images: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.session.inputs(self.parts, images)

    def logits(self, head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.session.logits(self.parts, head, inputs)

    def evaluate_at(self, res: int, note: str, partial: Partial) -> Predictions | None:
        """Of every validation image at another resolution, uncompiled: a compiled trunk is of one size, and takes minutes.

        None where the model does not take that resolution.
        """
        if not takes(self.session.model, res):
            return None
        config, trunk = self.session.config, self.parts.trunk
        size = max(1, int(self.batch_per_device * min(1.0, (self.stage.res / res) ** 2)))
        session = replace(self.session, config=replace(config, run=replace(config.run, batch_per_device=size)))
        parts = replace(self.parts, trunk=trunk.eager() if isinstance(trunk, FastTrunk) else trunk)
        (found,) = predict(session, [parts], res, note, partial=partial)
        return found

    def evaluate(self, note: str, partial: Partial) -> Predictions:
        """Of every validation image at the stage's resolution; `partial` as in predict."""
        store = self.stores.get("val")
        (found,) = predict(self.session, [self.parts], self.stage.res, note, store=store, partial=partial)
        return found
