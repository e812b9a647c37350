"""The ranks of a start: which one this process is, how they meet, and the collectives that the loop uses.

Works under submitit (which exports SLURM_* or SUBMITIT_LOCAL_*), torchrun, plain srun, and alone.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from fixres_dist.base import memory, watchdog
from fixres_dist.base.errors import UserError
from fixres_dist.base.signals import StopFlag, Stopped
from fixres_dist.training.rendezvous import meet, wait_for_all

T = TypeVar("T")
COLLECTIVE_TIMEOUT_S = 1800.0  # rank 0 may compile or write for minutes while the others wait
WATCHED_TIMEOUT_S = 30 * 86_400.0  # of ranks with a watchdog, which leaves out the time in which Slurm suspends a job
LEAVE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Ranks:
    """This process among its peers. `control` is a CPU group for flags and counts, so that they never wait for a GPU."""

    rank: int
    world_size: int
    local_size: int
    nodes: tuple[str, ...]
    device: torch.device
    control: Any = None  # a process group; None is the default one
    cpus: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))  # this rank's share of its node's
    flag: StopFlag | None = None  # of a run's stop signals; None for a command, which a signal ends at once

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a CPU tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def highest(self, values: list[int]) -> list[int]:
        """Element-wise maximum over ranks: how they agree on flags."""
        if self.world_size == 1:
            return values
        shared = torch.tensor(values)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.control)
        return [int(v) for v in shared]

    def check_stop(self, *values: int) -> list[int]:
        """Element-wise maximum over ranks of `values`; raises Stopped where a stop signal has come to any of them.

        All ranks call it at the same batch.
        """
        watchdog.beat()
        number, *found = self.highest([self.flag.signal if self.flag else 0, *values])
        if number:
            raise Stopped(number)
        return found

    def together(self, batches: Iterator[T], keep: Callable[[], object], every_s: float) -> Iterator[T]:
        """`batches` of this rank, one at a time on all ranks, some of which may have fewer; raises Stopped at a stop signal.

        Before that, and every `every_s` seconds, all ranks call `keep`: what they have made of the batches so far stays.
        """
        if self.flag is None:
            yield from batches
            return
        kept_at, more = time.monotonic(), 1
        while more:
            batch = next(batches, None)
            watchdog.beat()
            due = self.is_main and time.monotonic() - kept_at >= every_s
            number, due_now, more = self.highest([self.flag.signal, due, batch is not None])
            if number or due_now:
                keep()
                kept_at = time.monotonic()
            if number:
                raise Stopped(number)
            if batch is not None:
                yield batch

    def from_main(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, on every rank: an array, or what JSON has (tuples arrive as lists)."""
        if self.world_size == 1:
            return compute()
        content = packed(compute()) if self.is_main else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0, group=self.control)
        box = torch.frombuffer(bytearray(content or bytes(int(size))), dtype=torch.uint8)
        dist.broadcast(box, src=0, group=self.control)
        return cast(T, unpacked(box.numpy().tobytes()))

    def stop(self) -> None:
        """Leave the others after common work, all at once: rank 0 may have been writing while they were through."""
        if dist.is_initialized():
            self.barrier()
            timer = end_process_after(LEAVE_TIMEOUT_S)
            dist.destroy_process_group()
            timer.cancel()


def packed(value: object) -> bytes:
    """For another rank; no pickle, which would let whoever reaches the port run code."""
    if not isinstance(value, np.ndarray):
        return b"J" + json.dumps(value).encode()
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return b"A" + file.getvalue()


def unpacked(content: bytes) -> object:
    rest = content[1:]
    return json.loads(rest) if content.startswith(b"J") else np.load(io.BytesIO(rest), allow_pickle=False)


def abort() -> None:
    """Leave the others after an error, without waiting for them; it must be written down before, as the first cause.

    NCCL's ordinary end waits for the collectives that are under way, and the others may never reach them. The process has
    LEAVE_TIMEOUT_S to end by itself, since its exit may wait for a kernel of NCCL.
    """
    if dist.is_initialized():
        end_process_after(LEAVE_TIMEOUT_S)
        dist.distributed_c10d._abort_process_group()


def end_process_after(seconds: float) -> threading.Timer:
    """End this process in `seconds` unless the timer is cancelled."""

    why = f"the ranks did not leave each other within {seconds:.0f} s"
    timer = threading.Timer(seconds, watchdog.end_process, (why, lambda: None))
    timer.daemon = True
    timer.start()
    return timer


class Launched(NamedTuple):
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int  # ranks on this node
    key: str  # of this start, the same on all its ranks


