"""The study of preemptions.py on the dev cluster, where a rank has Slurm disturb its own job at seeded moments:

    PYTHONPATH=.:tests python tests/support/slurm_preemptions.py --stops 60

Half of the stops come on a cluster that sends preempted jobs its user signal, half on one without. The job is preempted by
one of higher priority, gets a signal by hand, or is requeued by hand. The rank waits at the moment until it has heard.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import read_lines
from fixres_dist.cluster import jobs
from fixres_dist.runs.rundir import RunDir
from support.commands import ROOT
from support.folders import write_photos
from support.slurm_service import slurm_here

MOMENTS = ("imports", "start-up", "features", "evaluation", "statistics", "step", "save", "results", "export")
HOW: dict[str, tuple[str, ...]] = {
    "preempted": ("sbatch", "-p", "high", "-N2", "-w{nodes}", "--gpus-per-node=8", "-o/dev/null", "--wrap=true"),
    "signalled": ("scancel", "--signal={signal}", "{job}"),
    "requeued": ("scontrol", "requeue", "{job}"),
}
CLUSTER = (
    *("cluster.nodes=2", "cluster.gpus_per_node=1", "cluster.cpus_per_task=1", "cluster.mem=1000M", "cluster.partition=low"),
    *("cluster.time=1:00:00", "cluster.signal_delay_s=30", f"cluster.env={{OMP_NUM_THREADS: 1, PYTHONPATH: {ROOT}/tests}}"),
)  # fmt: skip
HEAR_S = 60.0


@dataclass(frozen=True)
class Stop:
    """In the start that it belongs to, `rank` disturbs the job `how` at its `k`-th call of `moment`; then it is deaf."""

    rank: int
    moment: str
    k: int
    how: str
    deaf_s: float = 0.0  # a step that lasts so long after the warning


class SpiedJob:
    """TrainJob, whose ranks count their calls into calls/START-RANK.json and carry out schedule.json."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> int:
        flag, run = StopFlag().install(), Path(self.folder)
        start, rank = int(os.environ.get("SLURM_RESTART_COUNT", 0)), int(os.environ["SLURM_PROCID"])
        stops = [Stop(**stop) for stop in json.loads((run / "schedule.json").read_text())]
        stop = next((s for s in stops[start : start + 1] if s.rank == rank), None)

        def disturb() -> None:
            assert stop
            values = {"nodes": os.environ["SLURM_JOB_NODELIST"], "job": os.environ["SLURM_JOB_ID"]}
            values["signal"] = "USR2" if (run / "user-signal").exists() else "TERM"
            command = [word.format(**values) for word in HOW[stop.how]]
            # This command is a process of the step too: the signal that it sends must not end it.
            command = ["sh", "-c", 'trap "" USR2 TERM; exec "$@"', "sh", *command]
            subprocess.run(command, env=slurm_here_environment(), check=True, capture_output=True)
            deadline = time.monotonic() + HEAR_S
            while not flag.signal:
                assert time.monotonic() < deadline, f"{command} brought no signal"
                time.sleep(0.01)
            time.sleep(stop.deaf_s)

        if stop and stop.moment == "imports":
            disturb()
        from fixres_dist.training import worker
        from support.preemptions import Spy

        class Writing(Spy):
            def count(self, name: str) -> None:
                super().count(name)
                file = run / "calls" / f"{start}-{rank}.json"
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(self.calls))

        spy = Writing(disturb)
        spy.plan = (stop.moment, stop.k) if stop else None
        raise SystemExit(worker.train(run, flag))


def slurm_here_environment() -> dict[str, str]:
    """Of a shell outside of the job: sbatch would take over the job's own variables."""
    return {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(("SLURM", "SBATCH", "SRUN"))}


