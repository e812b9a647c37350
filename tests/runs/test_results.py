"""results.json is read as it was written, and as older versions wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
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
    assert RESULTS.sentence(RunDir(tmp_path)) == f"{sentence} (95 % interval +1.10 to +1.70, paired, n 50000)"


def test_the_sentence_tells_the_other_sizes_and_the_best_before(tmp_path: Path) -> None:
    others = {224: Before(78.1, 94.0, 0.9, "the weights' own"), 288: Before(79.2, 94.6, 0.8, "timm's test")}
    found = replace(RESULTS, before_at=others, best_before=Best(0.9, (0.6, 1.2), 288, of=3))
    found.write(RunDir(tmp_path))
    assert Results.read(RunDir(tmp_path)) == found
    told = "; before at 224 px (the weights' own) 78.10; before at 288 px (timm's test) 79.20"
    told += "; over the best before, at 288 px: +0.90 points (95 % interval +0.60 to +1.20, paired, corrected for the best of 3)"
    assert found.sentence(RunDir(tmp_path)) == RESULTS.sentence(RunDir(tmp_path)) + told
    same = replace(found, best_before=Best(1.4, (1.1, 1.7), 320))
    assert "over the best" not in same.sentence(RunDir(tmp_path)), "that is the gain itself"


def test_results_of_older_versions_are_read(tmp_path: Path) -> None:
    """They say nothing of the engine, and compare the dry run's estimates with the run."""
    old = {
        key: value
        for key, value in asdict(RESULTS).items()
        if key not in ("engine", "trunk", "apex", "skipped", "before_at", "best_before")
    }
    (tmp_path / "results.json").write_text(json.dumps({**old, "prediction": {"seconds": None}}))
    assert Results.read(RunDir(tmp_path)) == replace(RESULTS, engine="", trunk="")


@pytest.mark.parametrize("at", [320, 288])
def test_a_run_that_made_its_weights_worse_says_so_and_what_to_try(tmp_path: Path, at: int) -> None:
    """Also where only the best of before, at another size, was better; an interval that holds zero says nothing."""
    run = RunDir(tmp_path)
    run.config_file.write_text(reading.dump(reading.parse(Config, {"tune": {"base_lr": 1e-3}})))
    gain, best = (-7.4, (-10.0, -4.8)), Best(0.9, (-0.1, 1.9), 288, of=2)
    if at == 288:
        gain, best = (0.4, (-0.6, 1.4)), Best(-2.0, (-3.0, -1.0), 288, of=2)
    worse = replace(RESULTS, delta_top1=gain[0], delta_ci95=gain[1], best_before=best)
    said = worse.verdict(run)
    assert f"WORSE after fixing than before it at {at} px: {'-7.40' if at == 320 else '-2.00'} points" in said
    for wanted in (f"fixres export --run {tmp_path} --alpha 0`", "Both heads", "tune.base_lr=0.0001", "tune.policy="):
        assert wanted in said
    assert worse.sentence(run).endswith(said)
    assert replace(RESULTS, delta_top1=-1.0, delta_ci95=(-2.2, 0.2)).verdict(run) == ""


def test_a_run_without_results_has_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        Results.read(RunDir(tmp_path))


def test_a_gain_stands_in_tables_and_in_sentences() -> None:
    gain = Gain(-0.5, (-1.0, 0.0))
    assert str(gain) == "-0.50 (-1.00 to +0.00)"
    assert gain.phrase() == "-0.50 points (95 % interval -1.00 to +0.00, paired)"
