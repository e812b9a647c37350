"""The frozen trunk as it runs: the same function, other arithmetic; the model's own tensors stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import lived_in
from torch import fx, nn

from fixres_dist.config import reading
from fixres_dist.config.schema import Config, Run
from fixres_dist.data import geometry
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.models import fast_trunk, precision
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import parts_of
from fixres_dist.training.cache.store import begin_writing, open_store
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CHANNELS_LAST = fast_trunk.Arrangement("channels_last", False)


def session(
    model: nn.Module, kept: Path | None = None, number: str = "fp32", *items: str, device: torch.device = CPU
) -> Session:
    config = reading.parse(Config, reading.overrides(["data.res=64", "run.batch_per_device=8", *items]))
    ranks, spec = Ranks(0, 1, 1, ("here",), device), preprocessing("test_efficientnet")
    arithmetic = precision.Arithmetic(number, device)
    return Session(config, ranks, model, spec, {}, (), {}, arithmetic, torch.channels_last, lambda *_: None, kept)


def pictures(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# EfficientNets end in a convolution that widens, and so does a bottleneck ResNet's last block (whose shortcut is a second feature).
@pytest.mark.parametrize(
    ("name", "policy", "kept"),
    [
        ("tf_efficientnet_b0", "classifier+bn", [(320, 2, 2)]),
        ("tf_efficientnet_b0", "classifier+bn+conv_head", [(320, 2, 2)]),
        ("tf_efficientnet_b0", "classifier", [(1280,)]),
        ("resnet50", "classifier+bn", [(2048, 2, 2), (512, 2, 2)]),
        ("resnet18", "classifier+bn", [(512, 2, 2), (512, 2, 2)]),
        ("convnext_atto", "classifier", [(320,)]),
    ],
)
def test_folded_split_and_laid_out_it_is_the_same_function(
    name: str, policy: str, kept: list[tuple[int, ...]], device: torch.device
) -> None:
    model = lived_in(build_model(name, 5)).to(device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = parts_of(model, policy)
    assert parts.trunk is not None
    images = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        expected = parts.trunk(images)
        for layout in fast_trunk.FORMATS:
            fast = fast_trunk.arranged(
                fast_trunk.prepared(parts.trunk, torch.float32)[0], torch.float32, fast_trunk.Arrangement(layout, False)
            )
            assert sorted(tuple(f.shape[1:]) for f in fast.features(images)) == sorted(kept)
            for a, b in zip(expected, fast(images), strict=True):
                assert float((a - b).abs().max() / a.abs().max()) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def tf32(x: torch.Tensor) -> torch.Tensor:
    """`x` with ten bits of mantissa, as a GPU's TF32 convolutions read it."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(
    ("name", "number", "text"),
    [
        ("tf_efficientnet_b0", "tf32", "48 of 48 BatchNorms of the frozen trunk are folded into convolutions"),
        ("tf_efficientnet_b0", "fp32", "48 of 48 BatchNorms of the frozen trunk are folded into convolutions"),
        ("densenet121", "tf32", "59 of 120 BatchNorms of the frozen trunk are folded into convolutions"),
        ("vit_tiny_patch16_224", "tf32", ""),
    ],
)
def test_tf32_folds_what_fp32_folds(monkeypatch: pytest.MonkeyPatch, name: str, number: str, text: str) -> None:
    """The check of folding compares to 1e-4, which TF32's own rounding exceeds: it runs in fp32 whatever the run's format."""
    plain, rounded = nn.Conv2d._conv_forward, []

    def forward(conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not torch.backends.cudnn.allow_tf32 or x.is_meta:
            return plain(conv, x, weight, bias)
        rounded.append(conv)
        return plain(conv, tf32(x), tf32(weight), bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", forward)
    live = session(build_model(name, 5), None, number, "run.memory_format=channels_last", "data.res=224")
    try:
        parts = live.with_fast_trunk(parts_of(lived_in(live.model), "classifier+bn"))
        assert parts.folded == text
        assert not rounded
        live.inputs(parts, torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
        assert bool(rounded) == (number == "tf32"), "the run itself keeps its format"
    finally:
        precision.Arithmetic("fp32", CPU)  # it sets torch's switches, which other tests would inherit


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "densenet121"])
def test_low_precision_means_low_precision_weights_and_an_untouched_model(name: str, device: torch.device) -> None:
    """A DenseNet's BatchNorms come before convolutions, so most cannot be folded: they keep fp32 for narrow inputs."""
    model = build_model(name, 5).to(device)
    parts = parts_of(model, "classifier+bn")
    assert parts.trunk is not None
    fast = fast_trunk.arranged(fast_trunk.prepared(parts.trunk, torch.bfloat16)[0], torch.bfloat16, CHANNELS_LAST)
    for module in fast.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.dtype == torch.bfloat16
    images = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        for a, b in zip(parts.trunk(images), fast(images), strict=True):
            assert b.dtype == torch.bfloat16
            assert float((a - b).square().mean().sqrt() / a.square().mean().sqrt()) < 0.05
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("number", ["fp32", "bf16"])
def test_kept_features_are_the_streamed_inputs_bit_by_bit(tmp_path: Path, number: str, device: torch.device) -> None:
    model = lived_in(build_model("test_efficientnet", 5)).to(device)
    live = session(model, None, number, "run.memory_format=channels_last", device=device)
    parts = live.with_fast_trunk(parts_of(model, "classifier+bn"))
    made = live.trunk_features(parts.trunk, pictures(6))
    assert made[0].dtype == precision.DTYPES.get(number, torch.float32)
    store = open_store(tmp_path, {}, 6, 1, made)
    begin_writing(store, {})
    store.write((0, 6), [(np.arange(6), [tuple(f.cpu() for f in made)])])
    sizes, labels = np.full((6, 2), 64, np.int32), np.zeros(6, np.int32)
    found = Index(tmp_path, ("a",), b"", np.zeros(6, np.int64), labels, sizes, np.zeros(6, np.uint32))
    how = Pictures("test", 64, geometry.resize_of("fixefficientnet", 64, 0.875, "bicubic"), 0)
    (rows,) = store.batches(found, [make_request(found, how, np.arange(6), 0)])
    streamed = live.inputs(parts, pictures(6))
    for a, b in zip(streamed, live.inputs(parts, rows.images), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
        assert a.stride() == b.stride(), "the head's kernels depend on the layout"


class Recorded(nn.Module):
    """Stands for a compiled module and records the shapes of its inputs."""

    def __init__(self, body: nn.Module, seen: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.body, self.seen = body, seen

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.seen.append(tuple(x.shape))
        return self.body(x)


def test_a_compiled_trunk_sees_one_size_per_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training has micro-batches of 6 and an evaluation of 8; an epoch's last batch, and an empty one, are filled up."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch, "compile", lambda body, dynamic, mode: Recorded(body, seen))
    model = lived_in(build_model("test_efficientnet", 5))
    live = session(model, None, "fp32", "run.compile=true", "tune.global_batch=6")
    cut = parts_of(model, "classifier+bn")
    parts = live.with_fast_trunk(cut)
    plain = session(model, None, "fp32", "run.memory_format=channels_last").with_fast_trunk(cut)
    for n in (8, 6, 3, 7, 0, 1):
        (a,), (b,) = live.inputs(parts, pictures(n)), live.inputs(plain, pictures(n))
        assert len(a) == n
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [shape[0] for shape in seen] == [8, 6, 6, 8, 6, 6]


def test_only_a_smaller_batch_is_copied_to_fill_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """F.pad copies a batch even where it adds no picture: a full one reaches the device as the loader made it."""
    monkeypatch.setattr(torch, "compile", lambda body, dynamic, mode: body)
    arrived: list[int] = []
    plain = Session.to_device

    def to_device(self: Session, images: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
        arrived.append(images.data_ptr())
        return plain(self, images, layout)

    monkeypatch.setattr(Session, "to_device", to_device)
    model = lived_in(build_model("test_efficientnet", 5))
    for setting, copied in (("run.compile=true", [False, True]), ("run.memory_format=channels_last", [False, False])):
        live = session(model, None, "fp32", setting)
        parts, given = live.with_fast_trunk(parts_of(model, "classifier+bn")), [pictures(8), pictures(5)]
        for images in given:
            live.inputs(parts, images)
        assert [a != images.data_ptr() for a, images in zip(arrived, given, strict=True)] == copied
        arrived.clear()


def test_each_size_of_a_compiled_trunk_has_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's default the ninth size would run eagerly, with no word but a warning."""
    compiled, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda body, dynamic, mode: compiled(body, dynamic=dynamic, backend=backend))
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3))
    parts = fx.GraphModule(trunk, fx.Tracer().trace(trunk))
    fast = fast_trunk.FastTrunk(parts, None, torch.float32, fast_trunk.Arrangement("contiguous", True))
    sizes = [(n, 16 + 8 * k) for k in range(10) for n in (2, 5)]
    for _ in range(2):
        for n, res in sizes:
            assert len(fast.features(torch.zeros(n, 3, res, res))) == n
        assert len(graphs) == len(sizes), "one for each size, and none a second time"


def timed(monkeypatch: pytest.MonkeyPatch, cost: Callable[[fast_trunk.FastTrunk], float]) -> None:
    monkeypatch.setattr(fast_trunk, "seconds", lambda fast, images: cost(fast))
    monkeypatch.setattr(torch, "compile", lambda body, dynamic, mode: body)


@pytest.mark.parametrize(
    ("contiguous", "compiled", "todo", "chosen"),
    [
        (1.0, 0.1, 100, CHANNELS_LAST),
        (1.0, 0.1, 10**6, fast_trunk.Arrangement("contiguous", True)),
        (0.95, 0.92, 10**6, CHANNELS_LAST),
        (0.8, 0.85, 10**6, fast_trunk.Arrangement("contiguous", False)),
        (2.0, 1.5, 10**6, CHANNELS_LAST),
    ],
)
def test_the_usual_arrangement_stays_unless_another_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, contiguous: float, compiled: float, todo: int, chosen: fast_trunk.Arrangement
) -> None:
    timed(
        monkeypatch,
        lambda f: compiled if f.compiled else contiguous if f.memory_format == torch.contiguous_format else 1.0,
    )
    choices = [CHANNELS_LAST, fast_trunk.Arrangement("contiguous", False), fast_trunk.Arrangement("contiguous", True)]
    parts = parts_of(build_model("test_efficientnet", 5), "classifier+bn")
    own, _ = fast_trunk.prepared(parts.trunk, torch.float32)
    found = fast_trunk.probe(own, torch.float32, choices, torch.zeros(4, 3, 64, 64), todo)
    assert (found["memory_format"], found["compile"]) == chosen
    assert ("contiguous compiled" in found["ms_per_image"]) == (todo > 1000), "compiling is tried where it may pay"


