"""The whole model as timm loads it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from fixres_dist import config as cfg


def write_weights(model: nn.Module, file: Path, config: cfg.Config, res: int) -> None:
    """A plain state dict in safetensors, by rename: `timm.create_model(name, num_classes=N, checkpoint_path=file)` reads it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    meta = {"timm_name": config.model.timm_name, "res": str(res), "model": json.dumps(cfg.plain(config)["model"])}
    save_file(state, part, {**meta, "format": "pt"})
    os.replace(part, file)
