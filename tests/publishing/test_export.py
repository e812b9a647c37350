"""What leaves a finished run: files that timm and onnxruntime read, and a card that says what was measured."""

from __future__ import annotations

import inspect
import json
import math
import shutil
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from support.commands import run as call
from support.commands import tiny
from support.folders import write_photos

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.cli.main import main
from fixres_dist.config.stage_settings import Pretrain
from fixres_dist.data import dataset, torch_cpu
from fixres_dist.data.geometry import resize_of
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.evaluation.inputs import Subject, opened, parts_with
from fixres_dist.models import weights
from fixres_dist.models.build import build_model, preprocessing
from fixres_dist.publishing import export, model_card
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predict import predict
from fixres_dist.training.predictions import Predictions

CLASSES = ["ash", "birch", "cedar"]
CANARIES = [word.replace("@", "a") for word in ("can@ry-a", "hf_can@ryCANARYcanary01", "can@ry-b", "can@ry-c")]
SECRETS = (
    f"cluster.env={{WANDB_API_KEY: {CANARIES[0]}, PLAIN: {CANARIES[1]}}}",
    f"cluster.setup=export HF_TOKEN={CANARIES[2]}",
    f"cluster.srun_args=--container-env=API_TOKEN={CANARIES[3]}",
)
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of the tiny model on 84 images, with 120 to evaluate on. Tests write beside it, not into it."""
    folder = tmp_path_factory.mktemp("export")
    data = write_photos(folder / "photos", 28, 40)
    done = call(*tiny(folder, "r", data, 1, "tune.epochs=1", "tune.base_lr=0.5", "data.workers=0", *SECRETS))
    assert done.returncode == 0, done.stderr
    assert not any(canary in done.stdout + done.stderr for canary in CANARIES)
    return RunDir(folder / "r")


def exported(run: RunDir, out: Path, *arguments: object) -> Path:
    assert main(["export", "--run", str(run.root), "--out", str(out), *map(str, arguments)]) == 0
    return out


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("form", "file"), [("safetensors", "model.safetensors"), ("torch", "model.pth")])
def test_timm_loads_file_and_folder_as_they_are(run: RunDir, tmp_path: Path, form: str, file: str) -> None:
    out = exported(run, tmp_path / "out", "--format", form)
    fixed = weights.read_state(run.root / "export" / "model.safetensors")
    by_file = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=out / file)
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert same(by_file.state_dict(), fixed)
    assert same(by_folder.state_dict(), fixed)
    assert by_folder.pretrained_cfg["label_names"] == CLASSES
    assert (out / file).stat().st_mode & 0o444 == 0o444, "an exported model is for others to read"
    assert sorted(path.name for path in out.iterdir()) == sorted([file, "config.json", "README.md"])


@pytest.mark.parametrize("rule", ["fixefficientnet", "fixres", "timm"])
def test_timms_own_evaluation_of_the_export_predicts_the_same(run: RunDir, tmp_path: Path, rule: str) -> None:
    config = run.config()
    config = replace(config, data=replace(config.data, resize_rule=rule))
    fixed = run.root / "export" / "model.safetensors"
    with opened(config, [Subject("after", fixed)], None) as live:
        (ours,), index = predict(live, [parts_with(live, fixed)], 64, ""), live.val
    model = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=fixed)
    export.write_config(model, tmp_path / "config.json", config, 64, CLASSES)
    (tmp_path / "model.safetensors").symlink_to(fixed)

    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    settings = timm.data.resolve_data_config({}, model=theirs, use_test_size=True)
    dataset = timm.data.create_dataset("", str(Path(config.data.root) / "val"))
    loader = timm.data.create_loader(dataset, batch_size=40, use_prefetcher=False, num_workers=0, **settings)
    assert dataset.filenames(absolute=True) == [str(index.path(k)) for k in range(len(index))]
    with torch.no_grad():
        predicted = torch.cat([theirs(images).argmax(1) for images, _ in loader]).numpy()
    assert len(set(predicted)) == 3
    assert (predicted == ours.predicted).all()


@pytest.mark.parametrize(
    ("name", "data", "used"),
    [
        ("convnext_tiny.fb_in22k_ft_in1k_384", {}, {"crop_mode": "squash", "crop_pct": 1.0}),
        ("convnext_tiny.fb_in22k_ft_in1k_384", {"crop_pct": 0.8}, {"crop_mode": "squash", "crop_pct": 0.8}),
        (
            "convnext_tiny.fb_in22k_ft_in1k_384",
            {"resize_rule": "fixres"},
            {"crop_mode": "center", "interpolation": "bilinear"},
        ),
        ("deepseek_vit_412m.deepseek_v4_flash_vision_exp", {}, {"crop_mode": "border", "mean": [0.5, 0.5, 0.5]}),
        ("resnet50.a1_in1k", {"res": 288}, {"crop_pct": 1.0}),
        ("resnet50.a1_in1k", {"res": 96}, {"crop_pct": 0.95}),
        ("volo_d4_448.sail_in1k", {}, {"crop_pct": 1.15}),
    ],
)
def test_timms_transform_of_the_export_makes_our_pixels(
    run: RunDir, tmp_path: Path, name: str, data: dict[str, Any], used: dict[str, Any]
) -> None:
    config = run.config()
    given = replace(config.data, **{"resize_rule": "timm", "res": 64, **data})
    config = replace(config, data=given, model=replace(config.model, timm_name=name))
    model = build_model("test_efficientnet", 3)
    export.write_config(model, tmp_path / "config.json", config, given.res, CLASSES)
    weights.write_weights(model, tmp_path / "model.safetensors", config, given.res, CLASSES)
    written = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert {key: written[key] for key in used} == used
    assert written["test_input_size"] == written["input_size"] == [3, given.res, given.res]

    index, spec = dataset.load(Path(given.root), "val"), preprocessing(name)
    pictures = Pictures("test", given.res, spec.resize(given, given.res), 0)
    (batch,) = torch_cpu.batches(index, [make_request(index, pictures, np.arange(9), 0)], given.res, pictures.resize, 0)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for tested in (False, True):
        settings = timm.data.resolve_model_data_config(theirs, use_test_size=tested)
        transform = timm.data.create_transform(**settings, is_training=False)
        made = torch.stack([transform(Image.open(index.path(k)).convert("RGB")) for k in range(9)])
        torch.testing.assert_close(spec.normalised(batch.images), made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["fixefficientnet", "fixres", "fixres_height", "timm"])
def test_timm_scales_to_the_size_of_the_rule(run: RunDir, rule: str) -> None:
    config = replace(run.config(), data=replace(run.config().data, resize_rule=rule))
    spec = preprocessing(config.model.timm_name)
    for res in range(32, 1025):
        settings, exact = export.timm_transform(config, res)
        expected = resize_of(rule, res, spec.crop_pct, spec.interpolation)
        assert math.floor(res / settings["crop_pct"]) == expected.size
        assert settings["interpolation"] == expected.interpolation
        assert exact == (rule != "fixres_height")


def test_a_rule_timm_cannot_express_is_said_aloud(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = run.config(), Results.read(run)
    monkeypatch.setattr(
        RunDir, "config", lambda self: replace(config, data=replace(config.data, resize_rule="fixres_height"))
    )
    monkeypatch.setattr(Results, "read", lambda run: replace(found, resize_rule="fixres_height"))
    out = exported(run, tmp_path / "out")
    assert "timm cannot express data.resize_rule=fixres_height" in capsys.readouterr().err
    assert "timm's configuration cannot express this" in (out / "README.md").read_text()


def test_the_card_says_what_results_json_says(run: RunDir, tmp_path: Path) -> None:
    text = (exported(run, tmp_path / "out", "--format", "hub") / "README.md").read_text()
    found = json.loads(run.results.read_text())
    before, after = found["before"], found["after"]
    low, high = found["delta_ci95"]
    scores = f"{before['top1']:.2f} / {before['top5']:.2f} | {after['top1']:.2f} / {after['top5']:.2f}"
    assert f"| photos | 64 | 120 | {scores} | {found['delta_top1']:+.2f} ({low:+.2f} to {high:+.2f}) |" in text
    assert "submit.py --model test_efficientnet --res 64 --weights none --data photos --name r" in text
    assert 'timm.create_model("local-dir:.", pretrained=True)' in text
    assert 'timm.create_model("hf-hub:me/birds", pretrained=True)' in model_card.text(
        run, ["model.safetensors"], None, repo="me/birds"
    )
    of_weights = replace(run.config().model, weights="pretrained")
    started = replace(run.config(), model=of_weights, pretrain=Pretrain(classifier="first_result"))
    stages = model_card.stage_lines(started, Results.read(run))
    assert (
        "sgd; BatchNorm statistics `ema`; the classifier started as a logistic one on the untouched network's features.\n2."
        in stages
    )
    assert f"1. Fixing: bn2, classifier (1,283 parameters) on `{found['transform']}` of 64 px" in text
    assert "those that fixing trains in fp32" in text
    assert "Weights: they start from no weights of others" in text
    assert "Data: `photos`" in text
    assert not [word for word in ("FOLDER", "OWNER", "NAME") if word in text], "nothing to be filled in"
    data = huggingface_hub.ModelCard(text).data
    assert data.to_dict()["library_name"] == "timm"
    assert data.license is None, "new weights: no licence is made up"
    assert [e.metric_value for e in data.eval_results] == [after["top1"], after["top5"]]


def test_what_is_published_has_neither_secrets_nor_paths(run: RunDir, tmp_path: Path) -> None:
    """Nor has what else a finished run holds, but for its owner's own files."""
    out = exported(run, tmp_path / "out", "--format", "hub")
    exported(run, out, "--format", "onnx")
    assert main(["report", str(run.root), "--out", str(tmp_path / "report")]) == 0
    private = (run.config_file, run.submission)
    for file in filter(Path.is_file, [*out.rglob("*"), *(tmp_path / "report").rglob("*"), *run.root.rglob("*")]):
        found = [canary for canary in CANARIES if canary.encode() in file.read_bytes()]
        assert not found or (file in private and not file.stat().st_mode & 0o077), (file, found)
        assert file.parent != out or str(run.root.parent).encode() not in file.read_bytes(), file
        places = (Path.cwd(), Path(timm.__file__).parents[1], Path.home())
        assert file.parent != out or not any(str(place).encode() in file.read_bytes() for place in places), file


