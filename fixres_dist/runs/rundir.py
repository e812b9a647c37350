"""The run directory: the only state of a run. Nothing that matters lives in a pickle, a job id or memory.

The same command again resumes it, reports that it is finished, or says why it cannot. Every file is written by rename,
or appended to line by line, so a kill at any moment leaves it readable. No torch.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fixres_dist.base import locks
from fixres_dist.base.commands import command, shell
from fixres_dist.base.errors import StorageError, UserError, printable
from fixres_dist.base.files import create, remove, write_text
from fixres_dist.base.secrets import REDACTED, redacted, without_secrets
from fixres_dist.base.small_files import (
    Damaged,
    append,
    put_aside,
    read_json,
    read_lines,
    read_note,
    read_text,
    write_json,
)
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs import choice
from fixres_dist.runs.states import Event, RunState, State
from fixres_dist.runs.task import Task

START_LOCK = ".start.lock"  # of a command that starts ranks on this machine, from the run's preparation to its end
JOBS = "jobs"  # folder in a run of the jobs of commands that work on it


class Locked(UserError):
    """Another process works on the run. The process that meets this must leave the run's files alone."""


class File:
    """A path in the run directory, as an attribute of RunDir."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunDir, owner: type[RunDir]) -> Path:
        return run.root / self.name


@dataclass(frozen=True)
class RunDir:
    root: Path

    checkpoints = File("checkpoints")
    chosen = File("chosen.json")  # settings that a held-out share has chosen (choice.py)
    code = File("code")  # the snapshot that the job imports: editing the checkout never changes a queued job
    config_file = File("config.yaml")
    done = File("DONE")
    events = File("events.jsonl")
    failed = File("FAILED")  # why, and the next command
    first_classifier = File("first_classifier.safetensors")  # the first result's, from which stage one starts
    floor = File("floor.json")  # with stage one on weights: what the untouched network already gives
    held_out = File("held_out")  # run directory of the first stage one, without the pictures that choose settings
    head_before = File("head_before.safetensors")  # without stage one: the tuned tensors before fixing
    hung = File("hung")  # where each rank stood when no batch progressed, a file a rank
    metrics = File("metrics.jsonl")
    prepared = File("prepared.sh")  # what slurm/train.sbatch takes from the run's settings
    partial = File("partial")  # what an interrupted evaluation or measurement has found
    pretrained = File("pretrained.safetensors")  # the whole model after stage one, once that is complete
    progress = File("progress")  # empty; its time of change is that of the last batch
    results = File("results.json")
    start_file = File("start.json")  # what the newest start was made of (starts.py)
    state_file = File("state.json")
    submission = File("submission.sh")
    task_file = File("job.json")  # of a command that runs as a job: `task`

    @property
    def name(self) -> str:
        """As commands find it in the runs directory: the folder's name; of a command's job RUN/jobs/NAME below its run."""
        root = self.whole_path
        below = root.parent.name == JOBS and RunDir(root.parents[1]).config_file.exists()
        return "/".join(root.parts[-3:]) if below else root.name

    @property
    def whole_path(self) -> Path:
        """`root` from the top, so that `.` has a name too; a link keeps its own."""
        return Path(os.path.abspath(self.root))

    @property
    def result(self) -> str:
        """Where people find it."""
        return self.task.result if self.task else str(self.results)

    @property
    def task(self) -> Task | None:
        """The command that its job runs; None for a run, whose job trains."""
        return Task.read(self.task_file)

    def config(self) -> Config:
        """What it was submitted with, and over that what it has chosen. Raises as `submitted`, and Damaged for chosen.json."""
        found = choice.read(self.chosen, self.again)
        return found.applied(self.submitted()) if found else self.submitted()

    def submitted(self) -> Config:
        """Raises UserError where there is no config.yaml, and Damaged for one that is damaged or of a newer version."""
        again = f"{self.submit_command()}; where that has other settings, put back a copy"
        try:
            return reading.load(read_text(self.config_file, again))
        except FileNotFoundError:
            if (self.root / "command.txt").exists():
                raise Damaged(self.config_file, "it is gone", again) from None
            raise UserError(
                f"{self.root} is no run directory: it has no config.yaml. Next: {command('submit', '--help')}"
            ) from None
        except Damaged:
            raise
        except UserError as error:
            raise Damaged(self.config_file, f"{error} It is damaged, or a newer version wrote it", again) from None

    @property
    def typed(self) -> str:
        """The command by which the run was submitted, or the worker alone."""
        return read_note(self.root / "command.txt") or command("train", "--run", self.root.absolute())

    def submit_command(self) -> str:
        """The same, to be pasted in any folder: it may name files as they are called where it was typed."""
        folder = None
        with contextlib.suppress(OSError, UserError, StorageError):
            folder = read_json(self.root / "environment.json", dict[str, Any], "").get("folder")
        away = isinstance(folder, str) and folder != os.getcwd()
        return f"{shell('cd', folder)} && {self.typed}" if away else self.typed

    def again(self) -> str:
        """The command that goes on with the run: that by which it was submitted, if no secret was left out of it."""
        if REDACTED not in self.typed:
            return self.submit_command()
        return command("resume", self.name, "--runs-dir", self.whole_path.parents[self.name.count("/")])

    def command(self, name: str, *words: str, others: Sequence[str] = ()) -> str:
        """`fixres NAME` for this run, and `others` in the same folder, to be typed where the runs directory was given."""
        parts = Path(self.name).parts
        named = self.root.parts[-len(parts) :] == parts  # `.` does not end with the name
        runs = (self.root if named else self.whole_path).parents[len(parts) - 1]
        return command(name, self.name, *others, *(() if runs == Path("runs") else ("--runs-dir", runs)), *words)

    def finished(self, file: Path) -> Path:
        """`file`, which only a finished run has; raises UserError if it is missing."""
        if not file.exists():
            self.config()  # refuses a folder that is no run directory
            if self.done.exists():
                raise Damaged(file, "it is gone", self.evaluate_again())
            raise UserError(f"run {self.name} has not finished: there is no {file}. Next: {self.command('status')}")
        return file

    def state(self) -> RunState:
        """From state.json; where that is damaged or gone, what the other files say."""
        try:
            return read_json(self.state_file, RunState, "")
        except FileNotFoundError:
            if not self.events.exists():
                return RunState()
            why = "it is gone"
        except (Damaged, StorageError) as error:
            why = getattr(error, "why", str(error))
        reason = f"{self.state_file} cannot be read ({why}): taken from the other files"
        try:
            return self.rebuilt_state(reason)
        except (UserError, StorageError) as error:
            return RunState(state=State.FAILED, reason=f"{reason}, and {error}")

    def rebuilt_state(self, reason: str) -> RunState:
        """What the other files say; raises Damaged and StorageError where those cannot be read either."""
        events, restarts = read_lines(self.events, event=str), dict(RunState().restarts)
        for line in events:
            if line["event"] == Event.LOST or (line["event"] == Event.REQUEUED and isinstance(line.get("reason"), str)):
                counted = line["reason"] if line["event"] == Event.REQUEUED else "failure"
                restarts[counted] = restarts.get(counted, 0) + 1
        seen = (
            (State.DONE, self.done.exists()),
            (State.FAILED, self.failed.exists()),
            (State.RUNNING, self.is_locked()),
            (State.REQUEUED, bool(events) and events[-1]["event"] == Event.REQUEUED),
        )
        state = next((state for state, true in seen if true), State.CANCELLED if events else State.PENDING)
        begun = (line for line in events if line["event"] == Event.STARTED and isinstance(line.get("job_id"), str))
        jobs = [line["job_id"] for line in begun]
        steps = [max(0, self.saved_step()), *(line["step"] for line in read_lines(self.metrics, step=int))]
        step, total = (max(steps), max(steps)) if state == State.DONE else (steps[0], None)
        job = jobs[-1] if jobs else None
        return RunState(state=state, step=step, total_steps=total, reason=reason, job_id=job, restarts=restarts)

    def skipped(self) -> int:
        """Images that this run, over all its starts and ranks, could not decode."""
        files = (self.root / "skipped").glob("rank_*.jsonl")
        return len({line["name"] for file in files for line in read_lines(file, name=str)})

    def update_state(self, event: Event | None = None, **changes: Any) -> bool:
        """Write `changes` of RunState's fields and what follows from `event`; False where the event changes nothing."""
        state = self.state()
        if after := state.after(event) if event else state:
            if self.state_file.is_dir():
                put_aside(self.state_file)
            write_json(self.state_file, without_secrets(asdict(replace(after, updated=time.time(), **changes))))
        return after is not None

    def event(self, name: str, **details: Any) -> None:
        """Append a line to events.jsonl."""
        append(self.events, {"time": time.time(), "event": name, **without_secrets(details)})

    def fail(self, why: str, next_command: str, final: bool = False) -> None:
        """FAILED and the state say why and what to run next. The first rank's reason stays: it made the others fail.

        A finished run stays finished: a rank that breaks while it leaves has lost nothing. `final`: no retry can help.
        Raises OSError on a full disk, which status then sees too.
        """
        if self.state().after(Event.FAILED) is None:
            return
        try:
            create(self.failed, printable(redacted(f"{why}\nNext: {next_command}\n")))
        except FileExistsError:
            return
        self.update_state(Event.FAILED, reason=f"{why.rstrip('.')}. Next: {next_command}", final=final, eta_s=None)
        self.event(Event.FAILED, reason=why)

    def cancel(self, reason: str) -> None:
        if self.update_state(Event.CANCELLED, reason=reason, eta_s=None):
            self.event(Event.CANCELLED)

    def finish(self) -> None:
        remove(self.failed)
        self.update_state(Event.DONE, eta_s=0.0, reason=None)
        self.event(Event.DONE)
        write_text(self.done, "finished\n")

    def saved_step(self) -> int:
        """The newest checkpoint's step, also where it is stage one's last and kept aside (checkpoint.stage_end); -1 without
        one. Of a command's job: the passes over images that it has begun."""
        if self.task_file.exists():
            return len(list(self.partial.glob("*.npz"))) or -1
        names = (path.parent.name[5:].removesuffix(".pretrain") for path in self.checkpoints.glob("step_*/meta.json"))
        return max((int(name) for name in names if name.isdecimal()), default=-1)  # a copy may be called step_40.bak

    def evaluate_again(self) -> str:
        return f"{shell('rm', self.done)}, then {self.again()}: it evaluates the last checkpoint again"

    @contextmanager
    def lock(self, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
        """Held by rank 0 while it works, or by a submission; it ends with the process (base/locks.py).

        Raises Locked after waiting `wait_s` seconds.
        """
        try:
            with locks.lock(self.root / name, wait_s):
                yield
        except locks.Held as held:
            raise Locked(
                f"run {self.name} is being worked on by another process ({held}). Next: {self.command('status')}"
            ) from None

    def is_locked(self, name: str = ".lock") -> bool:
        return locks.is_held(self.root / name)
