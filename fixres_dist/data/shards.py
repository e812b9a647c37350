"""Tar shards in WebDataset layout: fewer, larger files for shared file systems, with random access to each sample.

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
from typing import NamedTuple

import numpy as np

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import sweep, whole, write_text
from fixres_dist.base.small_files import parsed
from fixres_dist.data import order
from fixres_dist.data.folders import modified_ns
from fixres_dist.data.headers import read_headers, same_first_bytes
from fixres_dist.data.index import CachedIndex, Index, may_tell, open_shard, read_cached, write_cached
from fixres_dist.data.layout import CLASSES, Place, class_names, hidden, is_image
from fixres_dist.data.progress import Progress

INDEX = "index.npz"  # the cached index that is written beside the shards
MOST_CLASSES = 1 << 24
LARGEST_LABEL = 1 << 20  # bytes of a member that is read to find a label: JSON with a picture's captions fits


def write_shards(index: Index, out: Path, samples_per_shard: int, progress: Progress | None = None) -> int:
    """Write `index` as shards and their index into `out`; returns how many shards were missing. Safe to run again.

    Which sample goes into which shard is a function of the sample list alone, and a shard is there in full or not at
    all, so a second run goes on where the first one stopped. Samples are mixed over the shards, for readers that
    shuffle only within a buffer. Raises UserError where `out` holds shards of something else, or a file cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    mark, plan = out / ".source", f"{index.fingerprint} {samples_per_shard}\n"
    if mark.exists() and mark.read_text() != plan:
        raise UserError(
            f"{out} holds shards of another data set or of another size. Next: give another --out, or remove it."
        )
    if not mark.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not written by this command. Next: give another --out.")
    sweep(out, age_s=0)  # of a start that was killed
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
    tars = tuple(sorted(path.name for path in out.glob("*.tar")))
    if load(Place(out, tars), out / INDEX, fresh=True).fingerprint != index.fingerprint:
        raise UserError(
            f"{out} does not hold the samples of {index.folder}: a file has changed since it was indexed. "
            f"Next: remove {out}, {command('data', 'index', '--data', index.folder.parent, '--fresh')}, "
            "and the same command again."
        )
    return made


def write_tar(index: Index, samples: list[int], shard: Path) -> None:
    with whole(shard) as part, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
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


