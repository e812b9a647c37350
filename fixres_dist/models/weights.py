"""A model with its weights: read from a file or timm, checked, filled in completely or refused, written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import timm
import timm.layers
import torch
from torch import nn

from fixres_dist.base.errors import UserError, printable
from fixres_dist.base.files import whole
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import class_names
from fixres_dist.models import sources, state_dicts, tensor_files
from fixres_dist.models.build import build_model, classifiers
from fixres_dist.models.resizing import check_resolutions, for_size

# timm's names for what turns a state dict of an older version, or of the model's authors, into this version's.
FILTERS = ("checkpoint_filter_fn", "_filter_fn", "pretrained_filter_fn", "_filter_torchvision_pretrained")


def open_model(
    config: Config, classes: Sequence[str], with_weights: bool = True, say: Callable[[str], None] = print
) -> nn.Module:
    """The configured model for the classes of these names, in eval mode on the CPU, with the weights of model.weights.

    Without `with_weights` they are those drawn from run.seed. Under `torch.device("meta")` weights are checked, not loaded.
    `say` is told what was decided about a file that left a choice. Raises UserError for an unknown name, a resolution that
    the model cannot take, and weights that do not fit.
    """
    drop_path = config.pretrain.drop_path if config.pretrain else 0.0
    model = build_model(config.model.timm_name, len(classes), config.run.seed, drop_path)
    check_resolutions(model, config.resolutions())
    model = for_size(model, config.resolutions()[0])
    if with_weights and (notes := load_weights(model, config, classes)):
        say(printable(f"{config.model.weights}: {'; '.join(notes)}"))
    return model


def load_weights(model: nn.Module, config: Config, names: Sequence[str] = ()) -> list[str]:
    """Fill `model` with model.weights (ns | ap | pretrained | none | a file); raises UserError where they do not fit.

    With a stage one, weights for another number of classes fit too, and the model keeps its new classifier for that stage
    to train. A model on the meta device is checked only, and nothing is downloaded for it. Returns what was decided about
    a file that left a choice, a phrase each.
    """
    timm_name, weights, new_classifier = config.model.timm_name, config.model.weights, config.pretrain is not None
    if weights == "none":
        return []
    meta, notes = next(model.parameters()).is_meta, []
    if weights in recipes.TIMM_WEIGHTS:
        origin, state = f"timm's {timm_name}", sources.hub_state(timm_name, meta)
        classes = sources.hub_classes(timm_name)
    else:
        origin, file = weights, sources.read_file(Path(weights))
        chosen = state_dicts.choose(file.loaded, list(model.state_dict()), config.model.checkpoint_key, origin)
        state, classes, notes = chosen.state, file.classes, [*chosen.notes]
        if other := of_another(file.architecture, timm_name):
            notes.append(
                f"warning: it says that it is of {other}, which may compute something else with the same tensors than "
                f"{timm_name}. Next, to be sure: --model {other}"
            )
        if kinds := {str(v.dtype)[6:] for v in state.values() if v.is_floating_point() and v.dtype != torch.float32}:
            notes.append(f"converted from {', '.join(sorted(kinds))} to float32")
        by_timm = class_names.natural(names)
        if not (classes or new_classifier or config.data.class_map) and list(names) != by_timm:
            notes.append(
                f"warning: it does not name its classes, which are taken in torchvision's order of the folders "
                f"({', '.join(names[:3])}, ..); if timm's script trained it ({', '.join(by_timm[:3])}, ..): data.class_map=natural"
            )
    state = {name: value.to("meta") for name, value in state.items()} if meta else state
    state, ordered = in_order(model, fitted(model, state), classes, names, origin, new_classifier)
    fill(model, state, origin, new_classifier)
    return notes + ordered


def of_another(named: str, timm_name: str) -> str:
    """The architecture that a weights file names, where that is none of the model's; tags of weights do not count."""
    architecture = named.partition(".")[0]
    return architecture if timm.is_model(architecture) and architecture != timm_name.partition(".")[0] else ""


def fitted(model: nn.Module, state: state_dicts.State) -> state_dicts.State:
    """`state` for the size that the model is built for, where it is of another one."""
    return resampled(model, timms_names(model, state))


