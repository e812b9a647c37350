"""What an image's header says: its size, and whether every decoder agrees on its pixels. No torch, no decoding."""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fixres_dist.base.storage import patiently
from fixres_dist.data.index import Index, Limits
from fixres_dist.data.progress import Progress

PROBES = 512  # files that are read to recognise a cached index
NO_FILE = "not a regular file"  # opening a pipe would wait for a writer
HEADER_BYTES = 16384  # nearly every JPEG has its frame header in them; for the others PIL reads on

FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: all decoders here read them
OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # lossless, hierarchical, arithmetic

IN_SCANS = np.zeros(256, bool)  # whether a marker is usual in coded data: stuffing, fill bytes, restarts, the end
IN_SCANS[[0x00, 0xD9, 0xFF]] = IN_SCANS[0xD0:0xD8] = True
BETWEEN_SCANS = IN_SCANS.copy()  # of a progressive JPEG, where every scan has its own tables and start marker
BETWEEN_SCANS[[0xC4, 0xDA]] = True


class Header(NamedTuple):
    height: int
    width: int
    plain: bool  # 8-bit gray or YCbCr; PIL decodes the rest (CMYK, Adobe RGB, arithmetic coding, ...)


def header(data: bytes | memoryview) -> Header | None:
    """The frame header of a JPEG in `data`, its first bytes or all of them; None if they hold none."""
    adobe_rgb = False
    for marker, at, end in segments(data):
        if marker == 0xEE and end - at >= 12 and bytes(data[at : at + 5]) == b"Adobe":
            adobe_rgb = at + 11 < len(data) and data[at + 11] == 0
        if marker in FRAMES or marker in OTHER_FRAMES:
            if at + 6 > len(data):
                return None
            height, width = data[at + 1] << 8 | data[at + 2], data[at + 3] << 8 | data[at + 4]
            precision, components = data[at], data[at + 5]
            known = marker in FRAMES and precision == 8 and (components == 1 or (components == 3 and not adobe_rgb))
            return Header(height, width, known)
    return None


def segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Of a JPEG's segments up to its first scan: (marker, where its content begins, where it ends)."""
    if bytes(data[:3]) != b"\xff\xd8\xff":
        return
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xD9 or length < 2:
            return
        yield marker, at + 4, at + 2 + length
        if marker == 0xDA:
            return
        at += 2 + length


def stray_marker(data: NDArray[np.uint8]) -> bool:
    """Whether an unusual marker follows the start of a JPEG's first scan: the file is broken. libjpeg refuses it; other
    decoders make the rest of the picture grey."""
    ends = {marker: end for marker, _, end in segments(data.data)}
    coded = data[ends.get(0xDA, len(data)) :]
    usual = BETWEEN_SCANS if 0xC2 in ends else IN_SCANS
    return not usual[coded[1:][coded[:-1] == 0xFF]].all()


class Seen(NamedTuple):
    """What the index keeps of a file."""

    size: tuple[int, int]  # height, width in pixels; 0, 0 where the header cannot be read
    mark: int  # CRC-32 of its length and first HEADER_BYTES: it tells pictures of the same name and size apart
    reason: str = ""  # why the header cannot be read
    checksum: int = 0  # CRC-32 of all its bytes, where they were read


