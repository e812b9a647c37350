"""`study`: its points are what `evaluate` says, a kill repeats nothing that is finished, a cluster gets an array and a last job."""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import killed_when
from support.fake_slurm import calls, fake_slurm
from support.folders import write_photos
from support.in_process import called, handlers_kept

from fixres_dist.base.small_files import read_lines
from fixres_dist.bench import forward
from fixres_dist.cli import study
from fixres_dist.cli.command_job import CommandJob
from fixres_dist.cli.main import main
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event
from fixres_dist.training.predictions import Predictions

torch.set_num_threads(1)
SMALL = (
    *("--weights", "none", "tune.global_batch=12", "tune.epochs=1", "pretrain.global_batch=12", "pretrain.epochs=1"),
    *("data.workers=0", "run.precision=fp32", "run.memory_format=channels_last", "run.engine=stream"),
)
MODELS, SIZES = ("test_efficientnet", "test_vit"), (48, 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("data") / "data", 8, 8)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    with handlers_kept():
        yield


def words(data: Path, runs: Path, *more: str, models: tuple[str, ...] = MODELS, kind: str = "inline") -> list[str]:
    sizes = ",".join(map(str, SIZES))
    what = ["--models", ",".join(models), "--res", sizes, "--data", str(data)]
    return ["study", *what, "--runs-dir", str(runs), "--cluster", kind, *SMALL, *more]


