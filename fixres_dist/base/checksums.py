"""Checksums of what is written, compared with what is read back: of arrays and tensors by value, so that no damage to the file
around them counts, and what was compared is what is used. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.errors import StorageError
from fixres_dist.base.files import whole
from fixres_dist.base.small_files import ANYWHERE, Damaged
from fixres_dist.base.storage import patiently

KEY = "checksum"  # of an npz file, a safetensors header
END_OF_ZIP = 22  # bytes of the last record of a zip file, where that has no comment
DIFFERS = "its checksum is not that of what it holds"


def digest(parts: Iterable[tuple[str, memoryview | bytes]]) -> str:
    """SHA-256 of named bytes, in the order of their names; a name says what else is to be the same, such as a shape."""
    found = hashlib.sha256()
    for name, data in sorted(parts, key=lambda part: part[0]):
        found.update(f"{len(name)} {name} {len(data)} ".encode("utf-8", "surrogateescape"))
        found.update(data)
    return found.hexdigest()


def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Of names, number formats, shapes and values."""
    flat = {f"{name} {a.dtype.str} {a.shape}": np.ascontiguousarray(a).reshape(-1) for name, a in arrays.items()}
    return digest((name, a.view(np.uint8).data) for name, a in flat.items())


def save_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], compressed: bool = False) -> None:
    """Write an npz file, whole or not at all, with the checksum as one more array."""
    sealed = {**arrays, KEY: np.frombuffer(of_arrays(arrays).encode(), np.uint8)}
    with whole(path) as part, open(part, "wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, **sealed)  # type: ignore[arg-type]


def counted(path: Path) -> int:
    """How many members the end of a zip file says that it has: a damaged length in the table before can swallow some."""
    with open(path, "rb") as file:
        file.seek(-END_OF_ZIP, os.SEEK_END)
        return int.from_bytes(file.read()[10:12], "little")


def load_arrays(path: Path, next_step: str) -> tuple[dict[str, NDArray[Any]], bool]:
    """(the arrays, whether a checksum was compared: older versions wrote none).

    Raises FileNotFoundError, StorageError, and Damaged for a file that holds anything else than what was written.
    """

    def load() -> dict[str, NDArray[Any]]:
        with np.load(path, allow_pickle=False) as file:
            if len(file.files) != counted(path):
                raise ValueError("its table of contents is damaged")
            return {name: file[name] for name in file.files}

    try:
        arrays = patiently(load, path, ANYWHERE)
        kept = arrays.pop(KEY, None)
        if kept is not None and kept.tobytes() != of_arrays(arrays).encode():
            raise ValueError(DIFFERS)
    except (FileNotFoundError, StorageError):
        raise
    except Exception as error:  # numpy and zipfile report damage in a dozen ways
        raise Damaged(path, str(error) or type(error).__name__, next_step) from None
    return arrays, kept is not None
