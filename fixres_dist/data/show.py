"""Write the pictures that the model will see, as PNG and as arrays, each beside its photograph's test crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fixres_dist.base.files import whole
from fixres_dist.config.schema import Data
from fixres_dist.data import backends
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, Request, make_request

GAP = 8  # white pixels between two pictures


def show(
    index: Index,
    pictures: Pictures,
    samples: list[int],
    epoch: int,
    settings: Data,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    out: Path,
) -> list[Path]:
    """Write `<sample>.png`, `<sample>.npy` (float32 [3, res, res], normalised) and, where training differs from
    testing, `<sample>_train_test.png`, both side by side; returns the files. Raises UserError for a file that cannot be
    decoded."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = np.array(samples, np.int64)
    seen = decoded(index, make_request(index, pictures, chosen, epoch), pictures, settings)
    test = Pictures("test", pictures.res, pictures.resize, 0)
    tested = decoded(index, make_request(index, test, chosen, epoch), test, settings)
    shift, scale = (np.array(values, np.float32).reshape(3, 1, 1) for values in (mean, std))
    written: list[Path] = []
    for sample, picture, other in zip(samples, seen, tested, strict=True):
        written += [out / f"{sample}.png", out / f"{sample}.npy"]
        write_png(written[-2], picture)
        with whole(written[-1]) as part, open(part, "wb") as file:
            np.save(file, (picture.transpose(2, 0, 1) / np.float32(255) - shift) / scale)
        if pictures.transform != "test":
            written.append(out / f"{sample}_train_test.png")
            gap = np.full((len(picture), GAP, 3), 255, np.uint8)
            write_png(written[-1], np.concatenate([picture, gap, other], 1))
    return written


def write_png(file: Path, pixels: NDArray[np.uint8]) -> None:
    with whole(file) as part:
        Image.fromarray(pixels).save(part, "png")


def decoded(index: Index, request: Request, pictures: Pictures, settings: Data) -> NDArray[np.uint8]:
    """uint8 [n, res, res, 3]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = backends.batches(
        index, [request], pictures.res, pictures.resize, settings, device, 0, len(request.samples), lambda *_: None
    )
    return next(iter(found)).images.permute(0, 2, 3, 1).cpu().numpy()
