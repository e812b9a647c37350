"""Models through timm: build, preprocessing, and weights that cover the model completely or are refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fixres_dist.errors import UserError


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


def preprocessing(timm_name: str) -> Preprocessing:
    cfg = timm.get_pretrained_cfg(timm_name)
    if cfg is None:  # an architecture without registered weights, such as one made for tests
        return Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, "bicubic")
    mode = cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bicubic"
    return Preprocessing(tuple(cfg.mean), tuple(cfg.std), cfg.crop_pct, mode)


def build(timm_name: str, num_classes: int, seed: int = 0) -> nn.Module:
    """The model with new weights drawn from `seed`, in eval mode; raises UserError for a name timm does not know."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return timm.create_model(timm_name, pretrained=False, num_classes=num_classes).eval()
    except RuntimeError as error:
        raise UserError(f"timm cannot build {timm_name!r}: {error}") from None


def load_weights(model: nn.Module, timm_name: str, weights: str, new_classifier: bool) -> None:
    """Fill `model` with `weights` (ns | ap | pretrained | none | a file).

    `new_classifier`: keep the model's own new classifier where the weights have another number of classes (stage one
    will train it); otherwise that is refused, as everything is that leaves a tensor unfilled.
    """
    if weights == "none":
        return
    if weights in ("ns", "ap", "pretrained"):
        state, origin = hub_state(timm_name), f"timm's weights for {timm_name}"
    else:
        state, origin = read_state(Path(weights)), weights
    fill(model, state, origin, new_classifier)


def hub_state(timm_name: str) -> dict[str, torch.Tensor]:
    """timm's pretrained weights from the local cache or the hub; UserError names `fetch` when neither has them."""
    if timm.get_pretrained_cfg(timm_name) is None or not timm.is_model_pretrained(timm_name):
        raise UserError(f"timm has no pretrained weights for {timm_name!r}. Accepted: --weights none, or a file.")
    try:
        return timm.create_model(timm_name, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises a dozen kinds, from DNS to HTTP status
        where = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"the weights of {timm_name} are not in {where} and the hub cannot be reached ({type(error).__name__}). "
            f"On a machine with network: python -m fixres_dist fetch --model {timm_name}; then share that folder "
            "and set HF_HOME to it (cluster.env='{HF_HOME: DIR}')."
        ) from error


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors, or from a torch file that holds tensors only (pickled code is refused)."""
    if not path.is_file():
        raise UserError(f"no weights file {path}. Accepted: ns, ap, pretrained, none, or a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, safetensors.SafetensorError, ValueError, EOFError) as error:
        raise UserError(f"{path} is no readable weights file: {first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and its like
        raise UserError(f"{path} holds more than tensors and is not opened: {first_line(error)}") from None
    for key in ("state_dict", "model"):  # how training scripts nest it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict; accepted: a mapping of names to tensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def fill(model: nn.Module, state: dict[str, torch.Tensor], origin: str, new_classifier: bool = False) -> None:
    """Load `state` when it covers every tensor of `model` with its shape; otherwise refuse and list what differs."""
    optional = "num_batches_tracked"  # counts nobody reads; some converters leave them out
    own = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(optional)}
    wrong = [
        f"{n} is {list(state[n].shape)}, the model wants {list(s)}"
        for n, s in own.items()
        if n in state and state[n].shape != s
    ]
    missing = [f"{n} is missing" for n in own if n not in state]
    extra = [f"{n} is not in the model" for n in state if n not in own and not n.endswith(optional)]
    names = classifier_tensors(model)
    mismatched = {text.split(" ")[0] for text in wrong}
    if mismatched and mismatched <= names and not missing and not extra:
        if not new_classifier:
            raise UserError(
                f"{origin} classifies {classes_of(state, names)} classes, the data set has {classes_of(model.state_dict(), names)}: "
                "a new classifier has to be trained first. Next: add stage one, for example pretrain.epochs=10 pretrain.base_lr=0.01"
            )
        state = {name: value for name, value in state.items() if name not in names}
    elif differ := missing + wrong + extra:
        listed = "; ".join(differ[:4]) + (f"; and {len(differ) - 4} more" if len(differ) > 4 else "")
        raise UserError(
            f"{origin} does not fit {type(model).__name__} ({len(own)} tensors, {len(differ)} differ): {listed}."
        )
    model.load_state_dict(state, strict=False)


def classifier_name(model: nn.Module) -> str:
    """Qualified name of the classifier layer, by timm's get_classifier."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.Identity):
        raise UserError(f"{type(model).__name__} has no single classifier layer to tune.")
    return next(name for name, module in model.named_modules() if module is classifier)


def classifier_tensors(model: nn.Module) -> set[str]:
    prefix = classifier_name(model)
    return {f"{prefix}.{name}" for name in model.get_submodule(prefix).state_dict()}


def classes_of(state: dict[str, torch.Tensor], names: set[str]) -> int:
    return next(int(state[name].shape[0]) for name in sorted(names) if name in state)


def check_weights(timm_name: str, num_classes: int, weights: str, new_classifier: bool) -> None:
    """Refuse a weights file of another model without allocating the model; nothing to check for the other kinds."""
    if weights not in ("ns", "ap", "pretrained", "none"):
        state = read_state(Path(weights))
        with torch.device("meta"):
            model = timm.create_model(timm_name, pretrained=False, num_classes=num_classes)
        fill(model, {name: value.to("meta") for name, value in state.items()}, weights, new_classifier)
