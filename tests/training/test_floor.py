"""The first result of a run with classes of its own: a logistic classifier on the untouched network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.folders import write_photos

from fixres_dist.base.signals import StopFlag
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model
from fixres_dist.runs import preparation, rundir
from fixres_dist.runs.results import Results, read_floors
from fixres_dist.training import class_order, floor, stage_one, worker
from fixres_dist.training.cache import rule
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.results import predictions_file

torch.set_num_threads(1)


def test_the_fit_is_the_minimum_and_its_penalty_decides_how_large_weights_get() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    sizes = []
    for penalty in (1e-3, 1e-1):
        layer = floor.fit(x, labels, 3, penalty)
        loss = F.cross_entropy(layer(x), labels) + penalty / 2 * layer.weight.square().sum()
        gradients = torch.autograd.grad(loss, [*layer.parameters()])
        assert max(float(g.abs().max()) for g in gradients) < 1e-4
        sizes.append(float(layer.weight.detach().norm()))
    assert sizes[0] > 1.2 * sizes[1]


@pytest.mark.parametrize("counts", [(2, 2, 2), (100, 1, 7), (3, 0, 50)])
def test_folds_hold_each_class_evenly_whatever_the_imbalance(counts: tuple[int, ...]) -> None:
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    folds = floor.stratified(labels, 5, seed=3)
    for k, n in enumerate(counts):
        spread = torch.bincount(folds[labels == k], minlength=5)
        assert int(spread.sum()) == n
        assert int(spread.max() - spread.min()) <= 1
    found = floor.fold_loss(torch.randn(len(labels), 4), labels, folds, len(counts), 0.1)
    assert 0 < found < 5


def own_classes(folder: Path, *items: str) -> Config:
    """A run on three classes of six pictures from weights of ten."""
    torch.save(build_model("test_efficientnet", 10, 5).state_dict(), folder / "ten.pth")
    base = reading.merge(
        recipes.find("test_efficientnet", str(folder / "ten.pth")).values, recipes.preset("own_classes")
    )
    more = [f"data.root={folder / 'photos'}", f"data.cache={folder / 'cache'}", "data.workers=0", "run.eval_every=0"]
    more += ["data.res=64", "run.memory_format=channels_last", "run.precision=fp32", "pretrain.res=32", *items]
    return reading.parse(Config, reading.merge(base, reading.overrides(more)))


@pytest.mark.parametrize("policy", ["classifier", "all"])
def test_stage_one_starts_from_the_first_result_also_where_its_file_was_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """A stage one whose steps change nothing ends with the first result's predictions, since BatchNorms keep their statistics.

    Its class order is the folders' own."""
    monkeypatch.setattr(class_order, "doubt", lambda *_: "another order")
    write_photos(tmp_path / "photos", 6, 20)
    frozen = [f"pretrain.policy={policy}", "pretrain.bn_stats=kept", "pretrain.train_transform=test"]
    frozen += [
        "pretrain.lr_rule=none",
        "pretrain.base_lr=1e-12",
        "pretrain.epochs=1",
        "pretrain.classifier=first_result",
    ]
    config = own_classes(tmp_path, *frozen, "tune.policy=classifier", "tune.epochs=1")
    run = preparation.prepare(tmp_path / "run", config, "test")
    assert worker.train(run.root, StopFlag()) == 0
    first, before = (Predictions.read(predictions_file(run, name)) for name in ("floor-32", "before-32"))
    assert np.array_equal(first.predicted, before.predicted)
    assert len(set(first.predicted)) > 1
    kept = run.first_classifier.read_bytes()
    run.first_classifier.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    for file in (run.done, run.pretrained, run.results):
        file.unlink()
    shutil.rmtree(run.checkpoints)
    shutil.rmtree(tmp_path / "cache" / "stage_one")
    assert worker.train(run.root, StopFlag()) == 0
    said = capsys.readouterr().out
    assert f"{run.first_classifier} is damaged" in said
    assert "new classifier" not in said
    assert "another order" not in said
    assert "engine of floor: cached; " in said
    assert run.first_classifier.read_bytes() == kept
    assert [one.res for one in read_floors(run)] == [64, 32]


