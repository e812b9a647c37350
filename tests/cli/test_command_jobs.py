"""Commands as jobs: what they refuse before the queue, the job that they submit, and what a stop signal leaves of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_slurm import calls, fake_slurm
from support.in_process import handlers_kept

from fixres_dist.cli.command_job import CommandJob
from fixres_dist.cli.main import main
from fixres_dist.evaluation import extract
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import State
from fixres_dist.training import predict

torch.set_num_threads(1)
VIT = ("--model", "vit_tiny_patch16_224", "--checkpoint", "none")
SMALL = ("data.workers=0", "run.batch_per_device=4", "run.precision=fp32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A runs directory with the finished run r."""
    runs = tmp_path_factory.mktemp("runs")
    words = ["--model", "test_efficientnet", "--weights", "none", "--res", "64", "--data", photos, "--name", "r"]
    more = ["--cluster", "inline", "--runs-dir", runs, "tune.epochs=1", "tune.global_batch=12", *SMALL]
    with handlers_kept():
        assert call("submit", *words, *more) == 0
    return runs


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    with handlers_kept():
        yield


def call(*words: object) -> int:
    return main([str(word) for word in words])


def submitted(runs: Path, slurm: Path, *words: object) -> RunDir:
    """Submit the command to the pretended Slurm; returns its job's directory."""
    before = set(runs.glob("r/jobs/[!.]*"))
    assert call(*words, "--cluster", "slurm") == 0
    (root,) = set(runs.glob("r/jobs/[!.]*")) - before
    return RunDir(root)


def interrupted(monkeypatch: pytest.MonkeyPatch, job: RunDir, owner: Any, function: str, k: int) -> int:
    """Start the job, with a stop signal at the k-th call of a function, then again to its end; returns the calls."""
    counted, own = [0], getattr(owner, function)

    def spied(*arguments: Any, **named: Any) -> Any:
        counted[0] += 1
        if counted[0] == k:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(*arguments, **named)

    monkeypatch.setattr(owner, function, spied)
    assert CommandJob(str(job.root))() == 1, "stopped, and outside of Slurm nobody requeues it"
    assert job.state().state == State.CANCELLED
    assert list(job.partial.glob("*.npz"))
    assert CommandJob(str(job.root))() == 0
    assert job.state().state == State.DONE
    assert not job.partial.exists()
    return counted[0]


def record(file: Path) -> Any:
    """What a JSON file says, without what was measured by the clock."""
    found = json.loads(file.read_text())
    found.pop("costs", None)
    found.pop("hardware", None)
    return found


