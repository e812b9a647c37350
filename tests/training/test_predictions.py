from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fixres_dist.base.errors import UserError
from fixres_dist.data.decoding import Bad, Batch
from fixres_dist.data.geometry import resize_of
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, Request, every_sample, make_request, whole_batches
from fixres_dist.evaluation.measures import scores_by_class
from fixres_dist.runs.results import Gain
from fixres_dist.training.calibration import Calibration, calibration
from fixres_dist.training.confusion import macro
from fixres_dist.training.predict import score_batches
from fixres_dist.training.predictions import Predictions, paired_gain
from fixres_dist.training.ranks import Ranks

ALONE = Ranks(0, 1, 1, ("here",), torch.device("cpu"))
PICTURES = Pictures("test", 64, resize_of("fixefficientnet", 64, 0.875, "bicubic"), 0)


def batches(requests: Iterator[Request], labels: np.ndarray) -> Iterator[Batch]:
    for request in requests:
        n = len(request.samples)
        yield Batch(
            torch.zeros(n, 3, 2, 2), torch.from_numpy(labels[request.samples]), torch.from_numpy(request.samples)
        )


def made(n: int) -> Index:
    sizes = np.full((n, 2), 100, np.int32)
    return Index(
        Path("x"), ("a", "b"), b"", np.zeros(n, np.int64), np.zeros(n, np.int32), sizes, np.zeros(n, np.uint32)
    )


def test_counts_against_a_table() -> None:
    scores = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]])
    labels = np.array([0, 2, 6])
    (found,) = score_batches(
        lambda batch: [scores[batch.samples]],
        made(3),
        batches(every_sample(made(3), PICTURES, 2, 0, 1), labels),
        ALONE,
    )
    assert found.predicted.tolist() == [0, 6, 0]
    assert found.correct1.tolist() == [True, False, False]
    assert found.correct5.tolist() == [True, True, False]
    expected = [-math.log(math.exp(s[y]) / sum(map(math.exp, s))) for s, y in zip(scores.tolist(), labels, strict=True)]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-3)
    assert asdict(found.summary()) == {
        "top1": pytest.approx(100 / 3, abs=1e-3),
        "top5": pytest.approx(200 / 3, abs=1e-3),
        "loss": pytest.approx(np.mean(expected), abs=1e-5),
        "n": 3,
        "skipped": 0,
    }


def some(n: int, classes: int = 4, seed: int = 0) -> Predictions:
    """Predictions as a model might make them; every tenth image could not be decoded."""
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, classes, n).astype(np.int32)
    predicted[::10] = -1
    hits = (rng.random(n) < 0.6) & (predicted >= 0)
    labels = np.where(hits, predicted, (predicted + 1) % classes).astype(np.int32)
    return Predictions(predicted, hits, hits, rng.random(n, np.float32), rng.random(n, np.float32), labels)


def test_calibration_error_against_a_loop_over_bins() -> None:
    found = some(500)
    found.confidence[:3] = (1.0, 3 / 15, 0.0)  # on the edges: a bin holds its upper one
    kept = found.counted
    confidence, hits, expected = found.confidence[kept].astype(float), found.correct1[kept], 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    measured = calibration(found)
    assert measured is not None
    assert measured.ece == pytest.approx(100 * expected, abs=1e-3)
    assert measured.mean_confidence == pytest.approx(100 * confidence.mean(), abs=1e-3)
    sure = Predictions(*(a[1:10] for a in vars(found).values()))
    few = calibration(sure)
    assert few is not None
    assert few.ece >= 0
    right = np.ones(9, bool)
    perfect = Predictions(sure.predicted, right, right, sure.loss, right.astype(np.float32), sure.predicted)
    assert calibration(perfect) == Calibration(ece=0.0, mean_confidence=100.0)


