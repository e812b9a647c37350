"""Some of timm's models as `benchmarks/census.py` examines them: on real tensors, at their own size and at the default of --res."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("census", Path(__file__).parents[2] / "benchmarks" / "census.py")
assert spec is not None
assert spec.loader is not None
census = importlib.util.module_from_spec(spec)
spec.loader.exec_module(census)

# Under 10 M parameters, of the kinds that were refused or crashed once: rotary embeddings, BatchNorms behind a pool,
# blocks that can't be traced, two classifiers, tables of one size, no norm.
NAMES = """
crossvit_9_240 deit_tiny_distilled_patch16_224 efficientvim_m1_dist eva02_tiny_patch14_224 levit_128s mobilevitv2_050
pvt_v2_b0 rexnet_100 test_coatnet test_efficientnet_evos test_mambaout test_nfnet test_vit2 test_vit_relpos
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_sample_of_the_census_is_supported(name: str) -> None:
    row = census.examine(name, real_m=10)
    assert (row["status"], row.get("real")) == ("supported", True), row
