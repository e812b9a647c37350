"""Both backends against PIL decode and torchvision's transforms, and against each other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import pictures as p

from fixres_dist.config.schema import Data
from fixres_dist.data import backends, dali, dataset, geometry, pixels
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.models.build import preprocessing

RULES = ("fixefficientnet", "fixres", "fixres_height", "timm")
# 108 photographs; every rule and transform at 224, fewer at the larger sizes, where a picture takes PIL 30 ms.
COMBINATIONS = [
    *((224, rule, transform) for rule in RULES for transform in ("test", "test_aug")),
    (224, "fixres", "random_resized_crop"),
    (320, "fixefficientnet", "random_resized_crop"),
    (320, "timm", "test"),
    (475, "fixres_height", "test_aug"),
    (600, "fixefficientnet", "test"),
    (600, "fixres", "random_resized_crop"),
    (672, "timm", "test_aug"),
    (800, "fixefficientnet", "test"),
]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return dataset.load(p.write_folder(tmp_path_factory.mktemp("parity"), 108), "train")


@pytest.mark.parametrize(("res", "rule", "transform"), COMBINATIONS)
def test_same_pictures_as_pil_and_torchvision(
    samples: Index, res: int, rule: str, transform: str, device: torch.device
) -> None:
    """On a GPU the decoder is another one than PIL's, whose pixels are its own (docs/data.md)."""
    pictures = p.pictures_of(transform, res, rule, 5, 0.9)
    first = 12 * COMBINATIONS.index((res, rule, transform)) % 108
    count = 12 if res < 400 else 6
    request = make_request(samples, pictures, np.arange(first, first + count) % 108, 1)
    want = p.reference(samples, request, pictures)
    if device.type == "cuda":
        on_gpu = p.dali_batches(samples, [request], pictures, device_id=0)
        assert np.abs(p.pixels(on_gpu) - want).mean() < 1
        return
    for name, batches, mean, largest in (  # in grey levels of 255
        ("torch", p.torch_batches(samples, [request], pictures), 0, 0),
        ("dali", p.dali_batches(samples, [request], pictures), 0.25, 6),
        ("dali as on a GPU", p.dali_batches(samples, [request], pictures, two_passes=True), 0.06, 6),
    ):
        difference = np.abs(p.pixels(batches) - want)
        assert difference.mean() <= mean, name
        assert difference.max() <= largest, name


TIMM = [  # (name, px, whether timm tests its weights there, the setting of timm's that this name is here for)
    ("convnext_tiny.fb_in22k_ft_in1k_384", 384, False, {"crop_mode": "squash", "crop_pct": 1.0}),
    ("convnextv2_nano.fcmae_ft_in22k_in1k", 288, True, {"crop_mode": "center", "crop_pct": 1.0}),
    (
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
        336,
        False,
        {"crop_mode": "center", "mean": (0.48145466, 0.4578275, 0.40821073)},
    ),
    ("deepseek_vit_412m.deepseek_v4_flash_vision_exp", 392, False, {"crop_mode": "border", "mean": (0.5, 0.5, 0.5)}),
    ("volo_d4_448.sail_in1k", 448, False, {"crop_mode": "center", "crop_pct": 1.15}),
    ("resnet50.a1_in1k", 224, False, {"crop_pct": 0.95}),
    ("resnet50.a1_in1k", 288, True, {"crop_pct": 1.0}),
    ("fasternet_t0.in1k", 224, True, {"crop_pct": 0.9}),
    ("resnet18.tv_in1k", 224, False, {"interpolation": "bilinear", "crop_pct": 0.875}),
]


@pytest.mark.parametrize(("name", "res", "tested", "wanted"), TIMM)
def test_the_rule_timm_is_timms_evaluation(
    samples: Index, name: str, res: int, tested: bool, wanted: dict[str, Any]
) -> None:
    """Photographs of nine shapes as `timm.data.create_transform` evaluates the weights, before it normalises."""
    cfg = timm.get_pretrained_cfg(name).to_dict()
    theirs = timm.data.resolve_data_config({}, pretrained_cfg=cfg, use_test_size=tested)
    assert theirs["input_size"] == (3, res, res)
    assert {key: theirs[key] for key in wanted} == wanted
    transform = timm.data.create_transform(**theirs, is_training=False, normalize=False)
    spec = preprocessing(name)
    assert (spec.mean, spec.std) == (theirs["mean"], theirs["std"])
    pictures = Pictures("test", res, spec.resize(Data(resize_rule="timm"), res), 0)
    request = make_request(samples, pictures, np.arange(len(p.SIZES)), 0)
    want = []
    for sample in request.samples:
        with Image.open(io.BytesIO(samples.read(sample).tobytes())) as image:
            want.append(transform(image.convert("RGB")).permute(1, 2, 0).numpy().astype(np.int16))
    for batches, mean, largest in (
        (p.torch_batches(samples, [request], pictures), 0, 0),
        (p.dali_batches(samples, [request], pictures), 0.25, 6),
        (p.dali_batches(samples, [request], pictures, two_passes=True), 0.06, 6),
    ):
        difference = np.abs(p.pixels(batches) - np.stack(want))
        assert difference.mean() <= mean
        assert difference.max() <= largest


