"""The default of --res, and of stage one's resolution, for any timm name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from fixres_dist.base.errors import UserError
from fixres_dist.cli import settings
from fixres_dist.config import recipes
from fixres_dist.config.schema import Model
from fixres_dist.models import sizes
from fixres_dist.models.build import build_model
from fixres_dist.models.sizes import Sizes


def test_the_table_is_timms() -> None:
    """Every name of the installed timm that the table has; another version of timm may have more."""
    table, seen = sizes.table(), 0
    for name in timm.list_pretrained():
        if name not in table:
            continue
        seen += 1
        cfg = timm.get_pretrained_cfg(name)
        own, tested = min(cfg.input_size[1:]), min((cfg.test_input_size or (0, 0))[-2:])
        assert (table[name].train, table[name].test) == (own, tested), name
        assert table[name].larger > own or table[name].larger == 0, name
        assert table[name].larger == tested or tested <= own, name
    assert seen > 1500


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet50.a1_in1k", Sizes(224, 288, 288)),  # timm's test size
        ("resnet50", Sizes(224, 288, 288)),  # the default weights'
        ("resnet18.tv_in1k", Sizes(224, 0, 256)),  # the next multiple of 32
        ("test_vit.r160_in1k", Sizes(160, 0, 176)),  # of the patch
        ("mixer_b16_224", Sizes(224, 0, 0)),  # takes one size only
    ],
)
def test_sizes_of_names(name: str, found: Sizes) -> None:
    assert sizes.sizes(name) == sizes.measured(name) == found


def test_a_file_of_ours_says_what_it_was_made_at(tmp_path: Path) -> None:
    state = build_model("test_efficientnet", 3).state_dict()
    for name, header in (("ours", {"res": "192"}), ("theirs", None)):
        save_file(state, tmp_path / f"{name}.safetensors", header)
    model = {"timm_name": "resnet50.a1_in1k"}
    assert sizes.of_weights(Model(weights=str(tmp_path / "ours.safetensors"), **model)) == Sizes(192, 0)
    for weights in (str(tmp_path / "theirs.safetensors"), str(tmp_path / "no.safetensors"), "pretrained", "none"):
        assert sizes.of_weights(Model(weights=weights, **model)) == Sizes(224, 288, 288)


def resolutions(name: str, **sections: dict[str, object]) -> tuple[object, object]:
    recipe = recipes.find(name)
    values = {**recipe.values, **{key: {**recipe.values.get(key, {}), **section} for key, section in sections.items()}}
    found = settings.with_resolutions(values, recipe)
    return found["data"]["res"], found.get("pretrain", {}).get("res")


def test_stage_one_trains_at_the_weights_own_resolution() -> None:
    assert resolutions("resnet50.a1_in1k", pretrain={}) == (288, 224)
    assert resolutions("swinv2_tiny_window8_256.ms_in1k", data={"res": "512"}, pretrain={}) == ("512", 256)
    assert resolutions("inception_v3.tv_in1k", data={"res": "320"}, pretrain={}) == ("320", 299)
    assert resolutions("resnet50.a1_in1k", data={"res": "128"}, pretrain={}) == ("128", 128), "as far as --res permits"
    assert resolutions("resnet50.a1_in1k", data={"res": "320"}, pretrain={"res": "192"}) == ("320", "192")
    assert resolutions("b0", pretrain={}) == ("320", 224), "a recipe's stay"
    with pytest.raises(UserError, match=r"data.res is '3x2'; accepted: a whole number"):
        resolutions("resnet50.a1_in1k", data={"res": "3x2"}, pretrain={})


def test_defaults_load_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = "import sys; from fixres_dist.models import sizes; sizes.sizes('resnet50'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
