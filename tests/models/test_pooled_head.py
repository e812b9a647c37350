"""The head in one pass over the map: the function and the gradients of the plain one, and nothing kept of the map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist.models import pooled_head
from fixres_dist.models.build import build_model
from fixres_dist.models.parts import Parts, parts_of, set_modes
from fixres_dist.models.pooled_head import PooledHead

CLASSES = 7


def trained_parts(name: str, policy: str = "classifier+bn") -> Parts:
    """With statistics and affine as of a trained BN, away from 0 and 1."""
    model = build_model(name, CLASSES)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in (
                *((module.running_mean, -3, 3), (module.running_var, 0.1, 4)),
                *((module.weight.data, 0.2, 2), (module.bias.data, -2, 2)),
            ):
                assert value is not None
                value.copy_(low + (high - low) * torch.rand(value.shape, generator=generator))
    parts = parts_of(model, policy)
    set_modes(parts, "exact")
    return parts


def map_of(parts: Parts, n: int) -> torch.Tensor:
    channels = parts.model.get_submodule("bn2").num_features
    return 3 * torch.randn(n, int(channels), 5, 4, generator=torch.Generator().manual_seed(1)) + 1  # type: ignore[arg-type]


def gradients(parts: Parts, head: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parts.model.zero_grad()
    logits = head(x)
    F.cross_entropy(logits, torch.arange(len(x)) % CLASSES, reduction="sum").backward()
    return logits.detach(), {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("policy", ["classifier+bn", "classifier+bn_stats"])
def test_logits_and_gradients_are_the_plain_heads(
    n: int, memory_format: torch.memory_format, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = trained_parts("test_efficientnet", policy)
    x = map_of(parts, n).contiguous(memory_format=memory_format)
    monkeypatch.setattr(
        pooled_head, "PIECE_BYTES", 2 * 4 * x[:1].numel() + 1
    )  # two images a piece, and one that is left
    quick = pooled_head.pooled_head(parts)
    assert isinstance(quick, PooledHead)
    logits, found = gradients(parts, quick, x)
    wanted_logits, wanted = gradients(parts, parts.head, x)
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5)
    assert list(found) == list(wanted)
    assert set(found) == set(parts.tuned.parameters)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))


def test_a_norm_that_takes_its_batchs_statistics_runs_as_it_is() -> None:
    parts, again = (trained_parts("test_efficientnet", "classifier+bn_stats") for _ in range(2))
    for one in (parts, again):
        set_modes(one, "ema")
    x = map_of(parts, 5)
    assert torch.equal(pooled_head.pooled_head(parts)(x), again.head(x))
    for name, value in parts.model.named_buffers():
        assert torch.equal(value, again.model.get_buffer(name)), name
    assert not torch.equal(parts.model.bn2.running_mean, trained_parts("test_efficientnet").model.bn2.running_mean)  # type: ignore[arg-type, union-attr]


def test_what_is_kept_for_the_backward_pass_is_a_row_per_image() -> None:
    parts, kept = trained_parts("test_efficientnet"), []
    x = map_of(parts, 5)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pooled_head.pooled_head(parts)(x)
    assert max(kept) < x.numel() / 2
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        parts.head(x)
    assert max(kept) == x.numel(), "what the plain head keeps"


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("test_efficientnet", "classifier"),
        ("test_efficientnet", "classifier+bn+conv_head"),
        ("test_efficientnet", "last_block"),
        ("test_efficientnet", "all"),
        ("test_resnet", "classifier+bn"),
        ("test_vit", "classifier+bn"),
    ],
)
def test_other_heads_stay_as_they_are(name: str, policy: str) -> None:
    parts = parts_of(build_model(name, CLASSES), policy)
    assert pooled_head.pooled_head(parts) is parts.head
