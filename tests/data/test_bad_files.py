"""Odd files, one by one: what is decoded like PIL, what is skipped or refused and why; neighbours never notice."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures as p
from support.folders import as_an_ordinary_user, open_to_all

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Data
from fixres_dist.data import backends, dataset, geometry, headers
from fixres_dist.data.decoding import Batch
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request

PHOTO = p.photograph(120, 160, 7)


def wide(kind: str, form: str) -> bytes:
    """PHOTO in gray with values of more than 8 bits."""
    gray = np.asarray(PHOTO.convert("L"))
    values = gray / np.float32(255) if kind == "float" else (gray * 257.0).astype(kind)
    return p.encode(Image.fromarray(values), format=form)


def rgb_png_of_16_bits() -> bytes:
    """PIL writes none."""
    rows = (np.asarray(PHOTO).astype(">u2") * 257).reshape(120, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 160, 120, 16, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_size(data: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def with_marker(data: bytes, marker: int) -> bytes:
    """The JPEG with a marker in the middle of its coded data."""
    at = (data.index(b"\xff\xda") + len(data)) // 2
    return data[:at] + bytes([0xFF, marker]) + data[at + 2 :]


JPEG = p.encode(PHOTO)
DECODES_LIKE_PIL = {
    "gif": p.encode(PHOTO.convert("P"), format="GIF"),
    "png named jpg": p.encode(PHOTO, format="PNG"),
    "webp named jpg": p.encode(PHOTO, format="WEBP"),
    "png with alpha": p.encode(PHOTO.convert("RGBA"), format="PNG"),
    "palette with alpha": p.encode(PHOTO.convert("RGBA").quantize(64), format="PNG"),
    "gray with alpha": p.encode(PHOTO.convert("LA"), format="PNG"),
    "cmyk tiff": p.encode(PHOTO.convert("CMYK"), format="TIFF"),
    "float tiff to 255": p.encode(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.float32)), format="TIFF"),
    "grayscale": p.encode(PHOTO.convert("L")),
    "cmyk": p.encode(PHOTO.convert("CMYK")),
    "progressive": p.encode(PHOTO, progressive=True),
    "1x1": p.encode(PHOTO.crop((0, 0, 1, 1))),
    "3000x2": p.encode(PHOTO.resize((3000, 2))),
    "2x3000": p.encode(PHOTO.resize((2, 3000))),
    "trailing garbage": JPEG + b"garbage" * 50,
    "long comment before the frame": JPEG[:2] + b"\xff\xfe\x75\x30" + bytes(29998) + JPEG[2:],
}
GRAY = PHOTO.convert("L")
AS_IN_8_BITS = {  # the photograph that the file holds in more bits, or in one
    "1 bit": (p.encode(PHOTO.convert("1"), format="PNG"), PHOTO.convert("1").convert("L")),
    **{f"{kind} {form}": (wide(kind, form), GRAY) for kind, form in (("u2", "PNG"), ("u2", "TIFF"), (">u2", "TIFF"))},
    "16-bit pgm": (b"P5 160 120 65535\n" + (np.asarray(GRAY) * np.uint16(257)).astype(">u2").tobytes(), GRAY),
    "float tiff": (wide("float", "TIFF"), GRAY),
    "16-bit rgb png": (rgb_png_of_16_bits(), PHOTO),
}
HEADER_REFUSED = {
    "empty": (b"", "empty file"),
    "garbage": (bytes(range(256)) * 20, "not an image"),
    "web page": (b"<html>404</html>", "not an image"),
    "65000x65000": (with_size(JPEG, 65000, 65000), "accepted: 134,217,728"),
    "start of a jpeg only": (JPEG[:20], ""),
}
DECODING_FAILS = {
    "truncated in the middle": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated by two bytes": (JPEG[:-2], "truncated"),
    "header only": (JPEG[: JPEG.index(b"\xff\xda") + 14], "truncated"),
    **{f"marker {number:#x} in the data": (with_marker(JPEG, number), "broken data stream") for number in (0xC4, 0xDB)},
    "truncated png": (p.encode(PHOTO, format="PNG")[:2000], "truncated"),
    "32-bit tiff": (wide("i4", "TIFF"), "32-bit or signed pixels"),
    "float tiff of other range": (p.encode(Image.fromarray(np.full((9, 9), -3, "f4")), format="TIFF"), "from -3 to -3"),
    "float tiff without numbers": (p.encode(Image.fromarray(np.full((9, 9), np.nan, "f4")), format="TIFF"), "nan"),
}


def folder(root: Path, name: str, data: bytes | None) -> tuple[Index, int]:
    """Six good photographs and, in their middle, `data`; the index with unreadable headers left in, and its position."""
    (root / "train" / "a").mkdir(parents=True)
    for i in range(6):
        (root / "train" / "a" / f"{i}.jpg").write_bytes(p.encode(p.photograph(100 + 9 * i, 130, i)))
    if data is not None:
        (root / "train" / "a" / name).write_bytes(data)
    found = dataset.load(root, "train", on_bad="skip")
    return found, list(found.names()).index(f"a/{name}") if data is not None else 0


def neighbours_unharmed(backend: p.Backend, found: Index, batch: Batch) -> None:
    """The good photographs are bit for bit what they are without the odd one."""
    good = [sample for sample in range(len(found)) if sample in batch.samples.tolist()]
    alone = p.one_batch(backend, found, good)
    assert torch.equal(alone.images, batch.images)
    assert alone.labels.tolist() == batch.labels.tolist()


@p.both_backends
@pytest.mark.parametrize("kind", DECODES_LIKE_PIL)
def test_decoded_like_pil(tmp_path: Path, kind: str, backend: p.Backend) -> None:
    found, odd = folder(tmp_path, "3b.jpg", DECODES_LIKE_PIL[kind])
    batch = p.one_batch(backend, found, list(range(7)), "test")
    assert (batch.skipped, batch.samples.tolist()) == ((), list(range(7)))
    pictures = p.pictures_of("test", 96)
    want = p.reference(found, make_request(found, pictures, np.array([odd]), 0), pictures)
    difference = np.abs(batch.images[odd].permute(1, 2, 0).numpy() - want[0])
    # A two-pixel strip is nothing but border, and beyond a border DALI repeats pixels where PIL gives the rest more weight.
    assert difference.max() <= 6
    assert difference.mean() <= (1.0 if "3000" in kind else 0.25)


@p.both_backends
@pytest.mark.parametrize("kind", AS_IN_8_BITS)
def test_wide_pixels_are_scaled_to_8_bits(tmp_path: Path, kind: str, backend: p.Backend) -> None:
    data, same = AS_IN_8_BITS[kind]
    found, odd = folder(tmp_path, "3b.png", data)
    (tmp_path / "train" / "a" / "3c.png").write_bytes(p.encode(same, format="PNG"))
    found = dataset.load(tmp_path, "train")
    batch = p.one_batch(backend, found, [odd, odd + 1], "test")
    assert torch.equal(batch.images[0], batch.images[1])
    assert batch.images[0].float().std() > 10


@p.both_backends
@pytest.mark.parametrize("kind", HEADER_REFUSED)
def test_unreadable_headers_are_refused_or_skipped(tmp_path: Path, kind: str, backend: p.Backend) -> None:
    data, reason = HEADER_REFUSED[kind]
    found, odd = folder(tmp_path, "3b.jpg", data)
    with pytest.raises(UserError, match="3b.jpg.*" + reason):
        dataset.load(tmp_path, "train")
    batch = p.one_batch(backend, found, list(range(7)))
    assert [bad.sample for bad in batch.skipped] == [odd]
    assert batch.samples.tolist() == [k for k in range(7) if k != odd]
    neighbours_unharmed(backend, found, batch)


@p.both_backends
@pytest.mark.parametrize("kind", DECODING_FAILS)
def test_what_breaks_in_decoding_is_skipped_with_its_reason(tmp_path: Path, kind: str, backend: p.Backend) -> None:
    data, reason = DECODING_FAILS[kind]
    found, odd = folder(tmp_path, "3b.jpg", data)
    assert len(dataset.load(tmp_path, "train")) == 7, "its header is fine"
    batch = p.one_batch(backend, found, list(range(7)))
    assert [bad.sample for bad in batch.skipped] == [odd]
    assert reason in batch.skipped[0].reason
    neighbours_unharmed(backend, found, batch)


@p.both_backends
def test_bytes_broken_in_the_middle_decode_as_in_pil(tmp_path: Path, backend: p.Backend) -> None:
    """libjpeg sees no error in them: all three make the same picture of such a file."""
    middle = len(JPEG) // 2
    found, odd = folder(tmp_path, "3b.jpg", JPEG[:middle] + bytes(64) + JPEG[middle + 64 :])
    batch = p.one_batch(backend, found, list(range(7)), "test")
    assert not batch.skipped
    pictures = p.pictures_of("test", 96)
    want = p.reference(found, make_request(found, pictures, np.array([odd]), 0), pictures)
    assert np.abs(batch.images[odd].permute(1, 2, 0).numpy() - want[0]).max() <= 3


@p.both_backends
def test_a_file_that_vanishes_or_changes_during_the_run(tmp_path: Path, backend: p.Backend) -> None:
    found, _ = folder(tmp_path, "x.jpg", None)
    found.path(1).unlink()
    found.path(3).write_bytes(JPEG)
    found.path(4).write_bytes(b"")
    batch = p.one_batch(backend, found, list(range(6)))
    reasons = {bad.sample: bad.reason for bad in batch.skipped}
    assert list(reasons) == [1, 3, 4]
    assert reasons[1] == "No such file or directory"
    assert "was 127x130 pixels (height x width) when it was indexed and is 120x160 now" in reasons[3]
    assert reasons[4] == "empty file"
    neighbours_unharmed(backend, found, batch)


@p.both_backends
def test_bad_files_do_not_shift_later_batches(tmp_path: Path, backend: p.Backend) -> None:
    """More requests than are in flight at once, a bad file in the first, a middle and the last of them."""
    found, _ = folder(tmp_path, "x.jpg", None)
    for bad in (0, 5):
        found.path(bad).write_bytes(found.path(bad).read_bytes()[:-700])
    pictures = p.pictures_of("test", 64, "fixres")
    order = [[0, 1], [2, 3], [4, 1], [2], [5, 3], [1, 4], [], [3], [4, 5]]
    requests = [make_request(found, pictures, np.array(part, np.int64), 0) for part in order]
    batches = backend(found, requests, pictures)
    assert [batch.samples.tolist() for batch in batches] == [[s for s in part if s not in (0, 5)] for part in order]
    assert [[b.sample for b in batch.skipped] for batch in batches] == [
        [s for s in part if s in (0, 5)] for part in order
    ]
    single = {
        s: backend(found, [make_request(found, pictures, np.array([s]), 0)], pictures)[0].images for s in (1, 2, 3, 4)
    }
    for batch in batches:
        for row, sample in enumerate(batch.samples.tolist()):
            assert torch.equal(batch.images[row], single[sample][0])


@p.both_backends
def test_a_file_without_permission(tmp_path: Path, backend: p.Backend) -> None:
    found, odd = folder(tmp_path, "3b.jpg", JPEG)
    open_to_all(tmp_path)
    found.path(odd).chmod(0)
    with as_an_ordinary_user():
        assert headers.look(found, odd).reason == "Permission denied"
        batch = p.one_batch(backend, found, list(range(7)))
    assert [tuple(bad) for bad in batch.skipped] == [(odd, "Permission denied")]
    neighbours_unharmed(backend, found, batch)


def test_a_directory_without_permission_is_a_user_error(tmp_path: Path) -> None:
    folder(tmp_path, "x.jpg", None)
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "train" / "b").chmod(0)
    open_to_all(tmp_path)
    with as_an_ordinary_user(), pytest.raises(UserError, match=r"cannot list .*train/b: Permission denied"):
        dataset.load(tmp_path, "train", str(tmp_path / "cache"))
    (tmp_path / "train" / "b").chmod(0o755)


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    folder(tmp_path, "x.jpg", None)
    train = tmp_path / "train"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.jpg").write_bytes(JPEG)
    (train / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (train / "a" / "itself").symlink_to(train / "a" / "itself")
    (train / "a" / "up").symlink_to(train)
    (train / "a" / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = dataset.load(tmp_path, "train", on_bad="skip")
    assert [found.name(i) for i in range(len(found))] == [
        *(f"a/{i}.jpg" for i in range(6)),
        "a/dangling.jpg",
        "a/linked/far.jpg",
    ]
    _, reasons = dataset.recheck(found)
    assert reasons == {6: "No such file or directory"}


def test_a_pipe_named_like_an_image_blocks_nothing(tmp_path: Path) -> None:
    folder(tmp_path, "x.jpg", None)
    os.mkfifo(tmp_path / "train" / "a" / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg: not a regular file"):
        dataset.load(tmp_path, "train")


@p.both_backends
@pytest.mark.parametrize(
    "name", [b"caf\xe9 \xff.jpg", b"n" * 251 + b".jpg", "写真 α.jpg".encode(), b"with\nnewline\t.jpg"]
)
def test_names_that_are_not_utf8_or_very_long(tmp_path: Path, name: bytes, backend: p.Backend) -> None:
    found, odd = folder(tmp_path, os.fsdecode(name), JPEG)
    assert os.fsencode(found.name(odd)) == b"a/" + name
    assert dataset.load(tmp_path, "train", on_bad="skip").fingerprint == found.fingerprint
    batch = p.one_batch(backend, found, list(range(7)))
    assert (len(batch.images), batch.skipped) == (7, ())


@pytest.mark.parametrize("name", ["torch", "dali"])
def test_stop_names_the_file_and_the_next_command(tmp_path: Path, name: str) -> None:
    found, odd = folder(tmp_path, "3b.jpg", JPEG[:-700])
    resize = geometry.resize_of("fixres", 64, 1.0, "bilinear")
    request = make_request(found, Pictures("test", 64, resize, 0), np.arange(7), 0)
    seen: list[str] = []

    def load(on_bad: str) -> list[Batch]:
        settings = Data(backend=name, on_bad=on_bad)  # type: ignore[arg-type]
        note = lambda index, bad: seen.append(index.name(bad.sample))  # noqa: E731
        return list(backends.batches(found, [request], 64, resize, settings, torch.device("cpu"), 0, 7, note))

    with pytest.raises(UserError) as caught:
        load("stop")
    text = str(caught.value)
    assert f"cannot decode {found.path(odd)}: image file is truncated" in text
    assert f"data verify --data {tmp_path} --deny-list" in text
    assert "data.on_bad=skip" in text
    (batch,) = load("skip")
    assert (len(batch.images), seen) == (6, ["a/3b.jpg"])
