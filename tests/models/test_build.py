from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models import policies, sources, weights
from fixres_dist.models.build import build_model, classifiers, preprocessing
from fixres_dist.models.resizing import gmacs, largest_batch

NAME = "test_efficientnet"


def load(model: nn.Module, name: str, file: str, new_classifier: bool = False) -> list[str]:
    stage_one = {"pretrain": {}} if new_classifier else {}
    values = {"model": {"timm_name": name, "weights": file}, **stage_one}
    return weights.load_weights(model, reading.parse(Config, values))


def state(classes: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in build_model(NAME, classes, seed).state_dict().items()}


def test_new_weights_follow_the_seed_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(9)
    first = torch.rand(1)
    torch.manual_seed(9)
    a, b, c = build_model(NAME, 5, 1), build_model(NAME, 5, 1), build_model(NAME, 5, 2)
    assert torch.equal(torch.rand(1), first)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.conv_stem.weight, c.conv_stem.weight)
    assert not a.training


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model.module"])
def test_files_load_in_the_forms_people_have(tmp_path: Path, form: str) -> None:
    wanted = state()
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(wanted, file)
    elif form == "model.module":
        torch.save({"model": {f"module.{k}": v for k, v in wanted.items()}}, file)
    else:
        torch.save({"state_dict": wanted, "epoch": 3} if form == "state_dict" else wanted, file)
    model = build_model(NAME, 5, 7)
    load(model, NAME, str(file))
    assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())


def test_weights_for_a_model_on_the_meta_device_are_checked_and_not_loaded(tmp_path: Path) -> None:
    """As at submission: a file of other classes is refused, timm's weights without a download, and what fits is accepted."""
    save_file(state(classes=10), tmp_path / "w.safetensors")
    with torch.device("meta"):
        model, resnet = build_model(NAME, 10), build_model("resnet18.a1_in1k", 10)
    load(model, NAME, str(tmp_path / "w.safetensors"))
    assert all(value.is_meta for value in model.state_dict().values())
    with pytest.raises(UserError, match=r"resnet18.a1_in1k classifies 1000 classes, the data set has 10"):
        load(resnet, "resnet18.a1_in1k", "pretrained")
    load(resnet, "resnet18.a1_in1k", "pretrained", True)


def test_weights_without_a_classifier_fit_where_stage_one_trains_a_new_one() -> None:
    """A backbone's: DINOv2, CLIP, MAE, or a file whose classifier was taken off."""
    given, model = state(seed=2), build_model(NAME, 5, 7)
    given = {name: value for name, value in given.items() if not name.startswith("classifier.")}
    own = model.classifier.weight.clone()
    with pytest.raises(
        UserError, match=r"a file has no classifier, the data set has 5 classes: .*--preset own_classes"
    ):
        weights.fill(model, given, "a file")
    weights.fill(model, given, "a file", new_classifier=True)
    assert torch.equal(model.classifier.weight, own)
    assert torch.equal(model.conv_stem.weight, given["conv_stem.weight"])
    name = "vit_small_patch14_dinov2.lvd142m"
    with torch.device("meta"):
        backbone = build_model(name, 5)
    with pytest.raises(UserError, match="has no classifier"):
        load(backbone, name, "pretrained")
    load(backbone, name, "pretrained", True)


def test_weights_of_two_classifiers_fit_and_other_classes_take_both_away() -> None:
    name = "deit_tiny_distilled_patch16_224"
    given, model, same = build_model(name, 7, 2).state_dict(), build_model(name, 5, 3), build_model(name, 7, 4)
    heads = {n: v.clone() for n, v in model.state_dict().items() if n.startswith("head")}
    weights.fill(model, given, "a file", new_classifier=True)
    assert len(heads) == 4
    assert all(torch.equal(model.state_dict()[n], heads.get(n, v)) for n, v in given.items())
    weights.fill(same, given, "a file")
    assert all(torch.equal(same.state_dict()[n], v) for n, v in given.items())


def test_a_classifier_of_the_tokens_counts_as_one() -> None:
    """VOLO adds the best token's logits in tests; get_classifier does not name their layer, pretrained_cfg does."""
    with torch.device("meta"):
        given, model = build_model("volo_d1_224", 7).state_dict(), build_model("volo_d1_224", 5)
    assert classifiers(model) == ("head", "aux_head")
    weights.fill(model, given, "a file", new_classifier=True)
    assert {"head.weight", "aux_head.weight"} <= set(policies.select(model, "classifier+bn").parameters)


def test_a_classifier_of_as_many_classes_and_other_inputs_is_refused(tmp_path: Path) -> None:
    """Even where stage one trains a new one: these are another model's weights."""
    other = state(classes=5)
    other["classifier.weight"] = other["classifier.weight"][:, :7].clone()
    with pytest.raises(UserError, match="does not fit EfficientNet"):
        weights.fill(build_model(NAME, 5), other, "a file", new_classifier=True)


