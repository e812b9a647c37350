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
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fixres_dist import config as cfg
from fixres_dist import distributed, models, train, tuning
from fixres_dist.bench import data, turns
from fixres_dist.bench.turns import Turn, Variant
from fixres_dist.data.torch_cpu import Batch
from fixres_dist.meter import Meter
from fixres_dist.schedule import Stage, stages
from fixres_dist.session import Session, open_session

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

    @property
    def name(self) -> str:
        return f"{self.precision} {self.memory_format}" + " compiled" * bool(self.compile)

    def config(self) -> cfg.Config:
        run = {"precision": self.precision, "memory_format": self.memory_format, "batch_per_device": self.batch}
        if self.compile is not None:
            run["compile"] = self.compile
        return cfg.parse(
            cfg.Config,
            {
                "model": {"name": self.model, "timm_name": self.model, "weights": str(self.weights)},
                "data": {"root": str(self.folder), "res": self.res, "resize_rule": "fixefficientnet"},
                "tune": {"global_batch": self.batch, "epochs": 10**6},  # the loop never ends by itself
                "run": run,
            },
        )


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        setting = prepare(args.model, args.res, args.batch, args.seconds, Path(scratch))
        compiled = args.compile or torch.cuda.is_available()
        rows, versus, failed = measure(args.stage, setting, args.repeat, compiled)
    return turns.result(args.stage, rows, of_auto(versus), rows_vs=versus, failed=failed)


def measure(
    stage: str, setting: Setting, repeat: int, compiled: bool, until: float = math.inf
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]], dict[str, str]]:
    """(rows, for each ratio its value by row, what failed) of `trunk` or `step` at one size."""
    auto = turns.once(Variant(resolved, (setting,)))
    variants = (trunk_variants if stage == "trunk" else step_variants)(auto, compiled)
    found, failed = turns.alternate(variants, repeat, f"{stage} {setting.model} {setting.res}", until)
    rows = {name: turns.row(name, values) for name, values in found.items()}
    return list(rows.values()), ratios(rows), failed


def trunk_variants(auto: Setting, compiled: bool) -> dict[str, Variant]:
    """From the plain trunk to ours, one change at a time, and timm's inference at the plain and at our settings."""
    plain = replace(auto, precision="fp32", memory_format="contiguous", compile=False)
    last = replace(plain, memory_format="channels_last")
    low = replace(last, precision="bf16")
    variants = {f"trunk {plain.name} unfolded": Variant(trunk, (plain, False))}
    for setting in (plain, last, low, *([replace(low, compile=True)] if compiled else []), auto):
        variants[f"trunk {setting.name}"] = Variant(trunk, (setting, True))
    variants[f"trunk auto ({auto.name})"] = variants.pop(f"trunk {auto.name}")
    return variants | {f"timm {s.name}": Variant(timm_inference, (s,)) for s in dict.fromkeys((plain, low, auto))}


def step_variants(auto: Setting, compiled: bool) -> dict[str, Variant]:
    """Ours beside the original protocol (fp32 as published; a GPU's tf32 too), full fine-tuning and timm's inference."""
    plain = replace(auto, precision="fp32", memory_format="contiguous", compile=False)
    fp32, bf16 = (replace(auto, precision=p, memory_format="channels_last", compile=False) for p in ("fp32", "bf16"))
    references = (plain, replace(plain, precision="tf32")) if torch.cuda.is_available() else (plain,)
    variants = {f"original {s.precision}": Variant(original, (s,)) for s in references}
    variants |= {f"full fine-tuning {s.name}": Variant(full, (s,)) for s in (plain, bf16)}
    ours = dict.fromkeys((fp32, bf16, *([replace(bf16, compile=True)] if compiled else []), auto))
    variants |= {f"ours {s.name}": Variant(step, (s,)) for s in ours}
    variants[f"ours auto ({auto.name})"] = variants.pop(f"ours {auto.name}")
    return variants | {f"timm {s.name}": Variant(timm_inference, (s,)) for s in ours}


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """images/s of each row against the references; timm's inference at the row's own settings."""
    speed = {name: row["images_per_second"] for name, row in rows.items()}
    references = {
        "vs_original": "original fp32",
        "vs_original_tf32": "original tf32",
        "vs_full_finetune": "full fine-tuning fp32 contiguous",
    }
    found: dict[str, dict[str, float]] = {key: {} for key in (*references, "vs_timm_inference")}
    for name, row in rows.items():
        if not name.startswith(("ours", "trunk")):
            continue
        settings = name.partition("(")[2].rstrip(")") or name.partition(" ")[2]
        for key, reference in {**references, "vs_timm_inference": f"timm {settings}"}.items():
            if reference in speed:
                found[key][row["name"]] = round(speed[name] / speed[reference], 3)
    return {key: values for key, values in found.items() if values}


