"""Deny lists in the forms that people write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from support.folders import write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config, Data
from fixres_dist.data import dataset, deny_lists
from fixres_dist.training import plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_photos(tmp_path_factory.mktemp("deny") / "photos", 2, 2, ("ash", "caf\u00e9"))
    (root / "val" / "ash" / "001.jpg").rename(root / "val" / "ash" / "with blank #2.jpg")
    (root / "val" / "ash" / "000.jpg").rename(root / "val" / "ash" / "once.jpg")
    return root


@pytest.mark.parametrize(
    "line",
    [
        "val/ash/once.jpg",
        "ash/once.jpg",
        "./val/ash/once.jpg",
        "photos/val/ash/once.jpg",
        "{root}/val/ash/once.jpg",
        "/elsewhere/val/photos/val/ash/once.jpg",
        "val\\ash\\once.jpg",
        "C:\\data\\val\\ash\\once.jpg",
        '"val/ash/once.jpg"',
        "'{root}/val/ash/once.jpg'  ",
        "val/ash/once.jpg\ttruncated",
        "val/ash/once.jpg  # truncated",
        "once.jpg",
    ],
)
@pytest.mark.parametrize("form", ["{}\n", "\ufeff# to leave out\r\n\r\n{}\r\n", "{}"])
def test_a_line_names_an_image_in_any_form(tmp_path: Path, root: Path, line: str, form: str) -> None:
    deny = tmp_path / "deny.txt"
    deny.write_bytes(form.format(line.format(root=root)).encode())
    left = dataset.load(root, "val", str(tmp_path / "cache"), deny_list=str(deny))
    assert len(left) == 3
    assert "ash/once.jpg" not in left.names()
    assert len(dataset.load(root, "train", str(tmp_path / "cache"), deny_list=str(deny))) == 4
    counts = plan.count(Config(data=Data(root=str(root), deny_list=str(deny))))
    assert (counts.train, counts.val) == (4, 3)
    assert "deny list: 1 image(s) left out" in counts.files
    assert "name none" not in counts.files


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("val/ash/with blank #2.jpg", "ash/with blank #2.jpg"),
        ("val/ash/with blank #2.jpg # blurred", "ash/with blank #2.jpg"),
        (unicodedata.normalize("NFD", "val/caf\u00e9/000.jpg"), "caf\u00e9/000.jpg"),
    ],
)
def test_names_that_look_like_remarks_or_are_decomposed(tmp_path: Path, root: Path, line: str, name: str) -> None:
    (tmp_path / "deny.txt").write_text(line)
    known = list(dataset.load(root, "val", str(tmp_path / "cache")).names())
    assert deny_lists.names(str(tmp_path / "deny.txt"), "val", known) == ({name}, frozenset())


def test_what_names_nothing_is_said_and_a_list_that_names_nothing_refused(tmp_path: Path, root: Path) -> None:
    deny = tmp_path / "deny.txt"
    data = Data(root=str(root), deny_list=str(deny))
    deny.write_text("val/ash/once.jpg\nval/oak/1.jpg\n")
    assert "1 line(s) name none (such as 'val/oak/1.jpg')" in plan.count(Config(data=data)).files
    deny.write_text("val/oak/1.jpg\n")
    with pytest.raises(UserError, match=r"no line of .*'val/oak/1.jpg'.*Accepted"):
        dataset.check_folder(root, data)
    deny.write_text("000.jpg\n")
    with pytest.raises(UserError, match=r"'000\.jpg', which is the name of 2 images"):
        dataset.check_folder(root, data)
    deny.write_text("# nothing yet\n")
    assert dataset.check_folder(root, data)["val"].images == 4
