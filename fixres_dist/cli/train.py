"""`fixres train`"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fixres_dist.base import log_times
from fixres_dist.cluster import notify, slurm
from fixres_dist.runs.rundir import RunDir

EXAMPLES = ("--run runs/b0-320",)


def add_arguments(p: argparse.ArgumentParser) -> None:
    text = "the run directory; alone, under torchrun (-m fixres_dist train --run DIR), or in a job"
    p.add_argument("--run", type=Path, required=True, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    log_times.note()  # what the start before has left
    from fixres_dist.training import ranks, worker

    try:
        return worker.train(args.run)
    finally:
        if slurm.own_job() is None and ranks.launched(os.environ).rank == 0:  # else the batch script does it
            notify.tell(RunDir(args.run))
