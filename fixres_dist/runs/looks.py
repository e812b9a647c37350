"""How often a set of labelled images has been evaluated on: what is chosen among many numbers on it is better there than elsewhere.

results.json counts them by the fingerprint of the set's list of files, so runs on one data set can be added up. No torch.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import read_lines
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir

TRAINING = "training"  # whose evaluations are lines of metrics.jsonl; of the run's own validation split


def run_of(weights: Path) -> RunDir | None:
    """The run in whose directory the folder of these weights stands, as its export does; None for a copy elsewhere."""
    run = RunDir(weights.resolve().parent.parent)
    return run if run.results.exists() else None


def count(run: RunDir, sample_list: str, command: str, evaluations: int) -> None:
    """Add what a command has evaluated on the set with this fingerprint: models times sizes. A run that is not finished,
    or that this user may not write to, is left as it is."""
    with contextlib.suppress(UserError, OSError), run.lock(".results.lock", wait_s=60):
        results = Results.read(run)
        known = results.looks.get(sample_list, {})
        looks = {**results.looks, sample_list: {**known, command: known.get(command, 0) + evaluations}}
        replace(results, looks=looks).write(run)


def by_command(runs: Iterable[RunDir], sample_list: str) -> Counter[str]:
    """Evaluations of finished runs on the set with this fingerprint, by the command that made them; those of a stage one that
    several runs have taken (training/stage_one.py) are one."""
    found: Counter[str] = Counter()
    lines: list[str] = []
    for run in runs:
        looks = Results.read(run).looks
        own = [json.dumps(line) for line in read_lines(run.metrics, evaluation=str)]
        known = looks.get(sample_list, {}) if looks else {TRAINING: len(own)}  # an older version has not counted
        found.update(known)
        lines += own if TRAINING in known else []
    found[TRAINING] -= len(lines) - len(set(lines))
    return +found


def sentences(runs: Sequence[RunDir]) -> list[str]:
    """For every list of files that finished runs were evaluated on: how often, by which commands and runs."""
    by_list: dict[str, list[RunDir]] = {}
    for run in runs:
        for sample_list in Results.read(run).looks:
            by_list.setdefault(sample_list, []).append(run)
    found = []
    for sample_list, measured in by_list.items():
        counts, names = by_command(measured, sample_list), ", ".join(run.name for run in measured)
        images = f"The validation images of {names}" if TRAINING in counts else f"Other images, with {names},"
        found.append(
            f"{images} (list {sample_list}) have been evaluated on {counts.total()} times: "
            f"{', '.join(f'{n} by {command}' for command, n in counts.most_common())}. What was chosen among these is "
            "better here than on new pictures"
        )
    return found
