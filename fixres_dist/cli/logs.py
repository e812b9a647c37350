"""`fixres logs`"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE, UserError, only_prints
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import logs, status
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED, State

EXAMPLES = ("b0-320", "b0-320 --rank 3 --follow", "b0-320 --start 2", "mygrid --all")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("names", nargs="+", metavar="NAME", help="runs, or a grid or table by its name")
    text = "only this rank's; default: all as one stream in the order of time, lines of other ranks than 0 named"
    p.add_argument("--rank", type=int, metavar="K", help=text)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--start", type=int, metavar="N", help="the run's start number N; default: the newest")
    which.add_argument("--all", action="store_true", help="all starts")
    p.add_argument("--follow", action="store_true", help="go on until the runs end; Ctrl-C leaves them alone")
    add_runs_dir(p)


def run(args: argparse.Namespace) -> int:
    runs = status.named(args.names, args.runs_dir)
    return only_prints(lambda: show(runs, args.rank, args.start, args.all, args.follow))


def show(
    runs: Sequence[RunDir], rank: int | None = None, start: int | None = None, every: bool = False, follow: bool = False
) -> int:
    """Print the lines of the runs' logs in the order of time, with what is written meanwhile."""
    shown: dict[Path, int] = {}
    begun: set[RunDir] = set()
    told: dict[RunDir, State] = {}
    printed = False
    while True:
        rows = status.rows(runs, status.SLURM_EVERY_S)
        last_round = not follow or all(row.state not in UNFINISHED for row in rows)
        lines: list[tuple[str, logs.Line]] = []
        for run in runs:
            found = logs.new_lines(run, shown, torn=last_round)
            if found and run not in begun:
                check(run, found, rank, start)
                newest = max(line.start for line in found)
                found = [line for line in found if every or line.start == (start or newest)]
                begun.add(run)
            name = run.name if len(runs) > 1 else ""
            asked = (line for line in found if start in (None, line.start) and of_rank(line, rank))
            lines += [(label(line, name, rank is None, every), line) for line in asked]
        for before, line in sorted(lines, key=lambda pair: pair[1].time):
            print(before + line.text)
            printed = True
        sys.stdout.flush()
        notes = [
            logs.silence(run, row.state, row.reason)
            for run, row in zip(runs, rows, strict=True)
            if told.get(run) != row.state
        ]
        told = {run: row.state for run, row in zip(runs, rows, strict=True)}
        if last_round and not begun:
            raise UserError("\n".join(filter(None, notes)))
        for note in filter(None, notes):
            print(note, file=sys.stderr)
        if last_round and not printed:
            print(f"started, and no line written yet. Next: {runs[0].command('status')}", file=sys.stderr)
        if last_round:
            return EXIT_DONE
        time.sleep(1)


def check(run: RunDir, lines: Sequence[logs.Line], rank: int | None, start: int | None) -> None:
    """Refuse a rank or a start that the run does not have; says where there are earlier starts."""
    ranks, newest = sorted({line.rank for line in lines} - {logs.BATCH}), max(line.start for line in lines)
    if rank is not None and rank not in ranks:
        accepted = f"accepted: {ranks[0]} .. {ranks[-1]}" if ranks else "no rank of it has written a line yet"
        raise UserError(f"{run.name} has no rank {rank}; {accepted}.")
    if start is not None and not 1 <= start <= newest:
        raise UserError(f"{run.name} has no start {start}; accepted: 1 .. {newest}.")
    if start is None and newest > 1:
        print(f"{run.name}: start {newest}; earlier ones: {run.command('logs')} --all", file=sys.stderr)


def of_rank(line: logs.Line, rank: int | None) -> bool:
    """Whether a line is shown; which files submitit has read is shown to who asks for one rank."""
    return line.rank == rank or (rank is None and not logs.ASIDE.match(line.text))


def label(line: logs.Line, name: str, with_rank: bool, with_start: bool) -> str:
    """What stands before a line: its run among several, its start among all, its rank where it is not 0."""
    rank = {0: "", logs.BATCH: "batch script"}.get(line.rank, f"rank {line.rank}") if with_rank else ""
    parts = filter(None, (name, f"start {line.start}" if with_start else "", rank))
    return f"[{text}] " if (text := ", ".join(parts)) else ""
