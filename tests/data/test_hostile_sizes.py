"""Files that claim or unpack to more than memory holds: refused by name and limit, before memory is taken for them."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.folders import write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import lines_of
from fixres_dist.cli.main import main
from fixres_dist.config import reading
from fixres_dist.config.schema import Data
from fixres_dist.data import class_names, dataset, folders, headers, label_lists, tar_members
from fixres_dist.data.index import Limits
from fixres_dist.data.layout import Place
from fixres_dist.models import file_kinds


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """No test here may take more than 64 MiB at a time."""
    tracemalloc.start()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 64 << 20, f"{most:,} bytes"


def sparse(path: Path, start: bytes, size: int, end: bytes = b"") -> Path:
    """A file of `size` bytes that takes no room on the disk: zeros between `start` and `end`."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size - len(end))
        file.seek(0, os.SEEK_END)
        file.write(end)
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a/1.cls", tarfile.REGTYPE, "holds the label 'a/1.cls' of 3,221,225,472 bytes. Accepted: 1,048,576"),
        ("a/1.json", tarfile.REGTYPE, "holds the label 'a/1.json' of 3,221,225,472 bytes"),
        ("x", tarfile.GNUTYPE_LONGNAME, "has a header of 3,221,225,472 bytes. Accepted: 1,048,576"),
        ("x", tarfile.XHDTYPE, "has a header of 3,221,225,472 bytes"),
        ("x", tarfile.XGLTYPE, "has a header of 3,221,225,472 bytes"),
    ],
)
def test_a_tar_whose_label_or_header_is_gigabytes(name: str, kind: bytes, words: str, tmp_path: Path) -> None:
    shard = sparse(tmp_path / "0.tar", header(name, 3 << 30, kind), (3 << 30) + 4096)
    with pytest.raises(UserError, match=words) as refused:
        tar_members.read_members(shard, 0)
    assert str(shard) in str(refused.value)


def test_a_tar_of_many_empty_members(tmp_path: Path) -> None:
    with open(tmp_path / "0.tar", "wb") as file:
        for k in range(3_000):
            file.write(header(f"x{k}", 0))
        file.write(header("a/1.cls", 1) + b"0".ljust(512, b"\0") + header("a/1.jpg", 4) + b"JPEG".ljust(512, b"\0"))
        file.write(bytes(1024))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    (member,) = tar_members.read_members(tmp_path / "0.tar", 0)
    assert (member.name, member.label, member.place[2]) == ("a/1.jpg", 0, 4)
    assert tracemalloc.get_traced_memory()[1] - before < 512 << 10, "headers that are read are not kept"


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a/1.jpg")
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        content = b"1\n0\n0\n".ljust(512, b"\0")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError, match="link, device or sparse file"):
        tar_members.read_members(tmp_path / "0.tar", 0)


def test_a_label_in_deeply_nested_json(tmp_path: Path) -> None:
    content = b'{"label":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        entry = tarfile.TarInfo("a/1.json")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError, match="nested too deeply"):
        tar_members.read_members(tmp_path / "0.tar", 0)


def png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [13_000, 20_000, 60_000])
def test_a_picture_of_more_pixels_than_are_decoded(side: int) -> None:
    data = png(side)
    seen = headers.look_at(io.BytesIO(data), len(data), Limits().pixels)
    assert seen.size == (0, 0)
    assert re.search(r"pixels.* accepted: 134,217,728 \(data.max_pixels\)", seen.reason)


def test_the_largest_pictures_are_taken() -> None:
    assert headers.look_at(io.BytesIO(data := png(11_585)), len(data), Limits().pixels).size == (11_585, 11_585)


