"""Damaged pictures: what is known of a shard or a file from before is compared with what is there now, and the picture is named.

Pictures are BMPs, whose pixels no decoder can check."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.folders import age

from fixres_dist.base.errors import UserError
from fixres_dist.cli.main import main
from fixres_dist.data import dataset, decoding, shards
from fixres_dist.data.decoding import Undecodable


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 BMPs of 20 KB in 3 classes: more than the first bytes that every index keeps a mark of."""
    root, rng = tmp_path_factory.mktemp("bmp"), np.random.default_rng(0)
    for split in ("train", "val"):
        for k in range(12):
            (folder := root / split / f"class_{k % 3}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (80, 84, 3), dtype=np.uint8)).save(folder / f"{k:02d}.bmp")
    return root


@pytest.fixture
def root(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in shards of six; a cache of indexes of its own."""
    monkeypatch.setenv("FIXRES_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        shards.write_shards(dataset.load(photos, split), tmp_path / "data" / split, 6)
    return tmp_path / "data"


def flip(file: Path, at: int, touch: bool = False) -> None:
    """One bit of a file; `touch`: its time tells that it was written."""
    data, stamp = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    data[at] ^= 8
    file.write_bytes(data)
    if not touch:
        os.utime(file, ns=(stamp, stamp))


def in_picture(shard: Path, number: int = 1) -> tuple[str, int]:
    """The name of a picture in a shard, and a byte near its end."""
    with tarfile.open(shard) as tar:
        member = [m for m in tar.getmembers() if m.name.endswith(".bmp")][number]
    return member.name, member.offset_data + member.size - 100


def test_a_flipped_bit_in_a_shard_costs_its_picture_and_verify_names_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = root / "val" / "000001.tar"
    name, at = in_picture(shard)
    flip(shard, at)
    index = dataset.load(root, "val")
    names = list(index.names())
    for sample, found in enumerate(names):
        if found == name:
            with pytest.raises(Undecodable, match="another picture than the one that was indexed"):
                decoding.load(index, sample)
        else:
            decoding.load(index, sample)
    assert main(["data", "verify", "--data", str(root), "--workers", "1"]) == 1
    assert f"{shard} ({name}): it is another picture than the one" in capsys.readouterr().out


@pytest.mark.parametrize("known", ["beside", "in the cache"])
@pytest.mark.parametrize("what", ["a picture", "a label"])
def test_a_shard_that_was_copied_badly_is_refused_until_its_index_is_removed(
    known: str, what: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, beside = root / "val" / "000001.tar", root / "val" / shards.INDEX
    if known == "in the cache":
        beside.unlink()
        dataset.load(root, "val")
    with tarfile.open(shard) as tar:
        label = next(m for m in tar.getmembers() if m.name.endswith(".cls"))
    name, at = in_picture(shard)
    flip(shard, at if what == "a picture" else label.offset_data, touch=True)  # 0 becomes 8, or 2 becomes :
    assert main(["data", "index", "--data", str(root), "--split", "val"]) == 2
    text = capsys.readouterr().err
    if what == "a picture":
        assert f"{shard} is not what it was when" in text
        assert name in text
        source = Path(text.partition("purpose, rm ")[2].partition(",")[0])
        assert (source == beside) == (known == "beside")
        source.unlink()
        assert main(["data", "index", "--data", str(root), "--split", "val"]) == 0, "as changed on purpose"
    else:
        assert str(shard) in text or "label" in text


def test_a_shard_that_is_gone_is_missed(root: Path) -> None:
    (root / "val" / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"000000\.tar is not what it was when .*index\.npz was written: it is gone"):
        dataset.load(root, "val")


@pytest.mark.parametrize("damage", ["a flipped bit", "zeros"])
def test_a_damaged_header_does_not_end_the_shard(damage: str, root: Path) -> None:
    """tarfile takes either for the end of the tar, and says nothing."""
    (root / "val" / shards.INDEX).unlink()
    shard = root / "val" / "000001.tar"
    with tarfile.open(shard) as tar:
        member = tar.getmembers()[4]
    if damage == "zeros":
        data = bytearray(shard.read_bytes())
        data[member.offset : member.offset_data + 2048] = bytes(member.offset_data + 2048 - member.offset)
        shard.write_bytes(data)
    else:
        flip(shard, member.offset_data - 512 + 3)
    with pytest.raises(
        UserError, match=r"000001\.tar is torn or no tar: (the header or the end mark at|something follows)"
    ):
        dataset.load(root, "val")


def test_images_that_are_added_to_a_shard_of_others_are_taken(root: Path) -> None:
    (root / "val" / shards.INDEX).unlink()
    first, shard = dataset.load(root, "val"), root / "val" / "000001.tar"
    with tarfile.open(shard, "a") as tar, tarfile.open(root / "train" / "000000.tar") as other:
        for member in other.getmembers()[:2]:
            content = other.extractfile(member)
            member.name = f"more/{Path(member.name).name}"
            tar.addfile(member, content)
    assert len(dataset.load(root, "val")) == len(first) + 1


LISTS = {
    "SHA256SUMS": "{sha256}  {name}\n",
    "md5sum.txt": "# by hand\n{md5} *./{name}\n",
    "checksums.sha1": "SHA1 ({name}) = {sha1}\n",
    "{name}.sha512": "{sha512}\n",
    "000001.md5": "{md5}  {name}\n",
}


@pytest.mark.parametrize("listed", LISTS)
def test_a_shard_that_never_was_as_its_checksum_says_is_refused(listed: str, root: Path) -> None:
    (root / "val" / shards.INDEX).unlink()
    shard = root / "val" / "000001.tar"
    digests = {kind: hashlib.new(kind, shard.read_bytes()).hexdigest() for kind in ("md5", "sha1", "sha256", "sha512")}
    source = root / "val" / listed.format(name=shard.name)
    source.write_text(LISTS[listed].format(name=shard.name, **digests))
    assert len(dataset.load(root, "val", fresh=True)) == 12
    flip(shard, in_picture(shard)[1], touch=True)
    with pytest.raises(UserError, match=r"000001\.tar is damaged, or was changed: its .*copy it again") as refused:
        dataset.load(root, "val")
    assert str(source) in str(refused.value)


def test_a_flipped_bit_in_a_file_is_noticed_where_the_index_has_checksums(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the first 16 KB are compared, so this is the limit too."""
    monkeypatch.setenv("FIXRES_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    root.mkdir()
    age(photos / "val")
    (root / "val").symlink_to(photos / "val")
    file = photos / "val" / "class_1" / "01.bmp"
    index = ["data", "index", "--data", str(root), "--split", "val"]
    assert main(index) == 0
    flip(file, 19_000)
    decoding.load(dataset.load(root, "val"), 4)
    flip(file, 19_000)
    assert main([*index, "--checksums"]) == 0
    Image.new("RGB", (9, 9)).save(photos / "val" / "class_1" / "later.bmp")
    os.utime(photos / "val" / "class_1", (1.1e9, 1.1e9))
    found = dataset.load(root, "val")
    assert found.checksums is not None
    assert (found.checksums != 0).all(), "of the file that was added too"
    flip(file, 19_000)
    with pytest.raises(Undecodable, match="another picture"):
        decoding.load(dataset.load(root, "val"), list(found.names()).index("class_1/01.bmp"))
    assert main(["data", "verify", "--data", str(root), "--split", "val", "--workers", "1"]) == 1
    assert f"{root / 'val' / 'class_1' / '01.bmp'}: it is another picture" in capsys.readouterr().out
