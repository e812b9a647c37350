"""Weights as people have them: checkpoints of training scripts, in wrappers, beside averages; and files that are none."""

from __future__ import annotations

import argparse
import datetime
import gzip
import io
import json
import logging
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models import sources, weights
from fixres_dist.models.build import build_model

NAME, CLASSES = "test_efficientnet", ("ash", "birch", "cedar")
State = dict[str, torch.Tensor]


def state(seed: int = 1, classes: int = 3) -> State:
    return {k: v.clone() for k, v in build_model(NAME, classes, seed).state_dict().items()}


def loaded(
    file: Path, key: str = "", stage_one: bool = False, name: str = NAME, names: tuple[str, ...] = CLASSES
) -> Any:
    """(the model that was filled from `file`, what was said)."""
    values: dict[str, Any] = {"model": {"timm_name": name, "weights": str(file), "checkpoint_key": key}}
    model = build_model(name, len(names), 7)
    config = reading.parse(Config, values | ({"pretrain": {}} if stage_one else {}))
    return model, "; ".join(weights.load_weights(model, config, names))


def is_of(model: nn.Module, wanted: State) -> bool:
    return all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


def saved(tmp_path: Path, content: object) -> Path:
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def refused(file: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(file, **options)
    said = str(caught.value)
    assert str(file) in said
    assert "weights_only" not in said
    assert all(c.isprintable() or c == "\n" for c in said)
    return said


def test_a_checkpoint_of_timms_training_script_gives_the_averaged_weights(tmp_path: Path) -> None:
    model, averaged = build_model(NAME, 3, 1), ModelEmaV2(build_model(NAME, 3, 2))
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model=NAME, output=Path("out"), mean=np.float32(0.5), lr=[0.1]),
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=np.float64(50.0))
    file = tmp_path / "model_best.pth.tar"
    filled, said = loaded(file)
    assert is_of(filled, state(2))
    assert "takes state_dict_ema, averaged weights (not state_dict; model.checkpoint_key chooses)" in said
    assert is_of(loaded(file, key="state_dict")[0], state(1))
    assert "no such entry. Accepted: state_dict, state_dict_ema" in refused(file, key="teacher").replace("'", "")


def test_plain_data_beside_the_weights_is_read_and_no_code_runs(tmp_path: Path) -> None:
    """What torchvision's references and people's own scripts put there."""
    beside = {
        "args": argparse.Namespace(data_path="x", device=torch.device("cpu"), when=datetime.datetime(2024, 1, 2)),
        "metrics": OrderedDict(top1=np.float64(75.1), counts=np.arange(3), flags=np.array([True]), shape=(1, 2)),
        "paths": [Path("a/b"), {"x"}, frozenset("y"), slice(1), range(3), 1 + 2j, datetime.timedelta(1)],
        "history": defaultdict(list, loss=[1.0]),
        "torch": torch.__version__,
        "names": np.array(["a", "b"]),
        "lr_scheduler": {"base_lrs": [0.5], "_last_lr": [0.1]},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    }
    filled, said = loaded(saved(tmp_path, {**beside, "model": state(), "model_ema": {"module.x": torch.zeros(1)}}))
    assert is_of(filled, state())
    assert not said


