"""Tar shards in WebDataset layout: fewer, larger files for shared file systems, with random access, so order stays ours.

A sample is two members, `class/file.JPEG` and `class/file.cls` (its label as text); names, labels and sizes are those
of the folder it was written from. Any WebDataset reader can read the shards; any tar of such pairs can be read here.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import sync, whole, write_text
from fixres_dist.data import order
from fixres_dist.data import scan as folders
from fixres_dist.data.headers import Seen, look_at
from fixres_dist.data.index import Index
from fixres_dist.data.listing import EXTENSIONS, class_names, walk
from fixres_dist.data.scan import Progress

CLASSES, INDEX = "classes.json", "index.npz"
MOST_CLASSES = 1 << 24


def is_sharded(folder: Path) -> bool:
    """Tars, and no class folders that they may have been unpacked to."""
    return any(folder.glob("*.tar")) and (
        (folder / CLASSES).is_file() or not any(path.is_dir() for path in folder.iterdir())
    )


def count(folder: Path) -> int:
    """Images of a split, of folders or of shards; a header is read only where shards have no index yet."""
    if not is_sharded(folder):
        return sum(1 for name in class_names(folder) for _ in walk(folder / name))
    return len(load(folder.parent, folder.name))


def write_shards(index: Index, out: Path, samples_per_shard: int, progress: Progress | None = None) -> int:
    """Write `index` as shards and their index into `out`; returns how many shards were missing. Safe to run again.

    Which sample goes into which shard is a function of the sample list alone, and a shard is there in full or not at
    all, so a second run goes on where the first one stopped. Samples are mixed over the shards, for readers that shuffle
    only within a buffer. Raises UserError where `out` holds shards of something else, or a file cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    mark, plan = out / ".source", f"{index.fingerprint} {samples_per_shard}\n"
    if mark.exists() and mark.read_text() != plan:
        raise UserError(
            f"{out} holds shards of another data set or of another size. Next: give another --out, or remove it."
        )
    if not mark.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not written by this command. Next: give another --out.")
    for left in out.glob(".*.tar.*"):  # of a start that was killed
        left.unlink(missing_ok=True)
    write_text(mark, plan)
    write_text(out / CLASSES, json.dumps(index.classes))
    n, made = len(index), 0
    for number, start in enumerate(range(0, n, samples_per_shard)):
        stop = min(n, start + samples_per_shard)
        shard = out / f"{number:06d}.tar"
        if not shard.exists():
            samples = order.positions_to_samples(n, 0, 0, np.arange(start, stop))
            write_tar(index, samples.tolist(), shard)
            made += 1
        if progress:
            progress(stop, n)
    kept = scan(out, out / INDEX, None)
    if kept.fingerprint != index.fingerprint:
        raise UserError(
            f"{out} does not hold the samples of {index.folder}: a file has changed since it was indexed. Next: remove {out}, "
            f"python -m fixres_dist data index --data {index.folder.parent} --fresh, and the same command again."
        )
    return made


def write_tar(index: Index, samples: list[int], shard: Path) -> None:
    with whole(shard) as part:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
            for sample in samples:
                try:
                    data = index.read(sample).tobytes()
                except OSError as error:
                    raise UserError(
                        f"cannot read {index.where(sample)}: {error.strerror}. Next: the same command again."
                    ) from None
                name = index.name(sample)
                for member, content in ((name, data), (label_name(name), str(int(index.labels[sample])).encode())):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        sync(part)


