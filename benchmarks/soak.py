"""Runs under faults at seeded moments, each brought to its end and compared with the undisturbed run:

    PYTHONPATH=.:tests python benchmarks/soak.py --count 1000 --seed 3 --jobs 3 --out soak.jsonl

A schedule is a run and one to three faults, one a start: a signal (KILL, TERM, INT, HUP, or STOP and a second later CONT)
to a rank, one of its loader processes, or, where `fixres resume --cluster local` starts the ranks, the launcher or
submitit's process between. It comes at the k-th call of a function of the product. Places: one rank alone (`inline`), two ranks
as torchrun has them (`ranks`: its agent ends the others when one dies), the command's two local ranks (`local`), all forked
from a process that has imported torch; and the command itself (`command`). The same line again goes on with the schedules
that are not in --out. tests/support/starts.py says when a start hangs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from support.commands import ROOT
from support.ends import wrong_at_end
from support.folders import write_photos
from support.preemptions import Schedule, Spy
from support.starts import commanded, end_with_parent, forked, kill, launched
from support.strikes import EVERY, Fault

from fixres_dist.data import torch_cpu  # noqa: F401  (compiles Pillow's resize: once, not in every rank)
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

PLACES = {"inline": 1, "ranks": 2, "local": 2, "command": 2}  # ranks
BY_COMMAND = {"local": launched, "command": commanded}
SIGNALS = ("KILL", "TERM", "INT", "HUP", "STOP")
OF_RANK_0 = ("save", "results", "export")
TELL_S = 30.0
# At the end of the snapshot's training/worker.py, for ranks that submitit starts.
HOOK = "\nimport sys\nsys.path.append({tests!r})\nfrom support import strikes\nstrikes.install(sys.modules[__name__])\n"


@dataclass(frozen=True)
class Trial:
    """Schedule `number` of a soak with `seed`: what both draw, the same whenever it runs."""

    seed: int
    number: int
    place: str
    engine: str
    loaders: int
    images: int  # of each of three classes, to train on

    @staticmethod
    def drawn(seed: int, number: int, places: list[str], images: int) -> Trial:
        draw, place = random.Random(f"{seed}-{number}"), places[number % len(places)]
        engine = "cached" if moment_of(number) == "features" else draw.choice(["stream", "cached"])
        return Trial(seed, number, place, engine, draw.choice([0, 1]), images)

    @property
    def calm(self) -> tuple[int, str, int]:
        """The undisturbed run that it is compared with: (ranks, engine, loader processes)."""
        return PLACES[self.place], self.engine, self.loaders

    def faults(self, calls: Counter[str]) -> tuple[Fault, ...]:
        """One to three; the first at each moment in turn. `calls`: of the undisturbed run's rank 0."""
        draw, found = random.Random(f"{self.seed}-{self.number}-faults"), []
        command = self.place in BY_COMMAND
        kinds = ["rank", "rank", *["loader"] * bool(self.loaders), *["launcher", "controller"] * command]
        for moment in (moment_of(self.number), *draw.choices(list(EVERY), k=draw.choice([0, 0, 1, 2]))):
            target, k = draw.choice(kinds), draw.randint(1, max(1, calls[moment]))
            number = draw.choice(("KILL", "STOP") if target in ("loader", "controller") else SIGNALS)
            rank = 0 if moment in OF_RANK_0 else draw.randrange(PLACES[self.place])
            found.append(Fault(rank, moment, k, target, number))
        return tuple(found)