@pytest.fixture(scope="module")
def studied(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs directory of a study of two models at two sizes that nothing has disturbed."""
    runs = tmp_path_factory.mktemp("studied") / "runs"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forward, "TURN_S", 0.0)
        code, said = called(*words(data, runs, "--speed", "--max-gmacs", "0.01"))
    assert code == 0, said
    assert "3 of 4 runs have ended | eta " in said
    return runs


def run_of(runs: Path, model: str, res: int) -> RunDir:
    return RunDir(runs / f"study-model={model}-res={res}")


def test_its_points_are_what_evaluate_says_image_by_image(studied: Path, tmp_path: Path) -> None:
    found = json.loads((studied / "study" / "study.json").read_text())
    assert len(found["points"]) == 8
    for point in found["points"]:
        assert point["run"] == str(run_of(studied, point["model"], point["res"]).root)
        if (point["model"], point["res"]) not in (("test_efficientnet", 48), ("test_vit", 64)):
            continue  # one of each model and size: an evaluation takes a second
        asked = ["--run", point["run"], "--only", point["when"], "--predictions", tmp_path / "p.npz", "data.workers=0"]
        assert called("evaluate", *asked, "--json", tmp_path / "p.json")[0] == 0
        single, own = Predictions.read(tmp_path / "p.npz"), Predictions.read(Path(point["predictions"]))
        assert np.array_equal(single.predicted, own.predicted)
        assert np.array_equal(single.correct1, own.correct1)
        assert json.loads((tmp_path / "p.json").read_text())["top1"] == point["top1"]


def test_the_report_stands_alone(studied: Path) -> None:
    text, page = ((studied / "study" / f"report.{form}").read_text() for form in ("md", "html"))
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "8 points on 24 validation images of data" in text
    assert "Best with at most 0.01 GMACs: " in text
    assert "images/s: forward passes" in text
    looks = [Results.read(run_of(studied, model, res)).looks for model in MODELS for res in SIZES]
    assert len({*map(tuple, looks)}) == 1, "one validation set"
    counted = json.loads((studied / "study" / "study.json").read_text())["evaluations"]
    lines = [line for model in MODELS for res in SIZES for line in read_lines(run_of(studied, model, res).metrics)]
    evaluations = [line["time"] for line in lines if "evaluation" in line]
    assert sum(counts["training"] for one in looks for counts in one.values()) == len(evaluations)
    assert counted == len({*evaluations}) < len(evaluations), "stage one was evaluated once, by the run that trained it"
    assert f"have evaluated this validation set {counted} times" in text
    lines = read_lines(studied / "study" / "speeds.jsonl", res=int)
    assert sorted((line["timm_name"], line["res"]) for line in lines) == sorted(
        [(m, r) for m in MODELS for r in SIZES] * 3
    )


def test_the_runs_of_a_model_share_stage_one_at_one_size(studied: Path) -> None:
    for model in MODELS:
        runs = [run_of(studied, model, res) for res in SIZES]
        assert {run.config().pretrain.res for run in runs} == {64}  # type: ignore[union-attr]
        taken = [any(e["event"] == "stage one taken" for e in read_lines(run.events)) for run in runs]
        assert taken == [False, True]
        assert len({(run.pretrained).read_bytes() for run in runs}) == 1


def test_the_same_command_again_repeats_nothing(data: Path, studied: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in studied.glob("*/events.jsonl")}
    assert len(before) == 4
    report = json.loads((studied / "study" / "study.json").read_text())
    code, said = called(*words(data, studied, "--speed"))
    assert (code, said.count("is finished; its results")) == (0, 4)
    assert {file: file.stat().st_mtime_ns for file in studied.glob("*/events.jsonl")} == before
    assert "speed 1/" not in said
    again = json.loads((studied / "study" / "study.json").read_text())
    assert (again["points"], again["best"]) == (report["points"], report["best"])
    looks = [Results.read(run_of(studied, model, res)).looks for model in MODELS for res in SIZES]
    asked = sum(counts.get("evaluate", 0) for one in looks for counts in one.values())
    assert again["evaluations"] == report["evaluations"] + asked, "those of commands in between, and no other"


def test_a_killed_study_goes_on_and_ends_as_the_undisturbed_one(data: Path, studied: Path, tmp_path: Path) -> None:
    model = "test_efficientnet"
    more = (f"data.cache={tmp_path / 'cache'}", "run.save_every_s=0", "run.log_every=1")
    asked = words(data, tmp_path / "runs", *more, models=(model,))
    first, second = (run_of(tmp_path / "runs", model, res) for res in SIZES)
    assert killed_when(asked, lambda: second.saved_step() >= 3) == -signal.SIGKILL
    assert first.done.exists()
    assert not second.done.exists()
    kept = first.events.read_text()
    assert called(*asked)[0] == 0
    assert first.events.read_text() == kept, "a finished point is not touched"
    starts = [len([e for e in read_lines(run.events) if e["event"] == "started"]) for run in (first, second)]
    assert starts == [1, 2]
    for res, run in zip(SIZES, (first, second), strict=True):
        for when in ("before", "after"):
            file = f"predictions/{when}.npz"
            calm, own = (Predictions.read(one.root / file) for one in (run_of(studied, model, res), run))
            assert np.array_equal(calm.predicted, own.predicted)
            assert np.array_equal(calm.loss, own.loss)


def test_a_cluster_gets_an_array_and_a_last_job_that_reports(
    data: Path, studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = fake_slurm(tmp_path / "slurm", monkeypatch)
    runs = tmp_path / "runs"
    asked = words(data, runs, "--gpus-per-node", "1", "--at-once", "2", "cluster.partition=gpu", kind="slurm")
    assert main([*asked, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "#SBATCH --array=0-3%2" in planned
    assert "4 points, about " in planned
    assert f"then the report: {runs / 'study' / 'report.html'}, by a last job" in planned
    assert not runs.exists()
    assert main(asked) == 0
    told = capsys.readouterr().out
    job = RunDir(runs / "study-job=report")
    text = (slurm / "sbatch.text").read_text()
    for line in ("dependency=afterany:7", "nodes=1", "ntasks-per-node=1", "partition=gpu"):
        assert f"#SBATCH --{line}\n" in text
    assert "dependency" not in str(job.config().cluster.sbatch), "which a resume would ask for again"
    assert "submitted study-job=report as job 7" in told
    assert f"fixres status study --runs-dir {runs}" in told
    monkeypatch.chdir(tmp_path)
    assert CommandJob(str(job.root))() == 0, "the last job, before any point has ended"
    assert "No point is finished yet" in (runs / "study" / "report.md").read_text()
    assert len([c for c in calls(slurm, "sbatch") if "--test-only" not in c]) == 2


def test_finished_runs_alone_make_a_report_that_names_the_failed(
    data: Path, studied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run_of(studied, "test_vit", 48)
    broken = RunDir(studied / "g-epochs=3")
    broken.root.mkdir()
    broken.config_file.write_text(one.config_file.read_text())
    broken.update_state(Event.STARTED)
    broken.fail("disk full", "make room")
    asked = ["study", str(one.root), "study-model=test_efficientnet", "g", "--runs-dir", str(studied), "--name", "two"]
    assert main(asked) == 1
    found = json.loads((studied / "two" / "study.json").read_text())
    assert len(found["points"]) == 7, "3 runs, and the vit at stage one's size"
    assert "g-epochs=3 is failed: disk full. Next: make room" in capsys.readouterr().out
    assert "| g-epochs=3 | failed |" in (studied / "two" / "report.md").read_text()


def test_the_sizes_of_a_model_by_default(tmp_path: Path) -> None:
    """Four from the weights' own size on, in steps that the network takes."""
    for model, sizes in (
        ("b0", [224, 256, 288, 320]),
        ("demo", [128, 160, 192]),
        ("vit_small_patch14_dinov2", [518, 588, 672, 742]),
    ):
        assert study.resolutions(argparse.Namespace(res=None, weights=""), model) == sizes


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("", "nothing to study was given. Accepted: --model M,M2 --data DIR, or runs"),
        ("--data DIR", "nothing to study was given"),
        ("--model test_vit", "no data set given"),
        ("--model test_vit,, --data DIR", "--model is 'test_vit,,'; accepted: names between commas"),
        ("--model test_vti --data DIR", "Did you mean 'test_vit'?"),
        ("--model test_vit --data DIR --res 224,abc", "--res is '224,abc'; accepted: whole numbers"),
        ("--model test_vit --data DIR --res 20", "--res 20 is below 32 px"),
        ("--model test_vit --data DIR --res 48,57", "cannot take 57 px: its patches are 16 px. Accepted near it: 48 and 64"),
        ("--model test_vit --data DIR --max-gmacs 0", "--max-gmacs is 0; accepted: a number above 0"),
        ("--model test_vit --data DIR --max-gmacs nan", "--max-gmacs is nan; accepted: a number above 0"),
        ("--model test_vit --data DIR --min-images-per-second -3", "--min-images-per-second is -3; accepted"),
        ("--model test_vit --data DIR --at-once -1", "--at-once is -1; accepted: 0 (all) or more"),
        ("--model test_vit --data DIR --name a/b", "--name is 'a/b'; accepted: a name without slashes"),
        ("--model test_vit --data DIR --name ..", "--name is '..'; accepted"),
        ("--model test_vit --data DIR tune.epoch=3", "Did you mean 'tune.epochs'?"),
        ("--model test_vit --data DIR nothing-here", "unknown run 'nothing-here'"),
        ("RUN --res 64", "--res 64 is for points to train, and no --model is given"),
        ("RUN --dry-run", "--dry-run is the plan of points to train, and no --model is given"),
        ("RUN tune.epochs=3", "tune.epochs=3 is for points to train"),
        ("RUN --name x nothing", "unknown run 'nothing'"),
    ],
)  # fmt: skip
def test_refusals(asked: str, says: str, data: Path, studied: Path, tmp_path: Path) -> None:
    places = {"DIR": str(data), "RUN": str(run_of(studied, "test_vit", 48).root)}
    given = [places.get(word, word) for word in asked.split()]
    code, said = called("study", *given, "--runs-dir", tmp_path / "runs", "--cluster", "inline", "--weights", "none")
    assert code == 2, said
    assert says in said
    assert not (tmp_path / "runs").exists()
