"""Tensors in a safetensors file with a checksum in its header, which is compared when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fixres_dist.base.checksums import DIFFERS, KEY, digest
from fixres_dist.base.errors import first_line
from fixres_dist.base.small_files import Damaged

Tensors = dict[str, torch.Tensor]


def checksum(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str]) -> str:
    """Of the tensors' names, number formats, shapes and values, and of the header's other texts."""
    parts = [
        (f"{name} {t.dtype} {tuple(t.shape)}", t.contiguous().view(-1).view(torch.uint8)) for name, t in tensors.items()
    ]
    texts = [(f"header {name}", value.encode()) for name, value in meta.items() if name not in (KEY, "format")]
    return digest([*((name, data.numpy().data) for name, data in parts), *texts])


def save(part: Path, tensors: Tensors, meta: Mapping[str, str] | None = None) -> str:
    """Write contiguous CPU tensors to `part`, a temporary path; returns the checksum."""
    found = checksum(tensors, meta or {})
    save_file(tensors, part, {**(meta or {}), KEY: found, "format": "pt"})
    sort_header(part)
    return found


def sort_header(part: Path) -> None:
    """Put the header's texts in the order of their names: safetensors' own changes from process to process, and equal tensors
    are to be equal files."""
    with open(part, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:  # else another way to write the same JSON, which stays
            file.seek(8)
            file.write(text)


def load(path: Path, next_step: str) -> tuple[Tensors, str]:
    """(tensors on the CPU, their checksum; empty of a file that has none: an older version's, or another program's).

    Raises FileNotFoundError, and Damaged for a file that holds anything else than what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        kept = meta.get(KEY, "")
        if kept and kept != checksum(tensors, meta):
            raise ValueError(DIFFERS)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has one of its own for its format, torch others for its contents
        raise Damaged(path, first_line(error), next_step) from None
    return tensors, kept
