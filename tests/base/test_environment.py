"""Homes and caches as containers and clusters have them: none, read-only, of somebody else."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest
from support.folders import age, as_an_ordinary_user, open_to_all, write_photos

from fixres_dist.base import environment
from fixres_dist.base.environment import cache_folder, scratch_folder, writable
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import owner
from fixres_dist.data import dataset
from fixres_dist.training import compiled_code
from fixres_dist.training.cache import rule


def nobody(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def test_the_cache_of_a_user_without_home_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIXRES_CACHE")
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_folder() == Path("/home/ada/.cache/fixres_dist")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_folder() == scratch_folder()
    assert cache_folder("/data/cache") == Path("/data/cache")


def test_an_owner_without_a_name_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert owner(tmp_path) == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert owner(tmp_path) == str(os.getuid())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_cache_of_somebody_else_is_read_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = write_photos(tmp_path / "data", 3, 2), tmp_path / "cache"
    age(data)
    first = [dataset.load(data, "train", str(cache)) for _ in range(2)][1]  # loads what Python loads late
    open_to_all(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "fixres_dist-compiled-0"))
    with as_an_ordinary_user():
        assert not writable(cache / "features")
        assert rule.free_bytes(cache / "features") == 0
        compiled_code.keep(str(cache))
        assert not list(cache.glob("compiled*"))
        assert dataset.load(data, "train", str(cache)).fingerprint == first.fingerprint
        assert "is not kept" not in capsys.readouterr().err
        assert len(dataset.load(data, "val", str(cache))) == 6
        assert "data.cache=DIR" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"data\.cache=DIR"):
            dataset.folder("demo", str(cache))
    cache.joinpath("private").mkdir(mode=0o700)
    with as_an_ordinary_user():
        assert not writable(cache / "private" / "features"), "what may not be looked at"


def test_a_changed_file_of_another_encoding_is_no_reason_not_to_start(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *words], check=True)

    git("init", "-q")
    (tmp_path / "notes.txt").write_bytes("größe\n".encode("latin-1"))
    git("add", ".")
    git("commit", "-qm", "x")
    (tmp_path / "notes.txt").write_bytes("größer\n".encode("latin-1"))
    assert "+gr\ufffd\ufffder" in str(environment.git(tmp_path, "diff", "HEAD"))
