"""Rows and ratios of a `bench` command: for JSON and as a table."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fixres_dist.base.commands import command
from fixres_dist.base.environment import processor, versions
from fixres_dist.base.text import table
from fixres_dist.bench.turns import Turn

Ratios = dict[str, dict[str, float]]  # ratio: row: value


@dataclass(frozen=True)
class Row:
    """Medians over the turns; `peak_memory_mib` is the highest, `n` counts all images."""

    name: str
    images_per_second: float
    cpu_ms_per_image: float
    peak_memory_mib: float
    n: int


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # variant: why
    ratios: dict[str, Any] = field(default_factory=dict)
    rows_vs: Ratios = field(default_factory=dict)
    cached: dict[str, float] = field(default_factory=dict)  # seconds and speedups of runs with and without the cache

    def add(self, part: Result, model: str) -> None:
        """Append a model's result, its name before every row's."""
        self.rows += [replace(row, name=f"{model}: {row.name}") for row in part.rows]
        self.failed |= {f"{model}: {name}": reason for name, reason in part.failed.items()}
        for key, value in part.ratios.items():
            self.ratios.setdefault(key, {})[model] = value
        for key, values in part.rows_vs.items():
            self.rows_vs.setdefault(key, {}).update({f"{model}: {name}": value for name, value in values.items()})

    def json(self, stage: str) -> dict[str, Any]:
        about = {"hardware": hardware(), "versions": versions()}
        return {"stage": stage, **about, "command": command("bench", *sys.argv[2:]), **asdict(self)}

    def text(self) -> str:
        """The table, with the ratios that are given by row as columns."""
        names = {row.name for row in self.rows}
        given = {**self.ratios, **self.rows_vs}
        columns = {head: v for head, v in given.items() if isinstance(v, dict) and names & v.keys()}
        cells = [
            [
                *(row.name, f"{row.images_per_second:.1f}", f"{row.cpu_ms_per_image:.2f}"),
                *(f"{row.peak_memory_mib:.0f}", str(row.n)),
                *(f"{values[row.name]:.2f}" if row.name in values else "" for values in columns.values()),
            ]
            for row in self.rows
        ]
        machine, installed = hardware(), versions()
        where = machine.get("gpu") or f"{machine['cpus']} CPUs of {machine['processor']}, {machine['threads']} threads"
        lines = [f"{where}, load {machine['load_average'][0]}; torch {installed['torch']}, timm {installed['timm']}"]
        lines += [table(["", "images/s", "CPU-ms/image", "peak MiB", "n", *columns], cells)] if cells else []
        lines += [f"{name}: {value}" for name, value in self.cached.items()]
        return "\n".join([*lines, *(f"{name} FAILED: {reason}" for name, reason in self.failed.items())])


def row_of(name: str, turns: list[Turn], batch: int = 0) -> Row:
    """The row of a variant's turns. `batch`: as asked for; if the turns had a smaller one, the name tells it."""
    found = turns[-1].batch
    return Row(
        name if found == batch or not batch else f"{name}, batch {found}",
        round(median(t.images / t.wall_s for t in turns), 2),
        round(median(1000 * t.cpu_s / t.images for t in turns), 3),
        round(max(t.peak_mib for t in turns), 1),
        sum(t.images for t in turns),
    )


def hardware() -> dict[str, Any]:
    """The processors that a number depends on; the load average tells how quiet the machine was."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    found: dict[str, Any] = {
        "processor": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
