"""The run directory: the only state of a run. Nothing that matters lives in a pickle, a job id or memory.

The same command again resumes it, reports that it is finished, or says why it cannot. Every file is written by rename,
or appended to line by line, so a kill at any moment leaves it readable. No torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixres_dist.base.environment import environment
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import whole, write_text
from fixres_dist.base.json_lines import append
from fixres_dist.config import reading
from fixres_dist.config.schema import Config

STATES = ("pending", "running", "stopping", "requeued", "done", "failed", "cancelled")


class Locked(UserError):
    """Another process works on the run. Whoever meets this must leave the run's files alone."""


@dataclass(frozen=True)
class RunDir:
    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def pretrained(self) -> Path:
        """The whole model after stage one; there when stage one is complete."""
        return self.root / "pretrained.safetensors"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def done(self) -> Path:
        return self.root / "DONE"

    @property
    def failed(self) -> Path:
        return self.root / "FAILED"

    @property
    def code(self) -> Path:
        """The snapshot the job imports: editing the checkout never changes a queued job."""
        return self.root / "code"

    def config(self) -> Config:
        try:
            return reading.load((self.root / "config.yaml").read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.root} is no run directory: it has no config.yaml. Runs are made by launch/submit.py."
            ) from None

    def state(self) -> dict[str, Any]:
        try:
            return json.loads((self.root / "state.json").read_text())
        except FileNotFoundError:
            return {}

    def command(self) -> str:
        """What goes on with the run: as it was submitted, or the worker alone."""
        try:
            return (self.root / "command.txt").read_text().strip()
        except FileNotFoundError:
            return f"python -m fixres_dist train --run {self.root}"

    def launch(self, script: str) -> str:
        """launch/SCRIPT.py for this run, to be typed where the runs directory was given."""
        where = "" if self.root.parent == Path("runs") else f" --runs-dir {shlex.quote(str(self.root.parent))}"
        return f"python launch/{script}.py {shlex.quote(self.name)}{where}"

    def finished(self, file: Path) -> Path:
        """`file`, which a finished run has; raises UserError before it is there."""
        if not file.exists():
            self.config()  # refuses what is no run directory
            raise UserError(f"run {self.name} has not finished: there is no {file}. Next: {self.launch('status')}")
        return file

    def update_state(self, **changes: Any) -> None:
        """Merge `changes` into state.json."""
        unset = {
            "state": "pending",
            "step": 0,
            "total_steps": None,
            "epoch": 0,
            "images_per_second": None,
            "eta_s": None,
        }
        unset |= {"restarts": {"preempted": 0, "timeout": 0, "failure": 0}, "job_id": None, "reason": None}
        state = {**unset, **self.state(), **changes, "updated": time.time()}
        if state["state"] not in STATES:
            raise ValueError(f"state {state['state']!r} is none of {STATES}")
        write_text(self.root / "state.json", json.dumps(state, indent=1) + "\n")

    def event(self, name: str, **details: Any) -> None:
        append(self.root / "events.jsonl", {"time": time.time(), "event": name, **details})

    def fail(self, why: str, next_command: str, final: bool = False) -> None:
        """FAILED and the state say why and what to run next. The first rank's reason stays: the others fail because of it.

        `final`: no retry can help.
        """
        try:
            with open(self.failed, "x") as file:
                file.write(f"{why}\nNext: {next_command}\n")
        except FileExistsError:
            return
        except OSError:  # a full disk, which status sees too
            self.failed.unlink(missing_ok=True)
            raise
        self.update_state(state="failed", reason=f"{why.rstrip('.')}. Next: {next_command}", final=final, eta_s=None)
        self.event("failed", reason=why)

    def finish(self) -> None:
        self.failed.unlink(missing_ok=True)
        self.update_state(state="done", eta_s=0.0, reason=None)
        self.event("done")
        write_text(self.done, "finished\n")

    def saved_step(self) -> int:
        """The newest checkpoint's step; -1 without one."""
        return max((int(path.parent.name[5:]) for path in self.checkpoints.glob("step_*/meta.json")), default=-1)

    @contextmanager
    def lock(self, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
        """Held by rank 0 while it works; the kernel drops it with the process, so a crash leaves nothing to clean.

        The file holds who has it, for launch/cancel.py.
        """
        with open(self.root / name, "a+") as file:
            # A forked loader worker outlives a killed parent by seconds and must not hold its lock meanwhile.
            os.register_at_fork(after_in_child=file.close)
            deadline = time.monotonic() + wait_s
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise Locked(
                            f"run {self.name} is being worked on by another process. Next: {self.launch('status')}"
                        ) from None
                    time.sleep(0.2)
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
            file.flush()
            yield

    def is_locked(self) -> bool:
        try:
            with open(self.root / ".lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def prepare(root: Path, config: Config, command: list[str]) -> RunDir:
    """Create the run directory, or reopen the one that belongs to this configuration.

    Raises UserError when `root` holds something else: another configuration (the differences are named) or other files.
    """
    run = RunDir(root)
    check(root, config)
    root.mkdir(parents=True, exist_ok=True)
    write_text(root / "config.yaml", reading.dump(config))
    if not (root / "state.json").exists():
        run.update_state()
    if not run.done.exists():
        write_text(root / "command.txt", " ".join(command) + "\n")
        write_text(root / "environment.json", json.dumps(environment(), indent=1) + "\n")
        snapshot_code(run)
    return run


def check(root: Path, config: Config) -> None:
    """Refuse a directory that is not this run's; writes nothing."""
    if not root.exists():
        return
    if not (root / "config.yaml").exists():
        if root.is_dir() and all(path.name.startswith(".") for path in root.iterdir()):
            return
        raise UserError(f"{root} exists and is no run directory. Pick another --name.")
    differ = reading.differences(reading.identity(RunDir(root).config()), reading.identity(config))
    if differ:
        listed = "; ".join(differ[:6])
        raise UserError(
            f"run directory {root} holds a run with other settings ({listed}). "
            f"Pick another --name, or move it away: mv {root} {root}.old"
        )


def snapshot_code(run: RunDir) -> None:
    """Copy the package, launchers and recipes that are running now to code/ (whole or not at all)."""
    source = Path(__file__).parents[2]
    if source.resolve() == run.code.resolve():
        return
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    with whole(run.code) as part:
        for name in ("fixres_dist", "configs", "launch"):
            if (source / name).is_dir():
                shutil.copytree(source / name, part / name, ignore=ignore)
