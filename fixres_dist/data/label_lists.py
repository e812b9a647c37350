"""Lists of labels for images that stand in no class folders: ImageNet's val as it is distributed, Tiny-ImageNet, CSV files."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
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
        given = {row[0].replace("\\", "/").removeprefix("./"): row[1] for row in rows if len(row) > 1}
        by_file = {name.rpartition("/")[2]: name for name in given}
        found, used = {}, set()
        for image in images:
            file = image.rpartition("/")[2]
            keys = (image, by_file.get(file), by_file.get(os.path.splitext(file)[0]))
            if key := next((key for key in keys if key in given), None):
                found[image] = given[key]
                used.add(key)
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


def fields(line: str) -> list[str]:
    """Name and label of a line, or its label alone."""
    if mark := next((mark for mark in "\t,;" if mark in line), None):
        cells = [cell.strip().strip("\"'") for cell in line.split(mark)]
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
            f"of the class folders, or class names. ImageNet's devkit counts from 1 in an order of its own: put its {SYNSETS} "
            f"or {META} beside the list, or take LOC_val_solution.csv."
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
