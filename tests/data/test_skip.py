"""Bad files in a whole run: stopped by name, or done without, the same at any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import run, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixres_dist.base.small_files import read_lines
from fixres_dist.runs import rundir
from fixres_dist.training.predictions import Predictions


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """One training image torn, one training and one validation image without a header."""
    data = shutil.copytree(photos, tmp_path_factory.mktemp("damaged") / "data")
    torn = data / "train" / "birch" / "007.jpg"
    torn.write_bytes(torn.read_bytes()[:-400])
    (data / "train" / "ash" / "003.jpg").write_text("gone")
    (data / "val" / "cedar" / "002.jpg").write_bytes(b"")
    return data


def test_skipped_files_count_nowhere_at_any_world_size(damaged: Path, tmp_path: Path) -> None:
    losses, kept = [], []
    for ranks in (1, 2):
        done = run(*tiny(tmp_path, f"on{ranks}", damaged, ranks, "data.on_bad=skip", "tune.epochs=1"))
        assert done.returncode == 0, done.stdout + done.stderr
        here = rundir.RunDir(tmp_path / f"on{ranks}")
        results = json.loads(here.results.read_text())
        assert (results["skipped"], results["n"], results["after"].keys()) == (3, 32, {"top1", "top5", "loss"})
        lines = [line for file in (here.root / "skipped").iterdir() for line in read_lines(file)]
        assert {line["name"] for line in lines} == {"train/ash/003.jpg", "train/birch/007.jpg", "val/cedar/002.jpg"}
        steps = [line for line in read_lines(here.metrics) if "learning_rate" in line]
        assert sum(line["skipped"] for line in steps) == 2
        seen = [line["samples"] for file in (here.root / "samples").iterdir() for line in read_lines(file)]
        assert sorted(sample for part in seen for sample in part) == [s for s in range(84) if s not in (3, 28 + 7)]
        events = EventAccumulator(str(here.root / "tb"))
        events.Reload()
        assert sum(event.value for event in events.Scalars("train/skipped")) == 2
        after = Predictions.read(here.root / "predictions" / "after.npz")
        assert np.flatnonzero(after.predicted < 0).tolist() == [22 + 2]
        losses.append([line["loss"] for line in steps])
        kept.append(after.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert kept[0] == pytest.approx(kept[1], abs=1e-4)


def test_a_run_that_stops_names_the_file_and_goes_on_without_it(damaged: Path, tmp_path: Path) -> None:
    stopped = run(*tiny(tmp_path, "run", damaged, 1, "tune.epochs=1"))
    assert stopped.returncode != 0
    assert "no readable images" in stopped.stdout + stopped.stderr
    deny = tmp_path / "bad.txt"
    assert run("data", "verify", "--data", damaged, "--deny-list", deny).returncode == 0
    again = run(*tiny(tmp_path, "run", damaged, 1, "tune.epochs=1", f"data.deny_list={deny}"))
    assert again.returncode == 0, again.stdout + again.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["skipped"], results["n"], results["images_seen"]) == (0, 32, 82)
