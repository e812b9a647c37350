"""Files with a JSON object per line. A line that a kill cut off is dropped. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fixres_dist.base.files import write_text


def append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON-lines file; a line torn by a kill is dropped."""
    lines = []
    try:
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    except FileNotFoundError:
        pass
    return lines


def keep_lines(path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drop what a killed start wrote beyond the checkpoint it is resumed from, so that nothing stands there twice."""
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_lines(path) if kept(line)))
