from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from support.folders import age
from torchvision.datasets import ImageFolder

from fixres_dist.base.errors import UserError
from fixres_dist.data import dataset, folders
from fixres_dist.data.layout import Place


def test_the_same_samples_as_torchvisions_image_folder(photos: Path, tmp_path: Path) -> None:
    found = dataset.load(photos, "train", str(tmp_path))
    reference = ImageFolder(str(photos / "train"))
    assert list(found.classes) == reference.classes
    assert [(str(found.path(i)), int(found.labels[i])) for i in range(len(found))] == reference.samples
    for i in (0, 40, len(found) - 1):
        width, height = reference[i][0].size
        assert found.sizes[i].tolist() == [height, width]


def test_cached_until_a_directory_changes(photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    age(data)
    scans: list[int] = []
    count = lambda done, total: scans.append(total)  # noqa: E731
    first = folders.load(Place(data / "train"), tmp_path / "kept.npz", count)
    second = folders.load(Place(data / "train"), tmp_path / "kept.npz", count)
    assert scans == [84], "the second load must come from the cache"
    assert first.fingerprint == second.fingerprint
    shutil.copy(first.path(0), data / "train" / "ash" / "new.jpg")
    third = folders.load(Place(data / "train"), tmp_path / "kept.npz", count)
    assert len(third) == 85
    assert third.fingerprint != first.fingerprint


def test_a_directory_changed_while_it_was_scanned_is_scanned_again(photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    age(data)
    os.utime(data / "train" / "birch", (time.time(), time.time()))
    scans: list[int] = []
    for _ in range(2):
        folders.load(Place(data / "train"), tmp_path / "kept.npz", lambda done, total: scans.append(total))
    assert scans == [84, 84]


def test_a_torn_cache_is_no_obstacle(photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    age(data)
    dataset.load(data, "val", str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache" / "index").glob("*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(dataset.load(data, "val", str(tmp_path / "cache"))) == 33


def test_unreadable_files_are_named_with_their_reason(photos: Path, tmp_path: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    (data / "train" / "ash" / "empty.jpg").touch()
    (data / "train" / "birch" / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(UserError) as caught:
        dataset.load(data, "train", str(tmp_path / "cache"))
    text = str(caught.value)
    assert "2 of 86" in text
    assert "empty.jpg: empty file" in text
    assert "page.jpg: not an image" in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("gone", ["no data set at"]),
        ("no val", ["has no val/ folder", "found: train"]),
        ("empty class", ["birch", "holds no image"]),
        ("one class", ["has 1 class folder", "two or more"]),
        ("other classes", ["different classes", "oak"]),
    ],
)
def test_what_is_no_data_set_is_refused(photos: Path, tmp_path: Path, damage: str, words: list[str]) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    if damage == "gone":
        shutil.rmtree(data)
    elif damage == "no val":
        shutil.rmtree(data / "val")
    elif damage == "empty class":
        for file in (data / "train" / "birch").iterdir():
            file.unlink()
    elif damage == "one class":
        shutil.rmtree(data / "train" / "birch")
        shutil.rmtree(data / "train" / "cedar")
    else:
        (data / "val" / "ash").rename(data / "val" / "oak")
    with pytest.raises(UserError) as caught:
        dataset.check_folder(data)
    for word in words:
        assert word in str(caught.value)
