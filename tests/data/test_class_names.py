from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets

from fixres_dist.base.errors import UserError
from fixres_dist.data import class_maps, class_names


@pytest.mark.parametrize(
    "names", [list(map(str, range(12))), ["Bee", "apple", "Zoo", "ant"], ["c10", "c9", "C1", "c1b"], ["007", "7a"]]
)
def test_natural_is_the_order_that_timm_gives_folders(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").touch()
    _, order = find_images_and_targets(str(tmp_path))
    assert class_names.natural(names) == sorted(order, key=order.__getitem__)


def test_imagenets_classes_are_timms_by_id_number_and_name() -> None:
    known = class_names.imagenet()
    assert list(known.names) == ImageNetInfo().label_names()
    folders = ["n01443537", "n02006656"]
    assert class_maps.class_map(folders, known.names, Path("x"), known.aliases) == (1, 129)
    assert class_maps.class_map(["10", "9"], known.names, Path("x"), known.aliases) == (10, 9)
    named = ["great_white_shark", "Tench", "goldfish, Carassius auratus"]
    assert class_maps.class_map(named, known.names, Path("x"), known.aliases) == (2, 0, 1)
    with pytest.raises(UserError, match="does not know: crane"):  # a bird and a machine
        class_maps.class_map(["crane", "tench"], known.names, Path("x"), known.aliases)


TEXT = {
    "names.txt": "ash\nsilver birch\ncedar\n",  # as timm's --class-map
    "table.csv": "folder,index\nash,0\nsilver birch,1\ncedar,2\n",
    "table.txt": "cedar 2\nash 0\nsilver birch 1\n",
    "numbered.txt": "0 ash\n1 silver birch\n2 cedar\n",
    "names.json": json.dumps(["ash", "silver birch", "cedar"]),
    "index.json": json.dumps({"ash": 0, "silver birch": 1, "cedar": 2}),
    "class_index.json": json.dumps({"0": "ash", "1": "silver birch", "2": "cedar"}),
    "config.json": json.dumps({"architecture": "x", "label_names": ["ash", "silver birch", "cedar"]}),
    "marked.json": "\ufeff" + json.dumps(["ash", "silver birch", "cedar"]),
}


@pytest.mark.parametrize("name", TEXT)
def test_files_in_the_forms_people_have(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(TEXT[name])
    found = class_names.named(str(tmp_path / name), (), 5)
    assert found.names == ("ash", "silver birch", "cedar", "class_3", "class_4")


@pytest.mark.parametrize(
    "text",
    [
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n",
        '{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}',
    ],
)
def test_lists_of_imagenets_classes_have_ids_and_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    found = class_names.from_file(tmp_path / "f")
    assert class_maps.class_map(["Goldfish", "n01440764"], found.names, tmp_path, found.aliases) == (1, 0)


def test_a_map_of_some_folders_leaves_other_classes_without_names(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("ash 3\nbirch 1\n")
    assert class_names.from_file(tmp_path / "f").names == ("class_0", "birch", "class_2", "ash")


def test_weights_name_their_classes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"label_names": '["b", "a"]'})
    assert class_names.from_file(tmp_path / "w.safetensors").names == ("b", "a")


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file"), ("", "it is empty"), ("ash\nash\n", "a name stands twice"), ("{", "Expecting property"),
     ("a 1\nb 1\n", "two folders have one number"), ('{"a": "x"}', "'0'"), ("[1, 2]", "not iterable")],
)  # fmt: skip
def test_what_is_no_class_map_is_refused_with_the_accepted_forms(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "f").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        class_names.named(str(tmp_path / "f"), ())
    assert "Accepted: natural (timm's order" in str(caught.value)


def test_imagenets_folders_are_known_where_their_order_is_another() -> None:
    numbers, ids = sorted(map(str, range(1000))), list(class_names.imagenet().names)
    assert class_names.is_imagenet(numbers)
    assert not class_names.is_imagenet(ids), "their order is ImageNet's"
    assert not class_names.is_imagenet(numbers[:20])
