"""Data sets as they are distributed, copied and packed: what is a sample, what is its label, what is passed over."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import pictures as p
from support.folders import age, write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config, Data, Model
from fixres_dist.data import class_maps, dataset, label_lists, layout, shards
from fixres_dist.data.index import Index
from fixres_dist.training import plan

JPEG = p.encode(p.photograph(30, 40, 0))
WNIDS = ("n01440764", "n01443537", "n02100000")
TRUE = [2, 0, 1, 2, 0, 1, 1]  # classes of val's images, in the order of their names


def tell(index: Index, trained: list[str]) -> dict[str, int]:
    """The model's class of each file."""
    columns = class_maps.class_map(index.classes, trained, index.folder)
    return {name.rpartition("/")[2]: columns[label] for name, label in zip(index.names(), index.labels, strict=True)}


def flat(tmp_path: Path, below: str = "val") -> tuple[Path, list[str]]:
    """Class folders for training, and val's images in one folder; the root and val's names."""
    root, names = write_photos(tmp_path / "data", 2, 1, WNIDS), []
    shutil.rmtree(root / "val")
    (root / below).mkdir(parents=True)
    for k in range(len(TRUE)):
        names.append(f"ILSVRC2012_val_{k + 1:08d}.JPEG")
        (root / below / names[-1]).write_bytes(JPEG)
    return root, names


def lines(rows: list[str]) -> str:
    return "\n".join(rows) + "\n"


LISTS: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "numbers from 0": ("val.txt", lambda names: lines([f"{n} {k}" for n, k in zip(names, TRUE, strict=True)])),
    "class names, another folder before": (
        "val.txt",
        lambda names: lines([f"val/{n} {WNIDS[k]}" for n, k in zip(names, TRUE, strict=True)]),
    ),
    "Kaggle's solution": (
        "LOC_val_solution.csv",
        lambda names: lines(
            [
                "ImageId,PredictionString",
                *(f"{n[:-5]},{WNIDS[k]} 85 1 49 27 {WNIDS[k]} 1 2 3 4 " for n, k in zip(names, TRUE, strict=True)),
            ]
        ),
    ),
    "quotes, BOM and CR": (
        "val.csv",
        lambda names: "\ufeff" + "\r\n".join(f'"{n}";"{WNIDS[k]}"' for n, k in zip(names, TRUE, strict=True)),
    ),
    "class names in the order of the files": ("val_labels.txt", lambda _: lines([WNIDS[k] for k in TRUE])),
    "inside the split": (
        "val/val_annotations.txt",
        lambda names: lines([f"{n}\t{WNIDS[k]}\t0\t32\t44\t62" for n, k in zip(names, TRUE, strict=True)]),
    ),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("below", ["val", "val/images"])
def test_a_flat_val_takes_its_labels_from_a_list(tmp_path: Path, kind: str, below: str) -> None:
    root, names = flat(tmp_path, below)
    file, text = LISTS[kind]
    (root / file).write_text(text(names))
    data = Data(root=str(root))
    found = dataset.load(root, "val", str(tmp_path / "cache"))
    assert tell(found, dataset.classes(data, "train")) == dict(zip(names, TRUE, strict=True))
    assert dataset.survey(root, "val", data).images == 7
    dataset.check_folder(root, data)
    age(root)
    (root / file).write_text(text(names).replace(WNIDS[1], WNIDS[0]).replace(" 1\n", " 0\n"))
    changed = dataset.load(root, "val", str(tmp_path / "cache"))
    assert tell(changed, list(WNIDS)) == {n: k if k != 1 else 0 for n, k in zip(names, TRUE, strict=True)}


