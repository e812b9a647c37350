"""Disks that are really full, read-only or away: a tmpfs of a few KiB. Where this user may not mount one, these tests are left out."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from os import statvfs
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.in_process import SETTINGS, called

from fixres_dist.base import storage
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER
from fixres_dist.data import folders
from fixres_dist.data.index import Index
from fixres_dist.runs import checkpoint
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import State
from fixres_dist.training import loop, stage_training
from fixres_dist.training.cache import rule
from fixres_dist.training.cache.store import Store
from fixres_dist.training.predictions import Predictions

FULL = "no space is left on the disk"


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 64 MiB; no write waits before it is tried again."""
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0))
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "none", place)
    (place / "others").write_bytes(bytes(65536))  # a size of 0 would be none
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def leave(disk: Path, free_kib: int) -> None:
    """Room for so much more."""
    found = statvfs(disk)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize // 1024
    mount("-o", f"remount,size={used + free_kib}k", disk)


def check_whole(folder: Path) -> None:
    """Nothing lies half-written under its name, and nothing under a temporary one."""
    for path in folder.rglob("*"):
        assert not path.name.endswith(".part") or path.name == ".out.part", path  # where extract goes on
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".npz":
            assert zipfile.ZipFile(path).testzip() is None


def cached(folder: Path) -> list[str]:
    """Settings of a run that keeps its index and its features in `folder`."""
    settings = [word for word in SETTINGS if not word.startswith(("run.engine", "tune.epochs"))]
    return [*settings, "run.engine=cached", "data.train_transform=test", "tune.epochs=1", f"data.cache={folder}"]


def test_a_run_on_a_disk_that_fills_up(disk: Path, runs: Path) -> None:
    """It ends at other files each time: settings, a checkpoint, measurements, the export. With room it goes on to the same bits."""
    shutil.copytree(runs / "half", disk / "half", symlinks=True)
    run, named = RunDir(disk / "half" / "r"), set()
    resume = ("resume", "r", "--runs-dir", run.root.parent, "--cluster", "inline")
    for free_kib in (0, 4, 20, 100):
        leave(disk, free_kib)
        code, text = called(*resume)
        assert (code, FULL in text, "Traceback" in text) == (EXIT_FAILED, True, False), text
        assert "Next: make room, then" in text
        named.add(text.rpartition(FULL)[2].partition(". Next")[0].removeprefix(f": {run.root}/"))
        check_whole(run.root)
    assert len(named) >= 3, named
    leave(disk, 60_000)
    code, text = called(*resume)
    assert code == EXIT_DONE, text
    undisturbed = load_file(runs / "runs" / "r" / "export" / "model.safetensors")
    found = load_file(run.root / "export" / "model.safetensors")
    assert all(found[name].equal(undisturbed[name]) for name in undisturbed)
    assert run.state().state == State.DONE


def test_a_run_on_a_disk_that_cannot_be_written(disk: Path, runs: Path) -> None:
    shutil.copytree(runs / "half", disk / "half", symlinks=True)
    mount("-o", "remount,ro", disk)
    code, text = called("resume", "r", "--runs-dir", disk / "half", "--cluster", "inline")
    assert (code, "Read-only file system" in text, "Traceback" in text) == (EXIT_USER, True, False), text
    assert str(disk / "half" / "r") in text


def test_features_and_index_on_a_disk_that_is_full(disk: Path, runs: Path, tmp_path: Path) -> None:
    """The index is done without; features are refused before the trunk runs, with the room they need."""
    leave(disk, 0)
    submit = ("submit", "--data", runs / "data", "--runs-dir", tmp_path / "runs", *cached(disk))
    code, text = called(*submit)
    assert (code, "Traceback" in text) == (EXIT_USER, False), text
    assert f"{disk}/index: No space left on device" in text
    assert f"MiB in {disk}/features" in text
    check_whole(disk)
    leave(disk, 60_000)
    code, text = called(*submit)
    assert code == EXIT_DONE, text


