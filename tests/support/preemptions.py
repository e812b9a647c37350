"""Runs that a stop signal interrupts at seeded moments, compared with the undisturbed run:

    PYTHONPATH=.:tests python tests/support/preemptions.py --count 60


A moment is the k-th call of a function of the product: the spy there sends the process a real signal. Every rank is a
process that imports the product once and goes through all schedules, so a dozen of them take a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fixres_dist.base.small_files import read_lines
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models import batchnorm
from fixres_dist.runs import checkpoint
from fixres_dist.runs.preparation import prepare
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import loop, predict, results, session, throughput, worker
from support.commands import ROOT, environment
from support.folders import write_photos

# Where a signal can come: an object of the product and the function that is called there.
MOMENTS: dict[str, tuple[Any, str]] = {
    "start-up": (worker, "open_session"),
    "features": (session.Session, "trunk_features"),
    "evaluation": (predict, "score"),
    "statistics": (batchnorm.Moments, "add"),
    "batch": (throughput.Meter, "add"),
    "step": (loop, "backward"),
    "save": (checkpoint.Writer, "save"),
    "stage end": (loop, "frozen_digest"),
    "results": (results, "write_results"),
    "export": (loop, "write_weights"),
}
ITEMS = (
    *("model.name=test_efficientnet", "model.timm_name=test_efficientnet", "model.weights=none", "data.res=64"),
    *("data.workers=0", "data.train_transform=test", "data.resize_rule=fixefficientnet", "tune.global_batch=12"),
    *("tune.base_lr=0.02", "tune.epochs=2", "run.batch_per_device=4", "run.log_every=1", "run.precision=fp32"),
    *("run.memory_format=channels_last", "run.record_samples=true", "pretrain.epochs=1", "pretrain.res=64"),
    *("pretrain.global_batch=12", "pretrain.base_lr=0.05"),
)


@dataclass(frozen=True)
class Schedule:
    """A run, and the signals that come in its starts: (rank, moment, after how many of its calls), one a start."""

    name: str
    engine: str
    stops: tuple[tuple[int, str, int], ...] = ()

    def prepare(self, runs: Path, data: Path, *more: str) -> None:
        items = [
            *ITEMS,
            *more,
            f"data.root={data}",
            f"run.engine={self.engine}",
            f"run.feature_cache={runs}/{self.name}-features",
        ]
        prepare(runs / self.name, reading.parse(Config, reading.overrides(items)), "test")


def signal_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Spy:
    """Counts the calls of the moments' functions, and interrupts the run at the one that is planned."""

    def __init__(
        self, interrupt: Callable[[], None] = signal_myself, moments: Mapping[str, tuple[Any, str]] = MOMENTS
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.plan: tuple[str, int] | None = None
        self.interrupt = interrupt
        for name, (owner, function) in moments.items():
            setattr(owner, function, self.spied(name, getattr(owner, function)))

    def spied(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count(name)
            return function(*arguments, **named)

        return call

    def count(self, name: str) -> None:
        self.calls[name] += 1
        if self.plan == (name, self.calls[name]):
            self.interrupt()


def be_a_rank(runs: Path, schedules: list[Schedule]) -> None:
    """Go through every schedule's starts until its run is done; calls.json of each has the calls of rank 0's starts."""
    torch.set_num_threads(1)
    spy, rank = Spy(), int(os.environ["RANK"])
    for schedule in schedules:
        run, started = RunDir(runs / schedule.name), []
        for start in range(len(schedule.stops) + 1):
            stops = schedule.stops[start : start + 1]
            spy.calls.clear()
            spy.plan = next(((moment, k) for who, moment, k in stops if who == rank), None)
            os.environ["TORCHELASTIC_RUN_ID"] = f"{schedule.name}-{start}"
            code = worker.train(run.root)
            started.append(spy.calls.copy())
            if code == 0:
                break
            assert code == 1
        if rank == 0:
            (run.root / "calls.json").write_text(json.dumps(started))


def start_ranks(runs: Path, ranks: int, schedules: list[Schedule]) -> None:
    launcher = {
        "TORCHELASTIC_RUN_ID": "",
        "MASTER_PORT": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    plan = json.dumps([[s.name, s.engine, s.stops] for s in schedules])
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(runs), plan],
            env={
                **environment(),
                **launcher,
                "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "TORCHELASTIC_RUN_ID": "",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=1800)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(text[-4000:] for text in said)


def seeded(count: int, ranks: int, calls: dict[str, Counter[str]], seed: int) -> list[Schedule]:
    """`count` schedules: every moment in turn, at a drawn call of a drawn rank, half of them with a second stop."""
    draw, found = random.Random(seed), []
    for k in range(count):
        engine = draw.choice(list(calls))
        stops = []
        for moment in (list(MOMENTS)[k % len(MOMENTS)], draw.choice(list(MOMENTS)))[: 1 + draw.randint(0, 1)]:
            engine = "cached" if moment == "features" else engine
            stops.append((draw.randrange(ranks), moment, draw.randint(1, max(1, calls[engine][moment]))))
        found.append(
            Schedule(f"{k:02d}-{'-'.join(moment.replace(' ', '_') for _, moment, _ in stops)}", engine, tuple(stops))
        )
    return found


def written(run: RunDir) -> dict[str, Any]:
    """What a run leaves, without times and speeds."""
    numbers = ("step", "stage", "epoch", "loss", "learning_rate", "grad_norm", "evaluation", "res", "top1", "top5", "n")
    found = json.loads(run.results.read_text())
    return {
        "weights": load_file(run.root / "export" / "model.safetensors"),
        "pretrained": load_file(run.pretrained),
        "checkpoint": {file.name: load_file(file) for file in max(run.checkpoints.glob("step_*")).glob("*.safetensors")},
        "predictions": {w: dict(np.load(run.root / "predictions" / f"{w}.npz")) for w in ("before", "after")},
        "metrics": [{key: line[key] for key in numbers if key in line} for line in read_lines(run.metrics)],
        "results": {key: found[key] for key in ("before", "after", "delta_top1", "images_seen", "n", "skipped")},
        "samples": [[line["step"], line["samples"]] for file in sorted((run.root / "samples").iterdir()) for line in read_lines(file)],
        "state": run.state().state,
        "left over": [path.name for path in (run.partial,) if path.exists()],
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


def differences(run: RunDir, calm: RunDir) -> list[str]:
    """In words; empty where the interrupted run ended as the undisturbed one, and made no step or evaluation batch twice."""
    a, b = written(run), written(calm)
    found = [f"{run.name}: other {key}" for key in b if not same(a[key], b[key])]
    starts, (undisturbed,) = (json.loads((r.root / "calls.json").read_text()) for r in (run, calm))
    for moment, most in (("step", len(starts) - 1), ("evaluation", 0), ("statistics", 0)):
        more = sum(start.get(moment, 0) for start in starts) - undisturbed[moment]
        if more > most:
            found.append(f"{run.name}: {more} calls of {moment} more than undisturbed")
    return found


def study(folder: Path, data: Path, ranks: int, count: int, seed: int) -> tuple[int, list[str]]:
    """(stops that interrupted a start, differences) of `count` seeded schedules."""
    calm = [Schedule(f"calm-{engine}", engine) for engine in ("stream", "cached")]
    for schedule in calm:
        schedule.prepare(folder, data)
    start_ranks(folder, ranks, calm)
    calls = {s.engine: Counter(json.loads((folder / s.name / "calls.json").read_text())[0]) for s in calm}
    schedules = seeded(count, ranks, calls, seed)
    for schedule in schedules:
        schedule.prepare(folder, data)
    start_ranks(folder, ranks, schedules)
    found, stops = [], 0
    for schedule in schedules:
        run = RunDir(folder / schedule.name)
        found += differences(run, RunDir(folder / f"calm-{schedule.engine}"))
        stops += len(json.loads((run.root / "calls.json").read_text())) - 1
    return stops, found


def main() -> int:
    if sys.argv[1:2] == ["--rank"]:
        be_a_rank(Path(sys.argv[2]), [Schedule(n, e, tuple(map(tuple, s))) for n, e, s in json.loads(sys.argv[3])])
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="schedules")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = write_photos(Path(folder) / "photos", 28, 11)
        stops, found = study(Path(folder), data, args.ranks, args.count, args.seed)
    print(*found, f"{args.count} runs, {stops} stops, {len(found)} differences", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
