"""A fault that a rank brings on itself, or on the processes around it: a real signal at the k-th call of a named function."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixres_dist.training import worker
from support.preemptions import MOMENTS, Spy

EVERY = {"before rendezvous": (worker, "join"), **MOMENTS, "stage change": (worker, "train_stage")}
FAULT, RUN = "SOAK_FAULT", "SOAK_RUN"  # in the environment of a start: its fault, and its run's folder


@dataclass(frozen=True)
class Fault:
    rank: int  # in whose process the moment is
    moment: str
    k: int  # the call of the moment's function, from 1
    target: str  # rank, loader, launcher, controller
    signal: str


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def targets(fault: Fault) -> list[int]:
    """Process ids that the fault's signal goes to; this rank where it has no loader process at that moment."""
    own = os.getpid()
    if fault.target == "loader":
        threads = Path(f"/proc/{own}/task").glob("*/children")
        children = [int(pid) for file in threads for pid in file.read_text().split()]
        children = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return children[:1] or [own]
    return [{"rank": lambda: own, "controller": os.getppid, "launcher": lambda: parent(os.getppid())}[fault.target]()]


def strike(fault: Fault, told: Path) -> None:
    """Send the signal; the file `told` says that it came."""
    for pid in targets(fault):
        told.touch()
        if fault.signal == "STOP":
            # Both from one process, which no signal to this one stops: a CONT that overtook its STOP would be a hang.
            words = ["sh", "-c", f"kill -STOP {pid}; echo; sleep 1; kill -CONT {pid}"]
            both = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE)
            assert both.stdout is not None
            both.stdout.readline()
        else:
            os.kill(pid, getattr(signal, f"SIG{fault.signal}"))


def install(module: Any = worker) -> Spy:
    """Make this process carry out the fault that its environment names, if it is the fault's rank."""
    fault = Fault(**json.loads(os.environ[FAULT])) if os.environ.get(FAULT) else None
    rank = int(os.environ.get("RANK", os.environ.get("SUBMITIT_LOCAL_GLOBALID", 0)))
    moments = {name: (module if owner is worker else owner, f) for name, (owner, f) in EVERY.items()}
    if fault is None or fault.rank != rank:
        return Spy(moments=moments)
    spy = Spy(lambda: strike(fault, Path(os.environ[RUN]) / "struck"), moments)
    spy.plan = fault.moment, fault.k
    return spy