def run_all(folder: Path, named: dict[str, tuple[str, Sequence[Stop]]], data: Path, user_signal: bool) -> None:
    """Submit the runs one after the other, by name (engine, stops), each with its ranks on two nodes, to their ends."""
    from support.preemptions import Schedule

    for name, (engine, stops) in named.items():
        Schedule(name, engine).prepare(folder, data, *CLUSTER)
        run = RunDir(folder / name)
        (run.root / "schedule.json").write_text(json.dumps([vars(stop) for stop in stops]))
        if user_signal:
            (run.root / "user-signal").touch()
        (job,) = jobs.submit_slurm(run.config(), [run], SpiedJob)
        deadline = time.monotonic() + 600
        while not run.done.exists() and not run.failed.exists():
            assert time.monotonic() < deadline, f"{name}: {run.state()}"
            # Its owner may skip the time for which Slurm holds a requeued job.
            subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True)
            time.sleep(0.5)
        count = len([line for line in read_lines(run.events) if line["event"] == "started"])
        files = [run.root / "calls" / f"{start}-0.json" for start in range(len(stops) + 1)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        (run.root / "calls.json").write_text(json.dumps(found))
        print(f"{name}: {count} starts, {run.state().restarts}", flush=True)


def seeded(count: int, calls: dict[str, Counter[str]], seed: int) -> dict[str, tuple[str, list[Stop]]]:
    """Schedules with `count` stops in all: every moment and every way in turn, at a drawn call of a drawn rank."""
    draw, found = random.Random(seed), {}
    moments = [MOMENTS[k % len(MOMENTS)] for k in range(count)]
    draw.shuffle(moments)
    while moments:
        stops, engine = [], draw.choice(list(calls))
        for moment in [moments.pop() for _ in range(min(len(moments), draw.randint(1, 2)))]:
            engine = "cached" if moment == "features" else engine
            # A signal by hand would end a process that has no handler yet; Slurm's own is judged by the batch script.
            how = draw.choice([how for how in HOW if (moment, how) != ("imports", "signalled")])
            # Rank 0 alone writes results.
            rank = 0 if moment in ("results", "export", "save") else draw.randrange(2)
            stops.append(Stop(rank, moment, draw.randint(1, max(1, calls[engine][moment])), how))
        name = "-".join([f"{len(found):02d}", *(f"{s.moment}_{s.how}" for s in stops)])
        found[name] = (engine, stops)
    return found


def differences(run: RunDir, calm: RunDir) -> list[str]:
    """As preemptions.differences; and the job is one."""
    from support import preemptions

    if run.failed.exists():
        return [f"{run.name}: {run.failed.read_text()}"]
    found = preemptions.differences(run, calm)
    started = [line for line in read_lines(run.events) if line["event"] == "started"]
    if len({line["job_id"] for line in started}) != 1:
        found.append(f"{run.name}: jobs {[line['job_id'] for line in started]}")
    return found


def study(
    folder: Path, cluster: slurm_here.DevCluster, plan: Callable[[dict[str, Counter[str]]], dict[str, tuple[str, list[Stop]]]]
) -> tuple[int, list[str]]:  # fmt: skip
    """(starts that were stopped, differences) of the runs of `plan(calls of an undisturbed run by engine)`."""
    data = write_photos(folder / "photos", 28, 11)
    calm = {f"calm-{engine}": (engine, []) for engine in ("stream", "cached")}
    with mock.patch.dict(os.environ, {"SLURM_CONF": cluster.env["SLURM_CONF"]}):
        run_all(folder, calm, data, cluster.user_signal)
        counted = {
            engine: Counter(json.loads((folder / name / "calls.json").read_text())[0])
            for name, (engine, _) in calm.items()
        }
        planned = plan(counted)
        run_all(folder, planned, data, cluster.user_signal)
    stops, found = 0, []
    for name, (engine, _) in planned.items():
        run = RunDir(folder / name)
        stops += len([line for line in read_lines(run.events) if line["event"] == "started"]) - 1
        found += differences(run, RunDir(folder / f"calm-{engine}"))
    return stops, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    stops, found = 0, []
    for user_signal in (True, False):
        with tempfile.TemporaryDirectory() as folder, slurm_here.DevCluster(2, user_signal) as cluster:
            more, differ = study(Path(folder), cluster, lambda calls: seeded(args.stops // 2, calls, args.seed))
            stops, found = stops + more, found + differ
    print(*found, f"{args.stops} planned, {stops} more starts, {len(found)} differences", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
