"""What a run writes as it goes: metrics.jsonl, TensorBoard's tags, state.json and the console, over a resume too."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from fixres_dist.base.small_files import read_lines
from fixres_dist.config.schema import Cluster, Config, Data
from fixres_dist.config.stage_settings import Pretrain, Tune
from fixres_dist.runs import event_file
from fixres_dist.runs.board import write_curve, write_histograms
from fixres_dist.runs.results import Summary
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.tracking import Left, Tracker

VALUES = {
    "loss": 0.5,
    "learning_rate": 1e-3,
    "grad_norm": 2.0,
    "images_per_second": 100.0,
    "data_wait_percent": 3.0,
    "memory_gib": 0.0,
}
SUMMARY = Summary(top1=70.0, top5=90.0, loss=1.25, n=33, skipped=0)


CONFIG = Config(data=Data(res=160), tune=Tune(epochs=1), pretrain=Pretrain(epochs=1, res=128))


def tracker(run: RunDir, first_step: int = 0) -> Tracker:
    return Tracker(run, CONFIG, first_step, total_steps=20)


def points(run: RunDir, tag: str) -> list[tuple[int, float]]:
    return [(e.step, round(e.value, 4)) for e in board(run).Scalars(tag)]


def lines(run: RunDir) -> list[tuple[int, str]]:
    """(step, label of the evaluation or stage of the step) of metrics.jsonl."""
    return [(line["step"], line.get("evaluation") or line["stage"]) for line in read_lines(run.metrics)]


def board(run: RunDir, folder: str = "tb") -> EventAccumulator:
    found = EventAccumulator(str(run.root / folder))
    found.Reload()
    return found


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


def test_a_line_is_shown_at_once_and_written_by_the_thread_that_logs_it(run: RunDir) -> None:
    """TensorBoard's own writer has a thread, whose failed write nobody can catch: it printed a traceback beside the reason."""
    threads = set(threading.enumerate())
    log = tracker(run, 15)
    assert points(run, "train/loss")[-1] == (15, 15.0)
    log.step(16, "fix", 0.6, VALUES | {"loss": 16.0})
    assert points(run, "train/loss")[-1] == (16, 16.0)
    assert set(threading.enumerate()) <= threads
    log.close()


