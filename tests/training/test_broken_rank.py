"""A rank that raises ends the whole local run, with its error as the first cause; no rank waits for one that is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from support.commands import ROOT, environment, run, tiny

from fixres_dist.training import rendezvous

# At the end of the snapshot's training/step.py; a rank that waits on a GPU sees nothing of the other one's end.
BREAKS = """
_backward = backward
def backward(work, head, scale, step, *rest):
    import time
    if step == 2 and work.session.ranks.rank == 1:
        raise RuntimeError("broken on purpose")
    if step == 2 and {hangs}:
        time.sleep(3600)
    return _backward(work, head, scale, step, *rest)
"""
RESUME = """
import sys
from fixres_dist.cluster import local
from fixres_dist.cli.main import main
local.ALONE_S = float(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["in a collective", "on a GPU"])
def test_a_rank_that_raises_ends_the_run_with_its_error(tmp_path: Path, photos: Path, hangs: bool) -> None:
    prepared = run(*tiny(tmp_path, "broken", photos, 2), "--prepare")
    assert prepared.returncode == 0, prepared.stderr
    with open(tmp_path / "broken" / "code" / "fixres_dist" / "training" / "step.py", "a") as file:
        file.write(BREAKS.format(hangs=hangs))
    alone_s = "1" if hangs else "90"
    words = [
        sys.executable,
        "-c",
        RESUME,
        alone_s,
        "resume",
        "broken",
        "--runs-dir",
        str(tmp_path),
        "--cluster",
        "local",
    ]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    why = (tmp_path / "broken" / "FAILED").read_text()
    assert why.startswith("RuntimeError: broken on purpose\nNext: again, from the last checkpoint: "), why
    assert ("the others have not followed it" in done.stdout) == hangs


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "MEET_TIMEOUT_S", 0.2)
    store = dist.HashStore()
    store.set("rank 0", '"here"')
    with pytest.raises(RuntimeError, match=r"rank 2 waited .* for rank\(s\) 1, 3 of 4; their logs"):
        rendezvous.wait_for_all(store, 2, 4, "here")
    for k in (1, 3):
        store.set(f"rank {k}", '"here"')
    assert rendezvous.wait_for_all(store, 2, 4, "there") == ["here", "here", "there", "here"]


ALONE = """
import threading, torch.distributed as dist
from fixres_dist.training import ranks
ranks.LEAVE_TIMEOUT_S = 0.2
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
wait = lambda *_: threading.Event().wait(200)
dist.distributed_c10d._abort_process_group = dist.destroy_process_group = wait
{call}
"""


@pytest.mark.parametrize("call", ["ranks.abort()", "ranks.Ranks(0, 1, 1, (), None).stop()"])
def test_leaving_has_a_deadline(call: str) -> None:
    """As where NCCL waits for a rank that is gone."""
    words = [sys.executable, "-c", ALONE.format(call=call)]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "the ranks did not leave each other within 0 s" in done.stderr
