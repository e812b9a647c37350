"""Weights whose classes stand in another order than the folders: mapped by name or by setting, else noticed."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from fixres_dist.cli.main import main
from fixres_dist.data.class_names import natural
from fixres_dist.models.build import build_model

torch.set_num_threads(1)
NAME, RES = "test_efficientnet", 64
FOLDERS = sorted(map(str, range(1, 12)))  # 1, 10, 11, 2 .. as torchvision sorts them
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven classes that differ in hue, four pictures of each for training and eight for validation."""
    root, rng = tmp_path_factory.mktemp("hues"), np.random.default_rng(0)
    for k, name in enumerate(FOLDERS):
        colour = np.array(colorsys.hsv_to_rgb(k / len(FOLDERS), 0.9, 0.8)) * 255
        for split, count in (("train", 4), ("val", 8)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colour + rng.normal(0, 15, (72, 80, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(data: Path) -> State:
    """A random trunk whose classifier is solved for the training pictures, its rows in the order of FOLDERS."""
    model = build_model(NAME, len(FOLDERS), 1)
    transform = timm.data.create_transform((3, RES, RES), crop_pct=1.0)
    files = sorted((data / "train").glob("*/*.png"))
    images = torch.stack([transform(Image.open(file)) for file in files])
    wanted = torch.nn.functional.one_hot(torch.tensor([FOLDERS.index(f.parent.name) for f in files])).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        model.train()(images)
        inputs = model.eval().forward_head(model.forward_features(images), pre_logits=True).double()
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        ridge = inputs.T @ inputs + 1e-3 * torch.eye(inputs.shape[1])
        solved = torch.linalg.solve(ridge, inputs.T @ wanted)
        model.classifier.weight.copy_(solved[:-1].T)
        model.classifier.bias.copy_(solved[-1])
    return {name: value.clone() for name, value in model.state_dict().items()}


def ordered(trained: State, order: list[str]) -> State:
    rows = [FOLDERS.index(name) for name in order]
    return {n: v[rows].contiguous() if n.startswith("classifier.") else v for n, v in trained.items()}


def top1(tmp_path: Path, data: Path, file: Path, *more: str) -> float:
    words = ["evaluate", "--model", NAME, "--checkpoint", str(file), "--data", str(data), "--res", str(RES)]
    assert main([*words, "--json", str(tmp_path / "e.json"), "run.precision=fp32", "data.workers=0", *more]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "e.json").read_text())
    return float(found["top1"])


def test_timms_order_is_noticed_and_its_setting_is_right(
    data: Path, trained: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(trained, tmp_path / "theirs.safetensors")
    save_file(ordered(trained, natural(FOLDERS)), tmp_path / "timms.safetensors")
    right = top1(tmp_path, data, tmp_path / "theirs.safetensors")
    assert right > 70
    out = capsys.readouterr()
    assert "data.class_map=natural" in out.out, "the file names no classes, and the orders differ"
    assert not out.err
    assert top1(tmp_path, data, tmp_path / "timms.safetensors") < 40
    said = capsys.readouterr().err
    assert f"{right:.2f} % if the weights have the classes in another order. Next: data.class_map=natural" in said
    assert top1(tmp_path, data, tmp_path / "timms.safetensors", "data.class_map=natural") == right
    assert not capsys.readouterr().err


def test_names_in_the_file_map_any_order(data: Path, trained: State, tmp_path: Path) -> None:
    order = FOLDERS[::-1]
    save_file(ordered(trained, order), tmp_path / "w.safetensors", {"label_names": json.dumps(order)})
    assert top1(tmp_path, data, tmp_path / "w.safetensors") > 70


def test_a_run_says_it_before_it_trains(
    data: Path, trained: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(ordered(trained, FOLDERS[1:] + FOLDERS[:1]), tmp_path / "w.safetensors")
    words = ["submit", "--model", NAME, "--weights", str(tmp_path / "w.safetensors"), "--data", str(data)]
    words += ["--res", str(RES), "--cluster", "inline", "--runs-dir", str(tmp_path), "--name", "r"]
    assert main([*words, "run.precision=fp32", "data.workers=0", "tune.global_batch=11"]) == 0
    said = capsys.readouterr().out
    assert (
        "if 11 of 11 classes are exchanged (1 is predicted as 9, 10 is predicted as 1, 11 is predicted as 10)" in said
    )
    assert "Next: data.class_map=FILE" in said