class Opened:
    """Would be run by a reader of pickles."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, ("ran",))


class Imported:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, ("open('ran', 'w')",))


class Trainer:
    pass


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": state(), "x": Opened()}, "an object of class posix.mkdir"),
        ({"model": state(), "x": Imported()}, "an object of class eval"),
        ({"model": state(), "trainer": Trainer()}, "test_weights_files.Trainer"),
        (nn.Linear(1, 1), "a pickled model (class torch.nn.modules.linear.Linear)"),
        ({"ema": build_model(NAME, 3)}, "a pickled model (class timm.models.efficientnet.EfficientNet)"),
    ],
)
def test_a_class_outside_the_allow_list_is_named_and_not_run(
    tmp_path: Path, content: object, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(saved(tmp_path, content))
    assert named in said
    assert "Next: where the file was made: torch.save(model.state_dict()" in said
    assert not (tmp_path / "ran").exists()


def test_a_class_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    data = b"\x80\x02cevil\x1b[2J\nname\n."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as file:
        file.writestr("w/data.pkl", data)
        file.writestr("w/version", "3")
    assert r"evil\x1b[2J.name" in refused(tmp_path / "w.pth")


WRAPPED = (
    *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "network.", "net.", "encoder."),
    *(
        "backbone.",
        "model.module._orig_mod.",
        "module.model.backbone.",
        "_fsdp_wrapped_module.",
        "model._orig_mod.net.",
    ),
)


@pytest.mark.parametrize("prefix", WRAPPED)
def test_prefixes_of_wrappers_are_taken_off_in_any_nesting(tmp_path: Path, prefix: str) -> None:
    inside = {prefix + name: value for name, value in state().items()}
    filled, _ = loaded(saved(tmp_path, {"state_dict": {**inside, "n_averaged": torch.tensor(3)}}))
    assert is_of(filled, state())


def test_wrappers_within_a_model_are_taken_off_too(tmp_path: Path) -> None:
    """As FSDP wraps each block, and the oldest examples wrapped the features alone."""
    inner = {
        n.replace("blocks.", "blocks._fsdp_wrapped_module.").replace(".conv", ".module.conv"): v
        for n, v in state().items()
    }
    assert is_of(loaded(saved(tmp_path, inner))[0], state())


def test_lightnings_other_tensors_are_left_out_and_said(tmp_path: Path) -> None:
    content = {f"model.{name}": value for name, value in state().items()} | {"loss.weight": torch.ones(3)}
    checkpoint = {
        "state_dict": content,
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {"Best{}": {"score": torch.ones(1)}},
    }
    filled, said = loaded(saved(tmp_path, checkpoint))
    assert is_of(filled, state())
    assert "leaves out 1 tensor(s) beside 'model.': loss.weight" in said


@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        (("model", "model_ema"), "model_ema"),
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("params", "params_ema"), "params_ema"),
        (("ema", "net"), "ema"),
        (("state_dict.model", "state_dict.ema_model"), "state_dict.ema_model"),
        (("state_dict.net", "ema_state_dict"), "ema_state_dict"),
    ],
)
def test_averaged_weights_win_under_any_name_and_a_key_chooses(
    tmp_path: Path, entries: tuple[str, str], taken: str
) -> None:
    content: dict[str, Any] = {}
    for seed, entry in enumerate(entries):
        first, _, prefix = entry.partition(".")
        inside = {f"{prefix}.{name}" if prefix else name: value for name, value in state(seed).items()}
        content.setdefault(first, {}).update(inside)
    file = saved(tmp_path, content)
    filled, said = loaded(file)
    assert is_of(filled, state(entries.index(taken)))
    assert f"takes {taken}, averaged weights" in said
    for seed, entry in enumerate(entries):
        assert is_of(loaded(file, key=entry)[0], state(seed))


def test_of_student_and_teacher_somebody_has_to_choose(tmp_path: Path) -> None:
    file = saved(tmp_path, {"student": state(1), "teacher": {f"module.{n}": v for n, v in state(2).items()}})
    assert "holds 2 models: student, teacher. Next: model.checkpoint_key=teacher" in refused(file)
    assert is_of(loaded(file, key="teacher")[0], state(2))


@pytest.mark.parametrize("average", [torch.optim.swa_utils.AveragedModel, ModelEmaV3])
def test_a_state_dict_of_an_averaged_model_is_the_models(tmp_path: Path, average: Any) -> None:
    assert is_of(loaded(saved(tmp_path, average(build_model(NAME, 3, 4)).state_dict()))[0], state(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["pth", "safetensors", "misnamed"])
def test_other_number_formats_are_converted_and_said(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state().items()}
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    (torch.save if form == "pth" else save_file)(low, file)
    filled, said = loaded(file)
    assert is_of(filled, {name: value.float() if value.is_floating_point() else value for name, value in low.items()})
    assert said == f"converted from {str(dtype)[6:]} to float32"


def test_arrays_are_weights_and_whole_numbers_are_not(tmp_path: Path) -> None:
    filled, _ = loaded(saved(tmp_path, {"model": {name: value.numpy() for name, value in state().items()}}))
    assert is_of(filled, state())
    whole = {**state(), "conv_head.weight": state()["conv_head.weight"].to(torch.int8)}
    assert "conv_head.weight is torch.int8, quantised" in refused(saved(tmp_path, whole))


def test_tensors_of_older_versions_of_timm_are_converted_by_timm(tmp_path: Path) -> None:
    """The first ViTs cut patches with a linear layer."""
    own = {name: value.clone() for name, value in build_model("test_vit", 3, 1).state_dict().items()}
    older = {**own, "patch_embed.proj.weight": own["patch_embed.proj.weight"].flatten(1)}
    filled, _ = loaded(
        saved(tmp_path, {"model": {f"module.{name}": value for name, value in older.items()}}), name="test_vit"
    )
    assert is_of(filled, own)


def test_another_naming_scheme_is_shown_by_its_first_name(tmp_path: Path) -> None:
    foreign = {f"net.features.{k}.kernel": value for k, value in enumerate(state().values())}
    said = refused(saved(tmp_path, foreign))
    shape = list(state()["conv_stem.weight"].shape)
    assert f"Its first is 'features.0.kernel' {shape}, the model's 'conv_stem.weight' {shape}" in said
    assert "Next: --model by the name" in said


def test_weights_of_another_architecture_are_no_models_within(tmp_path: Path) -> None:
    """A residual block has names that every block of another model has too."""
    other = {n: v.clone() for n, v in build_model("resnet18", 3, 1).state_dict().items()}
    assert "nearly all: it names its 122 tensors in another way" in refused(saved(tmp_path, other))


def in_zip(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr(name, b"x")
    return made.getvalue()


def in_tar() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.ckpt"))
    return made.getvalue()


def of_torch(**options: Any) -> bytes:
    made = io.BytesIO()
    torch.save(state(), made, **options)
    return made.getvalue()


def of_safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


NOT_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty. Next: download it again"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer, not the file",
    ),
    "html": (b"<!DOCTYPE html>\n<html><head><title>Sign in", "a web page (HTML), not weights: '<!DOCTYPE html> <html>"),
    "html after a mark": ("\ufeff\n <html>ü".encode(), "a web page (HTML)"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a message of a server (XML)"),
    "json": (b'{"error": "Repository not found"}', 'a JSON text, not weights: \'{"error"'),
    "list of pieces": (
        b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}',
        "the list of the pieces",
    ),
    "text": (b"Entry not found", "a text, not weights: 'Entry not found'"),
    "gzip of a page": (gzip.compress(b"<html>"), "compressed by gzip. Next: unpack it"),
    "tar": (in_tar(), "a tar archive. Next: unpack it"),
    "zip": (in_zip("readme.txt"), "a zip archive without a state dict (in it: readme.txt)"),
    "npz": (in_zip("conv.npy"), "holds numpy arrays (npz: conv.npy"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file (Keras)"),
    "onnx": (b"\x08\x09\x12\x07pytorch\x1a\x052.9.0", "an ONNX model"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(20), "a TensorFlow Lite model"),
    "picture": (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG picture"),
    "unknown": (b"\xfe\xed\xfa\xce" + bytes(20), "it starts with fe ed fa ce"),
    "half a torch file": (of_torch()[:9000], "cut off or damaged"),
    "half an older torch file": (
        of_torch(_use_new_zipfile_serialization=False)[:9000],
        "is damaged or incomplete (9,000 bytes)",
    ),
    "half a safetensors file": (of_safetensors()[:-8], "is cut off: "),
    "safetensors within its header": (of_safetensors()[:20], "ends within its header: 20 bytes"),
    "safetensors with a damaged header": (
        of_safetensors().replace(b'"data_offsets"', b'"data_0ffsets"'),
        "header is damaged",
    ),
    "a plain pickle": (pickle.dumps({"a": 1}, 2), "is damaged, or is no file of torch.save"),
    "a newer pickle": (of_torch(pickle_protocol=4), "in a protocol above torch's own"),
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_what_is_no_weights_file_is_said_by_what_it_is(tmp_path: Path, kind: str) -> None:
    content, said = NOT_WEIGHTS[kind]
    file = tmp_path / ("w.safetensors" if "safetensors" in kind else "w.pth")
    file.write_bytes(content)
    message = refused(file)
    assert said in message
    assert "Next: " in message or "Accepted: " in message


def test_a_hub_out_of_reach_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client said so twice for each of twelve attempts."""

    def unreachable(*_: object, **__: object) -> None:
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
        raise OSError("Name or service not known")

    monkeypatch.setattr(sources.timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(OSError\).*Or --weights FILE"):
        sources.hub_state("resnet18.a1_in1k")


def test_of_a_folder_the_files_in_it_are_named(tmp_path: Path) -> None:
    saved(tmp_path, state())
    assert "is a folder. Accepted: a file of weights (in it: w.pth)" in refused(tmp_path)
    (tmp_path / ".metadata").touch()
    assert "Next: python -m torch.distributed.checkpoint.format_utils dcp_to_torch" in refused(tmp_path)


def test_a_torchscript_model_is_said_to_be_code(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "w.pt"))
    assert "a TorchScript model, which is code. Next: model = torch.jit.load" in refused(tmp_path / "w.pt")


