"""The images below a folder, in torchvision's order, and the classes that the folders are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from fixres_dist.base.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list


def directories(folder: Path) -> list[Path]:
    """`folder` and every directory below it, links followed; a link back to a directory above it is not."""
    found: list[Path] = []

    def visit(path: Path, above: frozenset[tuple[int, int]]) -> None:
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        found.append(path)
        with os.scandir(path) as entries:
            below = [
                e.path for e in entries if e.is_dir(follow_symlinks=False) or (e.is_symlink() and os.path.isdir(e.path))
            ]
        for sub in below:
            visit(Path(sub), above | {here})

    parents = [os.stat(p) for p in folder.resolve().parents]
    visit(folder, frozenset((p.st_dev, p.st_ino) for p in parents))
    return sorted(found, key=str)


def image_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            e.name for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.is_dir(follow_symlinks=False)
        )


def walk(folder: Path) -> Iterator[Path]:
    """The images below a class folder, in torchvision's order."""
    for base in directories(folder):
        yield from (base / name for name in image_names(base))


def class_names(folder: Path) -> list[str]:
    """One per subfolder, sorted; of a folder of shards, what stands beside them."""
    listed = folder / "classes.json"
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