def test_an_index_whose_disk_is_unmounted_while_headers_are_read(
    disk: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done without; nothing is written to the disk below."""
    below, scan = tmp_path / "below", folders.scan
    below.mkdir()
    mount("--bind", disk, below)

    def unmounted(*arguments: Any) -> Index:
        subprocess.run(["umount", "-l", str(below)], check=True)
        return scan(*arguments)

    monkeypatch.setattr(folders, "scan", unmounted)
    code, text = called("data", "index", "--data", runs / "data", "--split", "train", "--cache", below)
    assert (code, "Traceback" in text) == (EXIT_DONE, False), text
    assert f"train is not kept, and the next start reads the headers again: {below}/index" in text
    assert not list(below.iterdir())


def test_a_disk_that_fills_up_while_features_are_written(
    disk: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write there once the room has been looked at."""
    monkeypatch.setattr(rule, "free_bytes", lambda folder: 1 << 40)
    submit = ("submit", "--data", runs / "data", "--runs-dir", tmp_path / "runs", *cached(disk))
    leave(disk, 12)
    code, text = called(*submit)
    assert (code, "Traceback" in text) == (EXIT_FAILED, False), text
    assert f"{FULL}: {disk}/features/" in text
    assert "Next: make room, then" in text
    check_whole(disk)
    leave(disk, 60_000)
    code, text = called(*submit)
    assert code == EXIT_DONE, text


@pytest.mark.parametrize(
    "moment",
    [
        (checkpoint, "write"),
        (Predictions, "save"),
        (loop, "write_weights"),
        (stage_training, "Tracker"),
        (Store, "write"),
    ],
    ids=["checkpoint", "predictions", "export", "stage", "features"],
)
def test_a_disk_that_is_unmounted_while_a_run_writes(
    moment: tuple[Any, str], disk: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends by name, and nothing is written to the disk below; once it is back, the run goes on to the same bits."""
    below = tmp_path / "below"
    below.mkdir()
    mount("--bind", disk, below)
    shutil.copytree(runs / "half", disk / "half", symlinks=True)
    command: tuple[object, ...] = ("resume", "r", "--runs-dir", below / "half", "--cluster", "inline")
    if moment[0] is Store:
        command = ("submit", "--data", runs / "data", "--runs-dir", tmp_path / "runs", *cached(below))
    act = getattr(*moment)

    def unmounted(*arguments: object, **named: object) -> object:
        subprocess.run(["umount", "-l", str(below)], check=False)  # the second time there is nothing to unmount
        return act(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(*moment, unmounted)
        code, text = called(*command)
    assert (code, "Traceback" in text, str(below) in text) == (EXIT_FAILED, False, True), text
    assert not list(below.iterdir())
    mount("--bind", disk, below)
    code, text = called(*command)
    subprocess.run(["umount", "-l", str(below)], check=True)
    assert code == EXIT_DONE, text
    check_whole(disk)
    if moment[0] is not Store:
        weights = "export/model.safetensors"
        undisturbed, found = load_file(runs / "runs" / "r" / weights), load_file(disk / "half" / "r" / weights)
        assert all(found[name].equal(undisturbed[name]) for name in undisturbed)


@pytest.mark.parametrize(
    "words",
    [
        ("export", "--run", "{run}", "--out", "{disk}/out"),
        ("report", "{run}", "--out", "{disk}/out"),
        ("data", "shard", "--data", "{data}", "--split", "val", "--out", "{disk}/out"),
        ("extract", "--run", "{run}", "--out", "{disk}/out"),
        ("evaluate", "--run", "{run}", "--json", "{disk}/out.json"),
    ],
    ids=lambda words: words[0],
)
def test_results_on_a_disk_that_is_full(words: tuple[str, ...], disk: Path, runs: Path) -> None:
    leave(disk, 0)
    places = {"run": runs / "runs" / "r", "disk": disk, "data": runs / "data"}
    code, text = called(*(word.format(**places) for word in words))
    assert (code, "Traceback" in text) == (EXIT_FAILED, False), text
    assert f"{FULL}: {disk}/out" in text
    assert "Next: make room, then the same command" in text
    check_whole(disk)
