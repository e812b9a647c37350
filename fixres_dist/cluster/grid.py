"""The closing table of several runs, such as a grid: the settings in which they differ, and what came out. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from fixres_dist.base.errors import StorageError, UserError
from fixres_dist.base.secrets import redacted
from fixres_dist.base.text import table
from fixres_dist.cluster import status
from fixres_dist.config.schema import Config
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED

RESULT = ("STATE", "TOP-1 BEFORE", "AFTER", "GAIN (PAIRED 95 %)")


def closing_table(runs: Sequence[RunDir], rows: Sequence[status.Row] | None = None) -> str:
    """A line for each run; empty for a run alone, and before all have ended. `rows`: theirs in `status`, if known.

    Jobs of commands, such as the last one of a study, have no line.
    """
    rows = status.rows(runs) if rows is None else rows
    kept = [pair for pair in zip(runs, rows, strict=True) if not pair[0].task]
    runs, rows = [run for run, _ in kept], [row for _, row in kept]
    if len(runs) < 2 or any(row.state in UNFINISHED for row in rows):
        return ""
    settings = [values(run) for run in runs]
    keys = differing(settings)
    lines = [
        (run.name, *(found.get(key, "") for key in keys), row.state, *results(run))
        for run, row, found in zip(runs, rows, settings, strict=True)
    ]
    return table(("RUN", *keys, *RESULT), lines)


def differing(settings: Sequence[dict[str, str]]) -> list[str]:
    """The keys whose values are not the same in all of `settings`."""
    keys = dict.fromkeys(key for found in settings for key in found)
    differ = [key for key in keys if len({found.get(key) for found in settings if found}) > 1]
    follows = {"model.name", "model.weights"} & {*differ}  # timm's name of the model follows from these
    return [key for key in differ if not (follows and key == "model.timm_name")]


def values(run: RunDir) -> dict[str, str]:
    """The run's settings as text by `section.key`, without secrets; none where its configuration cannot be read."""
    try:
        config: Config = run.config()
    except (UserError, StorageError):
        return {}
    sections = {section: keys or {} for section, keys in asdict(config).items()}
    return {
        f"{section}.{key}": redacted(as_text(value), config.cluster.env)
        for section, keys in sections.items()
        for key, value in keys.items()
    }


def as_text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def results(run: RunDir) -> tuple[str, ...]:
    """The cells under RESULT after the state; none for a run without results."""
    try:
        found = Results.read(run)
    except (UserError, StorageError):
        return ("", "", "")
    return f"{found.before.top1:.2f}", f"{found.after.top1:.2f}", str(found.gain)
