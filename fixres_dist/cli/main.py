"""`python -m fixres_dist COMMAND`, also installed as `fixres`. Parsing and printing only; torch is imported by commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fixres_dist.base.errors import EXIT_FAILED, exit_code
from fixres_dist.cli import bench, data, evaluate, export, sweep


def train(args: argparse.Namespace) -> int:
    from fixres_dist.training import worker

    return worker.train(args.run)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fixres", description="Work on runs and data sets; runs are submitted by launch/submit.py."
    )
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    t = sub.add_parser("train", help="the worker: go on with a run directory (alone, under torchrun, or in a job)")
    t.add_argument("--run", type=Path, required=True, help="the run directory")
    t.set_defaults(func=train)
    for module in (evaluate, sweep, data, export, bench):
        module.add_parsers(sub)
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return exit_code(lambda: int(args.func(args)))
    except KeyboardInterrupt:
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
