"""JSON as this project writes it, whole files and files with an object per line. No torch."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fixres_dist.base.files import write_text


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON text; null where a number is not finite, since JSON has no NaN and other readers refuse it."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(with_nulls(value), indent=indent, allow_nan=False)


def with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write by rename, as write_text does."""
    write_text(path, as_json(value, indent=1) + "\n")


def append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(as_json(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are complete (a kill may have cut one off) and undamaged; none where there is no file."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def keep_lines(path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the other lines, such as those that a killed start wrote after the checkpoint from which the run resumes."""
    if path.exists():
        write_text(path, "".join(as_json(line) + "\n" for line in read_lines(path) if kept(line)))