def test_scores_by_class_against_masks() -> None:
    before, after = some(200, seed=1), some(200, seed=2)
    rows = scores_by_class({"before": before, "after": after}, 5)
    for k in range(4):
        for label, p in (("before", before), ("after", after)):
            of_it, taken = (p.labels == k) & p.counted, p.predicted == k
            assert rows[k][label] == pytest.approx(100 * p.correct1[of_it].mean(), abs=1e-3)
            assert rows[k]["precision"][label] == pytest.approx(100 * p.correct1[taken].mean(), abs=1e-3)
            f1 = 200 * p.correct1[of_it].sum() / (of_it.sum() + taken.sum())
            assert rows[k]["f1"][label] == pytest.approx(f1, abs=1e-3)
        assert rows[k]["n"] == of_it.sum()
    nothing = {"before": 0.0, "after": 0.0}
    assert rows[4] == {"n": 0, "before": None, "after": None, "precision": nothing, "f1": nothing}


def test_predictions_of_older_runs_are_read_and_gains_count_what_both_decoded(tmp_path: Path) -> None:
    found = some(40)
    kept = {key: value for key, value in vars(found).items() if key not in ("confidence", "labels")}
    np.savez_compressed(tmp_path / "old.npz", sample_list=np.frombuffer(b"abc", np.uint8), **kept)
    old, sample_list = Predictions.read_with_list(tmp_path / "old.npz")
    assert sample_list == "abc"
    assert calibration(old) is None
    assert macro(old) is None
    assert old.summary() == found.summary()
    other = some(40, seed=3)
    other.predicted[5] = -1
    both = found.counted & other.counted
    assert other.gain_over(old) == paired_gain(found.correct1[both], other.correct1[both])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_101_files_without_padding(world_size: int) -> None:
    found = [
        s
        for rank in range(world_size)
        for r in every_sample(made(101), PICTURES, 8, rank, world_size)
        for s in r.samples
    ]
    assert sorted(found) == list(range(101))


@pytest.mark.parametrize("world_size", [1, 2, 3, 17])
def test_batches_cut_from_the_split_are_the_same_at_any_world_size(world_size: int) -> None:
    parts = [list(whole_batches(made(101), PICTURES, 8, rank, world_size)) for rank in range(world_size)]
    found = [request.samples.tolist() for part in parts for request in part]
    assert found == [list(range(k, min(101, k + 8))) for k in range(0, 101, 8)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_missed_or_repeated_image_is_an_error() -> None:
    def twice() -> Iterator[Request]:
        yield from every_sample(made(4), PICTURES, 4, 0, 1)
        yield make_request(made(4), PICTURES, np.array([1]), 0)

    for requests in (twice(), iter(list(every_sample(made(4), PICTURES, 2, 0, 1))[:1])):
        with pytest.raises(RuntimeError, match="each should be seen once"):
            score_batches(
                lambda b: [torch.zeros(len(b.samples), 3)], made(4), batches(requests, np.zeros(4, np.int64)), ALONE
            )


def test_an_evaluation_without_one_readable_image_is_refused() -> None:
    nothing = [
        Batch(torch.zeros(0, 3, 2, 2), *(torch.zeros(0, dtype=torch.int64),) * 2, (Bad(0, "torn"), Bad(1, "torn")))
    ]
    with pytest.raises(UserError, match=r"none of the 2 images of x .*data verify --data \."):
        score_batches(lambda b: [torch.zeros(len(b.samples), 3)], made(2), iter(nothing), ALONE)


def test_the_interval_of_one_image_is_all_there_is() -> None:
    assert paired_gain(np.array([False]), np.array([True])) == Gain(100.0, (-100.0, 100.0))


def test_paired_interval() -> None:
    """Two images of a hundred are gained, one is lost: mean 1 point, the interval from the differences' spread."""
    before, after = np.zeros(100, bool), np.zeros(100, bool)
    before[0], after[1:3] = True, True
    gain = paired_gain(before, after)
    low, high = gain.delta_ci95
    spread = np.std([-1] + [1, 1] + [0] * 97, ddof=1)
    assert gain.delta_top1 == 1.0
    assert (high - low) / 2 == pytest.approx(100 * 1.96 * spread / 10, abs=1e-3)


def test_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        before = rng.random(500) < 0.7
        flips = rng.random(500)
        after = np.where(before, flips > 0.05, flips < 0.3)  # true gain: 0.3 * 0.3 - 0.7 * 0.05 = 5.5 points
        low, high = paired_gain(before, after).delta_ci95
        covered += low <= 5.5 <= high
    assert 0.92 <= covered / 400 <= 0.98
