"""Of what the starts of one run are made, and what another start may change: docs/reliability.md has the rule. No torch.

Settings, sample lists and frozen weights must match, whatever is accepted: the checkpoint's fingerprint holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fixres_dist.base.environment import cache_folder, versions
from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged, put_aside, read_json, read_lines, write_json
from fixres_dist.config.schema import Data
from fixres_dist.data import dataset
from fixres_dist.data.index import cache_file
from fixres_dist.runs import snapshots
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

# Another release of it may build another function from the same weights, or prepare pictures otherwise.
BUILDS_NETWORKS = "timm"


@dataclass(frozen=True)
class Start:
    """Kept in start.json, of the newest start, and with each start's event `made of`."""

    code: str  # digest of the package that runs
    versions: dict[str, str | None]
    pictures: dict[str, str]  # of each split, the digest of its files' lengths and first bytes (Index.contents)

    @staticmethod
    def now(pictures: Mapping[str, str]) -> Start:
        return Start(snapshots.digest(Path(__file__).resolve().parents[1]), versions(), dict(pictures))


def changes(before: Start, now: Start) -> tuple[list[str], list[str]]:
    """(what is refused, what is told) of the differences."""
    refused: list[str] = []
    told: list[str] = []
    for split in sorted(before.pictures.keys() & now.pictures):
        if before.pictures[split] != now.pictures[split]:
            refused.append(f"pictures of {split} are others, of the same names and sizes")
    for name, old in before.versions.items():
        new = now.versions.get(name)
        if old != new:
            release = [str(version).split(".")[:2] for version in (old, new)]
            of_network = name == BUILDS_NETWORKS and release[0] != release[1]
            (refused if of_network else told).append(f"{name} was {old} and is {new}")
    if before.code != now.code:
        told.append(f"the code was {before.code} and is {now.code}")
    return refused, told


def newest(run: RunDir) -> Start | None:
    """What the start before was made of; None for the first one, and for a run of an older version."""
    try:
        return read_json(run.start_file, Start, "")
    except FileNotFoundError:
        return None
    except Damaged as error:
        print(f"{error.why}: {run.start_file} is not compared, and is written again", flush=True)
        run.event("rebuilt", file=run.start_file.name, reason=error.why)
        put_aside(run.start_file)
        return None


def check(run: RunDir, data: Data, accept: bool) -> None:
    """At submission: refuse what `begin` would refuse, as far as this machine has an index of the pictures. `accept`: let
    the next start differ in all that is refused otherwise. Raises UserError."""
    if not run.start_file.exists():
        return
    if accept:
        run.event("change accepted", before=asdict(before) if (before := newest(run)) else None)
        run.start_file.unlink(missing_ok=True)
        return
    if before := newest(run):
        refuse(run, changes(before, Start.now(indexed(data)))[0])


def indexed(data: Data) -> dict[str, str]:
    """Digests of the pictures of the splits that have been indexed here."""
    found, root = {}, dataset.folder(data.root, data.cache)
    for split in ("train", "val"):
        where = root / data.split_name(split)
        if cache_file(where, cache_folder(data.cache)).exists():
            index = dataset.of(data, where, "skip", show=False)
            found[split] = index.contents
    return found


def begin(run: RunDir, pictures: Mapping[str, str]) -> None:
    """Rank 0, before the first stage: compare this start with the one before, and keep what it is made of. Raises UserError."""
    before, now = newest(run), Start.now(pictures)
    snapshot = snapshots.keep(run.code)
    if before:
        refused, told = changes(before, now)
        refuse(run, refused)
        if told:
            kept = f"; the earlier snapshot: {snapshot.name}" if snapshot else ""
            print(f"other than at the start before: {'; '.join(told)}{kept}", flush=True)
            run.event("changed", what=told)
    if before != now:
        write_json(run.start_file, asdict(now), sealed=True)
    run.event("made of", **asdict(replace(now, versions={k: v for k, v in now.versions.items() if v})))


def device_seconds(run: RunDir) -> float:
    """Seconds that all starts together have held their devices, ranks times time; a start ends with the last line that it wrote."""
    total, began, ranks, last = 0.0, 0.0, 0, 0.0
    lines = [*read_lines(run.events, event=str, time=float), *read_lines(run.metrics, step=int, time=float)]
    for line in sorted(lines, key=lambda line: float(line["time"])):
        if line.get("event") in (Event.STARTED, Event.SUBMITTED, Event.LOST):
            total, ranks = total + ranks * (last - began), 0
        if line.get("event") == Event.STARTED:
            began, ranks = line["time"], int(line.get("world_size") or 1)
        last = line["time"]
    return total + ranks * (last - began)


def refuse(run: RunDir, refused: list[str]) -> None:
    if refused:
        raise UserError(
            f"this start of {run.name} is not made of what the start before was: {'; '.join(refused)}. Its numbers would be of "
            "neither. Next: put back what changed, or start under another --name; or "
            f"{run.command('resume', '--accept-change')} goes on all the same"
        )
