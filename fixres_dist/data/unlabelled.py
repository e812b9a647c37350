"""Pictures without labels as people name them: files, folders, lists of files, or pictures in memory; as an index."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.data import folders
from fixres_dist.data.headers import read_headers, within
from fixres_dist.data.index import USUAL, Index, Limits
from fixres_dist.data.layout import EXTENSIONS, counted
from fixres_dist.data.progress import progress_bar

LIST, STDIN = ".txt", "-"
ACCEPTED = (
    f"Accepted: image files, folders of them ({' '.join(EXTENSIONS)}), a {LIST} file with a path on each line, or {STDIN} for "
    "such lines on standard input"
)
Given = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True)
class Pictures(Index):
    """An index whose labels are all 0; some of its samples may be in memory, and are called `picture 3`."""

    encoded: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)  # bytes of a file, by sample

    def read(self, sample: int) -> NDArray[np.uint8]:
        return self.encoded[sample] if sample in self.encoded else super().read(sample)


def index_of(given: Sequence[Given], show: bool = True, limits: Limits = USUAL) -> tuple[Pictures, dict[int, str]]:
    """Index of the pictures in the order given, and of every one whose header cannot be read why.

    Folders are taken with all below them, in the order of their names. Raises UserError where there is no picture.
    """
    names: list[bytes] = []
    encoded: dict[int, NDArray[np.uint8]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for one in given:
        if isinstance(one, Image.Image):
            encoded[len(names)], sizes[len(names)] = bytes_of(one), (one.height, one.width)
            names.append(f"picture {len(names)}".encode())
        else:
            names += map(os.fsencode, files(os.fspath(one)))
    if not names:
        raise UserError(f"no picture was given. {ACCEPTED}.")
    if binary := next((name for name in names if b"\0" in name), b""):
        raise UserError(f"{os.fsdecode(binary[:60])!r} is no path: it holds a zero byte. {ACCEPTED}.")
    n = len(names)
    table = np.zeros((n, 2), np.int32)
    for sample, size in sizes.items():
        table[sample] = size
    ends, zeros = np.cumsum([len(name) for name in names], dtype=np.int64), np.zeros(n, np.int32)
    index = Pictures(Path(), ("",), b"".join(names), ends, zeros, table, np.zeros(n, np.uint32), encoded=encoded)
    on_disk = np.array([sample for sample in range(n) if sample not in encoded], np.int64)
    with progress_bar("reading headers", show) as progress:
        read, bad = read_headers(within(index, limits), on_disk, progress)
    assert isinstance(read, Pictures)
    large = f"more than {limits.pixels:,} pixels (data.max_pixels)"
    return read, bad | {sample: large for sample in encoded if not read.sizes[sample, 0]}


def bytes_of(picture: Image.Image) -> NDArray[np.uint8]:
    """The picture as a file without loss, whose pixels are decoded as those of any file."""
    file, wide = io.BytesIO(), picture.mode[0] in "IF"
    kept = picture if wide or picture.mode in ("L", "RGB") else picture.convert("RGB")
    if wide:
        kept.save(file, "TIFF")  # PNG has no mode for all of them
    else:
        kept.save(file, "PNG", compress_level=0)
    return np.frombuffer(file.getvalue(), np.uint8)


def files(name: str) -> Iterator[str]:
    """The files that an argument stands for, whether they are there or not; raises UserError for an empty folder or list."""
    if name == STDIN:
        yield from listed(sys.stdin.buffer.read(), "standard input", Path())
    elif os.path.isdir(name):
        yield from below(Path(name))
    elif name.lower().endswith(LIST):
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"the list {name} cannot be read: {error.strerror}. {ACCEPTED}.") from None
        yield from listed(content, name, Path(name).parent)
    else:
        yield name


def below(folder: Path) -> Iterator[str]:
    passed: Counter[str] = Counter()
    try:
        found = folders.walk(folder, ".", passed)
    except OSError as error:
        raise UserError(
            f"cannot list {error.filename}: {error.strerror}. Accepted: a folder this user may read."
        ) from None
    if not any(one.images for one in found):
        raise UserError(f"{folder} holds no image; passed over: {counted(passed)}. {ACCEPTED}.")
    if passed:
        print(f"{folder}: passed over {counted(passed)}", file=sys.stderr)
    for one in found:
        yield from (str(folder / name) for name in one.names)


def listed(content: bytes, where: str, folder: Path) -> Iterator[str]:
    """A path per line; blank lines and those that begin with # are left out. What is not found from here may lie beside the
    list, in `folder`. Raises UserError for a list without a path."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell writes one
        content = content.decode("utf-16", "replace").encode()
    lines = [line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    names = [os.fsdecode(line) for line in lines if line and not line.startswith(b"#")]
    if not names:
        raise UserError(
            f"{where} has no path of an image in {len(lines)} lines. Accepted: a path on each line, such as those of "
            f"`find photos -name '*.jpg' | {command('predict', 'RUN', STDIN)}`"
        )
    for name in names:
        path = folder / name if not os.path.exists(name) and (folder / name).exists() else name
        yield from below(Path(path)) if os.path.isdir(path) else (str(path),)
