"""Which weights on which data a command works on: a run's before and after, or a checkpoint of any model."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir


def add_source(p: argparse.ArgumentParser, models: bool = True) -> None:
    p.add_argument("--run", type=Path, required=not models, help="a run directory")
    if models:
        p.add_argument("--model", help="with --checkpoint: a recipe or a timm model name")
        p.add_argument("--checkpoint", help="weights file of the whole model, or ns, ap, pretrained")
    else:
        p.set_defaults(model=None, checkpoint=None)
    p.add_argument("--data", help="data set; default: the run's")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as data.resize_rule=timm")


def source(args: argparse.Namespace, res: int | None) -> Config:
    """The configuration to evaluate under: a run's, or a model's with --checkpoint as its weights."""
    if args.run and (args.model or args.checkpoint):
        raise UserError("--run and --model/--checkpoint exclude each other. Next: give one of the two.")
    if args.run:
        values = asdict(RunDir(args.run).config())
    elif args.model and args.checkpoint:
        values = dict(recipes.find(args.model, args.checkpoint).values)
    else:
        raise UserError("what shall be evaluated? Accepted: --run DIR, or --model M --checkpoint FILE.")
    flags: dict[str, dict[str, Any]] = {"data": {}}
    if args.data:
        flags["data"]["root"] = args.data
    if res is not None:
        flags["data"]["res"] = res
    config = reading.parse(Config, reading.merge(reading.merge(values, flags), reading.overrides(args.overrides)))
    if not config.data.root:
        raise UserError("no data set given. Next: --data DIR, with train/ and val/.")
    return config


def data_source(args: argparse.Namespace) -> Config:
    """The configuration of a data set alone, for what needs no model: a run's, or --data."""
    if args.model or args.checkpoint or args.res or args.eval_set or args.only:
        raise UserError(
            "--softmax is scored on one split. Next: leave out --model, --checkpoint, --res, --eval-set, --only."
        )
    values = asdict(RunDir(args.run).config()) if args.run else {}
    flags = {"data": {"root": args.data}} if args.data else {}
    config = reading.parse(Config, reading.merge(reading.merge(values, flags), reading.overrides(args.overrides)))
    if not config.data.root:
        raise UserError(
            "no data set given, whose labels a softmax could be compared with. Next: --data DIR, or --run DIR."
        )
    return config


@dataclass(frozen=True)
class Subject:
    """One set of weights to evaluate."""

    label: str
    weights: Path | None  # None: as the configuration says


def subjects(args: argparse.Namespace, config: Config) -> list[Subject]:
    """Before and after for a run, the file for a checkpoint."""
    if not args.run:
        return [Subject("checkpoint", None)]
    return [Subject("before", weights_before(RunDir(args.run))), Subject("after", weights_after(RunDir(args.run)))]


def weights_before(run: RunDir) -> Path | None:
    """The whole model after stage one; without stage one the starting weights, which the configuration names."""
    return run.pretrained if run.pretrained.exists() else None


def weights_after(run: RunDir) -> Path:
    return run.finished(run.root / "export" / "model.safetensors")


@contextlib.contextmanager
def opened(
    config: Config,
    found: list[Subject],
    run: Path | None,
    split: str = "val",
    sets: Mapping[str, Path] | None = None,
) -> Iterator[Any]:
    """A session with `split` and `sets`; its own weights are loaded only if a subject has none of its own."""
    from fixres_dist.data import class_maps
    from fixres_dist.training.ranks import join
    from fixres_dist.training.session import open_session

    ranks = join(run or meeting_place())
    try:
        needed = any(subject.weights is None for subject in found)
        trained = class_maps.trained_classes(config, run, split)
        kept = run / "choices.json" if run else None  # the run's own arithmetic
        yield open_session(config, ranks, load_weights=needed, splits=(split,), sets=sets, trained=trained, kept=kept)
    finally:
        ranks.stop()


def split_with(live: Any, weights: Path | dict[str, Any] | None) -> Any:
    """A copy of the session's model with `weights` (a file, a state dict, or as opened), cut for evaluation in the run's
    own arithmetic."""
    from fixres_dist.models.parts import parts_of
    from fixres_dist.models.weights import fill, read_state

    model = copy.deepcopy(live.model)
    if weights is not None:
        state = weights if isinstance(weights, dict) else read_state(weights)
        fill(model, state, "the interpolation" if state is weights else str(weights))
    return live.with_fast_trunk(parts_of(model, live.config.tune.policy))


def meeting_place() -> Path:
    from fixres_dist.base.environment import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
