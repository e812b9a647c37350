"""The batch a GPU is given, found by trying; and what the dry run predicts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.commands import tiny
from torch import nn

from fixres_dist.base import memory
from fixres_dist.base.errors import UserError
from fixres_dist.base.memory import does_not_fit
from fixres_dist.base.signals import StopFlag
from fixres_dist.cli.main import main
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import Pretrain, Tune
from fixres_dist.models import batchnorm, costs, fast_trunk, precision
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import Parts, parts_of, set_modes
from fixres_dist.training import auto_batch, estimates, loop, plan, step, worker
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, open_session, tell
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, stages


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


def with_batch(live: Session, stage: Stage, parts: Parts) -> Session:
    return auto_batch.with_batch(live, stage, parts, *optimizer_of(live, parts))


def optimizer_of(live: Session, parts: Parts) -> tuple[torch.optim.Optimizer, precision.LossScale]:
    optimizer = precision.sgd("torch", [p for p in live.model.parameters() if p.requires_grad], 0.9, 1e-4)
    return optimizer, precision.LossScale(live.arithmetic, optimizer, parts.head if parts.trains_blocks else None)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A pretended GPU that holds 40 images; the list is of the batches that were tried on it."""
    tried: list[int] = []

    def fits(work: StageSession, *_: Any) -> bool:
        tried.append(work.batch_per_device)
        return tried[-1] <= 40

    monkeypatch.setattr(auto_batch, "step_fits", fits)
    monkeypatch.setattr(auto_batch, "nothing_moved", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    return tried


def test_it_is_measured_once_and_kept_with_the_run(tmp_path: Path, gpu: list[int]) -> None:
    file = tmp_path / "choices.json"
    live = replace(session(), kept=file)
    (stage,) = stages(live.config, 1000)
    parts = parts_of(live.model, "classifier+bn")
    first = with_batch(live, stage, parts).config
    assert 36 <= int(first.run.batch_per_device) <= 40
    assert reading.identity(first) == reading.identity(live.config), "the run stays the same run"
    asked = len(gpu)
    assert with_batch(live, stage, parts).config == first
    assert len(gpu) == asked, "a resume measures nothing"
    kept = {"largest that fits": first.run.batch_per_device, "of use": 130}
    assert json.loads(file.read_text())["batch per device, fix at 224 px, 1 x pretended"] == kept
    given = session("run.batch_per_device=7")
    assert with_batch(given, stage, parts) is given


def test_nothing_fits(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "step_fits", lambda *_: False)
    live = session()
    with pytest.raises(UserError, match=r"not even one image of 224 px.*smaller --res"):
        with_batch(live, stages(live.config, 1000)[0], parts_of(live.model, "classifier+bn"))


def predicted(*items: str, model: str = "b4") -> float:
    recipe = recipes.find(model)
    config = reading.parse(Config, reading.merge(recipe.values, reading.overrides(list(items))))
    assert recipe.facts
    return estimates.memory_gib(config, recipe.facts, estimates.Counts(*plan.IMAGENET, ""), 8)


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


def test_no_batch_is_tried_whose_tensors_cuda_cannot_index(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "largest_batch", lambda model, res: 24 if res == 224 else 0)
    live = session()
    found = with_batch(live, stages(live.config, 1000)[0], parts_of(live.model, "classifier+bn"))
    assert found.config.run.batch_per_device == 24
    assert gpu == [24]


class Memory:
    """The memory counters of a pretended GPU of 100 bytes, in use by others: 5."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reserved, self.others, self.called = 70, 5, list[str]()
        for name in ("reset_peak_memory_stats", "synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: self.called.append(name))
        for name in ("max_memory_reserved", "memory_reserved"):
            monkeypatch.setattr(torch.cuda, name, lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 - self.reserved - self.others, 100))


def opened(photos: Path, *items: str) -> tuple[Session, Stage, Parts]:
    """A session on photographs, on a CPU."""
    small = ["model.name=test_efficientnet", "model.timm_name=test_efficientnet", "model.weights=none", "data.res=64"]
    settings = [
        f"data.root={photos}",
        "data.workers=0",
        "data.backend=torch",
        "run.precision=fp32",
        "tune.global_batch=20",
    ]
    config = reading.parse(Config, reading.overrides([*small, *settings, *items]))
    live = open_session(config, Ranks(0, 1, 1, ("n1",), torch.device("cpu")))
    stage = stages(config, len(live.train))[-1]
    return live, stage, live.with_fast_trunk(parts_of(live.model, stage.tune.policy))


@pytest.mark.parametrize("policy", ["all", "classifier+bn", "last_block"])
def test_an_attempt_is_the_step_that_trains_and_moves_nothing(
    monkeypatch: pytest.MonkeyPatch, photos: Path, policy: str
) -> None:
    """The accumulation of a whole step, momenta and a batch of the evaluation beside it, through the loaders."""
    memory = Memory(monkeypatch)
    live, stage, parts = opened(photos, f"tune.policy={policy}", "tune.bn_stats=ema")
    optimizer, scale = optimizer_of(live, parts)
    set_modes(parts, "ema")
    work = auto_batch.with_size(auto_batch.as_tried(live, stage, parts), 8)
    before = {name: value.clone() for name, value in live.model.state_dict().items()}
    random, sizes, no_grad = torch.get_rng_state(), list[int](), list[int]()
    inputs = live.inputs

    def counted(self: Session, parts: Parts, images: Any) -> Any:
        (sizes if torch.is_grad_enabled() else no_grad).append(len(images))
        return inputs(parts, images)

    monkeypatch.setattr(Session, "inputs", counted)
    with auto_batch.nothing_moved(work, optimizer, scale):
        head = step.distribute(work)
        assert auto_batch.step_fits(work, head, optimizer, scale)
        assert sizes == [8, 8, 4, 8, 8, 4], "two steps of 20 images in micro-batches of 8"
        assert no_grad == [8], "and a batch of the evaluation"
        assert all("momentum_buffer" in state for state in optimizer.state.values())
        assert len(optimizer.state) == sum(p.requires_grad for p in live.model.parameters())
        memory.others = 21
        assert not auto_batch.step_fits(work, head, optimizer, scale), "decoders and other processes count"
        for error in (torch.cuda.OutOfMemoryError(), RuntimeError("Expected canUse32BitIndexMath(input) to be true")):
            monkeypatch.setattr(auto_batch, "backward", failing(error))
            assert not auto_batch.step_fits(work, head, optimizer, scale)
        monkeypatch.setattr(auto_batch, "backward", failing(RuntimeError("a fault of another kind")))
        with pytest.raises(RuntimeError, match="another kind"):
            auto_batch.step_fits(work, head, optimizer, scale)
    assert memory.called[-2:] == ["empty_cache", "reset_peak_memory_stats"]
    assert all(torch.equal(value, before[name]) for name, value in live.model.state_dict().items())
    assert all(p.grad is None for p in live.model.parameters())
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random)
    assert parts.model.training == (policy == "all"), "the modes are those of training again"


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_the_first_attempt_has_the_probes_memory_back(gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(gpu)))
    live = session()
    with_batch(live, stages(live.config, 1000)[0], parts_of(live.model, "classifier+bn"))
    assert emptied[0] == 0


class Head(nn.Module):
    """Stands for DDP: its gradients may not be reduced."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.quiet = head, False

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        before, self.quiet = self.quiet, True
        yield
        self.quiet = before

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        assert self.quiet, "this backward pass would be a collective"
        return self.head(*inputs)


@pytest.mark.parametrize(
    "policy", ["all", "classifier+bn"]
)  # statistics of the batch over ranks; a stop signal asked for
def test_several_ranks_try_alone(monkeypatch: pytest.MonkeyPatch, photos: Path, policy: str) -> None:
    """One rank may run out of memory where others do not: no collective may stand in the attempt."""
    Memory(monkeypatch)
    for name in ("all_reduce", "barrier", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, failing(AssertionError("a collective")))
    live, stage, parts = opened(photos, f"tune.policy={policy}")
    several = replace(live, ranks=replace(live.ranks, rank=1, world_size=2, flag=StopFlag()))
    optimizer, scale = optimizer_of(live, parts)
    work = auto_batch.with_size(auto_batch.as_tried(several, stage, parts), 4)
    if policy == "all":
        batchnorm.share_batch_statistics(parts)
    with auto_batch.nothing_moved(work, optimizer, scale):
        assert auto_batch.step_fits(work, Head(parts.head), optimizer, scale)
    x = torch.ones(3)
    with batchnorm.on_this_rank_alone():
        assert torch.equal(batchnorm.BatchNormOverRanks.total(x), x)
    with pytest.raises(AssertionError, match="a collective"):
        batchnorm.BatchNormOverRanks.total(x)


def test_the_trunks_probe_takes_fewer_images_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, bool]] = []

    def fastest(trunk: Any, dtype: Any, choices: list[Any], images: torch.Tensor) -> dict[Any, float]:
        tried.append((len(images), choices[0].compile))
        if len(images) > 5 or choices[0].compile:
            raise torch.cuda.OutOfMemoryError
        return dict.fromkeys(choices, 1.0)

    monkeypatch.setattr(fast_trunk, "fastest", fastest)
    choices = [fast_trunk.Arrangement("contiguous", False), fast_trunk.Arrangement("contiguous", True)]
    found = fast_trunk.probe(nn.Identity(), torch.float32, choices, torch.zeros(16, 3, 2, 2), 10**6)
    assert tried == [(16, False), (8, False), (4, False), (4, True)]
    assert (found["memory_format"], found["compile"]) == ("contiguous", False)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true"), True),
        (RuntimeError("nonzero is not supported for tensors with more than INT_MAX elements"), True),
        (RuntimeError("input tensor must have at most 2**31 elements"), True),
        (RuntimeError("too many elements"), True),
        (RuntimeError("index_select(): self too large to fit in int32"), True),
        (RuntimeError("batch size exceeds the 32-bit limit"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("expected scalar type Float but found Int32"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (32x1280 and 1000x3)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_a_smaller_batch_avoids(error: Exception, expected: bool) -> None:
    assert does_not_fit(error) == expected


@pytest.mark.parametrize("when", ["statistics", "step"])
def test_a_run_without_memory_names_the_next_smaller_batch(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(
        loop,
        "measure_statistics" if when == "statistics" else "backward",
        failing(torch.OutOfMemoryError("CUDA out of memory")),
    )
    more = ["tune.epochs=1", "run.batch_per_device=32", "run.batch_per_device=24", "data.workers=0", "--prepare"]
    assert main([*tiny(tmp_path, "short", photos, 1), *more]) == 0
    assert worker.train(tmp_path / "short", StopFlag()) == 2
    why, following = (tmp_path / "short" / "FAILED").read_text().splitlines()
    images = 24 if when == "statistics" else 12
    assert why == f"{images} images of 64 px in a forward pass do not fit into the memory of cpu (CUDA out of memory)"
    assert following.startswith("Next: fixres submit --model test_efficientnet")
    assert following.endswith(f" run.batch_per_device={images // 2}")
    assert following.count("batch_per_device") == 1


def test_a_plan_for_a_cpu_says_that_memory_is_short(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def plan_of(available_gib: float, *more: str) -> str:
        monkeypatch.setattr(memory, "available_bytes", lambda: int(available_gib * 2**30))
        words = ["submit", "--model", "b4", "--data", str(photos), "--res", "320", "--weights", "none", "--dry-run"]
        words += ["--runs-dir", str(tmp_path), "pretrain.global_batch=256", *more]
        assert main(words) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory "))

    local = ("--cluster", "local", "--gpus-per-node", "2")
    enough = plan_of(900.0, *local)
    assert "GiB of this machine's memory for 2 process(es): pretrain " in enough
    assert "Next" not in enough
    short = plan_of(40.0, *local)
    assert "40.0 of the" in short
    assert "GiB are available, and the kernel kills processes that take more. Next: run.batch_per_device=" in short
    assert "Next" not in plan_of(40.0, *local, short.rpartition("Next: ")[2]), "what it names fits"
    assert "Next: a smaller --res, or fewer processes" in plan_of(1.0, *local)
    assert "per GPU" in plan_of(1.0, "--cluster", "slurm")


def test_what_backward_keeps_is_counted_wherever_gradients_run_through_all(photos: Path) -> None:
    """tune.policy=attention trains a part of every block."""
    need = {}
    for policy in ("classifier+bn", "attention", "all"):
        config = reading.parse(
            Config, {"data": {"root": str(photos), "res": "224"}, "tune": {"policy": policy, "bn_stats": "ema"}}
        )
        counted = costs.costs("test_vit", 3, 224)
        need[policy] = estimates.memory_gib(config, counted, plan.count(config), 1)
    assert need["classifier+bn"] < need["attention"] <= need["all"]


@pytest.mark.parametrize(("name", "said"), [("pretrain", "pretrain.res=, smaller"), ("fix", "a smaller --res")])
def test_a_pair_that_mixup_mixes_is_not_parted(name: str, said: str) -> None:
    tune = Pretrain(mixup=0.2) if name == "pretrain" else Tune()
    stage = Stage(name, tune, 64, "test", 0, 10, 0)
    images, ranks = stage.together, SimpleNamespace(device="cuda:0", world_size=1)
    work = SimpleNamespace(batch_per_device=images, session=SimpleNamespace(ranks=ranks), stage=stage)
    with pytest.raises(UserError, match=said), auto_batch.naming_a_smaller_batch(work, in_steps=False):  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("CUDA out of memory")
