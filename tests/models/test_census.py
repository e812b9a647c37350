"""Sixty of timm's models as `benchmarks/census.py` examines them: on real tensors, at their own size and at the default of --res."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("census", Path(__file__).parents[2] / "benchmarks" / "census.py")
assert spec is not None
assert spec.loader is not None
census = importlib.util.module_from_spec(spec)
spec.loader.exec_module(census)

# Under 10 M parameters: one of every family, drawn by a seed, and the kinds that were refused or crashed once: rotary
# embeddings, BatchNorms behind a pool, blocks that can't be traced, two classifiers, tables of one size, no norm.
NAMES = """
coat_lite_tiny convit_tiny convnext_atto_rms cpubone_b0_bfrobust crossvit_9_240 crossvit_9_dagger_240
cs3darknet_focus_m cspnext_s deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 densenet121 dla60x_c dpn48b
edgenext_small efficientformerv2_s0 efficientvim_m1_dist efficientvit_b0 efficientvit_m1 efficientvit_m2
ese_vovnet19b_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_s12 ghostnet_100 gmlp_ti16_224 hgnetv2_b1 iformer_t
inception_next_atto lcnetv2_base levit_128 levit_128s mambaout_femto maxvit_rmlp_pico_rw_256 mobilenetv2_035
mobilenetv4_conv_small_050 mobilevitv2_050 mobilevitv2_075 nf_regnet_b1 pit_ti_224 pvt_v2_b0 regnetx_002
regnety_004 repghostnet_130 repvit_m0_9 repvit_m1_1 resnest14d rexnet_100 rexnetr_150 shvit_s1 starnet_s2
swiftformer_s test_coatnet test_efficientnet_evos test_mambaout test_maxvit test_nfnet test_vit2 test_vit_relpos
tiny_vit_5m_224 visformer_tiny
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_sample_of_the_census_is_supported(name: str) -> None:
    row = census.examine(name, real_m=10)
    assert (row["status"], row.get("real")) == ("supported", True), row
