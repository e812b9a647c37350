"""One door to both backends: which one runs, and what happens to a file that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Data
from fixres_dist.data import torch_cpu
from fixres_dist.data.geometry import Resize
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request
from fixres_dist.data.torch_cpu import Bad, Batch

OnSkip = Callable[[Index, Bad], None]


class Loaded(Protocol):
    @property
    def skipped(self) -> tuple[Bad, ...]: ...


L = TypeVar("L", bound=Loaded)


def choose(setting: str, device: torch.device) -> tuple[str, str]:
    """(backend, why). On a CPU torch needs a third to three quarters of DALI's CPU time (bench data)."""
    if setting != "auto":
        return setting, f"data.backend={setting}"
    return ("dali", "decoding on the GPU") if device.type == "cuda" else ("torch", "the faster one on a CPU")


def batches(
    index: Index,
    requests: Iterable[Request],
    res: int,
    resize: Resize,
    settings: Data,
    device: torch.device,
    workers: int,
    batch: int,
    on_skip: OnSkip,
) -> Iterator[Batch]:
    """The batch of every request, in their order, by the backend that `settings` choose; no request exceeds `batch`.

    A file that cannot be decoded ends the run with a UserError that names it, or with `data.on_bad: skip` is given to
    `on_skip` and has no row in its batch.
    """
    name, _ = choose(settings.backend, device)
    if name == "dali":
        from fixres_dist.data import dali  # seconds to import, and only here

        cuda = device.type == "cuda"
        hints = (settings.hw_decoder_load, settings.preallocate_width, settings.preallocate_height)
        how = dali.Settings(batch, max(1, workers), device.index or 0 if cuda else None, *hints)
        loaded = dali.batches(index, requests, res, resize, how)
    else:
        loaded = torch_cpu.batches(index, requests, res, resize.interpolation, workers)
    return watched(index, loaded, settings.on_bad, on_skip)


def watched(index: Index, loaded: Iterator[L], on_bad: str, on_skip: OnSkip) -> Iterator[L]:
    """`loaded`, with what `data.on_bad` wants done about the samples that could not be decoded."""
    for found in loaded:
        for bad in found.skipped:
            if on_bad == "stop":
                raise refusal(index, bad)
            on_skip(index, bad)
        yield found


def refusal(index: Index, bad: Bad) -> UserError:
    return UserError(
        f"cannot decode {index.where(bad.sample)}: {bad.reason}. "
        f"Next: python -m fixres_dist data verify --data {index.folder.parent} --deny-list bad.txt finds every such file; "
        "then run the same command again with data.deny_list=bad.txt, or with data.on_bad=skip."
    )
