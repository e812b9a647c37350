"""Checkpoints: the tuned tensors, the optimizer, the step, and the fingerprint of all that must match at a resume.

A directory step_00001200/ is complete or invisible (written under another name, then renamed). Tensors are safetensors,
the rest JSON: reading one runs no code. World size is not part of it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fixres_dist.base.commands import shell
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import sync, whole
from fixres_dist.base.small_files import as_json
from fixres_dist.config import reading
from fixres_dist.config.schema import Config

KEPT = 2  # of the newest; the one with the best top-1 stays too


@dataclass(frozen=True)
class Progress:
    """The state of training beside the tensors; everything else follows from the step."""

    step: int  # optimizer steps done over both stages
    stage: str  # pretrain | fix
    seconds: float = 0.0  # of training, over all starts
    best_top1: float = -1.0  # per cent, of the evaluations while this stage trains
    best_step: int = -1
    pending: str = ""  # label of the evaluation that is due after this step
    loss_scale: dict[str, Any] = field(default_factory=dict)  # precision.LossScale.state

    def with_top1(self, top1: float) -> Progress:
        return replace(self, best_top1=top1, best_step=self.step) if top1 > self.best_top1 else self


@dataclass(frozen=True)
class Tensors:
    """A checkpoint's tensors, copied to the CPU: training may go on while they are written."""

    head: dict[str, torch.Tensor]  # the tuned tensors by their names in the model
    # momentum_buffer:PARAMETER, and average:PARAMETER where weights are averaged; step:#0 of a parameter group that counts
    optimizer: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]  # the tuned tensors' moving average, where the stage keeps one

    @classmethod
    def of(
        cls, model: nn.Module, names: tuple[str, ...], optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
    ) -> Tensors:
        state, mean = model.state_dict(), ema.state_dict() if ema else {}
        kept = {
            f"{key}:{name}": torch.as_tensor(value)
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        kept |= {f"step:#{k}": torch.as_tensor(g["step"]) for k, g in enumerate(optimizer.param_groups) if "step" in g}
        averages = copied({name: mean[name] for name in names}) if ema else {}
        return cls(copied({name: state[name] for name in names}), copied(kept), averages)


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


class Writer:
    """Asynchronous saves: `save` returns once the tensors are copied, and one thread writes the files.

    An error of that thread is raised by the next `save` or `wait`. Leaving the `with` block waits, so that the run
    stays locked until the last file is written. Once a checkpoint is on disk, the thread calls
    `saved(step=..., stall_ms=...)`: the milliseconds that the caller waited, for the copy and for the save before it, if
    that was still being written.
    """

    def __init__(self, folder: Path, saved: Callable[..., None]) -> None:
        self.folder, self.saved = folder, saved
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(wait=True)

    def save(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        fingerprint: dict[str, Any],
        ema: nn.Module | None = None,
    ) -> None:
        """Write step_NNNNNNNN/ with the tensors `names` of the model and of `ema`, its moving average; rank 0 only."""
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()  # work that was queued before is no part of the stall
        started = time.perf_counter()
        self.wait()
        tensors = Tensors.of(model, names, optimizer, ema)
        stall_ms = 1e3 * (time.perf_counter() - started)

        def work() -> None:
            write(self.folder, tensors, progress, fingerprint)
            self.saved(step=progress.step, stall_ms=round(stall_ms, 1))

        self.pending = self.thread.submit(work)

    def wait(self) -> None:
        """Until the last save is on disk; raises what its thread raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def write(folder: Path, tensors: Tensors, progress: Progress, fingerprint: dict[str, Any]) -> None:
    """Write step_NNNNNNNN/ into `folder`, whole or not at all, then delete checkpoints that are no longer kept."""
    final = folder / f"step_{progress.step:08d}"
    with whole(final) as part:
        part.mkdir(parents=True)
        save_file(tensors.head, part / "head.safetensors")
        save_file(tensors.optimizer, part / "optimizer.safetensors")
        if tensors.ema:
            save_file(tensors.ema, part / "ema.safetensors")
        (part / "meta.json").write_text(as_json({"progress": asdict(progress), "fingerprint": fingerprint}, indent=1))
        for file in part.iterdir():
            sync(file)
    sync(folder)
    prune(folder, progress.best_step)


def complete(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*/meta.json"))


def prune(folder: Path, best_step: int) -> None:
    for path in complete(folder)[:-KEPT]:
        if path.name != f"step_{best_step:08d}":
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*"):  # left by a kill in the middle of a save
        shutil.rmtree(path, ignore_errors=True)


def copy(path: Path, folder: Path, **fingerprint: Any) -> None:
    """Copy a checkpoint of another run to `folder`; `fingerprint`: what of it this run has otherwise."""
    meta = read(path / "meta.json")
    meta["fingerprint"] |= fingerprint
    with whole(folder / path.name) as part:
        shutil.copytree(path, part)
        (part / "meta.json").write_text(as_json(meta, indent=1))


def newest_stage(folder: Path) -> str:
    """The stage of the newest checkpoint; empty without one."""
    found = complete(folder)
    return progress_of(found[-1]).stage if found else ""


def progress_of(path: Path) -> Progress:
    return Progress(**read(path / "meta.json")["progress"])


def resume(
    folder: Path,
    start: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    ema: nn.Module | None = None,
) -> tuple[Progress, bool]:
    """(where the stage of `start` continues, whether from a checkpoint, which is loaded then)."""
    found = complete(folder)
    newest = progress_of(found[-1]) if found else None
    if newest and newest.stage == start.stage:
        return restore(found[-1], model, optimizer, fingerprint, ema), True
    return replace(start, seconds=newest.seconds if newest else 0.0), False


def restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    ema: nn.Module | None = None,
) -> Progress:
    """Load a checkpoint into `model`, `optimizer` and the moving average `ema`, in place.

    Raises UserError that names the differences if the fingerprint is of another configuration, data set or trunk.
    """
    meta = read(path / "meta.json")
    kept = meta["fingerprint"]
    if "configuration" in kept:  # keys that are newer than the checkpoint had their defaults then
        kept["configuration"] = reading.identity(reading.parse(Config, kept["configuration"]))
    differ = [f"{key} was {value}, is {fingerprint[key]}" for key, value in kept.items() if fingerprint[key] != value]
    if differ:
        raise UserError(
            f"{path} cannot be resumed: {'; '.join(differ)}. Put back what changed, or start under another --name."
        )
    parameters = dict(model.named_parameters())
    for module, file in ((model, "head.safetensors"), (ema, "ema.safetensors")):
        state = module.state_dict() if module else {}
        with torch.no_grad():
            for name, value in read(path / file).items() if module else ():
                state[name].copy_(value)
    for name, value in read(path / "optimizer.safetensors").items():
        key, _, parameter = name.partition(":")
        if parameter.startswith("#"):  # of a group: a whole number, or a tensor on the group's device (LAMB)
            group = optimizer.param_groups[int(parameter[1:])]
            group[key] = value.to(group["params"][0].device) if value.is_floating_point() else int(value)
        else:  # torch counts steps on the CPU
            optimizer.state[parameters[parameter]][key] = value if key == "step" else like(parameters[parameter], value)
    return Progress(**meta["progress"])


def like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor of the optimizer in its parameter's memory format, since norms (LAMB, LARS) are sums in that order."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def read(file: Path) -> Any:
    """JSON or tensors of a checkpoint; raises UserError for a damaged file, since a retry would read the same bytes."""
    try:
        return json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)
    except (FileNotFoundError, ValueError, SafetensorError) as error:
        older = [path for path in complete(file.parents[1]) if path < file.parent]
        start = f"step {int(older[-1].name[5:])}" if older else "the start of its stage"
        raise UserError(
            f"{file} cannot be read ({error}). Next: {shell('rm', '-r', file.parent)}, then the same command: it goes on from {start}."
        ) from None
