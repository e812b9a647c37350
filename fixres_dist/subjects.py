"""Which weights on which data a command works on: a run's before and after, or a checkpoint of any model."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixres_dist import config as cfg
from fixres_dist import recipes
from fixres_dist.errors import UserError
from fixres_dist.rundir import RunDir


def add_source(p: argparse.ArgumentParser, models: bool = True) -> None:
    p.add_argument("--run", type=Path, required=not models, help="a run directory")
    if models:
        p.add_argument("--model", help="with --checkpoint: a recipe or a timm model name")
        p.add_argument("--checkpoint", help="weights file of the whole model, or ns, ap, pretrained")
    else:
        p.set_defaults(model=None, checkpoint=None)
    p.add_argument("--data", help="data set; default: the run's")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as data.resize_rule=timm")


def source(args: argparse.Namespace, res: int | None) -> cfg.Config:
    """The configuration to evaluate under: a run's, or a model's with --checkpoint as its weights."""
    if args.run and (args.model or args.checkpoint):
        raise UserError("--run and --model/--checkpoint exclude each other. Next: give one of the two.")
    if args.run:
        values = cfg.plain(RunDir(args.run).config())
    elif args.model and args.checkpoint:
        values = dict(recipes.find(args.model, args.checkpoint).values)
    else:
        raise UserError("what shall be evaluated? Accepted: --run DIR, or --model M --checkpoint FILE.")
    flags: dict[str, dict[str, Any]] = {"data": {}}
    if args.data:
        flags["data"]["root"] = args.data
    if res is not None:
        flags["data"]["res"] = res
    config = cfg.parse(cfg.Config, cfg.merge(cfg.merge(values, flags), cfg.overrides(args.overrides)))
    if not config.data.root:
        raise UserError("no data set given. Next: --data DIR, with train/ and val/.")
    return config


def data_source(args: argparse.Namespace) -> cfg.Config:
    """The configuration of a data set alone, for what needs no model: a run's, or --data."""
    if args.model or args.checkpoint or args.res or args.eval_set or args.only:
        raise UserError(
            "--softmax is scored on one split. Next: leave out --model, --checkpoint, --res, --eval-set, --only."
        )
    values = cfg.plain(RunDir(args.run).config()) if args.run else {}
    flags = {"data": {"root": args.data}} if args.data else {}
    config = cfg.parse(cfg.Config, cfg.merge(cfg.merge(values, flags), cfg.overrides(args.overrides)))
    if not config.data.root:
        raise UserError(
            "no data set given, whose labels a softmax could be compared with. Next: --data DIR, or --run DIR."
        )
    return config


def parse_sizes(text: str) -> list[int]:
    """Test resolutions as given to --res."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--res is {text!r}; accepted: whole numbers of pixels, such as 224 or 224,256,288.") from None
    if min(sizes) < 32:
        raise UserError(f"--res {min(sizes)} is below 32 px, the models' stride; accepted: 32 or more.")
    return sizes


def parse_size(text: str | None) -> int | None:
    """The one test resolution of a command that takes one; None: the run's."""
    sizes = parse_sizes(text) if text else [None]
    if len(sizes) > 1:
        raise UserError(
            f"--res is {text!r}; accepted: one resolution here. Next: python -m fixres_dist sweep for several."
        )
    return sizes[0]


@dataclass(frozen=True)
class Subject:
    """One set of weights to evaluate."""

    label: str
    weights: Path | None  # None: as the configuration says


def subjects(args: argparse.Namespace, config: cfg.Config) -> list[Subject]:
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
    config: cfg.Config,
    found: list[Subject],
    run: Path | None,
    split: str = "val",
    sets: Mapping[str, Path] | None = None,
) -> Iterator[Any]:
    """A session with `split` and `sets`; its own weights are loaded only if a subject has none of its own."""
    from fixres_dist import distributed, evalsets, session

    ranks = distributed.start(run or meeting_place())
    try:
        needed = any(subject.weights is None for subject in found)
        trained = evalsets.trained_classes(config, run, split)
        kept = run / "choices.json" if run else None  # the run's own arithmetic
        yield session.open_session(
            config, ranks, load_weights=needed, splits=(split,), sets=sets, trained=trained, kept=kept
        )
    finally:
        distributed.stop(ranks)


def split_with(live: Any, weights: Path | dict[str, Any] | None) -> Any:
    """A copy of the session's model with `weights` (a file, a state dict, or as opened), cut for evaluation in the run's
    own arithmetic."""
    from fixres_dist import models, tuning

    model = copy.deepcopy(live.model)
    if weights is not None:
        state = weights if isinstance(weights, dict) else models.read_state(weights)
        models.fill(model, state, "the interpolation" if state is weights else str(weights))
    return live.with_fast_trunk(tuning.split(model, live.config.tune.policy))


def meeting_place() -> Path:
    from fixres_dist.data.index import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
