"""The host queues work for a GPU and does not wait for it: not in a step, nor per batch of a pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.pretended_device import DEVICE, Waits

from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import dali, geometry
from fixres_dist.data.decoding import Batch
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.evaluation import extract
from fixres_dist.models import fast_trunk
from fixres_dist.models.batchnorm import share_batch_statistics
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.models.parts import parts_of, set_modes
from fixres_dist.models.pooled_head import PooledHead
from fixres_dist.models.precision import Arithmetic, LossScale, sgd
from fixres_dist.training import session as sessions
from fixres_dist.training.cache.store import Rows, begin_writing, open_store
from fixres_dist.training.predict import score_batches
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, one_ahead, tell, to_host
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import stages
from fixres_dist.training.step import backward, distribute, measure_statistics
from fixres_dist.training.throughput import Meter

RES, IMAGES = 64, 4


def index(n: int) -> Index:
    names = [f"c{k % 3}/{k:04d}.jpg".encode() for k in range(n)]
    ends, sizes = np.cumsum([len(name) for name in names]), np.tile(np.array([80, 80], np.int32), (n, 1))
    labels = np.arange(n, dtype=np.int32) % 3
    return Index(Path("nowhere"), ("c0", "c1", "c2"), b"".join(names), ends, labels, sizes, np.zeros(n, np.uint32))


def work(policy: str, bn_stats: str, device: torch.device = DEVICE) -> StageSession:
    """A stage on a device, by default the pretended one; its trunk in bf16 where it is frozen."""
    items = [f"data.res={RES}", f"tune.policy={policy}", f"tune.bn_stats={bn_stats}", f"tune.global_batch={2 * IMAGES}"]
    config = reading.parse(Config, reading.overrides(items))
    model = build_model("test_efficientnet", 3).to(device)
    parts = parts_of(model, policy)
    if isinstance(parts.trunk, torch.nn.Module) and not parts.trains_blocks:
        how = fast_trunk.Arrangement("channels_last", False)
        trunk = fast_trunk.arranged(parts.trunk.to(torch.bfloat16), torch.bfloat16, how)
        parts = replace(parts, trunk=trunk)
    set_modes(parts, bn_stats)
    ranks, spec = Ranks(0, 1, 1, ("here",), device), preprocessing("test_efficientnet")
    arithmetic = Arithmetic("fp32", device)
    split = {"train": index(2 * IMAGES)}
    session = Session(config, ranks, model, spec, split, ("a", "b", "c"), {}, arithmetic, torch.channels_last, tell)
    return StageSession(session, stages(config, 2 * IMAGES)[-1], parts)


def batches(pin: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Batch]:
    """Two micro-batches as a loader's pinning thread hands them over."""
    for k in range(2):
        images = pin(torch.zeros(IMAGES, RES, RES, 3, dtype=torch.uint8)).permute(0, 3, 1, 2)
        yield Batch(images, pin(torch.arange(IMAGES) % 3), torch.arange(k * IMAGES, (k + 1) * IMAGES))


def stepper(found: StageSession, meter: Meter) -> Callable[[Iterator[Batch]], None]:
    """The loop's step, but for its logging."""
    optimizer = sgd("torch", [p for p in found.session.model.parameters() if p.requires_grad], 0.9, 1e-4)
    scale = LossScale(found.session.arithmetic, optimizer, None)

    def step(micro_batches: Iterator[Batch]) -> None:
        optimizer.zero_grad()
        assert backward(found, found.parts.head, scale, 0, micro_batches, meter) == list(range(2 * IMAGES))
        assert scale.step()

    return step


