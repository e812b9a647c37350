"""`fixres predict` and `fixres_dist.load`: pictures without labels, by a run and by its export; and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics
from support.commands import ROOT
from support.in_process import SETTINGS, called

import fixres_dist
from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.cli.main import main
from fixres_dist.config import reading
from fixres_dist.evaluation.classifier import Classifier
from fixres_dist.runs import looks
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.calibration import HOTTEST, reliability
from fixres_dist.training.predictions import Predictions

CLASSES = ["ash", "birch", "cedar"]


def settings(photos: Path) -> tuple[object, ...]:
    return ("--data", photos, "tune.epochs=1", "tune.base_lr=0.5", "data.resize_rule=fixres_height")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> RunDir:
    """A finished run with its export; one learning rate for all, so that classes differ."""
    runs = tmp_path_factory.mktemp("predict")
    assert called("submit", *SETTINGS, "--runs-dir", runs, *settings(photos))[0] == 0
    assert called("export", "--run", runs / "r")[0] == 0
    return RunDir(runs / "r")


@pytest.fixture(scope="module")
def evaluated(run: RunDir) -> dict[str, tuple[str, float]]:
    """By file below val/: class and confidence after fixing, as evaluations have it."""
    made = Predictions.read(run.root / "predictions" / "after.npz")
    val = Path(run.config().data.root) / "val"
    names = [str(path) for name in CLASSES for path in sorted((val / name).iterdir())]
    assert len({*made.predicted.tolist()}) > 1
    pairs = zip(made.predicted.tolist(), made.confidence.tolist(), strict=True)
    return {name: (CLASSES[k], confidence) for name, (k, confidence) in zip(names, pairs, strict=True)}


@pytest.fixture(scope="module")
def model(run: RunDir) -> Classifier:
    return fixres_dist.load(run.root)


def predicted(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[list[dict[str, str]], str]:
    """(rows of the CSV, stderr)"""
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--csv"]) == 0
    said = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(said.out))), said.err


def check(rows: list[dict[str, str]], expected: dict[str, tuple[str, float]]) -> None:
    assert [row["file"] for row in rows] == list(expected)
    assert [row["class_1"] for row in rows] == [name for name, _ in expected.values()]
    assert [float(row["confidence_1"]) for row in rows] == pytest.approx([c for _, c in expected.values()], abs=1e-5)


@pytest.mark.parametrize("source", ["", "export", "export/model.safetensors"])
def test_a_folder_has_the_classes_that_evaluate_found(
    run: RunDir, evaluated: dict[str, tuple[str, float]], capsys: pytest.CaptureFixture[str], source: str
) -> None:
    """Also by a resize rule that timm's keys in config.json cannot say."""
    rows, said = predicted(capsys, run.root / source, Path(run.config().data.root) / "val")
    check(rows, evaluated)
    assert list(rows[0]) == ["file", *(f"{what}_{k}" for k in (1, 2, 3) for what in ("class", "confidence"))]
    assert sum(float(rows[0][f"confidence_{k}"]) for k in (1, 2, 3)) == pytest.approx(1, abs=1e-4)
    assert "33 pictures in " in said