@pytest.mark.parametrize("side", ["both", "longer"])
@pytest.mark.parametrize("transform", ["test_flip", "test_aug", "random_resized_crop"])
def test_training_pictures_of_squashed_and_bordered_photographs(samples: Index, side: str, transform: str) -> None:
    resize = geometry.Resize(112, side, "lanczos", (127, 3, 250))
    pictures = Pictures(transform, 96, resize, 3)
    request = make_request(samples, pictures, np.arange(18), 2)
    want = p.reference(samples, request, pictures)
    assert np.abs(p.pixels(p.torch_batches(samples, [request], pictures)) - want).max() == 0
    assert np.abs(p.pixels(p.dali_batches(samples, [request], pictures, two_passes=True)) - want).mean() < 0.1


def test_dali_leaves_interpolations_that_it_has_not_to_torch() -> None:
    assert {*dali.INTERPOLATION, *backends.NOT_IN_DALI} == set(geometry.INTERPOLATIONS) == set(pixels.FILTERS)
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert backends.choose("dali", device, "hamming")[0] == "torch"
        assert backends.choose("dali", device, "lanczos")[0] == "dali"
    assert backends.choose("auto", torch.device("cuda"), "box") == ("torch", "DALI has no box filter")


@pytest.mark.parametrize("transform", ["test_aug", "random_resized_crop"])
def test_flips_and_shifts_are_the_same_in_both_backends(samples: Index, transform: str) -> None:
    """A picture that is mirrored or a pixel off would differ far more: these photographs change from pixel to pixel."""
    pictures = p.pictures_of(transform, 96, "fixres")
    request = make_request(samples, pictures, np.arange(108), 3)
    assert 30 < sum(view.flip for view in request.views) < 78
    ours, theirs = (p.pixels(f(samples, [request], pictures)) for f in (p.torch_batches, p.dali_batches))
    per_picture = np.abs(ours - theirs).mean((1, 2, 3))
    assert per_picture.max() < 0.6
    mirrored = np.abs(ours - theirs[:, :, ::-1]).mean((1, 2, 3))
    assert mirrored.min() > 3, "the photographs must differ from their mirror image, or this shows nothing"


def test_dalis_jitter_is_the_torch_backends() -> None:
    """Any strength and layout, picture by picture or, as on a GPU, a batch at once; test_pixels.py compares it with PIL's."""
    images = torch.randint(0, 256, (40, 3, 20, 30), dtype=torch.uint8)
    images[0], images[1] = 0, 255
    factors = torch.rand(40, 3) * 0.6 + 0.7
    want = images.contiguous(memory_format=torch.channels_last)
    for image, row in zip(want, factors.tolist(), strict=True):
        pixels.jitter(image, tuple(row))
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        for made in (dali.jitter(given, factors), dali.jittered(given, factors)):
            assert torch.equal(made, want)
            assert made.is_contiguous(memory_format=torch.channels_last)


@p.both_backends
def test_batches_of_any_size_and_none(samples: Index, backend: p.Backend) -> None:
    pictures = p.pictures_of("test", 64, "fixres")
    parts = [[0, 1, 2], [], [3], [], [], [4, 5, 6, 7], []]
    batches = backend(
        samples, [make_request(samples, pictures, np.array(part, np.int64), 0) for part in parts], pictures
    )
    assert [batch.samples.tolist() for batch in batches] == parts
    assert [tuple(batch.images.shape) for batch in batches] == [(len(part), 3, 64, 64) for part in parts]
    assert [batch.labels.tolist() for batch in batches] == [samples.labels[part].tolist() for part in parts]


def test_a_batch_outlives_the_next_one(samples: Index) -> None:
    """DALI uses its buffers again; what was handed out must not change."""
    pictures = p.pictures_of("test", 64, "fixres")
    requests = [make_request(samples, pictures, np.array([k, k + 1]), 0) for k in range(0, 16, 2)]
    kept = p.dali_batches(samples, requests, pictures)
    again = [p.dali_batches(samples, [request], pictures)[0] for request in requests]
    assert all(torch.equal(a.images, b.images) for a, b in zip(kept, again, strict=True))


@p.both_backends
def test_exif_orientation_is_ignored(tmp_path: Path, backend: p.Backend) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.jpg").write_bytes(p.encode(p.photograph(90, 130, 0), exif=exif))
    (folder / "upright.jpg").write_bytes(p.encode(p.photograph(90, 130, 0)))
    found = dataset.load(tmp_path, "train")
    assert found.sizes.tolist() == [[90, 130]] * 2
    upright, turned = p.one_batch(backend, found, [0, 1], "test", 64, "fixres").images
    assert torch.equal(upright, turned)
