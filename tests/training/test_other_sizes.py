"""Accuracy before fixing at the weights' own size and at timm's test size, beside the one at the test resolution."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fixres_dist.base.signals import StopFlag
from fixres_dist.cli.main import main
from fixres_dist.cluster import status
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model
from fixres_dist.models.sizes import Sizes
from fixres_dist.publishing import report
from fixres_dist.runs import preparation
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import results, stage_session, stage_training, worker
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.stages import other_sizes

SMALL = (
    "data.workers=0",
    "tune.global_batch=28",
    "tune.epochs=1",
    "run.precision=fp32",
    "run.memory_format=channels_last",
)


def finished(root: Path, photos: Path, *settings: str) -> RunDir:
    model = ("model.name=test_efficientnet", "model.timm_name=test_efficientnet", f"data.root={photos}")
    config = reading.parse(Config, reading.overrides([*model, *SMALL, *settings]))
    preparation.prepare(root, config, "submit")
    assert worker.train(root, StopFlag()) == 0
    return RunDir(root)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of another program: nothing says what they were made at, so it is timm's 160 px."""
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    state = build_model("test_efficientnet", 3, 5).state_dict()
    state["classifier.weight"] = torch.randn(
        state["classifier.weight"].shape, generator=torch.Generator().manual_seed(1)
    )
    save_file(state, file)
    return file


def test_the_weights_are_measured_at_their_own_size_and_timms(
    tmp_path: Path, photos: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (stage_training, results):
        monkeypatch.setattr(module, "of_weights", lambda model: Sizes(96, 128, 128))
    run = finished(tmp_path / "r", photos, "data.res=64", f"model.weights={start}")
    found, kept = Results.read(run), json.loads(run.results.read_text())
    assert {res: one.why for res, one in found.before_at.items()} == {96: "the weights' own", 128: "timm's test"}
    given = ["--run", str(run.root), "--only", "before", "--predictions", str(tmp_path / "p.npz"), "data.workers=0"]
    before = {64: Predictions.read(run.root / "predictions" / "before.npz")}
    for res in (96, 128):
        assert main(["evaluate", *given, "--res", str(res)]) == 0
        alone = Predictions.read(tmp_path / "p.npz")
        before[res] = Predictions.read(run.root / "predictions" / f"before-{res}.npz")
        assert np.array_equal(before[res].predicted, alone.predicted)
        np.testing.assert_allclose(before[res].loss, alone.loss, rtol=1e-4)
        assert kept["before_at"][str(res)]["top1"] == alone.summary().top1
    assert len({made.summary().top1 for made in before.values()}) > 1, "the sizes must differ, or this shows nothing"
    best = max(before, key=lambda res: before[res].summary().top1)
    gain = Predictions.read(run.root / "predictions" / "after.npz").gain_over(before[best], of=3)
    expected = {"res": best, "delta_top1": gain.delta_top1, "delta_ci95": list(gain.delta_ci95), "of": 3}
    assert kept["best_before"] == expected
    assert f"; before at 96 px (the weights' own) {found.before_at[96].top1:.2f}; before at 128" in found.sentence(run)
    assert (f"; over the best before, at {best} px" in found.sentence(run)) == (best != 64)
    assert "paired, corrected for the best of 3" in found.best_before.phrase()  # type: ignore[union-attr]
    assert f"{found.before.top1:.2f}; {found.before_at[96].top1:.2f} at 96 px; " in report.row(run).cells()[7]
    assert status.row(run, run.state(), None).top1 == found.after.top1


def test_stage_one_tells_it_without_another_pass(tmp_path: Path, photos: Path) -> None:
    stage_one = ("pretrain.epochs=1", "pretrain.global_batch=28", "pretrain.res=64")
    run = finished(tmp_path / "r", photos, "data.res=96", "model.weights=none", *stage_one)
    found = Results.read(run)
    assert {res: one.why for res, one in found.before_at.items()} == {64: "stage one's"}
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    made = {line["evaluation"]: (line["res"], line["top1"]) for line in lines if "evaluation" in line}
    assert made["pretrained"] == (64, found.before_at[64].top1)
    assert set(made) == {"pretrained", "before", "after"}


def test_which_sizes_are_measured() -> None:
    config = reading.parse(Config, {"model": {"weights": "pretrained"}, "data": {"res": 288}})
    assert other_sizes(config, Sizes(224, 288, 288)) == {224: "the weights' own"}
    assert other_sizes(config, Sizes(288, 0, 320)) == {}
    assert other_sizes(config, Sizes(160, 256, 256)) == {160: "the weights' own", 256: "timm's test"}
    assert other_sizes(config, Sizes(224, 224, 256)) == {224: "the weights' own"}
    new = replace(config, model=replace(config.model, weights="none"))
    assert other_sizes(new, Sizes(224, 256, 256)) == {}
    trained = reading.parse(
        Config, {"model": {"weights": "pretrained"}, "data": {"res": 320}, "pretrain": {"res": 192}}
    )
    assert other_sizes(trained, Sizes(224, 288, 288)) == {192: "stage one's", 288: "timm's test"}


def test_a_size_that_the_model_does_not_take_is_passed_over(
    tmp_path: Path, photos: Path, start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage_session, "takes", lambda model, res: res == 64)
    run = finished(tmp_path / "r", photos, "data.res=64", f"model.weights={start}", "tune.epochs=0")
    said = "not measured at 160 px (the weights' own): test_efficientnet is built for 64 px"
    assert said in capsys.readouterr().out
    assert (Results.read(run).before_at, Results.read(run).best_before) == ({}, None)


def test_a_damaged_measurement_at_another_size_is_made_again(tmp_path: Path, photos: Path) -> None:
    """Else the result would compare with the remaining sizes alone, without a word."""
    stage_one = (
        "model.weights=none",
        "pretrain.res=64",
        "pretrain.epochs=1",
        "pretrain.global_batch=28",
        "data.res=96",
    )
    run = finished(tmp_path / "r", photos, *stage_one)
    first, file = Results.read(run), run.root / "predictions" / "before-64.npz"
    file.write_bytes(file.read_bytes()[:-9] + b"x" * 9)
    for made in (run.done, run.results, run.root / "predictions" / "after.npz"):
        made.unlink()
    assert worker.train(run.root, StopFlag()) == 0
    again = Results.read(run)
    assert (again.before_at[64].top1, again.best_before) == (first.before_at[64].top1, first.best_before)


def test_a_run_without_a_step_goes_on_from_its_checkpoint(tmp_path: Path, photos: Path, start: Path) -> None:
    run = finished(tmp_path / "r", photos, "data.res=64", f"model.weights={start}", "tune.epochs=0")
    top1 = Results.read(run).after.top1
    run.done.unlink()
    assert worker.train(run.root, StopFlag()) == 0
    assert Results.read(run).after.top1 == top1


def test_a_weight_between_old_and_new_goes_with_tables_of_another_size(tmp_path: Path, photos: Path) -> None:
    """MaxViT's tables of positions are resampled for the test size; those before the stage have stage one's."""
    config = reading.parse(
        Config,
        reading.overrides(
            [
                *("model.name=test_maxvit", "model.timm_name=test_maxvit", f"data.root={photos}", *SMALL),
                *(
                    "model.weights=none",
                    "pretrain.res=96",
                    "data.res=128",
                    "pretrain.epochs=1",
                    "pretrain.global_batch=28",
                ),
                *("tune.policy=all", "tune.alpha=0.5", "run.batch_per_device=14"),
            ]
        ),
    )
    preparation.prepare(tmp_path / "r", config, "submit")
    assert worker.train(tmp_path / "r", StopFlag()) == 0
