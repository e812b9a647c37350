"""images/s and memory of a step at published sizes, and of what is built around it."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.section import Section, tail
from fixres_dist.base.errors import first_line
from fixres_dist.base.memory import does_not_fit
from fixres_dist.bench import step, turns
from fixres_dist.bench.photographs import write_data_set
from fixres_dist.bench.result import row_of
from fixres_dist.bench.setting import CLASSES, Build, Setting, Work, opened, pictures, prepared, timed
from fixres_dist.models import precision
from fixres_dist.models.parts import parts_of

# Published resolutions, the dearest last. Plain steps halve a batch that does not fit.
SIZES = (("b0", 320, 256), ("b4", 512, 64), ("b7", 632, 32), ("b8", 800, 16), ("l2", 600, 16))
Plan = tuple[str, Build, Setting]


def setting(section: Section, short: str, res: int, batch: int) -> Setting:
    """Of a model, its weights written; the smallest model in CPU mode."""
    data = section.scratch / "data"
    if not data.exists():
        write_data_set(section.scratch / "photographs", data, CLASSES, CLASSES)
    name, res, batch = ("test_efficientnet", 64, 4) if section.cpu else (f"tf_efficientnet_{short}", res, batch)
    return replace(prepared(name, res, batch, 0.5, section.scratch / short, data), compile=False)


def measure(section: Section, label: str, plans: list[Plan], until: float, found: dict[str, Any]) -> None:
    """Put a row of each plan into `found`, from one process in which they take turns; what fails has its reason there."""
    rows: dict[str, dict[str, Any]] = {}
    others = list(found["rows"])
    with turns.Worker(partial(measured, plans)) as worker:
        while True:
            try:
                row = worker.next(max(1.0, until - time.monotonic()))
            except turns.Failed as error:
                found["failed"][f"{label} from here on, after {len(rows)} rows"] = str(error)
                return
            if row is None:
                return
            if "error" in row:
                found["failed"][f"{label} {row['name']}"] = row["error"]
            else:
                rows[row["name"]] = row | {"name": f"{label} {row['name']}"}
            found["rows"] = [*others, *rows.values()]
            section.save(found)
            print("  ", label, row, flush=True)


def measured(plans: list[Plan]) -> Iterator[dict[str, Any] | None]:
    """A row of each plan after each of its two counted turns, so that what is known stands if the time ends; None at the end.

    The plans stay alive and take turns; each one's memory is what its own first turn adds to the others'.
    """
    cuda = torch.cuda.is_available()
    timers, peaks, counted = {}, dict[str, float](), dict[str, list[turns.Turn]]()
    for k in range(3):
        for name, build, one in plans:
            if k and name not in timers:
                continue
            try:
                if not k:
                    before = torch.cuda.memory_allocated() / 2**20 if cuda else 0.0
                    timers[name] = timed(build(opened(one), one), one.seconds, 0.0)
                precision.Arithmetic(
                    one.precision, torch.device("cuda" if cuda else "cpu")
                )  # sets torch's tf32 switches
                turn = next(timers[name])
                if k:
                    counted.setdefault(name, []).append(turn._replace(peak_mib=peaks[name]))
                    yield asdict(row_of(name, counted[name], one.batch))
                else:
                    peaks[name] = turn.peak_mib - before
            except Exception as error:
                timers.pop(name, None)
                yield {"name": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            if cuda:
                torch.cuda.empty_cache()
    yield None


def speed(section: Section) -> dict[str, Any]:
    """Without compilation: our step, timm's inference, the original protocol."""
    found: dict[str, Any] = {"rows": [], "failed": {}}
    started, sizes = time.monotonic(), SIZES[:1] if section.cpu else SIZES
    for k, (short, res, batch) in enumerate(sizes):
        until = started + (section.until - started) * (k + 1) / len(sizes)
        one = setting(section, short, res, batch)
        last, first = (replace(one, precision="bf16", memory_format=m) for m in ("channels_last", "contiguous"))
        plans: list[Plan] = [
            *((f"ours {s.name}", step.step, s) for s in (last, first, replace(last, precision="fp16"))),
            *((f"timm {s.name}", step.timm_inference, s) for s in (last, first)),
            *((f"original {p}", step.original, replace(first, precision=p)) for p in ("tf32", "fp32")),
        ]
        if section.cpu:  # fp16 and tf32 are a GPU's
            plans = [plan for plan in plans if plan[2].precision in ("bf16", "fp32")]
        measure(section, f"{short}@{res}", plans, until, found)
        one.weights.unlink()
    return found


