"""Asynchronous checkpoints: whole or invisible, with the tensors of the moment of `save`, and no error is lost."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.models import policies
from fixres_dist.models.build import build_model
from fixres_dist.runs import checkpoint


def pair() -> tuple[nn.Module, torch.optim.SGD]:
    model = build_model("test_efficientnet", 3)
    optimizer = torch.optim.SGD(model.get_submodule("classifier").parameters(), lr=0.1, momentum=0.9)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def nothing(**_: Any) -> None:
    pass


def save(folder: Path, *progresses: checkpoint.Progress, fingerprint: dict[str, Any] | None = None) -> None:
    model, optimizer = pair()
    with checkpoint.Writer(folder, nothing) as writer:
        for progress in progresses:
            writer.save(model, ("classifier.weight",), optimizer, progress, fingerprint or {})
        writer.wait()


def test_a_checkpoint_of_changed_data_is_refused_by_name(tmp_path: Path) -> None:
    progress = checkpoint.Progress(4, "fix", loss_scale={"skipped": 1, "scaler": {"scale": 2.0**15}})
    save(tmp_path, progress, fingerprint={"sample lists": ["a", "b"]})
    (path,) = checkpoint.complete(tmp_path)
    model, optimizer = pair()
    assert checkpoint.restore(path, model, optimizer, {"sample lists": ["a", "b"]}) == progress
    with pytest.raises(UserError, match=r"sample lists was \['a', 'b'\], is \['a', 'c'\]"):
        checkpoint.restore(path, model, optimizer, {"sample lists": ["a", "c"]})


def test_a_checkpoint_from_before_a_key_existed_is_resumed_at_the_keys_default(tmp_path: Path) -> None:
    now = reading.identity(Config())
    older = {**now, "data": {key: value for key, value in now["data"].items() if key != "resize_rule"}}
    save(tmp_path, checkpoint.Progress(4, "fix"), fingerprint={"configuration": older})
    (path,) = checkpoint.complete(tmp_path)
    assert checkpoint.restore(path, *pair(), {"configuration": now}).step == 4
    other = {**now, "data": {**now["data"], "resize_rule": "fixres"}}
    with pytest.raises(UserError, match="configuration was"):
        checkpoint.restore(path, *pair(), {"configuration": other})


@pytest.mark.parametrize("name", ["head.safetensors", "optimizer.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_named_with_the_way_round_it(tmp_path: Path, name: str) -> None:
    save(tmp_path, *(checkpoint.Progress(step, "fix") for step in (3, 5)))
    for path, start in zip(checkpoint.complete(tmp_path)[::-1], ("step 3", "the start of its stage"), strict=True):
        (path / name).write_bytes(b"")
        with pytest.raises(UserError) as caught:
            checkpoint.restore(path, *pair(), {})
        assert str(caught.value).startswith(f"{path / name} cannot be read (")
        assert f"Next: rm -r {path}, then the same command: it goes on from {start}." in str(caught.value)
        shutil.rmtree(path)


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
        writer.save(model, ("classifier.weight",), optimizer, checkpoint.Progress(1, "fix"), {})
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

    monkeypatch.setattr(checkpoint, "save_file", full)
    model, optimizer = pair()
    with checkpoint.Writer(tmp_path, nothing) as writer:
        writer.save(model, ("classifier.weight",), optimizer, checkpoint.Progress(1, "fix"), {})
        with pytest.raises(OSError, match="No space left"):
            writer.save(model, ("classifier.weight",), optimizer, checkpoint.Progress(2, "fix"), {})
        writer.wait()  # told once
    assert not checkpoint.complete(tmp_path)


def test_leaving_waits_for_the_save_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's lock is given back after the last write, also where the loop ends with an exception."""
    go, written = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: (go.wait(60), written(*arguments)))
    model, optimizer = pair()

    def broken_loop() -> None:
        with checkpoint.Writer(tmp_path, nothing) as writer:
            writer.save(model, ("classifier.weight",), optimizer, checkpoint.Progress(1, "fix"), {})
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
