from __future__ import annotations

import pytest
import torch
from support.networks import lived_in
from torch import nn

from fixres_dist.models import folding
from fixres_dist.models.build import build_model
from fixres_dist.models.parts import parts_of


# Every BN but the last one follows a convolution; in a DenseNet only the stem's and each dense layer's second one do.
@pytest.mark.parametrize(
    ("name", "count"), [("test_efficientnet", 12), ("tf_efficientnet_b0", 48), ("resnet18", 19), ("densenet121", 59)]
)
def test_folding_is_exact_and_leaves_the_model_alone(name: str, count: int, device: torch.device) -> None:
    model = lived_in(build_model(name, 5)).to(device)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = parts_of(model, "classifier+bn")
    assert parts.trunk is not None
    trunk, folded = folding.folded(parts.trunk, 64)
    assert folded == count
    images = torch.randn(2, 3, 96, 96, device=device)
    with torch.no_grad():
        for a, b in zip(parts.trunk(images), trunk(images), strict=True):
            assert float((a - b).abs().max() / a.abs().max()) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_shared_convolution_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.bn(self.conv(self.conv(x))),)

    trunk = lived_in(Shared()).eval()
    assert folding.folded(trunk, 32) == (trunk, 0)


def test_an_output_used_elsewhere_fails_the_check_and_nothing_is_folded() -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            y = self.conv(x)
            return (self.bn(y) + y,)

    trunk = lived_in(Leaks()).eval()
    assert folding.folded(trunk, 32) == (trunk, 0)
