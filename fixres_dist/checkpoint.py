"""Checkpoints: the tuned tensors, the optimizer, the step, and the fingerprint of all that must match.

A directory step_00001200/ is complete or invisible (written beside, then renamed). Tensors are safetensors, the rest
JSON: reading one runs no code. World size is not part of it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixres_dist.errors import UserError

KEPT = 2  # newest ones; the best stays too


@dataclass(frozen=True)
class Progress:
    """What a run knows beyond its tensors; everything else follows from the step."""

    step: int  # optimizer steps done over both stages
    stage: str
    seconds: float = 0.0  # worked on training, over all starts
    best_top1: float = -1.0  # of the evaluations while this stage trains
    best_step: int = -1

    def with_top1(self, top1: float) -> Progress:
        return replace(self, best_top1=top1, best_step=self.step) if top1 > self.best_top1 else self


def save(
    folder: Path,
    model: nn.Module,
    names: tuple[str, ...],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprint: dict[str, Any],
) -> Path:
    """Write step_NNNNNNNN/ below `folder` and drop what is no longer kept; rank 0 only."""
    final = folder / f"step_{progress.step:08d}"
    part = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    state = model.state_dict()
    save_file({name: state[name].detach().cpu().contiguous() for name in names}, part / "head.safetensors")
    save_file(optimizer_tensors(model, optimizer), part / "optimizer.safetensors")
    (part / "meta.json").write_text(json.dumps({"progress": asdict(progress), "fingerprint": fingerprint}, indent=1))
    for file in part.iterdir():
        sync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    sync(folder)
    prune(folder, progress.best_step)
    return final


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """`momentum_buffer:NAME` of every parameter, and `average:NAME` where weights are averaged."""
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}:{names[p]}": value.detach().cpu().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def sync(path: Path) -> None:
    """Reach the disk before the rename does: a node that loses power keeps the old checkpoint or the new one."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*/meta.json"))


def prune(folder: Path, best_step: int) -> None:
    for path in complete(folder)[:-KEPT]:
        if path.name != f"step_{best_step:08d}":
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*"):  # left by a kill in the middle of a save
        shutil.rmtree(path, ignore_errors=True)


def progress_of(path: Path) -> Progress:
    return Progress(**json.loads((path / "meta.json").read_text())["progress"])


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]) -> Progress:
    """Load a checkpoint; raises UserError naming what differs when it belongs to another run, data set or trunk."""
    meta = json.loads((path / "meta.json").read_text())
    kept = meta["fingerprint"]
    differ = [f"{key} was {value}, is {fingerprint[key]}" for key, value in kept.items() if fingerprint[key] != value]
    if differ:
        raise UserError(
            f"{path} cannot be resumed: {'; '.join(differ)}. Put back what changed, or start under another --name."
        )
    load_tensors(path, model)
    parameters = dict(model.named_parameters())
    for name, value in load_file(path / "optimizer.safetensors").items():
        key, _, parameter = name.partition(":")
        optimizer.state[parameters[parameter]][key] = value.to(parameters[parameter].device)
    return Progress(**meta["progress"])


def load_tensors(path: Path, model: nn.Module) -> None:
    """Copy a checkpoint's tuned tensors into `model`, in place."""
    state = model.state_dict()
    with torch.no_grad():
        for name, value in load_file(path / "head.safetensors").items():
            state[name].copy_(value)