def with_names(tmp_path: Path, names: tuple[str, ...], form: str = "header") -> Path:
    if form == "header":
        save_file(state(), tmp_path / "w.safetensors", {"label_names": json.dumps(names), "format": "pt"})
        return tmp_path / "w.safetensors"
    beside = (
        {"class_to_idx": {name: k for k, name in enumerate(names)}} if form == "class_to_idx" else {form: list(names)}
    )
    return saved(tmp_path, {"model": state(), **beside})


@pytest.mark.parametrize("form", ["header", "class_to_idx", "classes", "label_names"])
def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path, form: str) -> None:
    filled, said = loaded(with_names(tmp_path, ("cedar", "ash", "birch"), form))
    assert torch.equal(filled.classifier.weight, state()["classifier.weight"][[1, 2, 0]])
    assert torch.equal(filled.classifier.bias, state()["classifier.bias"][[1, 2, 0]])
    assert said == "its classes stand in another order: mapped by name"


def test_folders_that_are_called_by_numbers_are_mapped_too(tmp_path: Path) -> None:
    """class_0 at place 0 looks like a name that somebody made up; with class_10 before class_2 the order matters."""
    names = tuple(sorted(f"class_{k}" for k in range(12)))
    model = build_model(NAME, 12, 7)
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file, {"label_names": json.dumps(sorted(names, key=lambda n: int(n[6:])))})
    filled, said = loaded(file, names=names)
    assert torch.equal(filled.classifier.bias[names.index("class_10")], model.classifier.bias[10])
    assert said == "its classes stand in another order: mapped by name"


