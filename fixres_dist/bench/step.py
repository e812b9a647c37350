"""`bench trunk` and `bench step`: images/s of a forward and of an optimizer step, from pictures in memory.

Our rows call the product's own functions, from uint8 pictures. The references are written plainly, from normalised
pictures: the original protocol's step, full fine-tuning, and timm's inference of the same model, which is the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist.base.memory import does_not_fit
from fixres_dist.bench import turns
from fixres_dist.bench.result import Ratios, Result, Row, row_of
from fixres_dist.bench.setting import Build, Setting, Work, opened, pictures, variant
from fixres_dist.models import policies, precision
from fixres_dist.models.parts import parts_of, set_modes
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.session import Session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import stages
from fixres_dist.training.step import backward, distribute
from fixres_dist.training.throughput import Meter

# Ratio of our row: the row it is divided by; `{}` is our row's number format, memory format and compilation.
REFERENCES = {
    "vs_original": "original fp32",
    "vs_original_our_allocator": "original fp32, our allocator",
    "vs_original_tf32": "original tf32",
    "vs_full_finetune": "full fine-tuning fp32 contiguous",
    "vs_timm_inference": "timm {}",
}


def measure(stage: str, setting: Setting, repeat: int) -> Result:
    """`trunk` or `step` at one size."""
    auto = turns.once(partial(resolved, setting))
    todo = {name: partial(variant, *pair) for name, pair in variants(stage, auto).items()}
    found, failed = turns.alternate(todo, repeat, f"{stage} {setting.model} {setting.res}")
    rows = {name: row_of(name, values, setting.batch) for name, values in found.items()}
    versus = ratios(rows)
    return Result(list(rows.values()), failed, of_auto(versus), versus)


def variants(stage: str, auto: Setting) -> dict[str, tuple[Build, Setting]]:
    """Ours and timm's inference at the same settings; of `step` also the original protocol and full fine-tuning."""
    plain = replace(auto, precision="fp32", memory_format="contiguous", compile=False)
    script = replace(plain, keep_memory=False)  # scripts leave the allocator alone
    fp32, bf16 = (replace(plain, precision=p, memory_format="channels_last") for p in ("fp32", "bf16"))
    settings = (fp32, bf16, auto)
    found: dict[str, tuple[Build, Setting]] = {}
    if stage == "step":
        found["original fp32"] = (original, script)  # as published
        if torch.cuda.is_available():
            found["original tf32"] = (original, replace(script, precision="tf32"))
        else:
            found["original fp32, our allocator"] = (original, plain)
        found[f"full fine-tuning {script.name}"] = (full, script)
    ours, build = ("trunk", trunk) if stage == "trunk" else ("ours", step)
    found |= {f"{ours} {s.name}": (build, s) for s in settings}
    found[f"{ours} auto ({auto.name})"] = found.pop(f"{ours} {auto.name}")
    return found | {f"timm {s.name}": (timm_inference, s) for s in settings}


def ratios(rows: dict[str, Row]) -> Ratios:
    """images/s of our rows against the references."""
    found: Ratios = {}
    for name, row in rows.items():
        if name.startswith(("ours", "trunk")):
            settings = name.partition("(")[2].rstrip(")") or name.partition(" ")[2]
            for key, reference in REFERENCES.items():
                if other := rows.get(reference.format(settings)):
                    ratio = row.images_per_second / other.images_per_second
                    found.setdefault(key, {})[row.name] = round(ratio, 3)
    return found


def of_auto(versus: Ratios) -> dict[str, float]:
    """The ratios of the row that the product chooses by itself."""
    return {key: v for key, values in versus.items() for name, v in values.items() if " auto (" in name}


def resolved(setting: Setting) -> Iterator[Setting]:
    """`setting` with the product's choices for `auto` on this machine."""
    session = opened(setting)
    fast = session.with_fast_trunk(parts_of(session.model, session.config.tune.policy)).trunk
    layout = getattr(fast, "memory_format", session.memory_format)
    name = "channels_last" if layout is torch.channels_last else "contiguous"
    compiled = bool(getattr(fast, "compiled", session.config.run.compile))
    yield replace(setting, precision=session.arithmetic.name, memory_format=name, compile=compiled)


def trunk(session: Session, setting: Setting) -> Work:
    parts = session.with_fast_trunk(parts_of(session.model, session.config.tune.policy))
    images = pictures(session, setting).images
    return Work(lambda: len(session.inputs(parts, images)[0]))


def step(session: Session, setting: Setting) -> Work:
    one, batch = stepper(fixing(session)), pictures(session, setting)
    return Work(lambda: one(iter([batch])))


def fixing(session: Session) -> StageSession:
    """The session's last stage as a run trains it."""
    stage = stages(session.config, len(session.train))[-1]
    parts = session.with_fast_trunk(parts_of(session.model, stage.tune.policy))
    set_modes(parts, stage.tune.bn_stats)
    return StageSession(session, stage, parts)


def stepper(work: StageSession) -> Callable[[Iterator[Loaded]], int]:
    """The product's optimizer step on the micro-batches it is given; returns its images."""
    session, stage, parts = work.session, work.stage, work.parts
    tuned = [p for p in session.model.parameters() if p.requires_grad]
    optimizer = precision.sgd("torch", tuned, stage.tune.momentum, stage.tune.weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate(0)
    scale = precision.LossScale(session.arithmetic, optimizer, parts.head if parts.trains_blocks else None)
    head, meter = distribute(work), Meter()

    def one(micro_batches: Iterator[Loaded]) -> int:
        optimizer.zero_grad()
        samples = backward(work, head, scale, 0, micro_batches, meter)
        scale.step()
        return len(samples)

    return one


def original(session: Session, setting: Setting) -> Work:
    """The published code's step: only the classifier trains, the last BN uses its batch, autograd sees the network."""
    tuned = policies.select(session.model, "classifier+bn_stats")
    for name, parameter in session.model.named_parameters():
        parameter.requires_grad_(name in tuned.parameters)
    session.model.eval()
    for module in tuned.modules:
        session.model.get_submodule(module).train()
    return plain_step(session, setting)


def full(session: Session, setting: Setting) -> Work:
    """Every parameter trains, in train mode."""
    session.model.train().requires_grad_(True)
    return plain_step(session, setting)


def plain_step(session: Session, setting: Setting) -> Work:
    """Forward, cross entropy, backward, SGD. On a GPU the batch is halved until it fits; the row's name tells the batch."""
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, 1e-3, momentum=0.9, weight_decay=1e-4)
    batch = pictures(session, setting)
    images, labels = session.to_device(batch.images), batch.labels

    def call() -> int:
        nonlocal images, labels
        try:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(session.model(images), labels))
            optimizer.step()
            return len(labels)
        except Exception as error:
            if len(labels) == 1 or not does_not_fit(error):
                raise
        torch.cuda.empty_cache()
        images, labels = images[: len(labels) // 2].clone(), labels[: len(labels) // 2]
        return call()

    return Work(call)


def timm_inference(session: Session, setting: Setting) -> Work:
    """The whole model's forward, weights and pictures in the precision's format, as timm's own benchmark runs it."""
    dtype = precision.DTYPES.get(setting.precision, torch.float32)
    images = session.to_device(pictures(session, setting).images).to(dtype)
    model = session.model.eval().requires_grad_(False).to(dtype)
    model = cast(nn.Module, torch.compile(model, dynamic=False)) if setting.compile else model

    def call() -> int:
        with torch.inference_mode():
            return len(model(images))

    return Work(call)
