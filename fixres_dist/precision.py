"""Number formats of the part that autograd does not touch; the head and the loss are always fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(setting: str, device: torch.device) -> str:
    """`auto`: bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if setting != "auto":
        return setting
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def apply(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Set the matmul and convolution modes, and return the context in which low-precision work runs."""
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]
    if precision in DTYPES:
        return lambda: torch.autocast(device.type, DTYPES[precision])
    return contextlib.nullcontext