def label_name(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name; dots that it begins with are part of it."""
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.lstrip(".").partition(".")
    return f"{folder}{slash}{file[: len(file) - len(file.lstrip('.'))]}{stem}.cls" if dot else f"{name}.cls"


def load(
    root: Path, split: str, cache: Path | None = None, progress: Progress | None = None, fresh: bool = False
) -> Index:
    """The index of the shards in `root/split`: the cached one or the one beside them, or made now by reading the tars: if
    `fresh`, or if a shard or the class names were written after it."""
    folder = root / split
    tars = sorted(folder.glob("*.tar"))
    sizes = [[path.name, path.stat().st_size] for path in tars]
    written = max(folders.mtime(path) or 0 for path in (*tars, folder / CLASSES))
    kept = folders.cache_file(folder, cache)
    for candidate in () if fresh else (kept, folder / INDEX):
        cached = folders.read_cached(candidate)
        if cached and cached[1].get("shards") == sizes and (folders.mtime(candidate) or 0) >= written:
            return replace(cached[0], folder=folder)
    return scan(folder, kept, progress)


def scan(folder: Path, kept: Path, progress: Progress | None) -> Index:
    """Read every shard's table of contents and every image's header; keep the result. Raises UserError for a bad shard."""
    shards = sorted(folder.glob("*.tar"))
    rows: list[Row] = []
    for number, shard in enumerate(shards):
        rows += read_tar(shard, number)
        if progress:
            progress(len(rows), max(len(rows), round(len(rows) * len(shards) / (number + 1))))
    rows.sort(key=lambda row: row[:3])  # as an ImageFolder: by class, directory, file name
    names = [os.fsencode(f"{row[1]}/{row[2]}" if row[1] else row[2]) for row in rows]
    labels = np.array([row[0] for row in rows], np.int32)
    if len(set(names)) < len(names):
        raise UserError(f"a name stands twice in the shards of {folder}. Next: write them again with `data shard`.")
    numbers = range(int(labels.max(initial=-1)) + 1)
    classes = tuple(class_names(folder) if (folder / CLASSES).is_file() else map(str, numbers))
    if len(labels) and labels.max() >= len(classes):
        raise UserError(
            f"{folder} has label {labels.max()} and {len(classes)} classes in {CLASSES}. Accepted: 0 to {len(classes) - 1}."
        )
    index = Index(
        folder,
        classes,
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        labels,
        np.array([row[4].size for row in rows], np.int32).reshape(-1, 2),
        np.array([row[4].mark for row in rows], np.uint32),
        tuple(shard.name for shard in shards),
        np.array([row[3] for row in rows], np.int64).reshape(-1, 3),
    )
    folders.keep(index, {"shards": [[shard.name, shard.stat().st_size] for shard in shards]}, kept)
    return index


Row = tuple[int, str, str, tuple[int, int, int], Seen]  # label, directory, file name, place, what its header says


def read_tar(shard: Path, number: int) -> list[Row]:
    """Every image in a shard."""
    images: list[tuple[str, Any]] = []
    labels: dict[str, int] = {}
    rows = []
    try:
        with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(
                        f"{shard} holds {member.name!r}, which points outside. Accepted: names below the shard."
                    )
                if member.isdir():
                    continue
                if not member.isreg():
                    raise UserError(f"{shard} holds {member.name!r}, a link or device. Accepted: regular files.")
                name = str(path)  # `tar -C folder .` writes ./class/file
                if name.lower().endswith(EXTENSIONS):
                    images.append((name, member))
                elif name.endswith(".cls"):
                    file.seek(member.offset_data)
                    labels[name] = int(file.read(member.size))
                    if not 0 <= labels[name] < MOST_CLASSES:
                        raise UserError(
                            f"{shard} holds label {labels[name]} in {name!r}. Accepted: 0 to {MOST_CLASSES - 1}."
                        )
            file.seek(max(0, shard.stat().st_size - 1024))
            if file.read() != bytes(1024):
                raise tarfile.ReadError("the end mark is missing")
            for name, member in images:
                if (key := label_name(name)) not in labels:
                    raise UserError(
                        f"{shard} holds {name!r} without its label {key!r}. Next: write it again with `data shard`."
                    )
                file.seek(member.offset_data)
                seen = look_at(io.BytesIO(file.read(member.size)), member.size)
                directory, _, base = name.rpartition("/")
                rows.append((labels[key], directory, base, (number, member.offset_data, member.size), seen))
    except OSError as error:
        raise UserError(
            f"cannot read {shard}: {error.strerror or error}. Accepted: a file this user may read."
        ) from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"shard {shard} is torn or no tar: {error}. Next: remove it, and run the same `data shard` command again."
        ) from None
    return rows
