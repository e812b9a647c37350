"""What an interrupted pass over images has found: the next start of the run goes on from there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.checksums import load_arrays, save_arrays
from fixres_dist.base.small_files import Damaged
from fixres_dist.data.requests import Request
from fixres_dist.models.parts import Parts
from fixres_dist.models.weights import state_digest


@dataclass(frozen=True)
class Partial:
    """A file of rank 0. One that belongs to other weights, images or settings is not read, and is replaced."""

    path: Path
    key: str  # digest of all that the pass depends on
    every_s: float  # seconds between two writes
    opened: float = field(default_factory=time.monotonic)
    before_s: float = 0.0  # that earlier starts have spent on it

    @staticmethod
    def of(path: Path, every_s: float, parts: Parts, depends: tuple[object, ...]) -> Partial:
        """The key is of `depends`, values that JSON has, and of the tuned tensors as they are."""
        weights = parts.model.state_dict()
        tuned = state_digest({name: weights[name] for name in parts.tuned.tensors})
        return Partial(path, hashlib.sha256(json.dumps([tuned, *depends]).encode()).hexdigest(), every_s)

    @staticmethod
    def of_pass(folder: Path, every_s: float, models: Iterable[Parts], depends: tuple[object, ...]) -> Partial:
        """In a file called by its key, which is of every tensor of the models."""
        weights = [state_digest(parts.model.state_dict()) for parts in models]
        key = hashlib.sha256(json.dumps([weights, *depends]).encode()).hexdigest()
        partial = Partial(folder / f"{key[:16]}.npz", key, every_s)
        return replace(partial, before_s=partial.seconds())

    def read(self) -> NDArray[np.float64] | None:
        """The array that was written last; None where there is no file, or a damaged one."""
        return self.entry("array")

    def seconds(self) -> float:
        """How long the pass has taken so far, over all starts."""
        found = self.entry("seconds")
        return 0.0 if found is None else float(found)

    def entry(self, name: str) -> NDArray[np.float64] | None:
        try:
            found, checked = load_arrays(self.path, "")
            known: NDArray[np.float64] = found[name]
            return known if checked and found["key"].tobytes() == self.key.encode() else None
        except (FileNotFoundError, Damaged, KeyError):
            return None

    def write(self, array: NDArray[Any]) -> None:
        self.path.parent.mkdir(exist_ok=True)
        seconds = np.array(self.before_s + time.monotonic() - self.opened)
        key = np.frombuffer(self.key.encode(), np.uint8)
        save_arrays(self.path, {"array": array, "seconds": seconds, "key": key})


def unseen(requests: Iterable[Request], seen: NDArray[np.bool_]) -> Iterator[Request]:
    """The requests without the samples that `seen` [samples of the split] marks.

    A rank stops between two batches, so at the same world size the rest is whole batches, with the same bits.
    """
    for request in requests:
        left = np.flatnonzero(~seen[request.samples])
        if len(left) == len(request.samples):
            yield request
        elif len(left):
            yield Request(request.samples[left], [request.views[k] for k in left])
