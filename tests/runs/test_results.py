"""results.json is read as it was written, and as older versions wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.runs.results import Accuracy, Before, Best, Gain, Hardware, Results
from fixres_dist.runs.rundir import RunDir

RESULTS = Results(
    model="b0",
    timm_name="tf_efficientnet_b0",
    weights="ns",
    res=320,
    policy="classifier+bn",
    transform="test_aug",
    resize_rule="fixefficientnet",
    n=50000,
    before=Accuracy(78.7, 94.4, 0.9),
    after=Accuracy(80.1, 95.3, 0.8),
    delta_top1=1.4,
    delta_ci95=(1.1, 1.7),
    images_seen=6400000,
    seconds=754.0,
    world_size=8,
    precision="bf16",
    optimizer="torch SGD",
    engine="cached",
    trunk="contiguous",
    hardware=Hardware("H200", 8, ["a"]),
    versions={"torch": "2.11"},
)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    RESULTS.write(RunDir(tmp_path))
    assert Results.read(RunDir(tmp_path)) == RESULTS
    sentence = "b0 at 320 px: top-1 78.70 before, 80.10 after fixing: +1.40 points"
    assert RESULTS.sentence() == f"{sentence} (95 % interval +1.10 to +1.70, paired, n 50000)"


def test_the_sentence_tells_the_other_sizes_and_the_best_before(tmp_path: Path) -> None:
    others = {224: Before(78.1, 94.0, 0.9, "the weights' own"), 288: Before(79.2, 94.6, 0.8, "timm's test")}
    found = replace(RESULTS, before_at=others, best_before=Best(0.9, (0.6, 1.2), 288))
    found.write(RunDir(tmp_path))
    assert Results.read(RunDir(tmp_path)) == found
    told = "; before at 224 px (the weights' own) 78.10; before at 288 px (timm's test) 79.20"
    told += "; over the best before, at 288 px: +0.90 points (95 % interval +0.60 to +1.20, paired)"
    assert found.sentence() == RESULTS.sentence() + told
    same = replace(found, best_before=Best(1.4, (1.1, 1.7), 320))
    assert "over the best" not in same.sentence(), "that is the gain itself"


def test_results_of_older_versions_are_read(tmp_path: Path) -> None:
    """They say nothing of the engine, and compare the dry run's estimates with the run."""
    old = {
        key: value
        for key, value in asdict(RESULTS).items()
        if key not in ("engine", "trunk", "apex", "skipped", "before_at", "best_before")
    }
    (tmp_path / "results.json").write_text(json.dumps({**old, "prediction": {"seconds": None}}))
    assert Results.read(RunDir(tmp_path)) == replace(RESULTS, engine="", trunk="")


def test_a_run_without_results_has_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        Results.read(RunDir(tmp_path))


def test_a_gain_stands_in_tables_and_in_sentences() -> None:
    gain = Gain(-0.5, (-1.0, 0.0))
    assert str(gain) == "-0.50 (-1.00 to +0.00)"
    assert gain.phrase() == "-0.50 points (95 % interval -1.00 to +0.00, paired)"
