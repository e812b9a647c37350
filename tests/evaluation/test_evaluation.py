"""The commands that look at a model: evaluate on several sets, extract, compare, sweep; and what they refuse."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.commands import environment
from support.in_process import called
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixres_dist.base.commands import command
from fixres_dist.cli.main import main
from fixres_dist.cli.sweep import uncompiled
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import dataset
from fixres_dist.evaluation import activations, sweep
from fixres_dist.evaluation.sweep import Cost, Crop, Limit, Sweep
from fixres_dist.models.build import build_model
from fixres_dist.models.resizing import gmacs
from fixres_dist.runs.results import Summary
from fixres_dist.training.predictions import Predictions, paired_gain
from fixres_dist.training.ranks import Ranks

torch.set_num_threads(1)  # as the processes of torchrun have it: the same kernels, the same bytes
CLASSES = ("ash", "birch", "cedar")
SMALL = ("data.workers=0", "run.batch_per_device=4")


@cache
def weights(seed: int) -> dict[str, torch.Tensor]:
    """New weights with the BatchNorms' statistics of noise, so that logits differ from image to image without saturating."""
    model = build_model("test_efficientnet", 3, seed)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the last batch's
    with torch.no_grad():
        model.get_classifier().weight.normal_(0, 0.2, generator=generator)
        model(torch.randn(16, 3, 64, 64, generator=generator))
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A run directory as a finished run leaves it, as far as evaluation reads it."""
    run = tmp_path_factory.mktemp("runs") / "done"
    (run / "export").mkdir(parents=True)
    model = {"name": "test_efficientnet", "timm_name": "test_efficientnet", "weights": "none"}
    values = {"model": model, "data": {"root": str(photos), "res": 64}, "pretrain": {"res": 64}}
    (run / "config.yaml").write_text(reading.dump(reading.parse(Config, values)))
    (run / "class_index.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    save_file(weights(0), run / "pretrained.safetensors")
    save_file(weights(1), run / "export" / "model.safetensors")
    return run


@pytest.fixture(scope="module")
def extracted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extracted") / "one"
    assert call("extract", "--run", finished, "--out", out, *SMALL) == 0
    return out


def call(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def result(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    assert call("evaluate", "--json", tmp_path / "result.json", *arguments, "data.workers=0") == 0
    return json.loads((tmp_path / "result.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    return error


def links(root: Path, **folders: Path) -> Path:
    root.mkdir(parents=True)
    for name, target in folders.items():
        (root / name).symlink_to(target)
    return root


def test_what_cannot_be_written_is_refused_before_the_pass(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fixres_dist.cli.evaluate.opened", None)
    monkeypatch.setattr("fixres_dist.cli.evaluate.MOST_CLASSES", 2)
    for words, says in (
        (("--confusion", tmp_path / "c.csv"), "--confusion of 3 classes; accepted: 2. Next: --predictions FILE.npz"),
        (("--confusion", tmp_path / "c.png"), "accepted: FILE.csv, beside which FILE.png is written"),
        (("--confusion", tmp_path / "no" / "c.csv"), "cannot be written"),
        (("--predictions", tmp_path / "no" / "p.npz"), "cannot be written"),
        (("--json", tmp_path / "no" / "p.json"), "cannot be written"),
    ):
        code, said = called("evaluate", "--run", finished, *words)
        assert code == 2, said
        assert says in said


def test_a_run_is_evaluated_before_and_after_with_the_paired_gain(finished: Path, photos: Path, tmp_path: Path) -> None:
    found = result(tmp_path, "--run", finished, "--predictions", tmp_path / "p.npz", "--confusion", tmp_path / "c.csv")
    before, after = (Predictions.read(finished / "evaluations" / f"val-64-{k}.npz") for k in ("before", "after"))
    assert 0 < before.correct1.sum() < 33
    gain = paired_gain(before.correct1, after.correct1)
    assert (found["delta_top1"], found["delta_ci95"]) == (gain.delta_top1, list(gain.delta_ci95))
    assert found["before"]["top1"] == before.summary().top1 != found["after"]["top1"] == found["top1"]
    assert found["classes"] == {"of_set": 3, "of_model": 3}
    macro = {f"macro_{name}" for name in ("precision", "recall", "f1")}
    assert set(found["after"]) == {"top1", "top5", "loss", "n", "skipped", "ece", "mean_confidence"} | macro
    assert found["after"]["macro_recall"] == pytest.approx(found["top1"], abs=1e-3), "of classes of one size"
    kept = json.loads((finished / "evaluations" / "val-64.json").read_text())
    assert kept.pop("crc32")
    assert kept == found["sets"]["val"]
    assert np.array_equal(Predictions.read(tmp_path / "p.npz").loss, after.loss)
    for k, name in enumerate(CLASSES):
        rows = slice(11 * k, 11 * k + 11)
        shares = {key: kept["by_class"][name].pop(key) for key in ("precision", "f1")}
        assert all(set(share) == {"before", "after"} for share in shares.values())
        assert kept["by_class"][name] == {
            "n": 11,
            "before": pytest.approx(100 * before.correct1[rows].mean(), abs=1e-3),
            "after": pytest.approx(100 * after.correct1[rows].mean(), abs=1e-3),
        }
    table = [line.split(",") for line in (tmp_path / "c.csv").read_text().splitlines()]
    assert ([row[0] for row in table[1:]], table[0][1:]) == (list(CLASSES), list(CLASSES))
    taken = [[int(n) for n in row[1:]] for row in table[1:]]
    assert taken == [np.bincount(after.predicted[11 * k : 11 * k + 11], minlength=3).tolist() for k in range(3)]
    assert Image.open(tmp_path / "c.png").size[0] > 100
    (finished / "evaluations" / "val-64.json").unlink()
    result(tmp_path, "--run", finished, "data.resize_rule=fixres")
    result(tmp_path, "--run", finished, "--data", photos)
    result(tmp_path, "--run", finished, "--res", "96")
    assert [p.name for p in (finished / "evaluations").glob("*.json")] == ["val-96.json"], "only as the run says itself"
    only = result(tmp_path, "--run", finished, "--only", "after")
    assert "before" not in only
    assert only["top1"] == found["top1"]


def test_sets_with_fewer_or_numbered_folders_are_mapped_and_logits_restricted(
    finished: Path, extracted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = links(tmp_path / "named", cedar=photos / "val" / "cedar", birch=photos / "val" / "birch")
    numbered = links(tmp_path / "numbered", **{"1": photos / "val" / "birch", "0": photos / "val" / "ash"})
    sets = ["--eval-set", f"named={named}", "--eval-set", f"numbered={numbered}"]
    found = result(tmp_path, "--run", finished, *sets, "--predictions", tmp_path / "p.npz")["sets"]
    assert "named: logits restricted to its 2 of 3 classes" in capsys.readouterr().out
    softmax, labels = np.load(extracted / "softmax.npy"), np.load(extracted / "labels.npy")
    for name, columns in (("named", [1, 2]), ("numbered", [0, 1])):
        rows = np.isin(labels, columns)
        best = np.array(columns)[softmax[rows][:, columns].argmax(1)]
        assert found[name]["after"]["top1"] == pytest.approx(100 * (best == labels[rows]).mean(), abs=1e-3)
        assert found[name]["classes"] == {"of_set": 2, "of_model": 3}
        assert set(found[name]["by_class"]) == {CLASSES[k] for k in columns}
        assert np.array_equal(Predictions.read(tmp_path / f"p-{name}.npz").predicted, best)
        assert (softmax[rows].argmax(1) != best).any(), "the restriction matters here"
        assert (finished / "evaluations" / f"{name}-64.json").exists()


def test_real_labels_follow_imagenets_numbers(finished: Path, photos: Path, tmp_path: Path) -> None:
    """Numbers run against the folders' order, one image has no label, one has all."""
    for k, name in enumerate(CLASSES):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for i in range(11):
            number = 33 - 11 * k - i
            link = tmp_path / "data" / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG"
            link.symlink_to(photos / "val" / name / f"{i:03d}.jpg")
    lists = [[2 - (number - 1) // 11] for number in range(1, 34)]
    lists[0], lists[1] = [], [0, 1, 2]
    (tmp_path / "real.json").write_text(json.dumps(lists))
    given = ["--data", tmp_path / "data", "--labels", tmp_path / "real.json", "--predictions", tmp_path / "p.npz"]
    found = result(tmp_path, "--run", finished, *given)
    after = Predictions.read(tmp_path / "p.npz")
    in_order = dataset.load(tmp_path / "data", "val", str(tmp_path / "cache"))
    numbers = [int(in_order.name(k)[-13:-5]) for k in range(33)]
    hits = [p in lists[n - 1] for p, n in zip(after.predicted, numbers, strict=True) if lists[n - 1]]
    assert found["real"]["n"] == len(hits) == 32
    assert found["real"]["after"] == pytest.approx(100 * np.mean(hits), abs=1e-3)
    assert {"before", "delta_top1", "delta_ci95"} <= set(found["real"])


class Opened(Exception):
    """Carries the number of ranks with which a command opened its session."""


@pytest.mark.parametrize("words", [["evaluate"], ["sweep", "--res", "64"], ["extract", "--out", "x"], ["interpolate"]])
@pytest.mark.parametrize("around", ["srun", "torchrun"])
def test_a_command_inside_somebodys_job_is_alone(
    words: list[str], around: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `srun -n2 --pty`, or called by a rank of a script, it waited five minutes for a second rank."""
    srun = {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value in (srun | {"SLURM_NNODES": "1"} if around == "srun" else torchrun).items():
        monkeypatch.setenv(name, value)

    def opened(_: object, ranks: Ranks, **__: object) -> None:
        raise Opened(ranks.world_size)

    monkeypatch.setattr("fixres_dist.training.session.open_session", opened)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Opened, match="1"):
        call(*words, "--run", finished)


def test_two_ranks_extract_the_bytes_of_one(finished: Path, extracted: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command = [*launcher, "fixres_dist", "extract", "--run", str(finished), "--out", str(tmp_path / "two"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(extracted))
    for file in extracted.iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    assert not list(tmp_path.glob(".two*"))


def test_extracted_files_are_what_the_model_gives_in_the_data_sets_order(finished: Path, extracted: Path) -> None:
    softmax, embeddings = np.load(extracted / "softmax.npy"), np.load(extracted / "embeddings.npy")
    state = weights(1)
    logits = embeddings @ state["classifier.weight"].numpy().T + state["classifier.bias"].numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(softmax, shares, atol=1e-5)
    assert np.load(extracted / "labels.npy").tolist() == [0] * 11 + [1] * 11 + [2] * 11
    names = (extracted / "names.txt").read_text().splitlines()
    assert names == [f"{name}/{i:03d}.jpg" for name in CLASSES for i in range(11)]


def test_a_softmax_file_scores_as_the_model_does(
    finished: Path, extracted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = result(tmp_path, "--run", finished)
    found = result(tmp_path, "--softmax", extracted / "softmax.npy", "--data", photos)
    assert [found[key] for key in ("top1", "top5", "n")] == [direct[key] for key in ("top1", "top5", "n")]
    assert found["loss"] == pytest.approx(direct["loss"], abs=1e-4)
    assert found["softmax"]["ece"] == pytest.approx(direct["after"]["ece"], abs=1e-3)
    assert {n: r["softmax"] for n, r in found["by_class"].items()} == {
        n: r["after"] for n, r in direct["by_class"].items()
    }
    half = tmp_path / "half"
    assert call("extract", "--run", finished, "--out", half, "--dtype", "float16", *SMALL) == 0
    assert np.load(half / "softmax.npy").dtype == np.float16
    files = ["--softmax", half / "softmax.npy", "--softmax", extracted / "softmax.npy"]
    assert result(tmp_path, *files, "--data", photos)["loss"] == pytest.approx(direct["loss"], abs=1e-3)
    assert "exists. Next: give another --out" in refused(capsys, "extract", "--run", finished, "--out", half)


def test_the_command_that_extract_prints_runs_as_it_stands(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ("--model", "test_efficientnet", "--checkpoint", finished / "export" / "model.safetensors", "--res", "64")
    for out, source in (("a", ("--run", finished)), ("b b", (*file, "--data", photos))):
        assert call("extract", *source, "--out", tmp_path / out, "--split", "val", *SMALL) == 0
        printed = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(f"Next: {command('evaluate')}")[2])
        assert call("evaluate", *printed) == 0
        assert "n 33" in capsys.readouterr().out


def test_files_that_cannot_be_decoded_are_rows_of_nan_and_count_nowhere(
    finished: Path, extracted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        links(tmp_path / "data" / "val" / name, **{p.name: p for p in (photos / "val" / name).iterdir()})
    torn = tmp_path / "data" / "val" / "birch" / "004.jpg"
    whole_file = torn.read_bytes()
    torn.unlink()
    torn.write_bytes(whole_file[:-400])
    stopped = refused(
        capsys, "extract", "--run", finished, "--out", tmp_path / "out", "--data", tmp_path / "data", *SMALL
    )
    assert "cannot decode" in stopped
    assert not (tmp_path / "out").exists(), "complete or invisible"
    skip = ["--data", tmp_path / "data", "data.on_bad=skip"]
    assert call("extract", "--run", finished, "--out", tmp_path / "out", *skip, *SMALL) == 0
    softmax, whole = np.load(tmp_path / "out" / "softmax.npy"), np.load(extracted / "softmax.npy")
    assert not list(tmp_path.glob(".out*")), "what the first one left is gone"
    assert np.flatnonzero(np.isnan(softmax).all(1)).tolist() == [15]
    assert np.allclose(np.delete(softmax, 15, 0), np.delete(whole, 15, 0), atol=1e-5)
    found = result(tmp_path, "--softmax", tmp_path / "out" / "softmax.npy", "--data", tmp_path / "data")
    assert (found["n"], found["skipped"]) == (32, 1)


def test_two_files_of_predictions_are_compared_or_refused(
    finished: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct = result(tmp_path, "--run", finished, "--eval-set", f"part={photos / 'train'}")
    before, after = (finished / "evaluations" / f"val-64-{k}.npz" for k in ("before", "after"))
    assert call("compare", before, after, "--json", tmp_path / "gain.json") == 0
    found = json.loads((tmp_path / "gain.json").read_text())
    assert (found["delta_top1"], found["delta_ci95"]) == (direct["delta_top1"], direct["delta_ci95"])
    assert "are of different images" in refused(
        capsys, "compare", before, finished / "evaluations" / "part-64-after.npz"
    )
    assert "holds no predictions" in refused(capsys, "compare", before, tmp_path / "gain.json")
    assert "run done has not finished: there is no" in refused(capsys, "compare", before, finished)


def test_sweep_names_the_best_resolution_and_explains_it(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--res", "96,64", "--max-gmacs", "0.015", "--activations", "--out", tmp_path, "data.workers=0"]
    assert call("sweep", "--run", finished, *arguments) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert set(found["curves"]) == {"before", "after"}
    costs = found["costs"]
    assert costs["96"]["gmacs"] / costs["64"]["gmacs"] == pytest.approx(2.25, rel=0.02)
    assert found["limit"]["best_res"] == {"before": 64, "after": 64}
    for label, res in found["best_res"].items():
        assert found["curves"][label][str(res)]["top1"] == max(s["top1"] for s in found["curves"][label].values())
    assert "best resolution: before" in shown
    assert "best with at most 0.015 GMACs: before 64 px" in shown
    rows = found["activations"]["statistics"]
    assert [(r["weights"], r["res"]) for r in rows] == [("training", 64), ("before", 64), ("after", 64)]
    assert (found["activations"]["n"], found["activations"]["channels"]) == (33, 256)
    assert rows[0]["distance"] == 0 < rows[1]["distance"] < rows[2]["distance"]
    for name in ("sweep.png", "activations.png"):
        with Image.open(tmp_path / name) as image:
            assert image.size[0] > 500
    events = EventAccumulator(str(finished / "tb" / "after"))
    events.Reload()
    (histogram,) = events.Histograms("pooled_features")
    assert (histogram.step, histogram.histogram_value.num) == (64, 33 * 256)


def test_sweep_varies_crop_and_rule_as_single_evaluations_do(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[tuple[str, Crop], dict[int, Predictions]] = {}
    passes = sweep.passes

    def kept(*args: Any) -> Any:
        found = passes(*args)
        made.update(found[0])
        return found

    monkeypatch.setattr(sweep, "passes", kept)
    crops = ("--crop-pct", "0.75,1,auto", "data.resize_rule=timm,fixres")
    fixed = (*SMALL, "run.memory_format=channels_last", "run.precision=fp32")  # not what a probe says at the moment
    assert (
        call("sweep", "--run", finished, "--res", "64,96", *crops, "--out", tmp_path, "--max-gmacs", "0.015", *fixed)
        == 0
    )
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "sweep.json").read_text())
    for rule in ("timm", "fixres"):
        for crop_pct in ("0.75", "auto"):
            for res in (64, 96):
                single = ("--res", res, f"data.resize_rule={rule}", f"data.crop_pct={crop_pct}", *fixed)
                assert call("evaluate", "--run", finished, "--predictions", tmp_path / "p.npz", *single) == 0
                alone = Predictions.read(tmp_path / "p.npz")
                ours = made["after", Crop(rule, "auto" if crop_pct == "auto" else 0.75)][res]  # type: ignore[arg-type]
                assert np.array_equal(ours.predicted, alone.predicted)
                assert np.array_equal(ours.loss, alone.loss), "image by image, bit by bit"
    points = {(p["model"], p["res"], p["resize_rule"], p["crop_pct"]): p for p in found["points"]}
    used = {"timm": (0.75, 0.95, 1.0), "fixres": (0.75, 0.875, 1.0)}  # auto: the rule's own
    expected = {(m, r, rule, c) for m in ("before", "after") for r in (64, 96) for rule in used for c in used[rule]}
    assert set(points) == expected
    for label, best in found["best"].items():
        assert best["top1"] == max(p["top1"] for p in found["points"] if p["model"] == label)
    gain = max(
        (made[key][res] for key in made if key[0] == "after" for res in (64, 96)), key=lambda p: p.summary().top1
    )
    assert found["best_after_minus_best_before"]["n"] == len(gain.loss)
    assert set(found["curves"]) == {
        f"{m}, {rule}{c}" for m in ("before", "after") for rule in used for c in (" 0.75", " 1", "")
    }
    row = points["after", 96, "timm", 0.95]["top1"]
    assert any(line.split()[:3] == ["96", "timm", "0.95"] and f"{row:.2f}" in line for line in shown.splitlines())
    assert "best with at most 0.015 GMACs: before 64 px " in shown
    assert Image.open(tmp_path / "sweep.png").size[0] > 500
    assert "data.crop_pct is 'x'" in refused(capsys, "sweep", "--run", finished, "--res", "64", "--crop-pct", "1,x")
    assert "Did you mean 'fixres'" in refused(
        capsys, "sweep", "--run", finished, "--res", "64", "data.resize_rule=timm,fixre"
    )


def test_one_crop_is_one_curve_for_each_model(finished: Path, tmp_path: Path) -> None:
    given = ("--crop-pct", "0.75", "data.resize_rule=fixres", "--out", tmp_path)
    assert call("sweep", "--run", finished, "--res", "64", *given, *SMALL) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert set(found["curves"]) == {"before", "after"}
    single = result(tmp_path, "--run", finished, "data.resize_rule=fixres", "data.crop_pct=0.75")
    assert found["curves"]["after"]["64"]["top1"] == single["top1"]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, {"after": 256}),
        (Limit(max_gmacs=2.5), {"after": 224}),
        (Limit(min_images_per_second=744.0), {"after": 256}),
        (Limit(max_gmacs=1.0), {"after": None}),
    ],
)
def test_the_best_under_a_limit(limit: Limit | None, expected: dict[str, int | None]) -> None:
    """Of 256 and 288 px, which are equally good, the smaller one."""
    curve = {res: Summary(top1, 90.0, 1.0, 100, 0) for res, top1 in ((224, 70.0), (256, 71.0), (288, 71.0))}
    costs = {res: Cost(res / 100, 1000.0 - res) for res in curve}
    swept = Sweep({"after": curve}, costs, limit, {}).record()
    assert swept["best_res"] == {"after": 256}
    assert swept.get("limit", swept)["best_res"] == expected


def test_multiply_adds_are_those_of_the_recipes() -> None:
    for name in ("demo", "b0"):
        facts = recipes.find(name).facts
        assert facts is not None
        model = build_model(recipes.find(name).values["model"]["timm_name"], 1000)
        assert gmacs(model, facts.res) == pytest.approx(facts.multiply_adds_g, rel=0.01)


def test_activation_statistics_against_loops() -> None:
    rng = np.random.default_rng(0)
    base, other = rng.normal(1, 2, (40, 3)).astype(np.float32), rng.normal(2, 1, (40, 3)).astype(np.float32)
    reference, found = activations.statistics({("training", 64): base, ("before", 96): other})
    assert (reference.distance, reference.channel_shift) == (0, 0)
    moved = [abs(a - b) for k in range(3) for a, b in zip(sorted(base[:, k]), sorted(other[:, k]), strict=True)]
    assert found.distance == pytest.approx(np.mean(moved) / base.std(), rel=1e-4)
    shifts = [abs(other[:, k].mean() - base[:, k].mean()) / base[:, k].std() for k in range(3)]
    assert found.channel_shift == pytest.approx(np.mean(shifts), rel=1e-4)
    near = sum(abs(v) < 0.05 * base.std() for v in other.ravel())
    assert found.near_zero_percent == pytest.approx(100 * near / 120, abs=1e-3)


@pytest.fixture(scope="module")
def mistakes(finished: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the refused commands below name: {TMP}, {RUN}, {DATA}."""
    root = tmp_path_factory.mktemp("mistakes")
    links(root / "foreign", ash=photos / "val" / "ash", n01440764=photos / "val" / "birch")
    links(root / "numbered", **{"1": photos / "val" / "ash", "3": photos / "val" / "birch"})
    save_file({k: v.clone() for k, v in build_model("resnet18", 3).state_dict().items()}, root / "resnet.safetensors")
    (root / "file").touch()
    (root / "working").mkdir()
    (root / "working" / "config.yaml").write_text((finished / "config.yaml").read_text())
    return {"TMP": str(root), "RUN": str(finished), "DATA": str(photos)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            "evaluate --run {RUN} --eval-set x={TMP}/foreign",
            [
                "1 class folder(s) of 2 that the model does not know: n01440764",
                "names of its 3 classes (ash, birch, cedar",
            ],
        ),
        ("evaluate --run {RUN} --eval-set x={TMP}/numbered", ["does not know: 3."]),
        ("evaluate --run {RUN} --eval-set no-such-thing", ["accepted: NAME=DIR"]),
        ("evaluate --run {RUN} --eval-set x={TMP}/none", ["no directory"]),
        ("evaluate --run {RUN} --eval-set val={TMP}/foreign", ["a name of its own"]),
        ("evaluate --model resnet18 --checkpoint none --data {DATA} --only before", ["--only before is about a run"]),
        (
            "evaluate --model test_efficientnet --checkpoint {TMP}/resnet.safetensors --data {DATA} --res 64",
            ["does not fit EfficientNet"],
        ),
        ("evaluate --run {RUN} --res 16", ["below 32 px, the models' stride"]),
        ("sweep --run {RUN} --res 16", ["below 32 px, the models' stride"]),
        ("extract --run {RUN} --res 16 --out {TMP}/out", ["below 32 px, the models' stride"]),
        ("evaluate --run {RUN} --res 64,96", ["sweep for several"]),
        ("evaluate --run {RUN} --json {TMP}", ["{TMP} cannot be written"]),
        ("evaluate --run {RUN} --json {TMP}/nowhere/out.json", ["{TMP}/nowhere/out.json cannot be written"]),
        (
            "extract --run {RUN} --out {TMP}/file/out data.workers=0 run.batch_per_device=4",
            ["Not a directory", "Accepted: a place that this user may read and write."],
        ),
        ("sweep --run {RUN} --res 64 --also c={TMP}/nowhere", ["nowhere is no run directory"]),
        ("sweep --run {RUN} --res 64 --also c={TMP}/working", ["Next: STATUS working --runs-dir {TMP}"]),
        *(
            (f"sweep --run {{RUN}} --res 64 {also}", [f"{label} is another curve's label", "before, after, checkpoint"])
            for also, label in (
                ("--also before={RUN}", "before"),
                ("--also after={RUN}", "after"),
                ("--also checkpoint={RUN}", "checkpoint"),
                ("--also c={RUN} --also c={RUN}", "c"),
            )
        ),
        ("sweep --run {RUN} --res 64 --also ={RUN}", ["accepted: LABEL=RUN"]),
    ],
)
def test_mistakes_get_one_helpful_message(
    mistakes: dict[str, str], arguments: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, *(word.format(**mistakes) for word in arguments.split()))
    for text in says:
        assert text.format(**mistakes).replace("STATUS", command("status")) in error
    assert not (Path(mistakes["TMP"]) / "out").exists()


@pytest.mark.parametrize(
    ("change", "more", "says"),
    [
        (lambda softmax: softmax[:32], (), "is [32, 3] of split 'val', of other images or classes"),
        (lambda softmax: softmax[:, :2], (), "and its model: [33, 3]"),
        (lambda softmax: softmax, ("--split", "train"), "and its model: [84, 3]"),
        (None, (), "cannot be read"),
    ],
)
def test_softmax_files_that_do_not_fit_are_refused(
    extracted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, more: Any, says: str
) -> None:
    shutil.copy(extracted / "extract.json", tmp_path)
    if change:
        np.save(tmp_path / "softmax.npy", change(np.load(extracted / "softmax.npy")))
    assert says in refused(capsys, "evaluate", "--softmax", tmp_path / "softmax.npy", "--data", photos, *more)


def test_softmax_of_other_images_is_refused(
    extracted: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, name in enumerate(CLASSES):
        folder = tmp_path / "val" / name
        links(folder, **{f"new{i}.jpg": photos / "val" / name / f"{i + k:03d}.jpg" for i in range(10)})
        (folder / "last.jpg").symlink_to(photos / "val" / name / "000.jpg")
    given = ["--softmax", extracted / "softmax.npy", "--data", tmp_path]
    assert "of other images or classes" in refused(capsys, "evaluate", *given)


@pytest.mark.parametrize(
    ("labels", "own_names", "says"),
    [
        ([[0]] * 33, False, ["stand in several class folders"]),
        ([[0]] * 8, True, ["has 8 entries", "9 images"]),
        ([[]] * 9, True, ["no label for any image"]),
        ([[3]] * 9, True, ["names class 3, the model has 3"]),
        ({"labels": "no"}, True, ["a list of lists"]),
    ],
)
def test_real_labels_that_do_not_fit_are_refused(
    finished: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    labels: Any,
    own_names: bool,
    says: Any,
) -> None:
    (tmp_path / "real.json").write_text(json.dumps(labels))
    for name in CLASSES:
        files = {f"{name}{i}.jpg": photos / "val" / name / f"00{i}.jpg" for i in range(3)}
        links(tmp_path / "data" / "val" / name, **files)
    data = tmp_path / "data" if own_names else photos
    given = ["--run", finished, "--data", data, "--labels", tmp_path / "real.json", "data.workers=0"]
    error = refused(capsys, "evaluate", *given)
    for text in says:
        assert text in error


@pytest.mark.parametrize(("setting", "compiled"), [("auto", False), ("true", True), ("false", False)])
def test_a_sweep_compiles_only_where_it_is_asked_to(setting: str, compiled: bool) -> None:
    """A graph for each resolution takes minutes, and their speeds would contain them."""
    config = reading.parse(Config, reading.overrides([f"run.compile={setting}", "run.seed=3"]))
    assert (uncompiled(config).run.compile, uncompiled(config).run.seed) == (compiled, 3)
