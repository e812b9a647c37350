"""TODO"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OPEN_SHARDS = 128  # tar files kept open per process: an open is a round trip to the metadata server


@dataclass(frozen=True)
class Index:
    """One split. Sample i is the i-th file in class order, then directory, then file name, as torchvision's ImageFolder has it."""

    folder: Path  # the split's directory
    classes: tuple[str, ...]
    text: bytes  # all names (paths below `folder`), joined: a million Python strings would take 100 MB per process
    ends: NDArray[np.int64]  # end of each name in `text`
    labels: NDArray[np.int32]
    sizes: NDArray[np.int32]  # [n, 2] height, width in pixels; 0, 0 where the header could not be read
    marks: NDArray[np.uint32]  # [n]: of each file's length and first bytes, see headers.Seen
    shards: tuple[str, ...] = ()  # tar files in `folder`; none: every sample is a file of its own
    places: NDArray[np.int64] | None = None  # [n, 3] shard, first byte, bytes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        """`class/file.JPEG`; the same whether the sample lies in a folder or in a shard."""
        start = int(self.ends[sample - 1]) if sample else 0
        return os.fsdecode(self.text[start : int(self.ends[sample])])

    def path(self, sample: int) -> Path:
        """The file to look at: the image, or the shard that holds it."""
        inside = self.name(sample) if self.places is None else self.shards[self.places[sample, 0]]
        return self.folder / inside

    def where(self, sample: int) -> str:
        """For messages: printable whatever the name's encoding."""
        text = str(self.path(sample)) + ("" if self.places is None else f" ({self.name(sample)})")
        return os.fsencode(text).decode("utf-8", "backslashreplace")

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The encoded file; raises OSError. Safe from any thread and after a fork."""
        if self.places is None:
            return np.fromfile(self.path(sample), np.uint8)
        _, offset, size = (int(v) for v in self.places[sample])
        data = np.empty(size, np.uint8)
        shard = open_shard(str(self.path(sample)))  # held: another thread may push it out of the cache, which closes it
        if (got := os.preadv(shard.fileno(), [data.data], offset)) < size:
            raise OSError(f"the shard ends after {got} of its {size} bytes")
        return data

    @cached_property
    def fingerprint(self) -> str:
        """Of the sample list: names, labels and sizes, not of where the data set lies nor of the pixels."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for part in (self.text, self.ends.tobytes(), self.labels.tobytes(), self.sizes.tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]

    @property
    def contents(self) -> str:
        """Of what is in the files, as far as the scan that read their headers saw it."""
        return hashlib.sha256(self.marks.tobytes()).hexdigest()[:16]

    def find(self, name: str) -> int | None:
        """The sample of that name. Searches the joined text: a table of a million names would cost more than it saves."""
        wanted, start = os.fsencode(name), -1
        while (start := self.text.find(wanted, start + 1)) >= 0:
            sample = int(np.searchsorted(self.ends, start, "right"))
            if start == (self.ends[sample - 1] if sample else 0) and start + len(wanted) == self.ends[sample]:
                return sample
        return None

    def without(self, names: Iterable[str]) -> Index:
        """This split less the samples of those names; unknown names are no error (a deny list may cover more)."""
        dropped = sorted({sample for name in names if (sample := self.find(name)) is not None})
        if not dropped:
            return self
        keep = np.ones(len(self), bool)
        keep[dropped] = False
        lengths = np.diff(self.ends, prepend=0)
        starts, pieces = [0, *(int(self.ends[s]) for s in dropped)], [int(self.ends[s] - lengths[s]) for s in dropped]
        text = b"".join(self.text[a:b] for a, b in zip(starts, [*pieces, len(self.text)], strict=True))
        places = None if self.places is None else self.places[keep]
        return replace(
            self,
            text=text,
            ends=np.cumsum(lengths[keep]),
            labels=self.labels[keep],
            sizes=self.sizes[keep],
            marks=self.marks[keep],
            places=places,
        )


@lru_cache(OPEN_SHARDS)
def open_shard(path: str) -> FileIO:
    return FileIO(path)  # closed when the cache and the last reader let go of it
