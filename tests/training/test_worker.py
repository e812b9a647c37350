"""Parts of the worker that the end-to-end tests cannot reach one by one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.commands import command, environment, killed_when, run, tiny
from support.in_process import handlers_kept
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixres_dist.base.errors import UserError
from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import keep_lines, read_lines
from fixres_dist.config import reading
from fixres_dist.data import dataset, geometry, torch_cpu
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.runs import checkpoint, rundir
from fixres_dist.training.ranks import launched


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    done = run(*tiny(runs, "two", photos, 2, "pretrain.epochs=1", "pretrain.res=64", "pretrain.global_batch=12"))
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "two"


def test_the_run_directory_is_complete(finished: Path) -> None:
    expected = "config.yaml command.txt environment.json code submission.sh state.json events.jsonl metrics.jsonl tb checkpoints "
    expected += "results.json samples export DONE class_index.json predictions pretrained.safetensors"
    assert set(expected.split()) <= {p.name for p in finished.iterdir()}
    assert not list(finished.rglob(".code.*"))
    config = reading.load((finished / "config.yaml").read_text())
    assert config == rundir.RunDir(finished).config()
    state = json.loads((finished / "state.json").read_text())
    keys = {
        "state",
        "step",
        "total_steps",
        "epoch",
        "images_per_second",
        "eta_s",
        "restarts",
        "job_id",
        "reason",
        "updated",
        "final",
        "nodes",
        "world_size",
        "last_failure_step",
    }
    assert set(state) == keys
    assert (state["state"], state["step"], state["total_steps"]) == ("done", 21, 21)
    assert [line["event"] for line in read_lines(finished / "events.jsonl")][:2] == ["submitted", "started"]
    results = json.loads((finished / "results.json").read_text())
    keys = "model timm_name weights res policy transform resize_rule n before after delta_top1 delta_ci95 images_seen seconds "
    assert set((keys + "world_size hardware versions").split()) <= set(results)
    assert results["delta_top1"] == pytest.approx(results["after"]["top1"] - results["before"]["top1"], abs=1e-3)
    assert json.loads((finished / "class_index.json").read_text()) == {"0": "ash", "1": "birch", "2": "cedar"}
    assert (finished / "code" / "fixres_dist" / "training" / "loop.py").exists()


def test_events_tell_what_starting_and_saving_cost(finished: Path) -> None:
    events = read_lines(finished / "events.jsonl")
    (first,) = [dict(line) for line in events if line["event"] == "first step"]
    assert first.pop("event")
    assert first.pop("time")
    total = first.pop("time_to_first_step_s")
    phases = {"imports_s", "rendezvous_s", "index_s", "model_s", "trunk_s", "step_s"}
    assert phases <= set(first)
    assert total == pytest.approx(sum(first.values()), abs=0.002)
    assert first["imports_s"] > 0.1, "counted from the process's start: torch alone takes longer"
    saved = [line for line in events if line["event"] == "saved"]
    assert [line["step"] for line in saved] == [0, 7, 7, 14, 21], (
        "the starts and ends of both stages, and before an evaluation"
    )
    assert all(line["stall_ms"] >= 0 for line in saved)


def test_tensorboard_has_the_promised_tags(finished: Path) -> None:
    events = EventAccumulator(str(finished / "tb"))
    events.Reload()
    names = "loss learning_rate grad_norm images_per_second data_wait_percent memory_gib"
    expected = {f"train/{name}" for name in names.split()} | {f"eval/{name}" for name in ("top1", "top5", "loss")}
    assert expected <= set(events.Tags()["scalars"])
    steps = [e.step for e in events.Scalars("train/loss")]
    assert steps == list(range(1, 22))


def test_the_export_loads_in_timm_and_evaluates_as_in_the_run(finished: Path, photos: Path) -> None:
    model = timm.create_model(
        "test_efficientnet", num_classes=3, checkpoint_path=str(finished / "export" / "model.safetensors")
    )
    assert sum(p.numel() for p in model.parameters())
    done = run("evaluate", "--run", finished, "--json", finished / "again.json")
    assert done.returncode == 0, done.stderr
    again = json.loads((finished / "again.json").read_text())
    results = json.loads((finished / "results.json").read_text())
    assert {k: again[k] for k in ("top1", "top5")} == {k: results["after"][k] for k in ("top1", "top5")}
    assert again["loss"] == pytest.approx(results["after"]["loss"], abs=1e-5)
    source = ["--model", "test_efficientnet", "--checkpoint", finished / "export" / "model.safetensors"]
    done = run("evaluate", *source, "--data", photos, "--res", "64", "--split", "train")
    assert done.returncode == 0, done.stderr
    assert "on train" in done.stdout
    assert "n 84" in done.stdout


def test_sweep_writes_table_json_and_picture(finished: Path) -> None:
    done = run("sweep", "--run", finished, "--res", "64,96")
    assert done.returncode == 0, done.stderr
    table = json.loads((finished / "sweep.json").read_text())
    results = json.loads((finished / "results.json").read_text())
    assert set(table["curves"]) == {"before", "after"}
    for when in ("before", "after"):
        assert table["curves"][when]["64"]["top1"] == results[when]["top1"]
    assert "best_after_minus_best_before" in table
    with Image.open(finished / "sweep.png") as image:
        assert image.size[0] > 500
    events = EventAccumulator(str(finished / "tb" / "after"))
    events.Reload()
    assert [e.step for e in events.Scalars("eval_by_res/top1")] == [64, 96]


def test_stage_one_checkpoint_files_hold_tensors_and_json_only(finished: Path) -> None:
    found = checkpoint.complete(finished / "checkpoints")
    assert found
    assert len(found) <= 3
    for path in found:
        assert {p.name for p in path.iterdir()} == {"head.safetensors", "optimizer.safetensors", "meta.json"}
    assert checkpoint.progress_of(found[-1]).step == 21


@pytest.mark.parametrize(
    ("number", "alone", "reason"),
    [(signal.SIGINT, False, "SIGINT"), (signal.SIGHUP, True, "SIGTERM")],
    ids=["ctrl-c", "hang-up"],
)
def test_a_stop_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, photos: Path, number: int, alone: bool, reason: str
) -> None:
    arguments = tiny(tmp_path, "asked", photos, 2, "tune.epochs=4")
    folder = tmp_path / "asked"
    lines = folder / "samples" / "rank_0.jsonl"
    assert killed_when(arguments, lambda: len(read_lines(lines)) >= 3, number, alone) == 1
    assert not rundir.RunDir(folder).is_locked(), "the command ends after its ranks"
    state = json.loads((folder / "state.json").read_text())
    assert state["state"] == "cancelled"
    saved = checkpoint.progress_of(checkpoint.complete(folder / "checkpoints")[-1]).step
    assert f"{reason} at step {saved}" in state["reason"]
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming asked at step {saved} of 28" in done.stdout


def test_a_killed_rank_of_a_local_run_is_told_before_those_that_broke_because_of_it(
    tmp_path: Path, photos: Path
) -> None:
    folder, killed = tmp_path / "killed", []

    def kill_rank() -> bool:
        if len(read_lines(folder / "samples" / "rank_0.jsonl")) < 3:
            return False
        job = rundir.RunDir(folder).state().job_id.removeprefix("local-")
        marks = {f"SUBMITIT_LOCAL_JOB_ID={job}", "SUBMITIT_LOCAL_GLOBALID=1"}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                found = marks <= set((entry / "environ").read_text(errors="replace").split("\0"))
            except OSError:
                continue
            if found:  # its loader worker too
                os.kill(int(entry.name), signal.SIGKILL)
                killed.append(entry.name)
        return True

    assert (
        killed_when(tiny(tmp_path, "killed", photos, 2, "tune.epochs=40"), kill_rank, signal.SIGCONT, alone=True) == 1
    )
    assert killed
    why, following = (folder / "FAILED").read_text().splitlines()
    assert why.startswith(f"rank 1 left no result, killed by hand or out of memory (log: {folder}/submitit/")
    assert "; after it: RuntimeError" in why
    assert "This is typically caused by" not in why
    assert following.startswith("Next: again, from the last checkpoint: python launch/submit.py")
    assert why.rstrip(".") in json.loads((folder / "state.json").read_text())["reason"]


def test_a_relative_runs_directory(tmp_path: Path, photos: Path) -> None:
    arguments = tiny(Path("some/runs"), "relative", photos, 1, "tune.epochs=0", "tune.bn_stats_images=3")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "some" / "runs" / "relative" / "DONE").exists()


def test_one_run_is_worked_on_once(tmp_path: Path) -> None:
    here = rundir.RunDir(tmp_path)
    assert not here.is_locked()
    with here.lock():
        assert here.is_locked()
        with pytest.raises(UserError, match="being worked on by another process"), here.lock():
            pass
    assert not here.is_locked()


def test_ranks_that_start_while_another_start_finishes_the_run_agree(finished: Path, tmp_path: Path) -> None:
    """Rank 0 finds it unfinished and waits for rank 1, which finds it finished: neither may go its own way."""
    folder = tmp_path / "raced"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("DONE"))
    events = (folder / "events.jsonl").read_text()
    launcher = {"TORCHELASTIC_RUN_ID": "race", "MASTER_PORT": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def start(rank: int) -> subprocess.Popen[str]:
        env = environment() | launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return subprocess.Popen(command("train", "--run", folder), env=env, stdout=subprocess.PIPE, text=True)

    with start(0) as first:
        waiting = folder / "rendezvous" / "torchrun-race-1-0.json"
        while not waiting.exists():
            assert first.poll() is None
            time.sleep(0.01)
        (folder / "DONE").touch()
        with start(1) as second:
            try:
                assert "raced is already finished" in first.communicate(timeout=120)[0]
                assert (first.returncode, second.wait(120)) == (0, 0)
            finally:
                first.kill()
                second.kill()
    assert (folder / "events.jsonl").read_text() == events


def test_a_loader_worker_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    here = rundir.RunDir(tmp_path)
    ready, parent = os.pipe()
    child = os.fork()
    if child == 0:  # the worker: killed while a process it forked lives on
        with here.lock():
            if os.fork() == 0:
                os.write(parent, str(os.getpid()).encode())
                signal.pause()
            signal.pause()
    orphan = int(os.read(ready, 20))
    try:
        assert here.is_locked()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not here.is_locked()
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path) -> None:
    here = rundir.RunDir(tmp_path)
    here.fail("disk full", "make room")
    here.fail("connection closed by peer", "try again")
    assert here.failed.read_text() == "disk full\nNext: make room\n"
    assert here.state().reason == "disk full. Next: make room"


def test_lines_beyond_the_checkpoint_are_dropped_and_torn_ones_ignored(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(file, lambda line: line["step"] <= 2)
    assert read_lines(file) == [{"step": 1}, {"step": 2}]


def test_stop_signals_are_remembered_and_not_acted_on() -> None:
    with handlers_kept():
        flag = StopFlag().install()
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.signal == signal.SIGUSR2
        flag.pid += 1  # as in a forked loader worker
        flag.signal = 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.signal == 0


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    code = (
        "import os, signal; from fixres_dist.base.signals import StopFlag; flag = StopFlag().install(); "
        "os.kill(os.getpid(), signal.SIGHUP); print(flag.signal)"
    )
    said = [
        subprocess.check_output(
            [*start, sys.executable, "-c", code], env=environment(), text=True, stderr=subprocess.PIPE
        )
        for start in ([], ["nohup"])
    ]
    assert said == [f"{int(signal.SIGHUP)}\n", "0\n"]


def test_who_am_i_under_every_launcher() -> None:
    torchrun = {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": "7",
    }
    assert launched(torchrun)[:4] == (3, 4, 1, 2)
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
    }
    assert launched(slurm)[:4] == (5, 8, 1, 4)
    assert launched(slurm)[4] != launched({**slurm, "SLURM_RESTART_COUNT": "1"})[4]
    local = {
        "SUBMITIT_LOCAL_JOB_ID": "9",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_LOCALID": "1",
    }
    assert launched(local)[:4] == (1, 2, 1, 2)
    assert launched({"SLURM_JOB_ID": "1"}) == (0, 1, 0, 1, "alone"), "a shell inside an allocation is no task"


def test_pictures_are_those_of_pil_and_torchvision(photos: Path, tmp_path: Path) -> None:
    """Decode, scale and crop of every training photo against PIL: the usual loader's pixels."""
    found = dataset.load(photos, "train", str(tmp_path))
    resize = geometry.resize_of("fixefficientnet", 64, 0.875, "bicubic")
    requests = [make_request(found, Pictures("test", 64, resize, 0), torch.arange(84).numpy(), 0)]
    (batch,) = torch_cpu.batches(found, requests, 64, resize, workers=0)
    worst, total = 0, 0.0
    for i in range(84):
        with Image.open(found.path(i)) as image:
            view = requests[0].views[i]
            scaled = image.convert("RGB").resize(view.size[::-1], Image.Resampling.BICUBIC)
            y, x = view.offset
            expected = (
                torch.tensor(list(scaled.crop((x, y, x + 64, y + 64)).tobytes())).view(64, 64, 3).permute(2, 0, 1)
            )
        difference = (batch.images[i].int() - expected).abs()
        worst, total = max(worst, int(difference.max())), total + float(difference.float().mean())
    assert worst <= 2
    assert total / 84 <= 0.02
    assert batch.labels.tolist() == [0] * 28 + [1] * 28 + [2] * 28