def read_headers(
    index: Index, samples: NDArray[np.int64], progress: Progress | None = None
) -> tuple[Index, dict[int, str]]:
    """The index with the sizes and marks (and checksums, if it has any) of `samples` read from their files, and why headers
    cannot be read.

    In threads, because most of the time is waiting for storage. Shards are read from their start to their end.
    """
    sizes, marks, reasons = index.sizes.copy(), index.marks.copy(), {}
    checksums = None if index.checksums is None else index.checksums.copy()
    if index.places is not None:
        samples = samples[np.lexsort((index.places[samples, 1], index.places[samples, 0]))]
    done = len(index) - len(samples)
    with ThreadPoolExecutor(max(4, (os.cpu_count() or 1) * 2)) as pool:
        for part in np.array_split(samples, max(1, -(-len(samples) // 1000))):  # a future per file would take gigabytes
            for sample, seen in zip(part.tolist(), pool.map(partial(look, index), part.tolist()), strict=True):
                sizes[sample], marks[sample] = seen.size, seen.mark
                if checksums is not None:
                    checksums[sample] = seen.checksum
                if seen.reason:
                    reasons[sample] = seen.reason
            done += len(part)
            if progress:
                progress(done, len(index))
    return replace(index, sizes=sizes, marks=marks, checksums=checksums), reasons


def within(index: Index, limits: Limits) -> Index:
    """The index under `limits`: the size of a picture with more pixels is unknown, and so is read again."""
    # What PIL itself refuses, at twice as many: pictures whose header claims fewer than their pixels are.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.pixels)
    large = index.sizes.astype(np.int64).prod(axis=1) > limits.pixels
    return replace(index, sizes=np.where(large[:, None], np.int32(0), index.sizes), limits=limits)


def same_first_bytes(index: Index, samples: NDArray[np.int64]) -> bool:
    """Whether some of `samples`, spread evenly, begin with the bytes that they had when they were indexed."""
    some = samples[np.unique(np.linspace(0, len(samples) - 1, min(len(samples), PROBES)).astype(int))]
    return np.array_equal(read_headers(replace(index, checksums=None), some)[0].marks[some], index.marks[some])


def changed(index: Index, sample: int, data: NDArray[np.uint8]) -> bool:
    """Whether a sample's bytes are not those of the file that was indexed: by their checksum, or, where there is none, as far
    as its length and first bytes tell."""
    if index.checksums is not None and (checksum := int(index.checksums[sample])):
        return zlib.crc32(data.data) != checksum
    mark = int(index.marks[sample])
    return bool(mark) and zlib.crc32(data[:HEADER_BYTES].data, len(data) & 0xFFFFFFFF) != mark


def look(index: Index, sample: int) -> Seen:
    """Read a sample's header; an error is the reason of what it returns. Raises StorageError."""
    try:
        path = index.path(sample)
        if index.places is None and index.checksums is None:
            return patiently(lambda: look_once(path, index.limits.pixels), path, index.folder)
        if index.places is None and not stat.S_ISREG(os.stat(path).st_mode):
            return Seen((0, 0), 0, NO_FILE)
        data = index.read(sample)
        return look_at(io.BytesIO(data.data), len(data), index.limits.pixels)._replace(checksum=zlib.crc32(data.data))
    except OSError as error:
        return Seen((0, 0), 0, error.strerror or str(error) or type(error).__name__)


def look_once(path: Path, most_pixels: int) -> Seen:
    """The same of a file; raises OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return Seen((0, 0), 0, NO_FILE)
    with open(path, "rb") as file:
        return look_at(file, os.fstat(file.fileno()).st_size, most_pixels)


def look_at(file: BinaryIO, length: int, most_pixels: int) -> Seen:
    """Read the header of an open file of `length` bytes; raises OSError where its first bytes cannot be read."""
    found = header(data := file.read(HEADER_BYTES))
    mark = zlib.crc32(data, length & 0xFFFFFFFF)
    if found and 0 < found.height * found.width <= most_pixels:
        return Seen((found.height, found.width), mark)
    try:
        file.seek(0)
        with Image.open(file) as image:
            if image.height * image.width <= most_pixels:
                return Seen((image.height, image.width), mark)
            reason = f"{image.height}x{image.width} pixels; accepted: {most_pixels:,} (data.max_pixels)"
    except Image.DecompressionBombError:
        reason = f"more than twice the pixels that are accepted: {most_pixels:,} (data.max_pixels)"
    except UnidentifiedImageError:
        reason = "not an image" if data else "empty file"
    except Exception as error:  # Pillow's plugins raise many types
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system
        reason = str(error) or type(error).__name__
    return Seen((0, 0), mark, reason)
