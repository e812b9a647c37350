"""One optimizer step: its micro-batches on every rank, and the gradients of the global batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import lived_in

from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import geometry
from fixres_dist.data.decoding import Batch
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, Request, micro_batches, train_steps
from fixres_dist.models import batchnorm
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import parts_of, set_modes
from fixres_dist.models.precision import Arithmetic, LossScale, sgd
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, tell
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import stages
from fixres_dist.training.step import average_weights, backward
from fixres_dist.training.throughput import Meter


def made(n: int) -> Index:
    """`n` images of 40 x 60 pixels in three classes, without files."""
    names = [f"c{k % 3}/{k:04d}.jpg".encode() for k in range(n)]
    ends = np.cumsum([len(name) for name in names])
    sizes = np.tile(np.array([40, 60], np.int32), (n, 1))
    labels = np.arange(n, dtype=np.int32) % 3
    return Index(Path("nowhere"), ("c0", "c1", "c2"), b"".join(names), ends, labels, sizes, np.zeros(n, np.uint32))


@pytest.mark.parametrize(
    ("n", "global_batch", "batch_per_device", "world_size"),
    [(21, 12, 4, 2), (21, 12, 100, 4), (5, 12, 4, 8), (100, 16, 3, 3), (84, 12, 1, 2), (1, 1, 1, 4)],
)
def test_every_rank_has_the_same_number_of_micro_batches(
    n: int, global_batch: int, batch_per_device: int, world_size: int
) -> None:
    """A rank with one image less must not skip a collective that the others wait in."""
    index = made(n)
    pictures = Pictures("test", 32, geometry.resize_of("fixefficientnet", 32, 1.0, "bicubic"), 7)
    steps = 2 * -(-n // global_batch)
    every = [
        list(train_steps(index, pictures, global_batch, batch_per_device, 0, steps, rank, world_size))
        for rank in range(world_size)
    ]
    alone = train_steps(index, pictures, global_batch, global_batch, 0, steps, 0, 1)
    for step, (of_ranks, (whole,)) in enumerate(zip(zip(*every, strict=True), alone, strict=True)):
        counts = {len(requests) for requests in of_ranks}
        images = len(whole.samples)
        assert counts == {micro_batches(images, world_size, batch_per_device)}, f"step {step}"
        requests = list(itertools.chain.from_iterable(of_ranks))
        assert all(len(request.samples) <= batch_per_device for request in requests)
        assert np.concatenate([request.samples for request in requests]).tolist() == whole.samples.tolist()


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(("n", "global_batch", "batch_per_device", "world_size"), [(21, 12, 4, 2), (5, 8, 2, 4)])
def test_every_rank_takes_them_in_the_same_steps(
    n: int, global_batch: int, batch_per_device: int, world_size: int, skipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's part of it: a batch for each request, and none left over, though a rank's may be empty or all skipped."""
    taken: list[list[int]] = []
    for rank in range(world_size):
        items = [f"tune.global_batch={global_batch}", f"run.batch_per_device={batch_per_device}", "tune.epochs=2"]
        one = work("tune.policy=all", *items, n=n)
        session = replace(one.session, ranks=replace(one.session.ranks, rank=rank, world_size=world_size))
        left: list[int] = []

        def batches(
            self: Session, index: Index, requests: Iterator[Request], *_: object, left: list[int] = left
        ) -> Any:
            for request in requests:
                left.append(1)
                kept = request.samples[:0] if skipped else request.samples
                yield SimpleNamespace(samples=kept, skipped=())
                left.pop()

        monkeypatch.setattr(Session, "batches", batches)
        steps = replace(one, session=session).steps(0, Meter())
        taken.append([len(list(micro_batches)) for _, micro_batches in steps])
        assert len(left) <= 1, "the last one was asked for, and no more came"
    assert taken == [taken[0]] * world_size
    images = [global_batch] * (n // global_batch) + [n % global_batch] * (n % global_batch > 0)
    assert taken[0] == [micro_batches(k, world_size, batch_per_device) for k in images] * 2


def work(*items: str, name: str = "test_efficientnet", n: int = 12) -> StageSession:
    """The fixing stage of a small model on `n` images, in fp32 on a CPU."""
    config = reading.parse(Config, reading.overrides(["data.res=64", "tune.global_batch=12", *items]))
    model = lived_in(build_model(name, 3))
    parts = parts_of(model, config.tune.policy)
    set_modes(parts, config.tune.bn_stats)
    index, device = made(n), torch.device("cpu")
    ranks, spec = Ranks(0, 1, 1, ("here",), device), preprocessing("test_efficientnet")
    arithmetic, layout = Arithmetic("fp32", device), torch.contiguous_format
    session = Session(config, ranks, model, spec, {"train": index}, index.classes, {}, arithmetic, layout, tell)
    return StageSession(session, stages(config, n)[-1], parts)


def gradients(found: StageSession, sizes: list[int]) -> dict[str, torch.Tensor]:
    """Of one step whose 12 images come in micro-batches of these sizes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 64, 64), dtype=torch.uint8, generator=generator)
    labels, samples = torch.arange(12) % 3, torch.arange(12)
    parts = zip(images.split(sizes), labels.split(sizes), samples.split(sizes), strict=True)
    trainable = [p for p in found.session.model.parameters() if p.requires_grad]
    optimizer = sgd("torch", trainable, 0.9, 0.0)
    optimizer.zero_grad()
    scale, meter = LossScale(found.session.arithmetic, optimizer, None), Meter()
    seen = backward(found, found.parts.head, scale, 0, (Batch(*part) for part in parts), meter)
    assert seen == list(range(12))
    assert meter.images == 12
    return {n: p.grad.clone() for n, p in found.session.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bn_stats", ["exact", "ema"])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [5, 5, 2], [12, 0], [1] * 12])
def test_micro_batches_add_up_to_the_global_batch(bn_stats: str, sizes: list[int]) -> None:
    """With `ema` too: the BN sees the rank's whole batch, however it is cut."""
    whole = gradients(work(f"tune.bn_stats={bn_stats}"), [12])
    cut = gradients(work(f"tune.bn_stats={bn_stats}"), sizes)
    assert set(whole) == set(cut) == {"bn2.weight", "bn2.bias", "classifier.weight", "classifier.bias"}
    for name, expected in whole.items():
        torch.testing.assert_close(cut[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_of_one_image_trains_with_a_batch_norm_behind_a_global_pool(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value per channel has no variance: running statistics take its place, and stay."""
    found = work("tune.policy=all", name="mobilenetv4_conv_small")
    if ranks == 2:
        monkeypatch.setattr(batchnorm.dist, "all_reduce", lambda x: x)
        batchnorm.share_batch_statistics(found.parts)
    bn = found.session.model.get_submodule("norm_head")
    with torch.no_grad(), batchnorm.single_image(found.parts, 11):
        found.parts.head(torch.randn(11, 3, 64, 64))  # a first batch, so that the statistics are those of used weights
    before, count = bn.running_var.clone(), int(bn.num_batches_tracked)
    assert count == 1
    with batchnorm.single_image(found.parts, 1 if ranks == 1 else 0):
        found.parts.head(torch.randn(1, 3, 64, 64)).square().sum().backward()
    assert torch.equal(bn.running_var, before)
    assert int(bn.num_batches_tracked) == count
    assert bn.training
    assert int(found.session.model.bn1.num_batches_tracked) == 2  # where a map has more values, they move
    assert all(p.grad is not None and p.grad.isfinite().all() for p in found.session.model.parameters())
    if ranks == 1:
        assert gradients(work("tune.policy=all", name="mobilenetv4_conv_small"), [11, 1])


def test_averaged_weights_are_the_mean_and_the_optimizer_keeps_it() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for count, value in enumerate((3.0, 6.0, 12.0), 1):
        parameter.data.fill_(value)
        average_weights(optimizer, count, use=count == 3)
    assert parameter.tolist() == [7.0, 7.0]
    assert optimizer.state[parameter]["average"].tolist() == [7.0, 7.0]
