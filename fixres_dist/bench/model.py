"""`bench trunk` and `bench step`: what a forward and an optimizer step cost from pictures in memory.

Ours go through the product's own functions. Beside them, written plainly: the original protocol's step, full
fine-tuning, and timm's inference of the same model, the ceiling. They start from normalised pictures, ours from uint8.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fixres_dist.bench import data, turns
from fixres_dist.bench.turns import Turn, Variant
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data.decoding import Batch
from fixres_dist.models import policies, precision
from fixres_dist.models.build import build_model, pretrained_cfg
from fixres_dist.models.parts import Parts, parts_of, set_modes
from fixres_dist.training.ranks import join
from fixres_dist.training.session import Session, open_session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage, stages
from fixres_dist.training.step import backward, distribute
from fixres_dist.training.throughput import Meter

CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """Model, size and arithmetic of a variant; `auto` as the product resolves it."""

    model: str
    res: int
    batch: int
    folder: Path  # data set
    weights: Path
    seconds: float  # least length of a turn
    precision: str = "auto"
    memory_format: str = "auto"
    compile: bool | None = None  # None: as the product's default has it
    keep_memory: bool = True  # as the product does on a CPU (allocator.py)

    @property
    def name(self) -> str:
        return f"{self.precision} {self.memory_format}" + " compiled" * bool(self.compile)

    def config(self) -> Config:
        run = {"precision": self.precision, "memory_format": self.memory_format, "batch_per_device": self.batch}
        values = {
            "model": {"name": self.model, "timm_name": self.model, "weights": str(self.weights)},
            "data": {"root": str(self.folder), "res": self.res, "resize_rule": "fixefficientnet"},
            "tune": {"global_batch": self.batch, "epochs": 10**6},  # the loop never ends by itself
            "run": run if self.compile is None else {**run, "compile": self.compile},
        }
        return reading.parse(Config, values)


class Work(NamedTuple):
    """`call()` does one step and returns its images; `ahead` of them are not counted at the start of a turn."""

    call: Callable[[], int]
    ahead: int = 1
    meter: Meter | None = None  # counts the time waited for data


Build = Callable[[Session, Setting], Work]


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        setting = prepare(args.model, args.res, args.batch, args.seconds, Path(scratch))
        compiled = args.compile or torch.cuda.is_available()
        rows, versus, failed = measure(args.stage, setting, args.repeat, compiled)
    return turns.result(args.stage, rows, of_auto(versus), rows_vs=versus, failed=failed)


def measure(
    stage: str, setting: Setting, repeat: int, compiled: bool, until: float = math.inf
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]], dict[str, str]]:
    """(rows, each ratio by row, what failed) of `trunk` or `step` at one size; `until` as in turns.alternate."""
    auto = turns.once(Variant(resolved, (setting,)))
    chosen = (trunk_variants if stage == "trunk" else step_variants)(auto, compiled)
    variants = {name: Variant(variant, pair) for name, pair in chosen.items()}
    found, failed = turns.alternate(variants, repeat, f"{stage} {setting.model} {setting.res}", until)
    rows = {name: turns.row(name, values, setting.batch) for name, values in found.items()}
    return list(rows.values()), ratios(rows), failed


def trunk_variants(auto: Setting, compiled: bool) -> dict[str, tuple[Build, Setting]]:
    """From the plain trunk to ours, one change at a time, and timm's inference at the plain and at our settings."""
    plain = replace(auto, precision="fp32", memory_format="contiguous", compile=False)
    last = replace(plain, memory_format="channels_last")
    low = replace(last, precision="bf16")
    more = [replace(low, compile=True)] if compiled else []
    ours: dict[str, tuple[Build, Setting]] = {f"trunk {plain.name} unfolded": (unfolded, plain)}
    ours |= {f"trunk {s.name}": (trunk, s) for s in (plain, last, low, *more, auto)}
    ours[f"trunk auto ({auto.name})"] = ours.pop(f"trunk {auto.name}")
    return ours | {f"timm {s.name}": (timm_inference, s) for s in (plain, last, low, *more, auto)}


