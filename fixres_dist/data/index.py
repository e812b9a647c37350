"""The index of a split: names, labels and pixel sizes of its samples, and the file that it is cached in.

Sizes come from the headers, so geometry (data/geometry.py) needs no pixels: every rank, backend and restart agrees on
the view of a sample before anything is decoded. No torch: the launcher checks a data set with this.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base import owners
from fixres_dist.base.checksums import load_arrays, save_arrays
from fixres_dist.base.errors import StorageError
from fixres_dist.base.small_files import Damaged, parsed
from fixres_dist.base.storage import fill, patiently
from fixres_dist.config.schema import Data

FORMAT = 4  # of the cached file
FORMATS = (3, FORMAT)  # that are read; 3 has no checksum
ARRAYS = ("ends", "labels", "sizes", "marks")  # those of an Index that are cached as they are
OPEN_SHARDS = 128  # tar files kept open per process: an open is a round trip to the metadata server


class Limits(NamedTuple):
    """Of a picture; one beyond them cannot be decoded. Each loader process holds two decoded copies for a moment."""

    pixels: int = Data.max_pixels
    file_bytes: int = Data.max_file_mib << 20

    @staticmethod
    def of(data: Data) -> Limits:
        return Limits(data.max_pixels, data.max_file_mib << 20)


USUAL = Limits()


@dataclass(frozen=True)
class Index:
    """The n samples of one split in ImageFolder's order: by class (if there are class folders), directory, file name."""

    folder: Path  # the split's directory
    classes: tuple[str, ...]
    text: bytes  # all names (paths below `folder`), joined: a million Python strings would take 100 MB per process
    ends: NDArray[np.int64]  # end of each name in `text`
    labels: NDArray[np.int32]
    sizes: NDArray[np.int32]  # [n, 2] height, width in pixels; 0, 0 where the header could not be read
    marks: NDArray[np.uint32]  # [n] checksum of each file's length and first bytes (headers.Seen)
    shards: tuple[str, ...] = ()  # names of the tar files in `folder`; empty where every sample is a file of its own
    places: NDArray[np.int64] | None = None  # [n, 3] number of the shard, first byte in it, length in bytes
    # [n] CRC-32 of each encoded image, 0 where it could not be read; of files only with `data index --checksums`
    checksums: NDArray[np.uint32] | None = None
    limits: Limits = USUAL

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        """`class/file.JPEG`; the same whether the sample lies in a folder or in a shard."""
        start = int(self.ends[sample - 1]) if sample else 0
        return os.fsdecode(self.text[start : int(self.ends[sample])])

    def path(self, sample: int) -> Path:
        """The image file, or the shard that holds the image."""
        inside = self.name(sample) if self.places is None else self.shards[self.places[sample, 0]]
        return self.folder / inside

    def where(self, sample: int) -> str:
        """The path for messages: printable whatever the name's encoding."""
        text = str(self.path(sample)) + ("" if self.places is None else f" ({self.name(sample)})")
        return os.fsencode(text).decode("utf-8", "backslashreplace")

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The encoded image: uint8 [bytes]. Raises OSError for a bad file, StorageError for a file system that fails.

        Safe from any thread and after a fork.
        """
        path = self.path(sample)
        return patiently(lambda: self.read_once(sample, path), path, self.folder)

    def read_once(self, sample: int, path: Path) -> NDArray[np.uint8]:
        if self.places is None:
            with FileIO(path) as file:
                data = np.empty(self.check_length(os.fstat(file.fileno()).st_size), np.uint8)
                return data[: fill(file.fileno(), data.data)]
        _, offset, size = (int(v) for v in self.places[sample])
        data = np.empty(self.check_length(size), np.uint8)
        try:
            shard = open_shard(str(path))  # this reference keeps it open if another thread evicts it
            got = fill(shard.fileno(), data.data, offset)
        except OSError:
            open_shard.cache_clear()  # a stale handle of a network file system stays stale
            raise
        if got < size:
            raise OSError(f"the shard ends after {got} of its {size} bytes")
        return data

    def check_length(self, size: int) -> int:
        """`size` in bytes of an encoded picture; raises OSError for one above the limit, before memory is taken for it."""
        if size > self.limits.file_bytes:
            raise OSError(f"it has {size:,} bytes; accepted: {self.limits.file_bytes:,} (data.max_file_mib)")
        return size

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the sample list: classes, names, labels and sizes. The location and the pixels do not count."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for part in (self.text, self.ends.tobytes(), self.labels.tobytes(), self.sizes.tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]

    @property
    def contents(self) -> str:
        """Hash of the marks: it changes when a picture is replaced by another one of the same name and size."""
        return hashlib.sha256(self.marks.tobytes()).hexdigest()[:16]

    def names(self) -> Iterator[str]:
        """Every sample's name, in order."""
        for start, end in pairwise([0, *self.ends.tolist()]):
            yield os.fsdecode(self.text[start:end])

    def relabelled(self, classes: tuple[str, ...], columns: Sequence[int]) -> Index:
        """The index with the labels of a model's `classes`, of which `columns` gives each own class's."""
        return replace(self, classes=classes, labels=np.array(columns, np.int32)[self.labels])

    def without(self, names: Iterable[str]) -> Index:
        """The index without the samples of these names; unknown names are ignored (a deny list may cover more)."""
        if not (dropped := set(names)):
            return self
        return self.taken(np.flatnonzero([name not in dropped for name in self.names()]))

    def taken(self, samples: NDArray[np.integer]) -> Index:
        """The index of these samples alone, in the order given; one may stand several times."""
        names = [os.fsencode(name) for name in self.names()]
        return replace(
            self,
            text=b"".join(names[sample] for sample in samples.tolist()),
            ends=np.cumsum(np.diff(self.ends, prepend=0)[samples]),
            labels=self.labels[samples],
            sizes=self.sizes[samples],
            marks=self.marks[samples],
            places=None if self.places is None else self.places[samples],
            checksums=None if self.checksums is None else self.checksums[samples],
        )


