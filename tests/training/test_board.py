"""A real TensorBoard over HTTP, on a run of two stages that was stopped twice: every item once, and steps that only rise."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.in_process import called, handlers_kept
from tensorboard import program

from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import loop

STATUSES = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """`two`, stopped in each of its stages, and `other`, which shares its stage one and fixes at another rate."""
    folder = tmp_path_factory.mktemp("board")
    words = [
        *(
            "submit",
            "--model",
            "test_efficientnet",
            "--res",
            "96",
            "--weights",
            "none",
            "--data",
            photos,
            "--runs-dir",
            folder,
        ),
        *("--cluster", "inline", "tune.global_batch=12", "tune.epochs=2", "run.log_every=1", "data.workers=0"),
        *("pretrain.epochs=1", "pretrain.res=64", "pretrain.global_batch=12", "run.profile=steps", "run.engine=stream"),
        *("run.precision=fp32", "run.memory_format=channels_last"),
    ]
    backward, calls = loop.backward, 0

    def interrupted(*args: Any) -> list[int]:
        nonlocal calls
        calls += 1
        if calls in (5, 5 + 6):  # step 5 of 7 of stage one, and the first start's last step again
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args)

    loop.backward = interrupted
    try:
        with handlers_kept():
            codes = [called(*words, "--name", "two", "tune.base_lr=0.02")[0] for _ in range(3)]
            codes.append(called(*words, "--name", "other", "tune.base_lr=0.002")[0])
    finally:
        loop.backward = backward
    assert codes == [1, 1, 0, 0]
    assert called("interpolate", "--run", folder / "two", "--alpha", "0,0.5,1", "data.workers=0")[0] == 0
    return folder


class Board:
    """TensorBoard as `fixres board` starts it, asked by HTTP."""

    def __init__(self, folder: Path) -> None:
        server = program.TensorBoard()
        server.configure(
            argv=["", "--logdir", str(folder), "--port", "0", "--load_fast", "false", "--reload_interval", "1"]
        )
        self.url = server.launch()

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self.url}data/{path}?{urllib.parse.urlencode(query)}") as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.url}data/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def points(self, tag: str, run: str = "two") -> list[tuple[int, float]]:
        return [(step, value) for _, step, value in self.get("plugin/scalars/scalars", tag=tag, run=run)]


@pytest.fixture(scope="module")
def board(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Board:
    links = tmp_path_factory.mktemp("links")
    for name in ("two", "other"):
        (links / name).symlink_to(runs / name / "tb")
    found = Board(links)
    deadline = time.monotonic() + 60
    while not {"two", "other", "two/alpha-val"} <= set(found.get("runs")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_no_curve_has_a_step_twice_or_goes_back(board: Board) -> None:
    tags = board.get("plugin/scalars/tags")
    for run, names in tags.items():
        for tag in names:
            steps = [step for step, _ in board.points(tag, run)]
            assert steps == sorted(set(steps)), (run, tag)
    names = set(tags["two"])
    assert {f"train/{name}" for name in ("images_per_second", "data_wait_percent", "cpu_memory_gib", "epoch")} <= names
    assert [step for step, _ in board.points("train/loss")] == list(range(1, 22))


def test_every_evaluation_has_a_tag_of_its_stage_and_resolution(board: Board) -> None:
    found = {tag: board.points(tag) for tag in board.get("plugin/scalars/tags")["two"] if "top1" in tag}
    steps = {tag: [step for step, _ in points] for tag, points in found.items()}
    assert steps == {
        "eval/top1": [7, 14, 21],
        "eval_fix_96px/top1": [7, 14, 21],
        "eval_pretrain_64px/top1": [7],
        "by_epoch/top1_fix_96px": [1, 2, 3],
        "by_epoch/top1_pretrain_64px": [1],
        "result/top1_before": [21],
        "result/top1_after": [21],
    }
    assert board.points("eval/top1")[-1][1] == pytest.approx(board.points("result/top1_after")[0][1])
    assert [x for x, _ in board.points("alpha/top1", "two/alpha-val")] == [0, 50, 100]
    assert board.points("reliability/after")


def test_stops_restarts_and_saves_are_marked_and_told(board: Board, runs: Path) -> None:
    stops = [step for step, _ in board.points("events/stop")]
    assert len(stops) == 2
    assert stops[0] < 7 < stops[1] < 21
    assert board.points("events/restart") == [(step, 1.0) for step in stops]
    assert {7, 21, *stops} <= {step for step, _ in board.points("events/save")}
    texts = {
        tag: board.get("plugin/text/text", tag=f"{tag}/text_summary", run="two")
        for tag in ("config", "plan", "sbatch", "events/stop", "events/restart")
    }
    assert [one["step"] for one in texts["events/stop"]] == stops
    assert "SIGTERM" in texts["events/stop"][0]["text"]
    assert "fixed at 96 px" in texts["plan"][0]["text"]
    assert "#SBATCH" in texts["sbatch"][0]["text"]
    assert "timm_name: test_efficientnet" in texts["config"][0]["text"]
    assert list((runs / "two" / "tb" / "profile").glob("*.json.gz")), "run.profile=steps"


def test_pictures_stand_there_once(board: Board) -> None:
    for run in ("two", "other"):
        for name in ("crops", "mistakes", "confusion"):
            (one,) = board.get("plugin/images/images", tag=f"pictures/{name}", run=run, sample="0")
            with urllib.request.urlopen(f"{board.url}data/plugin/images/individualImage?{one['query']}") as answer:
                assert answer.read(4) == b"\x89PNG"


def test_settings_and_results_of_two_runs_stand_side_by_side(board: Board, runs: Path) -> None:
    experiment = board.post("plugin/hparams/experiment", {"experimentName": ""})
    first = {info["name"] for info in experiment["hparamInfos"][:9] if info.get("differs")}
    assert {"data.res", "model.name", "tune.base_lr", "tune.epochs"} <= first, "what was given by hand"
    metrics = [info["name"] for info in experiment["metricInfos"]]
    asked = {"experimentName": "", "allowedStatuses": STATUSES, "colParams": [{"metric": name} for name in metrics]}
    groups = board.post("plugin/hparams/session_groups", {**asked, "startIndex": 0, "sliceSize": 9})["sessionGroups"]
    found = {group["name"]: group for group in groups}
    assert {name: group["hparams"]["tune.base_lr"] for name, group in found.items()} == {"two": 0.02, "other": 0.002}
    for name, group in found.items():
        results = json.loads(RunDir(runs / name).results.read_text())
        shown = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        assert shown["result/top1_after"] == pytest.approx(results["after"]["top1"], abs=1e-3)
        assert shown["result/gain"] == pytest.approx(results["delta_top1"], abs=1e-3)
        assert group["sessions"][0]["status"] == "STATUS_SUCCESS"
