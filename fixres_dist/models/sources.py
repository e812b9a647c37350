"""Where weights come from: a file, or timm's from the hub; with the names of their classes where those are known."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.config import recipes
from fixres_dist.data import class_names
from fixres_dist.models import file_kinds, tensor_files
from fixres_dist.models.build import pretrained_cfg
from fixres_dist.models.safe_load import STATE_DICT, load_pickled

CHANGED = (
    "copy or export it again; or, where another program has changed its tensors on purpose, save it there without the "
    "header's `checksum`"
)


@dataclass(frozen=True)
class WeightsFile:
    loaded: Mapping[str, Any]  # tensors by name, or a checkpoint that has them among other things
    classes: tuple[str, ...]  # names in the order of the classifier's rows; empty where the file does not say
    architecture: str = ""  # timm's name of the model that they are of, where the file says


def read_file(path: Path) -> WeightsFile:
    """A safetensors file, or what torch.save wrote; on the CPU. Raises UserError for any other, and what holds code."""
    if not path.is_file():
        raise recipes.no_weights(path)
    if file_kinds.kind_of(path) == "safetensors":
        if re.search(r"-\d{5}-of-\d{5}$", path.stem):
            raise UserError(f"{path} is one of several pieces of a model's weights. {file_kinds.JOIN}.")
        tensors, _ = tensor_files.load(path, CHANGED)
        names = class_names.in_header(path) or class_names.beside(path)
        return WeightsFile(tensors, names, class_names.metadata(path).get("timm_name", ""))
    loaded = load_pickled(path)
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds no state dict but one {type(loaded).__name__}. {STATE_DICT}")
    arch = loaded.get("arch")  # as timm's CheckpointSaver writes it
    names = class_names.in_checkpoint(loaded) or class_names.beside(path)
    return WeightsFile(loaded, names, arch if isinstance(arch, str) else "")


def hub_state(timm_name: str, meta: bool = False) -> dict[str, torch.Tensor]:
    """timm's pretrained weights from the local cache or the hub; `meta`: their shapes, without a download.

    Raises UserError if timm has none, or if neither cache nor hub can give them; that message names `fetch`.
    """
    cfg = pretrained_cfg(timm_name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"timm has no pretrained weights for {timm_name!r}. Accepted: --weights none, or a file.")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # two lines for each of its twelve attempts
    try:
        with torch.device("meta") if meta else contextlib.nullcontext():
            state: dict[str, torch.Tensor] = timm.create_model(timm_name, pretrained=not meta).state_dict()
    except Exception as error:  # the hub client raises a dozen kinds, from DNS to HTTP status
        where = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"the weights of {timm_name} are not in {where} and the hub cannot be reached ({type(error).__name__}). "
            f"On a machine with network: {command('fetch', '--model', timm_name)}; then share that folder "
            "and set HF_HOME to it (cluster.env='{HF_HOME: DIR}'). Or --weights FILE."
        ) from error
    return state


def hub_classes(timm_name: str) -> tuple[str, ...]:
    """The classes of a model of the hub or of a folder, which its config.json names; of timm's own models none are."""
    cfg = pretrained_cfg(timm_name) if ":" in timm_name else None
    return class_names.unique(cfg.label_names or ()) if cfg else ()
