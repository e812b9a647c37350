"""What an image's header says: its size, and whether every decoder agrees on its pixels. No torch, no decoding."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

HEADER_BYTES = 16384  # holds the frame header of nearly every JPEG; where it does not, PIL reads on

FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: what every decoder here reads
OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # lossless, hierarchical, arithmetic


class Header(NamedTuple):
    height: int
    width: int
    plain: bool  # 8-bit gray or YCbCr; the rest (CMYK, Adobe RGB, arithmetic coding, ...) is left to PIL


def header(data: bytes | memoryview) -> Header | None:
    """The frame header in `data`, the first bytes of a file or all of them; None where there is none, or not yet."""
    if bytes(data[:3]) != b"\xff\xd8\xff":
        return None
    at, end, adobe_rgb = 2, len(data), False
    while at + 4 <= end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xEE and length >= 14 and bytes(data[at + 4 : at + 9]) == b"Adobe":
            adobe_rgb = at + 15 < end and data[at + 15] == 0
        if marker in FRAMES or marker in OTHER_FRAMES:
            if at + 10 > end:
                return None
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            precision, components = data[at + 4], data[at + 9]
            known = marker in FRAMES and precision == 8 and (components == 1 or (components == 3 and not adobe_rgb))
            return Header(height, width, known)
        if marker in (0xDA, 0xD9) or length < 2:
            return None
        at += 2 + length
    return None


def header_size(path: Path) -> tuple[int, int] | str:
    """(height, width), or why the header cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "not a regular file"  # opening a pipe would wait for a writer
        with open(path, "rb") as file:
            return encoded_size(file)
    except OSError as error:
        return error.strerror or type(error).__name__


def encoded_size(file: Any) -> tuple[int, int] | str:
    """As `header_size`, of an open binary file."""
    found = header(data := file.read(HEADER_BYTES))
    limit = Image.MAX_IMAGE_PIXELS or 0
    if found and 0 < found.height * found.width <= limit:
        return found.height, found.width
    try:
        file.seek(0)
        with Image.open(file) as image:
            if image.height * image.width <= 2 * limit:
                return image.height, image.width
            return f"{image.height}x{image.width} pixels is too large"
    except UnidentifiedImageError:
        return "not an image" if data else "empty file"
    except Exception as error:  # each of Pillow's plugins has its own kinds
        return str(error) or type(error).__name__
