"""What a session gives a device to do."""

from __future__ import annotations

import pytest
import torch

from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.precision import Arithmetic
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, tell


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda", {224: 200, 600: 54, 800: 30}), ("cpu", {224: 200, 800: 200})]
)
def test_a_gpu_gets_no_more_pictures_than_its_kernels_can_index(device: str, expected: dict[int, int]) -> None:
    """A sweep shows sizes that the run's batch was not made for."""
    config = reading.parse(Config, reading.overrides(["run.batch_per_device=200"]))
    with torch.device("meta"):
        model = build_model("tf_efficientnet_l2", 5)
    ranks, spec = Ranks(0, 1, 1, ("here",), torch.device(device)), preprocessing("tf_efficientnet_l2")
    arithmetic = Arithmetic("fp32", torch.device("cpu"))
    session = Session(config, ranks, model, spec, {}, (), {}, arithmetic, torch.contiguous_format, tell)
    assert {res: session.batch_per_device(res) for res in expected} == expected
