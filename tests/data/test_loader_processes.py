"""Loader workers: they survive the signals a scheduler sends to every process, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import ROOT, environment

from fixres_dist.data import dataset, geometry, requests, torch_cpu
from fixres_dist.data.decoding import Batch

SCRIPT = """
import multiprocessing
import sys
from pathlib import Path
import numpy as np
from fixres_dist.data import dataset, geometry, requests, torch_cpu
photos = dataset.load(Path(sys.argv[1]), "val")
pictures = requests.Pictures("test", 32, geometry.resize_of("fixres", 32, 1.0, "bilinear"), 0)
endless = (requests.make_request(photos, pictures, np.array([k % len(photos)]), 0) for k in range(10**9))
batches = torch_cpu.batches(photos, endless, 32, pictures.resize, 2)
for _ in sys.stdin:
    numbers = [int(next(batches).samples[0]) for _ in range(12)]
    print(*sorted(worker.pid for worker in multiprocessing.active_children()), numbers[0], flush=True)
"""


def test_workers_ignore_stop_signals_and_end_with_the_parent(photos: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(photos)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert parent.stdin
    assert parent.stdout

    def serve() -> list[int]:
        parent.stdin.write("\n")  # type: ignore[union-attr]
        parent.stdin.flush()  # type: ignore[union-attr]
        return [int(word) for word in parent.stdout.readline().split()]  # type: ignore[union-attr]

    *workers, first = serve()
    assert first == 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        for worker in workers:
            os.kill(worker, number)
    for turn in range(1, 4):  # the same workers, and no batch lost
        assert serve() == [*workers, 12 * turn % 33]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)


def test_a_process_whose_error_holds_the_loader_ends_all_the_same(photos: Path) -> None:
    """multiprocessing ends its children by a SIGTERM at exit, which they ignore, and then waits for them."""
    loop = "for _ in sys.stdin:"
    failing = "def once():\n    next(batches)\n    raise RuntimeError('of the loop')\nonce()\n"
    assert loop in SCRIPT
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace(loop, failing + loop), str(photos)],
        capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert "of the loop" in done.stderr


def test_with_little_shared_memory_batches_are_copied_and_that_is_said(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index = dataset.load(photos, "val")
    pictures = requests.Pictures("test", 32, geometry.resize_of("fixres", 32, 1.0, "bilinear"), 0)

    def made(workers: int) -> list[Batch]:
        asked = requests.in_batches(index, pictures, np.arange(12), 5)
        return list(torch_cpu.batches(index, asked, 32, pictures.resize, workers))

    first = made(workers=1)
    assert "pipes" not in capsys.readouterr().err
    free = os.statvfs(torch_cpu.SHARED)
    monkeypatch.setattr(torch_cpu, "SPARED", free.f_bavail * free.f_frsize - 1)
    second = made(workers=1)
    assert capsys.readouterr().err.count("copied through pipes") == 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert (a.labels.tolist(), a.samples.tolist()) == (b.labels.tolist(), b.samples.tolist())


def running(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
