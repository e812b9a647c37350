"""The soak on a real Slurm of this machine: jobs that Slurm, a hand or a loss disturbs at seeded moments, compared at their end:

    PYTHONPATH=.:tests python benchmarks/soak_slurm.py --count 60 --seed 1 --out soak-slurm.jsonl

A schedule is a run on two nodes with a rank each and one or two faults: preemption, the warning signal, a requeue, scancel,
KILL of a rank, of its node's step daemon, of the batch script, of a node's slurmd, and the loss of a node. Every other one is on
a cluster that sends preempted jobs their user signal. Nodes that Slurm has given up come back; a job that has ended without
its run being done is submitted again, as `resume` does. The same line again goes on with the schedules that are not in --out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

from support.folders import write_photos
from support.slurm_faults import WAYS, Fault, SoakedJob, processes
from support.slurm_preemptions import CLUSTER, MOMENTS
from support.slurm_service import slurm_here

from fixres_dist.cluster import jobs
from fixres_dist.runs.rundir import RunDir

# Without a process of the cluster that could run: Slurm gives up a node after up to 20 s, a start waits 150 s for a lock.
HUNG_S = 600.0
TAKEN_UP = 4  # times that a run is submitted again


def can_run(pids: Sequence[int]) -> bool:
    states = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            states.add(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return bool(states & {"R", "D"})


def tend(cluster: slurm_here.DevCluster, run: RunDir) -> None:
    """Kill a node that is to be lost; bring back nodes that Slurm has given up."""
    lost = run.root / "lost-node"
    if lost.exists():
        cluster.kill_node(lost.read_text())
        lost.unlink()
    for node, state in cluster.node_states().items():
        if state.startswith("down"):
            cluster.revive_node(node)


def brought_to_end(cluster: slurm_here.DevCluster, run: RunDir) -> list[str]:
    """What went wrong with a submitted run until it was done."""
    idle_s, seen, taken_up = 0.0, time.monotonic(), 0
    while not run.done.exists():
        tend(cluster, run)
        job = run.state().slurm_job or ""
        subprocess.run(
            ["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True
        )  # a requeued job is held
        shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()
        if not shown and not run.done.exists() and not run.is_locked():
            if taken_up == TAKEN_UP:
                said = run.failed.read_text() if run.failed.exists() else str(run.state())
                return [f"not done after it was submitted again {TAKEN_UP} times: {said}"]
            jobs.submit_slurm(run.config(), [run], SoakedJob)
            taken_up += 1
        now = time.monotonic()
        idle_s, seen = 0.0 if can_run(cluster._pids()) else idle_s + min(now - seen, 2.0), now
        if idle_s > HUNG_S:
            return [f"hung: {run.state()}"]
        time.sleep(0.5)
    return []


def left_behind(cluster: slurm_here.DevCluster, run: RunDir) -> list[int]:
    """Processes of the run's job that are there LEAVE_S after Slurm has let it go; a step whose daemon was killed it gives up
    after UnkillableStepTimeout."""
    from support.ends import LEAVE_S

    job, since = run.state().slurm_job, time.monotonic()
    gone_at = 0.0
    while left := processes(f"SLURM_JOB_ID={job}", f"SLURM_CLUSTER_NAME={cluster.name}"):
        now = time.monotonic()
        shown = subprocess.run(["squeue", "-h", "-j", str(job)], capture_output=True, text=True).stdout.strip()
        gone_at = 0.0 if shown else gone_at or now
        if (gone_at and now > gone_at + LEAVE_S) or now > since + HUNG_S:
            break
        time.sleep(0.5)
    return left


def seeded(seed: int, number: int, calls: dict[str, Counter[str]]) -> tuple[str, list[Fault]]:
    """(engine, faults) of schedule `number`: every way in turn, at a drawn moment."""
    draw, found = random.Random(f"{seed}-{number}"), []
    engine = draw.choice(["stream", "cached"])
    for how in (WAYS[number // 2 % len(WAYS)], *draw.choices(WAYS, k=draw.choice([0, 0, 1]))):
        # A signal by hand would end a process that has no handler yet; features are made by the cached engine alone.
        moments = [m for m in MOMENTS if (m, how) != ("imports", "signalled") and (m, engine) != ("features", "stream")]
        moment = draw.choice(moments)
        rank = 0 if moment in ("results", "export", "save") else draw.randrange(2)  # rank 0 alone writes results
        found.append(Fault(rank, moment, draw.randint(1, max(1, calls[engine][moment])), how))
    return engine, found


def undisturbed(folder: Path, data: Path) -> dict[str, tuple[RunDir, Counter[str]]]:
    """By engine: two ranks of this machine without faults, and the calls of rank 0's moments."""
    import soak
    import torch

    torch.set_num_threads(1)
    found = {}
    for engine in ("stream", "cached"):
        calm = soak.undisturbed(folder, data, 2, engine, 0)
        found[engine] = calm.run, calm.calls
    return found


