"""`report`: a row for each run in plain numbers, beside what was published."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fixres_dist.base.small_files import append
from fixres_dist.cli.main import main
from fixres_dist.cluster import status
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import Pretrain
from fixres_dist.publishing import model_card, report
from fixres_dist.runs import preparation
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.starts import device_seconds
from fixres_dist.runs.states import Event
from fixres_dist.training.predictions import Predictions

RESULTS: dict[str, Any] = {
    "policy": "classifier+bn",
    "transform": "test_aug",
    "resize_rule": "fixefficientnet",
    "n": 50000,
    "skipped": 0,
    "before": {"top1": 78.7, "top5": 94.4, "loss": 0.9},
    "after": {"top1": 80.1, "top5": 95.3, "loss": 0.8},
    "delta_top1": 1.4,
    "delta_ci95": [1.1, 1.7],
    "images_seen": 6400000,
    "seconds": 754.0,
    "world_size": 8,
    "precision": "bf16",
    "optimizer": "torch SGD",
    "apex": None,
    "engine": "stream",
    "trunk": "contiguous",
    "versions": {"torch": "2.11"},
    "hardware": {"device": "H200", "devices": 8, "nodes": ["a"]},
}


def made(root: Path, model: str, res: int, weights: str = "", finished: bool = True, **values: Any) -> RunDir:
    """A run directory as a run of `model` leaves it, with RESULTS' numbers."""
    recipe = recipes.find(model, weights)
    config = reading.parse(Config, reading.merge(recipe.values, {"data": {"root": "/data/imagenet", "res": res}}))
    root.mkdir(parents=True)
    run = RunDir(root)
    (root / "config.yaml").write_text(reading.dump(config))
    run.update_state(
        Event.DONE if finished else Event.FAILED, step=7, total_steps=20, reason=None if finished else "disk full"
    )
    (root / "class_index.json").write_text(json.dumps({k: str(k) for k in range(1000)}))
    if finished:
        named = {"model": config.model.name, "timm_name": config.model.timm_name, "weights": config.model.weights}
        run.results.write_text(json.dumps({**RESULTS, **named, "res": res, **values}))
    return run