def test_a_compiler_that_does_not_work_costs_a_line_and_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a node without gcc, where run.compile=auto would try it."""

    def no_compiler(body: nn.Module, **_: Any) -> nn.Module:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    timed(monkeypatch, lambda f: 1.0)
    monkeypatch.setattr(torch, "compile", no_compiler)
    parts = parts_of(build_model("test_efficientnet", 5), "classifier+bn")
    own, _ = fast_trunk.prepared(parts.trunk, torch.float32)
    choices = [CHANNELS_LAST, fast_trunk.Arrangement("contiguous", True)]
    found = fast_trunk.probe(own, torch.float32, choices, torch.zeros(4, 3, 64, 64), 10**6)
    assert (found["memory_format"], found["compile"]) == CHANNELS_LAST
    said = "not compiled (run.compile=false tries it no more): RuntimeError: Failed to find C compiler.\n"
    assert said in capsys.readouterr().out


def test_what_is_tried() -> None:
    def names(device: torch.device, **settings: Any) -> list[str]:
        return [str(how) for how in fast_trunk.candidates(Run(**settings), device)]

    assert names(CPU) == ["channels_last", "contiguous"]
    assert names(GPU) == ["contiguous", "channels_last", "contiguous compiled"]
    assert names(GPU, deterministic=True) == ["contiguous"], "a measured time decides otherwise from run to run"
    assert names(CPU, deterministic=True) == ["channels_last"]
    assert names(CPU, compile=True) == ["channels_last compiled"]
    assert names(GPU, compile=False, memory_format="channels_last") == ["channels_last"]


def test_the_choice_is_made_once_and_kept_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda fast: 0.1 if fast.memory_format == torch.contiguous_format else 1.0)
    model, kept = build_model("test_efficientnet", 5), tmp_path / "choices.json"
    cut = parts_of(model, "classifier+bn")

    def layout(*items: str) -> torch.memory_format:
        live = session(model, kept, "fp32", *items)
        live = dataclasses.replace(live, splits={})
        return live.with_fast_trunk(cut).trunk.memory_format

    assert layout() == torch.contiguous_format
    timed(monkeypatch, lambda fast: 1.0)
    assert layout() == torch.contiguous_format, "a later start takes the choice that was kept"
    assert layout("run.memory_format=channels_last") == torch.channels_last, "unless the setting names another format"


@pytest.mark.parametrize(
    ("able", "chosen"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_auto_takes_bf16_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], chosen: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert precision.resolve("auto", CPU) == chosen
    assert precision.resolve("fp32", CPU) == "fp32"


@pytest.mark.parametrize(("major", "chosen"), [(7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_auto_takes_no_emulated_bf16(monkeypatch: pytest.MonkeyPatch, major: int, chosen: str) -> None:
    """torch says that a V100 (7.0) and a T4 (7.5) support bf16: it can make such tensors, and computes in fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    assert precision.resolve("auto", GPU) == chosen
    assert precision.resolve("bf16", GPU) == "bf16"