def test_the_limit_of_pixels_is_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lower than the default and higher: also for what was indexed under another one, on each side of it."""
    root, cache = write_photos(tmp_path / "photos", 2, 2), str(tmp_path / "cache")
    (root / "val" / "ash" / "large.png").write_bytes(png(12_000))
    args = ["data", "index", "--data", str(root), "--split", "val", "--cache", cache]
    assert main(args) == 0
    assert "large.png: 12000x12000 pixels; accepted: 134,217,728 (data.max_pixels)" in capsys.readouterr().out
    assert main([*args, "--max-pixels", "200000000"]) == 0
    assert "cannot be read" not in capsys.readouterr().out
    higher = dataset.load(root, "val", cache, limits=Limits.of(Data(max_pixels=2 * 10**8)))
    assert [12_000, 12_000] in higher.sizes.tolist()
    with pytest.raises(UserError, match=r"(?s)7 of 7 files .*accepted: 1,000 \(data\.max_pixels\)"):
        dataset.load(root, "val", cache, limits=Limits(pixels=1_000))
    with pytest.raises(OSError, match=r"accepted: 1,048,576 \(data\.max_file_mib\)"):
        replace(higher, limits=Limits.of(Data(max_file_mib=1))).check_length(1 << 21)
    assert main([*args, "--max-pixels", "0"]) == 2
    assert "max_pixels is 0; accepted: 1 or more" in capsys.readouterr().err


def test_a_picture_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", 1, 1)
    folder = data / "train"
    large = next(folder.rglob("*.jpg"))
    sparse(large, large.read_bytes(), Limits().file_bytes + 1)
    index = folders.load(Place(folder), tmp_path / "index.npz")
    sample = list(index.names()).index(str(large.relative_to(folder)))
    with pytest.raises(OSError, match=r"it has 1,073,741,825 bytes; accepted: 1,073,741,824"):
        index.read(sample)


@pytest.mark.parametrize("length", [2**60, 3 << 30])
def test_a_safetensors_header_of_gigabytes(length: int, tmp_path: Path) -> None:
    file = sparse(tmp_path / "w.safetensors", struct.pack("<Q", length) + b"{", (4 << 30))
    with pytest.raises(
        UserError, match=r"ends within its header|said to have 3,221,225,472 bytes; accepted: 100,000,000"
    ):
        file_kinds.kind_of(file)
    with pytest.raises(UserError, match=r"said to have .* bytes; accepted: 100,000,000"):
        class_names.from_file(file)


def test_a_safetensors_header_that_is_nested_deeply(tmp_path: Path) -> None:
    text = b"[" * 200_000
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text) + 1) + b"{" + text)
    with pytest.raises(UserError, match="header is damaged"):
        file_kinds.kind_of(tmp_path / "w.safetensors")


def test_weights_that_unpack_to_gigabytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as file, file.open("a/data.pkl", "w") as entry:
        for _ in range(64):
            entry.write(bytes(1 << 20))
    with pytest.raises(UserError, match=r"says that it unpacks to 67,108,864. Accepted: 100 times its size"):
        file_kinds.kind_of(tmp_path / "w.pth")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "own.pth")
    assert file_kinds.kind_of(tmp_path / "own.pth") == "torch"


LAUGHS = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)
])  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, r"has .* values, its aliases written out; accepted: 100,000"),
        ("a: &a [*a]", "unconstructable recursive node"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "{b: " * 5_000 + "}" * 5_000, "nested too deeply"),
        ("a: " + "x" * (1 << 20), r"has 1,048,579 characters; accepted: 1,048,576"),
    ],
)
def test_yaml_that_grows(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        reading.read_yaml(text)


def test_yaml_with_aliases_as_people_use_them() -> None:
    found = reading.read_yaml("env: &site {A: b}\nother: *site")
    assert found == {"env": {"A": "b"}, "other": {"A": "b"}}


@pytest.mark.parametrize("read", [lines_of, lambda path: label_lists.read(path, ["a.jpg"])])
def test_a_list_whose_line_is_a_gigabyte(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises((OSError, UserError), match="has more than 65,536 bytes"):
        read(sparse(tmp_path / "val.txt", b"a.jpg 0\n", 1 << 30))


def test_a_devkit_table_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(1 << 20) * 1)
    part = struct.pack("<II", label_lists.COMPRESSED, len(packed)) + packed
    (tmp_path / "meta.mat").write_bytes(bytes(128) + part + struct.pack("<II", 0, 2**31))
    assert label_lists.synsets(tmp_path / "meta.mat") == {}
    with pytest.raises((OSError, UserError), match="accepted"):
        label_lists.synsets(sparse(tmp_path / "meta.mat", bytes(128), 1 << 30))


def test_names_of_classes_in_a_file_of_gigabytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"accepted"):
        class_names.from_file(sparse(tmp_path / "classes.txt", b"a\n", 1 << 30))
    (tmp_path / "classes.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        class_names.from_file(tmp_path / "classes.json")
    (tmp_path / "few.json").write_text(json.dumps(["a", "b"]))
    assert class_names.from_file(tmp_path / "few.json")
