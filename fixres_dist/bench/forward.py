"""Images per second of networks' forward passes, which `study` puts beside their multiply-adds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from fixres_dist.base.environment import processor
from fixres_dist.base.small_files import append, read_lines
from fixres_dist.base.text import duration
from fixres_dist.models import precision
from fixres_dist.models.build import build_model
from fixres_dist.models.resizing import for_size
from fixres_dist.training.stages import batch_by_pixels

ROUNDS, TURN_S = 3, 0.5
CPU_BATCH = 16  # a large one gains nothing there, and makes the shortest turn long


@dataclass(frozen=True)
class Network:
    """A network at one resolution; its weights are new, since no value makes a pass longer."""

    timm_name: str
    res: int
    classes: int


@dataclass(frozen=True)
class Turn:
    """A line of speeds.jsonl: one turn of one network."""

    timm_name: str
    res: int
    device: str
    precision: str
    batch: int
    images_per_second: float


def measure(networks: Sequence[Network], file: Path) -> None:
    """Append to `file` the turns of each network on this machine that it does not hold yet: ROUNDS each, in rotation.

    So other load on the machine slows all alike, and a kill costs one turn.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    done = [(turn.timm_name, turn.res) for turn in turns(file) if turn.device == name]
    todo = [n for k in range(ROUNDS) for n in networks if done.count((n.timm_name, n.res)) <= k]
    torch.set_flush_denormal(True)  # of which new weights may make many, and a CPU computes with them slowly
    arithmetic = precision.Arithmetic(precision.resolve("auto", device), device)
    built: dict[Network, nn.Module] = {}
    started = time.monotonic()
    for k, network in enumerate(todo, 1):
        if network not in built:
            model = for_size(build_model(network.timm_name, network.classes), network.res).eval().requires_grad_(False)
            built[network] = model.to(device, arithmetic.dtype).to(memory_format=torch.channels_last)
        batch = batch_by_pixels(network.res) if device.type == "cuda" else CPU_BATCH
        speed = images_per_second(built[network], network.res, batch)
        turn = Turn(network.timm_name, network.res, name, arithmetic.name, batch, round(speed, 2))
        append(file, asdict(turn))
        eta_s = (time.monotonic() - started) / k * (len(todo) - k)
        print(
            f"speed {k}/{len(todo)} {turn.timm_name} {turn.res} px: {speed:,.0f} images/s | eta {duration(eta_s)}",
            flush=True,
        )


@torch.inference_mode()
def images_per_second(model: nn.Module, res: int, batch: int) -> float:
    """Of passes over one batch in the model's number format during TURN_S, after one that is not counted."""
    first = next(model.parameters())
    pictures = torch.randn(batch, 3, res, res, device=first.device, dtype=first.dtype)
    pictures = pictures.to(memory_format=torch.channels_last)

    def passed() -> None:
        model(pictures)
        if first.is_cuda:
            torch.cuda.synchronize()

    passed()
    started, count = time.monotonic(), 0
    while count == 0 or time.monotonic() - started < TURN_S:
        passed()
        count += 1
    return batch * count / (time.monotonic() - started)


def turns(file: Path) -> list[Turn]:
    """What `measure` has written; a damaged line is passed over."""
    if not file.exists():
        return []
    hints = {"timm_name": str, "res": int, "device": str, "precision": str, "batch": int, "images_per_second": float}
    keys = list(hints)
    return [Turn(**{key: line[key] for key in keys}) for line in read_lines(file, **hints)]


def speeds(found: Iterable[Turn]) -> tuple[dict[tuple[str, int], float], str]:
    """(median images per second by (timm name, resolution) on the device that was measured last, how, in a sentence)."""
    every = list(found)
    if not every:
        return {}, ""
    last = every[-1]
    of: dict[tuple[str, int], list[float]] = {}
    for turn in every:
        if turn.device == last.device:
            of.setdefault((turn.timm_name, turn.res), []).append(turn.images_per_second)
    how = (
        f"images/s: forward passes of the whole network in {last.precision}, not compiled, on one {last.device}; the median of "
        f"{ROUNDS} turns of {TURN_S:g} s in rotation. Decoding is not in it."
    )
    return {key: statistics.median(values) for key, values in of.items()}, how
