"""A real Slurm on this machine with the whole service on it: the fixture `devcluster`, one for all tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "slurm"))

import devcluster as slurm_here  # noqa: E402
from devmachine import ACCOUNTING, SLURM, missing_packages  # noqa: E402

# Small enough for two CPU cores, long enough to be disturbed: 720 steps of a tiny model.
LONG = ["tune.epochs=240", "run.eval_every=0", "run.log_every=5", "run.save_every_s=1"]
SHORT = ["tune.epochs=2", "run.log_every=1"]


@dataclass(frozen=True)
class Service:
    """The commands of launch/ against one pretended cluster."""

    cluster: slurm_here.DevCluster
    folder: Path

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def env(self) -> dict[str, str]:
        return self.cluster.env | {"FIXRES_CACHE": str(self.folder / "cache")}

    def launch(self, script: str, *arguments: object, code: int = 0) -> str:
        """Both streams of a command of launch/ on these runs; asserts its exit code."""
        command = [
            sys.executable,
            str(ROOT / "launch" / f"{script}.py"),
            *map(str, arguments),
            "--runs-dir",
            str(self.runs),
        ]
        done = subprocess.run(command, env=self.env, cwd="/", capture_output=True, text=True, timeout=120)
        assert done.returncode == code, f"{script} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def arguments(self, *more: object) -> list[str]:
        """Of launch/submit.py, for the tiny model on the tiny data set."""
        model = [
            "--model",
            "test_efficientnet",
            "--weights",
            "none",
            "--res",
            "64",
            "--data",
            str(self.folder / "data"),
        ]
        profile = ["--profile", str(ROOT / "slurm" / "profiles" / "devcluster.yaml"), "--gpus-per-node", "1"]
        exact = ["run.precision=fp32", "run.memory_format=channels_last"]  # runs are compared bit by bit
        return [*model, *profile, "tune.global_batch=16", *exact, *map(str, more)]

    def submit(self, name: str, *more: object) -> str:
        """Submit a run; returns its job id."""
        self.launch("submit", *self.arguments("--name", name, *more))
        return str(self.state(name)["job_id"])

    def slurm(self, *command: str) -> str:
        done = self.tried(*command)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def tried(self, *command: str) -> subprocess.CompletedProcess[str]:
        """For what Slurm refuses at times, such as changes of a job that is just completing."""
        return subprocess.run(command, env=self.cluster.env, capture_output=True, text=True, timeout=100, check=False)

    def preempt(self) -> None:
        """Run a job of higher priority on every GPU; returns when it has ended."""
        self.slurm(
            "srun", "-p", "high", "-N", str(self.cluster.nodes), "--ntasks-per-node=1", "--gpus-per-node=8", "true"
        )

    def job(self, job: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.slurm("scontrol", "show", "job", "-o", job))
        return found[1] if found else ""

    def state(self, name: str) -> dict[str, Any]:
        return json.loads((self.runs / name / "state.json").read_text())

    def events(self, name: str, kind: str = "") -> list[dict[str, Any]]:
        file = self.runs / name / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if kind in ("", event["event"])]

    def until(self, name: str, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Wait for `condition`; on time-out, or when the run fails, show what the run says."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            told = [self.state(name), *self.events(name)]
            assert time.monotonic() < deadline, "\n".join([*map(str, told), self.log(name)])
            assert told[0]["state"] != "failed", "\n".join([*map(str, told), self.log(name)])
            time.sleep(0.05)

    def until_state(self, name: str, state: str, timeout_s: float = 120.0) -> None:
        self.until(name, lambda: self.state(name)["state"] == state, timeout_s)

    def until_working(self, name: str, starts: int = 1) -> None:
        """Until start number `starts` has made steps, and saved, beyond where it began."""

        def working() -> bool:
            begun = self.events(name, "started")
            saved = [event["step"] for event in self.events(name, "saved")]
            return len(begun) >= starts and bool(saved) and saved[-1] > max(0, begun[-1]["step"])

        self.until(name, working)

    def rank_process(self, job: str, rank: int) -> int:
        """The process of a rank: by the marks that Slurm leaves in its environment."""
        marks = {f"SLURM_CLUSTER_NAME={self.cluster.name}", f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                found = marks <= set((entry / "environ").read_text(errors="replace").split("\0"))
                if found and "submitit.core._submit" in (entry / "cmdline").read_text():
                    return int(entry.name)
            except OSError:
                continue
        raise AssertionError(f"no process of rank {rank} of job {job}")

    def hold(self, job: str) -> None:
        """Stop rank 1, so that the run waits at a step however fast the machine is; Slurm's warnings bring SIGCONT."""
        os.kill(self.rank_process(job, 1), signal.SIGSTOP)

    def let_go(self, job: str) -> None:
        os.kill(self.rank_process(job, 1), signal.SIGCONT)

    def log(self, name: str, rank: int = 0) -> str:
        files = sorted((self.runs / name / "submitit").glob(f"*/*_{rank}_log.*"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2500:]}" for file in files)

    def head(self, name: str) -> bytes:
        """The tuned tensors of the newest checkpoint, as they are on disk."""
        return (sorted((self.runs / name / "checkpoints").glob("step_*"))[-1] / "head.safetensors").read_bytes()


def service(folder: Path, cluster: slurm_here.DevCluster) -> Service:
    from support.folders import write_photos

    write_photos(folder / "data", 16, 4)
    return Service(cluster, folder)


def need_slurm(packages: dict[str, str] = SLURM) -> None:
    """Skip without Slurm's packages, and fail without them under CI."""
    missing = missing_packages(packages)
    if missing and "CI" not in os.environ:
        pytest.skip(f"missing packages: {' '.join(missing)}")


@pytest.fixture(scope="session")
def devcluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    need_slurm()
    with slurm_here.DevCluster(nodes=4, accounting="CI" in os.environ or not missing_packages(ACCOUNTING)) as cluster:
        yield service(tmp_path_factory.mktemp("slurm"), cluster)


@pytest.fixture
def accounts(devcluster: Service) -> Service:
    """The cluster with its accounting: QOS `small` and `shared`, wckeys `dev` and `paper`."""
    need_slurm(ACCOUNTING)
    return devcluster


@pytest.fixture(scope="session")
def undisturbed(devcluster: Service) -> Service:
    """The run `reference`: two nodes with a rank each, never disturbed."""
    devcluster.submit("reference", "--nodes", 2, "run.record_samples=true", *LONG)
    devcluster.until_state("reference", "done")
    return devcluster
