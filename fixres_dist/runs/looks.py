"""How often a validation split has been evaluated on: what is chosen among many numbers on it is better there than elsewhere.

results.json counts them by the fingerprint of the split's list of files, so runs on one data set can be added up. No torch.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from fixres_dist.base.errors import UserError
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir


def count(run: RunDir, sample_list: str, command: str, evaluations: int) -> None:
    """Add what a command has evaluated on the split with this fingerprint: models times sizes. A run that is not finished,
    or that this user may not write to, is left as it is."""
    with contextlib.suppress(UserError, OSError), run.lock(".results.lock", wait_s=60):
        results = Results.read(run)
        known = results.looks.get(sample_list, {})
        looks = {**results.looks, sample_list: {**known, command: known.get(command, 0) + evaluations}}
        replace(results, looks=looks).write(run)


def sentences(found: Iterable[tuple[str, Results]]) -> list[str]:
    """Of runs by name: for every list of files how often it was evaluated on, by which commands and runs."""
    by_list: dict[str, Counter[str]] = {}
    runs: dict[str, list[str]] = {}
    for name, results in found:
        for sample_list, commands in results.looks.items():
            by_list.setdefault(sample_list, Counter()).update(commands)
            runs.setdefault(sample_list, []).append(name)
    return [
        f"The validation images of {', '.join(runs[sample_list])} (list {sample_list}) have been evaluated on "
        f"{counts.total()} times: {', '.join(f'{n} by {command}' for command, n in counts.most_common())}. What was chosen "
        "among these is better here than on new pictures"
        for sample_list, counts in by_list.items()
    ]
