"""The index of a folder of images, one subfolder per class; headers are read again where a directory changed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.errors import UserError
from fixres_dist.data.headers import read_headers
from fixres_dist.data.index import CachedIndex, Index, read_cached, write_cached
from fixres_dist.data.progress import Progress

CLASSES = "classes.json"  # class names in the labels' order, beside shards
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
TICK_NS = 2_000_000_000  # the coarsest time stamps of file systems in use


class Directory(NamedTuple):
    path: Path
    mtime_ns: int  # before it was listed
    images: list[str]  # file names, sorted


def directories(folder: Path) -> list[Directory]:
    """`folder` and every directory below it, in torchvision's order. Links are followed unless they lead back to a
    directory above them. Raises OSError."""
    found: list[Directory] = []

    def visit(path: Path, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            return
        below, images = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    below.append(entry.path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
        found.append(Directory(path, status.st_mtime_ns, sorted(images)))
        for directory in below:
            visit(Path(directory), above | {identity})

    parents = [os.stat(p) for p in folder.resolve().parents]
    visit(folder, frozenset((p.st_dev, p.st_ino) for p in parents))
    return sorted(found, key=lambda directory: str(directory.path))


def count(folder: Path) -> int:
    """The images below a class folder."""
    return sum(len(directory.images) for directory in directories(folder))


def class_names(folder: Path) -> list[str]:
    """The subfolders of a split, sorted; of shards, the names in the classes.json beside them. Raises UserError for
    another classes.json."""
    listed = folder / CLASSES
    if listed.is_file():
        try:
            names = json.loads(listed.read_bytes())
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f'{listed} is no list of class names. Accepted: such as ["ash", "birch"], in the labels\' order.'
            )
        return names
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def load(folder: Path, file: Path, progress: Progress | None = None, fresh: bool = False) -> Index:
    """The index of a split's class folders, from the cached `file` if no directory has changed since it was written.

    Only the headers in changed directories are read again; with `fresh` all of them, since a file that was replaced in
    place does not change its directory. Unreadable headers have size 0, 0. Raises UserError for a folder that cannot be
    listed.
    """
    cached = None if fresh else read_cached(file)
    known = unchanged(folder, cached) if cached else {}
    try:
        if cached and known and len(known) == len(cached.directories):
            return replace(cached.index, folder=folder)
        found = scan(folder, cached.index if cached else None, known, progress)
    except OSError as error:
        raise UserError(
            f"cannot list {error.filename}: {error.strerror}. Accepted: a directory this user may read."
        ) from None
    write_cached(found, file)
    return found.index


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


def modified_ns(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def scan(
    folder: Path, cached: Index | None, known: dict[str, tuple[int, int]], progress: Progress | None
) -> CachedIndex:
    """List the folder, and read the headers in all directories but the `known` ones, whose samples `cached` has."""
    scanned_ns = time.time_ns()
    classes = class_names(folder)
    listed = [(".", os.stat(folder).st_mtime_ns, 0)]
    labels: list[int] = []
    names: list[bytes] = []
    origins: list[NDArray[np.int64]] = [np.empty(0, np.int64)]  # each sample's number in `cached`, -1 for none
    for label, name in enumerate(classes):
        for directory in directories(folder / name):
            path, images = str(directory.path.relative_to(folder)), len(directory.images)
            names += [os.fsencode(f"{path}/{file}") for file in directory.images]
            labels += [label] * images
            start, stop = known.get(path, (0, -1))
            origins.append(np.arange(start, stop) if stop - start == images else np.full(images, -1))
            listed.append((path, directory.mtime_ns, images))
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    sizes, marks = np.zeros((len(names), 2), np.int32), np.zeros(len(names), np.uint32)
    origin = np.concatenate(origins)
    old = origin >= 0
    if cached:
        sizes[old], marks[old] = cached.sizes[origin[old]], cached.marks[origin[old]]
    index = Index(folder, tuple(classes), b"".join(names), ends, np.array(labels, np.int32), sizes, marks)
    index, _ = read_headers(index, np.flatnonzero(~old), progress)
    return CachedIndex(index, tuple(listed), scanned_ns)
