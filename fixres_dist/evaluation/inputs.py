"""The weights and the data set that a command evaluates: those of a run, or a weights file. No torch at import."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fixres_dist.base.environment import cache_folder, scratch_folder, writable
from fixres_dist.base.errors import UserError
from fixres_dist.cluster import gpus
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config, Model
from fixres_dist.models import sizes
from fixres_dist.runs.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from fixres_dist.models.parts import Parts
    from fixres_dist.training.ranks import Ranks
    from fixres_dist.training.session import Session


def model_config(args: argparse.Namespace, res: int | None = None) -> Config:
    """The configuration to evaluate a model under: that of --run, or one for --model with --checkpoint as its weights.

    `res`: the test resolution in pixels, where it is not the configuration's.
    """
    if args.run and (args.model or args.checkpoint):
        raise UserError("--run and --model/--checkpoint exclude each other. Next: give one of the two.")
    if args.run:
        values = asdict(RunDir(args.run).config())
    elif args.model and args.checkpoint:
        values = dict(recipes.find(args.model, args.checkpoint).values)
        if res is None and "res" not in values["data"]:
            own = sizes.of_weights(reading.parse(Model, values["model"]))
            res = own.test or own.train
    else:
        raise UserError("nothing to evaluate was given. Accepted: --run DIR, or --model M --checkpoint FILE.")
    return with_data(args, values, {} if res is None else {"res": res})


def data_config(args: argparse.Namespace) -> Config:
    """The configuration of a data set alone, for --softmax, which needs no model."""
    if args.model or args.checkpoint or args.res or args.eval_set or args.only:
        raise UserError(
            "--softmax is scored on one split. Next: leave out --model, --checkpoint, --res, --eval-set, --only."
        )
    return with_data(args, asdict(RunDir(args.run).config()) if args.run else {}, {})


def with_data(args: argparse.Namespace, values: Mapping[str, Any], data: dict[str, Any]) -> Config:
    flags = {"data": data | ({"root": args.data} if args.data else {})}
    values = reading.merge(with_cluster(args, values), flags)
    config = reading.parse(Config, reading.merge(values, reading.overrides(args.overrides)))
    if not config.data.root:
        raise UserError("no data set given. Next: --data DIR, with train/ and val/, or --run DIR.")
    return config


def with_cluster(args: argparse.Namespace, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the settings of the command's job: those of the run or recipe < --profile < flags; one node by default.

    In processes of this machine, which is another than the run's or the profile's, a rank for each of its GPUs by default.
    """
    ranks = args.gpus_per_node
    if ranks is None and args.cluster == "local" and not args.job:
        ranks = gpus.ranks_here()
    asked = {"nodes": args.nodes or "1", "gpus_per_node": ranks}
    flags = {"cluster": {key: value for key, value in asked.items() if value is not None}}
    return reading.merge(reading.merge(values, reading.read_profile(args.profile) if args.profile else {}), flags)


def check(
    config: Config, run: Path | None, split: str = "val", sets: Mapping[str, Path] | None = None, sizes: Sequence[int] = ()
) -> None:  # fmt: skip
    """Refuse what `opened` would refuse, without opening an image; a model that no run has trained is built on the meta
    device, for which this imports torch. `sizes`: resolutions that the model must take. Raises UserError."""
    from fixres_dist.data import class_maps, dataset

    root = dataset.folder(config.data.root, config.data.cache)
    places = {split: root / config.data.split_name(split), **(sets or {})}
    found = {name: dataset.survey(place.parent, place.name, config.data) for name, place in places.items()}
    names = class_maps.trained_classes(config, run, split)
    for name, survey in found.items():
        class_maps.class_map(survey.classes, names, places[name], class_maps.aliases(config, split))
    if run and not sizes:
        return
    weights = config.model.weights
    if weights not in recipes.WEIGHTS and not Path(weights).is_file() and not run:
        raise recipes.no_weights(weights)
    import torch

    from fixres_dist.models.resizing import check_resolutions
    from fixres_dist.models.weights import open_model

    with torch.device("meta"):
        model = open_model(config, names, with_weights=not run)
    check_resolutions(model, sizes)


@dataclass(frozen=True)
class Job:
    """The job in which a command is carried out: its directory, and its ranks, which have met."""

    run: RunDir
    ranks: Ranks


@dataclass(frozen=True)
class Subject:
    """One set of weights to evaluate."""

    label: str  # one of OWN_LABELS, or what the user calls it
    weights: Path | None  # None: those that the configuration names


OWN_LABELS = ("before", "after", "checkpoint")  # of what `subjects` gives


def subjects(run: Path | None) -> list[Subject]:
    """Before and after fixing for a run; without one, the weights that --checkpoint put into the configuration."""
    if not run:
        return [Subject("checkpoint", None)]
    return [Subject("before", weights_before(RunDir(run))), Subject("after", weights_after(RunDir(run)))]


def weights_before(run: RunDir) -> Path | None:
    """The whole model after stage one; without stage one None: the starting weights, which the configuration names."""
    return run.pretrained if run.pretrained.exists() else None


def weights_after(run: RunDir) -> Path:
    """The whole fixed model; raises UserError for a run that has not finished."""
    return run.finished(run.root / "export" / "model.safetensors")


@contextlib.contextmanager
def opened(
    config: Config,
    subjects: Sequence[Subject],
    run: Path | None,
    split: str = "val",
    sets: Mapping[str, Path] | None = None,
    job: Job | None = None,
    by: str = "",
) -> Iterator[Session]:
    """A session with `split` and the named `sets`. Its ranks are those of the `job`, or meet here and leave at its end.

    The configuration's weights are loaded only if a subject has no file of its own. A run is evaluated as it was trained,
    with its class order and its choices.json; its results.json counts the passes of the command `by` (runs/looks.py).
    """
    from fixres_dist.data import class_maps
    from fixres_dist.models.precision import determinism
    from fixres_dist.training.ranks import abort, join, of_command
    from fixres_dist.training.session import open_session

    needed = any(subject.weights is None for subject in subjects)
    kept = run / "choices.json" if run else job.run.root / "choices.json" if job else None
    counted = (RunDir(run), by) if run and by else None
    open_with = partial(open_session, config, load_weights=needed, splits=(split,), sets=sets, kept=kept)
    if job:
        session = open_with(job.ranks, trained=class_maps.trained_classes(config, run, split), job=job.run)
        yield replace(session, counted=counted)
        return
    rendezvous = run or (cache_folder() if writable(cache_folder()) else scratch_folder())
    rendezvous.mkdir(parents=True, exist_ok=True)
    try:
        with determinism(config.run):
            ranks = join(rendezvous, launcher=of_command())
            session = open_with(ranks, trained=class_maps.trained_classes(config, run, split))
            yield replace(session, counted=counted)
    except BaseException:
        abort()
        raise
    ranks.stop()


def parts_with(session: Session, weights: Path | dict[str, torch.Tensor] | None) -> Parts:
    """A copy of the session's model, cut into trunk and head and prepared for evaluation in the run's own arithmetic.

    `weights`: a file or a state dict of the whole model; None keeps the session's.
    """
    from fixres_dist.models.parts import parts_of
    from fixres_dist.models.weights import fill, fitted, read_state

    model = copy.deepcopy(session.for_size(session.config.data.res).model)
    if isinstance(weights, Path):
        fill(model, fitted(model, read_state(weights)), str(weights))
    elif weights is not None:
        fill(model, weights, "the interpolation")
    parts = session.with_fast_trunk(parts_of(model, session.config.tune.policy))
    if parts.folded and session.ranks.is_main:
        print(parts.folded, flush=True)
    return parts
