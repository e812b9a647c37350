"""A stage's model and optimizer as a checkpoint has them: taken from its newest one, if that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.checkpoint import Progress, Tensors, complete, progress_of, read, way_round


def resume(
    folder: Path,
    start: Progress,
    model: nn.Module,
    names: tuple[str, ...],
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    ema: nn.Module | None = None,
) -> tuple[Progress, bool]:
    """(where the stage of `start` continues, whether from a checkpoint, which is loaded then). `names`: the tuned tensors."""
    found = complete(folder)
    newest = progress_of(found[-1]) if found else None
    if newest and newest.stage == start.stage:
        taken = newest.step - start.step - newest.loss_scale.get("skipped", 0)  # an overflow skips the optimizer's step
        return restore(found[-1], model, names, optimizer, fingerprint, ema, taken > 0), True
    return replace(start, seconds=newest.seconds if newest else 0.0), False


def restore(
    path: Path,
    model: nn.Module,
    names: tuple[str, ...],
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    ema: nn.Module | None = None,
    stepped: bool = True,
) -> Progress:
    """Load a checkpoint into `model`, `optimizer` and the moving average `ema`, in place. `stepped`: the optimizer has taken steps.

    Raises Damaged, and UserError that names the differences if the fingerprint is of another configuration, data set or trunk.
    """
    saved = read(path)
    kept = saved.fingerprint
    if "configuration" in kept:  # keys that are newer than the checkpoint had their defaults then
        kept["configuration"] = reading.identity(reading.parse(Config, kept["configuration"]))
    differ = [
        f"{key} was {value}, is {fingerprint.get(key)}" for key, value in kept.items() if fingerprint.get(key) != value
    ]
    if differ:
        raise UserError(
            f"{path} cannot be resumed: {'; '.join(differ)}. Put back what changed, or start under another --name."
        )
    if odd := misfit(saved.tensors, model, names, optimizer, ema, stepped):
        raise Damaged(path, odd, way_round(path))
    parameters = dict(model.named_parameters())
    put_tensors(model, saved.tensors.head)
    if ema:
        put_tensors(ema, saved.tensors.ema)
    for name, value in saved.tensors.optimizer.items():
        key, _, parameter = name.partition(":")
        if parameter.startswith("#"):  # of a group: a whole number, or a tensor on the group's device (LAMB)
            group = optimizer.param_groups[int(parameter[1:])]
            group[key] = value.to(group["params"][0].device) if value.is_floating_point() else int(value)
        else:  # torch counts steps on the CPU
            optimizer.state[parameters[parameter]][key] = value if key == "step" else like(parameters[parameter], value)
    return saved.progress


@torch.no_grad()
def put_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into the model's of the same names, in place."""
    state = model.state_dict()
    for name, value in tensors.items():
        state[name].copy_(value)


def exchange(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same; returns a copy of those that were there."""
    state = model.state_dict()
    before = {name: state[name].detach().clone() for name in tensors}
    put_tensors(model, tensors)
    return before


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the optimizer in its parameter's memory format, since norms (LAMB, LARS) are sums in that order."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def misfit(
    tensors: Tensors,
    model: nn.Module,
    names: tuple[str, ...],
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    stepped: bool,
) -> str:
    """What a checkpoint lacks or has too much for `model`, `optimizer` and `ema`; empty if it fits."""
    state, parameters = model.state_dict(), dict(model.named_parameters())
    for found in (tensors.head, *([tensors.ema] if ema else [])):
        for name in {**dict.fromkeys(names), **found}:
            if name not in found or name not in names:
                return f"tensor {name} is {'not one of the tuned' if name in found else 'missing'}"
            if found[name].shape != state[name].shape:
                return f"tensor {name} is {list(found[name].shape)}, the model wants {list(state[name].shape)}"
    for name, value in tensors.optimizer.items():
        key, _, owner = name.partition(":")
        groups = [f"#{k}" for k in range(len(optimizer.param_groups))]
        if owner not in (groups if owner.startswith("#") else parameters):
            return f"the optimizer's {name} is of no parameter of the model"
        if key in ("momentum_buffer", "average") and value.shape != parameters[owner].shape:
            return f"the optimizer's {name} is {list(value.shape)}, its parameter {list(parameters[owner].shape)}"
    if stepped and optimizer.param_groups[0].get("momentum") and not tensors.optimizer:
        return "the optimizer's momenta are missing"
    return ""
