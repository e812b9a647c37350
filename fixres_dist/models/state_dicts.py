"""From what a file holds to one model's state dict: which of several, without the prefixes of wrappers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fixres_dist.base.errors import UserError

State = dict[str, torch.Tensor]
AVERAGED = {"ema", "averaged", "average", "avg", "swa"}  # a word of an entry's name, as in model_ema
RAW = ("state_dict", "model", "model_state_dict")  # in timm's order, then torchvision's and the tutorials'
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # no model's own names
COUNTERS = {"n_averaged", "total_ops", "total_params"}  # of AveragedModel, and of a profiler


@dataclass(frozen=True)
class Candidate:
    """A state dict in the file that has tensors of the model: those whose names begin with `prefix`."""

    entry: str  # dotted place in the file; empty: the file itself
    prefix: str
    known: int  # of the model's own names
    state: State

    @property
    def label(self) -> str:
        return ".".join(filter(None, (self.entry, self.prefix.rstrip("."))))

    @property
    def averaged(self) -> bool:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.label).lower()  # modelEma
        return bool(AVERAGED & set(re.split(r"[._]", words)))


@dataclass(frozen=True)
class Chosen:
    """The tensors by the model's names, and what was decided on the way, a phrase each."""

    state: State
    notes: tuple[str, ...]


def choose(loaded: Mapping[str, Any], own: Sequence[str], key: str, origin: str) -> Chosen:
    """The state dict in `loaded` that is the model's, whose names are `own`; averaged weights before raw ones.

    `key` (model.checkpoint_key) is the entry or the prefix of the wanted one. Where no name agrees, the largest state dict
    is returned as it is. Raises UserError if there is none, or several between which nothing decides.
    """
    found = [c for entry, state in state_dicts(loaded) for c in candidates(entry, plain_names(state, own), set(own))]
    if not found:
        listed = ", ".join(map(str, list(loaded)[:6])) or "nothing"
        raise UserError(f"{origin} holds no state dict (in it: {listed}). Accepted: a mapping of names to tensors.")
    if key:
        found = [c for c in found if f".{key}." in f".{c.label}."]
        if not found:
            labels = [entry for entry, _ in state_dicts(loaded) if entry]
            raise UserError(
                f"model.checkpoint_key is {key!r}, and {origin} has no such entry. Accepted: {', '.join(labels) or 'none'}."
            )
    most = max(c.known for c in found)
    sizes = [c.known if most else len(c.state) for c in found]
    best = [c for c, size in zip(found, sizes, strict=True) if size >= 0.9 * max(sizes)]
    taken = decide(best, origin)
    notes = []
    others = [c.label or "the file's own" for c in best if c is not taken]
    if others:
        averaged = ", averaged weights" if taken.averaged else ""
        notes.append(
            f"takes {taken.label or 'its own'}{averaged} (not {', '.join(others)}; model.checkpoint_key chooses)"
        )
    state = {n.removeprefix(taken.prefix): v for n, v in taken.state.items() if n.startswith(taken.prefix)}
    beside = [c.prefix for c in best if c is not taken and c.entry == taken.entry]
    left = [n for n in taken.state if not n.startswith((taken.prefix, *beside))]
    if left:
        notes.append(f"leaves out {len(left)} tensor(s) beside {taken.prefix!r}: {', '.join(left[:3])}")
    return Chosen(state, tuple(notes))


def decide(best: Sequence[Candidate], origin: str) -> Candidate:
    """The averaged weights, or the only ones, or those that training scripts save as the model."""
    averaged = [c for c in best if c.averaged]
    for some in (averaged, best):
        if len(some) == 1:
            return some[0]
        for name in RAW:
            if named := [c for c in some if c.label == name]:
                return named[0]
    labels = [c.label or "the file's own" for c in best]
    raise UserError(
        f"{origin} holds {len(best)} models: {', '.join(labels)}. Next: model.checkpoint_key={best[-1].label}, or another of them"
    )


def state_dicts(loaded: Any, entry: str = "") -> Iterator[tuple[str, State]]:
    """(dotted place, tensors) of every mapping of texts to tensors, except within an optimizer's state."""
    if not isinstance(loaded, Mapping) or "param_groups" in loaded:
        return
    state = {k: found for k, v in loaded.items() if isinstance(k, str) and (found := tensor(v)) is not None}
    inner = [found for k, v in loaded.items() for found in state_dicts(v, f"{entry}.{k}" if entry else str(k))]
    if state and (2 * len(state) >= len(loaded) or not inner):
        yield entry, state
    yield from inner


def tensor(value: Any) -> torch.Tensor | None:
    """A tensor, or an array of numbers as one; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    return value.detach() if isinstance(value, torch.Tensor) else None


def plain_names(state: State, own: Sequence[str]) -> State:
    """`state` without the names of wrappers, wherever they stand in a tensor's name, and without wrappers' counters."""
    wrappers = WRAPPERS - {part for name in own for part in name.split(".")}
    kept = {name: value for name, value in state.items() if name.rpartition(".")[2] not in COUNTERS}
    plain = {".".join(p for p in name.split(".") if p not in wrappers): value for name, value in kept.items()}
    return plain if len(plain) == len(kept) else kept


def candidates(entry: str, state: State, own: set[str]) -> Iterator[Candidate]:
    """Every prefix of `state` after which stand half of the model's `own` names or more; without any, the whole as it is."""
    known: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in own:
                known["".join(f"{part}." for part in parts[:k])] += 1
    starts = {name.partition(".")[0] for name in state}
    whole = (
        f"{starts.pop()}." if len(starts) == 1 and all("." in name for name in state) else ""
    )  # of a foreign naming scheme within one wrapper
    for prefix, count in [item for item in known.items() if 2 * item[1] >= len(own)] or [(whole, 0)]:
        yield Candidate(entry, prefix, count, state)
