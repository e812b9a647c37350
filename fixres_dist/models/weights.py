"""A model with its weights: read from a file or timm, checked, filled in completely or refused, written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import safetensors
import timm
import timm.layers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError, first_line
from fixres_dist.base.files import whole
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.models.build import build_model, check_resolutions, classifier_name, pretrained_cfg


def open_model(config: Config, classes: int, with_weights: bool = True) -> nn.Module:
    """The configured model for `classes` classes, in eval mode on the CPU, with the weights that model.weights names.

    Without `with_weights` they are those drawn from run.seed. Under `torch.device("meta")` weights are checked, not loaded.
    Raises UserError for an unknown name, a resolution that the model cannot take, and weights that do not fit.
    """
    model = build_model(config.model.timm_name, classes, config.run.seed)
    check_resolutions(model, config.resolutions())
    if with_weights:
        load_weights(model, config.model.timm_name, config.model.weights, new_classifier=config.pretrain is not None)
    return model


def load_weights(model: nn.Module, timm_name: str, weights: str, new_classifier: bool) -> None:
    """Fill `model` with `weights` (ns | ap | pretrained | none | a file); raises UserError where they do not fit.

    `new_classifier`: weights for another number of classes fit too, and the model keeps its new classifier for stage one
    to train. A model on the meta device is checked only, and nothing is downloaded for it.
    """
    if weights == "none":
        return
    meta, of_timm = next(model.parameters()).is_meta, weights in recipes.TIMM_WEIGHTS
    state = hub_state(timm_name, meta) if of_timm else read_state(Path(weights))
    state = {name: value.to("meta") for name, value in state.items()} if meta else state
    fill(model, resampled(model, state), f"timm's {timm_name}" if of_timm else weights, new_classifier)


def resampled(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with a ViT's position embedding [1, tokens, width] resampled to the model's grid, if that is another one."""
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or own.shape == given.shape or own.shape[::2] != given.shape[::2]:
        return state
    grid, prefix = model.patch_embed.grid_size, getattr(model, "num_prefix_tokens", 0)  # type: ignore[union-attr]
    embedded = timm.layers.resample_abs_pos_embed(given, grid, num_prefix_tokens=prefix)
    return {**state, "pos_embed": embedded}


def hub_state(timm_name: str, meta: bool = False) -> dict[str, torch.Tensor]:
    """timm's pretrained weights from the local cache or the hub; `meta`: their shapes, without a download.

    Raises UserError if timm has none, or if neither cache nor hub can give them; that message names `fetch`.
    """
    if pretrained_cfg(timm_name) is None or not timm.is_model_pretrained(timm_name):
        raise UserError(f"timm has no pretrained weights for {timm_name!r}. Accepted: --weights none, or a file.")
    try:
        with torch.device("meta") if meta else contextlib.nullcontext():
            state: dict[str, torch.Tensor] = timm.create_model(timm_name, pretrained=not meta).state_dict()
    except Exception as error:  # the hub client raises a dozen kinds, from DNS to HTTP status
        where = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"the weights of {timm_name} are not in {where} and the hub cannot be reached ({type(error).__name__}). "
            f"On a machine with network: {command('fetch', '--model', timm_name)}; then share that folder "
            "and set HF_HOME to it (cluster.env='{HF_HOME: DIR}')."
        ) from error
    return state


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file, or in a torch file that holds nothing but tensors, on the CPU.

    Raises UserError for a missing or torn file and for pickled code, which is never run.
    """
    if not path.is_file():
        raise recipes.no_weights(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
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


def fill(model: nn.Module, state: dict[str, torch.Tensor], origin: str, new_classifier: bool = False) -> None:
    """Load `state` if it has every tensor of `model` in its shape and no other; else UserError lists what differs.

    `origin`: where `state` is from, for the message. `new_classifier`: as in load_weights.
    """
    optional = "num_batches_tracked"  # counters that nothing reads; some converters leave them out
    own = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(optional)}
    differ = {name: f"{name} is missing" for name in own if name not in state}
    differ |= {
        name: f"{name} is {list(state[name].shape)}, the model wants {list(shape)}"
        for name, shape in own.items()
        if name in state and state[name].shape != shape
    }
    differ |= {n: f"{n} is not in the model" for n in state if n not in own and not n.endswith(optional)}
    layer = classifier_name(model)
    classifier = {f"{layer}.{name}" for name in model.get_submodule(layer).state_dict()}
    if differ and differ.keys() <= classifier <= state.keys():
        given, wanted = len(state[min(classifier)]), own[min(classifier)][0]
        recipes.check_classes(origin, given, wanted, new_classifier)
        if given != wanted:
            state, differ = {name: value for name, value in state.items() if name not in classifier}, {}
    if differ:
        listed = "; ".join([*differ.values()][:4]) + (f"; and {len(differ) - 4} more" if len(differ) > 4 else "")
        raise UserError(
            f"{origin} does not fit {type(model).__name__} ({len(own)} tensors, {len(differ)} differ): {listed}."
        )
    model.load_state_dict(state, strict=False)


def state_digest(tensors: dict[str, torch.Tensor]) -> str:
    """16 hex digits of the names' and values' SHA-256, whatever the order and the memory format."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def write_weights(model: nn.Module, file: Path, config: Config, res: int) -> None:
    """Write the model's state dict, whole or not at all; `timm.create_model(name, num_classes=N, checkpoint_path=file)` reads it.

    safetensors with the model and its resolution in the header, or for `.pth` what torch.save writes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with whole(file) as part:
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors makes its files private
        if file.suffix == ".pth":
            with part.open("wb") as stream:  # given a name, torch.save hides what the system said
                torch.save(state, stream)
        else:
            meta = {
                "timm_name": config.model.timm_name,
                "res": str(res),
                "model": json.dumps(asdict(config.model)),
            }
            save_file(state, part, {**meta, "format": "pt"})
        part.chmod(mode)
