"""Runs under faults at seeded moments, each brought to its end and compared with the undisturbed run:

    PYTHONPATH=.:tests python benchmarks/soak.py --count 1000 --seed 0 --out soak.jsonl

A schedule is a run and one to three faults, one a start: a signal (KILL, TERM, INT, HUP, or STOP and a second later CONT)
to a rank, one of its loader processes, or, where `fixres resume --cluster local` starts the ranks, the launcher or
submitit's process between. It comes at the k-th call of a function of the product. Places: one rank alone, two ranks
as torchrun has them (its agent ends the others when one dies; here they are forked from a process that has imported
torch), and two local ranks of the command. A run that is not done within HUNG_S of a start is hung.
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
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from support.commands import ROOT, environment
from support.ends import MARK, living, wrong_at_end
from support.folders import write_photos
from support.preemptions import MOMENTS, Schedule, Spy

from fixres_dist.data import torch_cpu  # noqa: F401  (compiles Pillow's resize: once, not in every rank)
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.training import worker

HUNG_S = 240.0
PLACES = {"inline": 1, "ranks": 2, "local": 2}  # ranks
EVERY = {"before rendezvous": (worker, "join"), **MOMENTS, "stage change": (worker, "train_stage")}
SIGNALS = ("KILL", "TERM", "INT", "HUP", "STOP")
FAULT = "SOAK_FAULT"  # in the environment of a start
# At the end of the snapshot's training/worker.py, for ranks that submitit starts.
HOOK = "\nimport sys\nsys.path += {paths!r}\nimport soak\nsoak.install(sys.modules[__name__])\n"


@dataclass(frozen=True)
class Fault:
    rank: int  # in whose process the moment is
    moment: str
    k: int  # the call of the moment's function, from 1
    target: str  # rank, loader, launcher, controller
    signal: str


@dataclass(frozen=True)
class Trial:
    run: Schedule
    place: str
    faults: tuple[Fault, ...]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def targets(fault: Fault) -> list[int]:
    """Process ids that the fault's signal goes to; none where a rank has no loader process at that moment."""
    own = os.getpid()
    if fault.target == "loader":
        threads = Path(f"/proc/{own}/task").glob("*/children")
        children = [int(pid) for file in threads for pid in file.read_text().split()]
        return [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()][:1]
    return [{"rank": lambda: own, "controller": os.getppid, "launcher": lambda: parent(os.getppid())}[fault.target]()]


def strike(fault: Fault, told: Path) -> None:
    """Send the signal; the file `told` says that it came."""
    for pid in targets(fault):
        told.touch()
        if fault.signal == "STOP":  # CONT from a process that no signal to this one stops
            subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {pid}"], start_new_session=True)
        os.kill(pid, getattr(signal, f"SIG{fault.signal}"))


def install(module: Any = worker) -> Spy:
    """Make this process carry out the fault that its environment names, if it is the fault's rank."""
    fault = Fault(**json.loads(os.environ[FAULT])) if os.environ.get(FAULT) else None
    rank = int(os.environ.get("RANK", os.environ.get("SUBMITIT_LOCAL_GLOBALID", 0)))
    moments = {name: (module if owner is worker else owner, f) for name, (owner, f) in EVERY.items()}
    if fault is None or fault.rank != rank:
        return Spy(moments=moments)
    spy = Spy(lambda: strike(fault, Path(os.environ[MARK]) / "struck"), moments)
    spy.plan = fault.moment, fault.k
    return spy


