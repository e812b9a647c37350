"""What every task of a job calls. Imports no torch: the stop signals are handled before torch's seconds of importing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base import log_times
from fixres_dist.base.collector import collect_seldom
from fixres_dist.base.signals import StopFlag
from fixres_dist.base.terminal import escaping
from fixres_dist.cluster import slurm

if TYPE_CHECKING:
    import submitit


class TrainJob:
    """Importable and stateless, so that a requeue runs it again from the snapshot. `folder`: of the run."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> int:
        flag = StopFlag().install()  # over submitit's handlers
        collect_seldom()
        log_times.note()  # what the start before has left
        with escaping():
            code = self.work(flag)
        if slurm.own_job():
            # No Exception: submitit then writes no result, where a stopped rank's would read as a success or an error.
            raise SystemExit(code)
        return code

    def work(self, flag: StopFlag) -> int:
        from fixres_dist.training import worker

        return worker.train(Path(self.folder), flag)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        import submitit

        return submitit.helpers.DelayedSubmission(self)