def test_a_full_disk_names_tensorboards_file(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open

    def full(path: Path, mode: str) -> Any:
        opened(path, mode).close()
        return opened("/dev/full", "wb")

    monkeypatch.setattr(event_file, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: .*/tb/events"):
        tracker(run, 15)


def test_each_stage_and_resolution_has_tags_of_its_own(run: RunDir) -> None:
    found = board(run)
    assert set(found.Tags()["scalars"]) == {
        *(f"train/{name}" for name in (*VALUES, "epoch")),
        *(
            f"{group}/{name}"
            for group in ("eval", "eval_fix_160px", "eval_pretrain_128px")
            for name in ("top1", "top5", "loss")
        ),
        *("by_epoch/top1_fix_160px", "by_epoch/top1_pretrain_128px", "by_epoch/train_loss"),
    }
    assert points(run, "by_epoch/train_loss") == [(1, 0.5)]
    assert points(run, "train/loss") == [(5, 0.5), (11, 11.0), (13, 13.0), (15, 15.0)]
    assert points(run, "train/epoch") == [(5, 0.5), (11, 1.1), (13, 1.3), (15, 1.5)]
    assert points(run, "eval/top1") == points(run, "eval_fix_160px/top1") == [(10, 70.0)]
    assert points(run, "by_epoch/top1_fix_160px") == points(run, "by_epoch/top1_pretrain_128px") == [(1, 70.0)]
    assert "config/text_summary" in found.Tags()["tensors"]


def test_a_resume_drops_what_was_logged_beyond_its_checkpoint(run: RunDir) -> None:
    again = tracker(run, 13)
    again.step(14, "fix", 0.4, VALUES | {"loss": 14.0})
    again.close()
    assert lines(run)[-3:] == [(11, "fix"), (13, "fix"), (14, "fix")]
    assert points(run, "train/loss")[-2:] == [(13, 13.0), (14, 14.0)]


def test_a_board_of_an_older_version_gets_the_tags_of_this_one(run: RunDir) -> None:
    """Which had one curve for all resolutions: what it showed is gone, and nothing stands twice."""
    for file in (run.root / "tb").iterdir():
        file.unlink()
    with SummaryWriter(str(run.root / "tb")) as old:
        for step, value in ((10, 60.0), (10, 70.0)):
            old.add_scalar("eval/top1", value, step)
    tracker(run, 15).close()
    assert points(run, "eval/top1") == [(10, 70.0)]
    assert points(run, "eval_pretrain_128px/top1") == [(10, 70.0)]
    assert points(run, "train/loss") == [(5, 0.5), (11, 11.0), (13, 13.0), (15, 15.0)]


def test_what_happened_is_marked_in_the_order_of_steps_and_told(run: RunDir) -> None:
    run.event("started", step=-1, nodes=["n1"])
    run.event("saved", step=13, stall_ms=1.0)
    run.event("stop requested", signal="SIGTERM", step=13)
    run.event("requeued", reason="preempted", env={"HF_TOKEN": "hf_abcdefghijklmnopqrstuv"})
    for reason in ("its node was lost", "again"):
        run.event("lost", reason=reason)
        run.event("started", step=13, nodes=["n2"])
    log = tracker(run, 13)
    run.event("saved", step=14)
    log.step(14, "fix", 0.4, VALUES)
    run.event("saved", step=14)  # at the same step: a point already stands there
    log.close()
    for kind, expected in {
        "save": [(13, 1), (14, 1)],
        "stop": [(13, 1)],
        "requeue": [(13, 1)],
        "restart": [(13, 2)],
        "failure": [(13, 2)],
    }.items():
        assert points(run, f"events/{kind}") == expected
    (text,) = board(run).Tensors("events/restart/text_summary")
    assert text.step == 13
    told = text.tensor_proto.string_val[0].decode()
    assert told.count("**started**") == 2
    assert "n2" in told
    assert "hf_abc" not in board(run).Tensors("events/requeue/text_summary")[0].tensor_proto.string_val[0].decode()


def test_settings_plan_and_batch_script_stand_there_without_secrets(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    secret = "s3cr3tvalue"
    (tmp_path / "plan.txt").write_text("model      b0\n")
    (tmp_path / "submission.sh").write_text(f"#SBATCH --nodes=1\nexport HF_TOKEN={secret}\n")
    config = replace(CONFIG, cluster=Cluster(env={"HF_TOKEN": secret}))
    Tracker(run, config, 0, 20).close()
    found = board(run)
    texts = {
        name: found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("config", "plan", "sbatch")
    }
    assert "model      b0" in texts["plan"]
    assert "#SBATCH --nodes=1" in texts["sbatch"]
    assert not [name for name, text in texts.items() if secret in text]
    start = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = HParamsPluginData.FromString(start).session_start_info.hparams
    assert values["data.res"].number_value == 160
    assert values["tune.policy"].string_value == "classifier+bn"
    assert not any(name.startswith("cluster.") for name in values)


def test_long_curves_are_thinned_when_they_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fixres_dist.runs.board.POINTS", 5)
    run = RunDir(tmp_path)
    first = tracker(run)
    for step in range(1, 11):
        first.step(step, "pretrain", step / 10, VALUES | {"loss": float(step)})
    first.close()
    assert len(points(run, "train/loss")) == 10
    tracker(run, 10).close()
    assert [step for step, _ in points(run, "train/loss")] == [2, 4, 6, 8, 10]
    assert points(run, "by_epoch/train_loss") == [(1, 5.5)], "of all ten"


@pytest.mark.parametrize(
    ("again", "kept"),
    [
        (("", "after"), ["pretrained", "before"]),
        (("", "pretrained"), ["before"]),
        (("before",), ["pretrained"]),
    ],
    ids=["first steps of stage two", "last step of stage one", "evaluation before stage two"],
)
def test_the_evaluations_that_a_start_makes_again_are_dropped(
    run: RunDir, again: tuple[str, ...], kept: list[str]
) -> None:
    """At step 10 stage one ends and stage two begins: a start resumes one of them there, and no curve has a point twice."""
    Tracker(run, CONFIG, 10, 20, again).close()
    assert [label for step, label in lines(run) if step == 10] == kept
    found = board(run)
    tags = {"pretrained": "eval_pretrain_128px/top1", "before": "eval_fix_160px/top1"}
    assert [label for label, tag in tags.items() if tag in found.Tags()["scalars"]] == kept
    assert all([e.step for e in found.Scalars(tags[label])] == [10] for label in kept)
    assert [e.step for e in found.Scalars("train/loss")] == [5]
    assert "config/text_summary" in found.Tags()["tensors"]


def test_state_and_console_tell_speed_and_time_left(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    state = run.state()
    assert (state.step, state.epoch, state.images_per_second) == (15, 0, 100.0)
    assert state.eta_s is not None
    log = tracker(run, 15)
    log.step(16, "fix", 0.6, VALUES | {"memory_gib": 1.5})
    log.evaluation(20, "after", 160, SUMMARY, 1.0)
    log.close()
    told = capsys.readouterr().out
    assert "step 16/20 80% | fix | loss 0.500 | lr 1.00e-03 | 100 img/s | data 3% | mem 1.5 GiB | eta " in told
    assert "evaluation (after, 160 px): top-1 70.00 | top-5 90.00 | loss 1.2500 | n 33" in told


def test_the_time_left_knows_the_evaluations_that_follow(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation on the way counts as one, not as training; nor do features and other sizes before the first step."""
    now = [100.0]
    monkeypatch.setattr("fixres_dist.runs.tracking.time.monotonic", lambda: now[0])
    log = Tracker(run, CONFIG, 15, 20, left=lambda step: Left(1.5 * (20 - step), 2))
    now[0] += 1000
    log.other_size(15, 128, "timm's test", SUMMARY)
    log.begin_steps()
    now[0] += 10
    log.step(16, "fix", 0.6, VALUES)
    assert run.state().eta_s == 6 * 10 + 2 * 1, "the evaluations of the starts before took a second"
    now[0] += 61
    log.evaluation(16, "fix epoch 1", 160, SUMMARY, 61.0)
    now[0] += 10
    log.step(17, "fix", 0.7, VALUES)
    assert run.state().eta_s == 4.5 * 10 + 2 * 21
    log.close()


def test_curves_and_histograms_stand_in_a_sub_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for top1 in (50.0, 60.0):  # the second sweep replaces the first
        write_curve(run, "after", "eval_by_res/top1", {160: top1 + 10, 128: top1})
    write_histograms(run, "pooled", "pooled_features", {128: np.zeros((2, 3), np.float32)})
    assert [(e.step, e.value) for e in board(run, "tb/after").Scalars("eval_by_res/top1")] == [(128, 60.0), (160, 70.0)]
    (histogram,) = board(run, "tb/pooled").Histograms("pooled_features")
    assert (histogram.step, histogram.histogram_value.num) == (128, 6)