def step_variants(auto: Setting, compiled: bool) -> dict[str, tuple[Build, Setting]]:
    """Ours beside the original protocol (fp32 as published; a GPU's tf32 too), full fine-tuning and timm's inference."""
    plain = replace(auto, precision="fp32", memory_format="contiguous", compile=False)
    fp32, bf16 = (replace(auto, precision=p, memory_format="channels_last", compile=False) for p in ("fp32", "bf16"))
    settings = (fp32, bf16, *([replace(bf16, compile=True)] if compiled else []), auto)
    plainly = replace(plain, keep_memory=False)  # scripts take the allocator as it comes
    found: dict[str, tuple[Build, Setting]] = {"original fp32": (original, plainly)}
    if torch.cuda.is_available():
        found["original tf32"] = (original, replace(plainly, precision="tf32"))
    else:
        found["original fp32, our allocator"] = (original, plain)
    found |= {f"full fine-tuning {s.name}": (full, replace(s, keep_memory=False)) for s in (plain, bf16)}
    found |= {f"ours {s.name}": (step, s) for s in settings}
    found[f"ours auto ({auto.name})"] = found.pop(f"ours {auto.name}")
    return found | {f"timm {s.name}": (timm_inference, s) for s in settings}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """images/s of our rows against the references; timm's inference at the row's own settings."""
    speed = {name: row["images_per_second"] for name, row in rows.items()}
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in rows if name.startswith(("ours", "trunk"))):
        settings = name.partition("(")[2].rstrip(")") or name.partition(" ")[2].removesuffix(" unfolded")
        references = {
            "vs_original": "original fp32",
            "vs_original_our_allocator": "original fp32, our allocator",
            "vs_original_tf32": "original tf32",
            "vs_full_finetune": "full fine-tuning fp32 contiguous",
            "vs_timm_inference": f"timm {settings}",
        }
        for key, reference in references.items():
            if reference in speed:
                found.setdefault(key, {})[rows[name]["name"]] = round(speed[name] / speed[reference], 3)
    return found


