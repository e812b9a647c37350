"""Synthetic photographs, as files and as data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photographs(root: Path, count: int) -> Path:
    """`count` JPEGs of ImageNet's usual size in root/val/a, structure at all scales; three in four with halved chroma."""
    folder = root / "val" / "a"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = ((375, 500), (500, 375), (333, 500), (500, 500))[i % 4]
        total = np.zeros((height, width, 3), np.float32)
        for scale in (2, 6, 20, 70):
            coarse = Image.fromarray(rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8))
            total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) * np.float32(scale)
        pixels = (total * (255 / total.max())).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg", quality=90, subsampling=2 if i % 4 else 0)
    return root


def write_data_set(photographs: Path, root: Path, classes: int, images: int) -> Path:
    """A data set of hard links to 64 photographs, written first if need be: `images` in train, one of a class in val."""
    if not photographs.exists():
        write_photographs(photographs, 64)
    files = sorted(photographs.rglob("*.jpg"))
    for split, count in (("train", images), ("val", classes)):
        for i in range(count):
            target = root / split / f"{i % classes:04d}" / f"{i:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(files[i % len(files)])
    return root
