"""The frozen trunk as it runs: BatchNorms folded in fp32, weights in low precision, in the fastest memory format.

Which memory format is faster, and whether compiling pays, depends on model, size and device (published timings have
channels-last win by 17 % and lose by 21 % on one GPU), so `auto` measures. The model and its tensors stay as they are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.base.errors import first_line, unknown
from fixres_dist.base.memory import does_not_fit
from fixres_dist.config.schema import Run
from fixres_dist.models import cpu_layers, folding
from fixres_dist.models.build import small_size
from fixres_dist.models.parts import Parts, cut
from fixres_dist.models.precision import Arithmetic

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CLEARLY = 1.1  # how much faster than the usual arrangement another one must be: noise is not to decide
PROBE_IMAGES = 16  # at most, on a CPU; a GPU is probed with a whole batch
PROBE_S = 0.5  # seconds that rounds of the probe go on for, of at least 5 and at most 20
COMPILE_PAYS_S = 1200.0  # seconds of eager work from which on compiling, minutes for the largest models, is tried
GRAPHS = 10_000  # sizes of one compiled trunk, and of all in a process: more than any sweep has
Choose = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


class Arrangement(NamedTuple):
    memory_format: str
    compile: bool

    def __str__(self) -> str:
        return self.memory_format + (" compiled" if self.compile else "")


class FastTrunk(nn.Module):
    """`neck(*body(x))` is the trunk. The cache stores the body's output: the neck would make it larger."""

    def __init__(self, body: nn.Module, neck: nn.Module | None, dtype: torch.dtype, how: Arrangement) -> None:
        super().__init__()
        self.dtype, self.how = dtype, how
        self.memory_format, self.compiled = FORMATS[how.memory_format], how.compile
        self.body = body.to(memory_format=self.memory_format)
        self.neck = neck.to(memory_format=self.memory_format) if neck is not None else None
        if how.compile:
            # dynamic=False: a second size would otherwise be traced symbolically, which takes minutes with SAME padding.
            # So each size has a graph of its own. By default the ninth would run eagerly, with a warning in the log.
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
            # CUDA graphs take the launch costs away; their outputs are overwritten by the next run, hence `features`' clone.
            cuda = next(body.parameters()).device.type == "cuda"
            mode = "reduce-overhead" if cuda else None
            self.body = cast(nn.Module, torch.compile(self.body, dynamic=False, mode=mode))

    def eager(self) -> FastTrunk:
        """The same modules, not compiled."""
        if not self.compiled:
            return self
        return FastTrunk(self.body._orig_mod, self.neck, self.dtype, self.how._replace(compile=False))  # type: ignore[arg-type]

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The body's output in `dtype`, each tensor [n, ...], for normalised fp32 images [n, 3, res, res]."""
        found: tuple[torch.Tensor, ...] = self.body(images.to(self.dtype, memory_format=self.memory_format))
        return tuple(f.clone() for f in found) if self.compiled else found

    def finish(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The trunk's output from `features`, which may be in any memory format."""
        if self.neck is None:
            return tuple(features)
        laid = (f.contiguous(memory_format=self.memory_format) if f.dim() == 4 else f for f in features)
        return cast(tuple[torch.Tensor, ...], self.neck(*laid))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.finish(self.features(images))


def with_fast_trunk(
    parts: Parts, arithmetic: Arithmetic, settings: Run, batch: int, res: int, pictures: int, choose: Choose
) -> Parts:
    """`parts` with its frozen trunk folded, cast and arranged: the same function, to rounding. Policy `all` has no trunk.

    Of several possible arrangements, the fastest for `batch` images of `res` px is taken (PROBE_IMAGES at most on a CPU);
    compiled ones are tried only if it pays for the `pictures` that this rank will run. `choose(name, probe)` returns what
    `probe()` returns, or what it returned at an earlier start of the run.
    """
    if parts.trunk is None:
        return parts
    checked = small_size(parts.model)
    if arithmetic.amp:  # apex casts by itself
        with arithmetic.fp32():
            trunk, count = folding.folded(parts.trunk, checked)
        return replace(parts, trunk=arithmetic.frozen(trunk), folded=folded_text(parts.trunk, count))
    dtype, device = arithmetic.dtype, arithmetic.device
    trunk, count = prepared(parts.trunk, dtype, checked)
    choices = candidates(settings, device)
    how = choices[0]
    if len(choices) > 1:
        size = batch if device.type == "cuda" else min(batch, PROBE_IMAGES)
        images = torch.zeros(size, 3, res, res, device=device)
        name = f"trunk at {res} px ({' | '.join(map(str, choices))})"
        found = choose(name, lambda: probe(trunk, dtype, choices, images, pictures))
        how = Arrangement(found.get("memory_format", ""), found.get("compile") is True)
        if how not in choices:
            raise unknown("choice for the trunk", how, map(str, choices), "Next: remove the run's choices.json.")
    return replace(parts, trunk=arranged(trunk, dtype, how), folded=folded_text(parts.trunk, count))


def folded_text(trunk: nn.Module, count: int) -> str:
    norms = folding.norms(trunk)
    return f"{count} of {norms} BatchNorms of the frozen trunk are folded into convolutions" if norms else ""


def prepared(trunk: nn.Module, dtype: torch.dtype, res: int = 64) -> tuple[nn.Module, int]:
    """(a copy of `trunk` with BatchNorms folded, then cast to `dtype`; how many). What stays fp32:
    BatchNorms that are left, and tables that the graph reads by itself (frequencies of a rotary embedding, as timm does).

    `res`: pixels of the images that folding is checked on.
    """
    own, count = folding.folded(trunk, res)
    own = own if count else copy.deepcopy(own)
    if next(own.parameters()).device.type == "cpu":
        cpu_layers.use(own)
    read = (
        {node.target for node in own.graph.nodes if node.op == "get_attr"} if isinstance(own, fx.GraphModule) else set()
    )
    tables = {name: table for name, table in own.named_buffers() if name in read}
    own = own.to(dtype)
    for name, table in tables.items():
        own.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], table)
    for module in own.modules():
        if isinstance(module, _BatchNorm):
            module.float()
    return own, count