def launched(environ: Mapping[str, str]) -> Launched:
    """From the variables of torchrun, submitit or srun; one rank where there are none of them."""
    if "TORCHELASTIC_RUN_ID" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        parts = (environ["TORCHELASTIC_RUN_ID"], environ["MASTER_PORT"], environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        key = "-".join(map(str, ("torchrun", *parts)))
    elif "SUBMITIT_LOCAL_JOB_ID" in environ:
        names = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS")
        key = f"local-{environ['SUBMITIT_LOCAL_JOB_ID']}"
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
        rank, world, local = (int(environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        key = f"slurm-{environ['SLURM_JOB_ID']}-{environ['SLURM_STEP_ID']}-{environ.get('SLURM_RESTART_COUNT', 0)}"
        return Launched(rank, world, local, -(-world // int(environ["SLURM_NNODES"])), key)
    else:
        return Launched(0, 1, 0, 1, "alone")
    rank, world, local, size = (int(environ.get(name, 1)) for name in names)
    return Launched(rank, world, local, size, key)


def of_command() -> Launched:
    """A command's place among ranks: one of torchrun's where torchrun itself started this process, otherwise alone.

    Their variables are also there for what is typed, or called by a script, inside somebody's job or under `srun -n2 --pty`:
    no other rank would come. A command takes several nodes as a job of its own (--cluster slurm).
    """
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace")
    except OSError:  # no Linux
        parent = "torchrun"
    itself = "TORCHELASTIC_RUN_ID" in os.environ and re.search(r"torchrun|torch[./]distributed[./](run|launch)", parent)
    return launched(os.environ if itself else {})


def join(
    run_folder: Path,
    keep_memory: bool = True,
    flag: StopFlag | None = None,
    launcher: Launched | None = None,
    watched: bool = False,
) -> Ranks:
    """Join the other ranks of this start; a single process needs no process group. `launcher`: by default the environment's.

    `watched`: a watchdog ends a rank that hangs (base/watchdog.py), so collectives need not fail by a clock.

    `keep_memory`: on a CPU, use freed memory again (base/memory.py); False leaves the process as it is.
    Raises RuntimeError where rank 0 does not publish its address within MEET_TIMEOUT_S, or where another rank does
    not come, which a retry may mend.
    """
    rank, world, local_rank, local_size, key = launcher or launched(os.environ)
    device = torch.device("cpu")
    choose_mig_device(local_rank)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count < local_size and not key.startswith("slurm") and not mig_devices():  # Slurm may show each task its own
            raise UserError(
                f"{local_size} ranks on this node see {count} GPUs, and each rank needs one of its own. "
                f"Next: start {count} rank(s) per node, or set CUDA_VISIBLE_DEVICES= for processes on the CPU."
            )
        # Where Slurm binds one GPU to each task, that is number 0 of every rank.
        device = torch.device("cuda", local_rank % count)
        torch.cuda.set_device(device)
    elif keep_memory:
        memory.keep_freed_memory()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    if world == 1:
        return Ranks(0, 1, 1, (node,), device, flag=flag)
    if world == local_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens at the host name's address
    store = meet(run_folder / "rendezvous" / f"{key}.json", rank, world, many_nodes=world > local_size)
    mine = os.sched_getaffinity(0)
    found = wait_for_all(store, rank, world, (node, sorted(mine)))
    timeout = datetime.timedelta(seconds=WATCHED_TIMEOUT_S if watched else COLLECTIVE_TIMEOUT_S)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    control: Any = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    share = cpu_share(mine, [set(cpus) for name, cpus in found if name == node])
    return Ranks(rank, world, local_size, tuple(dict.fromkeys(name for name, _ in found)), device, control, share, flag)


def cpu_share(mine: set[int], on_node: Sequence[set[int]]) -> int:
    """CPUs that a rank may count on, `on_node` being the CPUs that each rank of its node may use, its own included.

    Slurm's task/affinity gives each task CPUs of its own, other launchers give all of them to every rank.
    """
    return max(1, int(sum(1 / sum(cpu in cpus for cpus in on_node) for cpu in mine) + 1e-6))


def mig_devices() -> list[str]:
    """The parts of GPUs (MIG) among the devices that this process may use."""
    return [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip().startswith("MIG-")]


def choose_mig_device(local_rank: int) -> None:
    """Leave this rank its own MIG device: CUDA shows a process one of them only, the first of its list.

    Whole GPUs keep their list: the rank's number is the device's. Must come before CUDA starts.
    """
    if len(mig_devices()) > local_rank:
        os.environ["CUDA_VISIBLE_DEVICES"] = mig_devices()[local_rank]
