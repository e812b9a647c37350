"""A file system that fails for a while is no bad image: reads are tried again, and then end the run as what they are."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fixres_dist.base import storage
from fixres_dist.base.errors import StorageError, UserError, exit_code
from fixres_dist.config.schema import Data
from fixres_dist.data import backends, dataset, headers, index, shards, torch_cpu
from fixres_dist.data.decoding import Bad
from fixres_dist.data.geometry import Resize
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, every_sample
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import samples
from fixres_dist.training.ranks import Ranks

RESIZE = Resize(32, "shorter", "bilinear")
CPU = torch.device("cpu")


@pytest.fixture
def found(photos: Path, tmp_path: Path) -> Index:
    return dataset.load(photos, "val", str(tmp_path / "cache"), show=False)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAUSES_S", (0.0, 0.0, 0.0))


def fails(times: int, number: int, only: str = "") -> Callable[..., int]:
    """os.preadv, of which the first `times` calls (for files that end in `only`) fail."""
    left, real = [times], os.preadv

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if left[0] and os.readlink(f"/proc/self/fd/{descriptor}").endswith(only):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, offset)

    return read


def batches(found: Index, on_bad: str, workers: int, backend: str = "torch") -> Iterator[object]:
    requests = every_sample(found, Pictures("test", 32, RESIZE, 0), 8, 0, 1)
    skipped: list[Bad] = []
    settings = Data(on_bad=on_bad, backend=backend)  # type: ignore[arg-type]
    made = backends.batches(found, requests, 32, RESIZE, settings, CPU, workers, 8, lambda _, bad: skipped.append(bad))
    yield from made
    assert not skipped


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO])
def test_an_error_that_passes_changes_nothing(number: int, found: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    right = found.read(3).tobytes()
    monkeypatch.setattr(os, "preadv", fails(3, number))
    assert found.read(3).tobytes() == right


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_one_that_stays_is_the_file_systems(
    on_bad: str, workers: int, found: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", fails(1000, errno.EIO, found.path(5).name))
    with pytest.raises(StorageError) as raised:
        list(batches(found, on_bad, workers))
    text = str(raised.value)
    assert text.startswith(str(found.path(5))), text
    assert "cannot be read: Input/output error, 4 times" in text
    assert "deny" not in text
    assert "\n" not in text


def test_dali_gets_it_too(found: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(os, "preadv", fails(1000, errno.EIO, found.path(5).name))
    with pytest.raises(StorageError, match="Input/output error"):
        list(batches(found, "skip", 2, "dali"))


@pytest.mark.parametrize("damage", ["gone", "torn", "a folder"])
def test_a_file_that_is_at_fault_is_a_bad_image_at_once(damage: str, photos: Path, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(photos, tmp_path / "data")
    found = dataset.load(data, "val", str(tmp_path / "cache"), show=False)
    file = found.path(5)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-300])
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    with pytest.raises(UserError, match="cannot decode"):
        list(batches(found, "stop", 0))


def test_a_data_set_that_is_gone_is_the_file_systems(photos: Path, tmp_path: Path) -> None:
    import shutil

    data = shutil.copytree(photos, tmp_path / "data")
    found = dataset.load(data, "val", str(tmp_path / "cache"), show=False)
    data.rename(tmp_path / "unmounted")
    with pytest.raises(StorageError, match="is away"):
        list(batches(found, "skip", 0))


def test_a_stale_shard_is_opened_anew(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataset.load(photos, "val", str(tmp_path / "cache"), show=False)
    shards.write_shards(whole, tmp_path / "shards" / "val", 10)
    found = dataset.load(tmp_path / "shards", "val", str(tmp_path / "cache"), show=False)
    right = found.read(2).tobytes()
    stale = index.open_shard(str(found.path(2))).fileno()
    real = os.preadv

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor == stale and stat.S_ISREG(os.fstat(descriptor).st_mode):
            handle.append(index.open_shard(str(found.path(2))))  # keeps the number taken
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(descriptor, buffers, offset)

    handle: list[object] = []
    monkeypatch.setattr(os, "preadv", read)
    assert found.read(2).tobytes() == right
    assert len(handle) == 1


def test_a_header_that_cannot_be_read_now_is_no_bad_image(found: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken(path: Path, most_pixels: int) -> headers.Seen:
        calls.append(path)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(headers, "look_once", broken)
    with pytest.raises(StorageError):
        headers.read_headers(found, np.arange(3))
    assert len(calls) >= 4


def test_a_short_read_is_continued(found: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    right, real = found.read(3).tobytes(), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:100]], offset))
    assert found.read(3).tobytes() == right


def test_a_command_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def away() -> int:
        raise StorageError("/data/a.jpg cannot be read")

    assert exit_code(away) == 1
    assert capsys.readouterr().err == "error: /data/a.jpg cannot be read. Next: the same command, when it is back.\n"


@pytest.mark.parametrize(("most", "taken"), [("auto", 10), (3, 3), (0, 0)])
def test_a_run_does_without_so_many_images_and_no_more(
    most: int | str, taken: int, found: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over all ranks and starts: another start of this rank does not count them anew."""
    run, rank = RunDir(tmp_path / "r"), Ranks(0, 1, 1, ("here",), CPU)
    run.root.mkdir()
    for sample in range(taken):
        samples.skipping(run, rank, most)(found, Bad(sample, "torn"))
        samples.skipping(run, rank, most)(found, Bad(sample, "torn"))
    other = Ranks(1, 2, 2, ("here",), CPU)
    with pytest.raises(UserError) as refused:
        samples.skipping(run, other, most)(found, Bad(taken, "torn"))
    assert f"{taken + 1} images could not be decoded" in str(refused.value)
    assert f"data.max_skipped={taken}" in str(refused.value)


class Killed:
    """A loader whose worker is killed, and whose pipe breaks before anybody notices."""

    def __init__(self) -> None:
        self._workers = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))]
        self._workers[0].start()

    def __iter__(self) -> Iterator[object]:
        os.kill(self._workers[0].pid or 0, signal.SIGKILL)
        raise ConnectionResetError("[Errno 104] Connection reset by peer")
        yield


def test_a_killed_loader_worker_is_named_before_its_broken_pipe() -> None:
    loader = Killed()
    words = rf"loader worker process {loader._workers[0].pid} was killed by SIGKILL \(by hand, or out of memory\); after it: Conn"
    with pytest.raises(RuntimeError, match=words):
        list(torch_cpu.explained(loader))
