"""The worker with every collective counted: `python count_bytes.py RUN COUNTS`, a rank of a torchrun-like start.

Each line of COUNTS/rank_K.jsonl is one collective: who called it, and how many bytes of tensors this rank put in.
DDP's own reduction happens in C++, so a communication hook brings it through the same functions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fixres_dist.training import worker

MOVING = ("all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "all_gather_into_tensor")
MOVING += ("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv")


def bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, list | tuple) else 0


def caller() -> str:
    """The function of the product, outside its `distributed` module, that asked for this."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "gradients" or (
            module.startswith("fixres_dist.") and module != "fixres_dist.training.ranks"
        ):
            return frame.f_code.co_name
        frame = frame.f_back
    return "?"


def counted(file: Path, name: str) -> Any:
    function = getattr(dist, name)

    def call(*arguments: Any, **named: Any) -> Any:
        with open(file, "a") as lines:
            moved = bytes_of([*arguments, *named.values()])
            lines.write(json.dumps({"call": name, "caller": caller(), "bytes": moved}) + "\n")
        return function(*arguments, **named)

    return call


def main(folder: Path, counts: Path) -> int:
    for name in MOVING:
        call = counted(counts / f"rank_{os.environ['RANK']}.jsonl", name)
        setattr(dist, name, call)
        setattr(dist.distributed_c10d, name, call)  # the object collectives are built on these

    def gradients(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are text
        buffer = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])

    start = DistributedDataParallel.__init__

    def with_hook(self: Any, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        self.register_comm_hook(None, gradients)

    DistributedDataParallel.__init__ = with_hook  # type: ignore[method-assign]
    return worker.train(folder)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
