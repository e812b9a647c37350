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
from fixres_dist.base.files import whole
from fixres_dist.base.small_files import write_json
from fixres_dist.config import own_data
from fixres_dist.config.stage_settings import Tune
from fixres_dist.data import order
from fixres_dist.data.requests import every_sample
from fixres_dist.models import tensor_files, weights
from fixres_dist.models.build import classifiers
from fixres_dist.models.parts import classifier_inputs, parts_of
from fixres_dist.runs.restoring import put_tensors
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


def measure_floors(run: RunDir, session: Session, sizes: Sequence[int]) -> None:
    """Before stage one: a classifier at each of `sizes` px, kept in floor.json, in which a later start finds it.

    The trunk's features are written by the cached engine's pass; rank 0 trains on them. With pretrain.classifier=first_result
    the session's model gets the one at stage one's size: a whole network that learns from there keeps more of what it knows
    (arXiv 2202.10054). Raises Stopped.
    """
    ranks, first = session.ranks, session.config.pretrain
    start = first.res if first and first.classifier == "first_result" else None
    done = ranks.from_main(
        lambda: [floor.res for floor in read_floors(run) if floor.res != start or run.first_classifier.exists()]
    )
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
    if start and ranks.from_main(run.first_classifier.exists):
        put_tensors(session.model, weights.read_state(run.first_classifier))
    elif start and ranks.is_main:
        print(
            "warning: stage one starts with a new classifier, at settings for the first result's. "
            "Next, under another --name: pretrain.classifier=new",
            flush=True,
        )


def on_features(run: RunDir, session: Session, res: int) -> StageSession:
    """`session` with the pooled features of its pictures at `res` px, written where they are missing; without stores where
    there is no room. Raises UserError where the network has no classifier that can be cut off."""
    settings = replace(session.config.run, engine="auto", compile=False)
    session = replace(session.for_size(res), config=replace(session.config, run=settings))
    stage = Stage("floor", Tune(policy="classifier"), res, "test", 0, len(session.train), session.config.run.seed)
    parts = parts_of(session.model, "classifier")
    work = StageSession(session, stage, session.with_fast_trunk(parts, res))
    return open_stores(work, resumed=False, tell=run.event, decide_anew=True)


def of_features(run: RunDir, work: StageSession) -> str:
    """Add the classifier's accuracy on val to floor.json, with the penalty that is chosen inside train; returns why not."""
    classes, n, res = len(work.session.classes), len(work.session.train), work.stage.res
    if not own_data.has_first_result(n, classes):
        return f"{classes:,} classes on {n:,} images would take too long"
    print(
        f"first result at {res} px: fitting a logistic classifier with each of {len(PENALTIES)} penalties", flush=True
    )
    x, labels, _ = features(work, "train")
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / scale
    folds, losses = stratified(labels, FOLDS, work.stage.seed), {}
    for penalty in PENALTIES:
        losses[penalty] = fold_loss(x, labels, folds, classes, penalty)
        watchdog.beat()
    chosen = min(losses, key=losses.__getitem__)
    scores, wanted, samples = features(work, "val")
    layer = fit(x, labels, classes, chosen)
    if (first := work.session.config.pretrain) and first.classifier == "first_result" and res == first.res:
        keep(run, work.session.model, layer, mean, scale)
    found = logits(layer, (scores - mean) / scale)
    rows = torch.zeros(len(work.session.val), 6, dtype=torch.float64)
    rows[:, 1] = -1  # a picture that could not be decoded has no prediction
    rows[samples] = score(found, wanted).double()
    predictions = from_rows(rows, work.session.val)
    predictions.save(results.predictions_file(run, f"floor-{res}"), work.session.val.fingerprint)
    val = predictions.summary()
    floor = Floor(val.top1, val.top5, val.loss, res, chosen, losses[chosen])
    write_json(run.floor, [asdict(one) for one in (*(one for one in read_floors(run) if one.res != res), floor)])
    print(floor.sentence(), flush=True)
    return ""


@torch.no_grad()
def keep(run: RunDir, model: nn.Module, fitted: nn.Linear, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """Write the model's classifier that is `fitted`, of features less `mean` over `scale`; nothing where it is no single
    linear layer."""
    names = classifiers(model)
    layer = model.get_submodule(names[0])
    if len(names) > 1 or not isinstance(layer, nn.Linear) or layer.bias is None:
        return
    weight = fitted.weight / scale
    with whole(run.first_classifier) as part:
        tensors = {f"{names[0]}.weight": weight, f"{names[0]}.bias": fitted.bias - weight @ mean}
        tensor_files.save(part, {name: value.detach().contiguous() for name, value in tensors.items()})


def fold_loss(x: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor, classes: int, penalty: float) -> float:
    """Mean cross-entropy of the samples of each fold under a classifier trained on the others."""
    total = 0.0
    for k in range(FOLDS):
        held = folds == k
        if held.any() and not held.all():
            layer = fit(x[~held], labels[~held], classes, penalty)
            total += float(F.cross_entropy(logits(layer, x[held]), labels[held], reduction="sum"))
    return total / len(labels)


@torch.no_grad()
def features(work: StageSession, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what enters the classifier [n, width], the model's classes [n], samples [n]) of the pictures that could be decoded,
    on the CPU."""
    session = work.session
    index, store = session.splits[split], work.stores[split]
    requests = every_sample(index, session.pictures_of("test", work.stage.res), 256, 0, 1)
    labels, samples = [], []
    with classifier_inputs(work.parts) as found:
        for rows in store.batches(index, requests):
            session.logits(work.parts, work.parts.head, session.inputs(work.parts, rows.images))
            labels.append(rows.labels)
            samples.append(rows.samples)
            watchdog.beat()
    columns = torch.tensor(session.columns[split])
    return torch.cat([values.cpu() for values in found]), columns[torch.cat(labels)], torch.cat(samples)


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
