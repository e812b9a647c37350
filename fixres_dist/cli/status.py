"""`fixres status`"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict

from fixres_dist.base.errors import EXIT_DONE, only_prints
from fixres_dist.base.small_files import as_json
from fixres_dist.base.terminal import CLEAR
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import grid, status
from fixres_dist.runs.states import UNFINISHED

EXAMPLES = ("", "b0-320 --watch", "--json")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("names", nargs="*", metavar="NAME", help="runs, or a grid or table by its name; default: all")
    add_runs_dir(p)
    p.add_argument("--json", action="store_true", help="one JSON list")
    p.add_argument("--watch", action="store_true", help="again every --every seconds, until all have ended or Ctrl-C")
    p.add_argument("--every", type=float, default=10.0, metavar="S", help="for --watch; default: 10")


def run(args: argparse.Namespace) -> int:
    return only_prints(lambda: show(args))


def show(args: argparse.Namespace) -> int:
    while True:
        runs = status.named(args.names, args.runs_dir) or status.every(args.runs_dir)
        rows = status.rows(runs, status.SLURM_EVERY_S if args.watch else 0.0)
        if args.json:
            print(as_json([asdict(row) for row in rows], indent=1), flush=True)
        else:
            if args.watch and sys.stdout.isatty():
                print(CLEAR, end="")
            closing = grid.closing_table(runs, rows) if args.names else ""
            text = "\n\n".join(filter(None, (status.as_table(rows), closing)))
            print(text if rows else f"no runs in {args.runs_dir}", flush=True)
        if not args.watch or not any(row.state in UNFINISHED for row in rows):
            return EXIT_DONE
        time.sleep(max(1.0, args.every))