POLICIES = [("classifier", "exact"), ("classifier+bn", "exact"), ("classifier+bn", "ema")]
POLICIES += [("last_block", "exact"), ("all", "ema")]


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "bn_stats"), POLICIES)
def test_torch_sees_no_wait_in_a_step_on_a_gpu(policy: str, bn_stats: str) -> None:
    step = stepper(work(policy, bn_stats, torch.device("cuda", 0)), Meter())
    step(batches(torch.Tensor.pin_memory))  # makes the constants, starts cuDNN
    micro_batches = list(batches(torch.Tensor.pin_memory))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(iter(micro_batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("policy", "bn_stats"), POLICIES)
def test_a_step_never_waits_for_the_device(policy: str, bn_stats: str) -> None:
    found, waits, meter = work(policy, bn_stats), Waits(), Meter()
    one = stepper(found, meter)
    for step in range(2):  # the first makes the constants
        with waits:
            one(batches(waits.pin))
        assert len(waits.found) <= 2 * (not step), waits.found
        waits.found.clear()
    with waits:
        assert meter.read(found.session.ranks)["loss"] == 0.0
    assert waits.found == ["__float__"], "the loss is read where it is logged"


def test_the_head_in_one_pass_is_for_cpus() -> None:
    """On a GPU it would be more kernels than the layers it stands for; none has measured it."""
    on_device = work("classifier+bn", "exact")
    assert distribute(on_device) is on_device.parts.head
    cpu = replace(on_device.session, ranks=Ranks(0, 1, 1, ("here",), torch.device("cpu")))
    assert isinstance(distribute(replace(on_device, session=cpu)), PooledHead)


def test_a_batchnorm_over_several_ranks_makes_its_count_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
    found, waits = work("all", "ema"), Waits()
    share_batch_statistics(found.parts)
    with waits:
        found.parts.head(torch.zeros(IMAGES, 3, RES, RES, device=DEVICE)).sum().backward()
    assert waits.found == []


def test_statistics_are_summed_on_the_device_and_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, waits = work("classifier+bn", "exact"), Waits()
    found.session.spec.normalised(torch.zeros(1, 3, 2, 2, device=DEVICE, dtype=torch.uint8))
    monkeypatch.setattr(StageSession, "statistics_batches", lambda self, first: batches(waits.pin))
    monkeypatch.setattr("fixres_dist.models.batchnorm.Moments.set", lambda self, bn: None)
    with waits:
        measure_statistics(found)
    assert waits.found == ["cpu"]


def test_an_evaluation_reads_its_scores_at_the_end() -> None:
    found, waits = work("classifier+bn", "exact"), Waits()
    found.session.spec.normalised(torch.zeros(1, 3, 2, 2, device=DEVICE, dtype=torch.uint8))

    def logits(batch: Batch) -> list[torch.Tensor]:
        return [found.logits(found.parts.head, found.inputs(batch.images))]

    with waits, pytest.raises(RuntimeError, match=r"saw 0 images of 8"):  # the pretended device's values are all 0
        score_batches(logits, found.session.train, batches(waits.pin), found.session.ranks)
    assert waits.found == ["cpu"]


def test_cached_features_come_pinned_with_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    store, waits = open_store(tmp_path, {}, IMAGES, 1, (torch.zeros(IMAGES, 8, 2, 2),)), Waits()
    begin_writing(store, {})
    store.write((0, IMAGES), [(np.arange(IMAGES), [(torch.randn(IMAGES, 8, 2, 2),)])])
    pictures = Pictures("test", RES, geometry.resize_of("fixefficientnet", RES, 0.875, "bicubic"), 0)
    request = make_request(index(IMAGES), pictures, np.arange(IMAGES), 0)
    with waits:
        rows: Rows = store.read(index(IMAGES), request)
        for tensor in (*rows.images, rows.labels):
            tensor.to(DEVICE, non_blocking=True)
    assert waits.found == []


def test_dali_s_batches_bring_labels_and_jitter_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = Pictures("random_resized_crop", RES, geometry.resize_of("fixefficientnet", RES, 0.875, "bicubic"), 0)
    request, waits = make_request(index(IMAGES), pictures, np.arange(IMAGES), 0), Waits()
    assert all(view.jitter != (1.0, 1.0, 1.0) for view in request.views)

    class Pipe:
        """What DALI's pipeline does with the one request, without files."""

        def __init__(self, feed: Any, queue: dali.Queue) -> None:
            self.queue, self.left = queue, [request]

        def run(self) -> tuple[None]:
            if not self.left:
                raise StopIteration
            self.queue.running.append(dali.Part(self.left.pop(), [], False, good=list(range(IMAGES))))
            return (None,)

    queues: list[dali.Queue] = []

    class Kept(dali.Queue):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            queues.append(self)

    images = torch.zeros(IMAGES, 3, RES, RES, dtype=torch.uint8, device=DEVICE)
    monkeypatch.setattr(dali, "Queue", Kept)
    monkeypatch.setattr(dali, "build", lambda feed, *_: Pipe(feed, queues[0]))
    monkeypatch.setattr(dali, "pictures", lambda *_: images)
    with waits:
        (batch,) = dali.batches(index(IMAGES), [], RES, pictures.resize, dali.Settings(IMAGES, 1, device_id=0))
        batch.labels.to(DEVICE, non_blocking=True)
    assert batch.images.is_meta
    assert waits.found == []


def test_what_is_copied_back_is_waited_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event after the copies: what was queued behind them goes on."""
    queued: list[str] = []
    event = SimpleNamespace(synchronize=lambda: queued.append("waited"))
    stream = SimpleNamespace(record_event=lambda: queued.append("event") or event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    waits, made = Waits(), torch.zeros(2, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with waits:
        wait = to_host([made, made[:, :, 0, 0]])
        queued.append("next batch")
        maps, rows = wait()
    assert queued == ["event", "next batch", "waited"]
    assert waits.found == []
    assert (maps.device.type, maps.shape, maps.stride()) == ("cpu", made.shape, made.stride())
    assert rows.shape == (2, 8)


def test_the_next_batch_is_queued_before_the_last_one_is_waited_for() -> None:
    """So features are written, and softmax extracted, while the device computes."""
    events: list[str] = []

    def computed() -> Iterator[int]:
        for k in range(3):
            events.append(f"compute {k}")
            yield k

    for k in one_ahead(computed()):
        events.append(f"write {k}")
    assert events == ["compute 0", "compute 1", "write 0", "compute 2", "write 1", "write 2"]
    assert list(one_ahead([])) == []
    assert list(one_ahead([7])) == [7]
    assert extract.one_ahead is sessions.one_ahead
