"""One stage one for many runs: trained once, taken by the others, and not lost where its run was stopped."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.clock import own_clock

from fixres_dist.base import locks
from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import append, read_lines, write_json
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs import preparation
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import loop, stage_one, worker


def prepared(root: Path, photos: Path, res: int, cache: str = "cache", seed: int = 0) -> RunDir:
    items = (
        *("model.name=test_efficientnet", "model.timm_name=test_efficientnet", "model.weights=none"),
        *(f"data.root={photos}", f"data.res={res}", "data.workers=0", f"data.cache={root.parent / cache}"),
        *("tune.epochs=1", "tune.global_batch=42", "run.precision=fp32", "run.log_every=1", f"run.seed={seed}"),
        *("run.memory_format=channels_last", "pretrain.res=64", "pretrain.epochs=2", "pretrain.global_batch=28"),
    )
    return preparation.prepare(root, reading.parse(Config, reading.overrides(list(items))), "submit")


class Steps:
    """Counts the optimizer steps of stage one, and stops a start at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.count, self.stop, self.flag = loop.backward, 0, -1, StopFlag()
        monkeypatch.setattr(loop, "backward", self)

    def __call__(self, work: Any, head: Any, scale: Any, step: int, *rest: Any) -> list[int]:
        self.count += work.stage.name == "pretrain"
        self.flag.signal = 15 if step == self.stop else self.flag.signal
        return self.real(work, head, scale, step, *rest)

    def train(self, run: RunDir, stop: int = -1) -> tuple[int, int]:
        """(exit code, steps of stage one)."""
        self.count, self.stop, self.flag = 0, stop, StopFlag()
        return worker.train(run.root, self.flag), self.count


def same(a: RunDir, b: RunDir) -> bool:
    """Weights, predictions, metrics and results, bit for bit, without times."""
    files = ("pretrained.safetensors", "export/model.safetensors")
    for x, y in ((load_file(a.root / file), load_file(b.root / file)) for file in files):
        assert all(torch.equal(x[name], y[name]) for name in x)
    names = sorted(file.name for file in (a.root / "predictions").iterdir())
    assert names == sorted(file.name for file in (b.root / "predictions").iterdir())
    for name in names:
        x, y = (dict(np.load(run.root / "predictions" / name)) for run in (a, b))
        assert all(np.array_equal(x[key], y[key], equal_nan=key == "confidence") for key in x)
    untimed = ("time", "seconds", "images_per_second", "data_wait_percent", "memory_gib", "cpu_memory_gib")
    x, y = ([{k: v for k, v in line.items() if k not in untimed} for line in read_lines(run.metrics)] for run in (a, b))
    assert x == y
    x, y = (Results.read(run) for run in (a, b))
    return (x.before, x.after, x.before_at, x.best_before, x.images_seen) == (
        *(y.before, y.after, y.before_at, y.best_before, y.images_seen),
    )


def test_a_grid_over_sizes_trains_it_once(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    first, second = prepared(tmp_path / "res=64", photos, 64), prepared(tmp_path / "res=96", photos, 96)
    assert [steps.train(first), steps.train(second)] == [(0, 6), (0, 0)]
    (line,) = (x for x in read_lines(second.events) if x["event"] == "stage one taken")
    assert line["trained_by"] == str(first.root)
    alone = prepared(tmp_path / "alone", photos, 96, "another cache")
    assert steps.train(alone) == (0, 6)
    assert same(second, alone)
    assert steps.train(prepared(tmp_path / "seed=1", photos, 64, seed=1)) == (0, 6), "another stage one"
    # A result that is damaged is made again; one that others could have written is left alone.
    for weights in (tmp_path / "cache" / "stage_one").glob("*/result/pretrained.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert steps.train(prepared(tmp_path / "damaged", photos, 64)) == (0, 6)
    for name in ("predictions.npz", "metrics.jsonl"):  # a scratch file system purges single files
        for file in (tmp_path / "cache" / "stage_one").glob(f"*/result/{name}"):
            file.unlink()
        assert steps.train(prepared(tmp_path / f"without {name}", photos, 64)) == (0, 6)
    for folder in (tmp_path / "cache" / "stage_one").iterdir():
        folder.chmod(0o777)
    assert steps.train(prepared(tmp_path / "foreign", photos, 64)) == (0, 6)
    assert steps.train(prepared(tmp_path / "own again", photos, 96)) == (0, 0), "from this user's own beside it"


def test_a_kill_while_one_is_adopted_loses_no_line(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint came first, and a start that found it did not look for the lines."""
    steps = Steps(monkeypatch)
    stopped, other = prepared(tmp_path / "stopped", photos, 64), prepared(tmp_path / "other", photos, 64)
    assert steps.train(stopped, stop=3) == (1, 4)
    lines = itertools.count()

    def killed(path: Path, line: dict[str, Any]) -> None:
        if next(lines) == 1:
            raise RuntimeError("killed")
        append(path, line)

    with monkeypatch.context() as patched:
        patched.setattr(stage_one, "append", killed)
        with pytest.raises(RuntimeError, match="killed"):
            steps.train(other)
    assert steps.train(other)[0] == 0
    trained = [line["step"] for line in read_lines(other.metrics) if line.get("stage") == "pretrain"]
    assert trained == [1, 2, 3, 4, 5, 6]


def test_a_stopped_one_is_gone_on_with(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the run that waits; the stopped one takes the result when it is started again. All end as undisturbed."""
    steps = Steps(monkeypatch)
    stopped, other = prepared(tmp_path / "stopped", photos, 64), prepared(tmp_path / "other", photos, 96)
    assert steps.train(stopped, stop=3) == (1, 4)
    for run in (stopped, other):
        write_json(run.root / "choices.json", {"stage one's" if run is stopped else "own": {"x": 1}}, sealed=True)
    (place,) = (tmp_path / "cache" / "stage_one").iterdir()
    held, waits = locks.lock(place / ".lock"), []
    held.__enter__()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            held.__exit__(None, None, None)

    own_clock(monkeypatch, stage_one, sleep=wait)
    assert steps.train(other) == (0, 2), "from the stopped one's checkpoint"
    assert [x["event"] for x in read_lines(other.events) if "stage one" in x["event"]] == [
        *("waiting for stage one", "stage one adopted")
    ]
    assert len(waits) == 2
    assert other.root.joinpath("choices.json").read_text().count("stage one's") == 1, "what the stopped one has decided"
    assert steps.train(stopped) == (0, 0)
    calm = prepared(tmp_path / "calm", photos, 64, "another cache")
    assert steps.train(calm) == (0, 6)
    assert same(stopped, calm)
    shutil.rmtree(stopped.root)  # the cache has a copy of its own
    assert steps.train(prepared(tmp_path / "later", photos, 64)) == (0, 0)
