"""Grids as one thing: the commands that a submission prints, and the closing table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from runs.test_results import RESULTS
from support.fake_slurm import fake_slurm
from support.folders import write_photos

from fixres_dist.cli import submission
from fixres_dist.cli.main import main
from fixres_dist.cluster import grid
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.results import Accuracy
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.runs.task import Task

HEAD = ["RUN", "tune.base_lr", "STATE", "TOP-1", "BEFORE", "AFTER", "GAIN", "(PAIRED", "95", "%)"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "data", 8, 4)


def submit(folder: Path, data: Path, *more: str, kind: str = "slurm") -> int:
    model = ["--model", "test_efficientnet", "--weights", "none", "--data", str(data), "--gpus-per-node", "1"]
    where = ["--cluster", kind, "--runs-dir", str(folder / "runs")]
    return main(["submit", *model, *where, "tune.global_batch=16", *more])


def test_a_submitted_grid_prints_the_commands_for_all_its_runs(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch)
    where = f"--runs-dir {tmp_path / 'runs'}"

    def printed(*more: str) -> list[str]:
        assert submit(tmp_path, data, *more) == 0
        return [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  fixres")]

    groups = ["--grid", "cluster.nodes=1,2", "--grid", "tune.epochs=1,2"]  # two jobs, and one grid
    names = ("status", "logs", "cancel", "resume", "board")
    ends = {name: " --follow" if name == "logs" else "" for name in names}
    assert printed("--res", "64", "--name", "g", *groups) == [f"fixres {x} g {where}{ends[x]}" for x in names]
    without_name = printed("--res", "64", "--grid", "tune.epochs=1,2")
    assert without_name[0] == f"fixres status test_efficientnet-64-none {where}"
    sizes = printed("--grid", "data.res=64,96")  # whose runs' names do not begin alike
    assert sizes[0] == f"fixres status test_efficientnet-64-none-res=64 test_efficientnet-96-none-res=96 {where}"
    other = printed(
        "--res", "64", "--name", "g", "--grid", "tune.momentum=0.5,0.8"
    )  # `g` alone would be all of both grids
    assert other[2] == f"fixres cancel g-momentum=0.5 g-momentum=0.8 {where}"
    assert printed("--res", "64", "--name", "h")
    same = printed("--res", "64", "--name", "h", "--grid", "tune.epochs=1,2")  # `h` is a run
    assert same[2] == f"fixres cancel h-epochs=1 h-epochs=2 {where}"
    assert [line.split()[1] for line in printed("--res", "64", "--name", "one")] == [
        "status",
        "logs",
        "cancel",
        "board",
    ]
    assert main(["status", "g", "--json", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def ended(folder: Path, name: str, top1: float | None, **tune: object) -> RunDir:
    run = RunDir(folder / "runs" / name)
    run.root.mkdir(parents=True)
    env = {"env": {"HF_TOKEN": f"hf_of_{name}"}}
    run.config_file.write_text(reading.dump(reading.parse(Config, {"tune": tune, "cluster": env})))
    run.update_state(Event.STARTED)
    if top1 is None:
        run.fail("no room", "make room")
    else:
        replace(RESULTS, after=Accuracy(top1, 99.0, 0.5), delta_top1=top1 - 78.7).write(run)
        run.finish()
    return run


def test_a_grid_that_has_ended_has_a_closing_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, top1, rate in (("g-base_lr=1e-3", 80.1, "1e-3"), ("g-base_lr=1e-4", None, "1e-4")):
        ended(tmp_path, name, top1, base_lr=rate)
    Task("study", (), "/", "report.html").write(ended(tmp_path, "g-job=report", 80.0).task_file)
    where = ["--runs-dir", str(tmp_path / "runs")]
    assert main(["status", "g", *where]) == 0
    listed, _, closing = capsys.readouterr().out.partition("\n\n")
    assert listed.startswith("NAME")
    head, *lines = [line.split() for line in closing.splitlines()]
    assert head == HEAD
    assert len(lines) == 2, "the last job of a study is no run"
    assert lines[0][:2] == ["g-base_lr=1e-3", "0.001"]
    assert lines[0][-7:] == ["done", "78.70", "80.10", "+1.40", "(+1.10", "to", "+1.70)"]
    assert [lines[1][0], lines[1][-1]] == ["g-base_lr=1e-4", "failed"]
    assert "hf_of" not in closing
    assert main(["status", *where]) == 0
    assert "GAIN" not in capsys.readouterr().out, "runs of a folder need have nothing to do with each other"
    RunDir(tmp_path / "runs" / "g-base_lr=1e-4").update_state(Event.SUBMITTED)
    assert main(["status", "g", *where]) == 0
    assert "GAIN" not in capsys.readouterr().out


def test_only_settings_that_differ_are_columns(tmp_path: Path) -> None:
    made = [ended(tmp_path, f"r{k}", 80.0 + k, epochs=str(k + 1), momentum=str(k // 2 / 2)) for k in range(3)]
    made.append(ended(tmp_path, "damaged", None))
    made[3].config_file.write_text("{")
    table = grid.closing_table(made)
    assert [word for word in table.splitlines()[0].split() if "." in word] == ["tune.epochs", "tune.momentum"]
    assert "damaged" in table
    values = [
        asdict(Config())["model"] | change
        for change in ({"name": "b0", "timm_name": "x"}, {"name": "b1", "timm_name": "y"})
    ]
    assert grid.differing([{f"model.{k}": str(v) for k, v in found.items()} for found in values]) == ["model.name"]


def test_a_local_grid_ends_with_its_table(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(run: RunDir, *_: object) -> int:
        replace(RESULTS, after=Accuracy(80.0, 99.0, 0.5)).write(run)
        run.finish()
        return 0

    monkeypatch.setattr(submission, "start_here", work)
    asked = ["--res", "64", "--name", "g", "--grid", "tune.epochs=1,2"]
    for _ in range(2):  # the second time all are finished
        assert submit(tmp_path, data, *asked, kind="inline") == 0
        last = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
        assert last[0] == [word.replace("base_lr", "epochs") for word in HEAD]
        assert [line[:3] for line in last[1:]] == [[f"g-epochs={k}", str(k), "done"] for k in (1, 2)]


def test_a_stop_ends_the_runs_of_a_resumed_grid_too(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def stopped(run: RunDir, *_: object) -> int:
        started.append(run.name)
        run.update_state(Event.STARTED)
        run.cancel("cancelled")
        return 1

    monkeypatch.setattr(submission, "start_here", stopped)
    assert submit(tmp_path, data, "--res", "64", "--name", "g", "--grid", "tune.epochs=1,2", kind="inline") == 1
    assert main(["resume", "g", "--runs-dir", str(tmp_path / "runs")]) == 1
    assert started == ["g-epochs=1", "g-epochs=1"]