def carried_out(
    cluster: slurm_here.DevCluster, folder: Path, data: Path, name: str, engine: str, planned: list[Fault], calm: RunDir
) -> tuple[int, list[str]]:
    """(faults that came, what went wrong)."""
    from support.ends import wrong_at_end
    from support.preemptions import Schedule

    Schedule(name, engine).prepare(folder, data, *CLUSTER)
    run = RunDir(folder / name)
    (run.root / "faults.json").write_text(json.dumps([asdict(fault) for fault in planned]))
    if cluster.user_signal:
        (run.root / "user-signal").touch()
    jobs.submit_slurm(run.config(), [run], SoakedJob)
    wrong = brought_to_end(cluster, run)
    left = left_behind(cluster, run)
    came = len(list(run.root.glob("came-*")))
    wrong += [f"processes {left} are left"] if left else []
    wrong = wrong or wrong_at_end(run, calm)
    if not wrong:
        shutil.rmtree(run.root)
        shutil.rmtree(run.root.with_name(f"{name}-features"), ignore_errors=True)
    return came, wrong


def stopped(number: int, frame: object) -> None:
    sys.exit(128 + number)


def study(folder: Path, numbers: dict[bool, list[int]], seed: int, out: Path) -> None:
    """Carry out the schedules `numbers`, by whether preempted jobs get a user signal; a line of `out` each."""
    data = write_photos(folder / "photos", 17, 6)
    calm = undisturbed(folder, data)
    calls = {engine: counted for engine, (_, counted) in calm.items()}
    for user_signal, todo in numbers.items():
        if not todo:
            continue
        with (
            slurm_here.DevCluster(2, user_signal) as cluster,
            mock.patch.dict(os.environ, {"SLURM_CONF": cluster.env["SLURM_CONF"]}),
        ):
            for number in todo:
                engine, planned = seeded(seed, number, calls)
                began = time.monotonic()
                came, wrong = carried_out(cluster, folder, data, f"{seed}-{number}", engine, planned, calm[engine][0])
                line: dict[str, Any] = {"seed": seed, "number": number, "user_signal": user_signal, "engine": engine}
                line |= {"came": came, "faults": [asdict(fault) for fault in planned], "wrong": wrong}
                line["s"] = round(time.monotonic() - began, 1)
                with open(out, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="schedules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, required=True, help="a JSON line each; those that it has are not carried out again"
    )
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stopped)

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(text) for text in args.out.read_text().splitlines()] if args.out.exists() else []
        return [line for line in found if line["seed"] == args.seed and line["number"] < args.count]

    done = {line["number"] for line in lines()}
    todo = {one: [n for n in range(args.count) if n % 2 != one and n not in done] for one in (True, False)}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if any(todo.values()):
            study(Path(folder), todo, args.seed, args.out)
    found = lines()
    print(
        {
            "schedules": len(found),
            "faults": sum(x["came"] for x in found),
            "wrong": sum(bool(x["wrong"]) for x in found),
        }
    )
    return any(x["wrong"] for x in found)


if __name__ == "__main__":
    sys.exit(main())
