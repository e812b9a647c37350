"""Activation checkpointing: the same gradients and the same BatchNorm statistics, less memory, or a refusal that says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models import batchnorm
from fixres_dist.models.build import build_model
from fixres_dist.models.parts import checkpoint_activations, parts_of, set_modes


def step(recompute: bool, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """(gradients, tensors after the backward pass, bytes kept for it) of the whole network in training mode."""
    parts = parts_of(build_model("test_efficientnet", 3), "all", recompute)
    set_modes(parts, "ema")
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = parts.head(images).logsumexp(1).sum()
    size = sum(kept.values())
    with batchnorm.statistics_kept(parts):
        loss.backward()
    gradients = {name: p.grad for name, p in parts.model.named_parameters() if p.grad is not None}
    return gradients, parts.model.state_dict(), size


def test_the_same_step_with_less_memory() -> None:
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, plain_state, plain_bytes = step(False, images)
    again, again_state, again_bytes = step(True, images)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(torch.equal(plain_state[name], again_state[name]) for name in plain_state), "a batch was counted twice"
    assert again_bytes < 0.6 * plain_bytes


def test_a_later_stage_computes_once() -> None:
    model = build_model("test_efficientnet", 3)
    assert parts_of(model, "all", True).recomputes
    fixed = parts_of(model, "classifier+bn", True)
    assert not fixed.recomputes
    assert not model.grad_checkpointing, "a trunk without gradients keeps nothing anyway"


def test_what_cannot_is_refused() -> None:
    with pytest.raises(UserError, match=r"frozen blocks.*tune.policy=all"):
        reading.parse(Config, reading.overrides(["run.activation_checkpointing=true"]))
    reading.parse(Config, reading.overrides(["run.activation_checkpointing=true", "pretrain.epochs=1"]))
    with pytest.raises(UserError, match="timm cannot do it for Linear"):
        checkpoint_activations(nn.Linear(2, 2), True)
    checkpoint_activations(nn.Linear(2, 2), False)