def test_partial_coverage_is_refused_and_leaves_the_model_alone(tmp_path: Path) -> None:
    broken = state()
    del broken["bn2.weight"]
    broken["conv_head.weight"] = broken["conv_head.weight"][:3]
    broken["extra"] = torch.zeros(1)
    save_file(broken, tmp_path / "w.safetensors")
    model = build_model(NAME, 5, 7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load(model, NAME, str(tmp_path / "w.safetensors"))
    for text in ("bn2.weight is missing", "conv_head.weight is [3, 64, 1, 1]", "extra is not in the model"):
        assert text in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_number_of_classes_needs_stage_one(tmp_path: Path) -> None:
    save_file(state(classes=10), tmp_path / "w.safetensors")
    model = build_model(NAME, 5, 7)
    own = model.classifier.weight.clone()
    with pytest.raises(UserError, match="classifies 10 classes, the data set has 5"):
        load(model, NAME, str(tmp_path / "w.safetensors"))
    load(model, NAME, str(tmp_path / "w.safetensors"), True)
    assert torch.equal(model.classifier.weight, own)
    assert torch.equal(model.conv_stem.weight, state(classes=10)["conv_stem.weight"])


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04torn"])
def test_torn_files_are_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path / name)):
        weights.read_state(tmp_path / name)


def test_a_pickle_that_holds_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"model": build_model(NAME, 5)}, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"holds a pickled model \(class timm\.models\.efficientnet\.EfficientNet\) and is not opened"
    ):
        weights.read_state(tmp_path / "w.pth")


def test_names_timm_cannot_build_are_refused() -> None:
    with pytest.raises(UserError, match="timm cannot build"):
        build_model("no_such_model", 5)


@pytest.mark.parametrize("ask", [lambda name: build_model(name, 5), preprocessing, sources.hub_state])
def test_a_tag_that_timm_does_not_know_is_refused_with_the_nearest(ask: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"unknown weights tag of resnet50 'a1_in1'. Did you mean 'a1_in1k'\?"):
        ask("resnet50.a1_in1")


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "tf_efficientnet_b8.ap_in1k"])
def test_preprocessing_is_timms(name: str) -> None:
    spec, cfg = preprocessing(name), timm.get_pretrained_cfg(name)
    assert (spec.mean, spec.std, spec.crop_pct) == (cfg.mean, cfg.std, cfg.crop_pct)
    assert (spec.interpolation, spec.train_res) == (cfg.interpolation, cfg.input_size[-1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalising_keeps_the_layout_and_the_bits(layout: torch.memory_format) -> None:
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8).contiguous(memory_format=layout)
    spec = preprocessing("tf_efficientnet_b0")
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    found = spec.normalised(images)
    assert torch.equal(found, (images.float() - mean) / std)
    assert found.is_contiguous(memory_format=layout)
    assert spec.normalised(images[:0]).shape == (0, 3, 5, 7)


@pytest.mark.parametrize(
    ("name", "res", "elements", "most"),
    [
        # The expanded map before the first strided depthwise convolution: 6 x its block's input channels, SAME-padded by one.
        ("tf_efficientnet_l2", 600, 432 * 301**2, 54),
        ("tf_efficientnet_l2", 800, 432 * 401**2, 30),
        ("tf_efficientnet_b8", 800, 192 * 401**2, 69),
        ("tf_efficientnet_b7", 632, 192 * 317**2, 111),
        ("resnet50", 224, 64 * 112**2, 2674),
        ("vit_base_patch16_224", 224, 4 * 768 * 197, 3548),  # fused attention never holds its [n, heads, 197, 197]
    ],
)
def test_the_largest_batch_keeps_every_tensor_below_two_to_the_31(
    name: str, res: int, elements: int, most: int
) -> None:
    with torch.device("meta"):
        model = build_model(name, 1000)
    assert largest_batch(model, res) == most
    assert most * elements < 2**31 <= (most + 1) * elements


def test_large_weights_do_not_bound_the_batch() -> None:
    """A weight-standardised convolution returns tensors as large as its weights, however few the pictures."""
    with torch.device("meta"):
        model = build_model("resnetv2_50x3_bit", 1000)
    assert largest_batch(model, 32) == (2**31 - 1) // (3 * 64 * 18**2)  # the stem, padded for the pooling


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"input_size": (1, 28, 28)}, "takes pictures of 1 channels; accepted: models of RGB pictures"),
        ({"interpolation": "nearest"}, "unknown interpolation in timm's settings of NAME 'nearest'"),
        ({"crop_mode": "corner"}, "unknown crop_mode in timm's settings of NAME 'corner'"),
    ],
)
def test_pictures_that_are_not_made_here_are_refused(tmp_path: Path, changed: dict[str, object], says: str) -> None:
    cfg = {"architecture": NAME, "num_classes": 5, "pretrained_cfg": {"input_size": (3, 64, 64), **changed}}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError) as caught:
        preprocessing(f"local-dir:{tmp_path}")
    assert says.replace("NAME", f"local-dir:{tmp_path}") in str(caught.value)


def test_multiply_adds_are_those_of_one_forward_pass() -> None:
    """The plan's table has 0.39 G for b0 at 224 px; a try at the size before it was counted too."""
    assert gmacs(build_model("tf_efficientnet_b0", 1000), 224) == pytest.approx(0.386, abs=0.001)
