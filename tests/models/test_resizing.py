"""Sizes that a model takes as it is, that timm builds it for, and that it cannot have."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.commands import run, tiny
from timm.layers import DropPath

from fixres_dist.base.errors import UserError
from fixres_dist.models import weights
from fixres_dist.models.build import build_model, own_size
from fixres_dist.models.parts import parts_of
from fixres_dist.models.resizing import check_resolutions, for_size
from fixres_dist.runs.rundir import RunDir


def meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(name, 5)


@pytest.mark.parametrize(
    ("name", "res", "words"),
    [
        ("test_vit", 100, "patches are 16 px. Accepted near it: 96 and 112. Next: --res 96"),
        ("vit_tiny_patch16_224", 391, "384 and 400. Next: --res 384"),
        ("coatnet_pico_rw_224", 250, "cannot change freely. Accepted near it: 224 and 256. Next: --res 256"),
        ("pit_ti_224", 256, "cannot change freely. Accepted near it: 224. Next: --res 224"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_two_that_do(name: str, res: int, words: str) -> None:
    model = meta(name)
    with pytest.raises(UserError, match=words):
        check_resolutions(model, [own_size(model), res])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tf_efficientnet_b0", [33, 420, 472]),
        ("swin_tiny_patch4_window7_224", [224, 288]),
        ("maxvit_tiny_tf_224", [256, 384]),
        ("beit_base_patch16_224", [256]),
        ("eva02_tiny_patch14_224", [252]),
        ("mvitv2_tiny", [256]),
    ],
)
def test_sizes_that_fit_are_accepted(name: str, sizes: list[int]) -> None:
    check_resolutions(meta(name), sizes)


@pytest.mark.parametrize(("name", "res"), [("test_coatnet", 192), ("test_maxvit", 192), ("test_vit_relpos", 208)])
def test_a_model_for_another_size_is_timms_own(name: str, res: int) -> None:
    """Its weights are those that timm makes of them when it loads them for that size, and both parts are the model."""
    model = build_model(name, 5, seed=3)
    found = for_size(model, res)
    source = {"state_dict": dict(model.state_dict()), "num_classes": 5}
    expected = timm.create_model(name, pretrained=True, num_classes=5, img_size=res, pretrained_cfg_overlay=source)
    assert found is not model
    assert not found.training
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in found.state_dict().items())
    images, parts = torch.randn(2, 3, res, res), parts_of(found, "classifier+bn")
    with torch.no_grad():
        assert torch.equal(parts.head(*parts.trunk(images)), found(images))
    given = build_model(name, 5, seed=4)
    weights.fill(for_size(given, res), weights.fitted(found, model.state_dict()), "weights of another size")


def test_stochastic_depth_goes_with_a_model_to_another_size() -> None:
    for rate in (0.0, 0.3):
        model = build_model("test_coatnet", 5, drop_path=rate)
        for sized in (model, for_size(model, 192), for_size(for_size(model, 192), 224)):
            assert max([m.drop_prob for m in sized.modules() if isinstance(m, DropPath)], default=0.0) == pytest.approx(
                rate
            )


def test_what_takes_any_size_is_left_alone() -> None:
    model = build_model("test_vit", 5)
    assert for_size(model, 96) is model


def test_mvit_is_built_for_a_size_whose_tables_it_would_read_beyond() -> None:
    """The meta device accepts it as it is; real tensors raise an IndexError."""
    assert own_size(for_size(meta("mvitv2_tiny"), 256)) == 256


def test_both_stages_sweep_and_export_at_sizes_of_their_own(tmp_path: Path, photos: Path) -> None:
    name, stage_one = "coatnet", ("pretrain.epochs=1", "pretrain.res=96", "pretrain.global_batch=12")
    arguments = tiny(tmp_path / "runs", name, photos, 1, "tune.epochs=1", "tune.policy=classifier+bn", *stage_one)
    arguments[2], arguments[4] = "test_coatnet", "128"
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunDir(tmp_path / "runs" / name)
    table = "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table"
    before, after = load_file(folder.pretrained), load_file(folder.root / "export" / "model.safetensors")
    assert before[table].shape != after[table].shape
    swept = run("sweep", "--run", folder.root, "--res", "96,128", "--activations", "--out", tmp_path)
    assert swept.returncode == 0, swept.stderr
    exported = run("export", "--run", folder.root, "--format", "safetensors", "--out", tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert torch.equal(model.state_dict()[table], after[table])


def test_an_own_size_that_patches_do_not_fill_is_refused_and_cut_at_whole_ones() -> None:
    """SigLIP so400m has 384 px and patches of 14; a model of any size raises there, in the job."""
    with torch.device("meta"):
        model = timm.create_model("test_vit", num_classes=5, img_size=150, dynamic_img_size=True)
    assert own_size(model) == 144
    assert parts_of(model, "classifier").trunk is not None
    with pytest.raises(UserError, match=r"its patches are 16 px\. Accepted near it: 144 and 160"):
        check_resolutions(model, [150])
