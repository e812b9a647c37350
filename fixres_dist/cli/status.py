"""`fixres status`"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fixres_dist.base.errors import EXIT_DONE, only_prints, printable
from fixres_dist.base.small_files import as_json
from fixres_dist.base.terminal import raw
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import grid, status
from fixres_dist.runs.states import UNFINISHED, State

if TYPE_CHECKING:
    from rich.console import Group

EXAMPLES = ("", "b0-320 --watch", "--json")
COLOURS = {State.RUNNING: "green", State.DONE: "blue", State.FAILED: "red"}  # of the other states: yellow
WIDE = 110  # columns of a terminal that has room for all columns


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("names", nargs="*", metavar="NAME", help="runs, or a grid or table by its name; default: all")
    add_runs_dir(p)
    p.add_argument("--json", action="store_true", help="one JSON list")
    p.add_argument("--watch", action="store_true", help="a live table, until all have ended or Ctrl-C")
    p.add_argument("--every", type=float, default=10.0, metavar="S", help="for --watch; default: 10")


def run(args: argparse.Namespace) -> int:
    return only_prints(lambda: watch(args) if args.watch and not args.json and sys.stdout.isatty() else show(args))


def look(args: argparse.Namespace) -> tuple[list[status.Row], str]:
    """The rows, and the closing table of a grid that is named."""
    runs = status.named(args.names, args.runs_dir) or status.every(args.runs_dir)
    rows = status.rows(runs, status.SLURM_EVERY_S if args.watch else 0.0)
    return rows, grid.closing_table(runs, rows) if args.names else ""


def show(args: argparse.Namespace) -> int:
    while True:
        rows, closing = look(args)
        if args.json:
            print(as_json([asdict(row) for row in rows], indent=1), flush=True)
        else:
            text = "\n\n".join(filter(None, (status.as_table(rows), closing)))
            print(text if rows else f"no runs in {args.runs_dir}", flush=True)
        if not args.watch or not any(row.state in UNFINISHED for row in rows):
            return EXIT_DONE
        time.sleep(max(1.0, args.every))


def watch(args: argparse.Namespace) -> int:
    """The table in place, on a terminal."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(file=raw(sys.stdout)), auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            rows, closing = look(args)
            below = closing or ("" if rows else f"no runs in {args.runs_dir}")
            live.update(picture(rows, below, live.console.width), refresh=True)
            if not any(row.state in UNFINISHED for row in rows):
                return EXIT_DONE
            time.sleep(max(1.0, args.every))


def picture(rows: Sequence[status.Row], below: str, width: int) -> Group:
    """A line for each run with a bar of its steps, its reason in words below all, and when this was looked up.

    On a terminal narrower than WIDE columns (`width`), the last columns and the bar give their room to the names.
    """
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table, reasons = Table(box=None, pad_edge=False), Text()
    shown = status.HEAD if width >= WIDE else [name for name in status.HEAD if name not in ("NODES", "LOG")]
    few_nodes = all(len(",".join(row.nodes)) <= 12 for row in rows)
    for name in shown:
        table.add_column(name, overflow="fold", no_wrap=name != "NAME" and (name != "NODES" or few_nodes))
    for row in rows:
        name, state, step, percent, *rest = status.cells(row)
        colour = COLOURS.get(row.state, "yellow")
        bar = ProgressBar(total=row.total_steps or 1, completed=row.step, width=12) if width >= WIDE else Text(percent)
        table.add_row(Text(name), Text(state, colour), Text(step), bar, *map(Text, rest[: len(shown) - 4]))
        if row.reason:
            reasons.append(f"{name}: ", colour).append(printable(row.reason) + "\n")
    return Group(table, reasons, Text(below), Text(time.strftime("%F %T"), "dim"))
