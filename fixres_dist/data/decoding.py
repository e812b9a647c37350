"""From an image file to its photograph, with PIL's pixels; and the batch that both backends make of a request."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_jpeg

from fixres_dist.data import headers
from fixres_dist.data.index import Index


class Bad(NamedTuple):
    """A sample that could not be decoded."""

    sample: int
    reason: str


class Batch(NamedTuple):
    """The pictures of one request. Bad samples have no row, so no loss, metric or statistic can count them."""

    images: torch.Tensor  # uint8 [n, 3, res, res], channels last in memory
    labels: torch.Tensor  # int64 [n]
    samples: torch.Tensor  # int64 [n]: positions in the index
    skipped: tuple[Bad, ...] = ()


class Undecodable(Exception):
    """A sample's file cannot be read, or is not the picture that was indexed; the text says why."""


def rows(index: Index, samples: NDArray[np.int64], pin: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, samples) of a batch; with `pin` the labels are where a GPU can copy them from while the host goes on."""
    labels = torch.from_numpy(index.labels[samples].astype(np.int64))
    return labels.pin_memory() if pin else labels, torch.from_numpy(samples)


def load(index: Index, sample: int) -> torch.Tensor:
    """The whole photograph: uint8 [3, height, width]; raises Undecodable."""
    height, width = index.sizes[sample].tolist()
    if not height:
        raise Undecodable("its header could not be read when it was indexed")
    try:
        image = decode(data := index.read(sample), (height, width))
    except OSError as error:
        raise Undecodable(error.strerror or str(error)) from None
    if headers.changed(index, sample, data):
        raise Undecodable("it is another picture than the one that was indexed")
    return image


def decode(data: NDArray[np.uint8], size: tuple[int, int]) -> torch.Tensor:
    """uint8 [3, height, width] as PIL's convert("RGB") gives it; EXIF rotation is not applied, as in timm.

    torchvision decodes plain JPEGs; PIL decodes the rest (CMYK, PNG, a GIF named .jpg), and `eight_bits` follows where
    a pixel is wider. Raises Undecodable; where the file's size is not the indexed `size`, before memory for its pixels
    is allocated.
    """
    header = headers.header(data.data)
    if header:
        check_size(size, (header.height, header.width))
    if header and header.plain:
        with contextlib.suppress(RuntimeError):  # PIL words the error
            image: torch.Tensor = decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
            return image
    try:
        with Image.open(io.BytesIO(data.data)) as photograph:
            check_size(size, (photograph.height, photograph.width))
            image8 = eight_bits(photograph) if photograph.mode[0] in "IF" else photograph
            return torch.from_numpy(np.array(image8.convert("RGB"))).permute(2, 0, 1)
    except Undecodable:
        raise
    except UnidentifiedImageError:
        raise Undecodable("not an image" if len(data) else "empty file") from None
    except Exception as error:  # Pillow's plugins raise many types
        raise Undecodable(str(error) or type(error).__name__) from None


def eight_bits(photograph: Image.Image) -> Image.Image:
    """A picture of wide gray values (PIL's modes I;16, I and F) in 8 bits; raises Undecodable where their range is unknown.

    PIL's own convert clips at 255, which makes a 16-bit picture white. The scale never follows from a picture's
    brightest value: 65535 is white, in floats 1.0, or 255 if a value is above 1.
    """
    values = np.asarray(photograph)
    if photograph.mode.startswith("I;16") or (photograph.mode == "I" and photograph.format in ("PPM", "PNG")):
        return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if photograph.mode != "F" or not (low >= 0 and high <= 255):  # not a number fails both
        kind = "float" if photograph.mode == "F" else "32-bit or signed"
        raise Undecodable(
            f"{kind} pixels from {low:g} to {high:g}, of which nothing says what is white; "
            "accepted: 8 or 16 bits, floats from 0 to 1 or from 0 to 255"
        )
    return Image.fromarray(np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8))


def check_size(indexed: tuple[int, int], found: tuple[int, int]) -> None:
    if indexed != found:
        was, now = ("x".join(map(str, size)) for size in (indexed, found))
        raise Undecodable(f"it was {was} pixels (height x width) when it was indexed and is {now} now")