@pytest.mark.parametrize(
    ("typed", "published"),
    [
        ("fixres submit --data '/home/me/my photos' --runs-dir /scratch/me", "fixres submit --data 'my photos'"),
        ("fixres submit --profile=site.yaml --weights=~/w.pth cluster.env=x", "fixres submit --weights=w.pth"),
        ("fixres submit model.weights=../x/w.pth --data data/photos --nodes 2", None),
        (
            "fixres submit --model local-dir:/home/me/net --data /data/",
            "fixres submit --model local-dir:net --data data",
        ),
        ("fixres submit 'torn", ""),
    ],
)
def test_the_command_in_the_card(typed: str, published: str | None) -> None:
    expected = "fixres submit model.weights=w.pth --data data/photos --nodes 2" if published is None else published
    assert model_card.without_places(typed) == expected


def test_the_licence_is_that_of_the_starting_weights(run: RunDir) -> None:
    config = run.config()
    assert export.licence(config) is None
    started = replace(config, model=replace(config.model, timm_name="tf_efficientnet_b0.ns_jft_in1k", weights="ns"))
    assert export.licence(started) == "apache-2.0"
    assert "which timm gives as apache-2.0" in model_card.text(run, ["model.safetensors"], export.licence(started))


def test_alpha_zero_and_one_are_the_two_heads_exactly(run: RunDir, tmp_path: Path) -> None:
    config = run.config()
    before = build_model("test_efficientnet", 3, config.run.seed).state_dict()
    after = weights.read_state(run.root / "export" / "model.safetensors")
    made = {
        alpha: weights.read_state(exported(run, tmp_path / str(alpha), "--alpha", alpha) / "model.safetensors")
        for alpha in (0, 0.25, 1)
    }
    assert same(made[0], before)
    assert weights.read_state(run.head_before).keys() == {
        "bn2.weight",
        "bn2.bias",
        "bn2.running_mean",
        "bn2.running_var",
    } | {"bn2.num_batches_tracked", "classifier.weight", "classifier.bias"}
    card, found = (tmp_path / "0" / "README.md").read_text(), Results.read(run)
    assert f"{found.before.top1:.2f} / {found.before.top5:.2f} | +0.00" in card, "measured already, as before"
    assert same(made[1], after)
    for name, value in made[0.25].items():
        if torch.equal(before[name], after[name]):
            assert torch.equal(value, before[name]), f"{name} was frozen"
        elif value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    assert not torch.equal(made[0.25]["bn2.running_var"], before["bn2.running_var"])


