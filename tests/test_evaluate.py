from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fixres_dist import evaluate
from fixres_dist.data import index, plan
from fixres_dist.data.geometry import resize_of
from fixres_dist.data.torch_cpu import Batch
from fixres_dist.distributed import Ranks

ALONE = Ranks(0, 1, 1, ("here",), torch.device("cpu"))
PICTURES = plan.Pictures("test", 64, resize_of("fixefficientnet", 64, 0.875, "bicubic"), 0)


def batches(requests: Iterator[plan.Request], labels: np.ndarray) -> Iterator[Batch]:
    for request in requests:
        n = len(request.samples)
        yield Batch(
            torch.zeros(n, 3, 2, 2), torch.from_numpy(labels[request.samples]), torch.from_numpy(request.samples)
        )


def made(n: int) -> index.Index:
    sizes = np.full((n, 2), 100, np.int32)
    return index.Index(Path("x"), ("a", "b"), b"", np.zeros(n, np.int64), np.zeros(n, np.int32), sizes)


def test_counts_against_a_table() -> None:
    scores = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
    labels = np.array([0, 2, 6])
    (found,) = evaluate.predict(
        lambda batch: [scores[batch.samples]],
        made(3),
        batches(plan.every_sample(made(3), PICTURES, 2, 0, 1), labels),
        ALONE,
    )
    assert found.predicted.tolist() == [0, 6, 0]
    assert found.correct1.tolist() == [True, False, False]
    assert found.correct5.tolist() == [True, True, False]
    expected = [-math.log(math.exp(s[y]) / sum(map(math.exp, s))) for s, y in zip(scores.tolist(), labels, strict=True)]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-3)
    assert found.summary() == {
        "top1": pytest.approx(100 / 3, abs=1e-3),
        "top5": pytest.approx(200 / 3, abs=1e-3),
        "loss": pytest.approx(np.mean(expected), abs=1e-5),
        "n": 3,
        "skipped": 0,
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_101_files_without_padding(world_size: int) -> None:
    found = [
        s
        for rank in range(world_size)
        for r in plan.every_sample(made(101), PICTURES, 8, rank, world_size)
        for s in r.samples
    ]
    assert sorted(found) == list(range(101))


def test_a_missed_or_repeated_image_is_an_error() -> None:
    def twice() -> Iterator[plan.Request]:
        yield from plan.every_sample(made(4), PICTURES, 4, 0, 1)
        yield plan.request(made(4), PICTURES, np.array([1]), 0)

    for requests in (twice(), iter(list(plan.every_sample(made(4), PICTURES, 2, 0, 1))[:1])):
        with pytest.raises(RuntimeError, match="each should be seen once"):
            evaluate.predict(
                lambda b: [torch.zeros(len(b.samples), 3)], made(4), batches(requests, np.zeros(4, np.int64)), ALONE
            )


def test_paired_interval() -> None:
    """Two images of a hundred are gained, one is lost: mean 1 point, the interval from the differences' spread."""
    before, after = np.zeros(100, bool), np.zeros(100, bool)
    before[0], after[1:3] = True, True
    gain, (low, high) = evaluate.paired_gain(before, after)
    spread = np.std([-1] + [1, 1] + [0] * 97, ddof=1)
    assert gain == 1.0
    assert (high - low) / 2 == pytest.approx(100 * 1.96 * spread / 10, abs=1e-3)


def test_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        before = rng.random(500) < 0.7
        flips = rng.random(500)
        after = np.where(before, flips > 0.05, flips < 0.3)  # true gain: 0.3 * 0.3 - 0.7 * 0.05 = 5.5 points
        _, (low, high) = evaluate.paired_gain(before, after)
        covered += low <= 5.5 <= high
    assert 0.92 <= covered / 400 <= 0.98
