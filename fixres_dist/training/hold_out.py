"""Pictures held out of stage one (tune.hold_out): the fixing stage's settings are chosen on them, or its head learns from them.

To choose, a first stage one trains on the rest, in a run directory of its own inside the run's. Heads then learn from that
rest, as the final one learns from all of train, and the held-out pictures judge them: all of it on kept features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from fixres_dist.base import watchdog
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.base.small_files import write_json
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import Tune
from fixres_dist.data import order
from fixres_dist.data.index import Index
from fixres_dist.models import batchnorm, weights
from fixres_dist.models.build import classifiers
from fixres_dist.models.parts import parts_of
from fixres_dist.models.policies import select
from fixres_dist.models.precision import sgd
from fixres_dist.runs import checkpoint, preparation
from fixres_dist.runs.choice import Candidate, Choice
from fixres_dist.runs.restoring import put_tensors
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import damage, stage_one
from fixres_dist.training.cache.build import open_stores
from fixres_dist.training.floor import FOLDS, features, logits, measure_floors, percent, stratified
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, held_out_count, repeats_of_held_out, some_held_out, stages
from fixres_dist.training.throughput import StartUp

RATES = (0.1, 1.0, 3.0)  # of a candidate, times tune.base_lr
ALPHAS = (0.5, 1.0)
SHARPNESS = torch.logspace(-1.5, 1.5, 31, base=2)  # what logits are multiplied with: 1 / temperature


def parted(index: Index, tune: Tune, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(samples that stay, samples that are held out), each in the index's order: every class evenly, drawn from `seed`, but
    never the last picture of a class. Raises UserError where that leaves too few."""
    n = len(index)
    drawn = order.positions_to_samples(n, seed, 0, np.arange(n))
    by_class = drawn[np.argsort(index.labels[drawn], kind="stable")]
    labels = index.labels[by_class]
    free = by_class[1:][labels[1:] == labels[:-1]]
    count = some_held_out(tune, n, n - len(free))
    held = np.sort(free[(2 * np.arange(count) + 1) * len(free) // (2 * count)])
    return np.setdiff1d(np.arange(n), held), held


def session_of(session: Session, name: str) -> Session:
    """`session` with the pictures that its stage of this name trains on, where some stay out of stage one."""
    tune = session.config.tune
    if not tune.hold_out or tune.chooses:
        return session
    samples, held = parted(session.train, tune, session.config.run.seed)
    if name == "fix":
        samples = np.concatenate([samples, np.tile(held, repeats_of_held_out(tune, len(session.train)))])
    return replace(session, splits={**session.splits, "train": session.train.taken(samples)})


def choose(run: RunDir, session: Session, startup: StartUp) -> Session:
    """The session with the settings that its held-out share chooses, which chosen.json keeps; its model is as before.

    On every rank. Raises Stopped, once all is saved, and UserError for a network or data set that nothing can be chosen for.
    """
    ranks, model, inner = session.ranks, session.model, RunDir(run.held_out)
    config = replace(session.config, tune=replace(session.config.tune, hold_out_use="train"))
    one_linear_layer(model)
    first = replace(session, config=config)
    todo = stages(config, len(session.train))
    if ranks.is_main:
        open_inner(run, inner, config)
    ranks.barrier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rest = session_of(first, "pretrain")
    if config.pretrain and not ranks.from_main(inner.pretrained.exists):
        measure_floors(inner, rest, [config.pretrain.res])
    with checkpoint.Writer(inner.checkpoints, lambda **saved: inner.event("saved", **saved)) as writer:
        stage_one.train(inner, rest, todo, writer, startup)
    weights.fill(model, weights.read_state(inner.pretrained), str(inner.pretrained))
    tried = [one for res in sizes(session.config) for one in candidates(run, first.for_size(res), res, todo[-1])]
    put_tensors(model, before)
    # On every rank from the same candidates: a file that rank 0 has just written may not be there yet for another node.
    found = Choice(held_out_count(config.tune, len(session.train)), min(tried, key=lambda one: one.loss), tuple(tried))
    if ranks.is_main:
        write_json(run.chosen, asdict(found), sealed=True)
        run.event("chosen", settings=str(found.chosen), tried=len(tried))
        print(f"{found.table()}\n{found.sentence()}", flush=True)
    ranks.barrier()
    return replace(session, config=found.applied(session.config))


def open_inner(run: RunDir, inner: RunDir, config: Config) -> None:
    inner.root.mkdir(exist_ok=True)
    preparation.write_config(inner, config)
    write_text(inner.root / "command.txt", run.typed + "\n")  # the command that goes on with it
    damage.put_aside_damaged(inner)
    held = config.tune.hold_out
    print(
        f"a first stage one without {100 * held:g} % of train, on which settings are chosen: {inner.root}", flush=True
    )


def sizes(config: Config) -> tuple[int, ...]:
    return config.tune.hold_out_sizes or (config.data.res,)


def one_linear_layer(model: nn.Module) -> nn.Linear:
    """The network's classifier. Raises UserError where it is something else."""
    names = classifiers(model)
    layer = model.get_submodule(names[0])
    if len(names) > 1 or not isinstance(layer, nn.Linear):
        raise UserError(
            f"tune.hold_out_use=choose tries one linear classifier, and {type(model).__name__} has {len(names)} "
            f"({type(layer).__name__}). Next: tune.hold_out_use=train, or tune.hold_out=0"
        )
    return layer


def candidates(run: RunDir, session: Session, res: int, fix: Stage) -> list[Candidate]:
    """What each head and each kind of statistics gives at `res` px on the held-out pictures; rank 0 trains the heads."""
    samples, held = parted(session.train, session.config.tune, session.config.run.seed)
    index, columns = session.train, session.columns["train"]
    session = replace(
        session,
        splits={"train": index.taken(samples), "val": index.taken(held)},
        columns={"train": columns, "val": columns},
        config=replace(session.config, run=replace(session.config.run, engine="auto", compile=False)),
    )
    try:
        select(session.model, policy := "classifier+bn_stats")
    except UserError:
        policy = "classifier"  # the last norm has no statistics
    stage = Stage("choice", replace(fix.tune, policy=policy), res, "test", 0, len(samples), fix.seed)  # type: ignore[arg-type]
    work = StageSession(session, stage, session.with_fast_trunk(parts_of(session.model, policy), res))
    work = open_stores(work, resumed=False, tell=run.event, decide_anew=True)
    if not work.stores:
        raise UserError(
            f"no room for the features at {res} px on which settings are to be chosen. Accepted: run.feature_cache=DIR with more "
            "room, or tune.hold_out=0"
        )
    found = session.ranks.from_main(lambda: [asdict(one) for one in of_features(work)])
    return [Candidate(**one) for one in found]


def of_features(work: StageSession) -> Iterator[Candidate]:
    """Rank 0: the candidates at the stage's size; nothing is trained in the first of each kind of statistics."""
    old, stage = copy.deepcopy(one_linear_layer(work.session.model)).cpu(), work.stage
    for kind in statistics(work):
        (x, labels, _), (held, wanted, _) = features(work, "train"), features(work, "val")
        folds, start = stratified(wanted, FOLDS, stage.seed), logits(old, held)
        settings = [(stage.tune.base_lr, 0.0, start)]
        for factor in RATES:
            tune = replace(stage.tune, base_lr=float(f"{factor * stage.tune.base_lr:.3g}"))
            end = logits(trained(old, x, labels, replace(stage, tune=tune)), held)
            settings += [(tune.base_lr, alpha, torch.lerp(start, end, alpha)) for alpha in ALPHAS]
            watchdog.beat()
        found = [
            Candidate(stage.res, kind, rate, alpha, held_out_loss(z, wanted, folds), percent(z, wanted, 1))
            for rate, alpha, z in settings
        ]
        best = min(found, key=lambda one: one.loss)
        print(f"held out: best of {len(found)}: {best}: log-likelihood {-best.loss:.3f}", flush=True)
        yield from found


def statistics(work: StageSession) -> Iterator[str]:
    """The kinds of the last BatchNorm's statistics, each as the model has them while it is handed out: kept, measured on
    the pictures that a head learns from, and half-way."""
    yield "kept"
    bns = [work.session.model.get_submodule(name) for name in work.parts.tuned.last_bns]
    if not bns:
        return
    moments = {bn: batchnorm.Moments(int(bn.num_features), work.session.ranks.device) for bn in bns}  # type: ignore[arg-type]
    hooks = [bn.register_forward_pre_hook(lambda bn, inputs: moments[bn].add(inputs[0])) for bn in bns]
    features(work, "train")
    for hook in hooks:
        hook.remove()
    kept = [(bn.running_mean.clone(), bn.running_var.clone()) for bn in bns]  # type: ignore[operator]
    for kind, share in (("exact", 0.0), ("mean", 0.5)):
        for bn, (mean, variance) in zip(bns, kept, strict=True):
            moments[bn].set(bn)
            bn.running_mean.lerp_(mean, share)  # type: ignore[operator]
            bn.running_var.lerp_(variance, share)  # type: ignore[operator]
        yield kind
    for bn, (mean, variance) in zip(bns, kept, strict=True):
        bn.running_mean.copy_(mean)  # type: ignore[operator]
        bn.running_var.copy_(variance)  # type: ignore[operator]


def trained(old: nn.Linear, x: torch.Tensor, labels: torch.Tensor, stage: Stage) -> nn.Linear:
    """A copy of the classifier `old` after the stage's steps on its inputs x [n, width], as loop.py takes them."""
    layer, tune = copy.deepcopy(old).requires_grad_(True), stage.tune
    optimizer = sgd("torch", [*layer.parameters()], tune.momentum, tune.weight_decay)
    stage = replace(stage, n=len(x))
    for step in range(stage.stop):
        samples, _ = order.train_draws(stage.n, stage.seed, step, tune.global_batch, 0, 1, tune.repeats)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(step)
        optimizer.zero_grad()
        rows = torch.from_numpy(samples)
        loss = F.cross_entropy(layer(x[rows]), labels[rows], label_smoothing=tune.label_smoothing)
        torch.autograd.backward(loss)
        optimizer.step()
    return layer


def held_out_loss(z: torch.Tensor, labels: torch.Tensor, folds: torch.Tensor) -> float:
    """Mean cross-entropy of logits z [n, classes], each fold's under the temperature that is best on the others: how sure a
    head is of itself, which decides no prediction, is not to choose."""
    losses = torch.stack([F.cross_entropy(z * sharp, labels, reduction="none") for sharp in SHARPNESS])
    total = 0.0
    for fold in range(FOLDS):
        inside = folds == fold
        others = losses[:, ~inside] if not inside.all() else losses
        total += float(losses[others.mean(1).argmin(), inside].sum())
    return total / len(labels)