def test_the_curve_between_the_heads_ends_in_before_and_after(run: RunDir, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "half", "--alpha", "0.5")
    assert f"Not measured: `{command('interpolate')}" in (out / "README.md").read_text()
    assert "model-index" not in (out / "README.md").read_text()
    part = write_photos(tmp_path / "part", 1, 4, ("birch", "cedar")) / "val"
    arguments = ["interpolate", "--run", str(run.root), "--alpha", "0,0.5,1", "--eval-set", f"part={part}"]
    assert main(arguments) == 0
    curves = json.loads((run.root / "alpha.json").read_text())["curves"]
    assert [(row["alpha"], row["n"]) for row in curves["part"]] == [(0.0, 8), (0.5, 8), (1.0, 8)]
    rows = curves["val"]
    found = json.loads(run.results.read_text())
    saved = {when: Predictions.read(run.root / "predictions" / f"{when}.npz") for when in ("before", "after")}
    for row, when in ((rows[0], "before"), (rows[2], "after")):
        summary = asdict(saved[when].summary())
        assert {key: row[key] for key in summary} == summary
    assert (rows[0]["delta_top1"], rows[2]["delta_top1"]) == (0.0, found["delta_top1"])
    assert rows[2]["delta_ci95"] == found["delta_ci95"]
    assert Image.open(run.root / "alpha.png").size == (1008, 640)
    text = (exported(run, tmp_path / "half", "--alpha", "0.5") / "README.md").read_text()
    assert f"{rows[1]['top1']:.2f} / {rows[1]['top5']:.2f}" in text
    assert "0.5 of the way" in text