def test_the_devkits_numbers_are_translated_by_its_table_or_refused(tmp_path: Path) -> None:
    root, names = flat(tmp_path)
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    own = {2: 1, 0: 2, 1: 3}  # of the devkit: neither the order of the names nor from 0
    (devkit / layout.TRUTH).write_text(lines([str(own[k]) for k in TRUE]))
    with pytest.raises(UserError, match=r"numbers from 1 to 3.*map_clsloc\.txt"):
        dataset.load(root, "val", str(tmp_path / "cache"))
    (devkit / "map_clsloc.txt").write_text(lines([f"{WNIDS[k]} {number} words" for k, number in own.items()]))
    found = dataset.load(root, "val", str(tmp_path / "cache"))
    assert tell(found, list(WNIDS)) == dict(zip(names, TRUE, strict=True))
    (devkit / "map_clsloc.txt").unlink()
    texts = b"".join(WNIDS[k].encode("utf-16-le") + b"\x0e\0\0\0words" for k in sorted(own, key=own.__getitem__))
    packed = zlib.compress(texts)
    (devkit / "meta.mat").write_bytes(b"MATLAB 5.0".ljust(128) + struct.pack("<II", 15, len(packed)) + packed)
    again = dataset.load(root, "val", str(tmp_path / "cache"), fresh=True)
    assert tell(again, list(WNIDS)) == dict(zip(names, TRUE, strict=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["holds 7 images", "no class folders", "data.labels=FILE"]),
        ("0\n1\n", ["2 labels without names", "7 images"]),
        ("other.jpg 0\n", ["names none of the 7 images", "other.jpg"]),
        (
            "ILSVRC2012_val_00000001 1\nILSVRC2012_val_00000002 2\n",
            ["numbers from 1 to 2"],
        ),  # ImageSets/CLS-LOC/val.txt
    ],
)
def test_a_flat_val_without_a_fitting_list_is_refused(tmp_path: Path, text: str | None, words: list[str]) -> None:
    root, _ = flat(tmp_path)
    if text is not None:
        (root / "val.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        dataset.check_folder(root)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("val/images/cam1/0.jpg,ash\nval/images/cam2/0.jpg,birch\n", ["ash", "birch"]),
        ("cam1/0.jpg,ash\ncam2/0.jpg,birch\n", ["ash", "birch"]),
        ("0.jpg,ash\n", "has '0.jpg' for 'cam1/0.jpg' and 'cam2/0.jpg'"),
        ("x/0.jpg,ash\ny/0.jpg,birch\ncam1/0.jpg,ash\n", "has '0.jpg' for several lines, and none is 'cam2/0.jpg'"),
        ("cam1/0.jpg,ash\ncam1/0.jpg,birch\n", "gives 'cam1/0.jpg' two labels, 'ash' and 'birch'"),
        ('cam1/0.jpg,"crane, bird"\ncam2/0.jpg,"crane, machine"\n', ["crane, bird", "crane, machine"]),
    ],
)
def test_a_list_gives_each_image_its_own_label_or_is_refused(tmp_path: Path, rows: str, words: str | list[str]) -> None:
    (tmp_path / "val.csv").write_text(rows)
    images = ["images/cam1/0.jpg", "images/cam2/0.jpg"] if "images" in rows else ["cam1/0.jpg", "cam2/0.jpg"]
    if isinstance(words, list):
        assert label_lists.read(tmp_path / "val.csv", images)[0] == words
    else:
        with pytest.raises(UserError, match=words):
            label_lists.read(tmp_path / "val.csv", images)


