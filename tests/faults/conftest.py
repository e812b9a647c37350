"""A finished run and a half-finished one, to be copied and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.folders import write_photos
from support.in_process import SETTINGS, called

from fixres_dist.base.errors import EXIT_DONE
from fixres_dist.base.small_files import append
from fixres_dist.runs.rundir import RunDir


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/r, finished, and half/r, the same one killed after its first checkpoint."""
    root = tmp_path_factory.mktemp("small")
    data = write_photos(root / "data", 4, 2, ("ash", "birch"))
    assert called("submit", "--data", data, "--runs-dir", root / "runs", *SETTINGS)[0] == EXIT_DONE
    run, half = RunDir(root / "runs" / "r"), RunDir(root / "half" / "r")
    (run.root / "skipped").mkdir()
    append(run.root / "skipped" / "rank_0.jsonl", {"name": "val/ash/900.jpg", "reason": "not an image"})
    assert called("evaluate", "--run", run.root, "--res", "72")[0] == EXIT_DONE
    shutil.copytree(run.root, half.root, symlinks=True)
    for path in (half.done, half.results, half.root / "export", half.root / "evaluations"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = max(half.checkpoints.glob("step_*"))
    shutil.rmtree(newest)
    half.failed.write_text("a rank broke\nNext: again\n")
    state = json.loads(half.state_file.read_text())
    half.state_file.write_text(json.dumps({**state, "state": "running", "step": half.saved_step()}))
    return root
