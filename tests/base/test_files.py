"""Files are whole or absent, and a full disk is named with what to do, by commands, FAILED and status alike."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.commands import run, tiny

from fixres_dist.base.errors import exit_code
from fixres_dist.base.files import create, no_room, sweep, whole, write_text
from fixres_dist.base.signals import StopFlag
from fixres_dist.cluster import status
from fixres_dist.models import tensor_files
from fixres_dist.runs import checkpoint
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.training import worker
from fixres_dist.training.cache.store import Store

SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"  # what it raises has no errno


def interrupted(file: Path, error: Exception) -> None:
    with whole(file) as part:
        part.write_text("what fitted")
        raise error


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with whole(file) as part:
        part.write_text("old")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError):
        interrupted(file, ZeroDivisionError())
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_writer_or_an_older_one_left_is_no_part_of_a_folder(tmp_path: Path) -> None:
    """Temporary files of this version (with a process and a word drawn at random) and of older ones (the process alone)."""
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "older").touch()
    for name in (".step.77", ".step.78.0123abcd.part", ".other.77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / ".step.79.0123abcd.part").touch()  # of another writer, at this moment
    (tmp_path / ".step.lock").touch()
    with whole(tmp_path / "step") as part:
        part.mkdir()
        (part / "new").touch()
    kept = {"step", "step/new", ".other.77", ".other.77/stale", ".step.79.0123abcd.part", ".step.lock"}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == kept
    sweep(tmp_path, age_s=0)
    assert {path.name for path in tmp_path.iterdir()} == {"step", ".step.lock"}


def test_two_writers_of_one_file_with_the_same_process_number_do_not_meet(tmp_path: Path) -> None:
    """Containers number their processes from 1."""
    with whole(tmp_path / "a") as one, whole(tmp_path / "a") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    replaced = os.replace

    def replace(part: Path, path: Path) -> None:
        assert {entry.stat().st_ino for entry in (part, *part.rglob("*"))} <= synced, "not yet on the disk"
        replaced(part, path)

    monkeypatch.setattr(os, "replace", replace)
    with whole(tmp_path / "folder") as part:
        (part / "deep").mkdir(parents=True)
        (part / "deep" / "file").write_text("text")
        (part / "file").write_text("text")
    write_text(tmp_path / "file", "text")
    create(tmp_path / "new", "text")
    assert (tmp_path / "new").stat().st_ino in synced
    with pytest.raises(FileExistsError):
        create(tmp_path / "new", "other")
    assert (tmp_path / "new").read_text() == "text"


def test_a_folder_is_replaced_before_the_old_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of the deletion left a part of the old checkpoint, and none of the new one."""
    seen: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append((tmp_path / "step" / "meta").read_text()))
    for text in ("old", "new"):
        with whole(tmp_path / "step") as part:
            part.mkdir()
            (part / "meta").write_text(text)
    assert seen == ["new"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_umasks_mode_whoever_writes_them(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors makes its files private, and mkstemp; a colleague who takes over a run could not read it."""
    before = os.umask(umask)
    try:
        checkpoint.write(tmp_path, checkpoint.Tensors({"a": torch.zeros(2)}, {}, {}), checkpoint.Progress(3, "fix"), {})
        with whole(tmp_path / "program") as part:
            part.touch(mode=0o700)
        write_text(tmp_path / "secret", "text", private=True)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes.pop("secret") == 0o600
    assert modes.pop("program") == mode | 0o100
    assert set(modes.values()) == {mode}
    assert len(modes) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception(SAFETENSORS),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ],
)
def test_every_librarys_full_disk_is_one_error_with_the_path(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        interrupted(tmp_path / "a", error)
    assert no_room(raised.value) == f"no space is left on the disk: {tmp_path / 'a'}"
    assert list(tmp_path.iterdir()) == []


def test_torchs_full_disk_is_the_systems_error_too(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left") as raised,
        whole(tmp_path / "a.pth"),
        open("/dev/full", "wb") as disk,
    ):
        torch.save({"weight": torch.zeros(10**6)}, disk)
    assert no_room(raised.value) == f"no space is left on the disk: {tmp_path / 'a.pth'}"


def test_a_quota_is_told_apart_and_other_errors_are_not_about_room(tmp_path: Path) -> None:
    assert no_room(OSError(errno.EDQUOT, "Disk quota exceeded", "f")) == "the disk quota is used up: f"
    assert no_room(OSError(errno.ENOSPC, "No space left on device")) == "no space is left on the disk"
    assert no_room(PermissionError(errno.EACCES, "Permission denied", "f")) == ""
    assert no_room(ValueError("the picture has 28 rows")) == ""


def test_a_command_says_it_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a")

    def broken() -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "a")

    assert exit_code(full) == 1
    assert capsys.readouterr().err == (
        "error: no space is left on the disk: runs/a. Next: make room, then the same command.\n"
    )
    with pytest.raises(FileNotFoundError):
        exit_code(broken)


def test_memory_that_ran_out_is_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    """As for pictures of 100,000 px."""

    def huge() -> int:
        return len(torch.empty(2**60, device="cpu"))

    assert exit_code(huge) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: memory ran out: ")
    assert said.endswith(". Next: a smaller size, or fewer pictures at a time (run.batch_per_device=1).\n")


def test_a_segment_and_a_checkpoint_that_do_not_fit_leave_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches() -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    store = Store(tmp_path / "features", 4, 1, ((2,),), torch.float32)
    store.folder.mkdir()
    with pytest.raises(OSError, match=r"0000000000-0000000004\.rows"):
        store.write((0, 4), batches())

    def save_file(_: Any, file: Path, *__: Any) -> None:
        file.write_bytes(b"the first blocks")
        raise RuntimeError(SAFETENSORS)

    monkeypatch.setattr(tensor_files, "save_file", save_file)
    with pytest.raises(OSError, match="step_00000003"):
        checkpoint.write(tmp_path / "checkpoints", checkpoint.Tensors({}, {}, {}), checkpoint.Progress(3, "fix"), {})
    assert [path.name for path in tmp_path.rglob("*") if path.name != "features"] == ["checkpoints"]


@pytest.fixture
def prepared(tmp_path: Path, photos: Path) -> RunDir:
    done = run(*tiny(tmp_path, "r", photos, 1, "--prepare"))
    assert done.returncode == 0, done.stderr
    return RunDir(tmp_path / "r")


def test_failed_names_the_file_and_the_command(prepared: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(prepared.checkpoints))

    monkeypatch.setattr(worker, "work", full)
    with pytest.raises(OSError, match="No space left"):
        worker.train(prepared.root, StopFlag())
    why, following = prepared.failed.read_text().splitlines()
    assert why == f"no space is left on the disk: {prepared.checkpoints}"
    assert following.startswith("Next: make room, then python launch/submit.py --model test_efficientnet")
    (row,) = status.rows([prepared])
    assert f"{prepared.checkpoints}. Next: make room" in row.reason


def test_status_sees_a_disk_too_full_for_failed(prepared: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared.update_state(Event.STARTED)
    (row,) = status.rows([prepared])
    command = (prepared.root / "command.txt").read_text().strip()
    assert row.reason == f"its process is gone. Next, from the last checkpoint: {command}"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    (row,) = status.rows([prepared])
    assert row.state == "failed"
    assert f"its process is gone; 0.0 MiB are free where {prepared.root} is: make room first. Next" in row.reason


def test_a_reason_with_a_name_of_another_encoding_is_written_down(tmp_path: Path) -> None:
    create(tmp_path / "FAILED", "cannot read gr\udcf6\udcdfe.jpg")
    assert (tmp_path / "FAILED").read_text() == "cannot read gr\\udcf6\\udcdfe.jpg"
