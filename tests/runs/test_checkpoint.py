"""Asynchronous checkpoints: whole or invisible, with the tensors of the moment of `save`, and no error is lost."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models import policies, tensor_files
from fixres_dist.models.build import build_model
from fixres_dist.runs import checkpoint, restoring

NAMES = ("classifier.weight",)


def pair() -> tuple[nn.Module, torch.optim.SGD]:
    model = build_model("test_efficientnet", 3)
    optimizer = torch.optim.SGD(model.get_submodule("classifier").parameters(), lr=0.1, momentum=0.9)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def restored(path: Path, fingerprint: dict[str, Any]) -> checkpoint.Progress:
    model, optimizer = pair()
    return restoring.restore(path, model, NAMES, optimizer, fingerprint)


def nothing(**_: Any) -> None:
    pass


def save(folder: Path, *progresses: checkpoint.Progress, fingerprint: dict[str, Any] | None = None) -> None:
    model, optimizer = pair()
    with checkpoint.Writer(folder, nothing) as writer:
        for progress in progresses:
            writer.save(model, NAMES, optimizer, progress, fingerprint or {})
        writer.wait()


def test_a_checkpoint_of_changed_data_is_refused_by_name(tmp_path: Path) -> None:
    progress = checkpoint.Progress(4, "fix", loss_scale={"skipped": 1, "scaler": {"scale": 2.0**15}})
    save(tmp_path, progress, fingerprint={"sample lists": ["a", "b"]})
    (path,) = checkpoint.complete(tmp_path)
    model, optimizer = pair()
    assert restoring.restore(path, model, NAMES, optimizer, {"sample lists": ["a", "b"]}) == progress
    with pytest.raises(UserError, match=r"sample lists was \['a', 'b'\], is \['a', 'c'\]"):
        restoring.restore(path, model, NAMES, optimizer, {"sample lists": ["a", "c"]})


def test_a_checkpoint_from_before_a_key_existed_is_resumed_at_the_keys_default(tmp_path: Path) -> None:
    now = reading.identity(Config())
    older = {**now, "data": {key: value for key, value in now["data"].items() if key != "resize_rule"}}
    save(tmp_path, checkpoint.Progress(4, "fix"), fingerprint={"configuration": older})
    (path,) = checkpoint.complete(tmp_path)
    assert restored(path, {"configuration": now}).step == 4
    other = {**now, "data": {**now["data"], "resize_rule": "fixres"}}
    with pytest.raises(UserError, match="configuration was"):
        restored(path, {"configuration": other})


@pytest.mark.parametrize("name", ["head.safetensors", "optimizer.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_round_it(tmp_path: Path, name: str) -> None:
    save(tmp_path, *(checkpoint.Progress(step, "fix") for step in (3, 5)))
    for path, start in zip(checkpoint.complete(tmp_path)[::-1], ("step 3", "the start of its stage"), strict=True):
        (path / name).write_bytes(b"")
        with pytest.raises(Damaged) as caught:
            restored(path, {})
        assert str(caught.value).startswith(f"{path / name} cannot be read: ")
        assert f"Next: rm -r {path}, then the same command: it goes on from {start}" in str(caught.value)
        shutil.rmtree(path)


def flipped(file: Path, at: float) -> None:
    """One bit, at a part of the file."""
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 4
    file.write_bytes(data)


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "head") -> None:
    """As another program would write it, without a checksum."""
    tensors = load_file(path / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, path / f"{name}.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of a tensor": (lambda path: flipped(path / "head.safetensors", 0.7), "checksum"),
    "a bit of a momentum": (lambda path: flipped(path / "optimizer.safetensors", 0.9), "checksum"),
    "a digit of the step": (
        lambda path: (path / "meta.json").write_text(
            (path / "meta.json").read_text().replace('"step": 5', '"step": 7')
        ),
        "checksum",
    ),
    "a tensor is missing": (lambda path: rewritten(path, lambda tensors: tensors.clear()), "of another checkpoint"),
    "an empty optimizer": (
        lambda path: rewritten(path, lambda tensors: tensors.clear(), "optimizer"),
        "of another checkpoint",
    ),
    "another step's head": (
        lambda path: shutil.copy(path.with_name("step_00000003") / "head.safetensors", path),
        "of another checkpoint",
    ),
    "another step's directory": (
        lambda path: (shutil.rmtree(path), shutil.copytree(path.with_name("step_00000003"), path)),
        "it is of step 3",
    ),
    "no optimizer": (lambda path: (path / "optimizer.safetensors").unlink(), "it is missing"),
    "no meta": (lambda path: (path / "meta.json").unlink(), "it is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_it_is_taken(tmp_path: Path, damage: str) -> None:
    """Two steps, of which the second has other tensors."""
    model, optimizer = pair()
    with checkpoint.Writer(tmp_path, nothing) as writer:
        writer.save(model, NAMES, optimizer, checkpoint.Progress(3, "fix"), {})
        writer.wait()
        before = model.get_submodule("classifier").weight.detach().clone()
        optimizer.step()
        writer.save(model, NAMES, optimizer, checkpoint.Progress(5, "fix"), {})
    change, words = DAMAGES[damage]
    change(tmp_path / "step_00000005")
    told: list[Damaged] = []
    checkpoint.put_damaged_aside(tmp_path, told.append)
    (error,) = told
    assert str(tmp_path / "step_00000005") in str(error)
    assert words in error.why
    assert (tmp_path / "step_00000005.damaged").is_dir(), "it can be looked at"
    model, optimizer = pair()
    start = checkpoint.Progress(0, "fix")
    progress, resumed = restoring.resume(tmp_path, start, model, NAMES, optimizer, {})
    assert (progress.step, resumed) == (3, True)
    assert torch.equal(model.get_submodule("classifier").weight, before)
    told.clear()
    checkpoint.put_damaged_aside(tmp_path, told.append)
    assert not told


def as_an_older_version_wrote_it(path: Path) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({key: meta[key] for key in ("progress", "fingerprint")}))
    for name in ("head", "optimizer"):
        rewritten(path, lambda tensors: None, name)


def test_a_checkpoint_of_an_older_version_is_resumed_and_one_that_is_not_whole_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, checkpoint.Progress(4, "fix"))
    (path,) = checkpoint.complete(tmp_path)
    as_an_older_version_wrote_it(path)
    told: list[Damaged] = []
    checkpoint.put_damaged_aside(tmp_path, told.append)
    assert not told
    assert "has no checksum: an older version wrote it" in capsys.readouterr().out
    assert restored(path, {}).step == 4
    for name, change, words in (
        ("optimizer", lambda tensors: tensors.clear(), "momenta are missing"),
        ("head", lambda tensors: tensors.update({"classifier.weight": torch.zeros(1)}), "the model wants"),
        ("head", lambda tensors: tensors.clear(), "classifier.weight is missing"),
    ):
        rewritten(path, change, name)
        with pytest.raises(Damaged, match=words):
            restored(path, {})


def test_steps_that_overflows_skipped_leave_no_momenta(tmp_path: Path) -> None:
    model, optimizer = pair()
    optimizer.state.clear()
    with checkpoint.Writer(tmp_path, nothing) as writer:
        writer.save(model, NAMES, optimizer, checkpoint.Progress(2, "fix", loss_scale={"skipped": 2}), {})
        writer.wait()
    start = checkpoint.Progress(0, "fix")
    assert restoring.resume(tmp_path, start, model, NAMES, optimizer, {})[1]
    with checkpoint.Writer(tmp_path, nothing) as writer:
        writer.save(model, NAMES, optimizer, checkpoint.Progress(3, "fix", loss_scale={"skipped": 2}), {})
        writer.wait()
    with pytest.raises(Damaged, match="momenta are missing"):
        restoring.resume(tmp_path, start, model, NAMES, optimizer, {})


def test_equal_tensors_are_equal_files(tmp_path: Path) -> None:
    """The header's texts have an order of their own in every file that safetensors writes."""
    files = [tmp_path / f"{k}.safetensors" for k in range(8)]
    for file in files:
        tensor_files.save(file, {"b": torch.arange(5.0), "a": torch.ones(2, 3)}, {"z": 'é"', "y": "2", "x": "3"})
        assert tensor_files.load(file, "")[0].keys() == {"a", "b"}
    assert len({file.read_bytes() for file in files}) == 1


