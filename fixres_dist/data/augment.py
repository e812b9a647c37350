"""RandAugment by timm, whose draws come from two global generators, as a function of a picture and a seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment, rand_augment_transform

from fixres_dist.data.geometry import Augment


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, Python's and numpy's global generators start from `seed`; after it they go on as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@cache
def transform(config: str, fill: tuple[int, int, int], res: int) -> RandAugment:
    """As timm's create_transform makes it for pictures of `res` px."""
    made = rand_augment_transform(config, {"translate_const": int(res * 0.45), "img_mean": fill})
    for operation in made.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return made


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's, which asks for 0 bits at its highest strength: black, as Pillow drew it before a version that refuses that."""
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def apply(canvas: torch.Tensor, how: Augment) -> None:
    """Augment uint8 [3, res, res], channels last in memory, in place."""
    pixels = canvas.permute(1, 2, 0).numpy()
    with seeded(how.seed):
        pixels[:] = np.asarray(transform(how.config, how.fill, canvas.shape[-1])(Image.fromarray(pixels)))
