"""What a run writes as it goes: metrics.jsonl, TensorBoard's tags, state.json and the console, over a resume too."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fixres_dist.base.small_files import read_lines
from fixres_dist.config.schema import Config
from fixres_dist.runs.results import Summary
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.tracking import Tracker, write_curve, write_histograms

VALUES = {
    "loss": 0.5,
    "learning_rate": 1e-3,
    "grad_norm": 2.0,
    "images_per_second": 100.0,
    "data_wait_percent": 3.0,
    "memory_gib": 0.0,
}
SUMMARY = Summary(top1=70.0, top5=90.0, loss=1.25, n=33, skipped=0)


def tracker(run: RunDir, first_step: int = 0, resumed: bool = False) -> Tracker:
    return Tracker(run, Config(), first_step, total_steps=20, resumed=resumed)


def lines(run: RunDir) -> list[tuple[int, str]]:
    """(step, label of the evaluation or stage of the step) of metrics.jsonl."""
    return [(line["step"], line.get("evaluation") or line["stage"]) for line in read_lines(run.metrics)]


def board(run: RunDir, folder: str = "tb") -> EventAccumulator:
    found = EventAccumulator(str(run.root / folder))
    found.Reload()
    return found


@pytest.fixture(autouse=True)
def event_files_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names end with a counter, and files of one second are read in the order of their names: .9 after .10."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of two stages that was logged up to step 15 of 20; the second stage began at step 10."""
    run = RunDir(tmp_path)
    first = tracker(run)
    first.step(5, "pretrain", 0.5, VALUES)
    first.evaluation(10, "pretrained", 128, SUMMARY, 1.0)
    first.close()
    second = tracker(run, 10)
    second.evaluation(10, "before", 160, SUMMARY, 1.0)
    for step in (11, 13, 15):
        second.step(step, "fix", (step - 10) / 10, VALUES | {"loss": float(step)})
    second.close()
    return run


def test_a_line_per_log_and_per_evaluation(run: RunDir) -> None:
    assert lines(run) == [(5, "pretrain"), (10, "pretrained"), (10, "before"), (11, "fix"), (13, "fix"), (15, "fix")]
    step, evaluation = read_lines(run.metrics)[0], read_lines(run.metrics)[1]
    assert {key: step[key] for key in VALUES} == VALUES
    assert step["epoch"] == 0.5
    assert {key: evaluation[key] for key in asdict(SUMMARY)} == asdict(SUMMARY)
    assert evaluation["res"] == 128
    assert {"time"} == set(step) & set(evaluation) - {"step", "loss"}


def test_the_tags_are_the_documented_ones(run: RunDir) -> None:
    found = board(run)
    assert set(found.Tags()["scalars"]) == {
        *(f"train/{name}" for name in VALUES),
        "eval/top1",
        "eval/top5",
        "eval/loss",
    }
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(5, 0.5), (11, 11.0), (13, 13.0), (15, 15.0)]
    assert [(e.step, e.value) for e in found.Scalars("eval/top1")] == [(10, 70.0), (10, 70.0)]
    assert "config/text_summary" in found.Tags()["tensors"]


def test_a_resume_drops_what_was_logged_beyond_its_checkpoint(run: RunDir) -> None:
    again = tracker(run, 13, resumed=True)
    again.step(14, "fix", 0.4, VALUES | {"loss": 14.0})
    again.close()
    assert lines(run)[-3:] == [(11, "fix"), (13, "fix"), (14, "fix")]
    found = board(run)
    assert [(e.step, e.value) for e in found.Scalars("train/loss")][-2:] == [(13, 13.0), (14, 14.0)]
    assert [e.step for e in found.Scalars("events/restart")] == [14]


@pytest.mark.parametrize(
    ("resumed", "again", "kept"),
    [
        (True, ("", "after"), ["pretrained", "before"]),
        (True, ("", "pretrained"), ["before"]),
        (False, ("before",), ["pretrained"]),
    ],
    ids=["first steps of stage two", "last step of stage one", "evaluation before stage two"],
)
def test_the_evaluations_that_a_start_makes_again_are_dropped(
    run: RunDir, resumed: bool, again: tuple[str, ...], kept: list[str]
) -> None:
    """At step 10 stage one ends and stage two begins: a start resumes one of them there, and no curve has a point twice."""
    Tracker(run, Config(), 10, 20, resumed, again).close()
    assert [label for step, label in lines(run) if step == 10] == kept
    found = board(run)
    assert [e.step for e in found.Scalars("eval/top1")] == [10] * len(kept)
    assert [e.step for e in found.Scalars("train/loss")] == [5]
    assert "config/text_summary" in found.Tags()["tensors"]


def test_state_and_console_tell_speed_and_time_left(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    state = run.state()
    assert (state.step, state.epoch, state.images_per_second) == (15, 0, 100.0)
    assert state.eta_s is not None
    log = tracker(run, 15, resumed=True)
    log.step(16, "fix", 0.6, VALUES | {"memory_gib": 1.5})
    log.evaluation(20, "after", 160, SUMMARY, 1.0)
    log.close()
    told = capsys.readouterr().out
    assert "step 16/20 80% | fix | loss 0.500 | lr 1.00e-03 | 100 img/s | data 3% | mem 1.5 GiB | eta " in told
    assert "evaluation (after, 160 px): top-1 70.00 | top-5 90.00 | loss 1.2500 | n 33" in told


def test_the_time_left_knows_the_evaluations_that_follow(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fixres_dist.runs.tracking.time.monotonic", lambda: now[0])
    log = Tracker(run, Config(), 15, 20, True, evaluations_left=lambda step: 2)
    now[0] += 60 + 10
    log.evaluation(15, "before", 160, SUMMARY, 60.0)
    log.step(16, "fix", 0.6, VALUES)
    assert run.state().eta_s == 4 * 10 + 2 * 60
    log.close()


def test_curves_and_histograms_stand_in_a_sub_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write_curve(run, "after", "eval_by_res/top1", {128: 60.0, 160: 70.0})
    write_histograms(run, "pooled", "pooled_features", {128: np.zeros((2, 3), np.float32)})
    assert [(e.step, e.value) for e in board(run, "tb/after").Scalars("eval_by_res/top1")] == [(128, 60.0), (160, 70.0)]
    (histogram,) = board(run, "tb/pooled").Histograms("pooled_features")
    assert (histogram.step, histogram.histogram_value.num) == (128, 6)