def timms_names(model: nn.Module, state: state_dicts.State) -> state_dicts.State:
    """`state` with the names and shapes of this timm version where older ones had others: by timm's own filter."""
    own = {name: value.shape for name, value in model.state_dict().items()}
    misfits = sum(n not in state or state[n].shape != shape for n, shape in own.items())
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture", "")
    if not misfits or not timm.is_model(architecture):
        return state
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    found = next((getattr(module, name) for name in FILTERS if hasattr(module, name)), None)
    if found is None:
        return state
    try:
        filtered = found(dict(state), model)
        fewer = sum(n not in filtered or filtered[n].shape != shape for n, shape in own.items()) < misfits
    except Exception:  # it was written for files of known makers; this one is refused by its names and shapes then
        return state
    return filtered if fewer else state


def in_order(
    model: nn.Module, state: state_dicts.State, given: Sequence[str], names: Sequence[str], origin: str, new: bool
) -> tuple[state_dicts.State, list[str]]:
    """`state` with the classifier's rows of the classes `given` in the order of `names`, and what was done.

    Raises UserError where as many classes have other names, unless a `new` classifier is trained: that is kept then.
    """
    if given and names and len(given) > len(names) and set(names) < set(given) and not new:
        file = origin if origin.endswith(".safetensors") else "FILE"
        raise UserError(
            f"{origin} classifies {len(given)} classes, among them the {len(names)} of the data set. Next: data.class_map={file}, "
            "which keeps all of them, or --preset own_classes for a new classifier of these alone"
        )
    if list(given) == list(names) or len(given) != len(names):
        return state, []
    if set(given) != set(names) and (class_names.unnamed(given) or class_names.unnamed(names)):
        return state, []
    rows = {n: v for n, v in classifier_tensors(model).items() if n in state and len(state[n]) == len(given)}
    if set(given) == set(names):
        order = torch.tensor([{name: row for row, name in enumerate(given)}[name] for name in names])
        return {**state, **{n: state[n][order] for n in rows}}, ["its classes stand in another order: mapped by name"]
    if new:
        return {**state, **rows}, ["its classes have other names: the new classifier is kept for stage one"]
    differ = [(a, b) for a, b in zip(sorted({*given} - {*names}), sorted({*names} - {*given}), strict=False)]
    listed = ", ".join(f"{a!r} against {b!r}" for a, b in differ[:3])
    raise UserError(
        f"{origin} classifies other classes than the data set: {listed} ({len(differ)} of {len(names)} names differ). "
        "Next: data.class_map=FILE (or imagenet), which gives each folder its class, or --preset own_classes for a new classifier"
    )


