from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps
from fixres_dist.data.index import Index

HERE = Path("set")


WORDNET = [f"n{k:08d}" for k in range(12)]
AS_TEXT = ["0", "1", "10", "11", *map(str, range(2, 10))]  # 0 to 11, sorted as text


@pytest.mark.parametrize(
    ("folders", "trained", "classes"),
    [
        (WORDNET, WORDNET, tuple(range(12))),
        (["n00000009", "n00000002"], WORDNET, (9, 2)),
        (AS_TEXT, WORDNET, (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)),
        (["007"], WORDNET, (7,)),
        (["10", "2"], AS_TEXT, (2, 4)),  # names win: this model was trained on them
    ],
)
def test_folders_are_classes_by_name_or_by_number(folders: list[str], trained: list[str], classes: tuple[int]) -> None:
    assert class_maps.class_map(folders, trained, HERE) == classes


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["n00000001", "tench"], "1 class folder.s. of 2 that the model does not know: tench"),
        (["3", "12"], "does not know: 12"),
        (["3", "tench"], "does not know: 3, tench"),
        (["3", "03"], "two folders for one class"),
        ([f"x{k}" for k in range(9)], "x0, x1, x2, x3, x4, x5 and 3 more"),
    ],
)
def test_class_maps_that_do_not_fit_are_refused_by_name(folders: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        class_maps.class_map(folders, WORDNET, HERE)


def test_the_models_classes_come_from_the_run_the_training_folders_or_the_split(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    config = reading.parse(Config, {"data": {"root": str(data)}})
    for k in range(11):
        (data / "val" / str(k)).mkdir(parents=True)
    assert class_maps.trained_classes(config, None, "val") == tuple(sorted(map(str, range(11)))), "torchvision's order"
    for k in range(11, 1000):
        (data / "val" / str(k)).mkdir()
    assert class_maps.trained_classes(config, None, "val")[:2] == ("n01440764", "n01443537"), "ImageNet-V2's folders"
    for name in ("2", "10"):
        (data / "train" / name).mkdir(parents=True)
    assert class_maps.trained_classes(config, None, "val") == ("10", "2"), "as an ImageFolder is trained on"
    run.mkdir()
    (run / "class_index.json").write_text(json.dumps({"0": "tench", "1": "goldfish"}))
    assert class_maps.trained_classes(config, run, "val") == ("tench", "goldfish")


def test_real_labels_go_by_file_name_where_no_numbers_are(tmp_path: Path) -> None:
    names = [b"ash/7.jpg", b"birch/3.jpg", b"birch/9.jpg"]
    sizes = np.full((3, 2), 100, np.int32)
    index = Index(
        HERE,
        ("ash", "birch"),
        b"".join(names),
        np.cumsum([9, 11, 11]),
        np.array([0, 1, 1], np.int32),
        sizes,
        np.zeros(3, np.uint32),
    )
    (tmp_path / "real.json").write_text(json.dumps([[3], [7], [9, 0]]))
    assert class_maps.real_labels(tmp_path / "real.json", index, 10) == [[7], [3], [9, 0]]
