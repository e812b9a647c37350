"""How many loader processes a rank gets, by the CPUs that the launcher leaves it."""

from __future__ import annotations

import pytest

from fixres_dist.data.backends import worker_count
from fixres_dist.training.ranks import cpu_share


@pytest.mark.parametrize(
    ("on_node", "expected"),
    [
        ([set(range(64))] * 8, 7),  # nobody binds: torchrun, local ranks
        ([set(range(8 * k, 8 * k + 8)) for k in range(8)], 7),  # task/affinity: 8 CPUs for each task
        ([set(range(64))], 64),
        ([{0, 1, 2, 3}, {2, 3, 4, 5}], 2),  # some are shared: 2 + 2/2
        ([{0}] * 3, 1),
        ([{0, 1, 2}] * 3, 1),
    ],
)
def test_auto_workers_are_the_ranks_share_of_the_cpus(on_node: list[set[int]], expected: int) -> None:
    assert worker_count("auto", cpu_share(on_node[0], on_node), len(on_node)) == expected


def test_a_number_of_workers_stays() -> None:
    assert worker_count(0, 64, 8) == 0