def resampled(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with a ViT's position embedding [1, tokens, width] resampled to the model's grid, if that is another one."""
    own, given = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or given is None or own.shape == given.shape or own.shape[::2] != given.shape[::2]:
        return state
    grid, prefix = model.patch_embed.grid_size, getattr(model, "num_prefix_tokens", 0)  # type: ignore[union-attr]
    embedded = timm.layers.resample_abs_pos_embed(given, grid, num_prefix_tokens=prefix)
    return {**state, "pos_embed": embedded}


def read_state(path: Path) -> state_dicts.State:
    """A whole model that this program has written: the tensors of a safetensors file, on the CPU. Raises UserError."""
    return dict(sources.read_file(path).loaded)


def classifier_tensors(model: nn.Module) -> state_dicts.State:
    """The tensors of the classifier, or of both of a distilled model, by their names in the model."""
    return {
        f"{layer}.{name}": value
        for layer in classifiers(model)
        for name, value in model.get_submodule(layer).state_dict().items()
    }


def fill(model: nn.Module, state: dict[str, torch.Tensor], origin: str, new_classifier: bool = False) -> None:
    """Load `state` if it has every tensor of `model` in its shape and no other; else UserError lists what differs.

    `origin`: where `state` is from, for the message. `new_classifier`: as in load_weights.
    """
    check_scheme(model, state, origin)
    optional = "num_batches_tracked"  # counters that nothing reads; some converters leave them out
    own = {name: value.shape for name, value in model.state_dict().items() if not name.endswith(optional)}
    differ = {name: f"{name} is missing" for name in own if name not in state}
    differ |= {
        name: f"{name} is {list(state[name].shape)}, the model wants {list(shape)}"
        for name, shape in own.items()
        if name in state and state[name].shape != shape
    }
    differ |= {n: f"{n} is {state[n].dtype}, quantised" for n in own if n in state and quantised(state[n])}
    differ |= {n: f"{n} is not in the model" for n in state if n not in own and not n.endswith(optional)}
    classifier = set(classifier_tensors(model))
    if differ and differ.keys() <= classifier and of_other_classes(differ.keys(), state, own):
        given = 0 if classifier.isdisjoint(state) else len(state[min(differ)])
        recipes.check_classes(origin, given, own[min(differ)][0], new_classifier)
        state, differ = {name: value for name, value in state.items() if name not in differ}, {}
    if differ:
        listed = "; ".join([*differ.values()][:4]) + (f"; and {len(differ) - 4} more" if len(differ) > 4 else "")
        raise UserError(
            f"{origin} does not fit {type(model).__name__} ({len(own)} tensors, {len(differ)} differ): {listed}. "
            "Next: --model by the name of the weights' own architecture, or a file of this model's state dict alone"
        )
    model.load_state_dict(state, strict=False)


def of_other_classes(names: Iterable[str], state: dict[str, torch.Tensor], own: Mapping[str, torch.Size]) -> bool:
    """Whether the tensors `names` differ from the model's `own` shapes in the number of classes alone, or are all missing."""
    given = [state[name].shape if name in state else None for name in names]
    wanted = [own.get(name) for name in names]
    if given.count(None) == len(given):
        return True
    pairs = [(a, b) for a, b in zip(given, wanted, strict=True) if a is not None and b is not None]
    return len(pairs) == len(given) and all(a[:1] != b[:1] and a[1:] == b[1:] for a, b in pairs)


def quantised(value: torch.Tensor) -> bool:
    return value.is_quantized or value.dtype in (torch.int8, torch.uint8)


def check_scheme(model: nn.Module, state: state_dicts.State, origin: str) -> None:
    """Raise UserError for weights whose names come from another implementation: one of each shows how they differ."""
    own = model.state_dict()
    if not state or 10 * len(own.keys() & state.keys()) >= len(own):
        return
    shown = [f"{name!r} {list(value.shape)}" for name, value in (next(iter(s.items())) for s in (state, own))]
    raise UserError(
        f"{origin} does not fit {type(model).__name__}: {next(n for n in own if n not in state)} is missing, as are nearly "
        f"all: it names its {len(state)} tensors in another way. Its first is {shown[0]}, the model's {shown[1]}. "
        "Accepted: timm's names. Next: --model by the name of the weights' own architecture, or rename the tensors to the model's"
    )


def state_digest(tensors: dict[str, torch.Tensor]) -> str:
    """16 hex digits of the names' and values' SHA-256, whatever the order and the memory format."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def write_weights(model: nn.Module, file: Path, config: Config, res: int, classes: Sequence[str]) -> None:
    """Write the model's state dict, whole or not at all; `timm.create_model(name, num_classes=N, checkpoint_path=file)` reads it.

    safetensors with the model, its resolution and its `classes` in the header, or for `.pth` what torch.save writes.
    """
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".pth":
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        with whole(file) as part, part.open("wb") as stream:  # given a name, torch.save hides what the system said
            torch.save(state, stream)
        return
    meta = {
        "timm_name": config.model.timm_name,
        "res": str(res),
        "model": json.dumps({**asdict(config.model), "weights": Path(config.model.weights).name}),
        class_names.NAMES: json.dumps(list(classes)),
    }
    write_tensors(model, file, list(model.state_dict()), meta)


def write_tensors(model: nn.Module, file: Path, names: Iterable[str], meta: Mapping[str, str] | None = None) -> None:
    """Write the tensors `names` of the model's state dict as safetensors, whole or not at all."""
    state = model.state_dict()
    with whole(file) as part:
        tensors = {name: state[name].detach().cpu().contiguous() for name in names}
        tensor_files.save(part, tensors, meta)
