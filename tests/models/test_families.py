"""Every policy on every family of models: the tensors that train and change, and refusals with their reasons."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.commands import run, tiny
from support.networks import BN_BUFFERS, one_step

from fixres_dist.base.errors import UserError
from fixres_dist.models import policies, weights
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import Parts, parts_of
from fixres_dist.runs.rundir import RunDir

POLICIES = ("classifier", "classifier+bn_stats", "classifier+bn", "classifier+bn+conv_head", "last_block")
# Per family: classifier, last norm, the convolution before it, and the last block with all that follows it; an empty
# string is a refusal. `*`: the last norm keeps no statistics.
SMALL = {
    "efficientnet_lite0": ("classifier", "bn2", "conv_head", "blocks.6 conv_head bn2 classifier"),
    "tf_efficientnetv2_b0": ("classifier", "bn2", "conv_head", "blocks.5.7 conv_head bn2 classifier"),
    "mobilenetv3_small_050": ("classifier", "blocks.5.0.bn1", "blocks.5.0.conv", "blocks.5 conv_head classifier"),
    "resnet10t": ("fc", "layer4.0.downsample.2", "layer4.0.downsample.1", "layer4 fc"),
    "regnetx_002": ("head.fc", "s4.b7.conv3.bn", "s4.b7.conv3.conv", "s4.b7 head"),
    "densenet121": ("classifier", "features.norm5", "", "features.denseblock4.denselayer16 features.norm5 classifier"),
    "convnext_atto": ("head.fc", "head.norm*", "stages.3.blocks.1.mlp.fc2", "stages.3.blocks.1 head"),
    "test_vit": ("head", "norm*", "", "blocks.5 norm head"),
}
CELL = "cell_11.comb_iter_4_left"
LARGE = {
    "efficientnet_b0_gn": ("classifier", "bn2*", "conv_head", "blocks.6 conv_head bn2 classifier"),
    "resnext26ts": ("head.fc", "stages.3.1.conv3_1x1.bn", "stages.3.1.conv3_1x1.conv", "stages.3.1 head"),
    "resnext101_32x8d": ("fc", "layer4.2.bn3", "layer4.2.conv3", "layer4.2 fc"),
    "resnext101_32x48d": ("fc", "layer4.2.bn3", "layer4.2.conv3", "layer4.2 fc"),
    "pnasnet5large": (
        *("last_linear", f"{CELL}.bn_sep_2", f"{CELL}.separable_2.pointwise_conv2d"),
        "cell_11 last_linear",
    ),
    "vit_tiny_patch16_224": ("head", "norm*", "", "blocks.11 norm head"),
    "swin_tiny_patch4_window7_224": ("head.fc", "norm*", "", "layers.3.blocks.1 norm head"),
    "resnetv2_50x1_bit": ("head.fc", "norm*", "stages.3.blocks.2.conv3", "stages.3.blocks.2 norm head"),
    "maxvit_tiny_tf_224": ("head.fc", "head.norm*", "", "stages.3 head"),
    "nfnet_f0": ("head.fc", "", "", "stages.3.2 final_conv head"),
    "vgg11_bn": ("head.fc", "features.26", "features.25", ""),
    "deit_tiny_distilled_patch16_224": ("head head_dist", "norm*", "", "blocks.11 norm head head_dist"),
    "pit_ti_distilled_224": ("head head_dist", "norm*", "", ""),
    "crossvit_tiny_240": ("head.0 head.1", "norm.1*", "", "blocks.2 norm head"),
}


def meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(name, 5)


def expected(row: tuple[str, str, str, str], policy: str) -> tuple[list[str], str] | None:
    """(tuned modules, BN whose statistics move), or None for a refusal."""
    classifier, norm, conv, block = row
    bn, heads = "" if norm.endswith("*") else norm, classifier.split()
    found = {
        "classifier": (heads, ""),
        "classifier+bn_stats": ([bn, *heads], bn) if bn else None,
        "classifier+bn": ([norm.rstrip("*"), *heads], bn) if norm else None,
        "classifier+bn+conv_head": ([conv, norm.rstrip("*"), *heads], bn) if conv else None,
        "last_block": (block.split(), bn) if block else None,
    }
    return found[policy]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_tuned_modules_by_structure(name: str, policy: str) -> None:
    model, wanted = meta(name), expected({**SMALL, **LARGE}[name], policy)
    if wanted is None:
        with pytest.raises(UserError, match=rf"{type(model).__name__}.*Next: tune.policy=classifier"):
            policies.select(model, policy)
        return
    tuned = policies.select(model, policy)
    assert (list(tuned.modules), "".join(tuned.last_bns)) == wanted
    frozen = wanted[1] if policy == "classifier+bn_stats" else None
    assert set(tuned.parameters) == {
        f"{m}.{n}" for m in wanted[0] if m != frozen for n, _ in model.get_submodule(m).named_parameters()
    }
    assert set(tuned.buffers) == ({f"{wanted[1]}.{b}" for b in BN_BUFFERS} if wanted[1] else set())


@pytest.mark.parametrize(
    ("name", "policy"), [(name, policy) for name, row in SMALL.items() for policy in POLICIES if expected(row, policy)]
)
def test_exactly_those_change_in_a_step(name: str, policy: str) -> None:
    model = build_model(name, 5)
    for p in model.parameters():  # scales that start at zero would stop the gradient
        p.data += 0.1 * (p.dim() == 1)
    before = copy.deepcopy(model.state_dict())
    parts = parts_of(model, policy)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parts.tuned.parameters)
    one_step(parts, "exact")
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in parts.tuned.tensors if not n.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("name", "first", "count", "last"),
    [
        ("test_vit", "blocks.0.attn", 6, "head"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", 12, "head.fc"),
        ("coatnet_pico_rw_224", "stages.2.blocks.0.attn", 7, "head.fc"),
        ("vit_base_patch16_siglip_224", "blocks.0.attn", 12, "head"),
        ("deit_tiny_distilled_patch16_224", "blocks.0.attn", 12, "head_dist"),
    ],
)
def test_policy_attention_finds_the_attention_layers_of_all_blocks(
    name: str, first: str, count: int, last: str
) -> None:
    modules = policies.select(meta(name), "attention").modules
    assert (modules[0], modules[-1]) == (first, last)
    assert sum("attn" in module for module in modules) == count


@pytest.mark.parametrize("recompute", [False, True])
def test_policy_attention_trains_attention_and_classifier_and_nothing_else(recompute: bool) -> None:
    """As torch trains the whole model with the other tensors frozen, dropout and stochastic depth off."""
    model = build_model("test_vit", 5)
    for p in model.parameters():
        p.data += 0.1 * (p.dim() == 1)
    plain, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    parts = parts_of(model, "attention", recompute)
    assert parts.trunk is None
    one_step(parts, "exact")
    assert not any(module.training for module in model.modules())
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if ".attn." in n or n.startswith("head.")} == set(parts.tuned.tensors)
    for n, p in plain.named_parameters():
        p.requires_grad_(n in changed)
    one_step(Parts(plain, parts.tuned, None, plain), "exact")
    assert all(torch.equal(v, plain.state_dict()[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_b0", "resnet50_clip", "test_convnext"])
def test_policy_attention_is_refused_where_no_block_has_it(name: str) -> None:
    with pytest.raises(UserError, match=r"has none. Accepted: classifier, .*last_block, all. Next: tune.policy="):
        policies.select(meta(name), "attention")


@pytest.mark.parametrize("policy", ["classifier+bn", "last_block"])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "densenet121", "convnext_atto", "test_vit"])
def test_trunk_and_head_are_the_model_at_another_resolution(name: str, policy: str) -> None:
    model = build_model(name, 5)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        logits = model(images)
        parts = parts_of(model, policy)
        assert parts.trunk is not None
        torch.testing.assert_close(parts.head(*parts.trunk(images)), logits)


@pytest.mark.parametrize(
    ("name", "policy", "words"),
    [
        ("nfnet_f0", "classifier+bn", "has none. Next: tune.policy=classifier"),
        ("convnext_atto", "classifier+bn_stats", r"head.norm \(LayerNorm2d\), keeps none"),
        ("densenet121", "classifier+bn+conv_head", r"denselayer16.conv2 \(Conv2d\) stands before features.norm5"),
        ("test_vit", "classifier+bn+conv_head", r"mlp.fc2 \(Linear\) stands before norm"),
        ("eva02_tiny_patch14_224", "last_block", "rotary embedding"),
    ],
)
def test_what_no_policy_can_tune_is_refused_with_the_reason(name: str, policy: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parts_of(meta(name), policy)


def test_the_widest_resnext_is_built_and_not_its_namesake() -> None:
    """timm has the weights' entry of 32x48d and no builder; its old name for it builds 32x8d."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model("resnext101_32x48d", 1000).parameters())
    assert abs(count / 1e6 - 829) < 1  # README of the original repository
    assert preprocessing("resnext101_32x48d.fb_wsl_ig1b_ft_in1k").mean == (0.485, 0.456, 0.406)
    assert timm.is_model_pretrained("resnext101_32x48d.fb_wsl_ig1b_ft_in1k")


