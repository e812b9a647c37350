"""Both backends against PIL decode and torchvision's transforms, and against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures as p

from fixres_dist.data import dali, dataset, pixels
from fixres_dist.data.index import Index
from fixres_dist.data.requests import make_request

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
def test_same_pictures_as_pil_and_torchvision(samples: Index, res: int, rule: str, transform: str) -> None:
    pictures = p.pictures_of(transform, res, rule, 5, 0.9)
    first = 12 * COMBINATIONS.index((res, rule, transform)) % 108
    count = 12 if res < 400 else 6
    request = make_request(samples, pictures, np.arange(first, first + count) % 108, 1)
    want = p.reference(samples, request, pictures)
    for name, batches, mean, largest in (  # in grey levels of 255
        ("torch", p.torch_batches(samples, [request], pictures), 0, 0),
        ("dali", p.dali_batches(samples, [request], pictures), 0.25, 6),
        ("dali as on a GPU", p.dali_batches(samples, [request], pictures, two_passes=True), 0.06, 6),
    ):
        difference = np.abs(p.pixels(batches) - want)
        assert difference.mean() <= mean, name
        assert difference.max() <= largest, name


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
