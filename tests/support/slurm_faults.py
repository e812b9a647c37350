"""A fault that a rank of a Slurm job brings on its job at the k-th call of a named function; what benchmarks/soak_slurm.py submits."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.signals import StopFlag
from support.slurm_preemptions import HEAR_S, HOW, slurm_here_environment

LOSSES = ("rank", "step daemon", "batch script", "slurmd", "node")  # what KILL ends
WAYS = (*HOW, "cancelled", *LOSSES)
COMMANDS = {**HOW, "cancelled": ("scancel", "{job}")}


@dataclass(frozen=True)
class Fault:
    """`rank` brings it on its job at its `k`-th call of `moment`."""

    rank: int
    moment: str
    k: int
    how: str


def processes(*marks: str) -> list[int]:
    """Ids of the processes that have these variables in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if set(marks) <= set((entry / "environ").read_text(errors="replace").split("\0")):
                found.append(int(entry.name))
    return found


def line_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def victims(how: str) -> list[int]:
    """The processes that a loss takes from a rank's job, found from the rank."""
    cluster, node = f"SLURM_CLUSTER_NAME={os.environ['SLURM_CLUSTER_NAME']}", os.environ["SLURMD_NODENAME"]
    if how == "batch script":
        return [p for p in processes(cluster) if f"job{os.environ['SLURM_JOB_ID']}/slurm_script" in line_of(p)]
    if how == "slurmd":
        return [p for p in processes(cluster, f"SLURMD_NODENAME={node}") if f"slurmd -N {node}" in line_of(p)]
    return [os.getppid() if how == "step daemon" else os.getpid()]


def bring(fault: Fault, run: Path, flag: StopFlag) -> None:
    """Carry the fault out, and wait at the moment until this rank has heard of it, or is gone."""
    if fault.how == "node":  # its processes are killed from outside
        (run / "lost-node").write_text(os.environ["SLURMD_NODENAME"])
    elif fault.how in LOSSES:
        found = victims(fault.how)
        assert found, f"no {fault.how} to be killed"
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return  # what the loss brings may come much later, or not to this rank
    else:
        values = {"nodes": os.environ["SLURM_JOB_NODELIST"], "job": os.environ["SLURM_JOB_ID"]}
        values["signal"] = "USR2" if (run / "user-signal").exists() else "TERM"
        command = [word.format(**values) for word in COMMANDS[fault.how]]
        # This command is a process of the step too: the signal that it brings must not end it.
        command = ["sh", "-c", 'trap "" USR2 TERM; exec "$@"', "sh", *command]
        subprocess.run(command, env=slurm_here_environment(), check=True, capture_output=True)
    deadline = time.monotonic() + HEAR_S
    while not flag.signal and time.monotonic() < deadline:
        time.sleep(0.01)


class SoakedJob:
    """TrainJob, whose ranks bring the run's next fault on it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> int:
        flag, run, rank = StopFlag().install(), Path(self.folder), int(os.environ["SLURM_PROCID"])
        planned = [Fault(**fault) for fault in json.loads((run / "faults.json").read_text())]
        number, fault = next(((n, f) for n, f in enumerate(planned) if not (run / f"came-{n}").exists()), (0, None))

        def strike() -> None:
            assert fault
            (run / f"came-{number}").touch()
            bring(fault, run, flag)

        mine = fault is not None and fault.rank == rank
        if fault and mine and fault.moment == "imports":
            strike()
        from fixres_dist.training import worker
        from support.preemptions import Spy

        spy = Spy(strike)
        spy.plan = (fault.moment, fault.k) if fault and mine else None
        raise SystemExit(worker.train(run, flag))
