"""What only a GPU can tell, in under ten minutes; run it once on new hardware or new releases, and commit the result.

    python benchmarks/gpu_check.py --json benchmarks/results/gpu_check_<device>.json
    python benchmarks/gpu_check.py --cpu --json /tmp/check.json      # every path at tiny sizes, without a GPU

A section that fails or runs out of its time costs only itself: its reason stands in the JSON, which is written after
every section, and the exit code is 1 at the end. So the trunk is timed where DALI does not work.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED
from fixres_dist.base.files import write_text
from fixres_dist.bench import model, pipeline, turns
from fixres_dist.bench.data import write_photographs
from fixres_dist.bench.model import Setting
from fixres_dist.bench.turns import Variant
from fixres_dist.data import dataset, geometry
from fixres_dist.data.decoding import Batch
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, chunks, make_request

B0, B4, B7, L2 = (f"tf_efficientnet_{name}" for name in ("b0", "b4", "b7", "l2"))
GPU_SIZES = {B0: (320, 256), B4: (380, 128), B7: (600, 32), L2: (600, 16)}
CPU_SIZES = {"test_efficientnet": (64, 4)}


@dataclass
class Bench:
    """What the sections share; `until`: on time.monotonic()'s clock, when the current one shall be through."""

    args: argparse.Namespace
    scratch: Path
    sizes: dict[str, tuple[int, int]]
    settings: dict[str, Setting] = field(default_factory=dict)
    until: float = 0.0

    def setting(self, name: str) -> Setting:
        """Of a model that is measured, its weights written when it is first asked for."""
        if name not in self.settings:
            res, batch = self.sizes[name]
            folder = self.scratch / name
            folder.mkdir()
            self.settings[name] = model.prepare(name, res, batch, self.args.seconds, folder, self.pictures)
        return self.settings[name]

    @cached_property
    def pictures(self) -> Path:
        return model.linked(self.scratch / "photographs", self.scratch / "linked", model.CLASSES, model.CLASSES)

    def once(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> Any:
        """The first value that `function` yields in a process of its own; a crash or a hang there is a Failed here."""
        return turns.once(Variant(function, arguments), timeout_s=max(1.0, self.until - time.monotonic()))

    def pick(self, *names: str) -> list[str]:
        """Those of the models that are measured here, or all in CPU mode."""
        return list(self.sizes) if self.args.cpu else [name for name in names if name in self.sizes]


def data(bench: Bench) -> dict[str, Any]:
    """Pixels against the CPU's at several shares of the hardware decoder, images/s and memory by size and threads."""
    count = 16 if bench.args.cpu else 1000
    root = bench.args.data or write_photographs(bench.scratch / "for decoding", min(count, 500))
    samples = dataset.load(root, "val")
    sizes, threads = ((64,), (1,)) if bench.args.cpu else ((224, 320, 600, 800), (4, 8, 16))
    found: dict[str, Any] = {"difference_from_cpu": [], "speed": []}
    for load in (0.0, 0.65, 1.0):
        found["difference_from_cpu"].append(bench.once(pixel_difference, samples, load, count))
    cases = [(res, t, 0.65) for res in sizes for t in threads] + [
        (sizes[0], threads[-1], load) for load in (0.0, 0.9, 1.0)
    ]
    for case in cases:
        if time.monotonic() < bench.until:
            found["speed"].append(bench.once(speed, samples, *case, 64 if bench.args.cpu else 2048))
    if len(found["speed"]) < len(cases):
        found["failed"] = {"speed": f"time for {len(found['speed'])} of {len(cases)} cases"}
    return found


def images(samples: Index, pictures: Pictures, count: int, settings: Any) -> Iterator[torch.Tensor]:
    from fixres_dist.data import dali

    parts = chunks(np.arange(count) % len(samples), settings.batch)
    requests = (make_request(samples, pictures, part, 0) for part in parts)
    # Two passes on the CPU as well: the question is what the GPU's decoder does, not how often pixels are rounded.
    for batch in dali.batches(samples, requests, pictures.res, pictures.resize, settings, True):
        yield batch.images


def device_id() -> int | None:
    return 0 if torch.cuda.is_available() else None


def pixel_difference(samples: Index, load: float, count: int) -> Iterator[dict[str, float]]:
    """Grey levels between GPU and CPU pictures; fancy upsampling is on, so a hardware engine that ignores it shows here."""
    from fixres_dist.data import dali

    pictures = Pictures("test_aug", 320, geometry.resize_of("fixefficientnet", 320, 1.0, "bicubic"), 0)
    ours = images(samples, pictures, count, dali.Settings(64, 8, device_id(), load))
    cpu = images(samples, pictures, count, dali.Settings(64, 8))
    means, largest = [], 0
    for a, b in zip(ours, cpu, strict=True):
        difference = (a.cpu().short() - b.short()).abs()
        means.append(float(difference.float().mean()))
        largest = max(largest, int(difference.max()))
    yield {"hw_decoder_load": load, "mean": round(float(np.mean(means)), 4), "max": largest, "n": count}


def speed(samples: Index, res: int, threads: int, load: float, count: int) -> Iterator[dict[str, Any]]:
    """images/s of training pictures left on the device, without the first batches."""
    from fixres_dist.data import dali

    cuda, batch, first = torch.cuda.is_available(), 64 if count > 64 else 8, 8 if count > 64 else 2
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    pictures = Pictures("test_aug", res, geometry.resize_of("fixefficientnet", res, 1.0, "bicubic"), 0)
    before = torch.cuda.mem_get_info()[0] if cuda else 0
    started, seen = 0.0, 0
    settings = dali.Settings(batch, threads, device_id(), load)
    for k, found in enumerate(images(samples, pictures, count + first * batch, settings)):
        if k == first:
            synchronize()
            started = time.monotonic()
        seen += len(found) if k >= first else 0
    synchronize()
    seconds = time.monotonic() - started
    used = (before - torch.cuda.mem_get_info()[0]) / 2**20 if cuda else 0
    yield {
        "res": res, "threads": threads, "hw_decoder_load": load,
        "images_per_second": round(seen / seconds, 1), "device_memory_mib": round(used), "n": seen,
    }  # fmt: skip


def trunk(bench: Bench) -> dict[str, Any]:
    """The frozen forward in every format, layout and way of running, a process for each model; the dearest last."""
    precisions = ("bf16", "fp32") if bench.args.cpu else ("bf16", "fp16", "tf32", "fp32")
    layouts, rows, failed = ("contiguous", "channels_last"), [], {}
    ways = [(False, p, layout) for p in precisions for layout in layouts]
    ways += [] if bench.args.cpu else [(True, p, layout) for p in precisions for layout in layouts]
    names, started, end = bench.pick(B0, B4, B7, L2), time.monotonic(), bench.until
    for k, name in enumerate(names):
        until = started + (end - started) * (k + 1) / len(names)
        setting = bench.setting(name)
        todo = [replace(setting, precision=p, memory_format=m, compile=c) for c, p, m in ways]
        worker = turns.Worker(Variant(forwards, (todo,)))
        try:
            for one in todo:
                found = worker.turn(max(1.0, until - time.monotonic()))
                if "error" in found:
                    failed[f"{name} {setting.res}: {one.name}"] = found["error"]
                else:
                    rows.append(found | {"name": f"{name} {setting.res}: trunk {one.name}"})
        except turns.Failed as error:
            worker.process.kill()
            failed[f"{name} {setting.res}: from {one.name} on"] = str(error)
        finally:
            worker.end()
    return {"rows": rows, "failed": failed}


def forwards(settings: list[Setting]) -> Iterator[dict[str, Any]]:
    for setting in settings:
        try:
            live = model.opened(setting)
            timer = model.timed(model.trunk(live, setting), setting.seconds, 0.0)
            next(timer)
            yield turns.row("", [next(timer) for _ in range(3)])
            del live, timer
        except Exception as error:
            yield {"error": f"{type(error).__name__}: {error}"}


def step(bench: Bench) -> dict[str, Any]:
    """An optimizer step beside the original protocol in fp32 and tf32, full fine-tuning and (compiled) timm inference."""
    rows, ratios, failed = [], {}, {}
    names, started, end = bench.pick(B0, B4, B7), time.monotonic(), bench.until
    for k, name in enumerate(names):
        setting = bench.setting(name)
        until = started + (end - started) * (k + 1) / len(names)
        found, versus, broken = model.measure("step", setting, bench.args.repeat, not bench.args.cpu, until)
        label = f"{name} {setting.res}: "
        rows += [row | {"name": label + row["name"]} for row in found]
        ratios[f"{name} {setting.res}"] = versus
        failed |= {label + key: reason for key, reason in broken.items()}
    return {"rows": rows, "ratios": ratios, "failed": failed}


def memory(bench: Bench) -> dict[str, Any]:
    """The largest batch of a step that fits, to within an eighth, found by doubling and halving; l2 at 600 on a GPU."""
    (name,) = bench.pick(L2)
    worker = turns.Worker(Variant(batches_that_fit, (bench.setting(name), 16 if bench.args.cpu else 4096)))
    tried: list[dict[str, Any]] = []
    try:
        while (found := worker.turn(max(1.0, bench.until - time.monotonic()))) is not None:
            tried.append(found)
        reason = {}
    except turns.Failed as error:
        worker.process.kill()
        reason = {name: str(error)}
    finally:
        worker.end()
    fitting = [entry["batch"] for entry in tried if entry["fits"]]
    return {"model": name, "tried": tried, "largest_batch": max(fitting, default=0), "failed": reason}


def batches_that_fit(setting: Setting, most: int) -> Iterator[dict[str, Any] | None]:
    setting = replace(setting, compile=False)
    live = model.opened(setting)
    one, cuda = model.stepper(live), torch.cuda.is_available()
    low, high, batch = 0, most + 1, setting.batch  # low fits, high does not
    while high - low > max(1, low // 8):
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {"batch": batch, "fits": False}
        try:
            images, labels = model.pictures(live, replace(setting, batch=batch))
            for _ in range(2):
                started = time.monotonic()
                one(0, iter([Batch(images, labels, torch.arange(batch))]))
                if cuda:
                    torch.cuda.synchronize()
            found |= {"fits": True, "images_per_second": round(batch / (time.monotonic() - started), 1)}
            found["peak_memory_mib"] = round(
                torch.cuda.max_memory_allocated() / 2**20 if cuda else turns.memory_mib(True)
            )
            low = batch
        except torch.OutOfMemoryError:
            high = batch
        images = labels = None
        batch = min(2 * low, most) if high > most else (low + high) // 2
        yield found
    yield None


def end_to_end(bench: Bench) -> dict[str, Any]:
    """From files to steps for b4: the share of the time that a step waits for data."""
    (name,) = bench.pick(B4)
    rows, versus, failed = pipeline.from_files(bench.setting(name), bench.args.repeat, bench.until)
    return {"rows": rows, "ratios": {name: versus}, "failed": failed}


def cached(bench: Bench) -> dict[str, Any]:
    """Runs with and without the feature cache on b0."""
    (name,) = bench.pick(B0)
    res, batch = bench.sizes[name]
    count, epochs = (32, 3) if bench.args.cpu else (4096, 11)
    wanted = argparse.Namespace(model=name, res=res, batch=batch, images=count, epochs=epochs)
    (folder := bench.scratch / "cached").mkdir()
    rows, found = pipeline.with_and_without_cache(wanted, folder, bench.until)
    return {"rows": rows, **found}


def apex(bench: Bench) -> dict[str, Any]:
    """What the installed apex has, and what it brings where it has it."""
    spec = importlib.util.find_spec("apex")
    root = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    has_amp = root is not None and (root / "amp").is_dir()
    found: dict[str, Any] = {
        "installed": str(root) if root else None,
        "amp": has_amp,
        "fused_optimizers": root is not None and importlib.util.find_spec("amp_C") is not None,
    }
    if found["fused_optimizers"] and torch.cuda.is_available():
        found["sgd_ms"] = bench.once(optimizers)
    if has_amp:
        (name, *_) = bench.pick(B0)
        setting = replace(bench.setting(name), compile=False)
        variants = {
            p: Variant(model.variant, (model.step, replace(setting, precision=p))) for p in ("apex-O1", "apex-O2")
        }
        values, found["failed"] = turns.alternate(variants, bench.args.repeat, "apex", bench.until)
        found["rows"] = [turns.row(f"{name} {setting.res}: ours {p}", v) for p, v in values.items()]
    return found


def optimizers() -> Iterator[dict[str, float]]:
    """Milliseconds of a step of SGD on l2's head: apex's fused one beside torch's."""
    from apex.optimizers import FusedSGD

    found = {}
    for name, make in {"apex": FusedSGD, "torch": torch.optim.SGD}.items():
        tensors = [
            torch.nn.Parameter(torch.zeros(1000, 5504, device="cuda")),
            torch.nn.Parameter(torch.zeros(1000, device="cuda")),
        ]
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        optimizer = make(tensors, lr=1e-3, momentum=0.9)
        for k in range(110):
            if k == 10:
                torch.cuda.synchronize()
                started = time.monotonic()
            optimizer.step()
        torch.cuda.synchronize()
        found[name] = round(10 * (time.monotonic() - started), 4)
    yield found


# Seconds of ten minutes; most telling first.
SECTIONS: dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]] = {
    "step": (170, step),
    "trunk": (150, trunk),
    "data": (80, data),
    "end_to_end": (50, end_to_end),
    "memory": (50, memory),
    "cached": (60, cached),
    "apex": (15, apex),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="data set whose val/ is decoded; default: synthetic 500x375 photographs"
    )
    parser.add_argument("--cpu", action="store_true", help="every path at tiny sizes on the CPU")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"default: {','.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of them; default: 9.5")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each variant; medians count; default: 3")
    parser.add_argument("--seconds", type=float, default=0.3, help="least length of a turn; default: 0.3")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    chosen = args.sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(unknown)}; accepted: {', '.join(SECTIONS)}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here; --cpu runs every path at tiny sizes")
    result = turns.result("gpu_check", [], {}, sections={})
    result["command"] = " ".join(["python benchmarks/gpu_check.py", *sys.argv[1:]])
    share = 60 * args.minutes / sum(SECTIONS[name][0] for name in chosen)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch), CPU_SIZES if args.cpu else GPU_SIZES)
        for name in chosen:
            started = time.monotonic()
            bench.until = started + share * SECTIONS[name][0]
            try:
                found = SECTIONS[name][1](bench)
            except Exception as error:
                traceback.print_exc()
                found = {"error": f"{type(error).__name__}: {error}"}
            found["seconds"] = round(time.monotonic() - started, 1)
            result["rows"] += found.pop("rows", [])
            result["ratios"] |= {name: ratios} if (ratios := found.pop("ratios", None)) else {}
            result["sections"][name] = found
            write_text(args.json, json.dumps(result, indent=1) + "\n")
            print(f"{name}: {found['seconds']} s {found.get('error') or found.get('failed') or ''}", file=sys.stderr)
    if result["rows"]:
        print(turns.table(result))
    broken = [name for name, found in result["sections"].items() if "error" in found or found.get("failed")]
    print(f"written to {args.json}" + (f"; not complete: {', '.join(broken)}" if broken else ""))
    return EXIT_FAILED if broken else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
