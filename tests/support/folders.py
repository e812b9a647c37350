"""Small data sets, written as people have them: a folder of JPEG files per class."""

from __future__ import annotations

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
