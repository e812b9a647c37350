"""Features on disk: what the trunk made of every view of every sample of a split, in rows of one size.

A folder per key holds spec.json (all that the key hashes) and segments `<first>-<stop>.rows`: the rows of the samples
first .. stop-1, view after view, then a byte per sample (1: decoded) and a CRC-32, of the key and the samples too. A segment
is complete or invisible, so writing goes on where it was interrupted, by any number of ranks; any number of ranks read a row
with one positioned read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fixres_dist.base import owners, watchdog
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import sweep, whole
from fixres_dist.base.small_files import write_json
from fixres_dist.data import decoding
from fixres_dist.data.decoding import Bad
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request

BOUND = b"ends"  # after the checksum, where that is of the store and the samples too
SEGMENT = re.compile(r"(\d{10})-(\d{10})\.rows")
READERS, AHEAD = 4, 8  # threads, and batches that they are ahead of the loop: a read waits without Python's lock
Span = tuple[int, int]  # samples first .. stop - 1


class Rows(NamedTuple):
    """A batch as decoding.Batch is, with features in the pictures' place: what Session.inputs takes as well."""

    images: tuple[torch.Tensor, ...]  # each [n, ...], in the trunk's number format, channels last where there are maps
    labels: torch.Tensor  # int64 [n]
    samples: torch.Tensor  # int64 [n]
    skipped: tuple[Bad, ...] = ()


Loaded = decoding.Batch | Rows


