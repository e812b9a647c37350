"""SIGKILL of every process at any moment, then the same command: nothing lost, nothing repeated, the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import killed_when, run, tiny

from fixres_dist.base.small_files import read_lines
from fixres_dist.models.build import build_model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def seen(folder: Path, processes: int) -> list[tuple[int, int, list[float]]]:
    """(step, sample, view) of all ranks."""
    rows = []
    for rank in range(processes):
        for line in read_lines(folder / "samples" / f"rank_{rank}.jsonl"):
            rows += [(line["step"], s, v) for s, v in zip(line["samples"], line["views"], strict=True)]
    return sorted(rows)


def at_step(folder: Path, step: int) -> bool:
    """Rank 0 has worked on optimizer step `step`."""
    return any(line["step"] >= step for line in read_lines(folder / "samples" / "rank_0.jsonl"))


def damage(folder: Path) -> list[Path]:
    """A bit of the newest checkpoint's tensors, of the weights after stage one, and of the predictions before fixing; and
    what a writer leaves that is killed."""
    newest = max((folder / "checkpoints").glob("step_*"))
    files = [newest / "head.safetensors", folder / "pretrained.safetensors", folder / "predictions" / "before.npz"]
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    (folder / "checkpoints" / ".step_00000099.1.01234567.part").mkdir()
    (folder / ".pretrained.safetensors.1.01234567.part").touch()
    return files


@pytest.mark.parametrize(
    ("processes", "save_every_s", "stage_one", "settings"),
    [(1, "0.3", False, ()), (2, "0", True, ()), (1, "0", False, ("run.precision=fp16", "tune.policy=all"))],
    ids=["alone", "two-ranks-two-stages", "fp16-loss-scale"],
)
def test_killed_and_resumed_is_bit_identical(
    tmp_path: Path,
    photos: Path,
    processes: int,
    save_every_s: str,
    stage_one: bool,
    settings: tuple[str, ...],
    device: torch.device,
) -> None:
    more = [f"run.save_every_s={save_every_s}", *settings]
    if device.type == "cuda":
        if torch.cuda.device_count() < processes:
            pytest.skip(f"{processes} ranks need {processes} GPUs")
        more.append("run.deterministic=true")
    if stage_one:
        more += ["pretrain.epochs=1", "pretrain.res=64", "pretrain.global_batch=12", "pretrain.base_lr=0.05"]
    calm = tiny(tmp_path, "calm", photos, processes, *more)
    done = run(*calm)
    assert done.returncode == 0, done.stdout + done.stderr

    folder = tmp_path / "killed"
    killed = tiny(tmp_path, "killed", photos, processes, *more)
    killed_when(killed, lambda: at_step(folder, 2))
    if stage_one:
        killed_when(killed, lambda: at_step(folder, 11))
        damaged = damage(folder)
    else:
        killed_when(killed, lambda: (folder / "checkpoints" / ".step_00000014").exists() or at_step(folder, 12))
    done = run(*killed)
    assert done.returncode == 0, done.stdout + done.stderr
    if stage_one:
        told = [line["file"] for line in read_lines(folder / "events.jsonl") if line["event"] == "damaged"]
        assert sorted(told) == sorted(map(str, damaged))
        left = {path.name.split(".")[1] for path in folder.rglob("*.part")}
        assert not left & {"step_00000099", "pretrained"}, "what killed writers left is swept"
        assert (folder / "predictions" / "before.npz").exists(), "it is measured again"

    a, b = weights(tmp_path / "calm"), weights(folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert seen(tmp_path / "calm", processes) == seen(folder, processes)
    both = [json.loads((f / "results.json").read_text()) for f in (tmp_path / "calm", folder)]
    for key in ("before", "after", "delta_top1", "images_seen", "world_size", "n"):
        assert both[0][key] == both[1][key]

    steps = [
        line["step"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line and "evaluation" not in line
    ]
    assert steps == list(range(1, len(steps) + 1)), "a step stands twice in metrics.jsonl, or is missing"
    starts = [line for line in read_lines(folder / "events.jsonl") if line["event"] == "started"]
    assert len(starts) == 3

    again = run(*killed)
    assert again.returncode == 0
    assert "finished" in again.stdout


def test_every_sample_once_an_epoch(tmp_path: Path, photos: Path) -> None:
    done = run(*tiny(tmp_path, "three", photos, 3, "tune.bn_stats_images=84"))
    assert done.returncode == 0, done.stdout + done.stderr
    for epoch in (0, 1):
        samples = [
            sample
            for rank in range(3)
            for line in read_lines(tmp_path / "three" / "samples" / f"rank_{rank}.jsonl")
            if line["epoch"] == epoch
            for sample in line["samples"]
        ]
        assert sorted(samples) == list(range(84))
    summary = json.loads((tmp_path / "three" / "results.json").read_text())
    assert summary["n"] == 33
    assert summary["world_size"] == 3
    assert summary["images_seen"] == 168
    assert set(summary["before"]) == {"top1", "top5", "loss"}


def test_any_world_size_gives_the_same_head(tmp_path: Path, photos: Path) -> None:
    heads = []
    for processes in (1, 2, 3):
        done = run(*tiny(tmp_path, f"w{processes}", photos, processes, "tune.epochs=1"))
        assert done.returncode == 0, done.stdout + done.stderr
        heads.append(weights(tmp_path / f"w{processes}"))
        assert json.loads((tmp_path / f"w{processes}" / "results.json").read_text())["n"] == 33
    for name, value in heads[0].items():
        for other in heads[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)
    start = build_model("test_efficientnet", 3, seed=0).state_dict()
    for name in ("classifier.weight", "bn2.weight", "bn2.running_var"):
        assert float((heads[0][name] - start[name]).abs().max()) > 1e-4, (
            f"{name} has not moved, so equality says nothing"
        )
