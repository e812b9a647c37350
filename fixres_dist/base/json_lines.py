"""Files with a JSON object per line. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fixres_dist.base.files import write_text


def append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


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
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_lines(path) if kept(line)))
