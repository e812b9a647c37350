"""A first result within minutes, as a floor for what follows: a logistic classifier on the untouched network's features.

The network has never seen these pictures, so folds inside train are honest here, and choose the strength of the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist.base import watchdog
from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import write_json
from fixres_dist.config.schema import Tune
from fixres_dist.data import order
from fixres_dist.data.requests import every_sample
from fixres_dist.models.parts import parts_of
from fixres_dist.runs.results import Floor, read_floors
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import results
from fixres_dist.training.cache.build import open_stores
from fixres_dist.training.predict import from_rows, score
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # L2, of the weights of standardised features
FOLDS = 5
LARGEST = 2e9  # features x classes x images; more would take longer than minutes


def measure_floors(run: RunDir, session: Session, sizes: Sequence[int]) -> None:
    """Before stage one: a classifier at each of `sizes` px, kept in floor.json, in which a later start finds it.

    The trunk's features are written by the cached engine's pass; rank 0 trains on them. Raises Stopped.
    """
    ranks = session.ranks
    done = ranks.from_main(lambda: [floor.res for floor in read_floors(run)])
    for res in (res for res in sizes if res not in done):
        try:
            work = on_features(run, session, res)
        except UserError as error:  # the classifier cannot be cut off; the same on all ranks
            work, why = None, str(error)
        if work:
            why = "no room for its features"
            if work.stores:
                why = ranks.from_main(partial(of_features, run, work))
        if why and ranks.is_main:
            print(f"no first result at {res} px: {why}", flush=True)


def on_features(run: RunDir, session: Session, res: int) -> StageSession:
    """`session` with the pooled features of its pictures at `res` px, written where they are missing; without stores where
    there is no room. Raises UserError where the network has no classifier that can be cut off."""
    settings = replace(session.config.run, engine="auto", compile=False)
    session = replace(session.for_size(res), config=replace(session.config, run=settings))
    stage = Stage("floor", Tune(policy="classifier"), res, "test", 0, len(session.train), session.config.run.seed)
    parts = parts_of(session.model, "classifier")
    work = StageSession(session, stage, session.with_fast_trunk(parts, res))
    return open_stores(work, resumed=False, tell=run.event)


def of_features(run: RunDir, work: StageSession) -> str:
    """Add the classifier's accuracy on val to floor.json, with the penalty that is chosen inside train; returns why not."""
    classes, res = len(work.session.classes), work.stage.res
    print(
        f"first result at {res} px: fitting a logistic classifier with each of {len(PENALTIES)} penalties", flush=True
    )
    x, labels, _ = features(work, "train")
    if x.dim() != 2 or x.numel() * classes > LARGEST:
        return f"{classes} classes on features {list(x.shape)} would take too long"
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / scale
    folds, losses = stratified(labels, FOLDS, work.stage.seed), {}
    for penalty in PENALTIES:
        losses[penalty] = fold_loss(x, labels, folds, classes, penalty)
        watchdog.beat()
    chosen = min(losses, key=losses.__getitem__)
    scores, wanted, samples = features(work, "val")
    found = logits(fit(x, labels, classes, chosen), (scores - mean) / scale)
    rows = torch.zeros(len(work.session.val), 6, dtype=torch.float64)
    rows[:, 1] = -1  # a picture that could not be decoded has no prediction
    rows[samples] = score(found, wanted).double()
    predictions = from_rows(rows, work.session.val)
    predictions.save(results.predictions_file(run, f"floor-{res}"), work.session.val.fingerprint)
    val = predictions.summary()
    floor = Floor(val.top1, val.top5, val.loss, res, chosen, losses[chosen])
    write_json(run.floor, [asdict(one) for one in (*read_floors(run), floor)])
    print(floor.sentence(), flush=True)
    return ""


def fold_loss(x: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor, classes: int, penalty: float) -> float:
    """Mean cross-entropy of the samples of each fold under a classifier trained on the others."""
    total = 0.0
    for k in range(FOLDS):
        held = folds == k
        if held.any() and not held.all():
            layer = fit(x[~held], labels[~held], classes, penalty)
            total += float(F.cross_entropy(logits(layer, x[held]), labels[held], reduction="sum"))
    return total / len(labels)


def features(work: StageSession, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pooled features [n, width], the model's classes [n], samples [n]) of the pictures that could be decoded."""
    session = work.session
    index, store = session.splits[split], work.stores[split]
    requests = every_sample(index, session.pictures_of("test", work.stage.res), 256, 0, 1)
    found, labels, samples = [], [], []
    for rows in store.batches(index, requests):
        (values, *_) = session.inputs(work.parts, rows.images)
        found.append(values.cpu())
        labels.append(rows.labels)
        samples.append(rows.samples)
    columns = torch.tensor(session.columns[split])
    return torch.cat(found), columns[torch.cat(labels)], torch.cat(samples)


def stratified(labels: torch.Tensor, folds: int, seed: int) -> torch.Tensor:
    """The fold of each sample [n]: every class spread evenly over them, in an order drawn from `seed`."""
    n = len(labels)
    drawn = torch.from_numpy(order.positions_to_samples(n, seed, 0, np.arange(n)).copy())
    by_class = drawn[torch.argsort(labels[drawn], stable=True)]
    found = torch.empty(n, dtype=torch.long)
    found[by_class] = torch.arange(n) % folds
    return found


def fit(x: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float) -> nn.Linear:
    """Multinomial logistic regression by L-BFGS: the least mean cross-entropy plus penalty / 2 * sum of squared weights."""
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x), labels) + penalty / 2 * layer.weight.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return layer


@torch.no_grad()
def logits(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = layer(x)
    return found


def percent(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    hits = logits.topk(min(k, logits.shape[1])).indices == labels[:, None]
    return 100 * float(hits.any(1).double().mean())
