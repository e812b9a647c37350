"""The batch a GPU is given, found by trying; and what the dry run predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.models import precision
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import parts_of, set_modes
from fixres_dist.training import auto_batch, plan
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, tell
from fixres_dist.training.stages import stages


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 37, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("cap", [1, 5, 64, 100])
def test_the_largest_batch_is_found_to_an_eighth(limit: int, cap: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    found = auto_batch.largest_that_fits(fits, cap)
    best = min(limit, cap)
    assert found <= best
    assert found >= best - best // 8 - (best > 8)
    assert best > 8 or found == best
    assert not tried or max(tried) <= cap, "no use in more than the rank's share"
    assert len(tried) <= 14
    assert len(set(tried)) == len(tried), "a size is tried once: an attempt costs seconds"


def session(*items: str) -> Session:
    config = reading.parse(Config, reading.overrides(["tune.global_batch=96", *items]))
    ranks = Ranks(0, 1, 1, ("n1",), torch.device("cuda", 0))
    model = build_model("test_efficientnet", 3)
    arithmetic = precision.Arithmetic("fp32", torch.device("cpu"))
    spec = preprocessing("test_efficientnet")
    return Session(config, ranks, model, spec, {}, (), {}, arithmetic, torch.contiguous_format, tell)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A pretended GPU that holds 40 images; the list is of the batches that were tried on it."""
    tried: list[int] = []

    def fits(*arguments: Any) -> bool:
        tried.append(arguments[-1])
        return arguments[-1] <= 40

    monkeypatch.setattr(auto_batch, "step_fits", fits)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    return tried


def test_it_is_measured_once_and_kept_with_the_run(tmp_path: Path, gpu: list[int]) -> None:
    file = tmp_path / "choices.json"
    live = replace(session(), kept=file)
    (stage,) = stages(live.config, 1000)
    parts = parts_of(live.model, "classifier+bn")
    first = auto_batch.with_batch(live, stage, parts).config
    assert 36 <= int(first.run.batch_per_device) <= 40
    assert reading.identity(first) == reading.identity(live.config), "the run stays the same run"
    asked = len(gpu)
    assert auto_batch.with_batch(live, stage, parts).config == first
    assert len(gpu) == asked, "a resume measures nothing"
    kept = {"largest that fits": first.run.batch_per_device, "of use": 130}
    assert json.loads(file.read_text()) == {"batch per device, fix at 224 px, 1 x pretended": kept}
    given = session("run.batch_per_device=7")
    assert auto_batch.with_batch(given, stage, parts) is given


def test_nothing_fits(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "step_fits", lambda *_: False)
    live = session()
    with pytest.raises(UserError, match=r"not even one image of 224 px.*smaller --res"):
        auto_batch.with_batch(live, stages(live.config, 1000)[0], parts_of(live.model, "classifier+bn"))


def predicted(*items: str, model: str = "b4") -> float:
    recipe = recipes.find(model)
    config = reading.parse(Config, reading.merge(recipe.values, reading.overrides(list(items))))
    assert recipe.facts
    return plan.memory_gib(config, recipe.facts, plan.Counts(*plan.IMAGENET, ""), 8)


def test_predicted_memory_follows_what_a_step_keeps() -> None:
    frozen, whole = predicted("run.batch_per_device=32"), predicted("run.batch_per_device=32", "tune.policy=all")
    again = predicted("run.batch_per_device=32", "tune.policy=all", "run.activation_checkpointing=true")
    assert whole > 3 * frozen
    assert frozen < again < 0.5 * whole
    assert predicted("run.batch_per_device=32", "run.precision=fp32") > frozen
    # Counted on the meta device: b4 saves 314 MiB an image at 380 px in bf16, so 32 images of 512 px need 18 GiB.
    at_512 = predicted("run.batch_per_device=32", "data.res=512", "tune.policy=all")
    assert at_512 - predicted("run.batch_per_device=32", "data.res=512") == pytest.approx(
        32 * 314 * (512 / 380) ** 2 / 1024, rel=0.1
    )


def test_trying_a_batch_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt itself, on a CPU with the GPU's memory counters pretended."""
    reserved = {"bytes": 70}
    for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: reserved["bytes"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100))
    live = session("tune.policy=all", "data.res=64")
    live = replace(live, ranks=replace(live.ranks, device=torch.device("cpu")))
    (stage,) = stages(live.config, 1000)
    parts = parts_of(live.model, "all")
    set_modes(parts, "ema")
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    assert auto_batch.step_fits(live, stage, parts, 3)
    reserved["bytes"] = 90
    assert not auto_batch.step_fits(live, stage, parts, 3)
    monkeypatch.setattr(parts.head, "forward", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError()))
    assert not auto_batch.step_fits(live, stage, parts, 3)
    assert all(torch.equal(value, before[name]) for name, value in live.model.state_dict().items())
    assert all(p.grad is None for p in live.model.parameters())
    assert parts.model.training, "the modes are those of training again"
