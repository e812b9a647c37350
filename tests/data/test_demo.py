from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from fixres_dist.base.errors import UserError
from fixres_dist.data import dataset, demo


def digest(root: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.jpg")):
        total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


def test_the_same_files_whatever_the_number_of_processes(tmp_path: Path) -> None:
    for name, workers, seed in (("a", 1, 0), ("b", 2, 0), ("c", 2, 1)):
        demo.write_demo(tmp_path / name, n_train=32, n_val=16, workers=workers, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    dataset.check_folder(tmp_path / "a")
    found = dataset.load(tmp_path / "a", "train", str(tmp_path / "cache"))
    assert len(found) == 32
    assert found.classes == demo.CLASSES
    with Image.open(found.path(0)) as image:
        assert image.format == "JPEG"


def test_an_interrupted_call_is_continued(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        demo.write_demo(tmp_path / "d", n_train=32, n_val=16, workers=1, progress=stop)
    assert not (tmp_path / "d").exists()
    (half,) = tmp_path.glob(".d-*")
    first = min(half.rglob("*.jpg")).stat().st_mtime_ns
    demo.write_demo(tmp_path / "d", n_train=32, n_val=16, workers=1)
    assert len(list((tmp_path / "d").rglob("*.jpg"))) == 48
    assert min((tmp_path / "d").rglob("*.jpg")).stat().st_mtime_ns == first, "what was there is not written again"
    calls: list[int] = []
    demo.write_demo(tmp_path / "d", n_train=32, n_val=16, progress=lambda done, total: calls.append(done))
    assert not calls


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("draft")
    with pytest.raises(UserError, match="holds something else"):
        demo.write_demo(tmp_path / "mine", n_train=16, n_val=16)
    demo.write_demo(tmp_path / "d", n_train=16, n_val=16, workers=1)
    with pytest.raises(UserError, match="seed 0, not 5"):
        demo.write_demo(tmp_path / "d", n_train=16, n_val=16, seed=5)