def test_the_last_checkpoint_of_stage_one_stays_when_fixing_has_one_of_the_same_step(tmp_path: Path) -> None:
    stages = ((6, "pretrain"), (7, "pretrain"), (7, "fix"), (8, "fix"), (9, "fix"))
    save(tmp_path, *(checkpoint.Progress(step, stage) for step, stage in stages))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000008", "step_00000009"]
    assert checkpoint.read(checkpoint.stage_end(tmp_path, 7)).progress.stage == "pretrain"


def test_an_unfinished_checkpoint_is_invisible(tmp_path: Path) -> None:
    save(tmp_path, *(checkpoint.Progress(step, "fix", best_step=1) for step in range(5)))
    assert [p.name[-1] for p in checkpoint.complete(tmp_path)] == ["1", "3", "4"], "the newest two and the best"
    (tmp_path / ".step_00000009.123").mkdir()
    (tmp_path / "step_00000009").mkdir()
    assert [p.name[-1] for p in checkpoint.complete(tmp_path)] == ["1", "3", "4"]


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds the tensors of the moment of `save`, though they change before it is written."""
    go, written = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: (go.wait(60), written(*arguments)))
    model, optimizer = pair()
    weight = model.get_submodule("classifier").weight
    before, told = weight.detach().clone(), []
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    with checkpoint.Writer(tmp_path, lambda **saved: told.append(saved)) as writer:
        writer.save(model, NAMES, optimizer, checkpoint.Progress(1, "fix"), {})
        optimizer.step()  # in place, before anything is written
        assert not checkpoint.complete(tmp_path)
        assert not told, "an event must not promise what is not on disk"
        go.set()
        writer.wait()
        (path,) = checkpoint.complete(tmp_path)
    assert torch.equal(load_file(path / "head.safetensors")["classifier.weight"], before)
    assert torch.equal(load_file(path / "optimizer.safetensors")["momentum_buffer:classifier.weight"], momentum)
    assert not torch.equal(weight, before)
    assert [saved["step"] for saved in told] == [1]
    assert told[0]["stall_ms"] >= 0


def test_an_error_of_the_thread_reaches_the_loop_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    model, optimizer = pair()
    with checkpoint.Writer(tmp_path, nothing) as writer:
        writer.save(model, NAMES, optimizer, checkpoint.Progress(1, "fix"), {})
        with pytest.raises(OSError, match="No space left"):
            writer.save(model, NAMES, optimizer, checkpoint.Progress(2, "fix"), {})
        writer.wait()  # told once
    assert not checkpoint.complete(tmp_path)


def test_leaving_waits_for_the_save_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's lock is given back after the last write, also where the loop ends with an exception."""
    go, written = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: (go.wait(60), written(*arguments)))
    model, optimizer = pair()

    def broken_loop() -> None:
        with checkpoint.Writer(tmp_path, nothing) as writer:
            writer.save(model, NAMES, optimizer, checkpoint.Progress(1, "fix"), {})
            threading.Timer(0.05, go.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_loop()
    assert len(checkpoint.complete(tmp_path)) == 1


@pytest.mark.parametrize(("policy", "below_mib"), [("classifier+bn", 150), ("classifier+bn+conv_head", 150)])
def test_a_checkpoint_of_l2_is_small(policy: str, below_mib: float) -> None:
    """Bytes of the tuned tensors and their momenta; on the meta device nothing is allocated."""
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_l2", num_classes=1000)
    tuned = policies.select(model, policy)
    state = model.state_dict()
    sizes = [state[name].numel() * state[name].element_size() for name in tuned.tensors + tuned.parameters]
    assert sum(sizes) < below_mib * 2**20
    assert sum(sizes) > 2 * 4 * 5_505_000, "the classifier and its momentum alone"
