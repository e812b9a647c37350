"""Models by timm: how they are built, what pictures they expect, which sizes they take."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm.data
import torch
from timm.models import register_model, resnet
from torch import nn

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError, first_line, unknown
from fixres_dist.config.schema import Data
from fixres_dist.data import geometry

DROP_PATH = "built_with_drop_path"  # a model's attribute: for builds of it for other sizes
CROP_MODES = {"center": "shorter", "squash": "both", "border": "longer"}  # timm's -> the side that is scaled


@dataclass(frozen=True)
class Preprocessing:
    """How the weights expect pictures, from timm's pretrained_cfg: AdvProp weights want mean and std 0.5, others ImageNet's."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    interpolation: str  # one of geometry.INTERPOLATIONS
    train_res: int = 224  # resolution that the weights were trained at, in pixels
    crop_mode: str = "center"  # a key of CROP_MODES
    test_res: int | None = None  # resolution that timm tests the weights at, where that is another one
    test_crop_pct: float | None = None  # crop_pct of that test

    def crop_pct_at(self, data: Data, res: int) -> float:
        """The side of a crop of `res` px over that of the scaled photograph under the settings `data`.

        The rule `timm`, as timm evaluates the weights: test_crop_pct, where there is one, above their own resolution (or
        at any, where timm names no larger one to test at), else crop_pct.
        """
        if data.crop_pct != "auto":
            return data.crop_pct
        tested = res > self.train_res or (self.test_res or 0) <= self.train_res
        own = self.test_crop_pct if self.test_crop_pct and tested else self.crop_pct
        return geometry.RULES[data.resize_rule].crop_pct or own

    def resize(self, data: Data, res: int) -> geometry.Resize:
        """How a photograph is scaled for pictures of `res` px under the settings `data`."""
        side = CROP_MODES[self.crop_mode]
        red, green, blue = (round(255 * value) for value in self.mean) if side == "longer" else geometry.BLACK
        found = geometry.resize_of(data.resize_rule, res, 1.0, self.interpolation, side, (red, green, blue))
        return found._replace(size=math.floor(res / self.crop_pct_at(data, res)))

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """fp32 [n, 3, h, w] of uint8 [n, 3, h, w]: minus the mean, over the standard deviation; keeps the memory format."""
        x = images.float()
        mean, std = (constant(v, x.device) for v in (self.mean, self.std))
        if x.is_contiguous():
            return x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
        # A CPU loops over the last dimension in memory, and three channels are too few for that: rows of [n, h, w * 3].
        rows, width = x.permute(0, 2, 3, 1).flatten(2), x.shape[3]
        rows.sub_(mean.repeat(width)).div_(std.repeat(width))
        return rows.view(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """255 times `values`, made once: the host waits for a device whenever it makes a tensor there from numbers."""
    return 255 * torch.tensor(values, device=device)


def pretrained_cfg(timm_name: str) -> Any:
    """timm's description of the weights; None for an architecture without any.

    Raises UserError for an unknown tag, and for a model of the hub that neither cache nor hub can describe.
    """
    if ":" in timm_name:
        return timm.models.PretrainedCfg(**from_elsewhere(timm_name))
    try:
        return timm.get_pretrained_cfg(timm_name)
    except RuntimeError:
        architecture, _, tag = timm_name.partition(".")
        tags = [name.partition(".")[2] for name in timm.list_pretrained(architecture)]
        raise unknown(f"weights tag of {architecture}", tag, tags) from None


def from_elsewhere(timm_name: str) -> dict[str, Any]:
    """The config.json of hf-hub:OWNER/NAME or local-dir:FOLDER as timm reads it; raises UserError where it cannot."""
    try:
        found: dict[str, Any] = timm.models.resolve_model_input_args(timm_name)["pretrained_cfg"]
    except Exception as error:  # the hub client raises a dozen kinds, from DNS to HTTP status
        raise UserError(
            f"{timm_name} cannot be read ({type(error).__name__}: {first_line(error)}). Accepted: a model in timm's form, in "
            f"the cache of the hub or within reach. Next, on a machine with network: {command('fetch', '--model', timm_name)}"
        ) from None
    return found


def preprocessing(timm_name: str) -> Preprocessing:
    """Of the weights that timm knows by this name; timm's defaults for an architecture without weights."""
    cfg = pretrained_cfg(timm_name)
    found = timm.data.resolve_data_config(pretrained_cfg=(cfg or timm.models.PretrainedCfg()).to_dict())
    if (channels := found["input_size"][0]) != 3:
        raise UserError(
            f"{timm_name} takes pictures of {channels} channels; accepted: models of RGB pictures (3 channels)."
        )
    for what, accepted in (("interpolation", geometry.INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if found[what] not in accepted:
            raise unknown(f"{what} in timm's settings of {timm_name}", found[what], accepted)
    return Preprocessing(
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        crop_pct=found["crop_pct"],
        interpolation=found["interpolation"],
        train_res=min(found["input_size"][1:]),
        crop_mode=found["crop_mode"],
        test_res=min(cfg.test_input_size[1:]) if cfg and cfg.test_input_size else None,
        test_crop_pct=cfg.test_crop_pct if cfg else None,
    )


# timm has weights for the largest ResNeXt of the FixRes paper's Figure 1 (arXiv 1906.06423) and no builder for them; its
# old alias builds 32x8d instead.
default_cfgs = {"resnext101_32x48d": resnet.default_cfgs["resnext101_32x48d"]}


@register_model  # type: ignore[untyped-decorator, unused-ignore]
def resnext101_32x48d(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNeXt-101 32x48d (WSL): 829 M parameters, 224 px; FixRes fixes it at 320."""
    sizes = {"block": resnet.Bottleneck, "layers": (3, 4, 23, 3), "cardinality": 32, "base_width": 48}
    model: nn.Module = resnet._create_resnet("resnext101_32x48d", pretrained, **{**sizes, **options})
    return model


def build_model(timm_name: str, num_classes: int, seed: int = 0, drop_path: float = 0.0) -> nn.Module:
    """The model with new weights drawn from `seed`, in eval mode; raises UserError for a name timm does not know.

    A model that timm marks as of fixed input size is built to take others where its class can: a ViT then keeps the
    position embedding of its own grid and resamples it in each forward pass. `drop_path`: rate of stochastic depth in the
    last block, growing over the blocks as timm has it; UserError for a model without.
    """

    def create(**options: bool) -> nn.Module:
        rate = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            model: nn.Module = timm.create_model(
                timm_name, pretrained=False, num_classes=num_classes, **options, **rate
            )
        except TypeError as error:
            if not rate or (options and "drop_path_rate" not in str(error)):
                raise
            raise UserError(
                f"pretrain.drop_path={drop_path:g}: {timm_name} has no stochastic depth. Next: pretrain.drop_path=0"
            ) from None
        setattr(model, DROP_PATH, drop_path)
        return model.eval()

    cfg = pretrained_cfg(timm_name) if ":" in timm_name or timm.is_model(timm_name) else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return create(dynamic_img_size=True) if cfg is not None and cfg.fixed_input_size else create()
        except TypeError:  # the class has no such option: it takes one size only
            return create()
        except RuntimeError as error:
            raise UserError(f"timm cannot build {timm_name!r}: {error}") from None


def own_size(model: nn.Module) -> int:
    """The model's own resolution in pixels, at least 64: a forward pass is sure to take it.

    Where patches of 14 px do not fill SigLIP's 384 px, timm crops; a model of any size (dynamic_img_size) wants whole ones.
    """
    size = max(64, int(timm.models.get_model_input_config(model)["input_size"][-1]))
    ratio = getattr(getattr(model, "patch_embed", None), "feat_ratio", lambda: 1)
    return size - (size % int(ratio()) if getattr(model, "dynamic_img_size", False) else 0)


def small_size(model: nn.Module) -> int:
    """The pixels of a cheap forward pass: 64, or the model's own resolution where that is fixed or 64 is too small."""
    fixed = (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size")
    return own_size(model) if fixed or not accepts(model, 64) else 64


def copied(model: nn.Module, device: str = "") -> nn.Module:
    """A copy of the layers of `model` in eval mode that shares its tensors, or has them without values on `device="meta"`.

    Layers that keep a tensor of a forward pass (a rotary embedding's table, say) keep it in the copy.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if device:
        plain = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
        tensors = {id(t): t.detach().to(device) for t in (*tensors.values(), *plain)}
        tensors |= {id(p): nn.Parameter(tensors[id(p)], requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, dict[int, Any](tensors)).eval()


def meta_forward(model: nn.Module, count: int, res: int) -> Any:
    """The output of `model` for `count` pictures of `res` px on the meta device: shapes without values, nothing computed."""
    with torch.no_grad(), torch.device("meta"):
        return copied(model, "meta")(torch.zeros(count, 3, res, res))


def accepts(model: nn.Module, res: int) -> bool:
    try:
        meta_forward(model, 1, res)
    except Exception:  # layers raise what they like where a size does not fit: from AssertionError to ZeroDivisionError
        return False
    return True


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier layers among the model's modules, by timm's get_classifier and `classifier` of pretrained_cfg.

    More than one where a model was distilled (DeiT, LeViT: timm averages their logits in tests), has branches (CrossViT) or
    classifies its tokens too (VOLO's aux_head, which only pretrained_cfg names). Raises UserError where there is none.
    """

    def each(found: Any) -> list[Any]:
        several = isinstance(found, (tuple, list, nn.ModuleList))
        return [layer for one in found for layer in each(one)] if several else [found]

    layers = each(getattr(model, "get_classifier", lambda: None)())
    names = {module: name for name, module in model.named_modules()}
    if not all(layer in names and not isinstance(layer, nn.Identity) for layer in layers):
        raise UserError(
            f"{type(model).__name__} has no classifier layer, and timm cannot give it one. Next: a model that classifies; "
            f"timm.list_models() names them"
        )
    found = tuple(names[layer] for layer in layers)
    listed = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    more = listed if isinstance(listed, tuple | list) else ()
    known = {name.partition(".")[0] for name in found}
    return (*found, *(name for name in more if name in names.values() and name.partition(".")[0] not in known))
