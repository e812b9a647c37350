"""Which GPUs a local run takes: the caller's, in the caller's order, and no more ranks than those."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from submitit.local import local as submitit_local
from support.in_process import handlers_kept

from fixres_dist.base.errors import UserError
from fixres_dist.cli.main import main
from fixres_dist.cluster import gpus, local
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs import preparation
from fixres_dist.training import ranks
from fixres_dist.training.job import TrainJob

UUIDS = ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-0bd3ad33-6f6e-4f0c-95f4-5a8a7b8a4f4e")
MIGS = ("MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb")


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: int = 0) -> None:
    """A stand-in for nvidia-smi, first in PATH, on a machine without a driver library."""
    folder.mkdir(exist_ok=True)
    (folder / "answer").write_text(text)
    (folder / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat {folder}/answer\nexit {code}\n')
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "has_driver", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def eight() -> str:
    return "".join(f"GPU {k}: NVIDIA H200 (UUID: GPU-{k}{UUIDS[0][5:]})\n" for k in range(8))


def split() -> str:
    """Two GPUs, the first one of which is split into two parts."""
    parts = "".join(f"  MIG 3g.71gb     Device  {k}: (UUID: {name})\n" for k, name in enumerate(MIGS))
    return f"GPU 0: NVIDIA H200 (UUID: {UUIDS[0]})\n{parts}GPU 1: NVIDIA H200 (UUID: {UUIDS[1]})\n"


def finished(root: Path, data: Path) -> Path:
    """A run directory as far as a dry run of an evaluation reads it; it had the schema's eight ranks."""
    model = {"name": "test_efficientnet", "timm_name": "test_efficientnet"}
    run = preparation.prepare(root, reading.parse(Config, {"model": model, "data": {"root": str(data)}}), "typed")
    for file in (run.pretrained, run.root / "export" / "model.safetensors"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (run.root / "class_index.json").write_text('{"0": "ash", "1": "birch", "2": "cedar"}')
    return run.root


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, ("0", "1")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("1,0", ("1", "0")),
        (" 1 , 0", ("1", "0")),
        ("1,7,0", ("1",)),  # CUDA stops at the first that is not there
        ("0,0", ()),
        (",".join(reversed(UUIDS)), tuple(reversed(UUIDS))),
        ("GPU-8932", ("GPU-8932",)),
        (",".join(MIGS), MIGS),
        (f"MIG-{UUIDS[0]}/1/0", (f"MIG-{UUIDS[0]}/1/0",)),
        ("GPU-none", ()),
    ],
)
def test_the_callers_gpus_in_the_callers_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: tuple[str, ...]
) -> None:
    nvidia_smi(tmp_path, monkeypatch, split())
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible() == expected


def test_local_ranks_get_the_callers_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    class Started(Exception):
        pass

    def start(**arguments: Any) -> None:
        given.append(arguments["cuda_devices"])
        raise Started

    monkeypatch.setattr(submitit_local, "start_controller", start)
    run = preparation.prepare(tmp_path / "run", reading.parse(Config, {"model": {"name": "b0"}}), "typed")
    nvidia_smi(tmp_path / "bin", monkeypatch, eight())
    for chosen, processes in (("4,5", 2), ("4,5", 1), (None, 2), ("", 2), (f"{eight().split()[5][:-1]},7", 2)):
        if chosen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        with pytest.raises(Started), handlers_kept():
            local.run_local(run, processes, TrainJob)
    nvidia_smi(tmp_path / "none", monkeypatch, "", code=127)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(Started), handlers_kept():
        local.run_local(run, 2, TrainJob)
    assert given == ["4,5", "4", "0,1", "", f"{eight().split()[5][:-1]},7", "4,5"]