def of_auto(versus: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ratios of the row that the product chooses by itself."""
    return {key: v for key, values in versus.items() for name, v in values.items() if " auto (" in name}


def prepare(model: str, res: int, batch: int, seconds: float, scratch: Path, folder: Path | None = None) -> Setting:
    """A data set of 1,000 classes and weights whose activations are of order one, as trained ones are."""
    pretrained_cfg(model)  # refuses an unknown weights tag
    if folder is None:
        folder = linked(scratch / "photographs", scratch / "linked", CLASSES, CLASSES)
    setting = Setting(model, res, batch, folder, scratch / "weights.safetensors", seconds)
    turns.once(Variant(write_weights, (model, sum(p.is_dir() for p in (folder / "train").iterdir()), setting.weights)))
    return setting


def linked(photographs: Path, root: Path, classes: int, images: int) -> Path:
    """A data set of synthetic photographs: `images` to train on, one of each class in val."""
    if not photographs.exists():
        data.write_photographs(photographs, 64)
    files = sorted(photographs.rglob("*.jpg"))
    for split, count in (("train", images), ("val", classes)):
        for i in range(count):
            target = root / split / f"{i % classes:04d}" / f"{i:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(files[i % len(files)])
    return root


def write_weights(name: str, classes: int, file: Path) -> Iterator[None]:
    """New weights with BatchNorm statistics that were measured: with drawn ones activations vanish or overflow."""
    model = build_model(name, classes)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain average
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    yield


def variant(build: Build, setting: Setting) -> Iterator[Turn]:
    base_mib = turns.memory_mib(code=False)
    live = opened(setting)
    yield from timed(build(live, setting), setting.seconds, base_mib)


def opened(setting: Setting) -> Session:
    return open_session(setting.config(), join(setting.folder, setting.keep_memory), splits=("train",))


def resolved(setting: Setting) -> Iterator[Setting]:
    """`setting` with what the product makes of `auto` on this machine."""
    live = opened(setting)
    fast = live.with_fast_trunk(parts_of(live.model, live.config.tune.policy)).trunk
    layout = getattr(fast, "memory_format", live.memory_format)
    name = "channels_last" if layout is torch.channels_last else "contiguous"
    compiled = bool(getattr(fast, "compiled", live.config.run.compile))
    yield replace(setting, precision=live.arithmetic.name, memory_format=name, compile=compiled)


def pictures(live: Session, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [batch, 3, res, res], labels [batch]) on the device, where the loader leaves them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (setting.batch, 3, setting.res, setting.res), dtype=torch.uint8, generator=generator)
    labels = torch.randint(len(live.train.classes), (setting.batch,), generator=generator)
    return images.to(live.ranks.device), labels.to(live.ranks.device)


def unfolded(live: Session, setting: Setting) -> Work:
    return forward(live, setting, parts_of(live.model, live.config.tune.policy))


def trunk(live: Session, setting: Setting) -> Work:
    return forward(live, setting, live.with_fast_trunk(parts_of(live.model, live.config.tune.policy)))


def forward(live: Session, setting: Setting, parts: Parts) -> Work:
    images, _ = pictures(live, setting)
    return Work(lambda: len(live.inputs(parts, images)[0]))


def step(live: Session, setting: Setting) -> Work:
    batch = Batch(*pictures(live, setting), torch.arange(setting.batch))
    one = stepper(live)
    return Work(lambda: one(0, iter([batch])))


def stepper(live: Session) -> Callable[[int, Iterator[Any]], int]:
    """The product's optimizer step, of (step, micro-batches); returns its images."""
    stage = fixing(live)
    parts = live.with_fast_trunk(parts_of(live.model, stage.tune.policy))
    set_modes(parts, stage.tune.bn_stats)
    tuned = [p for p in live.model.parameters() if p.requires_grad]
    optimizer = precision.sgd("torch", tuned, stage.tune.momentum, stage.tune.weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate(0)
    scale = precision.LossScale(live.arithmetic, optimizer, parts.head if parts.trains_blocks else None)
    work = StageSession(live, stage, parts)
    head, meter = distribute(work), Meter()

    def one(step: int, batches: Iterator[Any]) -> int:
        optimizer.zero_grad()
        samples = backward(work, head, scale, step, batches, meter)
        scale.step()
        return len(samples)

    return one


def fixing(live: Session) -> Stage:
    return stages(live.config, len(live.train))[-1]


def original(live: Session, setting: Setting) -> Work:
    """The published code's step: only the classifier trains, the last BN uses its batch, autograd sees the network."""
    tuned = policies.select(live.model, "classifier+bn_stats")
    for name, parameter in live.model.named_parameters():
        parameter.requires_grad_(name in tuned.parameters)
    live.model.eval()
    for module in tuned.modules:
        live.model.get_submodule(module).train()
    return plain_step(live, setting)


def full(live: Session, setting: Setting) -> Work:
    """Every parameter trains, in train mode."""
    live.model.train().requires_grad_(True)
    return plain_step(live, setting)


def plain_step(live: Session, setting: Setting) -> Work:
    """On a GPU the batch is halved until it fits, which the row's name says."""
    trainable = [p for p in live.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 1e-3, momentum=0.9, weight_decay=1e-4)
    pixels, labels = pictures(live, setting)
    images, device = live.to_device(pixels), live.ranks.device.type

    def call() -> int:
        nonlocal images, labels
        low = setting.precision in precision.DTYPES
        try:
            optimizer.zero_grad()
            with torch.autocast(device, precision.DTYPES[setting.precision]) if low else contextlib.nullcontext():
                loss = F.cross_entropy(live.model(images), labels)
            loss.backward()
            optimizer.step()
            return len(labels)
        except torch.OutOfMemoryError:
            if len(labels) == 1:
                raise
        torch.cuda.empty_cache()
        images, labels = images[: len(labels) // 2].clone(), labels[: len(labels) // 2]
        return call()

    return Work(call)


def timm_inference(live: Session, setting: Setting) -> Work:
    """The whole model's forward, weights and pictures in the precision's format: what timm's own benchmark runs."""
    dtype = precision.DTYPES.get(setting.precision, torch.float32)
    images = live.to_device(pictures(live, setting)[0]).to(dtype)
    model = live.model.eval().requires_grad_(False).to(dtype)
    model = cast(nn.Module, torch.compile(model, dynamic=False)) if setting.compile else model

    def call() -> int:
        with torch.inference_mode():
            return len(model(images))

    return Work(call)


def timed(work: Work, seconds: float, base_mib: float) -> Iterator[Turn]:
    """Turns of as many steps as took `seconds` in the first one.

    The peak is what they need beyond the libraries' `base_mib`, model and weights included, or all of it on a GPU.
    """
    cuda, steps = torch.cuda.is_available(), 0
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    while True:
        for _ in range(work.ahead):  # compiles, fills the emptied cache, uses up what was loaded between turns
            work.call()
        synchronize()
        torch.cuda.reset_peak_memory_stats() if cuda else turns.forget_peak()
        waited = work.meter.wait_s if work.meter else 0.0
        before, started, seen, done = turns.cpu_seconds(), time.monotonic(), 0, 0
        while not done or (done < steps if steps else time.monotonic() - started < seconds):
            seen, done = seen + work.call(), done + 1
            if not steps:
                synchronize()
        synchronize()
        took, used = time.monotonic() - started, turns.cpu_seconds() - before
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else turns.memory_mib(peak=True, code=False) - base_mib
        if cuda:
            torch.cuda.empty_cache()  # the others' processes share the device
        steps = steps or done
        waited = work.meter.wait_s - waited if work.meter else 0.0
        yield Turn(seen, took, used, peak, seen // done, waited)
