"""Whole runs on one GPU: NCCL with one rank, the built-in example, a run that is stopped and resumed, and odd ones."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.section import Section, tail
from fixres_dist.base.small_files import read_lines
from fixres_dist.bench.photographs import write_data_set
from fixres_dist.runs.rundir import RunDir


def submit(section: Section, name: str, *words: str) -> tuple[list[str], RunDir]:
    """(the command that submits a run on this machine, its directory)."""
    runs = section.scratch / "runs"
    where = ["--cluster", "local", "--gpus-per-node", "1", "--runs-dir", str(runs), "--name", name]
    return [sys.executable, "launch/submit.py", *where, *words, *section.settings], RunDir(runs / name)


def small(section: Section, model: str, res: int, images: int) -> list[str]:
    """Words of a submission: photographs of 8 classes, new weights."""
    data = write_data_set(section.scratch / "photographs", section.scratch / "data", 8, images)
    return ["--model", model, "--res", str(res), "--weights", "none", "--data", str(data)]


def train(section: Section) -> dict[str, Any]:
    """The built-in example end to end in bf16: trained, fixed, evaluated."""
    words = ["--data", "demo", "run.precision=bf16"]
    if section.cpu:
        words = [*small(section, "test_efficientnet", 64, 64), "tune.epochs=2"]
    command, run = submit(section, "train", *words)
    started = time.monotonic()
    code = section.finish(section.start(command))
    found: dict[str, Any] = {"code": code, "wall_s": round(time.monotonic() - started, 1)}
    if code or not run.results.exists():
        return {**found, "failed": tail(section.log, run.root / "FAILED")}
    result = json.loads(run.results.read_text())
    keys = ("before", "after", "delta_top1", "delta_ci95", "precision", "seconds", "hardware")
    found |= {key: result.get(key) for key in keys}
    events = [json.loads(line) for line in (run.root / "events.jsonl").read_text().splitlines()]
    first: dict[str, Any] = next((event for event in events if "time_to_first_step_s" in event), {})
    found["first_step"] = {key: value for key, value in first.items() if key.endswith("_s")}
    steps = [line for line in map(json.loads, run.metrics.read_text().splitlines()) if "images_per_second" in line]
    for key in ("images_per_second", "data_wait_percent"):
        found[key] = [round(line[key], 1) for line in steps[-8:]]
    return found


def resume(section: Section) -> dict[str, Any]:
    """One run three times: to its end, to its end again, and stopped by SIGTERM and resumed; weights bit by bit."""
    model, res, epochs, images = ("tf_efficientnet_b0", 224, 12, 1024)
    if section.cpu:
        model, res, epochs, images = ("test_efficientnet", 64, 6, 128)
    words = [*small(section, model, res, images), f"tune.epochs={epochs}", "tune.global_batch=32"]
    words += ["tune.bn_stats_images=256", "data.train_transform=test_aug", "run.precision=bf16", "run.compile=false"]
    words += ["run.log_every=1", "run.eval_every=0", "run.engine=stream"]
    found: dict[str, Any] = {"codes": {}}
    weights = {}
    for kind in ("straight", "again", "stopped"):
        command, run = submit(section, kind, *words)
        if kind == "stopped":
            found["stopped_at"] = stopped(section, command, run)
        found["codes"][kind] = section.finish(section.start(command))
        file = run.root / "export" / "model.safetensors"
        if not file.exists():
            return {**found, "failed": f"{kind}: {tail(section.log, run.root / 'FAILED')}"}
        weights[kind] = load_file(file)
        section.save(found)
    found["resumed_at"] = [line for line in section.log.read_text().splitlines() if "resuming" in line]
    straight = weights["straight"]
    for kind in ("again", "stopped"):
        same = all(torch.equal(tensor, straight[key]) for key, tensor in weights[kind].items())
        found[f"{kind}_equals_straight"] = same
        if not same:
            pairs = [(tensor.float(), straight[key].float()) for key, tensor in weights[kind].items()]
            found[f"{kind}_largest_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
            found["failed"] = f"the weights of {kind} differ from straight"
    return found


def loss_scale(section: Section) -> dict[str, Any]:
    """fp16 with a loss scale: the last block trains, so that gradients pass through fp16."""
    words = [*short(section), "run.precision=fp16", "tune.policy=last_block", "tune.bn_stats=ema"]
    code, run = through(section, "loss_scale", words)
    lines = [line for line in read_lines(run.metrics) if "loss_scale" in line]
    if code or not lines:
        return {"code": code, "failed": tail(section.log, run.root / "FAILED")}
    ends = {key: [line[key] for line in (lines[0], lines[-1])] for key in ("loss", "loss_scale", "skipped_steps")}
    return {"code": code, **ends, "images_per_second": round(lines[-1]["images_per_second"], 1)}


def cached(section: Section) -> dict[str, Any]:
    """The same fixing from cached features and from files: how far the two heads are apart."""
    found: dict[str, Any] = {"codes": {}, "run_s": {}}
    weights, words = {}, short(section)
    for engine in ("stream", "cached"):
        more = [
            "data.train_transform=test",
            f"run.engine={engine}",
            f"run.feature_cache={section.scratch / 'features'}",
        ]
        found["codes"][engine], run = through(section, engine, [*words, *more])
        file = run.root / "export" / "model.safetensors"
        if not file.exists():
            return {**found, "failed": f"{engine}: {tail(section.log, run.root / 'FAILED')}"}
        found["run_s"][engine] = json.loads(run.results.read_text())["seconds"]
        weights[engine] = load_file(file)
        section.save(found)
    a, b = weights["stream"], weights["cached"]
    pairs = {key: (a[key].double(), b[key].double()) for key in a if not torch.equal(a[key], b[key])}
    found["tensors_that_differ"] = sorted(pairs)
    found["largest_relative_difference"] = max(
        (float((x - y).abs().max() / x.abs().max()) for x, y in pairs.values()), default=0.0
    )
    return found


def bad_file(section: Section) -> dict[str, Any]:
    """A broken JPEG, and files that PIL has to decode, among plain ones: only the broken one may be missing."""
    words = short(section)
    root = Path(words[words.index("--data") + 1])
    files = sorted((root / "train").rglob("*.jpg"))
    broken, png, cmyk = (files[k] for k in (1, 2, 3))
    for file, form, mode in ((broken, "JPEG", "RGB"), (png, "PNG", "RGB"), (cmyk, "JPEG", "CMYK")):
        with Image.open(file) as image:
            pixels = image.convert(mode)
        file.unlink()  # other names are links to the same picture
        pixels.save(file, form)
    broken.write_bytes(broken.read_bytes()[:600])
    code, run = through(section, "bad_file", [*words, "data.on_bad=skip"])
    skipped = [line["name"] for file in run.root.glob("skipped/rank_*.jsonl") for line in read_lines(file)]
    found: dict[str, Any] = {
        "code": code,
        "skipped": skipped,
        "expected": [f"train/{broken.parent.name}/{broken.name}"],
    }
    if code or skipped != found["expected"]:
        found["failed"] = (
            tail(section.log, run.root / "FAILED") if code else "other files were skipped than the broken one"
        )
    return found


def tests(section: Section) -> dict[str, Any]:
    """The tests that are marked `gpu`, where pytest is installed."""
    if importlib.util.find_spec("pytest") is None:
        return {"left_out": "pytest is not installed"}
    code = section.finish(section.start([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]))
    found: dict[str, Any] = {"code": code, "said": section.log.read_text(errors="replace")[-1500:]}
    return found if code in (0, 5) else {**found, "failed": f"exit code {code}"}  # 5: no test left


def short(section: Section) -> list[str]:
    """Words of a run of seconds on photographs of 8 classes. Nothing is chosen by time, so that two runs can be compared."""
    model, res, images = ("test_efficientnet", 64, 64) if section.cpu else ("tf_efficientnet_b0", 224, 512)
    words = [*small(section, model, res, images), "tune.epochs=2", "tune.global_batch=32", "run.log_every=1"]
    return [
        *words,
        "tune.bn_stats_images=256",
        "run.eval_every=0",
        "run.compile=false",
        "run.memory_format=channels_last",
    ]


def through(section: Section, name: str, words: list[str]) -> tuple[int, RunDir]:
    """(exit code, run directory) of a run to its end."""
    command, run = submit(section, name, *words)
    return section.finish(section.start(command)), run


def stopped(section: Section, command: list[str], run: RunDir) -> int:
    """The step that was saved when SIGTERM came after eight steps; -1 for none."""
    process = section.start(command)
    while process.poll() is None and time.monotonic() < section.until:
        if run.metrics.exists() and run.metrics.read_text().count('"loss"') >= 8:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    section.finish(process)
    saved: Iterator[Path] = (run.root / "checkpoints").glob("step_*")
    return max((int(folder.name.removeprefix("step_")) for folder in saved), default=-1)


def nccl(section: Section) -> dict[str, Any]:
    """A group of one rank: its start, the collectives and a step of DDP; several ranks need several GPUs."""
    found: dict[str, Any] = section.once(one_rank, section.cpu)
    return found


def one_rank(cpu: bool) -> Iterator[dict[str, Any]]:
    started = time.monotonic()
    device = torch.device("cpu" if cpu else "cuda:0")
    dist.init_process_group("gloo" if cpu else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    control: Any = dist.new_group(backend="gloo")
    dist.broadcast(torch.zeros(1, dtype=torch.int64), src=0, group=control)
    dist.all_reduce(torch.ones(4, dtype=torch.float64), group=control)
    sums = torch.ones(4, device=device)
    dist.all_reduce(sums)
    head = DistributedDataParallel(torch.nn.Linear(16, 8).to(device), None if cpu else [0])
    for n in (0, 4):
        head(torch.randn(n, 16, device=device)).sum().backward()
    norm = round(float(head.module.weight.grad.norm()), 3)
    dist.destroy_process_group()
    version = "" if cpu else ".".join(map(str, torch.cuda.nccl.version()))
    seconds = round(time.monotonic() - started, 1)
    yield {"nccl": version, "sums": sums.tolist(), "gradient": norm, "start_and_step_s": seconds}