@pytest.mark.parametrize(
    ("words", "out", "file", "models"),
    [
        (("evaluate", "--split", "val"), "--json", "", 2),
        (("interpolate", "--alpha", "0,1"), "--out", "alpha.json", 3),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_job_that_is_stopped_ends_as_the_command_does_and_repeats_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], out: str, file: str, models: int
) -> None:  # fmt: skip
    command = [*words, "--run", runs / "r", *SMALL]
    counted = [0]
    own = predict.score
    monkeypatch.setattr(predict, "score", lambda *a: (counted.__setitem__(0, counted[0] + 1), own(*a))[1])
    assert call(*command, out, tmp_path / "plain") == 0
    monkeypatch.setattr(predict, "score", own)
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    job = submitted(runs, slurm, *command, out, tmp_path / "job")
    assert job.state().total_steps == 1, "pass"
    assert interrupted(monkeypatch, job, predict, "score", counted[0] // 2) == counted[0]
    assert record(tmp_path / "job" / file) == record(tmp_path / "plain" / file)
    (looks,) = Results.read(RunDir(runs / "r")).looks.values()
    assert looks[words[0]] == 2 * models, "by the command and by its job, which has made one pass in two starts"


def test_rows_that_extract_has_written_are_kept(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("extract", "--run", runs / "r", "--out", tmp_path / "plain", *SMALL) == 0
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    job = submitted(runs, slurm, "extract", "--run", runs / "r", "--out", tmp_path / "job", *SMALL)
    assert interrupted(monkeypatch, job, extract, "write_rows", 4) == 18, "two files of 9 batches"
    for name in ("softmax.npy", "embeddings.npy", "labels.npy", "names.txt"):
        assert (tmp_path / "job" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert CommandJob(str(job.root))() == 0, "a requeue of what is finished changes nothing"


def test_the_job_of_a_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its words, the ranks asked for, the names under which it is found; the same command again finds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my site.yaml").write_text("cluster: {partition: gpu, gpus_per_node: 4, time: '2:00:00'}\n")
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch, squeue="echo '7|PENDING|Priority||N/A|0:00|2:00:00'")
    words = ["export", "--run", runs / "r", "--out", "an export", "--cluster", "slurm", "--profile", "my site.yaml"]
    assert call(*words, "--dry-run", "cluster.account=vision") == 0
    assert not (runs / "r" / "jobs" / "export").exists()
    planned = capsys.readouterr().out
    assert call(*words, "cluster.account=vision") == 0
    told = capsys.readouterr().out
    job = RunDir(runs / "r" / "jobs" / "export")
    text = (slurm / "sbatch.text").read_text()
    assert text in planned
    for line in ("nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "partition=gpu", "time=120", "account=vision"):
        assert f"#SBATCH --{line}\n" in text
    assert f'run={job.root.resolve()}\ncd "$run/code"' in text
    assert (job.code / "fixres_dist" / "cli" / "export.py").is_file(), "a snapshot, as runs have it"
    assert "submitted r/jobs/export as job 7" in told
    assert f"fixres logs r/jobs/export --runs-dir {runs} --follow" in told
    assert "its result: an export" in told
    assert call("status", "--runs-dir", runs) == 0
    assert "r/jobs/export" in capsys.readouterr().out
    submissions = len(calls(slurm, "sbatch"))
    assert call(*words, "cluster.account=other") == 0
    assert "r/jobs/export is in the queue already, as job 7 (PENDING). Next: fixres status" in capsys.readouterr().out
    assert len(calls(slurm, "sbatch")) == submissions
    assert CommandJob(str(job.root))() == 0, "in the folder where it was typed"
    assert (tmp_path / "an export" / "model.safetensors").is_file()
    assert call(*words) == 0, "what is finished begins anew"
    assert job.state().state == State.PENDING
    assert call("evaluate", "--run", runs / "r", "--cluster", "slurm", "--nodes", 2, "--gpus-per-node", 3) == 0
    text = (slurm / "sbatch.text").read_text()
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --ntasks-per-node=3\n" in text


def test_refusals_come_before_the_queue(
    runs: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    run, unfinished = runs / "r", tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "list.yaml").write_text("- cluster\n")
    for folder in ("oak", "yew"):
        (tmp_path / "other" / folder).mkdir(parents=True)
    model = ("--model", "test_efficientnet", "--data", photos)
    for words, told in {
        ("evaluate", "--run", unfinished): "has not finished",
        ("evaluate", "--run", run, "--split", "nope"): "nope",
        ("evaluate", "--run", run, "--data", tmp_path / "gone"): "no data set at",
        ("evaluate", "--run", run, "--labels", tmp_path / "real.json"): "no file --labels",
        ("evaluate", "--run", run, "--eval-set", f"o={tmp_path}/other"): "that the model does not know: oak, yew",
        ("evaluate", "--run", run, "--softmax", "s.npy"): "leave out --cluster",
        ("evaluate", *model, "--checkpoint", tmp_path / "gone.pth"): "no weights file",
        ("evaluate", *model, "--checkpoint", "none", "--gpus-per-node", "0"): "gpus_per_node",
        ("sweep", *VIT, "--data", photos, "--res", "224,230"): "cannot take 230 px",
        ("sweep", "--run", run, "--res", "64", "--also", f"x={unfinished}"): "has not finished",
        ("sweep", "--run", run, "--res", "64", "data.resize_rule=fixres,nope"): "nope",
        ("interpolate", "--run", unfinished): "has not finished",
        ("extract", "--run", run, "--out", photos): "exists",
        ("export", "--run", run, "--nodes", "2"): "an export is one process",
        ("export", "--run", run, "data.res=96"): "settings of its job alone",
        ("export", "--run", run, "--profile", tmp_path / "list.yaml"): "accepted: sections",
        ("export", "--run", run, "--profile", tmp_path / "gone.yaml"): "no profile",
    }.items():
        assert call(*words, "--cluster", "slurm") == 2, words
        assert told in capsys.readouterr().err, words
    assert calls(slurm, "sbatch") == []
    monkeypatch.setenv("PATH", "/nowhere")
    assert call("evaluate", "--run", run, "--cluster", "slurm") == 2
    assert "--cluster local" in capsys.readouterr().err


def test_what_is_of_a_job_is_refused_where_none_is_asked_for(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four nodes were asked for, and one process evaluated; an export took any setting."""
    run, site = ("--run", runs / "r"), tmp_path / "site.yaml"
    site.write_text("cluster: {partition: gpu}\n")
    monkeypatch.chdir(tmp_path)
    export = ("export", *run, "--out", "out")
    for words, told in {
        ("evaluate", *run, "--nodes", 4): "--nodes 4 is of a job, and evaluate works in this process",
        ("evaluate", *run, "--softmax", "s.npy", "--nodes", 4): "--nodes 4 is of a job",
        (
            "sweep",
            *run,
            "--res",
            64,
            "--gpus-per-node",
            8,
        ): "Next: --cluster slurm --gpus-per-node 8, or --cluster local",
        ("interpolate", *run, "--nodes", 4): "interpolate works in this process",
        ("extract", *run, "--out", "out", "--nodes", 4): "extract works in this process",
        (*export, "garbage.x=1"): "unknown section 'garbage'",
        (*export, "cluster.tiem=1"): "Did you mean 'cluster.time'",
        (*export, "run.precision=nonsense"): "settings of its job alone",
        (*export, "--nodes", 7): "an export is one process",
        (*export, "--gpus-per-node", 1): "--gpus-per-node 1 is of a job, and export works in this process",
        (*export, "--profile", "gone.yaml"): "no profile",
        (*export, "--profile", site): f"--profile {site} is of a job, and export works in this process",
    }.items():
        assert call(*words) == 2, words
        assert told in capsys.readouterr().err, words
    assert not (tmp_path / "out").exists()
    assert call("evaluate", *run, "--profile", site, *SMALL) == 0, "a profile may say where the data is"
