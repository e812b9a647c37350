"""Exact evaluation: every image of a split once, at any world size, for one model or several in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.data import order
from fixres_dist.data.index import Index
from fixres_dist.data.progress import progress_bar
from fixres_dist.data.requests import every_sample
from fixres_dist.models.parts import Parts, frozen_digest
from fixres_dist.training.cache.store import Loaded, Store
from fixres_dist.training.partial import Partial, unseen
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session


def predict(
    session: Session,
    models: Sequence[Parts],
    res: int,
    note: str,
    split: str = "val",
    store: Store | None = None,
    partial: Partial | None = None,
) -> list[Predictions]:
    """Predictions of each model for every image of `split` at `res` px, the same on all ranks.

    All models share one pass over the images, in the arithmetic of training, and a frozen trunk that several of them have
    runs once. Logits are restricted to the split's classes, the protocol of ImageNet-A and ImageNet-R; predicted classes
    are the model's. `store` gives trunk features in place of images; `note` labels the progress bar. `partial`
    keeps what is done at a stop signal (Stopped), and its images are not computed again; in a command's job every pass is
    kept. The models are left in eval mode.
    """
    partial = partial or session.partial(models, res, split)
    models = [session.parts_for_size(parts, res) for parts in models]
    index, columns = session.splits[split], torch.tensor(session.columns[split], device=session.ranks.device)
    for parts in models:
        parts.model.eval()
        parts.head.eval()
    several = len(models) > 1  # a digest reads every weight
    trunks = [frozen_digest(m) if m.trunk is not None and several else str(k) for k, m in enumerate(models)]

    def logits(batch: Loaded) -> list[torch.Tensor]:
        features = {
            name: session.inputs(parts, batch.images) for name, parts in dict(zip(trunks, models, strict=True)).items()
        }
        # Cloned where the next head takes the same features: a head may work in place.
        return [
            session.logits(parts, parts.head, tuple(f.clone() if several else f for f in features[name]))[:, columns]
            for name, parts in zip(trunks, models, strict=True)
        ]

    requests, done = session.requests(every_sample, index, res), None
    if partial and (done := session.ranks.from_main(partial.read)) is not None:
        requests = unseen(requests, done[0, :, 0] > 0)
    if done is not None and done[0, :, 0].all():
        if session.ranks.is_main:
            print(f"{note}: all {len(index)} images are done already", flush=True)
        found = [from_rows(torch.from_numpy(part), index) for part in done]
    else:
        batches = session.batches(index, requests, res, store)
        found = score_batches(logits, index, batches, session.ranks, len(models), note, partial, done)
        session.looked(split, len(models))
    session.passed()
    return [predictions.of_classes(session.columns[split]) for predictions in found]


@torch.no_grad()
def score_batches(
    logits: Callable[[Loaded], list[torch.Tensor]],
    index: Index,
    batches: Iterable[Loaded],
    ranks: Ranks,
    models: int = 1,
    note: str = "",
    partial: Partial | None = None,
    done: NDArray[np.float64] | None = None,
) -> list[Predictions]:
    """Predictions of each of `models` models from `logits(batch)` of this rank's batches, put together over all ranks.

    `partial` keeps the rows [models, n, 6] at a stop signal, and when they are complete; `done` are rows that it has kept.

    Raises RuntimeError if an image was missed or repeated, UserError if no image could be decoded.
    """
    n, own = len(index), Scored([], [], [[] for _ in range(models)])
    if done is not None and ranks.is_main:
        print(f"{note}: {int(done[0, :, 0].sum())} of {n} images are done already", flush=True)

    def keep() -> torch.Tensor:
        """Rows [models, n, 6] of all ranks, as far as they are."""
        rows = own.rows(n)
        if done is not None and ranks.is_main:
            rows += torch.from_numpy(done)
        ranks.total(rows)
        if partial and ranks.is_main:
            partial.write(rows.numpy())
        return rows

    (start, stop), passed = order.rank_part(0, n, ranks.rank, ranks.world_size), 0
    batches = ranks.together(iter(batches), keep, partial.every_s if partial else math.inf)
    with progress_bar(note, ranks.is_main) as report:
        for batch in batches:
            labels = batch.labels.to(ranks.device, non_blocking=True)
            own.add(batch, [score(values, labels) for values in logits(batch)])
            passed += len(batch.labels) + len(batch.skipped)
            report(passed, stop - start)
    rows = keep()
    if not bool((rows[:, :, 0] == 1).all()):
        raise RuntimeError(f"evaluation saw {int(rows[0, :, 0].sum())} images of {n}, each should be seen once")
    return [from_rows(part, index) for part in rows]


class Scored(NamedTuple):
    """What one rank has found so far; scores stay on the device until they are asked for, so that nothing waits for it."""

    seen: list[torch.Tensor]  # samples of each batch
    missed: list[int]  # samples that could not be decoded
    scores: list[list[torch.Tensor]]  # of each model and batch, as `score` returns them

    def add(self, batch: Loaded, scores: list[torch.Tensor]) -> None:
        self.seen.append(batch.samples)
        self.missed.extend(bad.sample for bad in batch.skipped)
        for of_model, values in zip(self.scores, scores, strict=True):
            of_model.append(values)

    def rows(self, n: int) -> torch.Tensor:
        """[models, n, 6] with the columns of `score`; zeros where nothing is seen."""
        rows = torch.zeros(len(self.scores), n, 6, dtype=torch.float64)
        for sample in self.missed:
            rows[:, sample, :2] += torch.tensor([1.0, -1.0], dtype=rows.dtype)  # seen, without a prediction
        for row, of_model in zip(rows, self.scores, strict=True):
            if of_model:
                row.index_add_(0, torch.cat(self.seen), torch.cat(of_model).double().cpu())
        return rows


def score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[n, 6] for logits [n, classes]: 1 (seen), predicted class, top-1 hit, top-5 hit, cross-entropy, confidence."""
    top = logits.topk(min(5, logits.shape[1])).indices
    hits = top == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none")
    confidence = logits.softmax(1).amax(1)
    return torch.stack([torch.ones_like(loss), top[:, 0], hits[:, 0], hits.any(1), loss, confidence], 1)


def from_rows(rows: torch.Tensor, index: Index) -> Predictions:
    """Predictions from rows [n, 6] of `score`; class -1: the image has no prediction. Raises UserError if none has one."""
    t = rows.numpy()
    if not (t[:, 1] >= 0).any():
        raise UserError(
            f"none of the {len(index)} images of {index.folder} has a prediction, because none could be decoded. "
            f"Next: {command('data', 'verify', '--data', index.folder.parent)}"
        )
    loss, confidence = t[:, 4].astype(np.float32), t[:, 5].astype(np.float32)
    labels = index.labels.astype(np.int32)
    return Predictions(t[:, 1].astype(np.int32), t[:, 2] > 0, t[:, 3] > 0, loss, confidence, labels)
