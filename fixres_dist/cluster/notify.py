"""cluster.on_change: the site's own shell command, run when a run is done, has failed or is requeued. No torch.

It runs once for each of these events, in the process that follows the ranks to their end: the job's batch script, or the command
of a local run; before a requeue in the process that decides it, since a requeue ends the job. Whatever it does, the run goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

from fixres_dist.base.errors import printable
from fixres_dist.base.secrets import redacted
from fixres_dist.base.small_files import read_lines
from fixres_dist.cluster import status
from fixres_dist.config.schema import Cluster
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event

TOLD = "on_change"  # the event that the command has run
EVENTS = (Event.DONE, Event.FAILED, Event.REQUEUED)
LIMIT_S = 10.0
LONGEST = 2000  # characters of a reason, and of the command's output in the log


def tell(run: RunDir, most_s: float = LIMIT_S, log: Path | None = None) -> None:
    """Run the command, for at most `most_s` seconds, if the run's last event is one of EVENTS and it has not been run for it.

    Its output is printed, and goes to the file `log` where this process has no log of its own.
    """
    try:
        cluster = run.config().cluster
        changes = [e for e in read_lines(run.events, event=str) if e["event"] in {*Event, TOLD}]
        if not cluster.on_change or not changes or changes[-1]["event"] not in EVENTS:
            return
        event = changes[-1]
        values = variables(run, cluster, event["event"], str(event.get("reason") or ""))
        started = time.monotonic()
        code, output = call(cluster.on_change, values, run, most_s)
        said = report(cluster, code, output, most_s)
        if said:
            print(said, flush=True)
        if said and log and log.exists():
            with open(log, "a") as file:
                file.write(f"{said}\n")
        run.event(TOLD, of=event["event"], exit_code=code, seconds=round(time.monotonic() - started, 1))
    except Exception as error:  # the run must not suffer from a full disk, or a shell or terminal that is not there
        with contextlib.suppress(OSError):
            print(f"cluster.on_change was not run to its end: {type(error).__name__}", flush=True)


def variables(run: RunDir, cluster: Cluster, state: str, reason: str) -> dict[str, str]:
    """What the command gets in its environment, as docs/cluster.md has it. The reason is one line without secrets."""
    why = run.state().reason if state == Event.REQUEUED else reason  # the state's: with signal and step
    result, _ = status.verdict(run)
    top1 = result.after.top1 if result else status.newest_top1(run)[0]
    return {
        "FIXRES_RUN": run.name,
        "FIXRES_STATE": state,
        "FIXRES_REASON": printable(" ".join(redacted(why or "", cluster.env).split()))[:LONGEST],
        "FIXRES_TOP1": "" if top1 is None else f"{top1:.2f}",
        "FIXRES_DIRECTORY": str(run.root.resolve()),
    }


def call(command: str, values: dict[str, str], run: RunDir, most_s: float) -> tuple[int | None, str]:
    """Its exit code, None where it was ended, with all that it had started, after `most_s` seconds; and what it printed first."""
    read, write = os.pipe()
    process = subprocess.Popen(
        command,
        shell=True,
        env={**os.environ, **values},
        cwd=run.root,
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=write,
        start_new_session=True,
    )
    os.close(write)
    said = bytearray()

    def drain() -> None:
        with open(read, "rb", buffering=0) as pipe:
            while chunk := pipe.read(65536):
                said.extend(chunk[: LONGEST - len(said)])

    # What the command leaves in the background may hold the pipe for long: nobody waits for the end of that.
    reader = threading.Thread(target=drain, name="output of on_change", daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(most_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(0.5)
    return code, said.decode(errors="replace").strip()


def report(cluster: Cluster, code: int | None, said: str, most_s: float) -> str:
    """What the command has said, and how it failed, without secrets: those of the environment, and its own addresses."""
    addresses = {f"TOKEN_{k}": found for k, found in enumerate(re.findall(r"https?://[^\s'\"]+", cluster.on_change))}
    if code != 0:
        ended = f"was ended after {most_s:.0f} s" if code is None else f"ended with exit code {code}"
        said = f"{ended}; the run goes on{': ' if said else ''}{said}"
    return f"cluster.on_change: {printable(redacted(said, {**cluster.env, **addresses}))}" if said else ""