def memory(section: Section) -> dict[str, Any]:
    """The largest batch of L2's step at 600 px that fits, to within an eighth, by doubling and halving."""
    found: dict[str, Any] = {"tried": [], "largest_batch": 0}
    one = replace(setting(section, "l2", 600, 16), precision="bf16")
    with turns.Worker(partial(batches_that_fit, one, 16 if section.cpu else 4096)) as worker:
        while tried := worker.next(section.left_s):
            found["tried"].append(tried)
            found["largest_batch"] = max(found["largest_batch"], tried["batch"] * tried["fits"])
            section.save(found)
    return found


def batches_that_fit(one: Setting, most: int) -> Iterator[dict[str, Any] | None]:
    session, cuda = opened(one), torch.cuda.is_available()
    call = step.stepper(step.fixing(session))
    low, high, batch = 0, most + 1, one.batch  # low fits, high does not
    while high - low > max(1, low // 8):
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {"batch": batch, "fits": False}
        try:
            images = [pictures(session, replace(one, batch=batch))]
            for _ in range(2):
                started = time.monotonic()
                call(iter(images))
                if cuda:
                    torch.cuda.synchronize()
            found |= {"fits": True, "images_per_second": round(batch / (time.monotonic() - started), 1)}
            peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else turns.memory_mib(peak=True)
            found["peak_memory_mib"] = round(peak)
            low = batch
        except Exception as error:
            if not does_not_fit(error):
                raise
            found["why"] = first_line(error)[:200]
            high = batch
        images = []
        batch = min(2 * low, most) if high > most else (low + high) // 2
        yield found
    yield None


def compiled(section: Section) -> dict[str, Any]:
    """b0 compiled with CUDA graphs: the time it takes, the speed, and the features' distance from the eager ones."""
    one = replace(setting(section, "b0", 320, 256), precision="bf16", memory_format="contiguous")
    found: dict[str, Any] = section.once(compile_once, one)
    return found


def compile_once(one: Setting) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    outputs = {}
    for way in ("eager", "compiled"):
        session = opened(replace(one, compile=way == "compiled"))
        parts = session.with_fast_trunk(parts_of(session.model, session.config.tune.policy))
        images = pictures(session, one).images
        started = time.monotonic()
        for _ in range(3):  # warm-up, recording, replay
            features = session.inputs(parts, images)
        outputs[way] = [f.float().cpu() for f in features]
        found[f"{way}_first_three_s"] = round(time.monotonic() - started, 1)
        timer = timed(Work(partial(forward, session, parts, images)), one.seconds, 0.0)
        next(timer)
        found[f"{way}_images_per_second"] = row_of("", [next(timer) for _ in range(2)]).images_per_second
    pairs = zip(outputs["compiled"], outputs["eager"], strict=True)
    found["largest_difference"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    yield found


def forward(session: Any, parts: Any, images: torch.Tensor) -> int:
    return len(session.inputs(parts, images)[0])


def end_to_end(section: Section) -> dict[str, Any]:
    """`fixres bench end-to-end`: b4 from files, the share of the time that a step waits for data, and the feature cache."""
    size = ("tf_efficientnet_b4", 380, 128, 2048, 11)
    if section.cpu:
        size = ("test_efficientnet", 64, 4, 32, 3)
    words = zip(("--model", "--res", "--batch", "--images", "--epochs"), map(str, size), strict=True)
    file = section.scratch / "end_to_end.json"
    command = [sys.executable, "-m", "fixres_dist", "bench", "end-to-end", *(word for pair in words for word in pair)]
    code = section.finish(section.start([*command, "--repeat", "2", "--seconds", "0.5", "--json", str(file)]))
    if not file.exists():
        return {"failed": f"exit code {code}: {tail(section.log)}"}
    found = json.loads(file.read_text())
    return {key: found[key] for key in ("rows", "rows_vs", "cached", "failed")}


def apex(section: Section) -> dict[str, Any]:
    """The parts that the installed apex has, and a step of b0 with its O1 and O2."""
    spec = importlib.util.find_spec("apex")
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    amp, fused = root is not None and (root / "amp").is_dir(), importlib.util.find_spec("amp_C") is not None
    found: dict[str, Any] = {"installed": root and str(root), "amp": amp, "fused_optimizers": fused}
    if amp:
        found |= {"rows": [], "failed": {}}
        one = setting(section, "b0", 320, 256)
        plans: list[Plan] = [(f"ours {p}", step.step, replace(one, precision=p)) for p in ("apex-O1", "apex-O2")]
        measure(section, "b0@320", plans, section.until, found)
    return found
