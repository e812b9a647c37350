"""Lists of labels for images that stand in no class folders: ImageNet's val as it is distributed, Tiny-ImageNet, CSV files."""

from __future__ import annotations

import csv
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import lines_of
from fixres_dist.base.small_files import read_bytes

SYNSETS = "map_clsloc.txt"  # of ImageNet's devkit: lines of WordNet id, the devkit's number, words
META = "meta.mat"  # the same in the devkit of 2012
COMPRESSED = 15  # of MATLAB's types
LARGEST_TABLE = 1 << 26  # bytes of meta.mat, packed or not: the real one has 1 MB
BOX = re.compile(r"(n\d{8})( \d+){4}")  # LOC_val_solution.csv: the class, and its boxes


def read(path: Path, images: Sequence[str]) -> tuple[list[str], Counter[str]]:
    """The label of each image (a path below its split) as the list `path` has it, "" for none; what was passed over.

    A line is `name label`, with blanks, a tab, comma or semicolon between; or a label alone, in the order of the sorted
    file names. Labels are class names, or numbers that count from 0 in the order of the class folders. The devkit's numbers
    count from 1 in an order of their own, which map_clsloc.txt or meta.mat beside them translates. Raises UserError.
    """
    try:
        rows = [fields(line) for line in lines_of(path)]
    except OSError as error:
        raise UserError(
            f"data.labels is {str(path)!r}: {error.strerror}. Accepted: a file of `name label` lines."
        ) from None
    passed: Counter[str] = Counter()
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise UserError(
                f"{path} has {len(rows)} labels without names, and there are {len(images)} images. "
                "Accepted: a label for each, in the order of the file names; or lines of `name label`."
            )
        labels = [row[0] for row in rows]
        found = dict(zip(sorted(images, key=os.path.basename), labels, strict=True))
    else:
        given = by_name(path, rows)
        found, used = matched(path, given, images)
        if not found:
            raise UserError(
                f"{path} names none of the {len(images)} images, such as {images[0] if images else '-'}; its first line is "
                f"{' '.join(rows[0])!r}. Accepted: lines of `name label`."
            )
        passed["image(s) without a label"] = len(images) - len(found)
        passed["label(s) without an image"] = len(given) - len(used) - (next(iter(given)) not in used)  # a table's head
    if all(label.isdecimal() for label in found.values()):
        found = numbered(path, found)
    return [found.get(image, "") for image in images], +passed


def by_name(path: Path, rows: Sequence[Sequence[str]]) -> dict[str, str]:
    """The label of each name in the list. Raises UserError for a name with two."""
    given: dict[str, str] = {}
    for row in rows:
        if len(row) > 1:
            name = row[0].replace("\\", "/").removeprefix("./")
            if given.setdefault(name, row[1]) != row[1]:
                raise UserError(
                    f"{path} gives {name!r} two labels, {given[name]!r} and {row[1]!r}. Accepted: one for each image."
                )
    return given


def matched(path: Path, given: Mapping[str, str], images: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """The label of each image, under its path below the split, that with folders before it, its file name or that without its
    ending; and the names that were used. Raises UserError for a name without folders that is that of several images or lines.
    """
    files = Counter(name.rpartition("/")[2] for name in given)
    by_file = {name.rpartition("/")[2]: name for name in given if files[name.rpartition("/")[2]] == 1}
    longer = [name for name in given if files[name.rpartition("/")[2]] > 1]
    by_end = {end: name for name in longer for end in ends(name)}
    found: dict[str, str] = {}
    used: dict[str, str] = {}
    for image in images:
        file = image.rpartition("/")[2]
        stem = os.path.splitext(file)[0]
        name = next((n for n in (image, by_end.get(image), by_file.get(file), by_file.get(stem)) if n in given), None)
        if name is None and max(files[file], files[stem]) > 1:
            raise ambiguous(path, file, f"several lines, and none is {image!r}")
        if name is not None:
            if (other := used.setdefault(name, image)) != image:
                raise ambiguous(path, file, f"{other!r} and {image!r}")
            found[image] = given[name]
    return found, set(used)


def ambiguous(path: Path, file: str, what: str) -> UserError:
    return UserError(
        f"{path} has {file!r} for {what}. Accepted: where file names stand twice, a line for each with its path below the split."
    )


def ends(name: str) -> Iterator[str]:
    """`a/b/c.jpg`, `b/c.jpg`, `c.jpg`."""
    while name:
        yield name
        name = name.partition("/")[2]


def fields(line: str) -> list[str]:
    """Name and label of a line, or its label alone."""
    if mark := next((mark for mark in "\t,;" if mark in line), None):
        cells = line.split(mark) if mark == "\t" else next(csv.reader([line], delimiter=mark, skipinitialspace=True))
        cells = [cell.strip().strip("\"'") for cell in cells]
        cells[1] = box[1] if (box := BOX.match(cells[1])) else cells[1]
        return cells[:2]
    return [part.strip("\"'") for part in line.rsplit(None, 1)]


def numbered(path: Path, found: dict[str, str]) -> dict[str, str]:
    """Numbers as class names: the devkit's by its own table, others without leading zeros. Raises UserError for numbers
    that do not begin at 0 and have no table."""
    numbers = {image: int(label) for image, label in found.items()}
    if table := next((path.with_name(name) for name in (SYNSETS, META) if path.with_name(name).is_file()), None):
        names = synsets(table)
        if unknown := set(numbers.values()) - set(names):
            raise UserError(f"{path} has number {min(unknown)}, which {table} does not have.")
        return {image: names[number] for image, number in numbers.items()}
    if numbers and min(numbers.values()) != 0:
        raise UserError(
            f"{path} has numbers from {min(numbers.values())} to {max(numbers.values())}. Accepted: numbers from 0 in the order "
            "of the class folders, or class names that are not all numbers. ImageNet's devkit counts from 1 in an order of its "
            f"own: put its {SYNSETS} or {META} beside the list, or take LOC_val_solution.csv."
        )
    return {image: str(number) for image, number in numbers.items()}


def synsets(table: Path) -> dict[int, str]:
    """The WordNet ids of the devkit's numbers. In meta.mat (MATLAB 5), a table sorted by number, they are the only texts of
    their form."""
    if table.name == SYNSETS:
        rows = (line.split() for line in table.read_text().splitlines())
        return {int(row[1]): row[0] for row in rows if len(row) > 1}
    data, at, text = read_bytes(table, LARGEST_TABLE), 128, b""
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        part = data[at + 8 : at + 8 + size]
        text += zlib.decompressobj().decompress(part, LARGEST_TABLE) if kind == COMPRESSED else part
        at += 8 + size
    found = (name.replace(b"\0", b"").decode() for name in re.findall(rb"n\0{0,3}(?:[0-9]\0{0,3}){8}", text))
    return dict(enumerate(dict.fromkeys(found), start=1))
