"""The sizes that a model takes: as it is, or built by timm for another one; and what a size costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from timm.models.mvitv2 import MultiScaleVit
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fixres_dist.base.errors import UserError
from fixres_dist.models.build import DROP_PATH, accepts, copied, meta_forward, own_size

REACH = 128  # pixels around a refused size in which accepted ones are looked for


def for_size(model: nn.Module, res: int) -> nn.Module:
    """`model` itself where it takes pictures of `res` px as it is; else timm's build of it for that size, in eval mode.

    For models with tables of one size (BEiT's and CoAtNet's relative positions, MaxViT's windows): timm resamples the
    weights for the new one (`img_size`), as when it loads pretrained weights. Raises UserError where it cannot.
    """
    # MViT reads its tables by computed indices: the meta device does not see one beyond the end.
    if res == own_size(model) or (accepts(model, res) and not isinstance(model, MultiScaleVit)):
        return model
    try:
        built = built_for(model, res)
    except Exception:  # what classes and their filters raise for a size that they cannot have
        raise refusal(model, res) from None
    if not accepts(built, res):
        raise refusal(model, res)
    return built


def built_for(model: nn.Module, res: int) -> nn.Module:
    """timm's build of `model` for `res` px, on its device, with its weights resampled where their shapes differ."""
    own: Any = model
    first = next(model.parameters())
    device = torch.device("meta" if first.is_meta else "cpu")
    state = {name: value.detach().to(device) for name, value in model.state_dict().items()}
    source = {
        "state_dict": state,
        "source": "",
        "custom_load": False,
        "label_offset": 0,
        "num_classes": own.num_classes,
    }
    args = {**timm.models.get_model_args(model), "img_size": (res, res)}
    if rate := getattr(model, DROP_PATH, 0.0):  # which timm leaves out
        args["drop_path_rate"] = rate
    cfg = {**own.pretrained_cfg, **source}
    with torch.random.fork_rng(devices=[]), device:
        built: nn.Module = timm.create_model(cfg["architecture"], pretrained=True, pretrained_cfg=cfg, **args)
    built.pretrained_cfg = own.pretrained_cfg
    setattr(built, DROP_PATH, rate)
    return built.to(first.device).eval()


def takes(model: nn.Module, res: int) -> bool:
    """Whether the model takes `res` px, as it is or built for that size; nothing is computed."""
    try:
        for_size(copied(model, "meta"), res)
    except UserError:
        return False
    return True


def refusal(model: nn.Module, res: int) -> UserError:
    """Why the model cannot take `res` px, and the nearest sizes below and above that it can."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    why = f"its patches are {patch[0]} px" if patch and res % patch[0] else "its input size cannot change freely"
    return UserError(f"{type(model).__name__} cannot take {res} px: {why}.")


def near(res: int, sign: int) -> Iterator[int]:
    """Sizes below (-1) or above (1) `res`: those that most networks take first, multiples of 32 and of patches, then all."""
    every = [res + sign * k for k in range(1, REACH + 1) if res + sign * k >= 32]
    yield from (dict.fromkeys([r for step in (32, 16, 14) for r in every if r % step == 0][:24]))


def check_resolutions(model: nn.Module, resolutions: Iterable[int]) -> None:
    """Raise UserError for a resolution that the model cannot take, with the nearest below and above that it can."""
    for res in sorted(set(resolutions)):
        if takes(model, res):
            continue
        found = [
            next((r for r in sorted(near(res, sign), key=lambda r: abs(r - res)) if takes(model, r)), 0)
            for sign in (-1, 1)
        ]
        sizes = sorted(r for r in found if r) or [own_size(model)]
        first = min(sizes, key=lambda r: (abs(r - res), -r))
        raise UserError(f"{refusal(model, res)} Accepted near it: {' and '.join(map(str, sizes))}. Next: --res {first}")


def gmacs(model: nn.Module, res: int) -> float:
    """1e9 multiply-adds of one picture's forward pass: convolutions and matrix products, counted on the meta device."""
    sized = for_size(copied(model, "meta"), res)  # it tries a forward pass, which is not to be counted
    with FlopCounterMode(display=False) as counter:
        meta_forward(sized, 1, res)
    return float(counter.get_total_flops() / 2e9)


class LargestOutput(TorchFunctionMode):
    """Within it, `elements` is the number of elements of the largest tensor that a torch function has returned."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return found


def largest_batch(model: nn.Module, res: int) -> int:
    """The most pictures of `res` px for which every tensor of a forward pass stays under 2^31 elements; 0: not even one.

    CUDA's kernels for depthwise convolutions count elements in 32 bits and raise a plain RuntimeError beyond that, in any
    number format and with memory to spare. Layers that pad their input are counted with the padding.
    """
    many = 1 << 12  # the largest tensor is then one of the pictures', not of the weights'
    sized, largest = for_size(copied(model, "meta"), res), LargestOutput()
    with largest:
        meta_forward(sized, many, res)
    return (2**31 - 1) * many // largest.elements


def check_batch(model: nn.Module, batch: int, resolutions: Iterable[int]) -> None:
    """Raise UserError where `batch` pictures at one of `resolutions` are more than `largest_batch`."""
    most, res = min((largest_batch(model, res), res) for res in resolutions)
    if batch > most:
        raise UserError(
            f"run.batch_per_device is {batch}: at {res} px a tensor of {type(model).__name__} would have 2^31 elements or "
            f"more, and CUDA's kernels count in 32 bits. Accepted: 1 .. {most}, auto. Next: run.batch_per_device={most}"
        )
