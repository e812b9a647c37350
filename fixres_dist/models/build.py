"""Models through timm: build, preprocessing, and weights that cover the model completely or are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import timm.layers
import torch
from timm.models import register_model, resnet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fixres_dist.base.errors import UserError, unknown


@dataclass(frozen=True)
class Preprocessing:
    """From timm's pretrained_cfg, never a constant: AdvProp weights want mean and std 0.5, Noisy Student ImageNet's."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    interpolation: str  # bilinear | bicubic

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] to fp32, less the mean and over the standard deviation; the layout in memory stays."""
        x = images.float()
        mean, std = (255 * torch.tensor(v, device=x.device) for v in (self.mean, self.std))
        if x.is_contiguous():
            return x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
        # A CPU walks the last dimension in memory: by rows [n, h, w * 3], since three channels are too short a walk.
        rows, width = x.permute(0, 2, 3, 1).flatten(2), x.shape[3]
        rows.sub_(mean.repeat(width)).div_(std.repeat(width))
        return rows.view(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2)


def pretrained_cfg(timm_name: str) -> Any:
    """timm's configuration of the weights; None for an architecture without any, such as one made for tests."""
    try:
        return timm.get_pretrained_cfg(timm_name)
    except RuntimeError:
        architecture, _, tag = timm_name.partition(".")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
        raise unknown(f"weights tag of {architecture}", tag, tags) from None


def preprocessing(timm_name: str) -> Preprocessing:
    cfg = pretrained_cfg(timm_name)
    if cfg is None:
        return Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, "bicubic")
    mode = cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bicubic"
    return Preprocessing(tuple(cfg.mean), tuple(cfg.std), cfg.crop_pct, mode)


def native_size(timm_name: str) -> int:
    """The resolution that timm's weights were trained at, in pixels."""
    cfg = pretrained_cfg(timm_name)
    return int(cfg.input_size[-1]) if cfg else 224


# timm has weights for the largest ResNeXt of the paper's Figure 1 and no builder; its old alias builds 32x8d instead.
default_cfgs = {"resnext101_32x48d": resnet.default_cfgs["resnext101_32x48d"]}


@register_model
def resnext101_32x48d(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNeXt-101 32x48d (WSL): 829 M parameters, 224 px; FixRes fixes it at 320."""
    sizes = {"block": resnet.Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 48}
    return resnet._create_resnet("resnext101_32x48d", pretrained, **{**sizes, **options})


def build_model(timm_name: str, num_classes: int, seed: int = 0) -> nn.Module:
    """The model with new weights drawn from `seed`, in eval mode; raises UserError for a name timm does not know.

    A model that timm marks as of fixed input size is built to take others where its class can: a ViT then keeps the
    position embedding of its own grid and resamples it in each forward pass.
    """
    cfg = pretrained_cfg(timm_name) if timm.is_model(timm_name) else None
    dynamic = {"dynamic_img_size": True} if cfg is not None and cfg.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for options in (dynamic, {}):
            try:
                return timm.create_model(timm_name, pretrained=False, num_classes=num_classes, **options).eval()
            except TypeError:  # its class knows no other size than its own
                if not options:
                    raise
            except RuntimeError as error:
                raise UserError(f"timm cannot build {timm_name!r}: {error}") from None
    raise AssertionError("unreachable")


def own_size(model: nn.Module) -> int:
    """Pixels that a forward pass is sure to take: the model's own resolution."""
    return max(64, (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-1])


def small_size(model: nn.Module) -> int:
    """Few pixels that a forward pass takes, where values are needed: 64, or the model's own where it has no choice."""
    fixed = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size", False)
    return own_size(model) if fixed else 64


def meta_forward(model: nn.Module, count: int, res: int) -> Any:
    """What `model` returns for `count` pictures of `res` px, in shapes alone: on the meta device, nothing is computed."""
    state = {name: value.to("meta") for name, value in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        return torch.func.functional_call(model, state, (torch.zeros(count, 3, res, res, device="meta"),))


def gmacs(model: nn.Module, res: int) -> float:
    """Multiply-adds in 1e9 of one picture's forward pass: convolutions and matrix products, counted on the meta device."""
    with FlopCounterMode(display=False) as counter:
        meta_forward(model, 1, res)
    return counter.get_total_flops() / 2e9


def accepts(model: nn.Module, res: int) -> bool:
    try:
        meta_forward(model, 1, res)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def check_resolutions(model: nn.Module, resolutions: Iterable[int]) -> None:
    """Refuse a resolution that the model cannot take (no multiple of a patch, a fixed input size), and say what it can."""
    for res in sorted(set(resolutions)):
        if accepts(model, res):
            continue
        near = sorted((r for r in range(max(32, res - 64), res + 65) if r != res), key=lambda r: (abs(r - res), -r))
        found = next((r for r in near if accepts(model, r)), None) or own_size(model)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        why = f"its patches are {patch[0]} px" if patch and res % patch[0] else "its input size cannot change freely"
        raise UserError(
            f"{type(model).__name__} cannot take {res} px: {why}. Accepted near it: {found}. Next: --res {found}"
        )


def classifier_name(model: nn.Module) -> str:
    """Qualified name of the classifier layer, by timm's get_classifier."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.Identity):
        raise UserError(f"{type(model).__name__} has no single classifier layer to tune.")
    return next(name for name, module in model.named_modules() if module is classifier)