def test_a_curve_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["interpolate", "--data", str(tmp_path)])
    assert stop.value.code == 2
    assert "required: --run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["interpolate", "--help"])
    assert "--checkpoint" not in capsys.readouterr().out


def test_onnx_logits_at_any_batch_size(run: RunDir, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out", "--format", "onnx", "--res", "64,96")
    model = timm.create_model(
        "test_efficientnet", num_classes=3, checkpoint_path=run.root / "export" / "model.safetensors"
    ).eval()
    for res in (64, 96):
        live = onnxruntime.InferenceSession(out / f"model_{res}.onnx")
        for n in (1, 5):
            images = torch.randn(n, 3, res, res)
            (logits,) = live.run(["logits"], {"images": images.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), atol=1e-5, rtol=1e-4)
    assert "model_64.onnx" in (out / "README.md").read_text()


def test_onnx_above_the_limit_of_one_file_has_its_weights_beside_it(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is lowered; moved to another folder, the two files are whole."""
    out = exported(run, tmp_path / "out", "--format", "onnx")
    small = (out / "model_64.onnx").stat().st_size
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    exported(run, out, "--format", "onnx")
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md",
        "config.json",
        "model_64.onnx",
        "model_64.onnx.data",
    ]
    assert (out / "model_64.onnx").stat().st_size < small / 2
    assert "`model_64.onnx.data`" in (out / "README.md").read_text()
    moved = shutil.copytree(out, tmp_path / "moved")
    shutil.rmtree(out)
    model = timm.create_model(
        "test_efficientnet", num_classes=3, checkpoint_path=run.root / "export" / "model.safetensors"
    )
    images = torch.randn(2, 3, 64, 64)
    (logits,) = onnxruntime.InferenceSession(moved / "model_64.onnx").run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model.eval()(images).detach(), atol=1e-5, rtol=1e-4)
    monkeypatch.undo()
    exported(run, moved, "--format", "onnx")
    assert not (moved / "model_64.onnx.data").exists(), "of an earlier export"


def test_onnx_refuses_a_size_that_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model does not take 72 px"):
        export.write_onnx(build_model("vit_tiny_patch16_224", 3), tmp_path / "m.onnx", 72)


def test_onnx_that_is_off_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ONNX_TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"logits of m\.onnx are off by"):
        export.write_onnx(build_model("test_efficientnet", 3), tmp_path / "m.onnx", 64)
    assert not list(tmp_path.iterdir())


API = huggingface_hub.HfApi


class Hub:
    """Stands in for huggingface_hub.HfApi: takes what that takes, and writes down what it is asked."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self, **_: object) -> None:
        pass

    def create_repo(self, repo: str, **options: object) -> Any:
        inspect.signature(API.create_repo).bind(self, repo, **options)
        self.calls.append(("create_repo", (repo, options)))
        return type("Url", (), {"repo_id": f"me/{repo}"})()

    def upload_folder(self, **options: object) -> str:
        inspect.signature(API.upload_folder).bind(self, **options)
        self.calls.append(("upload_folder", options))
        return "https://hub/commit"


def test_nothing_leaves_the_machine_unless_push_says_so(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls.clear()
    out = exported(run, tmp_path / "out", "--format", "hub")
    assert not Hub.calls
    exported(run, out, "--format", "hub", "--push", "b0-fixed")
    names = ["README.md", "config.json", "model.safetensors"]
    uploaded = {"repo_id": "me/b0-fixed", "folder_path": out, "allow_patterns": names, "commit_message": "Add model"}
    assert Hub.calls == [("create_repo", ("b0-fixed", {"exist_ok": True})), ("upload_folder", uploaded)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "pushed: https://hub/commit" in capsys.readouterr().out


def test_a_hub_out_of_reach_is_the_users_to_mend(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unreachable(Hub):
        def create_repo(self, repo: str, **options: object) -> Any:
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    command = ["export", "--run", str(run.root), "--format", "hub", "--out", str(tmp_path), "--push", "me/x"]
    assert main(command) == 2
    assert (
        "the hub did not take me/x: OSError: no route to host. Next: the same command on a machine"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--alpha", "1.5"], "accepted: 0 (the starting head) to 1"),
        (["--alpha", "0.5", "--out", "export"], "holds the fixed weights themselves"),
        (["--res", "64"], "--res goes with --format onnx"),
        (["--push", "me/x"], "--push goes with --format hub"),
        (["--format", "onnx", "--res", "16"], "--res 16 is below 32 px"),
        (["--run", "nowhere"], "is no run directory"),
    ],
)
def test_refusals_name_the_way_out(
    run: RunDir, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.root)
    untouched = (run.root / "export" / "model.safetensors").read_bytes()
    assert main(["export", "--run", ".", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert (run.root / "export" / "model.safetensors").read_bytes() == untouched
    assert sorted(path.name for path in (run.root / "export").iterdir()) == ["model.safetensors"]