def test_a_run_stands_beside_its_published_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "runs" / "b0-320", "b0", 320)
    (run.root / "sweep.png").touch()
    (run.root / "evaluations").mkdir()
    counts = {"n": 7500, "skipped": 0}
    shifted = {
        "set": "imagenet-a",
        "res": 320,
        "classes": {"of_set": 200, "of_model": 1000},
        "before": {"top1": 10.0, "top5": 20.0, "loss": 5.0, **counts},
        "after": {"top1": 9.0, "top5": 19.0, "loss": 5.1, **counts},
        "delta_top1": -1.0,
        "delta_ci95": [-1.4, -0.6],
        "by_size": [],  # of an older version
        "by_class": {},
    }
    for name in ("imagenet-a", "val"):
        (run.root / "evaluations" / f"{name}-320.json").write_text(json.dumps({**shifted, "set": name}))
    out = tmp_path / "report"
    assert main(["report", str(run.root), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| b0-320"))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("b0-320", "tf_efficientnet_b0.ns_jft_in1k", "imagenet, 1000 classes", "5.29", "0.785", "224", "320", "78.70"),
        *("80.10", "+1.40 (+1.10 to +1.70)", "50000"),
        *("78.8 at 224 -> 80.2 at 320; timm's start: 78.68", "12m34s", "8 x H200"),
    ]
    assert "| b0-320 | validation | 320 | 78.70 | 80.10 | +1.40 (+1.10 to +1.70) |" in text
    assert "| b0-320 | imagenet-a | 320 | 10.00 | 9.00 | -1.00 (-1.40 to -0.60) |" in text
    assert text.count("| b0-320 | val") == 1, "results.json says it already"
    assert "](../runs/b0-320/sweep.png)" in text
    assert "alpha.png" not in text
    assert {Image.open(out / name).width for name in ("report.png", "gains.png")} == {1360, 1008}, "of a page's text"
    capsys.readouterr()
    assert main(["report", str(run.root), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["parameters_m"], found["delta_ci95"], found["evaluations"][0]["delta_top1"]) == (
        5.289,
        [1.1, 1.7],
        -1.0,
    )


def predictions(file: Path, right: NDArray[np.bool_], confidence: float) -> None:
    labels = np.arange(len(right), dtype=np.int32) % 3
    made = np.where(right, labels, (labels + 1) % 3).astype(np.int32)
    same = np.full(len(right), confidence, np.float32)
    Predictions(made, right, right, same, same, labels).save(file, "list")


def test_a_page_holds_all_of_a_run_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Curves, pictures, confidence, settings, events and cost; no secret, and no address that a browser would load."""
    secret = "s3cr3tvalue"
    hardware = {"device": "EPYC", "devices": 8, "nodes": ["a"], "cpus": 4}
    means = {"macro_precision": 62.5, "macro_recall": 60.25, "macro_f1": 61.25, "ece": 3.5, "mean_confidence": 83.5}
    run = made(tmp_path / "runs" / "own [x]", "b0", 320, hardware=hardware, measures={"after": means})
    config = run.config()
    env = replace(config.cluster, env={"HF_TOKEN": secret})
    (run.root / "config.yaml").write_text(reading.dump(replace(config, cluster=env)))
    (run.root / "plan.txt").write_text(f"model      b0, HF_TOKEN={secret}\n")
    for name in ("sweep.png", "pictures/crops.png", "pictures/confusion.png"):
        (run.root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(run.root / name)
    hits = np.arange(30) % 3 > 0
    predictions(run.root / "predictions" / "before.npz", hits, 0.5)
    predictions(run.root / "predictions" / "after.npz", hits, 0.9)
    for line in (
        {"step": 5, "stage": "fix", "loss": 1.0},
        {"step": 5, "evaluation": "after", "res": 320, "top1": 80.1},
    ):
        append(run.metrics, {**line, "time": 2700.0})
    for event in (
        {"time": 1000.0, "event": "started", "world_size": 2, "step": -1},
        {"time": 2800.0, "event": "stop requested", "signal": "<b>SIGTERM</b>"},
        {"time": 9000.0, "event": "started", "world_size": 1, "step": 3},
        {"time": 10800.0, "event": "done"},
    ):
        append(run.events, event)
    out = tmp_path / "out"
    assert main(["report", str(run.root), "--html", "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    pictures = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', page)
    assert len(pictures) == 7, "gains, report, training, sweep, crops, confusion, reliability"
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for text in (
        *(
            "top-1 78.70 before, 80.10 after fixing",
            "macro F1 61.25, precision 62.50, recall 60.25",
            ">6 core-hours<",
            "Not drawn: the mistakes",
            "resize_rule",
        ),
        *("interpolate --run", "stop requested", "&lt;b&gt;SIGTERM", "8 x EPYC on 1 node(s)"),
    ):
        assert text in page, text
    assert secret not in page
    assert "<b>SIGTERM" not in page


def test_runs_of_one_name_have_their_own_numbers_and_curves(tmp_path: Path) -> None:
    """`report runs/r1 v2/r1 --html` had four parts, of which two were one run's numbers under the other."""
    tops = (81.25, 82.5)
    runs = [
        made(tmp_path / folder / "r1", "b0", 320, after={**RESULTS["after"], "top1": top})
        for folder, top in zip(("runs", "v2"), tops, strict=True)
    ]
    for run, loss in zip(runs, (1.0, 2.0), strict=True):
        append(run.metrics, {"step": 5, "stage": "fix", "loss": loss, "time": 2700.0})
    assert main(["report", *(str(run.root) for run in runs), "--html"]) == 0
    out = tmp_path / "runs" / "report"
    page = (out / "report.html").read_text()
    assert re.findall(r"top-1 78\.70 before, ([\d.]+) after fixing", page) == [f"{top:.2f}" for top in tops]
    assert page.count("<h2>r1</h2>") == 2
    assert sorted(file.name for file in out.glob("*-training.png")) == ["1-r1-training.png", "2-r1-training.png"]


def test_the_time_of_all_starts_counts(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert device_seconds(run) == 0
    happened = ((10, "started", 4), (20, "requeued", 0), (500, "started", 2), (560, "lost", 0), (570, "started", 2))
    for time, event, ranks in happened:
        append(run.events, {"time": float(time), "event": event} | ({"world_size": ranks} if ranks else {}))
    append(run.metrics, {"step": 3, "time": 530.0})
    append(run.metrics, {"step": 4, "time": 600.0})
    assert device_seconds(run) == 4 * 10 + 2 * 30 + 2 * 30, "waits between the starts do not"


def test_a_run_that_has_not_finished_is_listed_with_its_state(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a", "b0", 320), made(tmp_path / "b", "b4", 512, "ap", finished=False)]
    assert main(["report", *(str(run.root) for run in runs), "--out", str(tmp_path)]) == 0
    assert "| b | failed | 7 of 20 | disk full |" in (tmp_path / "report.md").read_text()


def test_other_models_and_other_weights_are_counted(tmp_path: Path) -> None:
    """resnet50 as everybody counts it: 25.6 M parameters; 4.1 G multiply-adds at 224."""
    row = report.row(made(tmp_path / "r", "resnet50", 224))
    assert (row.parameters_m, row.multiply_adds_g, row.published) == (25.557, 4.089, None)
    scaled = report.row(made(tmp_path / "b4", "b4", 256, "ap"))
    assert scaled.multiply_adds_g == pytest.approx(recipes.find("b4", "ap").facts.multiply_adds_g / 4, abs=1e-3)  # type: ignore[union-attr]


def test_counting_agrees_with_the_recipes_facts(tmp_path: Path) -> None:
    """The same model by its timm name has no recipe's facts and is counted."""
    name = "tf_efficientnet_b0.ns_jft_in1k"
    rows = [report.row(made(tmp_path / model, model, 320)) for model in ("b0", name)]
    for row in rows:
        assert (row.parameters_m, row.multiply_adds_g, row.train_res) == (5.289, 0.785, 224)


def test_the_published_curves_are_the_tables() -> None:
    curves = report.published_curves()
    assert {name: len(points) for name, points in curves.items()} == {
        "Noisy Student": 9,
        "Noisy Student, fixed": 9,
        "AdvProp": 9,
        "AdvProp, fixed": 9,
    }
    assert (curves["Noisy Student, fixed"][0][0], curves["Noisy Student, fixed"][0][2]) == (5.3, 80.2)
    assert (curves["Noisy Student"][-1][0], curves["Noisy Student"][-1][2]) == (480, 88.4)


def test_a_report_among_the_runs_is_left_out_of_the_next_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`report runs/*`, twice."""
    run = made(tmp_path / "b0-320", "b0", 320)
    (tmp_path / "a report").mkdir()
    assert main(["report", str(tmp_path / "a report"), str(run.root)]) == 0
    assert capsys.readouterr().err == f"left out, no run directories: {tmp_path / 'a report'}\n"
    assert "| b0-320 | tf_efficientnet_b0" in (tmp_path / "report" / "report.md").read_text()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err


@pytest.mark.parametrize(("high", "said"), [(-0.4, True), (0.2, False)])
def test_a_run_that_ends_below_its_first_result_says_so(tmp_path: Path, high: float, said: bool) -> None:
    after = {"delta_top1": -3.9, "delta_ci95": [-7.4, high]}
    first = {"after": after, "top1": 84.0, "top5": 95.0, "loss": 0.5, "res": 224, "penalty": 0.1, "fold_loss": 0.5}
    run = made(tmp_path / "b0-320", "b0", 320, floor=[first])
    config = run.config()
    preparation.write_config(run, replace(config, pretrain=Pretrain(base_lr=0.02)))
    verdict = Results.read(run).verdict(run)
    assert bool(verdict) == said
    if said:
        assert verdict.startswith(
            "WORSE than its first result, 84.00 by a logistic classifier on the untouched network at 224 px"
        )
        assert "by -3.90 points (95 % interval -7.40 to -0.40, paired, n " in verdict
        assert verdict.endswith(
            "pretrain.base_lr=0.002, or pretrain.policy=classifier, which leaves the network as it is"
        )


def test_a_run_that_lost_says_so_in_report_card_and_status(tmp_path: Path) -> None:
    """Every place has the same words, and status the result's top-1 although an earlier evaluation was better."""
    before_at = {"224": {"top1": 78.1, "top5": 94.0, "loss": 0.9, "why": "the weights' own"}}
    best = {"delta_top1": -0.9, "delta_ci95": [-1.2, -0.6], "res": 224, "of": 2}
    worse = {"delta_top1": -0.5, "delta_ci95": [-0.8, -0.2], "before_at": before_at, "best_before": best}
    worse["versions"] = {"torch": "2.14", "timm": "1.0"}
    run = made(tmp_path / "b0-320", "b0", 320, **worse)
    lines = [{"step": 5, "evaluation": name, "res": 128, "top1": 90.0} for name in ("pretrain epoch 1", "fix epoch 1")]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    verdict = Results.read(run).verdict(run)
    assert verdict.startswith("WORSE after fixing than before it at 224 px: -0.90 points")
    rows = [report.row(run)]
    assert f"**b0-320**: {verdict}." in report.markdown([run], rows, [], tmp_path)
    assert "over the best before, 224 px: -0.90 (-1.20 to -0.60), corrected for the best of 2" in rows[0].cells()[9]
    card = model_card.text(run, ["model.safetensors"], None)
    assert f"\n{verdict.replace(str(run.root), 'b0-320')}.\n" in card
    assert str(tmp_path) not in card
    assert "78.10 at 224 px (the weights' own)" in card
    assert "Over the best before, at 224 px: -0.90 points" in card
    (row,) = status.rows([run])
    assert (row.top1, row.top1_of, row.reason) == (80.1, "after", verdict)
    unfinished = made(tmp_path / "b", "b4", 512, "ap", finished=False)
    unfinished.metrics.write_text(run.metrics.read_text())
    (row,) = status.rows([unfinished])
    assert (row.top1, row.top1_of) == (90.0, "fix epoch 1, 128 px")


def test_the_card_is_the_same_from_the_runs_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = {"delta_top1": -0.5, "delta_ci95": [-0.8, -0.2], "versions": {"torch": "2.14", "timm": "1.0"}}
    run = made(tmp_path / "b0-320", "b0", 320, **worse)
    card = model_card.text(run, ["model.safetensors"], None)
    assert "--run b0-320" in card
    monkeypatch.chdir(run.root)
    assert model_card.text(RunDir(Path(".")), ["model.safetensors"], None) == card
    monkeypatch.chdir(tmp_path)
    assert model_card.text(RunDir(Path("b0-320")), ["model.safetensors"], None) == card


def test_a_set_that_lost_is_said_with_the_alpha_that_does_not(tmp_path: Path) -> None:
    """In report and card; without alpha.json, or without the set in it, the command that looks for one."""
    run = made(tmp_path / "b0-320", "b0", 320, versions={"torch": "2.11", "timm": "1.0"})
    (run.root / "evaluations").mkdir()
    for name, delta, interval in (("a", -1.0, [-1.4, -0.6]), ("v2", 0.3, [-0.1, 0.7])):
        record = {"set": name, "res": 320, "delta_top1": delta, "delta_ci95": interval}
        record |= {when: {"top1": 50.0, "top5": 70.0, "loss": 2.0, "n": 900} for when in ("before", "after")}
        (run.root / "evaluations" / f"{name}-320.json").write_text(json.dumps(record))
    start = "LOST by fixing: a at 320 px -1.00 (-1.40 to -0.60). "
    looked_for = f"{start}Next: fixres interpolate --run {run.root} --eval-set a=DIR looks for a weight between"

    def told(curves: dict[str, list[tuple[float, float]]] | None = None) -> str:
        if curves is not None:
            rows = {
                name: [{"alpha": a, "delta_top1": gain, "delta_ci95": [gain - 0.3, gain + 0.3]} for a, gain in line]
                for name, line in curves.items()
            }
            (run.root / "alpha.json").write_text(json.dumps({"curves": rows}))
        ((row,), _) = report.rows([run])
        assert row.robustness in report.markdown([run], [row], [], tmp_path)
        card = model_card.text(run, ["model.safetensors"], None)
        assert row.robustness.replace(str(run.root), run.name) in card
        assert str(run.root) not in card
        return row.robustness

    assert told().startswith(looked_for)
    (run.root / "alpha.json").write_text(json.dumps({"res": 128, "curves": {"a": []}}))
    assert told().startswith(looked_for), "of heads that were weighed at another size"
    val = [(0.0, 0.0), (0.25, 0.5), (0.5, 0.9), (1.0, 1.4)]
    assert told({"val": val}).startswith(looked_for)
    steep = {"val": val, "a": [(0.0, 0.0), (0.25, -0.2), (0.5, -0.5), (1.0, -1.0)]}
    gained = "alpha 0.25 gains +0.50 (+0.20 to +0.80) on val and loses on none of the sets: "
    assert told(steep) == f"{start}{gained}fixres export --run {run.root} --alpha 0.25"
    steeper = {"val": val, "a": [(0.0, 0.0), (0.25, -0.9), (0.5, -0.9), (1.0, -1.0)]}
    assert told(steeper) == f"{start}No alpha of alpha.json gains on val without losing there"
    for name in ("a", "val"):  # --eval-set val=DIR is refused, and an alpha of 320 px says nothing about 128
        at_128 = {**json.loads((run.root / "evaluations" / "a-320.json").read_text()), "set": name, "res": 128}
        (run.root / "evaluations" / f"{name}-128.json").write_text(json.dumps(at_128))
    lines = [f"{name} at 128 px -1.00 (-1.40 to -0.60)" for name in ("a", "val")]
    elsewhere = f"LOST by fixing at another size: {', '.join(lines)}; fixing is for the run's own, 320 px"
    assert told(steep) == f"{elsewhere}. {start}{gained}fixres export --run {run.root} --alpha 0.25"
    (run.root / "evaluations" / "a-320.json").unlink()
    assert told(steep) == elsewhere
    (run.root / "evaluations" / "a-320.json").write_text(json.dumps({**at_128, "set": "a", "res": 320}))
    (run.root / "alpha.json").write_text("{")
    run.done.touch()
    ((), (other,)) = report.rows([run])
    assert "alpha.json" in other["reason"], "a damaged file spoils no other run's report"