def label_name(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name; dots that it begins with are part of it."""
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.lstrip(".").partition(".")
    return f"{folder}{slash}{file[: len(file) - len(file.lstrip('.'))]}{stem}.cls" if dot else f"{name}.cls"


def load(place: Place, file: Path, progress: Progress | None = None, fresh: bool = False) -> Index:
    """The index of a split's shards: the cached `file`, the index beside the shards, or, if neither fits the shards and the
    class names, and always with `fresh`, a new one. Raises UserError for a shard that cannot be read."""
    folder, tars = place.folder, [place.folder / name for name in place.shards]
    sizes = tuple((path.name, path.stat().st_size) for path in tars)
    written = max(modified_ns(path) or 0 for path in (*tars, folder / CLASSES))
    open_shard.cache_clear()  # a shard may have been replaced by another file
    for candidate in () if fresh else (file, folder / INDEX):
        cached = read_cached(candidate) if may_tell(candidate, folder) else None
        if cached and cached.shards == sizes and (modified_ns(candidate) or 0) >= written:
            index = replace(cached.index, folder=folder)
            if same_first_bytes(index, np.arange(len(index))):
                return index
    index = listed(folder, tars)
    index, _ = read_headers(index, np.arange(len(index)), progress)
    write_cached(CachedIndex(index, shards=sizes), file)
    return index


def listed(folder: Path, shards: list[Path]) -> Index:
    """The index as far as the tables of contents tell: without sizes and marks."""
    members = [member for number, shard in enumerate(shards) for member in read_members(shard, number)]
    if len({(member.directory, member.file) for member in members}) < len(members):  # each shard counts from zero
        members = [m._replace(directory=f"{shards[m.place[0]].stem}/{m.directory}".rstrip("/")) for m in members]
    words = sorted({str(member.label) for member in members})
    classes = class_names(folder) if (folder / CLASSES).is_file() else words
    if all(isinstance(member.label, int) for member in members):
        numbers = range(max((int(member.label) for member in members), default=-1) + 1)
        classes = classes if (folder / CLASSES).is_file() else list(map(str, numbers))
        if len(numbers) > len(classes):
            raise UserError(
                f"{folder} has label {numbers[-1]} and {len(classes)} classes in {CLASSES}. "
                f"Accepted: 0 to {len(classes) - 1}."
            )
    elif unknown := sorted(set(words) - set(classes)):
        raise UserError(f"{folder} has label {unknown[0]!r}, which {CLASSES} does not name. Accepted: its names.")
    else:
        number = {name: k for k, name in enumerate(classes)}
        members = [member._replace(label=number[str(member.label)]) for member in members]
    members.sort()
    names = [os.fsencode(member.name) for member in members]
    if len(set(names)) < len(names):
        raise UserError(f"a name stands twice in a shard of {folder}. Next: write them again with `data shard`.")
    return Index(
        folder,
        tuple(classes),
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        labels=np.array([member.label for member in members], np.int32),
        sizes=np.zeros((len(names), 2), np.int32),
        marks=np.zeros(len(names), np.uint32),
        shards=tuple(shard.name for shard in shards),
        places=np.array([member.place for member in members], np.int64).reshape(-1, 3),
    )


class Member(NamedTuple):
    """An image in a shard; they sort as the files of an ImageFolder do."""

    label: int | str  # a number, or a class name
    directory: str
    file: str
    place: tuple[int, int, int]  # number of the shard, first byte in it, length in bytes

    @property
    def name(self) -> str:
        return f"{self.directory}/{self.file}" if self.directory else self.file


class Entry(tarfile.TarInfo):
    """A tar's header, which is not read where it says that its own name or settings take a gigabyte."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        long = (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if self.type in long and self.size > LARGEST_LABEL:
            raise UserError(
                f"{os.fsdecode(tar.name or '')} has a header of {self.size:,} bytes. Accepted: {LARGEST_LABEL:,}."
            )
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def read_members(shard: Path, number: int) -> list[Member]:
    """Every image in a shard, from the tar's headers and the label files; raises UserError."""
    images: list[tuple[str, int, int]] = []  # name, first byte, bytes
    labels: dict[str, int | str] = {}
    try:
        with tarfile.open(shard, "r:", tarinfo=Entry) as tar, open(shard, "rb") as file:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # of a million members the headers are a gigabyte
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(
                        f"{shard} holds {member.name!r}, which points outside. Accepted: names below the shard."
                    )
                if member.isdir() or any(map(hidden, path.parts[:-1])) or path.name.startswith("._"):
                    continue  # what macOS packs beside the files
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{shard} holds {member.name!r}, a link, device or sparse file. Accepted: regular files."
                    )
                name = str(path)  # `tar -C folder .` writes ./class/file
                stem, kind = os.path.splitext(name)
                if is_image(name):
                    images.append((name, member.offset_data, member.size))
                elif kind in (".cls", ".json"):
                    if member.size > LARGEST_LABEL:
                        raise UserError(
                            f"{shard} holds the label {name!r} of {member.size:,} bytes. Accepted: {LARGEST_LABEL:,}."
                        )
                    file.seek(member.offset_data)
                    label = label_of(kind, file.read(member.size))
                    if isinstance(label, int) and not 0 <= label < MOST_CLASSES:
                        raise UserError(f"{shard} holds label {label} in {name!r}. Accepted: 0 to {MOST_CLASSES - 1}.")
                    if label is not None and (kind == ".cls" or stem not in labels):
                        labels[stem] = label
            if len({type(label) for label in labels.values()}) > 1:
                raise ValueError("some labels are numbers, others names")
            file.seek(max(0, shard.stat().st_size - 1024))
            if file.read() != bytes(1024):
                raise tarfile.ReadError("the end mark is missing")
    except OSError as error:
        raise UserError(
            f"cannot read {shard}: {error.strerror or error}. Accepted: a file this user may read."
        ) from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"shard {shard} is torn or no tar: {error}. Next: remove it, and run the same `data shard` command again."
        ) from None
    return [image_of(shard, name, (number, first, size), labels) for name, first, size in images]


def image_of(shard: Path, name: str, place: tuple[int, int, int], labels: dict[str, int | str]) -> Member:
    """The image `name` with its label, which stands under its name without the extension, or up to the first dot."""
    keys = (os.path.splitext(name)[0], label_name(name).removesuffix(".cls"))
    label = next((labels[key] for key in keys if key in labels), None)
    if label is None:
        raise UserError(
            f"{shard} holds {name!r} without its label {label_name(name)!r} (or a .json with `label` or `cls`). "
            "Next: write it again with `data shard`."
        )
    directory, _, base = name.rpartition("/")
    return Member(label, directory, base, place)


def label_of(kind: str, data: bytes) -> int | str | None:
    """The label in a member `.cls` (text) or `.json` (key label or cls): a number or a class name; None: there is none."""
    if kind == ".json":
        values = parsed(data.decode())
        value = next((values[k] for k in ("label", "cls") if k in values), None) if isinstance(values, dict) else None
    else:
        value = data.decode().strip()
    if isinstance(value, str):
        return int(value) if value.lstrip("-").isdecimal() else value
    return value if isinstance(value, int) else None