def test_vit_at_another_resolution_is_timms_own() -> None:
    """One set of weights: resampled in the forward pass here, when loading in timm."""
    model = build_model("test_vit", 5, seed=3)
    torch.nn.init.normal_(model.pos_embed)
    other = timm.create_model("test_vit", num_classes=5, img_size=96).eval()
    state = weights.resampled(other, model.state_dict())
    assert state["pos_embed"].shape == (1, 37, 64)
    weights.fill(other, state, "resampled")
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), other(images))


def test_a_vit_is_fixed_and_swept_at_sizes_not_its_own(tmp_path: Path, photos: Path) -> None:
    arguments = tiny(tmp_path / "runs", "vit", photos, 2, "--res", "96", "tune.policy=classifier+bn")
    arguments[2] = "test_vit"
    bad = run(*arguments, "--res", "100")
    assert bad.returncode == 2
    assert "Next: --res 96" in bad.stderr
    assert not (tmp_path / "runs" / "vit" / "config.yaml").exists()
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training norm, head (" in done.stdout
    assert "no layer whose statistics are measured" in done.stdout
    start = build_model("test_vit", 3, seed=0).state_dict()
    fixed = load_file(RunDir(tmp_path / "runs" / "vit").root / "export" / "model.safetensors")
    assert {n for n, v in fixed.items() if not torch.equal(v, start[n])} == {
        *("norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    swept = run("sweep", "--run", tmp_path / "runs" / "vit", "--res", "64,128")
    assert swept.returncode == 0, swept.stderr