def moment_of(number: int) -> str:
    """Of schedule `number`: all in turn, each round at other places."""
    return list(EVERY)[(number + number // len(EVERY)) % len(EVERY)]


@dataclass(frozen=True)
class Calm:
    run: RunDir
    calls: Counter[str]  # how often rank 0 called each moment's function


def undisturbed(folder: Path, data: Path, ranks: int, engine: str, loaders: int) -> Calm:
    """The run without faults. What its ranks have imported is imported here, once for all that are forked later."""
    schedule = Schedule(f"calm-{ranks}-{engine}-{loaders}", engine)
    schedule.prepare(folder, data, f"data.workers={loaders}")
    run, file = RunDir(folder / schedule.name), folder / "counted.json"

    def tell(spy: Spy) -> None:
        file.write_text(json.dumps([spy.calls, sorted(sys.modules)]))

    codes = forked(run, ranks, 0, None, tell)
    assert codes == [0] * ranks, (run.root / "soak-0-0.log").read_text()[-3000:]
    calls, modules = json.loads(file.read_text())
    for name in modules:
        if (
            name.startswith(("torch.", "tensorboard.", "timm.", "matplotlib.", "fixres_dist."))
            and name not in sys.modules
        ):
            importlib.import_module(name)
    return Calm(run, Counter(calls))


def brought_to_end(trial: Trial, faults: tuple[Fault, ...], run: RunDir) -> tuple[int, list[str]]:
    """(faults that came, what went wrong) of a run, started until it is done."""
    wrong, came = [], 0
    for start in range(len(faults) + 4):
        fault = faults[start] if start < len(faults) else None
        try:
            by_command = BY_COMMAND.get(trial.place)
            codes = by_command(run, fault) if by_command else forked(run, PLACES[trial.place], start, fault)
        except TimeoutError:
            return came + (run.root / "struck").exists(), [f"start {start} hung"]
        struck = (run.root / "struck").exists()
        (run.root / "struck").unlink(missing_ok=True)
        came += struck
        if run.done.exists():
            return came, wrong
        if not struck:
            wrong.append(f"start {start} ended with {codes} and no fault had come")
    return came, [*wrong, "not done after four undisturbed starts"]


def carried_out(trial: Trial, folder: Path, data: Path, calm: Calm) -> dict[str, Any]:
    """The schedule's line of --out; its run's folder is removed unless something went wrong."""
    faults, before, started = trial.faults(calm.calls), cpu_s(), time.monotonic()
    schedule = Schedule(f"{trial.seed}-{trial.number}", trial.engine)
    items = [f"data.workers={trial.loaders}", f"cluster.gpus_per_node={PLACES[trial.place]}", "run.watchdog_s=120"]
    schedule.prepare(folder, data, *items)
    run = RunDir(folder / schedule.name)
    if trial.place in BY_COMMAND:
        run.event(Event.SUBMITTED, cluster="local")
    if trial.place == "command":
        with open(run.code / "fixres_dist" / "training" / "worker.py", "a") as file:
            file.write(HOOK.format(tests=str(ROOT / "tests")))
    try:
        came, wrong = brought_to_end(trial, faults, run)
        wrong = wrong or wrong_at_end(run, calm.run)
    finally:
        kill(run)
    if not wrong:
        shutil.rmtree(run.root)
        shutil.rmtree(run.root.with_name(f"{run.name}-features"), ignore_errors=True)
    took = {"cpu_s": round(cpu_s() - before, 2), "s": round(time.monotonic() - started, 1)}
    return {**asdict(trial), "came": came, "faults": [asdict(f) for f in faults], "wrong": wrong, **took}


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def stopped(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def worked(todo: list[Trial], folder: Path, data: Path, out: Path) -> int:
    """Carry out the schedules, a line each, in a process of their own; returns its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        end_with_parent(signal.SIGTERM)
        calm: dict[tuple[int, str, int], Calm] = {}
        folder.mkdir()
        for trial in todo:
            if trial.calm not in calm:
                calm[trial.calm] = undisturbed(folder, data, *trial.calm)
            line = carried_out(trial, folder, data, calm[trial.calm])
            with open(out, "a") as file:
                file.write(json.dumps(line) + "\n")
            if line["wrong"]:
                print(json.dumps(line), flush=True)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def lines(out: Path, planned: list[Trial]) -> list[dict[str, Any]]:
    """Of the planned schedules that have been carried out."""
    text = out.read_text() if out.exists() else ""
    wanted, names = set(planned), asdict(planned[0]).keys()
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if Trial(**{name: line[name] for name in names}) in wanted]


def total(found: list[dict[str, Any]]) -> dict[str, int]:
    return {
        "schedules": len(found),
        "faults": sum(x["came"] for x in found),
        "wrong": sum(bool(x["wrong"]) for x in found),
    }


def study(folder: Path, data: Path, planned: list[Trial], jobs: int, out: Path) -> dict[str, int]:
    """Counts of schedules, faults and wrong ends; a line of `out` for each schedule."""
    done = {tuple(x[name] for name in asdict(planned[0])) for x in lines(out, planned)}
    todo = [trial for trial in planned if tuple(asdict(trial).values()) not in done]
    began = time.monotonic()
    pids = [worked(todo[k::jobs], folder / f"job-{k}", data, out) for k in range(jobs)]
    alive, codes, told = set(pids), [], began
    try:
        while alive:
            for pid in list(alive):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    alive.discard(pid)
                    codes.append(os.waitstatus_to_exitcode(status))
            if time.monotonic() > told + TELL_S:
                told = time.monotonic()
                found = lines(out, planned)
                new = len(found) - len(done)
                eta = f"{(len(planned) - len(found)) * (told - began) / new / 60:.0f} min" if new else "unknown"
                cpu = sum(x["cpu_s"] for x in found) / max(1, len(found))
                print(f"{total(found)} of {len(planned)}, {cpu:.1f} CPU s each, ETA {eta}", flush=True)
            time.sleep(0.2)
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    assert not any(codes), f"the jobs ended with {codes}"
    return total(lines(out, planned))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="schedules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", default="inline,ranks,local", help=f"of {', '.join(PLACES)}")
    parser.add_argument("--images", type=int, default=17, help="of each of three classes, to train on")
    parser.add_argument("--jobs", type=int, default=1, help="schedules at a time")
    parser.add_argument(
        "--out", type=Path, help="a JSON line for each schedule; those that it has are not carried out again"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stopped)
    places = args.places.split(",")
    planned = [Trial.drawn(args.seed, number, places, args.images) for number in range(args.count)]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    counts = {"wrong": 0}
    try:
        os.environ["FIXRES_CACHE"] = f"{folder}/cache"
        data = write_photos(folder / "photos", args.images, -(-2 * args.images // 5) - 1)
        counts = study(folder, data, planned, args.jobs, args.out or folder / "soak.jsonl")
        print(counts)
    finally:
        if counts["wrong"]:
            print(f"the runs that went wrong: {folder}/job-*")
        else:
            shutil.rmtree(folder)
    return bool(counts["wrong"])


if __name__ == "__main__":
    sys.exit(main())
