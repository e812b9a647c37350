"""The batches of a run: which backend makes them, and what happens to a file that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Data
from fixres_dist.data.dataset import verify_command
from fixres_dist.data.decoding import Bad, Batch
from fixres_dist.data.geometry import Resize
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request

OnSkip = Callable[[Index, Bad], None]


class HasSkipped(Protocol):
    """A batch of pictures or of cached features."""

    @property
    def skipped(self) -> tuple[Bad, ...]: ...


AnyBatch = TypeVar("AnyBatch", bound=HasSkipped)


NOT_IN_DALI = ("box", "hamming")  # of geometry.INTERPOLATIONS


def choose(setting: str, device: torch.device, interpolation: str = "bicubic") -> tuple[str, str]:
    """(backend, why). On a CPU torch needs a third to three quarters of DALI's CPU time (bench data)."""
    name, why = ("dali", "decoding on the GPU") if device.type == "cuda" else ("torch", "the faster one on a CPU")
    if setting != "auto":
        name, why = setting, f"data.backend={setting}"
    return (
        ("torch", f"DALI has no {interpolation} filter")
        if name == "dali" and interpolation in NOT_IN_DALI
        else (name, why)
    )


def worker_count(setting: int | str, cpus: int, local_size: int) -> int:
    """Loader processes or threads of a rank that may count on `cpus` CPUs, one of `local_size` ranks of its node.

    `auto`: as many; with several ranks one of them is left for training.
    """
    if setting != "auto":
        return int(setting)
    return max(1, cpus - 1 if local_size > 1 else cpus)


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

    A file that cannot be decoded has no row in its batch. With `data.on_bad: stop` it raises a UserError that names it;
    with `skip` it is reported to `on_skip`.
    """
    name, _ = choose(settings.backend, device, resize.interpolation)
    if name == "dali":
        from fixres_dist.data import dali  # takes seconds to import

        cuda = device.type == "cuda"
        hints = (settings.hw_decoder_load, settings.preallocate_width, settings.preallocate_height)
        how = dali.Settings(batch, max(1, workers), device.index or 0 if cuda else None, *hints)
        made = dali.batches(index, requests, res, resize, how)
    else:
        from fixres_dist.data import torch_cpu  # takes seconds to compile

        made = torch_cpu.batches(index, requests, res, resize, workers)
    return checked(index, made, settings.on_bad, on_skip)


def checked(index: Index, made: Iterator[AnyBatch], on_bad: str, on_skip: OnSkip) -> Iterator[AnyBatch]:
    """The same batches; samples without a row are reported to `on_skip`, or raise UserError with `on_bad: stop`."""
    for batch in made:
        for bad in batch.skipped:
            if on_bad == "stop":
                raise refusal(index, bad)
            on_skip(index, bad)
        yield batch


def refusal(index: Index, bad: Bad) -> UserError:
    verify = verify_command(index.folder.parent, index.folder.name)
    return UserError(
        f"cannot decode {index.where(bad.sample)}: {bad.reason}. Next: {verify} finds every such file; "
        "then run the same command again with data.deny_list=bad.txt, or with data.on_bad=skip."
    )
