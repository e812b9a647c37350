"""Loss scaling and its state across a resume; apex, with stand-ins for NVIDIA's and for PyPI's package of that name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fake_apex
from support.commands import ROOT, command, environment, run, tiny
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import read_lines
from fixres_dist.config import reading
from fixres_dist.config.schema import Config, Run
from fixres_dist.evaluation import inputs
from fixres_dist.models import nvidia_apex, precision
from fixres_dist.training import plan, worker

CPU = torch.device("cpu")


def config(*items: str) -> Config:
    return reading.parse(Config, reading.overrides(["model.name=b0", *items]))


@pytest.mark.parametrize(
    ("make", "setting", "words"),
    [
        (None, "run.precision=apex-O1", ["no apex is installed", "25.04 and 25.05", "@25.05", "run.precision=fp16", "autocast"]),
        (None, "run.precision=apex-O2", ["no apex is installed", "run.precision=bf16", "frozen trunk"]),
        (None, "run.optimizer=apex", ["no apex is installed", "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install", "run.optimizer=torch"]),
        (fake_apex.today, "run.precision=apex-O1", ["has no apex.amp", "commit 6424da3b01", "May 2025", "25.05"]),
        (fake_apex.today, "run.optimizer=apex", ["no amp_C", "APEX_CUDA_EXT=1"]),
        (fake_apex.pypi, "run.precision=apex-O1", ["not NVIDIA's", "web toolkit", "0.9.10.dev0", "pip uninstall apex"]),
        (fake_apex.pypi, "run.optimizer=apex", ["not NVIDIA's", "pip uninstall apex"]),
    ],
)  # fmt: skip
def test_what_the_installed_apex_lacks_is_refused_before_submission(
    make: Any, setting: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if make:
        monkeypatch.syspath_prepend(make(tmp_path))
    elif nvidia_apex.find().path:
        pytest.skip("an apex is installed here")
    with pytest.raises(UserError) as caught:
        plan.check(config(setting), 1, dry=True)
    for word in words:
        assert word in str(caught.value)
    assert "apex" not in sys.modules, "found without importing it: apex imports torch"
    plan.check(config(setting, "cluster.srun_args=[--container-image=x]"), 1, dry=True)  # there the worker looks


def test_an_apex_with_amp_and_kernels_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(fake_apex.with_amp(tmp_path))
    found = nvidia_apex.find()
    assert (found.is_nvidia, found.has_amp, found.has_kernels, found.version) == (True, True, True, "commit 6424da3b01")
    for precision_name in ("apex-O1", "apex-O2"):
        plan.check(config(f"run.precision={precision_name}", "run.optimizer=apex"), 1, dry=True)


@pytest.mark.parametrize(
    ("level", "setting", "words"),
    [
        ("O1", "run.compile=true", "cannot be compiled"),
        ("O1", "pretrain.epochs=1", "with stage one"),
        ("O1", "run.engine=cached", "features of our own trunk"),
        ("O2", "tune.policy=all", "fp32 copies.*Next: run.precision=apex-O1, or run.precision=fp16"),
        ("O2", "tune.policy=last_block", "with tune.policy=last_block: O2 trains fp32 copies"),
    ],
)
def test_settings_that_amp_cannot_do_are_refused(
    level: str, setting: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(fake_apex.with_amp(tmp_path))
    with pytest.raises(UserError, match=words):
        plan.check(config(f"run.precision=apex-{level}", setting, "data.train_transform=test"), 1, dry=True)


def test_the_command_refuses_with_exit_code_two(tmp_path: Path) -> None:
    done = run("submit", "--model", "b0", "--res", "64", "--dry-run", "--runs-dir", tmp_path, "run.precision=apex-O1")
    if nvidia_apex.find().path:
        pytest.skip("an apex is installed here")
    assert done.returncode == 2
    assert "25.05" in done.stderr
    assert not list(tmp_path.iterdir())


def trained(tmp_path: Path, photos: Path, name: str, *more: str) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """(results.json, apex's calls, run directory) of a small training run that finds the NVIDIA-shaped apex."""
    packages = fake_apex.with_amp(tmp_path / "packages")
    log = tmp_path / f"{name}.log"
    variables = {**environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}", "FAKE_APEX_LOG": str(log)}
    arguments = tiny(tmp_path, name, photos, 1, "--cluster", "inline", "tune.epochs=1", "run.save_every_s=0", *more)
    done = subprocess.run(command(*arguments), env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = read_lines(log)
    return json.loads((tmp_path / name / "results.json").read_text()), calls, tmp_path / name


def test_apex_o1_trains_the_whole_network(tmp_path: Path, photos: Path) -> None:
    more = ["run.precision=apex-O1", "tune.policy=all", "run.batch_per_device=6", "tune.base_lr=0.5"]
    results, calls, folder = trained(tmp_path, photos, "o1", *more)
    found = [results[key] for key in ("precision", "optimizer", "apex")]
    assert found == ["apex-O1", "torch SGD", "commit 6424da3b01"]
    starts = [c for c in calls if c["call"] == "initialize"]
    assert [(c["level"], c["model"], c["optimizer"]) for c in starts] == [("O1", "EfficientNet", "SGD")]
    backwards = [c["delay"] for c in calls if c["call"] == "scale_loss"]
    assert backwards == [True, False] * 7, "two micro-batches a step; only the second unscales"
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss_scale" in line]
    assert len(lines) == 7
    assert all(line["loss_scale"] == 2.0**16 and line["skipped_steps"] == 0 for line in lines)
    assert 0 < lines[0]["grad_norm"] < 1000, "of unscaled gradients"
    kept = json.loads((folder / "checkpoints" / "step_00000007" / "meta.json").read_text())["progress"]["loss_scale"]
    assert kept == {"skipped": 0, "scaler": {"loss_scaler0": {"loss_scale": 2.0**16, "unskipped": 7}}}


def test_apex_o2_runs_the_frozen_trunk_and_fused_sgd_the_head(tmp_path: Path, photos: Path) -> None:
    results, calls, _ = trained(tmp_path, photos, "o2", "run.precision=apex-O2", "run.optimizer=apex")
    assert (results["precision"], results["optimizer"]) == ("apex-O2", "apex FusedSGD")
    assert [c["call"] for c in calls] == ["initialize", "FusedSGD"], "the head is fp32: no loss scale"
    assert calls[0]["model"] != "EfficientNet", "the trunk alone is cast"
    assert (calls[1]["momentum"], calls[1]["weight_decay"]) == (0.9, 1e-4)
    plain, _, _ = trained(tmp_path, photos, "plain", "run.precision=fp32")
    assert results["after"]["loss"] == pytest.approx(plain["after"]["loss"], abs=0.02)
    assert (plain["precision"], plain["optimizer"], plain["apex"]) == ("fp32", "torch SGD", None)


def test_o1_casts_the_trunk_and_leaves_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(fake_apex.with_amp(tmp_path))
    monkeypatch.setenv("FAKE_APEX_LOG", str(tmp_path / "log"))
    for module, name in ((nn.functional, "conv2d"), (nn.functional, "linear"), (torch, "conv2d")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    try:
        arithmetic = precision.Arithmetic("apex-O1", CPU)
        x, weight = torch.randn(2, 8), torch.randn(4, 8)
        for _ in range(2):
            with arithmetic.low():
                assert nn.functional.linear(x, weight).dtype == torch.bfloat16
            with arithmetic.fp32():
                assert nn.functional.linear(x, weight).dtype == torch.float32
        assert len(read_lines(tmp_path / "log")) == 1, "patched once"
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("apex", "amp_C")]:
            del sys.modules[name]


def test_an_apex_that_fails_to_import_is_reported_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(
        fake_apex.write(fake_apex.with_amp(tmp_path), {"apex/amp/__init__.py": "raise ImportError('torch._six')"})
    )
    try:
        with pytest.raises(UserError, match=r"apex refuses \(ImportError: torch._six\).*run.precision=fp16"):
            precision.Arithmetic("apex-O1", CPU)
    finally:
        sys.modules.pop("apex", None)


@pytest.fixture
def _no_cublas_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.usefixtures("_no_cublas_variable")
def test_determinism_is_switched_on_before_cuda_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS reads its variable when CUDA starts, which is in `ranks.join`: for a run, and where one is evaluated."""
    seen: list[tuple[Any, ...]] = []

    def look() -> bool:
        cudnn = torch.backends.cudnn
        flags = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
        seen.append((os.environ.get("CUBLAS_WORKSPACE_CONFIG"), *flags))
        raise LookupError

    monkeypatch.setattr(torch.cuda, "is_available", look)
    for setting in ("false", "true"):
        item = f"run.deterministic={setting}"
        with pytest.raises(LookupError), inputs.opened(config(item), [], tmp_path):
            pass
        (tmp_path / "config.yaml").write_text(reading.dump(config(item)))
        with pytest.raises(LookupError):
            worker.train(tmp_path)
    assert seen == [(None, False, False, False)] * 2 + [(":4096:8", True, True, False)] * 2
    assert not torch.are_deterministic_algorithms_enabled(), "what else this process does is free again"


@pytest.mark.usefixtures("_no_cublas_variable")
def test_an_operation_without_a_deterministic_form_is_named() -> None:
    torch_s = "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, but you set ..."
    says = r"run.deterministic=true: upsample_bicubic2d.*Next: run.deterministic=false"
    with pytest.raises(UserError, match=says), precision.determinism(Run(deterministic=True)):
        raise RuntimeError(torch_s)
    with pytest.raises(RuntimeError, match="another"), precision.determinism(Run(deterministic=True)):
        raise RuntimeError("another")
    with pytest.raises(RuntimeError, match="upsample"), precision.determinism(Run()):
        raise RuntimeError(torch_s)


def test_determinism_is_no_part_of_a_run_s_identity() -> None:
    """As memory format and compiling: it changes the rounding of the same result, and older runs have no such key."""
    a, b = (reading.identity(config(f"run.deterministic={value}")) for value in ("true", "false"))
    assert a == b
    assert not config().run.deterministic


def scaled_steps(steps: int, state: dict[str, Any] | None, weight: torch.Tensor, first: int) -> tuple[nn.Linear, Any]:
    """fp16 gradients whose third step overflows."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    optimizer = precision.sgd("torch", list(model.parameters()), momentum=0.0, decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    scale = precision.LossScale(precision.Arithmetic("fp16", CPU), optimizer, model)
    scale.restore(state or {})
    for step in range(first, first + steps):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        loss = model(torch.full((2, 4), float("inf") if step == 2 else 0.01 * (step + 1))).sum()
        scale.backward(loss, last=True)
        taken = scale.step()
        assert taken == (step != 2)
        assert torch.equal(model.weight, before) is not taken
    return model, scale


def test_an_overflowing_step_is_left_out_and_the_scale_survives_a_resume() -> None:
    start = torch.ones(1, 4)
    whole, scale = scaled_steps(5, None, start, 0)
    assert scale.metrics() == {"loss_scale": 2.0**15, "skipped_steps": 1}
    half, kept = scaled_steps(3, None, start, 0)
    state = json.loads(json.dumps(kept.state()))  # as a checkpoint's meta.json holds it
    rest, again = scaled_steps(2, state, half.weight.detach(), 3)
    assert torch.equal(rest.weight, whole.weight)
    assert again.state() == scale.state()


def test_fp32_gradients_are_not_scaled() -> None:
    model = nn.Linear(2, 1)
    optimizer = precision.sgd("torch", list(model.parameters()), 0.9, 0.0)
    for name, head in (("bf16", model), ("fp16", None)):
        scale = precision.LossScale(precision.Arithmetic(name, CPU), optimizer, head)
        assert scale.metrics() == {}
        assert scale.value == 1.0


def test_fp16_scales_the_loss_and_skips_an_overflow(device: torch.device) -> None:
    arithmetic, head = precision.Arithmetic("fp16", device), nn.Linear(4, 3).to(device)
    optimizer = precision.sgd("torch", list(head.parameters()), 0.0, 0.0)
    optimizer.param_groups[0]["lr"] = 0.5
    scale, x = precision.LossScale(arithmetic, optimizer, head), torch.ones(2, 4, device=device)
    before = head.bias.detach().clone()
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        with arithmetic.low():
            out = head(x)
        assert out.dtype == torch.float16
        scale.backward(out.float().sum() * 1e-6 * factor, last=True)
        if factor == 1.0:  # fp16 has nothing below 6e-8: unscaled, this gradient keeps few of its bits
            torch.testing.assert_close(head.bias.grad, torch.full_like(before, 2e-6), rtol=1e-3, atol=0)
        assert scale.step() == (factor == 1.0)
    torch.testing.assert_close(before - head.bias, torch.full_like(before, 1e-6), rtol=0.1, atol=0)
    assert scale.metrics() == {"loss_scale": 2.0**15, "skipped_steps": 1}
    again = precision.LossScale(arithmetic, optimizer, head)
    again.restore(scale.state())
    assert again.metrics() == scale.metrics()