@lru_cache(OPEN_SHARDS)
def open_shard(path: str) -> FileIO:
    return FileIO(path)  # closed when neither the cache nor a reader refers to it any more


@dataclass(frozen=True)
class CachedIndex:
    """An index and the state of the files that it was read from, which tell whether it is up to date."""

    index: Index
    directories: tuple[tuple[str, int, int], ...] = ()  # of class folders: path below `folder`, mtime in ns, images
    scanned_ns: int = 0  # when these directories were listed
    shards: tuple[tuple[str, int], ...] = ()  # of tar files: name, bytes
    passed: dict[str, int] | None = (
        None  # what is no sample, by kind; None: of a version that took hidden folders' images
    )
    labels: int = 0  # CRC-32 of the list of labels; 0: there is none


def cache_file(folder: Path, cache: Path) -> Path:
    """Where the index of the split at `folder` (a name, where tar files of several lie together) is cached below `cache`.

    A file that another user can have written is left alone: this user has one of his own beside it.
    """
    file = cache / "index" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.npz"
    return file if not file.exists() or may_tell(file, folder) else owners.of_this_user(file)


def may_tell(file: Path, folder: Path) -> bool:
    """Whether the index in `file` is believed about the images in `folder`, whose own owner may write what he likes; if not,
    says so."""
    there = folder if folder.exists() else folder.parent
    if known := not file.exists() or owners.believed(file, owners.owner_of(there)):
        return known
    print(f"{file} can have been written by others than this user: it is not read", file=sys.stderr, flush=True)
    return False


def read_cached(file: Path) -> CachedIndex | None:
    """What `write_cached` wrote, up to date or not; None if there is no such file or it is damaged, which is said."""
    try:
        a, checked = load_arrays(file, "")
        meta = parsed(a.pop("meta").tobytes().decode())
        if meta["format"] not in FORMATS or checked != (meta["format"] == FORMAT):
            return None
        found = cached_index(file.parent, meta, a)
        if not checked:
            print(f"{file} has no checksum: an older version wrote it. It is used as it is", file=sys.stderr)
            if os.access(file.parent, os.W_OK):
                write_cached(found, file)
        return found
    except FileNotFoundError:
        return None
    except (Damaged, StorageError, KeyError, ValueError, TypeError, AttributeError) as error:
        why = error.why if isinstance(error, Damaged) else error
        print(f"{file} is damaged ({why}): it is made again", file=sys.stderr)
        return None


def cached_index(folder: Path, meta: dict[str, Any], a: dict[str, NDArray[Any]]) -> CachedIndex:
    """Raises KeyError, ValueError or TypeError for what is no index."""
    shards = tuple((name, size) for name, size in meta.get("shards", ()))
    columns: Any = {name: a[name] for name in ARRAYS}
    index = Index(
        folder=folder,
        classes=tuple(meta["classes"]),
        text=a["text"].tobytes(),
        shards=tuple(name for name, _ in shards),
        places=a.get("places"),
        checksums=a.get("checksums"),
        **columns,
    )
    directories = tuple((path, mtime_ns, images) for path, mtime_ns, images in meta.get("directories", ()))
    scanned_ns, labels = meta.get("scanned_ns", 0), meta.get("labels", 0)
    return CachedIndex(index, directories, scanned_ns, shards, meta.get("passed"), labels)


def write_cached(cached: CachedIndex, file: Path) -> None:
    """Write by rename, into a folder that is there: one that was unmounted meanwhile is not made anew on the disk below.
    Where that fails, say so: without the file the next start scans again."""
    index = cached.index
    meta = {"format": FORMAT, "classes": index.classes, "passed": cached.passed}
    if cached.shards:
        meta |= {"shards": cached.shards}
    else:
        meta |= {"directories": cached.directories, "scanned_ns": cached.scanned_ns, "labels": cached.labels}
    joined = {"meta": json.dumps(meta).encode(), "text": index.text}
    arrays: dict[str, Any] = {name: np.frombuffer(data, np.uint8) for name, data in joined.items()}
    arrays |= {name: getattr(index, name) for name in ARRAYS}
    optional = {"places": index.places, "checksums": index.checksums}
    arrays |= {name: found for name, found in optional.items() if found is not None}
    try:
        save_arrays(file, arrays)
        owners.close_to_others(file)
    except OSError as error:
        print(
            f"the index of {index.folder} is not kept, and the next start reads the headers again: {file.parent}: "
            f"{error.strerror}. Accepted: data.cache=DIR, or FIXRES_CACHE=DIR, that can be written",
            file=sys.stderr,
        )
