"""`fixres COMMAND`, which is also `python -m fixres_dist COMMAND`: each command is a file of this folder.

A file has add_arguments(parser), run(arguments) -> exit code, and EXAMPLES. Only the file of the called command is
imported; if it needs torch, its function run imports it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from fixres_dist.base.collector import collect_seldom
from fixres_dist.base.commands import FORM, command
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, exit_code, unknown
from fixres_dist.base.terminal import escaping

GROUPS = {
    "Train": {
        "submit": "start a run, or go on with it: on Slurm, on this machine, or --dry-run for its plan",
        "resume": "a new job for a run that failed or was cancelled",
        "cancel": "stop a run; it saves first",
        "train": "the worker, which jobs start: train what is left of a run",
    },
    "Look": {
        "status": "state, progress, accuracy and remaining time of each run",
        "logs": "what a run's ranks and its batch script have printed, in the order of time",
        "board": "TensorBoard of runs",
    },
    "Evaluate": {
        "evaluate": "accuracy of a run before and after fixing, or of a weights file",
        "sweep": "accuracy against test resolution: table, JSON and PNG",
        "study": "models at several resolutions, and which is best at each cost: report and plots",
        "interpolate": "accuracy between a run's starting weights and its fixed ones: table, JSON and PNG",
        "compare": "the gain between two runs or two files of predictions, paired image by image",
        "extract": "softmax and embeddings of every image, in the data set's order, to .npy",
    },
    "Use and publish": {
        "predict": "the classes of pictures without labels, by a run or an export: table, CSV or JSON",
        "report": "runs beside the published numbers: table and plots",
        "export": "a run's whole model for timm, ONNX Runtime or the hub, with its model card",
    },
    "Prepare": {
        "data": "index, verify, shard or show a data set; write the built-in example",
        "fetch": "put pretrained weights where nodes without network find them",
        "completion": "completion of commands, options, runs and models in bash or zsh",
    },
    "Measure": {"bench": "speed and memory of decoding, trunk, step and whole runs"},
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


def overview() -> str:
    lines = [f"usage: {command('COMMAND')} [options]; COMMAND --help shows its options and examples"]
    for title, group in GROUPS.items():
        lines += [title, *(f"  {name:<13}{text}" for name, text in group.items())]
    return "\n".join(lines)


def add_command(p: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """Give the parser `p` the description, arguments, examples and run function of the command `name`."""
    module: Any = importlib.import_module(f"fixres_dist.cli.{name}")
    p.description = COMMANDS[name][0].upper() + COMMANDS[name][1:] + "."
    p.set_defaults(func=module.run)
    module.add_arguments(p)
    ends_in_examples(p, name, module.EXAMPLES)
    for action in p._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part, sub in action.choices.items():
                ends_in_examples(sub, name, [words for words in module.EXAMPLES if words.split()[0] == part])
    return p


def ends_in_examples(p: argparse.ArgumentParser, name: str, examples: Sequence[str]) -> None:
    p.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30)
    p.epilog = "\n".join(["examples:", *(f"  {command(name)} {words}".rstrip() for words in examples)])


def main(argv: Sequence[str] | None = None, form: str = "fixres") -> int:
    """Run a command, by default that of this process; returns its exit code. `form`: how messages name commands."""
    collect_seldom()
    name, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if name == "train":  # runs in jobs: the environment holds the form of the user who submitted the run
        os.environ.setdefault(FORM, form)
    else:
        os.environ[FORM] = form
    try:
        with escaping():
            return exit_code(lambda: call(name, words))
    except KeyboardInterrupt:
        return EXIT_FAILED


def call(name: str, words: Sequence[str]) -> int:
    if name in ("", "-h", "--help"):
        print(overview(), file=sys.stdout if name else sys.stderr)
        return EXIT_DONE if name else EXIT_USER
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    args = parsed(name, words)
    return int(args.func(args))


def parsed(name: str, words: Sequence[str]) -> argparse.Namespace:
    args = parse(add_command(argparse.ArgumentParser(prog=command(name)), name), words)
    args.command, args.words = name, list(words)
    return args


def parse(p: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Settings (section.key=value) may stand between the options; argparse refuses that where there are subcommands."""
    intermixed = p.get_default("overrides") is not None
    return p.parse_intermixed_args(words) if intermixed else p.parse_args(words)
