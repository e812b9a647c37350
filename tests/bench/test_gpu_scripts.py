from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.commands import ROOT, environment

from fixres_dist.base.environment import git

RUNS = ["resume", "loss_scale", "cached", "bad_file", "end_to_end"]
QUICK = ["nccl", "speed", "memory", "compiled", "apex"]


def start(script: str, tmp_path: Path, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON, both streams) of a script of benchmarks/gpu in CPU mode."""
    out = tmp_path / "out.json"
    command = [sys.executable, f"benchmarks/gpu/{script}.py", "--cpu", "--json", str(out), "--seconds", "3000"]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


def test_sections_run_without_a_gpu(tmp_path: Path) -> None:
    code, result, said = start("checks", tmp_path, "--sections", ",".join(QUICK))
    assert code == 0, said
    assert {"hardware", "versions", "command", "sections"} <= set(result)
    found = result["sections"]
    assert list(found) == QUICK
    names = [row["name"] for row in found["speed"]["rows"]]
    expected = ["ours bf16 channels_last", "ours bf16 contiguous", "timm bf16 channels_last", "timm bf16 contiguous"]
    assert names == [f"b0@320 {name}" for name in [*expected, "original fp32"]]
    keys = {"name", "images_per_second", "cpu_ms_per_image", "peak_memory_mib", "n"}
    assert all(set(row) == keys for row in found["speed"]["rows"])
    assert found["memory"]["largest_batch"] == 16
    assert found["compiled"]["largest_difference"] < 0.1
    assert {"amp", "fused_optimizers", "installed"} <= set(found["apex"])


def sampled() -> set[str]:
    """Two of RUNS, by the commit: each starts runs of the product, which have tests of their own, and takes half a minute."""
    return set(random.Random(git(ROOT, "rev-parse", "HEAD")).sample(RUNS, 2))


def test_runs_train_and_resume_without_a_gpu(tmp_path: Path) -> None:
    sample = sampled()
    code, result, said = start("checks", tmp_path, "--sections", ",".join(["train", *sorted(sample)]))
    assert code == 0, said
    found = result["sections"]
    assert set(found) == {"train", *sample}
    assert set(found["train"]["before"]) == set(found["train"]["after"]) >= {"top1", "loss"}
    assert found["train"]["first_step"]["time_to_first_step_s"] > 0
    assert min(found["train"]["images_per_second"]) > 0
    if "resume" in sample:
        assert found["resume"]["stopped_at"] > 0
        assert found["resume"]["again_equals_straight"]
        assert found["resume"]["stopped_equals_straight"]
    if "loss_scale" in sample:
        assert found["loss_scale"]["loss_scale"][0] > 1
    if "cached" in sample:
        assert found["cached"]["largest_relative_difference"] < 1e-3
    if "bad_file" in sample:
        assert found["bad_file"]["skipped"] == found["bad_file"]["expected"]
    if "end_to_end" in sample:
        assert "data_wait_percent" in found["end_to_end"]["rows_vs"]


def test_a_section_that_fails_costs_only_itself(tmp_path: Path) -> None:
    wrong = ["--set", "tune.epochs=none"]
    code, result, said = start("checks", tmp_path, "--sections", "train,nccl", *wrong)
    assert code == 1
    assert "tune.epochs" in result["sections"]["train"]["failed"]
    assert result["sections"]["nccl"]["sums"] == [1, 1, 1, 1]
    assert "not complete: train" in said


def test_dali_makes_the_same_pixels_on_a_cpu(tmp_path: Path) -> None:
    code, result, said = start("probe", tmp_path)
    assert code == 0, said
    assert result["kernels"]["max"] == 0
    assert all(result[f"decode {share}"]["same_again"] for share in (0.0, 0.65, 1.0))
    assert all(result[f"speed {res}"]["n"] > 0 for res in (224, 320, 600, 800))