def test_lists_and_stdin_with_blank_lines_and_comments(
    run: RunDir,
    evaluated: dict[str, tuple[str, float]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *others = list(evaluated)[::5]
    (tmp_path / "beside.jpg").symlink_to(others[0])
    text = f"\ufeff# mine\r\n\r\n{first}\r\n  \nbeside.jpg\n#{others[1]}\n{others[1]}"
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    (tmp_path / "wide.txt").write_text(text.removeprefix("\ufeff"), encoding="utf-16")  # as PowerShell writes it
    expected = {name: evaluated[name] for name in (first, others[1])}
    for words, given in (
        ([tmp_path / "list.txt"], b""),
        ([tmp_path / "wide.txt"], b""),
        (["-"], text.replace("beside.jpg\n", "").encode()),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        rows, _ = predicted(capsys, run.root, *words, "--top", "1")
        check([row for row in rows if not row["file"].endswith("beside.jpg")], expected)
        assert len(rows) == (2 if given else 3), "a list's paths may lie beside it"
        assert "class_2" not in rows[0]


def test_a_thousand_files_with_a_broken_one(
    run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path, evaluated: dict[str, tuple[str, float]]
) -> None:
    files = list(evaluated)
    for k in range(1000):
        (tmp_path / f"{k:04d}.jpg").symlink_to(files[k % len(files)])
    (tmp_path / "0500.jpg").unlink()
    (tmp_path / "0500.jpg").write_bytes(Path(files[0]).read_bytes()[:700])
    rows, said = predicted(capsys, run.root, tmp_path, "data.workers=0")
    assert len(rows) == 999
    assert [row["class_1"] for row in rows[:500]] == [evaluated[files[k % len(files)]][0] for k in range(500)]
    assert f"cannot read {tmp_path}/0500.jpg: " in said
    assert said.splitlines()[-1].endswith(f"; 1 cannot be read: {tmp_path}/0500.jpg")


def test_json_and_the_table(
    run: RunDir, evaluated: dict[str, tuple[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    name, (label, confidence) = next(iter(evaluated.items()))
    assert main(["predict", str(run.root), name, "nothing.jpg", "--json"]) == 0
    said = capsys.readouterr()
    (found,) = json.loads(said.out)
    assert (found["file"], found["predictions"][0]["class"], len(found["predictions"])) == (name, label, 3)
    assert "cannot read nothing.jpg: No such file or directory" in said.err
    assert main(["predict", str(run.root), name, name]) == 0
    line, again = capsys.readouterr().out.splitlines()
    assert line == again
    assert line.split()[:4] == [f"{100 * confidence:.1f}", "%", label, name]


def test_names_of_any_kind(run: RunDir, capsys: pytest.CaptureFixture[str], tmp_path: Path, photos: Path) -> None:
    """Each picture is one row of the table, whatever it is called; the file formats keep its name."""
    odd = [" two words.jpg", "#1.jpg", 'a,"b".jpg', "end\nof line.jpg", "größe 雪.JPG"]
    for name in odd:
        (tmp_path / name).symlink_to(photos / "val" / "ash" / "000.jpg")
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "round.jpg").symlink_to("round.jpg")
    (tmp_path / "scan.heic").touch()
    rows, said = predicted(capsys, run.root, tmp_path, "--top", "5000")
    assert [row["file"] for row in rows] == [f"{tmp_path}/{name}" for name in odd]
    assert "class_3" in rows[0]
    assert f"cannot read {tmp_path}/round.jpg: Too many levels of symbolic links" in said
    assert f"{tmp_path}: passed over 1 .heic" in said
    assert main(["predict", str(run.root), str(tmp_path), "--json"]) == 0
    assert [row["file"] for row in json.loads(capsys.readouterr().out)] == [row["file"] for row in rows]
    assert main(["predict", str(run.root), str(tmp_path)]) == 0
    assert [line.count("%") for line in capsys.readouterr().out.splitlines()] == [3] * len(odd)


def test_python_opens_it_takes_pictures_and_measures(
    model: Classifier, run: RunDir, evaluated: dict[str, tuple[str, float]]
) -> None:
    name = next(iter(evaluated))
    with Image.open(name) as picture:
        picture.load()
        wide = Image.fromarray(np.full((90, 80), 30000, np.uint16))
        whole_numbers = Image.fromarray(np.full((90, 80), 200, np.int32))
        found = model.predict([picture, name, "nothing.jpg", picture.convert("RGBA"), wide, whole_numbers], top=2)
    assert [one.image for one in found] == ["picture 0", name, "nothing.jpg", *(f"picture {k}" for k in (3, 4, 5))]
    assert (found[5].classes, bool(found[5].error)) == ((), True), "no scale is known"
    assert found[0].classes == found[1].classes == found[3].classes
    assert found[0].confidences == pytest.approx(found[1].confidences, abs=1e-5)
    assert (found[2].classes, found[2].error) == ((), "No such file or directory")
    assert model.predict(name)[0].classes[0] == evaluated[name][0]
    embedded = model.embed([name, "nothing.jpg", name])
    assert embedded.shape == (3, 256)
    assert np.isnan(embedded[1]).all()
    assert embedded[0] == pytest.approx(embedded[2], abs=1e-5)
    results, data = json.loads(run.results.read_text()), Path(run.config().data.root)
    for place in (data, data / "val"):
        measured = model.evaluate(place)
        assert (measured["top1"], measured["n"]) == (results["after"]["top1"], 33)
        assert measured["loss"] == pytest.approx(results["after"]["loss"], abs=1e-5)
    small = fixres_dist.load(run.root, settings=["data.max_pixels=100"])
    with pytest.raises(UserError, match=r"none of the 33 images of .* has a prediction"):
        small.evaluate(data)
    with pytest.raises(UserError, match="no picture was given"):
        model.predict([])


def test_a_temperature_changes_confidence_and_no_class(
    model: Classifier, run: RunDir, tmp_path: Path, evaluated: dict[str, tuple[str, float]]
) -> None:
    out = copied(run, tmp_path / "hot", temperature=2.5)
    warm, names = fixres_dist.load(out), list(evaluated)[:5]
    for cold, hot in zip(model.predict(names, 3), warm.predict(names, 3), strict=True):
        assert hot.classes == cold.classes
        scores = np.array(cold.confidences) ** (1 / 2.5)
        assert hot.confidences == pytest.approx(scores / scores.sum(), abs=1e-5)
    data = run.config().data.root
    assert warm.evaluate(data)["top1"] == model.evaluate(data)["top1"]
    assert warm.evaluate(data)["mean_confidence"] < model.evaluate(data)["mean_confidence"]


def test_a_temperature_is_fitted_written_and_applied(
    run: RunDir,
    photos: Path,
    tmp_path: Path,
    evaluated: dict[str, tuple[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Against a search by scipy on the logits that `extract` writes."""
    other = tmp_path / "mine"
    other.mkdir()
    for name in CLASSES[:2]:
        (other / name).symlink_to(photos / "val" / name)
    assert called("extract", "--run", run.root, "--out", tmp_path / "x", "data.workers=0")[0] == 0
    z = np.log(np.load(tmp_path / "x" / "softmax.npy").astype(np.float64))
    labels, rows = np.load(tmp_path / "x" / "labels.npy"), np.arange(33)
    for place, part in (("val", rows), (str(other), rows[:22])):
        loss = lambda t, part=part: -log_softmax(z[part] / t, 1)[np.arange(len(part)), labels[part]].mean()  # noqa: E731
        best = minimize_scalar(loss, bounds=(1 / HOTTEST, HOTTEST), method="bounded", options={"xatol": 1e-9}).x
        assert main(["export", "--run", str(run.root), "--temperature-from", place]) == 0
        said = capsys.readouterr().out
        fitted = json.loads((run.root / "export" / "temperature.json").read_text())
        assert fitted["temperature"] == pytest.approx(best, rel=1e-3)
        assert (fitted["fitted_on"], fitted["n"], fitted["measured_on"]) == (Path(place).name, len(part), "val")
        after = softmax(z / fitted["temperature"], 1)
        assert fitted["ece_after"] == pytest.approx(
            100 * reliability(after.max(1), after.argmax(1) == labels).ece, abs=0.01
        )
        assert f"temperature {fitted['temperature']:.4f}, fitted on {Path(place).name} ({len(part)} images)" in said
        assert f"Temperature {fitted['temperature']:.4f}, fitted on" in (run.root / "export" / "README.md").read_text()
        for model in (fixres_dist.load(run.root), fixres_dist.load(run.root / "export")):
            assert model.temperature == fitted["temperature"]
            assert model.predict(next(iter(evaluated)))[0].confidences[0] == pytest.approx(after[0].max(), abs=1e-4)
    assert main(["report", str(run.root), "--out", str(tmp_path)]) == 0
    assert "r: temperature " in (tmp_path / "report.md").read_text()
    (run.root / "export" / "temperature.json").unlink()
    assert called("export", "--run", run.root)[0] == 0
    assert fixres_dist.load(run.root).temperature == 1, "an export without one has none"
    for place, expected in (
        ("train", "is what the model was trained on"),
        (str(photos / "train"), "is what the model was trained on"),
        ("test", "no split 'test'"),
        (str(tmp_path / "nothing"), "nothing"),
    ):
        code, said = called("export", "--run", run.root, "--out", tmp_path / "no", "--temperature-from", place)
        assert (code, (tmp_path / "no").exists()) == (2, False), said
        assert expected in said


def test_a_temperature_stays_with_its_weights(run: RunDir, tmp_path: Path) -> None:
    """An export in another format set it back to 1, for `predict RUN` too, and said nothing."""
    out = tmp_path / "out"

    def export(*words: object) -> tuple[str, dict[str, Any], str]:
        code, said = called("export", "--run", run.root, "--out", out, *words)
        assert code == 0, said
        kept = json.loads((out / "config.json").read_text())["fixres"], (out / "README.md").read_text()
        return said, *kept

    export("--temperature-from", "val")
    file = out / "temperature.json"
    fitted = file.read_bytes()
    temperature = json.loads(fitted)["temperature"]
    assert temperature != 1
    for form in ("torch", "onnx", "hub", "safetensors"):
        said, settings, card = export("--format", form)
        assert (settings["temperature"], file.read_bytes()) == (temperature, fitted), form
        assert f"Temperature {temperature:.4f}, fitted on val" in card
        assert "removed" not in said
    said, settings, card = export("--alpha", "0.5")
    assert (settings["temperature"], file.exists(), "Temperature" in card) == (1, False, False)
    says = (
        f"({temperature:.4f}) is of other weights, or of an older version, and is removed: the temperature is 1. Next: "
    )
    again = command("export", "--run", run.root, "--alpha", "0.5", "--out", out, "--temperature-from", "val")
    assert f"{file} {says}{again} fits one" in said
    assert "removed" not in export("--alpha", "0.5")[0]
    _, settings, _ = export("--format", "torch", "--temperature-from", "val")
    assert settings["temperature"] == temperature, "of the file written, not of the other that is there"


def test_another_folder_called_val_is_not_the_runs_own(run: RunDir, photos: Path, tmp_path: Path) -> None:
    """It was said to be the same pictures as those that the calibration error was measured on; a link to val is."""
    (tmp_path / "mine" / "val").mkdir(parents=True)
    for name in CLASSES[:2]:
        (tmp_path / "mine" / "val" / name).symlink_to(photos / "val" / name)
    (tmp_path / "link").symlink_to(photos / "val")
    (tmp_path / "trained").symlink_to(photos / "train")
    own = "fitted on val (33 images); expected calibration error on val, the same pictures: "
    other = "fitted on mine/val (22 images); expected calibration error on val: "
    for place, expected in (("mine/val", other), ("link", own)):
        words = ("--out", tmp_path / "out", "--temperature-from", tmp_path / place)
        code, said = called("export", "--run", run.root, *words)
        assert code == 0, said
        for text in (said, (tmp_path / "out" / "README.md").read_text()):
            assert expected in text
    code, said = called("export", "--run", run.root, "--temperature-from", tmp_path / "trained")
    assert code == 2
    assert "is what the model was trained on" in said


def copied(run: RunDir, out: Path, **changes: Any) -> Path:
    """The export with `changes` of what config.json says to this program; None takes a key out of the file."""
    out.mkdir()
    (out / "model.safetensors").symlink_to(run.root / "export" / "model.safetensors")
    config = json.loads((run.root / "export" / "config.json").read_text())
    for key, value in changes.items():
        config["fixres" if key in config["fixres"] else key] = (
            config["fixres"] | {key: value} if key in config["fixres"] else value
        )
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_what_is_no_model_or_no_picture_is_refused_with_the_next_command(
    run: RunDir, photos: Path, tmp_path: Path
) -> None:
    picture = photos / "val" / "ash" / "000.jpg"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.heic").write_text("")
    (tmp_path / "blank.txt").write_text("\n# nothing\n")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "binary.txt").write_bytes(b"a.jpg\nb\0c.jpg\n")
    bare, onnx = tmp_path / "bare", tmp_path / "onnx"
    for folder, file in ((bare, "model.safetensors"), (onnx, "model_64.onnx")):
        folder.mkdir()
        (folder / file).symlink_to(run.root / "export" / "model.safetensors")
    others = copied(run, tmp_path / "others", label_names=["ash", "birch", "elm"])
    fewer = copied(run, tmp_path / "fewer", label_names=["ash", "birch"])
    damaged = copied(run, tmp_path / "damaged", temperature=-1)
    cases: list[tuple[list[object], str]] = [
        ([run.root, tmp_path / "empty"], "empty holds no image; passed over: nothing. Accepted: image files"),
        ([run.root, tmp_path / "notes"], "passed over: 1 .heic"),
        (
            [run.root, tmp_path / "blank.txt", "--csv"],
            "error: "
            + str(tmp_path / "blank.txt")
            + " has no path of an image in 2 lines. Accepted: a path on each line",
        ),
        ([run.root, tmp_path / "binary.txt"], "'b\\x00c.jpg' is no path: it holds a zero byte. Accepted: image files"),
        ([run.root, tmp_path / "gone.txt"], "gone.txt cannot be read: No such file"),
        ([run.root, tmp_path / "torn.jpg", "gone.jpg"], "none of the 2 pictures can be read"),
        ([run.root, picture, "--top", "0"], "--top is 0; accepted: 1 or more"),
        ([run.root, picture, "--res", "20"], "--res 20 is below 32 px"),
        ([run.root, "data.workers=0"], "Next: fixres predict"),
        ([picture, picture], f"is a picture; the model stands before it. Next: fixres predict RUN {picture}"),
        ([tmp_path / "gone", picture], "Accepted: a run directory, a folder that `fixres export` wrote"),
        ([photos, picture], "is no run and holds no weights (in it: train, val)"),
        ([onnx, picture], "model_64.onnx is for ONNX Runtime"),
        ([bare, picture], "has no config.json beside it"),
        ([others, picture], "is of other classes than"),
        ([fewer, picture], "is of other classes than"),
        ([damaged, picture], "temperature is -1.0; accepted: above 0"),
    ]
    for words, expected in cases:
        code, said = called("predict", *words)
        assert code == 2, said
        assert expected in said
        assert "Next: " in said or "ccepted: " in said
        assert "file,class_1" not in said, "rows without a picture"


def test_a_size_that_the_model_cannot_take_is_refused(tmp_path: Path, photos: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from fixres_dist.models.build import build_model

    torch.manual_seed(0)
    model = build_model("test_vit", 3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": {**model.pretrained_cfg, "num_classes": 3}}
    cfg["pretrained_cfg"] = {k: v for k, v in cfg["pretrained_cfg"].items() if not k.startswith("hf_hub")}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    picture = photos / "val" / "ash" / "000.jpg"
    code, said = called("predict", tmp_path, picture, "--res", "163")
    assert code == 2
    assert "cannot take 163 px" in said
    assert "Next: --res 16" in said
    code, said = called("predict", tmp_path, picture, "--csv")
    assert code == 0, "timm's own form, without classes' names"
    assert "class_" in said


def test_results_and_report_have_more_than_top1(run: RunDir, tmp_path: Path) -> None:
    after, found = Predictions.read(run.root / "predictions" / "after.npz"), json.loads(run.results.read_text())
    mean = metrics.f1_score(after.labels, after.predicted, average="macro", zero_division=0)
    assert found["measures"]["after"]["macro_f1"] == pytest.approx(100 * mean, abs=1e-3)
    assert set(found["measures"]["before"]) == {"macro_precision", "macro_recall", "macro_f1", "ece", "mean_confidence"}
    assert (run.root / "pictures" / "confusion.csv").read_text().count("\n") == 4
    assert main(["report", str(run.root), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"| r | after | {found['measures']['after']['macro_precision']:.2f} |" in text
    assert "pictures/confusion.png" in text


def test_how_often_val_was_looked_at_is_counted_and_said(run: RunDir, photos: Path, tmp_path: Path) -> None:
    """By each command that compares it with its labels, and by Python; an export that stands elsewhere has no run to count in."""
    own = RunDir(tmp_path / "r")  # in which no other test has counted
    shutil.copytree(run.root, own.root)
    fingerprint = Predictions.read_with_list(run.root / "predictions" / "after.npz")[1]
    known = {"training": Results.read(run).looks[fingerprint]["training"]}
    replace(Results.read(own), looks={fingerprint: known}).write(own)
    assert known["training"] == len([line for line in run.metrics.read_text().splitlines() if '"evaluation"' in line])
    commands: list[list[object]] = [
        ["evaluate", "--run", own.root],
        ["evaluate", "--run", own.root, "--only", "after"],
        ["sweep", "--run", own.root, "--res", "64,96,128", "--out", tmp_path],
        [
            "interpolate",
            "--run",
            own.root,
            "--alpha",
            "0.5,1",
            "--eval-set",
            f"again={photos / 'val'}",
            "--out",
            tmp_path,
        ],
        ["extract", "--run", own.root, "--out", tmp_path / "rows"],
        ["evaluate", "--run", own.root, "--softmax", tmp_path / "rows" / "softmax.npy"],
        ["export", "--run", own.root, "--out", tmp_path / "copy", "--temperature-from", "val"],
        ["predict", own.root, photos / "val"],
    ]
    for words in commands:
        assert called(*words, *([] if words[0] == "export" else ["data.workers=0"]))[0] == 0
    for path in (own.root, own.root / "export" / "model.safetensors", tmp_path / "copy"):
        fixres_dist.load(path).evaluate(photos)
    found = Results.read(own)
    added = {"evaluate": 2 + 1 + 1 + 2, "sweep": 2 * 3, "interpolate": 3 + 3, "export": 1}
    assert found.looks == {fingerprint: {**known, **added}}
    fixres_dist.load(own.root).evaluate(photos, "train")
    train = dict(Results.read(own).looks)
    assert train.pop(fingerprint) == found.looks[fingerprint]
    assert [*train.values()] == [{"evaluate": 1}], "another list of files"
    assert main(["report", str(own.root), "--out", str(tmp_path)]) == 0
    said = (
        f"The validation images of r (list {fingerprint}) have been evaluated on {known['training'] + 19} times: 6 by "
    )
    assert said in (tmp_path / "report.md").read_text()


def test_evaluations_that_end_at_once_are_all_counted_and_stay(run: RunDir, photos: Path, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "r")
    shutil.copytree(run.root, copy.root)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: looks.count(copy, "list", "sweep", n), range(1, 9)))
    counted = Results.read(copy).looks
    assert counted["list"] == {"sweep": 36}
    copy.done.unlink()  # as a message says where an export is damaged: the last checkpoint is evaluated again
    assert called("submit", *SETTINGS, "--runs-dir", tmp_path, *settings(photos))[0] == 0
    assert Results.read(copy).looks == counted


def test_the_mean_of_two_runs_is_measured_and_written(run: RunDir, photos: Path, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    shutil.copytree(run.root, other.root)
    state = load_file(run.root / "export" / "model.safetensors")
    moved = {name: value + 0.01 if value.is_floating_point() else value for name, value in state.items()}
    save_file(moved, other.root / "export" / "model.safetensors")
    (other.root / "export" / "config.json").unlink()
    words = ("interpolate", "--run", run.root, "--average", other.root, "--out", tmp_path / "soup", "data.workers=0")
    code, said = called(*words)
    assert code == 0, said
    found, mean = (
        json.loads((tmp_path / "soup" / "soup.json").read_text()),
        load_file(tmp_path / "soup" / "model.safetensors"),
    )
    for name, value in mean.items():
        assert value.double().numpy() == pytest.approx(
            (state[name].double() + moved[name].double()).numpy() / 2, abs=1e-5
        )
    assert fixres_dist.load(tmp_path / "soup").evaluate(photos)["top1"] == found["mean"]["top1"]
    assert list(found["runs"]) == [str(run.root), str(other.root)]
    config = reading.load((other.root / "config.yaml").read_text())
    (other.root / "config.yaml").write_text(reading.dump(replace(config, data=replace(config.data, res=96))))
    code, said = called(*words)
    assert code == 2
    assert "are of different resolution, so their weights have no mean" in said


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, fixres_dist; fixres_dist.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, check=False).returncode == 0
