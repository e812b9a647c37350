from __future__ import annotations

import copy

import pytest
import torch
from support.networks import lived_in

from fixres_dist.models import cpu_layers
from fixres_dist.models.build import build_model


@pytest.mark.parametrize(
    ("name", "count"),
    [("tf_efficientnet_b0", 16 + 5), ("test_efficientnet", 2), ("efficientnet_b0", 16), ("resnet18", 0)],
)
def test_the_same_function_at_even_and_odd_sizes(name: str, count: int) -> None:
    """tf_ models pad as TensorFlow does: a map of 97 pixels is padded evenly, one of 96 is not."""
    torch.manual_seed(0)
    model = lived_in(build_model(name, 5)).eval()
    changed = copy.deepcopy(model)
    assert cpu_layers.use(changed) == count
    for height, width in ((96, 96), (97, 97), (96, 97), (130, 66)):
        images = torch.randn(2, 3, height, width)
        with torch.no_grad():
            a, b = model.forward_features(images), changed.forward_features(images)
        assert float((a - b).abs().max() / a.abs().max()) < 1e-5
