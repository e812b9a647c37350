"""`fixres logs`"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE, UserError, only_prints
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import status
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED

EXAMPLES = ("b0-320", "b0-320 --rank 3 --follow")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME")
    p.add_argument("--rank", type=int, default=0, metavar="K", help="default: 0")
    p.add_argument("--follow", action="store_true", help="go on until the run ends; Ctrl-C leaves the run alone")
    add_runs_dir(p)


def run(args: argparse.Namespace) -> int:
    return only_prints(lambda: show(status.find(args.name, args.runs_dir), args.rank, args.follow))


def show(run: RunDir, rank: int, follow: bool) -> int:
    """Print both streams of a rank, with what is written meanwhile; a requeued job appends to the same logs."""
    shown: dict[Path, int] = {}
    told_waiting = False
    while True:
        ended = status.rows([run], status.SLURM_EVERY_S)[0].state not in UNFINISHED
        logs = status.logs(run)
        ranks = sorted({number for number, _ in logs})
        if logs and rank not in ranks:
            raise UserError(f"{run.name} has no rank {rank}; accepted: {ranks[0]} .. {ranks[-1]}.")
        if not logs and (ended or not follow):
            raise UserError(f"{run.name} has no log yet. Next: {run.command('status')}")
        if not logs and not told_waiting:
            print(f"{run.name} has not started yet: waiting", file=sys.stderr)
            told_waiting = True
        for stream, out in (("err", sys.stderr), ("out", sys.stdout)):
            if file := logs.get((rank, stream)):
                with open(file, errors="replace") as text:
                    text.seek(shown.get(file, 0))
                    out.write(text.read())
                    out.flush()
                    shown[file] = text.tell()
        if ended or not follow:
            return EXIT_DONE
        time.sleep(1)
