"""Number formats of the part that autograd does not touch; the head and the loss are always fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(setting: str, device: torch.device) -> str:
    """`auto`: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU."""
    if setting != "auto":
        return setting
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def apply(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Set the matmul and convolution modes, and return the context in which low-precision work runs."""
    # By the older names: torch.export reads them, and torch 2.15 refuses that once `fp32_precision` is set for convolutions.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision in DTYPES:
        return lambda: torch.autocast(device.type, DTYPES[precision])
    return contextlib.nullcontext