@pytest.mark.parametrize("form", ["header", "arch"])
def test_weights_that_name_another_architecture_are_warned_of(tmp_path: Path, form: str) -> None:
    if form == "header":
        save_file(state(), tmp_path / "w.safetensors", {"timm_name": "test_resnet.r160_in1k"})
        file = tmp_path / "w.safetensors"
    else:
        file = saved(tmp_path, {"state_dict": state(), "arch": "test_resnet"})
    assert "warning: it says that it is of test_resnet" in loaded(file)[1]
    save_file(state(), tmp_path / "w.safetensors", {"timm_name": f"{NAME}.r160_in1k"})
    assert "warning: it says" not in loaded(tmp_path / "w.safetensors")[1]


def test_a_piece_of_weights_is_said_to_be_one(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model-00001-of-00002.safetensors")
    assert "is one of several pieces of a model's weights. Next: join them" in refused(
        tmp_path / "model-00001-of-00002.safetensors"
    )


def test_other_classes_are_refused_or_get_a_new_classifier(tmp_path: Path) -> None:
    file = with_names(tmp_path, ("ash", "oak", "yew"))
    assert "other classes than the data set: 'oak' against 'birch', 'yew' against 'cedar' (2 of 3 names" in refused(
        file
    )
    filled, said = loaded(file, stage_one=True)
    assert torch.equal(filled.classifier.weight, build_model(NAME, 3, 7).classifier.weight)
    assert torch.equal(filled.conv_stem.weight, state()["conv_stem.weight"])
    assert "the new classifier is kept for stage one" in said


def test_some_of_a_files_classes_get_the_setting_that_keeps_them_all(tmp_path: Path) -> None:
    file = with_names(tmp_path, CLASSES)
    said = refused(file, names=("ash", "cedar"))
    assert f"classifies 3 classes, among them the 2 of the data set. Next: data.class_map={file}" in said


def test_a_config_beside_the_file_names_its_classes(tmp_path: Path) -> None:
    """As export lays out model.pth, and the hub its models."""
    torch.save(state(), tmp_path / "model.pth")
    (tmp_path / "config.json").write_text(json.dumps({"label_names": ["cedar", "ash", "birch"]}))
    filled, said = loaded(tmp_path / "model.pth")
    assert torch.equal(filled.classifier.weight, state()["classifier.weight"][[1, 2, 0]])
    assert "mapped by name" in said


@pytest.mark.parametrize(
    ("now", "then"),
    [(b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"pathlib\nPosixPath", b"pathlib\nWindowsPath"),
     (b"pathlib\nPosixPath", b"pathlib._local\nPosixPath")],
)  # fmt: skip
def test_names_of_other_versions_and_systems_are_known(tmp_path: Path, now: bytes, then: bytes) -> None:
    made = io.BytesIO()
    torch.save({"model": state(), "beside": [np.float64(1), np.arange(2), Path("a")]}, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            assert now in data or not name.endswith("data.pkl")
            new.writestr(name, data.replace(now, then))
    assert is_of(loaded(tmp_path / "w.pth")[0], state())


def test_what_is_written_names_its_classes(tmp_path: Path) -> None:
    config = reading.parse(Config, {"model": {"timm_name": NAME}})
    weights.write_weights(build_model(NAME, 3, 1), tmp_path / "w.safetensors", config, 64, CLASSES)
    assert sources.read_file(tmp_path / "w.safetensors").classes == CLASSES


def test_a_file_without_names_is_warned_of_where_timms_order_is_another(tmp_path: Path) -> None:
    file = saved(tmp_path, state())
    _, said = loaded(file, names=("1", "10", "2"))
    assert (
        "torchvision's order of the folders (1, 10, 2, ..); if timm's script trained it (1, 2, 10, ..): data.class_map=natural"
        in said
    )
    assert not loaded(file)[1]
