"""Photograph-like JPEGs, and what PIL and torchvision's transforms make of them: the reference for both backends."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from numpy.typing import NDArray
from PIL import Image

from fixres_dist.data import dali, geometry, torch_cpu
from fixres_dist.data.decoding import Batch
from fixres_dist.data.geometry import View
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, Request, make_request

torch.set_num_threads(1)  # as the loader's workers have it
Pixels = NDArray[np.int16]
Backend = Callable[[Index, list[Request], Pictures], list[Batch]]
SIZES = ((375, 500), (500, 375), (333, 500), (500, 500), (151, 203), (640, 427), (300, 911), (701, 260), (1024, 768))


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Structure at all scales, as photographs have it, edges and grain."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for scale in (2, 6, 20, 70):
        coarse = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) * np.float32(
            scale
        )
    total[height // 3 :, : width // 2] *= 0.7
    total += rng.normal(0, 150, total.shape).astype(np.float32)
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def encode(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, **{"format": "JPEG", "quality": 90, **options})
    return out.getvalue()


def write_folder(root: Path, count: int, classes: int = 2) -> Path:
    """`count` JPEGs of mixed sizes, orientations, chroma samplings and EXIF orientations in root/train."""
    for i in range(count):
        folder = root / "train" / f"class_{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = SIZES[i % len(SIZES)]
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        data = encode(photograph(height, width, i), subsampling=i % 3, progressive=i % 5 == 0, exif=exif)
        (folder / f"{i:04d}.jpg").write_bytes(data)
    return root


def expected(
    image: Image.Image, view: View, res: int, interpolation: str, fill: tuple[int, int, int] = (0, 0, 0)
) -> Pixels:
    """The view as PIL and torchvision's functional transforms make it: [res, res, 3]."""
    y, x, h, w = view.box
    image = image.convert("RGB").crop((x, y, x + w, y + h))
    image = F.resize(image, list(view.size), F.InterpolationMode(interpolation))
    image = F.pad(image, [res], fill=fill)
    image = F.crop(image, *(offset + res for offset in view.offset), res, res)
    image = F.hflip(image) if view.flip else image
    for adjust, factor in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), view.jitter, strict=True):
        image = adjust(image, factor)
    return np.asarray(image, np.int16)


def reference(samples: Index, request: Request, pictures: Pictures) -> Pixels:
    made = []
    for sample, view in zip(request.samples.tolist(), request.views, strict=True):
        with Image.open(io.BytesIO(samples.read(sample).tobytes())) as image:
            made.append(expected(image, view, pictures.res, pictures.resize.interpolation, pictures.resize.fill))
    return np.stack(made)


def pictures_of(
    transform: str, res: int, rule: str = "fixefficientnet", seed: int = 0, crop_pct: float = 1.0
) -> Pictures:
    return Pictures(transform, res, geometry.resize_of(rule, res, crop_pct, "bicubic"), seed)


def torch_batches(samples: Index, requests: list[Request], pictures: Pictures) -> list[Batch]:
    return list(torch_cpu.batches(samples, requests, pictures.res, pictures.resize, 0))


def dali_batches(
    samples: Index,
    requests: list[Request],
    pictures: Pictures,
    two_passes: bool | None = None,
    device_id: int | None = None,
) -> list[Batch]:
    largest = max(1, *(len(r.samples) for r in requests))
    settings = dali.Settings(largest, 2, device_id)
    return list(dali.batches(samples, requests, pictures.res, pictures.resize, settings, two_passes))


def pixels(batches: list[Batch]) -> Pixels:
    return torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).cpu().numpy().astype(np.int16)


def one_batch(
    backend: Backend,
    found: Index,
    samples: list[int],
    transform: str = "test_aug",
    res: int = 96,
    rule: str = "fixefficientnet",
) -> Batch:
    """The batch of these samples at seed 0 and epoch 0."""
    pictures = pictures_of(transform, res, rule)
    (batch,) = backend(found, [make_request(found, pictures, np.array(samples, np.int64), 0)], pictures)
    return batch


both_backends = pytest.mark.parametrize("backend", [torch_batches, dali_batches], ids=["torch", "dali"])
