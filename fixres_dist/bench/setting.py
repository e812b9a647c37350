"""A model at one size, opened as the product opens it, and its steps timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from fixres_dist.bench import turns
from fixres_dist.bench.photographs import write_data_set
from fixres_dist.bench.turns import Turn
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data.decoding import Batch
from fixres_dist.data.layout import class_folders
from fixres_dist.models.build import build_model, pretrained_cfg
from fixres_dist.training.ranks import join, launched
from fixres_dist.training.session import Session, open_session
from fixres_dist.training.throughput import Meter

CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """Model, size and arithmetic of a variant; `auto` is resolved by the product."""

    model: str
    res: int
    batch: int
    folder: Path  # data set
    weights: Path
    seconds: float  # least length of a turn
    precision: str = "auto"
    memory_format: str = "auto"
    compile: bool | None = None  # None: the product's default
    keep_memory: bool = True  # on a CPU, the product's allocator setting (base/memory.py)

    @property
    def name(self) -> str:
        return f"{self.precision} {self.memory_format}" + " compiled" * bool(self.compile)

    def config(self) -> Config:
        run = {"precision": self.precision, "memory_format": self.memory_format, "batch_per_device": self.batch}
        values = {
            "model": {"name": self.model, "timm_name": self.model, "weights": str(self.weights)},
            "data": {"root": str(self.folder), "res": self.res, "resize_rule": "fixefficientnet"},
            "tune": {"global_batch": self.batch, "epochs": 10**6},  # more steps than any measurement takes
            "run": run if self.compile is None else {**run, "compile": self.compile},
        }
        return reading.parse(Config, values)


class Work(NamedTuple):
    """`call()` does one step and returns its images; a turn starts with `ahead` steps that are not counted."""

    call: Callable[[], int]
    ahead: int = 1
    meter: Meter | None = None  # of the time waited for data


Build = Callable[[Session, Setting], Work]


def prepared(model: str, res: int, batch: int, seconds: float, scratch: Path, data: Path | None = None) -> Setting:
    """The setting for a data set (default: photographs of 1,000 classes) and weights, both written below `scratch`."""
    pretrained_cfg(model)  # refuses an unknown weights tag
    scratch.mkdir(exist_ok=True)
    folder = data or write_data_set(scratch / "photographs", scratch / "data", CLASSES, CLASSES)
    classes = len(class_folders(folder / "train"))
    turns.once(partial(write_weights, model, classes, scratch / "weights.safetensors"))
    return Setting(model, res, batch, folder, scratch / "weights.safetensors", seconds)


def write_weights(name: str, classes: int, file: Path) -> Iterator[None]:
    """New weights with measured BatchNorm statistics: with drawn statistics activations vanish or overflow."""
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
    session = opened(setting)
    yield from timed(build(session, setting), setting.seconds, base_mib)


def opened(setting: Setting) -> Session:
    return open_session(
        setting.config(), join(setting.folder, setting.keep_memory, launcher=launched({})), splits=("train",)
    )


def pictures(session: Session, setting: Setting) -> Batch:
    """Random uint8 images [batch, 3, res, res] and labels [batch] on the device, where the loader leaves them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (setting.batch, 3, setting.res, setting.res), dtype=torch.uint8, generator=generator)
    labels = torch.randint(len(session.train.classes), (setting.batch,), generator=generator)
    return Batch(images.to(session.ranks.device), labels.to(session.ranks.device), torch.arange(setting.batch))


def timed(work: Work, seconds: float, base_mib: float) -> Iterator[Turn]:
    """Turns of as many steps as took `seconds` in the first one.

    The peak is the process's memory beyond the libraries' `base_mib`, model and weights included; on a GPU, the device's.
    """
    cuda, steps = torch.cuda.is_available(), 0
    synchronize: Callable[[], object] = torch.cuda.synchronize if cuda else lambda: None
    forget_peak: Callable[[], object] = torch.cuda.reset_peak_memory_stats if cuda else turns.forget_peak
    while True:
        for _ in range(work.ahead):  # compiles, fills the emptied cache, uses up what was loaded between turns
            work.call()
        synchronize()
        forget_peak()
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
