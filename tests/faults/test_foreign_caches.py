"""Caches that another user has written, or can write: indexes, features and compiled code are not believed, and end no run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.folders import age, as_an_ordinary_user, open_to_all, write_photos

from fixres_dist.base import owners
from fixres_dist.base.errors import UserError
from fixres_dist.data import dataset
from fixres_dist.data.index import cache_file, read_cached, write_cached
from fixres_dist.training import compiled_code
from fixres_dist.training.cache.build import shut
from fixres_dist.training.cache.store import Store, begin_writing, own_folder

SOMEBODY = 12345  # the number of another user
needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="only root may give files away")


def reversed_labels(file: Path) -> None:
    """The index in `file` with its labels the other way round: in right form, with a right checksum."""
    found = read_cached(file)
    assert found
    labels = found.index.labels
    vars(found.index)["labels"] = labels.max() - labels
    write_cached(found, file)


def give_away(path: Path) -> None:
    os.chown(path, SOMEBODY, SOMEBODY)


@pytest.fixture
def indexed(tmp_path: Path) -> tuple[Path, Path, list[int]]:
    """(data set, cache, its labels), indexed once; nothing in its folders has changed since."""
    data, cache = write_photos(tmp_path / "data", 3, 1, ("ash", "birch")), tmp_path / "cache"
    age(data)
    return data, cache, dataset.load(data, "train", str(cache)).labels.tolist()


@needs_root
@pytest.mark.parametrize("how", ["given away", "writable by all"])
def test_an_index_of_another_user_is_not_believed(
    how: str, indexed: tuple[Path, Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache, labels = indexed
    file = cache_file(data / "train", cache)
    reversed_labels(file)
    assert dataset.load(data, "train", str(cache)).labels.tolist() == labels[::-1], "an own file is believed"
    if how == "given away":
        give_away(file)
    else:
        file.chmod(0o666)
    assert dataset.load(data, "train", str(cache)).labels.tolist() == labels
    assert f"{file} can have been written by others than this user: it is not read" in capsys.readouterr().err
    own = file.with_stem(f"{file.stem}-{os.geteuid()}")
    assert cache_file(data / "train", cache) == own
    assert own.exists(), "the next start does not read the headers again"
    reversed_labels(own)
    give_away(own)
    assert dataset.load(data, "train", str(cache)).labels.tolist() == labels


@needs_root
def test_the_owner_of_the_pictures_may_have_indexed_them(indexed: tuple[Path, Path, list[int]]) -> None:
    data, cache, labels = indexed
    file = cache_file(data / "train", cache)
    reversed_labels(file)
    give_away(file)
    give_away(data / "train")
    assert dataset.load(data, "train", str(cache)).labels.tolist() == labels[::-1]


@needs_root
def test_an_ordinary_user_reads_the_administrators_index_and_does_without_a_place(
    indexed: tuple[Path, Path, list[int]],
) -> None:
    data, cache, labels = indexed
    open_to_all(data)
    open_to_all(cache)
    for path in (*data.rglob("*"), *cache.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with as_an_ordinary_user():
        assert dataset.load(data, "train", str(cache)).labels.tolist() == labels
    give_away(cache_file(data / "train", cache))
    with as_an_ordinary_user():
        assert dataset.load(data, "train", str(cache)).labels.tolist() == labels


def test_what_is_written_under_a_wide_umask_is_still_only_this_users(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", 2, 1, ("ash", "birch"))
    before = os.umask(0o002)
    try:
        dataset.load(data, "train", str(tmp_path / "cache"))
        features = store(tmp_path / "features" / "key")
    finally:
        os.umask(before)
    assert owners.believed(cache_file(data / "train", tmp_path / "cache"))
    assert owners.believed(features.folder)
    assert features.segments() == [(0, 2)]


def store(folder: Path) -> Store:
    """Features of two samples, complete."""
    made = Store(folder, 2, 1, ((3,),), torch.float32)
    begin_writing(made, {})
    made.write((0, 2), [(np.arange(2), [(torch.ones(2, 3),)])])
    return made


@needs_root
def test_features_of_another_user_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = store(tmp_path / "key")
    assert own_folder(made.folder) == made.folder
    give_away(made.path((0, 2)))
    assert made.missing() == [(0, 2)], "a single segment"
    made = store(tmp_path / "key")
    give_away(made.folder)
    own = tmp_path / f"key-{os.geteuid()}"
    assert own_folder(made.folder) == own
    assert f"{made.folder} can have been written by others" in capsys.readouterr().out
    own.mkdir()
    assert own_folder(made.folder) == own
    give_away(own)
    with pytest.raises(UserError, match=r"key-\d+ is another user's. Accepted: run.feature_cache=DIR"):
        own_folder(made.folder)


@needs_root
def test_foreign_features_that_nobody_can_remove_are_not_read_either(tmp_path: Path) -> None:
    made = store(tmp_path / "key")
    give_away(made.path((0, 2)))
    open_to_all(made.folder)
    with as_an_ordinary_user():
        assert made.missing() == [(0, 2)]


@needs_root
def test_compiled_code_in_folders_that_others_can_write_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "cache" / f"compiled-{os.getuid()}"
    for name in ("good", "open", "foreign"):
        (kept / name).mkdir(parents=True)
        (kept / name / "code.py").touch()
    kept.chmod(0o755)
    (kept / "open").chmod(0o777)
    give_away(kept / "foreign")
    for name, mode in (("loose.py", 0o666), ("given.py", 0o644), ("mine.py", 0o644)):
        (kept / name).touch()
        (kept / name).chmod(mode)
    give_away(kept / "given.py")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    monkeypatch.delenv(compiled_code.COMPILER, raising=False)
    monkeypatch.delenv(compiled_code.TRITON, raising=False)
    compiled_code.use_node_folder(str(tmp_path / "cache"))
    node = Path(os.environ[compiled_code.COMPILER])
    found = {str(path.relative_to(node)) for path in node.rglob("*.py")}
    shutil.rmtree(node)
    assert found == {"good/code.py", "mine.py"}


@needs_root
def test_a_run_that_cached_streams_where_missing_features_cannot_be_written_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = store(tmp_path / "key")
    open_to_all(made.folder)
    with as_an_ordinary_user():
        assert not shut([made]), "complete features are read wherever they lie"
    made.path((0, 2)).unlink()
    with as_an_ordinary_user():
        assert shut([made])
    assert f"{made.folder} cannot be written to, and features are missing" in capsys.readouterr().out
