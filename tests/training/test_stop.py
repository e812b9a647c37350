"""A stop signal at any moment, heard within a batch: what is done stays, and the end is the undisturbed run's, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.preemptions import study


@pytest.mark.parametrize(("ranks", "count", "seed"), [(1, 6, 1), (2, 6, 2)])
def test_seeded_moments(tmp_path: Path, photos: Path, ranks: int, count: int, seed: int) -> None:
    stops, differences = study(tmp_path, photos, ranks, count, seed)
    assert not differences
    assert stops >= count - 2, "most signals interrupt a start; one at the very end finds nothing left to stop"
