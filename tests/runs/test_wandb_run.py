"""run.logger=wandb: W&B's own client, offline, has the points of TensorBoard that a start adds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config, Run
from fixres_dist.runs import wandb_run
from fixres_dist.runs.results import Summary
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.tracking import Tracker

BLOCK = 1 << 15
VALUES = {"loss": 0.5, "learning_rate": 1e-3, "images_per_second": 100.0, "data_wait_percent": 3.0, "memory_gib": 0.0}


def records(file: Path) -> Iterator[bytes]:
    """Of W&B's file: 7 bytes of header, then LevelDB's log format, blocks of 32 KiB with parts of records."""
    data, at, found = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        found += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield found
            found = b""


def kept(run: RunDir) -> tuple[list[str], list[dict[str, float]]]:
    """(ids, rows) of W&B's offline files, in the order of their starts."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, rows = [], []
    for file in sorted((run.root / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime):
        for record in map(Record.FromString, records(file)):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


def test_each_start_adds_its_points_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, config = RunDir(tmp_path), Config(run=Run(logger="wandb"))
    for step in (1, 2):
        log = Tracker(run, config, step - 1, total_steps=9)
        log.step(step, "fix", step / 4, VALUES | {"loss": float(step)})
        log.evaluation(step, f"fix epoch {step}", config.data.res, Summary(70.0, 90.0, 1.0, 33, 0), 1.0)
        log.close()
    deadline = time.monotonic() + 30
    while (
        sum("eval/top1" in row for row in kept(run)[1]) < 2 and time.monotonic() < deadline
    ):  # W&B's own process writes
        time.sleep(0.1)
    ids, rows = kept(run)
    assert len(set(ids)) == 1
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 1.0), (2, 2.0)]
    assert [(row["step"], row["eval/top1"]) for row in rows if "eval/top1" in row] == [(1, 70.0), (2, 70.0)]


def test_a_missing_package_is_refused_with_the_next_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run.logger=wandb needs the package wandb. Next: pip install"):
        wandb_run.check()
