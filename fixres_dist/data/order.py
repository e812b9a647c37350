"""Order and randomness as pure functions of (seed, epoch, sample), so no sampler state has to be saved.

There is one global order per epoch. Step k of an epoch takes positions [k*B, (k+1)*B) of it, and a rank takes its part
of that slice. So a resumed run, or one on another number of ranks, sees the same batches. The order is a keyed
bijection on indices and not an array: the time to compute a slice depends on the slice, not on the number of samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
ROUNDS = 6  # of the Feistel network: 4 pass a chi-square test of pair positions; 2 more are a margin


def mix(x: U64) -> U64:
    """The finaliser of SplitMix64: a bijection on 64-bit words in which every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed(*words: int | NDArray[np.integer]) -> U64:
    """The hash of a sequence of words, uint64; arrays are broadcast."""
    state = np.zeros(1, np.uint64)
    for word in words:
        # The odd constant separates (1, 0) from (0, 1) and moves zero away from the finaliser's fixed point.
        state = mix(state * np.uint64(3) + np.asarray(word).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return state


def uniforms(
    seed: int, epoch: int | NDArray[np.integer], samples: NDArray[np.integer], count: int
) -> NDArray[np.float64]:
    """`count` uniforms in [0, 1) for each sample: float64 [n, count]. `epoch`: a number, or view keys [n]."""
    bits = keyed(seed, 1, np.asarray(epoch).reshape(-1, 1), np.asarray(samples)[:, None], np.arange(count)[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def positions_to_samples(n: int, seed: int, epoch: int, positions: NDArray[np.integer]) -> NDArray[np.int64]:
    """The samples at `positions` (each 0 .. n-1) in this epoch's order of n samples: int64 [len(positions)].

    A balanced Feistel network permutes 0 .. 2^(2w)-1, the smallest such range that holds n. A result outside 0 .. n-1
    is permuted again until it is inside (cycle walking): this keeps the map a bijection and takes under four turns on
    average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = keyed(seed, 2, epoch, np.arange(ROUNDS))
    values = np.asarray(positions).astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        left, right = values[walking] >> half, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (mix(right + key) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= n]
    return values.astype(np.int64)


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Optimizer steps per epoch; the last batch is neither dropped nor padded, but smaller."""
    return -(-n // global_batch)


def rank_part(start: int, stop: int, rank: int, world_size: int, together: int = 1) -> tuple[int, int]:
    """The part [start', stop') of the slice [start, stop) that belongs to `rank`; sizes differ by at most `together`, the
    number of neighbours that stay on one rank."""
    size, units = stop - start, -(-(stop - start) // together)
    low, high = (min(size, together * (units * k // world_size)) for k in (rank, rank + 1))
    return start + low, start + high


def train_draws(
    n: int, seed: int, step: int, global_batch: int, rank: int, world_size: int, repeats: int = 1, together: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(samples, view keys) of `rank` at optimizer step `step`, counted from the start of epoch 0: two int64 arrays.

    A view key takes the epoch's place in `uniforms`. With `repeats`, each of an epoch's first n / repeats samples is
    drawn that many times in a row, each time in another view (repeated augmentation, arXiv 1902.05509). `together` as in
    rank_part.
    """
    epoch, k = divmod(step, steps_per_epoch(n, global_batch))
    start, stop = rank_part(k * global_batch, min(n, (k + 1) * global_batch), rank, world_size, together)
    positions = np.arange(start, stop)
    return positions_to_samples(n, seed, epoch, positions // repeats), epoch + (positions % repeats << 32)