def split_neck(trunk: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """(body, neck) of `trunk`. The neck is a last convolution that only widens: EfficientNet's conv_head, 4 times the channels.

    The features before it are that much smaller to store, and one small convolution is all that is left to compute.
    """
    graph = cast(fx.GraphModule, trunk).graph
    output = next(node for node in graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        conv = trunk.get_submodule(node.target) if node.op == "call_module" else None
        widens = isinstance(conv, nn.Conv2d) and conv.in_channels < conv.out_channels and set(conv.stride) == {1}
        if widens and list(node.users) == [output]:
            return cut(trunk, (node.target,))
    return trunk, None


def arranged(trunk: nn.Module, dtype: torch.dtype, how: Arrangement) -> FastTrunk:
    """`trunk` from `prepared` in the memory format of `how`, and compiled if it says so; its modules are not copied."""
    return FastTrunk(*split_neck(trunk), dtype, how)


def candidates(settings: Run, device: torch.device) -> list[Arrangement]:
    """The arrangements to choose from, the usual one first; that one alone where a measured time must not decide."""
    usual = ["channels_last", "contiguous"] if device.type == "cpu" else ["contiguous", "channels_last"]
    formats = usual if settings.memory_format == "auto" else [settings.memory_format]
    if settings.compile is True:
        return [Arrangement(formats[0], True)]  # the compiler chooses layouts by itself
    found = [Arrangement(name, False) for name in formats]
    if settings.compile == "auto" and device.type == "cuda":
        found.append(Arrangement(formats[0], True))
    return found[:1] if settings.deterministic else found


def probe(
    trunk: nn.Module, dtype: torch.dtype, choices: list[Arrangement], images: torch.Tensor, pictures: int
) -> dict[str, Any]:
    """The fastest of `choices` for fp32 `images` [n, 3, res, res], as choices.json keeps it, and the ms per image of each.

    `pictures`: how many this rank will run; compiled choices are tried if that takes COMPILE_PAYS_S without. Images that do
    not fit into memory are halved: the batch that does is found later (training/auto_batch.py).
    """
    try:
        best = fastest(trunk, dtype, [how for how in choices if not how.compile], images)
    except Exception as error:
        if len(images) == 1 or not does_not_fit(error):
            raise
        best = {}
    if not best:
        torch.cuda.empty_cache()
        return probe(trunk, dtype, choices, images[: len(images) // 2].clone(), pictures)
    if min(best.values()) * pictures >= COMPILE_PAYS_S * len(images):
        try:
            best |= fastest(trunk, dtype, [how for how in choices if how.compile], images)
        except Exception as error:  # no compiler on this node, or one that fails: the trunk runs as it is
            if not does_not_fit(error):
                print(f"not compiled (run.compile=false tries it no more): {type(error).__name__}: {first_line(error)}")
    chosen = min(best, key=lambda how: best[how] if how == choices[0] else best[how] * CLEARLY)
    per_image = {str(how): round(1000 * s / len(images), 4) for how, s in best.items()}
    return {"memory_format": chosen.memory_format, "compile": chosen.compile, "ms_per_image": per_image}


@torch.no_grad()
def fastest(
    trunk: nn.Module, dtype: torch.dtype, choices: list[Arrangement], images: torch.Tensor
) -> dict[Arrangement, float]:
    """Least seconds of a forward pass of each choice. Rounds alternate, so that other load on the machine slows all alike."""
    trunks = {how: arranged(copy.deepcopy(trunk), dtype, how) for how in choices}
    for fast in trunks.values():
        fast(images)
    best = dict.fromkeys(choices, float("inf"))
    started = time.monotonic()
    for k in range(20):
        if k >= 5 and time.monotonic() - started > PROBE_S:
            break
        for how, fast in trunks.items():
            best[how] = min(best[how], seconds(fast, images))
    return best


def seconds(trunk: nn.Module, images: torch.Tensor) -> float:
    started = time.perf_counter()
    trunk(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started