def test_a_later_start_finds_the_floor_and_stage_one_is_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images a class, one class with forty: stopped in stage one, resumed, and compared with a run without a floor."""
    data = write_photos(tmp_path / "photos", 2, 2)
    for k in range(38):
        (data / "train" / "ash" / f"more{k}.jpg").write_bytes((data / "train" / "ash" / "000.jpg").read_bytes())
    items = ["pretrain.epochs=3", "pretrain.global_batch=23", "tune.policy=classifier", "tune.global_batch=46"]
    config = own_classes(tmp_path, *items, "run.save_every_s=0")
    for name in ("run", "without"):
        preparation.prepare(tmp_path / name, config, "test")
    calls, check = [], Ranks.check_stop

    def stop_at_fourth(self: Ranks, *values: int) -> tuple[int, ...]:
        calls.append(0)
        if (tmp_path / "run" / "floor.json").exists() and len(calls) > 30:
            flag.signal = 15
        return check(self, *values)

    flag = StopFlag()
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "check_stop", stop_at_fourth)
        code = worker.train(tmp_path / "run", flag)
    made = json.loads((tmp_path / "run" / "floor.json").read_text())
    assert [one["res"] for one in made] == [32, 64]
    if code == 1:
        capsys.readouterr()
        assert worker.train(tmp_path / "run", StopFlag()) == 0
        assert "first result" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(worker, "measure_floors", lambda *_: None)
        assert worker.train(tmp_path / "without", StopFlag()) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "without")]
    assert [len(one["floor"]) for one in results] == [2, 0]
    for one in results[0]["floor"]:
        gain = results[0]["after"]["top1"] - one["top1"]
        assert one["after"]["delta_top1"] == pytest.approx(gain, abs=1e-3), "of the result over the first one, paired"
    assert results[0]["before"] == results[1]["before"]
    assert results[0]["after"] == results[1]["after"]
    assert json.loads((tmp_path / "run" / "floor.json").read_text()) == made


def test_five_thousand_classes_on_ten_thousand_pictures_are_left_out_with_the_reason(
    tmp_path: Path,
) -> None:
    work: Any = SimpleNamespace(
        session=SimpleNamespace(classes=tuple(map(str, range(5000))), train=range(10_000)),
        stage=SimpleNamespace(res=224),
    )
    why = floor.of_features(rundir.RunDir(tmp_path), work)
    assert why == "5,000 classes on 10,000 images would take too long"
    assert not (tmp_path / "floor.json").exists()


def test_a_start_with_more_room_has_the_first_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there was none for its features at the start before, which did not come to the end of stage one."""
    write_photos(tmp_path / "photos", 6, 3)
    run = preparation.prepare(tmp_path / "run", own_classes(tmp_path, "pretrain.epochs=1", "tune.epochs=1"), "test")
    with monkeypatch.context() as patched:
        patched.setattr(rule, "free_bytes", lambda folder: 0)
        patched.setattr(stage_one, "train", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            worker.train(run.root, StopFlag())
    assert not read_floors(run)
    assert worker.train(run.root, StopFlag()) == 0
    assert [one.res for one in read_floors(run)] == [32, 64]


def test_the_size_that_is_chosen_has_a_first_result(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 6, 3)
    items = (
        "pretrain.epochs=1",
        "tune.epochs=1",
        "tune.hold_out=0.2",
        "tune.hold_out_sizes=[96]",
        "pretrain.classifier=new",
    )
    items += ("tune.policy=classifier", "tune.bn_stats=kept", "data.train_transform=test")
    run = preparation.prepare(tmp_path / "run", own_classes(tmp_path, *items), "test")
    assert worker.train(run.root, StopFlag()) == 0
    assert [one.res for one in read_floors(run)] == [32, 96]
    assert {one.res for one in Results.read(run).floor} == {32, 96}