@dataclass(frozen=True)
class Store:
    folder: Path
    samples: int
    views: int  # 1, or 2: as it is, and flipped
    shapes: tuple[tuple[int, ...], ...]  # of one picture's features, one for each tensor that is kept
    dtype: torch.dtype

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Of each tensor, of one view of one sample."""
        return tuple(prod(shape) * self.dtype.itemsize for shape in self.shapes)

    @property
    def sample_bytes(self) -> int:
        return self.views * sum(self.row_bytes) + 1

    def segments(self) -> list[Span]:
        """The complete segments, in order; one whose length is wrong is removed, with a word about it."""
        found = []
        for path in sorted(self.folder.glob("*.rows")):
            if not (name := SEGMENT.fullmatch(path.name)):
                continue
            span = (int(name[1]), int(name[2]))
            if not owners.believed(path):
                self.reject(span, "others than this user can have written it")
            elif path.stat().st_size - (span[1] - span[0]) * self.sample_bytes not in (4, 4 + len(BOUND)):
                self.reject(span, "its length is wrong")
            else:
                found.append(span)
        return found

    def reject(self, span: Span, why: str) -> None:
        print(f"{self.path(span)}: {why}; it is written again", flush=True)
        with contextlib.suppress(OSError):  # where nobody can write, nothing is read from it all the same
            self.path(span).unlink(missing_ok=True)

    def path(self, span: Span) -> Path:
        return self.folder / f"{span[0]:010d}-{span[1]:010d}.rows"

    def missing(self) -> list[Span]:
        """The samples that no segment holds."""
        gaps, at = [], 0
        for first, stop in [*self.segments(), (self.samples, self.samples)]:
            if first > at:
                gaps.append((at, first))
            at = max(at, stop)
        return gaps

    def missing_bytes(self) -> int:
        return sum(stop - first for first, stop in self.missing()) * self.sample_bytes

    def verify(self, index: Index, spans: Sequence[Span], again: bool) -> None:
        """Remove the segments `spans` where their bytes are not those that were written for this store and these samples; and,
        `again`, where a picture of `index` that could not be decoded then can be now: a disk's bad day is not to cost later
        runs a picture, and a run has the same ones at all its starts."""
        old = 0
        for span in spans:
            watchdog.beat()
            left = (span[1] - span[0]) * self.sample_bytes
            bound = self.path(span).stat().st_size > left + 4
            crc, old = self.binding(span) if bound else 0, old + (not bound)
            with open(self.path(span), "rb") as file:
                while left and (part := file.read(min(left, 1 << 24))):
                    crc, left = zlib.crc32(part, crc), left - len(part)
                end = file.read()
            if left or end != crc.to_bytes(4, "little") + (BOUND if bound else b""):
                self.reject(span, "its checksum is wrong")
            elif again and any(decodable(index, span[0] + int(k)) for k in np.flatnonzero(self.marks(span) == 0)):
                self.reject(span, "a picture that could not be decoded now can be")
        if old:
            text = f"{old} segments are of an older version, whose checksums do not say of which samples they are"
            print(f"{self.folder}: {text}", flush=True)

    def binding(self, span: Span) -> int:
        """Where a segment's checksum starts: one that was moved to another store or other samples has another checksum."""
        return zlib.crc32(f"{self.folder.name} {self.path(span).name}".encode())

    def marks(self, span: Span) -> NDArray[np.uint8]:
        """Of each sample of a segment: 1 if it was decoded."""
        count = span[1] - span[0]
        with open(self.path(span), "rb") as file:
            return np.frombuffer(os.pread(file.fileno(), count, count * (self.sample_bytes - 1)), np.uint8)

    def write(self, span: Span, batches: Iterable[tuple[NDArray[np.int64], list[tuple[torch.Tensor, ...]]]]) -> None:
        """Write one segment. `batches`: of consecutive samples those that could be decoded, and their features in each view,
        all of `span` together; a sample that is left out is marked."""
        decoded, at, crc = np.zeros(span[1] - span[0], np.uint8), span[0], self.binding(span)
        empty = bytes(self.sample_bytes - 1)
        with whole(self.path(span), mode=0o644) as part, open(part, "wb") as file:

            def put(data: bytes | memoryview) -> None:
                nonlocal crc
                crc = zlib.crc32(data, crc)
                file.write(data)

            for samples, views in batches:
                rows = np.concatenate([as_bytes(tensor) for view in views for tensor in view], axis=1)
                for sample, row in zip(samples.tolist(), rows, strict=True):
                    for _ in range(sample - at):
                        put(empty)
                    put(row.data)
                    decoded[sample - span[0]] = 1
                    at = sample + 1
            for _ in range(span[1] - at):
                put(empty)
            put(decoded.data)
            file.write(crc.to_bytes(4, "little") + BOUND)

    @cached_property
    def table(self) -> list[tuple[int, FileIO, NDArray[np.uint8]]]:
        """(first sample, open file, decoded) of every segment; raises FileNotFoundError if samples are missing."""
        if gaps := self.missing():
            raise FileNotFoundError(f"{self.folder} has no features of the samples {gaps[:3]}")
        found = []
        for span in self.segments():
            found.append((span[0], FileIO(self.path(span)), self.marks(span)))
        return found

    @cached_property
    def firsts(self) -> list[int]:
        return [first for first, _, _ in self.table]

    def read(self, index: Index, request: Request) -> Rows:
        """The features of a request; samples that could not be decoded when they were written have no row."""
        pin = torch.cuda.is_available()
        wanted, bad = [], []
        for sample, view in zip(request.samples.tolist(), request.views, strict=True):
            first, file, decoded = self.table[bisect_right(self.firsts, sample) - 1]
            if decoded[sample - first]:
                offset = (sample - first) * (self.sample_bytes - 1) + view.flip * sum(self.row_bytes)
                wanted.append((sample, file.fileno(), offset))
            else:
                bad.append(Bad(sample, f"it could not be decoded when its features were written ({self.folder})"))
        buffers = [torch.empty(len(wanted), size, dtype=torch.uint8, pin_memory=pin) for size in self.row_bytes]
        arrays = [buffer.numpy() for buffer in buffers]
        for k, (sample, handle, offset) in enumerate(wanted):
            if os.preadv(handle, [array[k] for array in arrays], offset) < sum(self.row_bytes):
                raise OSError(f"{self.folder} ends within the features of sample {sample}")
        samples = np.array([sample for sample, _, _ in wanted], np.int64)
        features = (self.shaped(*pair) for pair in zip(buffers, self.shapes, strict=True))
        return Rows(tuple(features), *decoding.rows(index, samples, pin), tuple(bad))

    def shaped(self, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        values = buffer.view(self.dtype)
        if len(shape) == 3:
            channels, height, width = shape
            return values.view(len(buffer), height, width, channels).permute(0, 3, 1, 2)
        return values.view(len(buffer), *shape)

    def batches(self, index: Index, requests: Iterable[Request]) -> Iterator[Rows]:
        """The rows of every request, in their order, read ahead of the caller."""
        waiting: deque[Future[Rows]] = deque()
        _ = self.firsts  # opens the segments before threads ask for them
        with ThreadPoolExecutor(READERS) as pool:
            for request in requests:
                waiting.append(pool.submit(self.read, index, request))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


def decodable(index: Index, sample: int) -> bool:
    try:
        decoding.load(index, sample)
        return True
    except decoding.Undecodable:
        return False


def as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """[n, bytes of a row]; maps with their channels last, as CPUs and the head's first convolution like them."""
    tensor = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
    return tensor.flatten(1).contiguous().view(torch.uint8).cpu().numpy()


def open_store(root: Path, spec: dict[str, Any], samples: int, views: int, example: tuple[torch.Tensor, ...]) -> Store:
    """The store of `spec` below `root`, empty or not; `example`: features of a batch. Writes nothing."""
    if len({feature.dtype for feature in example}) > 1:
        raise ValueError(f"features of several number formats: {[feature.dtype for feature in example]}")
    shapes = tuple(tuple(feature.shape[1:]) for feature in example)
    key = hashlib.sha256(json.dumps([spec, shapes], sort_keys=True).encode()).hexdigest()[:24]
    return Store(root / key, samples, views, shapes, example[0].dtype)


def own_folder(folder: Path) -> Path:
    """`folder`, or one of this user beside it where another user has, or can have, written features there; says so. Raises
    UserError where that one is another user's too."""
    for place in (folder, owners.of_this_user(folder)):
        if place.exists() and owners.ours(owners.owner_of(place), place.parent):
            owners.close_to_others(place)
        if not place.exists() or owners.believed(place):
            return place
        print(f"{place} can have been written by others than this user: its features are not read", flush=True)
    raise UserError(f"{place} is another user's. Accepted: run.feature_cache=DIR, a folder of this user.")


def begin_writing(found: Store, spec: dict[str, Any]) -> None:
    """Before writing, by the one run that may: say in words what the key stands for; what a killed writer left goes."""
    found.folder.mkdir(parents=True, exist_ok=True)
    owners.close_to_others(found.folder)
    write_json(found.folder / "spec.json", spec)
    sweep(found.folder, age_s=0)
