"""`python -m fixres_dist data ...` as a user runs it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import pictures as p
from support.folders import age, write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.cli.data import verify_command
from fixres_dist.cli.main import main
from fixres_dist.data import dataset, headers
from fixres_dist.data.index import Index
from fixres_dist.data.requests import make_request


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "data", 6, 4)


def test_verify_finds_bad_files_and_the_deny_list_leaves_them_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = data / "train" / "ash" / "002.jpg"
    torn.write_bytes(torn.read_bytes()[:-300])
    (data / "val" / "birch" / "\udce9.jpg").touch()
    deny = tmp_path / "bad.txt"
    assert main(["data", "verify", "--data", str(data), "--workers", "2"]) == 1
    assert main(["data", "verify", "--data", str(data), "--deny-list", str(deny), "--workers", "2"]) == 0
    text = capsys.readouterr().out
    assert "train: 18 images, 1 cannot be decoded" in text
    assert f"{torn}: image file is truncated" in text
    assert f"data.deny_list={deny}" in text
    train = dataset.load(data, "train", deny_list=str(deny))
    val = dataset.load(data, "val", deny_list=str(deny))
    assert (len(train), len(val)) == (17, 12)
    assert "ash/002.jpg" not in [train.name(i) for i in range(17)]
    whole = dataset.load(data, "train")
    kept = [i for i in range(18) if whole.name(i) != "ash/002.jpg"]
    assert [train.name(i) for i in range(17)] == [whole.name(i) for i in kept]
    assert train.sizes.tolist() == whole.sizes[kept].tolist()


def test_index_says_what_there_is(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "val" / "ash" / "empty.jpg").touch()
    assert main(["data", "index", "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert "train: 18 images, 3 classes, folders, fingerprint" in text
    assert "empty.jpg: empty file" in text
    assert "data verify --data" in text


def test_shard_and_train_from_shards(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "shard", "--data", str(data), "--out", str(tmp_path / "shards"), "--samples-per-shard", "5"]
    assert main(command) == 0
    assert "train: 18 images in 4 shards, 4 written now" in capsys.readouterr().out
    assert main(command) == 0
    assert "train: 18 images in 4 shards, 0 written now" in capsys.readouterr().out
    dataset.check_folder(tmp_path / "shards")
    assert json.loads((tmp_path / "shards" / "val" / "classes.json").read_text()) == ["ash", "birch", "cedar"]
    for split in ("train", "val"):
        assert dataset.load(tmp_path / "shards", split).fingerprint == dataset.load(data, split).fingerprint


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_show_writes_what_the_model_sees(data: Path, tmp_path: Path, backend: str) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--split", "train", "--res", "64", "--samples", "0,5", "--out", str(out)]
    more = ["--transform", "test_aug", "--resize-rule", "fixres", "--seed", "3", "--epoch", "2", "--backend", backend]
    assert main(["data", "show", *arguments, *more]) == 0
    samples = dataset.load(data, "train")
    pictures = p.pictures_of("test_aug", 64, "fixres", 6)
    want = p.reference(samples, make_request(samples, pictures, np.array([0, 5]), 2), pictures)
    for sample, expected in zip((0, 5), want, strict=True):
        png = np.asarray(Image.open(out / f"{sample}.png"), np.int16)
        assert np.abs(png - expected).mean() <= 0.25
        tensor = np.load(out / f"{sample}.npy")
        assert (tensor.dtype, tensor.shape) == (np.float32, (3, 64, 64))
        mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert np.allclose(tensor, (png.transpose(2, 0, 1) / 255 - mean) / std, atol=1e-4)
        assert Image.open(out / f"{sample}_train_test.png").size == (64 + 8 + 64, 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "--res", "64", "--samples", "0,99"], "names 99, and val has 12 images; accepted: 0 to 11"),
        (["show", "--res", "64", "--samples", "a"], "accepted: numbers such as 0,5,9"),
        (["show", "--res", "64", "--samples", "0", "--transform", "tset"], "Did you mean 'test'?"),
        (["show", "--res", "64", "--samples", "0", "--split", "test"], "no split 'test'"),
        (["shard", "--samples-per-shard", "0"], "accepted: 1 or more"),
    ],
)
def test_mistakes_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    command, *rest = arguments
    assert main(["data", command, "--data", str(data), "--out", str(tmp_path / "out"), *rest]) == 2
    assert words in capsys.readouterr().err


def test_a_file_replaced_in_place_is_found_by_a_fresh_index_and_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_photos(tmp_path / "data", 3, 2)
    age(root)
    first = dataset.load(root, "train")
    Image.new("RGB", (31, 30)).save(first.path(1))  # its directory does not change
    monkeypatch.setattr(headers, "PROBES", 1)  # of many files, the chance to meet it is small
    assert dataset.load(root, "train").sizes.tolist() == first.sizes.tolist()
    assert main(["data", "verify", "--data", str(root)]) == 0
    assert "train: 9 images, 0 cannot be decoded" in capsys.readouterr().out
    second = dataset.load(root, "train")
    assert second.sizes[1].tolist() == [30, 31]
    Image.new("RGB", (31, 30), "red").save(first.path(1))
    assert main(["data", "index", "--data", str(root), "--fresh"]) == 0
    third = dataset.load(root, "train")
    assert third.fingerprint == second.fingerprint
    assert third.contents != second.contents


def test_verify_refuses_a_deny_list_that_cannot_be_written_before_it_decodes(data: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere" / "bad.txt"):
        with pytest.raises(UserError, match=f"{place} cannot be written"):
            verify_command(Namespace(data=str(data), cache="", split="val", workers=1, deny_list=place))


def test_a_deny_list_that_leaves_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    deny, samples = tmp_path / "all.txt", dataset.load(data, "train", on_bad="skip")
    deny.write_text("\n".join(["train/", *(f"train/{samples.name(k)}" for k in range(len(samples)))]))
    with pytest.raises(UserError, match=rf"no image is left in .*train: data\.deny_list={deny} names all"):
        dataset.load(data, "train", deny_list=str(deny))


def test_a_missing_deny_list_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match=r"data\.deny_list is 'nowhere\.txt'"):
        dataset.load(data, "train", deny_list="nowhere.txt")


def test_only_changed_directories_are_read_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(data)
    read: list[str] = []
    real = headers.look

    def counted(index: Index, sample: int) -> headers.Seen:
        read.append(index.path(sample).parent.name)
        return real(index, sample)

    monkeypatch.setattr(headers, "look", counted)
    monkeypatch.setattr(headers, "PROBES", 0)  # the others are looked at to recognise them, up to so many
    dataset.load(data, "train", str(tmp_path / "cache"))
    assert len(read) == 18
    read.clear()
    (data / "train" / "birch" / "new.jpg").write_bytes(p.encode(p.photograph(30, 40, 0)))
    again = dataset.load(data, "train", str(tmp_path / "cache"))
    assert read == ["birch"] * 7
    assert again.sizes[list(again.names()).index("birch/new.jpg")].tolist() == [30, 40]
    assert again.fingerprint == dataset.load(data, "train", str(tmp_path / "fresh")).fingerprint
