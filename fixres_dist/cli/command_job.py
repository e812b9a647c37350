"""What the ranks of a command's job do: carry out the command with the words that were typed, on its run directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base.errors import UserError
from fixres_dist.base.signals import StopFlag
from fixres_dist.training.job import TrainJob

if TYPE_CHECKING:
    import contextlib

    from fixres_dist.config.schema import Config
    from fixres_dist.runs.rundir import RunDir
    from fixres_dist.training.ranks import Ranks
    from fixres_dist.training.throughput import StartUp


class CommandJob(TrainJob):
    """As TrainJob: a requeue carries out the same command again, which goes on from the passes that are kept."""

    def work(self, flag: StopFlag) -> int:
        from fixres_dist.training import worker

        return worker.serve(Path(self.folder), flag, carry_out)


def carry_out(run: RunDir, config: Config, ranks: Ranks, stack: contextlib.ExitStack, startup: StartUp) -> None:
    """The command of the job, whose ranks have met; raises Stopped where a stop signal came before its end."""
    from fixres_dist.cli import main
    from fixres_dist.evaluation.inputs import Job

    task = run.task
    assert task
    try:
        os.chdir(task.folder)  # files were named from there
    except OSError as error:
        raise UserError(
            f"the command was typed in {task.folder}, which node {ranks.nodes[0]} does not have ({error.strerror}). Accepted: "
            f"a folder that all nodes share. Next: {task.typed()} from such a folder"
        ) from None
    args = main.parsed(task.command, task.words)
    args.job = Job(run, ranks)
    args.func(args)
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(run.partial, ignore_errors=True)
