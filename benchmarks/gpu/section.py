"""The time, the scratch folder and the processes of one section of checks.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fixres_dist.bench import turns

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Section:
    name: str
    cpu: bool  # tiny sizes, without a GPU
    settings: list[str]  # section.key=value, of every run
    scratch: Path
    until: float  # on time.monotonic()'s clock
    write: Callable[[str, dict[str, Any]], None]

    @property
    def left_s(self) -> float:
        return max(1.0, self.until - time.monotonic())

    @property
    def log(self) -> Path:
        return self.scratch / "log.txt"

    def save(self, found: dict[str, Any]) -> None:
        """Write the section as far as it is."""
        self.write(self.name, found)

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The first value of a generator function in a process of its own."""
        return turns.once(partial(function, *arguments), self.left_s)

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as file:
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)

    def finish(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code; 124 where its process group was killed at the end of the section's time."""
        try:
            return process.wait(self.left_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124


def tail(*files: Path) -> str:
    return "".join(file.read_text(errors="replace")[-1500:] for file in files if file.exists())
