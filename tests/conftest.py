"""Fixtures that all tests share, and how the tests are spread over processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.folders import write_photos
from support.slurm_service import devcluster, undisturbed  # noqa: F401  (fixtures)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: what needs Slurm, which mostly waits, goes to one process, on one cluster."""
    for item in items:
        slurm = "devcluster" in (*getattr(item, "fixturenames", ()), item.path.stem.removeprefix("test_"))
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else item.path.name))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's own cache."""
    os.environ["FIXRES_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 training and 33 validation images in 3 classes: neither divides over 2 or 4 ranks."""
    return write_photos(tmp_path_factory.mktemp("photos"), 28, 11)