def test_a_list_that_no_split_takes_is_refused(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data", 1, 1)
    with pytest.raises(UserError, match=r"both splits have subfolders, which are taken for classes\. Next: leave"):
        dataset.check_folder(root, Data(labels="nothing.csv"))


def test_a_split_of_another_name_is_proposed_and_taken(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data", 2, 1)
    (root / "val").rename(root / "validation")
    with pytest.raises(UserError, match=r"has no val/ folder .*Next: data\.val_split=validation"):
        dataset.check_folder(root)
    assert dataset.check_folder(root, Data(val_split="validation"))["val"].images == 3
    (root / "train").rename(root / "training")
    with pytest.raises(UserError, match=r"has no train/ folder .*Next: data\.train_split=training"):
        dataset.check_folder(root, Data(val_split="validation"))
    with pytest.raises(UserError, match="train_split and val_split"):
        Data(train_split="val")


def test_what_is_passed_over_is_counted_in_the_plan(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data", 2, 1)
    before = dataset.load(root, "train", str(tmp_path / "before"))
    (root / "train" / "classes.json").write_text('{"ash": 0}')  # of another tool
    for name in ("@eaDir", ".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(root / "train" / "ash", root / "train" / name)
        shutil.copytree(root / "train" / "@eaDir", root / "train" / "ash" / name)
    for name in ("a.heic", "b.HEIC", "c.txt", "Thumbs.db", "._000.jpg", ".DS_Store", "readme"):
        (root / "train" / "birch" / name).write_bytes(b"no image")
    (root / "val" / "loose.jpg").write_bytes(JPEG)
    config = Config(model=Model(timm_name="test_efficientnet"), data=Data(root=str(root)))
    counts = plan.count(config)
    assert (counts.train, counts.val, counts.classes) == (6, 3, 3)
    for words in ("2 @eaDir/", "2 .heic", "1 .txt", "1 .db", "2 hidden file(s)", "1 without an extension"):
        assert words in counts.files
    assert "1 image(s) beside the class folders (val)" in counts.files
    (line,) = [line for line in plan.lines(config, None, counts, tmp_path, 1) if line.startswith("files")]
    assert counts.files in line
    assert dataset.load(root, "train", str(tmp_path / "cache")).fingerprint == before.fingerprint


def test_class_folders_in_either_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    """macOS decomposes the names of a data set that is copied from it."""
    names = ("caf\u00e9", "\u00e5re", "zoo")
    root = write_photos(tmp_path / "data", 2, 1, names)
    for name in names:
        (root / "val" / name).rename(root / "val" / unicodedata.normalize("NFD", name))
    dataset.check_folder(root)
    train, val = (dataset.load(root, split, str(tmp_path / "cache")) for split in ("train", "val"))
    told = class_maps.class_map(val.classes, train.classes, val.folder)
    assert [train.classes[k] for k in told] == list(val.classes)
    assert all(val.path(k).is_file() for k in range(3))
    (root / "train" / unicodedata.normalize("NFD", names[0])).mkdir()
    with pytest.raises(UserError, match="two folders for class"):
        dataset.check_folder(root)


def exchanged(root: Path, how: str) -> None:
    for folder in (root / "train").iterdir():
        if how == "more files":
            (folder / "more.jpg").write_bytes(JPEG)
        elif how == "other names":
            (folder / "000.jpg").rename(folder / "0.jpg")
        elif how == "other pictures":
            Image.effect_noise((64, 48), 20).save(folder / "000.jpg")
    if how == "more classes":
        shutil.copytree(root / "train" / "ash", root / "train" / "oak")


@pytest.mark.parametrize("how", ["more files", "other names", "other pictures", "more classes"])
def test_a_data_set_that_is_exchanged_behind_equal_times_is_noticed(tmp_path: Path, how: str) -> None:
    root = write_photos(tmp_path / "data", 3, 1)
    age(root)
    first = dataset.load(root, "train", str(tmp_path / "cache"))
    assert dataset.load(root, "train", str(tmp_path / "cache")).contents == first.contents
    exchanged(root, how)
    age(root)
    second = dataset.load(root, "train", str(tmp_path / "cache"))
    assert second.fingerprint != first.fingerprint
    assert second.fingerprint == dataset.load(root, "train", str(tmp_path / "new")).fingerprint
    assert second.contents == dataset.load(root, "train", str(tmp_path / "new")).contents


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards_exchanged_behind_equal_sizes_and_times_are_noticed(tmp_path: Path) -> None:
    """Refused, and taken once the index of the old ones is removed, as the message says."""
    found = []
    for seed in (0, 1):
        photo = p.encode(p.photograph(30, 40 + seed, seed))
        write_tar(tmp_path / "val" / "0.tar", [("0.jpg", photo), ("0.cls", b"0"), ("1.jpg", photo), ("1.cls", b"1")])
        os.utime(tmp_path / "val" / "0.tar", (1e9, 1e9))
        if found:
            with pytest.raises(
                UserError, match=r"0\.tar is not what it was when .*: 2 of its images have changed"
            ) as refused:
                dataset.load(tmp_path, "val", str(tmp_path / "cache"))
            (file,) = re.findall(r"`?rm (\S+?)`?, and the same", str(refused.value))
            Path(file).unlink()
        found.append(dataset.load(tmp_path, "val", str(tmp_path / "cache")))
    assert [index.sizes[0].tolist() for index in found] == [[30, 40], [30, 41]]


WRITERS: dict[str, tuple[str, Callable[[int, int], list[tuple[str, bytes]]]]] = {
    "folder": ("{split}/{split}-{k:06d}.tar", lambda i, c: [(f"{i:06d}.jpg", JPEG), (f"{i:06d}.cls", str(c).encode())]),
    "one folder": ("x1k-{split}-{k:04d}.tar", lambda i, c: [(f"{i}.JPEG", JPEG), (f"{i}.cls", f"{c}\n".encode())]),
    "json": ("{split}_{k}.tar", lambda i, c: [(f"{i}.jpeg", JPEG), (f"{i}.json", json.dumps({"label": c}).encode())]),
    "dots": ("{split}/{k}.tar", lambda i, c: [(f"v1.{c}/a.{i}.jpg", JPEG), (f"v1.{c}/a.{i}.cls", str(c).encode())]),
    "each from zero": ("{split}/{k}.tar", lambda i, c: [(f"{i % 3}.jpg", JPEG), (f"{i % 3}.cls", str(c).encode())]),
    "macOS": (
        "{split}/{k}.tar",
        lambda i, c: [
            (f"._{i}.jpg", b"fork"),
            (f"{i}.jpg", JPEG),
            (f"._{i}.cls", b"\x00\x05"),
            (f"{i}.cls", b"%d" % c),
        ],
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_shards_of_other_writers_are_a_data_set(tmp_path: Path, writer: str) -> None:
    path, members = WRITERS[writer]
    for split in ("train", "val"):
        for k in range(2):
            held = [member for i in range(3 * k, 3 * k + 3) for member in members(i, i % 3)]
            write_tar(tmp_path / path.format(split=split, k=k), held)
    data = Data(root=str(tmp_path), cache=str(tmp_path / "cache"))
    assert [found.images for found in dataset.check_folder(tmp_path, data).values()] == [6, 6]
    assert plan.count(Config(data=data)).classes == 3
    found = dataset.load(tmp_path, "val", str(tmp_path / "cache"))
    assert np.bincount(found.labels).tolist() == [2, 2, 2]
    assert all(found.read(k).tobytes() == JPEG for k in range(6))
    assert len(set(found.names())) == 6


def test_labels_of_shards_may_be_class_names(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pairs = [((f"{k}.jpg", JPEG), (f"{k}.cls", name.encode())) for k, name in enumerate(("birch", "ash"))]
        write_tar(tmp_path / split / "0.tar", [member for pair in pairs for member in pair])
    dataset.check_folder(tmp_path)
    found = dataset.load(tmp_path, "val", str(tmp_path / "cache"))
    assert {found.name(k): found.classes[found.labels[k]] for k in range(2)} == {"0.jpg": "birch", "1.jpg": "ash"}


def test_masks_of_a_sample_are_no_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But pictures with dots in their names, each with a label, are: `data shard` writes those."""
    for k, name in ((0, "0"), (1, "1")):
        parts = [(f"{name}.png", JPEG), (f"{name}.mask.png", JPEG), (f"{name}.cls", name.encode())]
        write_tar(tmp_path / "val" / f"{k}.tar", parts)
    found = dataset.load(tmp_path, "val", str(tmp_path / "cache"))
    assert (list(found.names()), found.labels.tolist()) == (["0.png", "1.png"], [0, 1])
    assert "passed over 2 second picture(s) of a sample (.mask.png)" in capsys.readouterr().err
    root = write_photos(tmp_path / "data", 2, 1)
    for folder in (root / "train").iterdir():
        (folder / "001.jpg").rename(folder / "000.v2.jpg")
    index = dataset.load(root, "train", str(tmp_path / "cache"))
    shards.write_shards(index, tmp_path / "out" / "train", 3)
    again = dataset.load(tmp_path / "out", "train", str(tmp_path / "other"))
    assert again.fingerprint == index.fingerprint


def test_labels_that_shards_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    root, names = flat(tmp_path)
    for k, name in enumerate(names):
        (root / "val" / name).rename(root / "val" / f"frame.{k}.jpg")
    (root / "val.txt").write_text(
        "".join(f"frame.{k}.jpg {wnid}\n" for k, wnid in enumerate([*WNIDS, *WNIDS, *WNIDS][:7]))
    )
    index = dataset.load(root, "val", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"have other labels, and WebDataset has them under one name, 'frame\.cls'"):
        shards.write_shards(index, tmp_path / "out", 3)


def test_an_index_of_class_folders_is_none_of_the_shards_that_replace_them(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data", 1, 1)
    dataset.load(root, "val", str(tmp_path / "cache"), checksums=True)
    shutil.rmtree(root / "val")
    write_tar(root / "val" / "0.tar", [("0.jpg", JPEG), ("0.cls", b"0")])
    assert len(dataset.load(root, "val", str(tmp_path / "cache"))) == 1


def test_a_split_may_be_a_pattern_of_tar_files(tmp_path: Path) -> None:
    for k in range(4):
        write_tar(tmp_path / f"part-{k:03d}.tar", [(f"{k}.jpg", JPEG), (f"{k}.cls", str(k % 2).encode())])
    data = Data(train_split="part-{000..001}.tar", val_split="part-{002,003}.tar", cache=str(tmp_path / "cache"))
    found = dataset.check_folder(tmp_path, data)
    assert (found["train"].images, found["val"].images) == (2, 2)
    assert list(dataset.load(tmp_path, data.val_split, str(tmp_path / "cache")).names()) == ["2.jpg", "3.jpg"]
    with pytest.raises(UserError, match=r"has no part-004\.tar, which 'part-\{003\.\.004\}\.tar' names"):
        layout.find(tmp_path, "part-{003..004}.tar")


def test_dots_in_the_names_of_folders_and_files(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "data", 1, 1, ("v1.0", "v1.1"))
    (root / "train" / "v1.0" / "000.jpg").rename(root / "train" / "v1.0" / "a.b.jpg")
    assert list(dataset.load(root, "train", str(tmp_path)).names()) == ["v1.0/a.b.jpg", "v1.1/000.jpg"]
