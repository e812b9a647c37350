"""What is in a tar: its images with their labels, from the headers and the label files. A header has a checksum; what it
describes has none, so `shards.load` compares it with what is known of the tar. No torch."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import parsed
from fixres_dist.data.layout import hidden, is_image

MOST_CLASSES = 1 << 24
LARGEST_LABEL = 1 << 20  # bytes of a member that is read to find a label: JSON with a picture's captions fits


def key_of(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file name; dots that it begins with are part of it."""
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.lstrip(".").partition(".")
    return f"{folder}{slash}{file[: len(file) - len(file.lstrip('.'))]}{stem}" if dot else name


def label_name(name: str) -> str:
    """Where WebDataset has the label of the image `name`."""
    return f"{key_of(name)}.cls"


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


def read_members(shard: Path, number: int, passed: Counter[str] | None = None) -> list[Member]:
    """Every image in a shard, from the tar's headers and the label files; raises UserError.

    Where a sample has one label (0.cls), a picture under its name (0.png) and more of them (0.mask.png), these are counted
    in `passed`. `data shard` writes a label for each picture, whatever dots are in its name.
    """
    images: list[tuple[str, int, int]] = []  # name, first byte, bytes
    labels: dict[str, int | str] = {}
    written: Counter[str] = Counter()  # label files of each name
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
                        written[stem] += 1
            check_kinds(shard, labels)
            check_end(file, tar.offset)
    except OSError as error:
        raise UserError(
            f"cannot read {shard}: {error.strerror or error}. Accepted: a file this user may read."
        ) from None
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"shard {shard} is torn or no tar: {error}. Next: remove it, and run the same `data shard` command again."
        ) from None
    return list(members(shard, number, images, labels, written, Counter() if passed is None else passed))


def members(
    shard: Path,
    number: int,
    images: Sequence[tuple[str, int, int]],
    labels: dict[str, int | str],
    written: Counter[str],
    passed: Counter[str],
) -> Iterator[Member]:
    """The images (name, first byte, bytes) with their labels, as read_members has them."""
    plain = {os.path.splitext(name)[0] for name, *_ in images}
    pictures = Counter(key_of(name) for name, *_ in images)
    for name, first, size in images:
        stem, key = os.path.splitext(name)[0], key_of(name)
        if stem not in labels and key in labels and key in plain and written[key] < pictures[key]:
            passed[f"second picture(s) of a sample ({name.removeprefix(key)})"] += 1
        else:
            yield image_of(shard, name, (number, first, size), labels)


def check_kinds(shard: Path, labels: dict[str, int | str]) -> None:
    """Raises UserError for labels of which some are numbers and others names."""
    if len({type(label) for label in labels.values()}) > 1:
        by_number, by_name = (next(k for k, v in labels.items() if isinstance(v, t)) for t in (int, str))
        raise UserError(
            f"the labels of {shard} are numbers for some pictures ({by_number!r}: {labels[by_number]}) and names for others "
            f"({by_name!r}: {labels[by_name]!r}). Accepted: the one or the other. Next: write it again with `data shard`, from "
            "class folders of these names."
        )


def check_end(file: BinaryIO, end: int) -> None:
    """Raises ReadError unless nothing but zeros, the end mark and its padding, follow at `end`, behind the last member that
    tarfile has found: it takes a damaged header for the end, and zeros over one too."""
    file.seek(end)
    if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"the header or the end mark at byte {end:,} is damaged or missing")
    while data := file.read(1 << 16):
        if data.strip(b"\0"):
            raise tarfile.ReadError(f"something follows the end mark at byte {end:,}")


def image_of(shard: Path, name: str, place: tuple[int, int, int], labels: dict[str, int | str]) -> Member:
    """The image `name` with its label, which stands under its name without the extension, or up to the first dot."""
    keys = (os.path.splitext(name)[0], key_of(name))
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
