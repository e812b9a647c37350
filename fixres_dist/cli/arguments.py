"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from fixres_dist.base.environment import slurm_file
from fixres_dist.config.schema import Config

SETTING = re.compile(rf"pretrain=none$|({'|'.join(get_type_hints(Config))})\.\w+=")


def add_runs_dir(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs; default: runs"
    )


def add_profile(p: argparse._ActionsContainer) -> None:
    text = f"YAML with the site's cluster settings, such as {slurm_file('profiles/generic.yaml')}"
    p.add_argument("--profile", type=Path, metavar="FILE", help=text)


def add_job(p: argparse.ArgumentParser) -> None:
    """Where the command does its work: in this process, as a job of Slurm, or in processes of this machine (cli/as_job.py)."""
    where = p.add_argument_group("where; by default in this process")
    text = "slurm: as a job; local: in a process for each GPU of this machine"
    where.add_argument("--cluster", choices=("slurm", "local", "inline"), default="inline", help=text)
    add_profile(where)
    where.add_argument("--nodes", metavar="N", help="of the job; default: 1")
    text = "ranks per node; default: the profile's, or the run's; with local: this machine's GPUs, or one process"
    where.add_argument("--gpus-per-node", metavar="G", help=text)
    where.add_argument("--dry-run", action="store_true", help="check, print the job's sbatch text; write nothing")
    add_show(where)
    p.set_defaults(job=None)  # in a job: evaluation/inputs.py's Job


def add_show(p: argparse._ActionsContainer) -> None:
    text = "with --dry-run: also what sbatch would get; shown anyway for a job of Slurm"
    p.add_argument("--show", choices=("sbatch",), help=text)


def add_accept_change(p: argparse._ActionsContainer) -> None:
    text = "go on though pictures or timm are not those of the start before"
    p.add_argument("--accept-change", action="store_true", help=text)


def add_overrides(p: argparse.ArgumentParser, example: str) -> None:
    """Settings after, before and between the options; the empty default tells the parser so (see main)."""
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help=f"any setting, such as {example}"
    )


def settings_and_names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the words after the options: settings (`section.key=value`, `pretrain=none`), and names of runs."""
    settings = [word for word in words if SETTING.match(word)]
    return settings, [word for word in words if word not in settings]


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
