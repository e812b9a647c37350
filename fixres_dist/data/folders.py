"""The index of a split of image files, in class folders or beside a list of labels; headers are read again where a
directory changed."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.errors import UserError
from fixres_dist.data import label_lists
from fixres_dist.data.headers import read_headers, same_first_bytes
from fixres_dist.data.index import CachedIndex, Index, may_tell, read_cached, write_cached
from fixres_dist.data.layout import Place, class_folders, hidden, is_image, kind
from fixres_dist.data.progress import Progress

TICK_NS = 2_000_000_000  # the coarsest time stamps of file systems in use
PROBES = 64  # directories that are listed to recognise a cached split


class Directory(NamedTuple):
    path: str  # below the split's folder
    mtime_ns: int  # before it was listed
    images: list[str]  # file names, sorted
    labels: Sequence[int]  # of the images

    @property
    def names(self) -> list[str]:
        """The images' names in the index."""
        below = "" if self.path == "." else f"{self.path}/"
        return [below + file for file in self.images]


class Listing(NamedTuple):
    """What names tell of a split; nothing is opened."""

    classes: tuple[str, ...]
    directories: list[Directory]
    passed: Counter[str]  # what is no sample, by kind

    def names(self) -> list[str]:
        return [name for directory in self.directories for name in directory.names]


def walk(folder: Path, below: str, passed: Counter[str]) -> list[Directory]:
    """The directory `below` in `folder`, and every one in it, in torchvision's order; what is passed over is counted.

    Links are followed unless they lead back to a directory above them. Raises OSError.
    """
    found: list[Directory] = []

    def visit(path: str, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        directories, images = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    if hidden(entry.name):
                        passed[f"{entry.name}/"] += 1
                    else:
                        directories.append(entry.path)
                elif is_image(entry.name) and not hidden(entry.name):
                    images.append(entry.name)
                else:
                    passed[kind(entry.name)] += 1
        found.append(Directory(os.path.relpath(path, folder), status.st_mtime_ns, sorted(images), ()))
        for directory in directories:
            visit(directory, above | {identity})

    parents = [os.stat(p) for p in (folder / below).resolve().parents]
    visit(str(folder / below), frozenset((p.st_dev, p.st_ino) for p in parents))
    return sorted(found, key=lambda directory: str(folder / directory.path))


def listing(place: Place) -> Listing:
    """Raises UserError for a folder that cannot be listed, and for a list of labels that does not fit."""
    passed: Counter[str] = Counter()
    try:
        return labelled(place, place.labels, passed) if place.labels else in_classes(place.folder, passed)
    except OSError as error:
        raise UserError(
            f"cannot list {error.filename}: {error.strerror}. Accepted: a directory this user may read."
        ) from None


def in_classes(folder: Path, passed: Counter[str]) -> Listing:
    root = Directory(".", os.stat(folder).st_mtime_ns, [], ())
    classes = class_folders(folder)
    on_disk = set(classes.values())
    for entry in os.scandir(folder):
        if entry.name not in on_disk:
            beside = is_image(entry.name) and not hidden(entry.name)
            passed["image(s) beside the class folders" if beside else name_of(entry)] += 1
    found = [root]
    for label, name in enumerate(classes.values()):
        found += [one._replace(labels=[label] * len(one.images)) for one in walk(folder, name, passed)]
    return Listing(tuple(classes), found, passed)


def name_of(entry: os.DirEntry[str]) -> str:
    return f"{entry.name}/" if entry.is_dir() else kind(entry.name)


def labelled(place: Place, labels: Path, passed: Counter[str]) -> Listing:
    """Images without class folders: the classes are the names in the list, sorted, or the numbers up to the largest."""
    found = walk(place.folder, ".", passed)
    if labels.parent == place.folder:
        passed[kind(labels.name)] -= 1
    given, more = label_lists.read(labels, [name for one in found for name in one.names])
    names = sorted({label for label in given if label})
    if names and all(name.isdecimal() for name in names):
        names = list(map(str, range(max(map(int, names)) + 1)))
    number = {name: k for k, name in enumerate(names)}
    rest, directories = iter(given), []
    for one in found:
        pairs = [(file, number[label]) for file, label in zip(one.images, rest, strict=False) if label]
        directories.append(one._replace(images=[file for file, _ in pairs], labels=[k for _, k in pairs]))
    return Listing(tuple(names), directories, +(passed + more))


def crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            crc = zlib.crc32(data, crc)
    return crc


def load(
    place: Place, file: Path, progress: Progress | None = None, fresh: bool = False, checksums: bool = False
) -> Index:
    """The index of a split, from the cached `file` if nothing has changed since it was written.

    Only the headers in changed directories are read again; with `fresh` all of them, since a file that was replaced in
    place does not change its directory. Unreadable headers have size 0, 0. Raises UserError for a folder that cannot be
    listed, and for a list of labels that does not fit. `checksums`: of whole files, which are then read whole; an index that
    has them keeps them up.
    """
    folder = place.folder
    cached = read_cached(file) if not fresh and may_tell(file, folder) else None
    if cached and checksums and cached.index.checksums is None:
        cached = None
    crc = crc_of(place.labels) if place.labels and place.labels.is_file() else 0
    known = unchanged(folder, cached) if cached and cached.labels == crc else {}
    if cached and not looks_the_same(folder, cached, known):
        known = {}
    if cached and known and len(known) == len(cached.directories) and cached.passed is not None:
        return replace(cached.index, folder=folder)
    scanned_ns, listed = time.time_ns(), listing(place)
    index = scan(folder, listed, cached.index if cached else None, known, progress, checksums)
    directories = tuple((one.path, one.mtime_ns, len(one.images)) for one in listed.directories)
    write_cached(CachedIndex(index, directories, scanned_ns, passed=dict(listed.passed), labels=crc), file)
    return index


def unchanged(folder: Path, cached: CachedIndex) -> dict[str, tuple[int, int]]:
    """The directories that have not changed since the scan: their samples [start, stop) in the cached index.

    A directory that was modified within a tick of the scan counts as changed: it may hold a file that the scan did not
    see.
    """
    found, start = {}, 0
    for path, mtime_ns, images in cached.directories:
        if modified_ns(folder / path) == mtime_ns <= cached.scanned_ns - TICK_NS:
            found[path] = (start, start + images)
        start += images
    return found


def looks_the_same(folder: Path, cached: CachedIndex, known: dict[str, tuple[int, int]]) -> bool:
    """Whether directories and files, spread over the `known` ones, have the names and first bytes that they had.

    Time stamps alone do not tell another data set at the same place: squashfs and docker images are built with one time,
    and rsync sets times. A single change shows in its directory's time; this is for a data set that was exchanged.
    """
    index = replace(cached.index, folder=folder)
    for path in list(known)[:: max(1, len(known) // PROBES)]:
        try:
            found = os.listdir(folder / path)
            if path == "." and not cached.labels:
                if tuple(class_folders(folder)) != index.classes:
                    return False
                continue
        except OSError:
            return False
        images = sorted(file for file in found if is_image(file) and not hidden(file))
        if not cached.labels and Directory(path, 0, images, ()).names != [
            index.name(sample) for sample in range(*known[path])
        ]:
            return False
    return same_first_bytes(
        index, np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in known.values())])
    )


