"""A seeded sample of benchmarks/fuzz_files.py: damaged files are right, rebuilt or refused, never wrong, never a traceback."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fixres_dist.base import checksums
from fixres_dist.base.small_files import Damaged


def script() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "fuzz_files.py"
    spec = importlib.util.spec_from_file_location("fuzz_files", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("checkpoints", 30),
        ("indexes", 60),
        ("segments", 40),
        ("tars", 40),
        ("partials", 30),
        ("exports", 40),
        ("pth", 40),
    ],
)
def test_no_damaged_file_is_read_as_if_it_were_whole(kind: str, count: int) -> None:
    found = script().fuzz(kind, count, seed=7)
    assert sum(found.values()) == count
    assert not found["wrong"]
    assert not found["traceback"]
    assert found["rebuilt"] + found["refused"] > count // 2, "most of the damage is to something"


def test_arrays_of_a_whole_zip_are_compared_too(tmp_path: Path) -> None:
    """A zip has checksums of its own, which a copy with other values has as well."""
    checksums.save_arrays(tmp_path / "a.npz", {"x": np.arange(3)})
    with np.load(tmp_path / "a.npz") as file:
        arrays = {**file, "x": np.arange(3) + 1}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(Damaged, match="its checksum is not that of what it holds"):
        checksums.load_arrays(tmp_path / "a.npz", "")


def test_no_byte_of_an_array_file_changes_what_is_read(tmp_path: Path) -> None:
    """A length in the table of contents swallowed the arrays after it, and with them the checksum."""
    file, arrays = tmp_path / "a.npz", {"loss": np.arange(3.0), "labels": np.arange(3)}
    checksums.save_arrays(file, arrays)
    whole, refused = file.read_bytes(), 0
    for place in range(len(whole)):
        for bit in (1, 128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                found, _ = checksums.load_arrays(file, "")
            except Damaged:
                refused += 1
            else:
                assert all(np.array_equal(found[name], array) for name, array in arrays.items()), (place, bit)
    assert refused > len(whole) // 2