def test_more_ranks_than_gpus_are_refused_at_submission(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia_smi(tmp_path / "bin", monkeypatch, eight())
    runs = tmp_path / "runs"
    words = ["--model", "b0", "--res", "64", "--data", str(photos), "--weights", "none", "--runs-dir", str(runs)]
    dry = ["submit", *words, "--cluster", "local", "--dry-run", "tune.global_batch=48"]
    assert main([*dry, "--gpus-per-node", "12"]) == 2
    said = capsys.readouterr().err
    assert "12 ranks need 12 GPUs, and this machine offers 8" in said
    assert "Next: --gpus-per-node 8" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert main([*dry, "--gpus-per-node", "3"]) == 2
    assert "offers 2 (CUDA_VISIBLE_DEVICES=4,5). Accepted: 1 .. 2. Next: --gpus-per-node 2" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert main([*dry, "--gpus-per-node", "1"]) == 2
    assert "CUDA_VISIBLE_DEVICES is 9, and names no GPU of this machine, which has 8" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([*dry, "--gpus-per-node", "12"]) == 0, "processes on the CPU"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert main(dry) == 0
    assert "ranks      8 (1 node(s) x 8)" in capsys.readouterr().out
    assert not runs.exists()


def test_without_nvidia_smi_torch_counts_where_there_is_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "Failed to initialize NVML\n", code=18)
    asked: list[int] = []
    monkeypatch.setattr(gpus, "counted_by_torch", lambda: len(asked.append(1) or asked) + 2)
    assert gpus.visible() == ()
    assert not asked, "no driver, no import of torch"
    gpus.installed.cache_clear()
    monkeypatch.setattr(gpus, "has_driver", lambda: True)
    assert gpus.visible() == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932,GPU-0bd3")
    assert gpus.visible() == ("GPU-8932", "GPU-0bd3")
    gpus.check(2, "--gpus-per-node ")
    with pytest.raises(UserError, match="offers 2"):
        gpus.check(3, "--gpus-per-node ")
    gpus.installed.cache_clear()


@pytest.mark.parametrize("words", [["evaluate"], ["sweep", "--res", "64"], ["interpolate"], ["extract", "--out", "x"]])
def test_a_command_in_processes_of_this_machine_has_one_for_each_of_its_gpus(
    words: list[str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It had as many as the run: eight without another word, on a machine with two GPUs."""
    run, site = finished(tmp_path / "r", photos), tmp_path / "site.yaml"
    site.write_text("cluster: {gpus_per_node: 4}\n")
    dry = [*words, "--run", str(run), "--cluster", "local", "--dry-run"]
    nvidia_smi(tmp_path / "bin", monkeypatch, eight())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    for more, found in (([], 2), (["--profile", str(site)], 2), (["--gpus-per-node", "1"], 1)):
        assert main([*dry, *more]) == 0
        assert f"{words[0]} on 1 node(s) x {found}\n" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(dry) == 0
    assert f"{words[0]} on 1 node(s) x 1\n" in capsys.readouterr().out
    assert main([*dry[:-3], "--dry-run"]) == 0
    assert f"{words[0]} on 1 node(s) x 8\n" in capsys.readouterr().out, "a job has the run's"


def test_torch_counts_all_gpus_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import os, types\ncuda = types.SimpleNamespace(device_count=lambda: 5 - len(os.getenv('CUDA_VISIBLE_DEVICES', '')))\n"
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert gpus.counted_by_torch() == 5
    (tmp_path / "torch.py").write_text("raise ImportError")
    assert gpus.counted_by_torch() == 0


def test_a_rank_without_a_gpu_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by torchrun, which does not count GPUs: two ranks on one of them would end in an error of NCCL."""
    launcher = {"TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "1", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    for name, value in (launcher | {"RANK": "2", "LOCAL_RANK": "2"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"3 ranks on this node see 2 GPUs.*Next: start 2 rank"):
        ranks.join(tmp_path)


def test_each_rank_takes_a_mig_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(MIGS))
    ranks.choose_mig_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == MIGS[1]
    for kept in ("4,5", ",".join(UUIDS), ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", kept)
        ranks.choose_mig_device(1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == kept