def modified_ns(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def scan(
    folder: Path,
    listed: Listing,
    cached: Index | None,
    known: dict[str, tuple[int, int]],
    progress: Progress | None,
    whole: bool = False,
) -> Index:
    """The index of the listed files. Read the headers in all directories but the `known` ones, whose samples `cached` has."""
    labels: list[int] = []
    names: list[bytes] = []
    origins: list[NDArray[np.int64]] = [np.empty(0, np.int64)]  # each sample's number in `cached`, -1 for none
    for one in listed.directories:
        images = len(one.images)
        names += [os.fsencode(name) for name in one.names]
        labels += one.labels
        start, stop = known.get(one.path, (0, -1))
        origins.append(np.arange(start, stop) if stop - start == images else np.full(images, -1))
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    sizes, marks = np.zeros((len(names), 2), np.int32), np.zeros(len(names), np.uint32)
    whole = whole or (cached is not None and cached.checksums is not None)
    checksums = np.zeros(len(names), np.uint32) if whole else None
    origin = np.concatenate(origins)
    old = origin >= 0
    if cached:
        sizes[old], marks[old] = cached.sizes[origin[old]], cached.marks[origin[old]]
    if cached and cached.checksums is not None and checksums is not None:
        checksums[old] = cached.checksums[origin[old]]
    text, numbers = b"".join(names), np.array(labels, np.int32)
    index = Index(folder, listed.classes, text, ends, numbers, sizes, marks, checksums=checksums)
    return read_headers(index, np.flatnonzero(~old), progress)[0]