def forked(run: RunDir, ranks: int, start: int, fault: Fault | None, count: Callable[[Spy], None]) -> list[int]:
    """The ranks of a start as children of this process; their exit codes, negative for a signal."""
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 70
        try:
            os.setsid()
            log = os.open(run.root / f"soak-{start}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ |= {name: str(value) for name, value in names.items()} if ranks > 1 else {}
            os.environ |= {"TORCHELASTIC_RUN_ID": f"soak-{start}", MARK: str(run.root), "MASTER_PORT": "0"}
            os.environ[FAULT] = json.dumps(asdict(fault)) if fault else ""
            spy = install()
            code = worker.train(run.root)
            if rank == 0:
                count(spy)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return ended(pids)


def ended(pids: list[int]) -> list[int]:
    """Wait for the ranks as torchrun's agent does: it ends the others when one has failed. Raises TimeoutError."""
    codes: dict[int, int] = {}
    deadline, failed_at = time.monotonic() + HUNG_S, 0.0
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        failed_at = failed_at or (now if any(codes.values()) else 0.0)
        if now > deadline or (failed_at and now > failed_at + 10):
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        if now > deadline + 5:
            raise TimeoutError
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def commanded(run: RunDir, fault: Fault | None) -> list[int]:
    """A start by `fixres resume --cluster local`; also waits for ranks that outlive it. Raises TimeoutError."""
    words = [
        sys.executable,
        "-m",
        "fixres_dist",
        "resume",
        run.name,
        "--runs-dir",
        str(run.root.parent),
        "--cluster",
        "local",
    ]
    own = {FAULT: json.dumps(asdict(fault)) if fault else "", MARK: str(run.root)}
    with open(run.root / "soak-local.log", "a") as log:
        started = subprocess.Popen(
            words, env={**environment(), **own}, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + HUNG_S
    while started.poll() is None or living(run):
        if time.monotonic() > deadline:
            for pid in living(run):
                os.kill(pid, signal.SIGKILL)
            started.wait()
            raise TimeoutError
        time.sleep(0.1)
    return [started.returncode]


def brought_to_end(trial: Trial, run: RunDir) -> tuple[int, list[str]]:
    """(faults that came, what went wrong) of a run, started until it is done."""
    wrong, came = [], 0
    for start in range(len(trial.faults) + 4):
        fault = trial.faults[start] if start < len(trial.faults) else None
        try:
            codes = commanded(run, fault) if trial.place == "local" else forked(
                run, PLACES[trial.place], start, fault, lambda spy: None
            )  # fmt: skip
        except TimeoutError:
            return came, [f"start {start} hung"]
        struck = (run.root / "struck").exists()
        (run.root / "struck").unlink(missing_ok=True)
        came += struck
        if run.done.exists():
            return came, wrong
        if not struck:
            wrong.append(f"start {start} ended with {codes} and no fault had come")
    return came, [*wrong, "not done after four undisturbed starts"]


def undisturbed(folder: Path, data: Path, place: str, engine: str, loaders: int) -> tuple[RunDir, Counter[str]]:
    """The run without faults, and how often rank 0 called each moment's function."""
    schedule = Schedule(f"calm-{place}-{engine}-{loaders}", engine)
    schedule.prepare(folder, data, f"data.workers={loaders}")
    run = RunDir(folder / schedule.name)
    ranks, file = PLACES[place], run.root.with_suffix(".calls")
    codes = forked(run, ranks, 0, None, lambda spy: file.write_text(json.dumps(spy.calls)) and None)
    assert codes == [0] * ranks, (run.root / "soak-0-0.log").read_text()[-3000:]
    return run, Counter(json.loads(file.read_text()))


def seeded(number: int, seed: int, places: list[str]) -> tuple[str, str, int, random.Random]:
    draw = random.Random(f"{seed}-{number}")
    return places[number % len(places)], draw.choice(["stream", "cached"]), draw.choice([0, 1]), draw


def faults(place: str, loaders: int, calls: Counter[str], draw: random.Random, first: str) -> tuple[Fault, ...]:
    """One to three; the first at the moment `first`."""
    kinds = [
        "rank",
        "rank",
        *(["loader"] if loaders else []),
        *(["launcher", "controller"] if place == "local" else []),
    ]
    found = []
    for moment in (first, *draw.choices(list(EVERY), k=draw.choice([0, 0, 1, 2]))):
        target = draw.choice(kinds)
        number = draw.choice(("KILL", "STOP") if target in ("loader", "controller") else SIGNALS)
        found.append(
            Fault(draw.randrange(PLACES[place]), moment, draw.randint(1, max(1, calls[moment])), target, number)
        )
    return tuple(found)


def study(folder: Path, data: Path, count: int, seed: int, places: list[str], out: Path | None = None) -> Counter[str]:
    """Counts of schedules, faults and wrong ends; a line of `out` for each schedule."""
    torch.set_num_threads(1)
    calm: dict[tuple[str, str, int], tuple[RunDir, Counter[str]]] = {}
    total: Counter[str] = Counter(schedules=0, faults=0, wrong=0)
    for number in range(count):
        place, engine, loaders, draw = seeded(number, seed, places)
        if (place, engine, loaders) not in calm:
            calm[place, engine, loaders] = undisturbed(folder, data, place, engine, loaders)
        own, calls = calm[place, engine, loaders]
        planned = faults(place, loaders, calls, draw, list(EVERY)[(number // len(places)) % len(EVERY)])
        trial = Trial(Schedule(f"{seed}-{number}", engine), place, planned)
        trial.run.prepare(folder, data, f"data.workers={loaders}", f"cluster.gpus_per_node={PLACES[place]}")
        run = RunDir(folder / trial.run.name)
        if place == "local":
            run.event(Event.SUBMITTED, cluster="local")
            with open(run.code / "fixres_dist" / "training" / "worker.py", "a") as file:
                file.write(HOOK.format(paths=[str(ROOT / "tests"), str(ROOT / "benchmarks")]))
        started = time.monotonic()
        came, wrong = brought_to_end(trial, run)
        wrong = wrong or wrong_at_end(run, own)
        total += Counter(schedules=1, faults=came, wrong=bool(wrong))
        line = {"place": place, "engine": engine, "loaders": loaders, "seed": seed, "number": number, "came": came}
        line |= {"faults": [asdict(f) for f in planned], "wrong": wrong, "s": round(time.monotonic() - started, 1)}
        if out:
            with open(out, "a") as file:
                file.write(json.dumps(line) + "\n")
        if wrong:
            print(json.dumps(line), flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="schedules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", default="inline,ranks", help=f"of {', '.join(PLACES)}")
    parser.add_argument("--images", type=int, default=28, help="of each of three classes, to train on")
    parser.add_argument("--out", type=Path, help="a JSON line for each schedule")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FIXRES_CACHE"] = f"{folder}/cache"
        data = write_photos(Path(folder) / "photos", args.images, -(-2 * args.images // 5) - 1)
        total = study(Path(folder), data, args.count, args.seed, args.places.split(","), args.out)
    print(dict(total))
    return bool(total["wrong"])


if __name__ == "__main__":
    sys.exit(main())
