"""Checkpoints: the tuned tensors, the optimizer, the step, and the fingerprint of all that must match at a resume.

A directory step_00001200/ is complete or invisible (written under another name, then renamed). Tensors are safetensors,
the rest JSON: reading one runs no code. Checksums cover all of it, and bind the files of a checkpoint to each other and to
its step. World size is not part of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixres_dist.base.commands import shell
from fixres_dist.base.errors import StorageError
from fixres_dist.base.files import remove, sync, whole
from fixres_dist.base.small_files import SEAL, Damaged, as_json, put_aside, read_json, seal, typed
from fixres_dist.models import tensor_files

KEPT = 2  # of the newest; the one with the best top-1 stays too, and the last of stage one (`write`)


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
        kept = {
            f"{key}:{name}": torch.as_tensor(value)
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
            if value is not None
        }
        kept |= {f"step:#{k}": torch.as_tensor(g["step"]) for k, g in enumerate(optimizer.param_groups) if "step" in g}
        return cls(tuned(model, names), copied(kept), tuned(ema, names) if ema else {})


def tuned(model: nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return copied({name: state[name] for name in names})


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
    # Without its parents, here and wherever a run writes: below a disk that was unmounted the run would go on, unseen.
    folder.mkdir(exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    # One of stage one at the same step stays: pretrained.safetensors can be made of it.
    if progress.stage == "fix" and stage_of(final) == "pretrain":
        remove(stage_end(folder, progress.step))
        os.replace(final, stage_end(folder, progress.step))
    with whole(final) as part:
        part.mkdir()
        sums = {
            f"{name}.safetensors": tensor_files.save(part / f"{name}.safetensors", t)
            for name, t in vars(tensors).items()
            if t or name != "ema"
        }
        meta = {"progress": asdict(progress), "fingerprint": fingerprint, "tensors": sums}
        (part / "meta.json").write_text(as_json({**meta, SEAL: seal(meta)}, indent=1))
    sync(folder)
    prune(folder, progress.best_step)


def stage_end(folder: Path, step: int) -> Path:
    """Where the last checkpoint of stage one stays, once fixing has one of the same step."""
    return folder / f"step_{step:08d}.pretrain"


def complete(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return [path for path in folders(folder) if (path / "meta.json").exists()]


def folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))


def prune(folder: Path, best_step: int) -> None:
    found = complete(folder)
    kept = {*found[-KEPT:], folder / f"step_{best_step:08d}"}
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*"):  # left by a kill in the middle of a save
        shutil.rmtree(path, ignore_errors=True)


def copy(path: Path, folder: Path, **fingerprint: Any) -> None:
    """Copy a checkpoint of another run to `folder`; `fingerprint`: what of it this run has otherwise."""
    read(path)
    meta = read_json(path / "meta.json", dict[str, Any], way_round(path))
    meta["fingerprint"] |= fingerprint
    with whole(folder / path.name) as part:
        shutil.copytree(path, part)
        (part / "meta.json").write_text(as_json({**meta, SEAL: seal(meta)}, indent=1))


def newest_stage(folder: Path) -> str:
    """The stage of the newest checkpoint; empty without one."""
    found = complete(folder)
    return progress_of(found[-1]).stage if found else ""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read back."""

    path: Path
    progress: Progress
    fingerprint: dict[str, Any]
    tensors: Tensors
    checked: bool  # against checksums, which older versions did not write


def progress_of(path: Path) -> Progress:
    return progress_in(path, read_json(path / "meta.json", dict[str, Any], way_round(path)))


def stage_of(path: Path) -> str:
    with contextlib.suppress(Damaged, StorageError, FileNotFoundError):
        return progress_of(path).stage
    return ""


def progress_in(path: Path, meta: dict[str, Any]) -> Progress:
    try:
        progress = typed(meta["progress"], Progress)
    except (KeyError, ValueError) as error:
        raise Damaged(path / "meta.json", error, way_round(path)) from None
    if progress.step != int(path.name[5:13]):
        raise Damaged(path / "meta.json", f"it is of step {progress.step}", way_round(path))
    return progress  # type: ignore[no-any-return]


def way_round(path: Path) -> str:
    older = [other for other in complete(path.parent) if other < path]
    start = f"step {int(older[-1].name[5:])}" if older else "the start of its stage"
    return f"{shell('rm', '-r', path)}, then the same command: it goes on from {start}"


def read(path: Path) -> Saved:
    """A checkpoint, compared with its checksums; raises Damaged, since a retry would read the same bytes."""
    file = path / "meta.json"
    found: dict[str, dict[str, torch.Tensor]] = {}
    try:
        meta = read_json(file, dict[str, Any], way_round(path))
        progress, sums, fingerprint = progress_in(path, meta), meta.get("tensors", {}), meta.get("fingerprint")
        if not isinstance(fingerprint, dict):
            raise Damaged(file, "parts of it are missing", way_round(path))
        for name in ("head", "optimizer", "ema"):
            file = path / f"{name}.safetensors"
            if name == "ema" and file.name not in sums and not file.exists():
                found[name] = {}
                continue
            found[name], own = tensor_files.load(file, way_round(path))
            if own != sums.get(file.name, ""):
                raise Damaged(file, "it is of another checkpoint", way_round(path))
    except FileNotFoundError:
        raise Damaged(file, "it is missing", way_round(path)) from None
    return Saved(path, progress, fingerprint, Tensors(**found), checked=bool(sums))


def put_damaged_aside(folder: Path, tell: Callable[[Damaged], None]) -> None:
    """Rename the newest checkpoints to NAME.damaged until there is one that can be used, or none. By rank 0, under the run's
    lock, before anything else is taken from them; `tell` is told of each."""
    for path in reversed(folders(folder)):
        try:
            if not read(path).checked:
                print(f"{path} has no checksum: an older version wrote it. It is used as it is", flush=True)
            return
        except Damaged as error:
            put_aside(path)
            tell(error)
