"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_runs_dir(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs; default: runs"
    )


def add_overrides(p: argparse.ArgumentParser, example: str) -> None:
    """Settings after, before and between the options; the empty default tells the parser so (see main)."""
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help=f"any setting, such as {example}"
    )


def add_source(p: argparse.ArgumentParser, required: str = "", models: bool = True) -> None:
    """The weights and the data set that a command works on: of a run, or with `models` also of a weights file.

    `required`: what else the command's usage has to name.
    """
    either = "(--run DIR | --model M --checkpoint FILE --data DIR)" if models else "--run DIR"
    p.usage = " ".join(filter(None, [p.prog, either, required, "[options] [section.key=value ...]"]))
    source = p.add_argument_group("model and data")
    source.add_argument("--run", type=Path, required=not models, metavar="DIR", help="a run directory")
    if models:
        source.add_argument("--model", metavar="M", help="with --checkpoint: a recipe or a timm model name")
        source.add_argument("--checkpoint", metavar="FILE", help="weights of the whole model, or ns, ap, pretrained")
    else:
        p.set_defaults(model=None, checkpoint=None)
    source.add_argument("--data", metavar="DIR", help="data set; default: the run's")
    add_overrides(p, "data.resize_rule=timm")


def add_eval_sets(p: argparse.ArgumentParser) -> None:
    text = "also on this folder of class folders; repeatable"
    p.add_argument("--eval-set", action="append", default=[], metavar="NAME=DIR", help=text)


def add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
