"""How a run under faults is started, and how long it is waited for.

Python and torch take 5 CPU seconds to import, a start of the tiny run 1. So processes are forked from one that has
imported them, as real as others: with sessions, parents, signals and descriptors as `exec` leaves them. `commanded` alone is the
user's command itself.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fixres_dist.cli.main import main
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import worker
from support import strikes
from support.commands import ROOT, environment
from support.ends import living, note_session, sessions
from support.preemptions import Spy
from support.strikes import FAULT, RUN, Fault

HUNG_S, SPINS_S = 240.0, 300.0
ALONE_S = 10.0  # torchrun's agent ends the ranks that outlive another one's failure
PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """This process gets the signal when the one that forked it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def default_handlers() -> None:
    """Python's own after `exec`: signals that were ignored still are."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Patience:
    """Whether a start hangs: none of its processes can run for HUNG_S together, or they have used SPINS_S of CPU time.

    A process that waits for a CPU of a loaded machine can run, so load alone is never called hung; time of which nothing was
    seen counts for at most a second.
    """

    def __init__(self, run: RunDir) -> None:
        self.run, self.idle_s, self.seen = run, 0.0, time.monotonic()

    def check(self) -> None:
        """Raises TimeoutError, once all the start's processes are killed."""
        since = time.monotonic() - self.seen
        if since < 0.5:
            return
        self.seen = time.monotonic()
        found = sessions({int(pid) for pid in (self.run.root / "sessions").read_text().split()})
        self.idle_s += 0.0 if {state for _, state, _ in found} & {"R", "D"} else min(since, 1.0)
        used_s = sum(ticks for _, _, ticks in found) / os.sysconf("SC_CLK_TCK")
        if self.idle_s > HUNG_S or used_s > SPINS_S:
            kill(self.run)
            raise TimeoutError


def kill(run: RunDir) -> None:
    while pids := living(run):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def child(log: Path, work: Callable[[], int], **variables: object) -> int:
    """Fork a process, in a session of its own, that does `work` and ends with its code; returns its id."""
    gc.collect()
    gc.freeze()  # a child's collector would look at, and so copy, the pages of all that is imported
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        end_with_parent(signal.SIGKILL)
        default_handlers()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= {name: str(value) for name, value in variables.items()}
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def marks(run: RunDir, fault: Fault | None) -> dict[str, str]:
    return {FAULT: json.dumps(asdict(fault)) if fault else "", RUN: str(run.root)}


def forked(
    run: RunDir, ranks: int, start: int, fault: Fault | None, counted: Callable[[Spy], object] = bool
) -> list[int]:
    """The ranks of a start as torchrun has them; their exit codes, negative for a signal. Raises TimeoutError."""
    pids = []
    for rank in range(ranks):

        def work(rank: int = rank) -> int:
            spy = strikes.install()
            code = worker.train(run.root)
            if rank == 0:
                counted(spy)
            return code

        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        names = {**(names if ranks > 1 else {}), "TORCHELASTIC_RUN_ID": f"soak-{start}", "MASTER_PORT": 0}
        pids.append(child(run.root / f"soak-{start}-{rank}.log", work, **names, **marks(run, fault)))
        note_session(run, pids[-1])
    return ended(run, pids)


def ended(run: RunDir, pids: list[int]) -> list[int]:
    """Wait for the ranks as torchrun's agent does: it ends the others when one has failed."""
    codes: dict[int, int] = {}
    patience, failed_at = Patience(run), 0.0
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        failed_at = failed_at or (time.monotonic() if any(codes.values()) else 0.0)
        if failed_at and time.monotonic() > failed_at + ALONE_S:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        patience.check()
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


class Forked:
    """What submitit uses of subprocess.Popen for `python -m MODULE WORDS`, with a fork in the place of `exec`."""

    def __init__(
        self, command: list[str], env: dict[str, str], stdout: Any = None, stderr: Any = None, **_: Any
    ) -> None:
        self.returncode: int | None = None
        gc.collect()  # nothing that a child collects may close a descriptor which it has opened since
        self.pid = os.fork()
        if not self.pid:
            self.be(command[command.index("-m") + 1 :], env, [s and s.fileno() for s in (stdout, stderr)])

    def be(self, words: list[str], env: dict[str, str], streams: list[int | None]) -> None:
        code = 1
        try:
            default_handlers()
            for at, stream in enumerate(streams, 1):
                if stream:
                    os.dup2(stream, at)
            for fd in map(int, os.listdir("/proc/self/fd")):
                with suppress(OSError):
                    if fd > 2 and not os.get_inheritable(fd):
                        os.close(fd)
            os.environ.clear()
            os.environ.update(env)
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
            sys.argv = words
            if "SUBMITIT_LOCAL_GLOBALID" in env:
                strikes.install()
            else:  # submitit makes its controller's folder meanwhile, and a Python that starts is slower than a fork
                folder, deadline = Path(words[1].replace("%j", str(os.getpid()))), time.monotonic() + 60
                while not folder.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
            runpy.run_module(words[0], run_name="__main__")
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def resume_words(run: RunDir) -> list[str]:
    return ["resume", run.name, "--runs-dir", str(run.root.parent), "--cluster", "local"]


def launched(run: RunDir, fault: Fault | None) -> list[int]:
    """`fixres resume --cluster local`, forked, as are submitit's controller and the ranks; waits for those as well."""

    def work() -> int:
        from submitit.local import local

        local.subprocess = SimpleNamespace(Popen=Forked)
        return main(resume_words(run))

    variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    pid = child(run.root / "soak-local.log", work, **variables, **marks(run, fault))
    note_session(run, pid)
    codes, patience = list[int](), Patience(run)
    while not codes or living(run):
        if not codes:
            done, status = os.waitpid(pid, os.WNOHANG)
            codes += [os.waitstatus_to_exitcode(status)] if done else []
        patience.check()
        time.sleep(0.1)
    return codes


def commanded(run: RunDir, fault: Fault | None) -> list[int]:
    """The same as a user has it: Python processes of their own, which import the run's snapshot of the code."""
    words = [sys.executable, "-m", "fixres_dist", *resume_words(run)]
    with open(run.root / "soak-local.log", "a") as log:
        env = {**environment(), **marks(run, fault)}
        started = subprocess.Popen(words, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    note_session(run, started.pid)
    patience = Patience(run)
    while started.poll() is None or living(run):
        patience.check()
        time.sleep(0.1)
    return [started.returncode]
