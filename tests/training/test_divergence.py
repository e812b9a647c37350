"""A run whose numbers are not finite any more: it ends as failed, with its last finite checkpoint and what to try."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import append, as_json, read_lines, typed, write_json
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model
from fixres_dist.runs import checkpoint
from fixres_dist.runs.preparation import prepare
from fixres_dist.runs.results import Accuracy
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import State
from fixres_dist.training import worker
from fixres_dist.training.divergence import diverged
from fixres_dist.training.stages import stages

ITEMS = (
    *("model.name=test_efficientnet", "model.timm_name=test_efficientnet", "data.res=64", "data.workers=0"),
    *("data.resize_rule=fixefficientnet", "tune.global_batch=12", "run.batch_per_device=12", "run.precision=fp32"),
    *("run.memory_format=channels_last", "run.engine=stream", "tune.epochs=3"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(folder: Path, photos: Path, *more: str) -> tuple[int, RunDir]:
    items = [*ITEMS, f"data.root={photos}", *more]
    run = prepare(folder, reading.parse(Config, reading.overrides(items)), "fixres submit --model test_efficientnet")
    return worker.train(run.root, StopFlag()), run


def no_bare_nan(run: RunDir) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in a file of the run")

    for file in (file for file in run.root.rglob("*.json*") if "code" not in file.relative_to(run.root).parts):
        for text in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("log_every", "save_every_s"), [(1, 300), (100, 0), (100, 300)])
def test_a_diverged_run_fails_and_keeps_its_last_finite_checkpoint(
    tmp_path: Path, photos: Path, log_every: int, save_every_s: int
) -> None:
    """Found where the loss is logged, at a save in the middle of an epoch, or at the save before an evaluation."""
    more = ("model.weights=none", "tune.base_lr=1e30", f"run.log_every={log_every}", f"run.save_every_s={save_every_s}")
    code, run = trained(tmp_path / "run", photos, *more)
    assert code == 1
    assert run.state().state == State.FAILED
    assert run.state().final, "the same steps would lead there again"
    why, following = run.failed.read_text().splitlines()
    step = int(why.partition(" at step ")[2].partition(" ")[0])
    assert 1 <= step <= 7, why
    assert "loss" in why, why
    assert "stage fix, precision fp32, learning rate 1.88e+29, tune.base_lr 1e+30" in why
    assert following.startswith("Next: a lower learning rate or more precision, such as: fixres submit --model ")
    assert following.endswith("--name run-finite tune.base_lr=1e+29")
    saved = checkpoint.complete(run.checkpoints)
    assert f"the checkpoint of step {run.saved_step()} is the last one, and finite" in why
    for file in (file for path in saved for file in path.glob("*.safetensors")):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())
    assert not run.results.exists()
    no_bare_nan(run)


def test_the_command_to_try_has_each_setting_once(tmp_path: Path) -> None:
    config = reading.parse(Config, reading.overrides([*ITEMS, "tune.base_lr=1"]))
    run = prepare(tmp_path / "hot", config, "fixres submit --name hot --res 64 tune.base_lr=1 run.log_every=1")
    (stage,) = stages(config, 24)
    following = diverged(run, config, stage, 2, "bf16", "the loss is nan").next_command
    tried = "--res 64 run.log_every=1 --name hot-finite tune.base_lr=0.1 run.precision=fp32"
    assert following.endswith(f"fixres submit {tried}")


def test_weights_that_are_not_finite_are_told_before_training(tmp_path: Path, photos: Path) -> None:
    state = build_model("test_efficientnet", 3, seed=0).state_dict()
    state["conv_stem.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, tmp_path / "weights.safetensors")
    code, run = trained(tmp_path / "run", photos, f"model.weights={tmp_path}/weights.safetensors")
    assert code == 1
    why, following = run.failed.read_text().splitlines()
    assert why.startswith("the loss of the evaluation (before) is nan at step 0 (stage fix, precision fp32)")
    assert following.startswith("Next: other weights")
    assert run.saved_step() == -1
    no_bare_nan(run)


def test_json_has_null_where_a_number_is_not_finite(tmp_path: Path) -> None:
    value = {"loss": float("nan"), "list": [1.5, float("inf"), {"deep": -float("inf")}], "pair": (float("nan"), 1)}
    assert json.loads(as_json(value)) == {"loss": None, "list": [1.5, None, {"deep": None}], "pair": [None, 1]}
    write_json(tmp_path / "whole.json", value)
    append(tmp_path / "lines.jsonl", value)
    assert json.loads((tmp_path / "whole.json").read_text()) == read_lines(tmp_path / "lines.jsonl")[0]
    assert str(typed({"top1": 1.0, "top5": 2.0, "loss": None}, Accuracy).loss) == "nan"
