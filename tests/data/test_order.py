"""The order and the randomness are pure functions: checked without pixels."""

from __future__ import annotations

import numpy as np
import pytest

from fixres_dist.data import order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_each_epoch_is_a_permutation(n: int) -> None:
    epochs = [order.positions_to_samples(n, 3, epoch, np.arange(n)) for epoch in range(3)]
    for samples in epochs:
        assert sorted(samples) == list(range(n))
    if n > 60:
        assert not np.array_equal(epochs[0], epochs[1])


def test_a_slice_needs_no_other_position() -> None:
    n, positions = 10**9, np.array([0, 5, 123_456_789, 10**9 - 1])
    together = order.positions_to_samples(n, 1, 2, positions)
    alone = [int(order.positions_to_samples(n, 1, 2, positions[i : i + 1])[0]) for i in range(4)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4
    assert all(0 <= sample < n for sample in alone)


def test_positions_are_spread_evenly() -> None:
    """Chi-square of where the first tenth of the order comes from, over many seeds; 99.9 % limit for 9 degrees."""
    counts = np.zeros(10)
    for seed in range(200):
        counts += np.bincount(order.positions_to_samples(1000, seed, 0, np.arange(100)) // 100, minlength=10)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 27.9


def test_every_permutation_of_four_turns_up() -> None:
    found = {tuple(order.positions_to_samples(4, seed, 0, np.arange(4)).tolist()) for seed in range(1000)}
    assert len(found) == 24


def test_uniforms_are_uniform_and_independent() -> None:
    u = order.uniforms(7, 1, np.arange(50_000), 3)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.006
    assert np.abs(np.corrcoef(u.T)[np.triu_indices(3, 1)]).max() < 0.02
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.02
    assert np.array_equal(u[123:124], order.uniforms(7, 1, np.array([123]), 3)), "a sample's draws need no other sample"
    assert not np.array_equal(u, order.uniforms(7, 2, np.arange(50_000), 3))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 1, 13, 14, 27])
def test_any_world_size_and_any_start_sees_the_same_batches(world_size: int, first: int) -> None:
    n, batch = 101, 8

    def batches(world_size: int, first: int) -> list[list[int]]:
        return [
            [int(s) for rank in range(world_size) for s in order.train_draws(n, 5, step, batch, rank, world_size)[0]]
            for step in range(first, 28)
        ]

    assert batches(world_size, first) == batches(1, 0)[first:]
    epoch = [sample for samples in batches(world_size, 0)[:13] for sample in samples]
    assert sorted(epoch) == list(range(n))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 200])
def test_parts_cover_a_slice_once(world_size: int) -> None:
    parts = [order.rank_part(10, 111, rank, world_size) for rank in range(world_size)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(10, 111))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", [99, 101])
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_repeated_augmentation_draws_each_sample_in_as_many_views(n: int, world_size: int) -> None:
    batch, per_epoch = 8, order.steps_per_epoch(n, 8)
    for epoch in range(2):
        parts = [
            order.train_draws(n, 5, epoch * per_epoch + k, batch, rank, world_size, repeats=3)
            for k in range(per_epoch)
            for rank in range(world_size)
        ]
        samples, views = (np.concatenate(column) for column in zip(*parts, strict=True))
        assert len(samples) == n, "an epoch keeps its n draws, and so its steps"
        counts = np.bincount(samples, minlength=n)
        assert sorted(counts[counts > 0].tolist(), reverse=True) == [3] * (n // 3) + [n % 3] * (n % 3 > 0)
        assert len(set(zip(samples.tolist(), views.tolist(), strict=True))) == n
        assert set((views & 0xFFFFFFFF).tolist()) == {epoch}
        alone = [order.train_draws(n, 5, epoch * per_epoch + k, batch, 0, 1, repeats=3)[0] for k in range(per_epoch)]
        assert np.array_equal(np.concatenate(alone), samples), "the same batches at any world size"
        assert np.array_equal(samples[::3], order.positions_to_samples(n, 5, epoch, np.arange(-(-n // 3))))


def test_views_of_one_sample_differ_and_the_first_is_the_unrepeated_one() -> None:
    samples, views = order.train_draws(30, 5, 0, 30, 0, 1, repeats=3)
    drawn = order.uniforms(5, views, samples, 4)
    assert len(np.unique(drawn)) == 120
    assert np.array_equal(drawn[::3], order.uniforms(5, 0, samples[::3], 4))
    assert np.array_equal(drawn[7:8], order.uniforms(5, views[7:8], samples[7:8], 4)), "no other draw is needed"
