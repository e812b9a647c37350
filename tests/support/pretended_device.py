"""torch's meta device in a GPU's place: it computes nothing, and whatever would make the host wait for a GPU is noted.

A GPU is waited for where a value is read from it, where a tensor is made on it from numbers, and where a tensor is copied
to it that is not pinned, or not with `non_blocking`. torch.cuda.set_sync_debug_mode finds the same on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("meta")
READS = {
    "item": 0.0,
    "tolist": [],
    "numpy": None,
    "nonzero": None,
    "is_nonzero": False,
    "__float__": 0.0,
    "__int__": 0,
    "__bool__": False,
    "__index__": 0,
}
MAKES = {"tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor"}


def on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


class Waits(TorchFunctionMode):
    """Within it, `found` names every call for which the host would wait; pinning is pretended too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: set[int] = set()  # addresses of memory

    def pin(self, value: torch.Tensor) -> torch.Tensor:
        self.pinned.add(value.untyped_storage().data_ptr())
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        first = args[0] if args else None
        if name == "pin_memory":
            return self.pin(first.clone())
        pin = kwargs.pop("pin_memory", False)
        if on_device(first) and name in READS:
            self.found.append(name)
            return READS[name]
        if on_device(first) and (name == "cpu" or (name == "to" and torch.device("cpu") in map(as_device, args[1:]))):
            self.found.append(name)
            return torch.zeros(first.shape, dtype=first.dtype)
        if name == "copy_" and on_device(args[1]) and not on_device(first):
            waits = kwargs.get("non_blocking") is not True or not self.is_pinned(first)
            self.found += [f"copy to {list(first.shape)}"] * waits
            return first
        made = func(*args, **kwargs)
        if pin:
            self.pin(made)
        if name in MAKES and on_device(made):
            self.found.append(name)
        source = {"to": first, "cuda": first, "copy_": args[1] if len(args) > 1 else None}.get(name)
        if on_device(made) and isinstance(source, torch.Tensor) and not source.is_meta:
            waits = kwargs.get("non_blocking") is not True or not self.is_pinned(source)
            self.found += [f"{name} of {list(source.shape)}"] * waits
        if name in ("__getitem__", "__setitem__") and on_device(first):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            copied = any(isinstance(i, list) or (isinstance(i, torch.Tensor) and not i.is_meta) for i in index)
            self.found += [name] * copied
        return made

    def is_pinned(self, value: torch.Tensor) -> bool:
        return not value.numel() or value.untyped_storage().data_ptr() in self.pinned


def as_device(value: Any) -> Any:
    return torch.device(value) if isinstance(value, str) else value
