"""Small data sets, written as people have them: a folder of JPEG files per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(root: Path, train: int, val: int, classes: tuple[str, ...] = ("ash", "birch", "cedar")) -> Path:
    """An ImageFolder of JPEGs of mixed sizes; `train` and `val` images a class. The class shows in the mean colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(70, 190, 2)
                pixels = rng.integers(0, 190, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
                pixels[..., label % 3] += 60
                image = Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{i:03d}.jpg", quality=90)
    return root


def age(folder: Path) -> None:
    """Give every directory an old time stamp, as a data set has that was not written just now."""
    for base, _, _ in os.walk(folder):
        os.utime(base, (1e9, 1e9))


@contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def open_to_all(path: Path) -> None:
    """Let any user in, up to the first directory that already does."""
    for parent in (path, *path.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o055)