def of_auto(versus: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ratios of the row that the product chooses by itself."""
    return {key: v for key, values in versus.items() for name, v in values.items() if " auto (" in name}


def prepare(model: str, res: int, batch: int, seconds: float, scratch: Path, folder: Path | None = None) -> Setting:
    """A data set of 1,000 classes and weights whose activations are of order one, as trained ones are."""
    cfg.at_least(argparse.Namespace(res=res), "res", 32)
    cfg.at_least(argparse.Namespace(batch=batch), "batch", 1)
    if folder is None:
        photographs = data.write_photographs(scratch / "photographs", 160)
        folder = linked(sorted((photographs / "val" / "a").iterdir()), scratch / "linked", CLASSES)
    turns.once(Variant(write_weights, (model, classes_of(folder), scratch / "weights.safetensors")))
    return Setting(model, res, batch, folder, scratch / "weights.safetensors", seconds)


def classes_of(folder: Path) -> int:
    return sum(path.is_dir() for path in (folder / "train").iterdir())


def linked(files: list[Path], root: Path, classes: int, images: int = 0) -> Path:
    """A data set with `classes` folders: `images` photographs to train on (default: one a class), one a class in val."""
    for split, count in (("train", max(images, classes)), ("val", classes)):
        for i in range(count):
            target = root / split / f"{i % classes:04d}" / f"{i:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(files[i % len(files)])
    return root


def write_weights(name: str, classes: int, file: Path) -> Iterator[None]:
    """New weights with BatchNorm statistics that were measured: drawn ones let activations vanish or overflow."""
    model = models.build(name, classes)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain average
    size = 128 if classes > 1 else 64
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0)))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    yield


def opened(setting: Setting) -> Session:
    return open_session(setting.config(), distributed.start(setting.folder), splits=("train",))


def resolved(setting: Setting) -> Iterator[Setting]:
    """`setting` with what the product makes of `auto` on this machine."""
    live = opened(setting)
    layout = "channels_last" if live.memory_format is torch.channels_last else "contiguous"
    yield replace(setting, precision=live.precision, memory_format=layout, compile=bool(live.config.run.compile))


def pictures(setting: Setting, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [batch, 3, res, res], labels [batch]) on the device, where a loader leaves them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (setting.batch, 3, setting.res, setting.res), dtype=torch.uint8, generator=generator)
    return images.to(device), torch.randint(CLASSES, (setting.batch,), generator=generator).to(device)


def trunk(setting: Setting, fast: bool) -> Iterator[Turn]:
    base = turns.memory_mib()
    live = opened(setting)
    parts = tuning.split(live.model, live.config.tune.policy)
    parts = live.with_fast_trunk(parts) if fast else parts
    images, _ = pictures(setting, live.ranks.device)
    yield from timed(lambda: live.inputs(parts, images), setting, base)


def step(setting: Setting) -> Iterator[Turn]:
    base = turns.memory_mib()
    live = opened(setting)
    images, labels = pictures(setting, live.ranks.device)
    batch = Batch(images, labels % len(live.train.classes), torch.arange(setting.batch))
    one = stepper(live)
    yield from timed(lambda: one(0, iter([batch])), setting, base)


def stepper(live: Session) -> Callable[[int, Iterator[Batch]], list[int]]:
    """The product's optimizer step, of (step, micro-batches); returns its samples."""
    stage = fixing(live)
    parts = live.with_fast_trunk(tuning.split(live.model, stage.tune.policy))
    tuning.set_modes(parts, stage.tune.bn_stats)
    tuned = [p for p in live.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(tuned, stage.learning_rate(0), stage.tune.momentum, weight_decay=1e-4)
    head, scaler, meter = train.distribute(live, stage, parts), torch.amp.GradScaler(enabled=False), Meter()

    def one(step: int, batches: Iterator[Batch]) -> list[int]:
        optimizer.zero_grad()
        samples = train.backward(live, stage, parts, head, scaler, step, batches, meter)
        optimizer.step()
        return samples

    return one


def fixing(live: Session) -> Stage:
    return stages(live.config, len(live.train))[-1]


def original(setting: Setting) -> Iterator[Turn]:
    """The published code's step: only the classifier trains, the last BN uses its batch, autograd sees the network."""
    base = turns.memory_mib()
    live = opened(setting)
    model, tuned = live.model, tuning.select(live.model, "classifier+bn_stats")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tuned.parameters)
    model.eval()
    for module in tuned.modules:
        model.get_submodule(module).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    yield from timed(plain_step(live, trainable, contextlib.nullcontext, setting), setting, base)


def full(setting: Setting) -> Iterator[Turn]:
    """Every parameter trains, in train mode. On a GPU the batch is halved until it fits, which the row's name says."""
    base = turns.memory_mib()
    live = opened(setting)
    live.model.train().requires_grad_(True)
    asked = setting.batch
    while True:
        try:
            work = plain_step(live, list(live.model.parameters()), live.autocast, setting)
            work()
            break
        except torch.OutOfMemoryError:
            if setting.batch == 1:
                raise
            setting = replace(setting, batch=setting.batch // 2)
            torch.cuda.empty_cache()
    note = "" if setting.batch == asked else f"batch {setting.batch}"
    yield from (turn._replace(note=note) for turn in timed(work, setting, base))


def plain_step(live: Session, trainable: list[nn.Parameter], autocast: Any, setting: Setting) -> Callable[[], None]:
    optimizer = torch.optim.SGD(trainable, 1e-3, momentum=0.9, weight_decay=1e-4)
    images, labels = pictures(setting, live.ranks.device)
    images, labels = live.to_device(images), labels % len(live.train.classes)

    def work() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(live.model(images), labels)
        loss.backward()
        optimizer.step()

    return work


def timm_inference(setting: Setting) -> Iterator[Turn]:
    """The whole model's forward as timm's own benchmark runs it; a trained step cannot be much faster."""
    base = turns.memory_mib()
    live = opened(setting)
    images = live.to_device(pictures(setting, live.ranks.device)[0])
    model = live.model.eval().requires_grad_(False)
    model = cast(nn.Module, torch.compile(model, dynamic=False)) if setting.compile else model

    def work() -> None:
        with torch.inference_mode(), live.autocast():
            model(images)

    yield from timed(work, setting, base)


def timed(work: Callable[[], Any], setting: Setting, base_mib: float) -> Iterator[Turn]:
    """Turns of at least `setting.seconds`; the peak is what they need beyond the libraries' `base_mib`, or of GPU memory."""
    cuda = torch.cuda.is_available()
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    for _ in range(2):  # the second one tells the time: the first one compiles, plans and allocates
        started = time.monotonic()
        work()
        synchronize()
    steps = max(1, math.ceil(setting.seconds / (time.monotonic() - started)))
    while True:
        if cuda:
            work()  # the cache was emptied
            torch.cuda.reset_peak_memory_stats()
        else:
            turns.forget_peak()
        synchronize()
        before, started = turns.cpu_seconds(), time.monotonic()
        for _ in range(steps):
            work()
        synchronize()
        took, used = time.monotonic() - started, turns.cpu_seconds() - before
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else turns.memory_mib(peak=True) - base_mib
        if cuda:
            torch.cuda.empty_cache()  # the others' processes share the device
        yield Turn(steps * setting.batch, took, used, peak)
