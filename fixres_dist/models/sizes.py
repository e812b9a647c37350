"""The resolutions of weights: the one they were trained at, the one timm tests them at, the next one they take.

No torch at import: the default of --res and the plan are told by a table, which configs/write.py has measured.
"""

from __future__ import annotations

import contextlib
import csv
from dataclasses import dataclass
from functools import cache
from typing import Any

from fixres_dist.base.environment import shipped
from fixres_dist.config.recipes import WEIGHTS
from fixres_dist.config.schema import Model


@dataclass(frozen=True)
class Sizes:
    """In pixels; 0: none."""

    train: int  # that the weights were trained at
    test: int  # that timm tests them at
    larger: int = 0  # the default of --res: `test` if it is above `train`, else the next one that the model takes


@cache
def table() -> dict[str, Sizes]:
    """By timm name; of an architecture without a tag those of its default weights, whose row stands first."""
    found: dict[str, Sizes] = {}
    with open(shipped("configs") / "timm_sizes.csv", newline="") as file:
        for name, *values in list(csv.reader(file))[1:]:
            found[name] = Sizes(*map(int, values))
            found.setdefault(name.partition(".")[0], found[name])
    return found


def sizes(timm_name: str) -> Sizes:
    """Of timm's weights of this name; a name that the table does not have is measured, which imports torch.

    Raises UserError for a name or a tag that timm does not know, and for a model of other than RGB pictures.
    """
    return table().get(timm_name) or measured(timm_name)


def enlarged(timm_name: str, factor: float) -> int:
    """`factor` times the weights' own resolution at the model's step, or the next one above it that the model takes; 0: none.

    A step is what lies between two sizes that it takes, 32 px for those without patches. Imports torch.
    """
    from fixres_dist.models.build import build_model
    from fixres_dist.models.resizing import takes

    own = sizes(timm_name)
    step = own.larger - own.train if 0 < own.larger - own.train <= 32 else 32
    wanted = round(factor * own.train / step) * step
    if not own.larger or wanted <= own.train:
        return own.larger
    import torch

    with torch.device("meta"):
        model = build_model(timm_name, 10)
    return wanted if takes(model, wanted) else own.larger


def of_weights(model: Model) -> Sizes:
    """Of the weights that a run starts from: a file of ours says in its header what it was made at."""
    if model.weights not in WEIGHTS and model.weights.endswith(".safetensors"):
        import safetensors

        with (
            contextlib.suppress(OSError, safetensors.SafetensorError),
            safetensors.safe_open(model.weights, "np") as file,
        ):
            if res := (file.metadata() or {}).get("res", ""):
                return Sizes(int(res), 0)
    return sizes(model.timm_name)


def measured(timm_name: str) -> Sizes:
    """As `sizes`, of timm itself; where it tests the weights at no larger resolution, the model is built."""
    from fixres_dist.models.build import preprocessing, pretrained_cfg

    spec, cfg = preprocessing(timm_name), pretrained_cfg(timm_name)
    tested, square = spec.test_res or 0, cfg is None or cfg.input_size[1] == cfg.input_size[2]
    larger = tested if tested > spec.train_res else next_size(timm_name, spec.train_res)
    return Sizes(spec.train_res, tested, larger if square else 0)


def next_size(timm_name: str, train_res: int) -> int:
    """The first multiple of the patch, or of a stride of 32, above `train_res` that the model takes; 0: none near it.

    Patches below 8 px are those of models in stages, whose stride is 32.
    """
    import torch

    from fixres_dist.models.build import build_model
    from fixres_dist.models.resizing import takes

    with torch.device("meta"):
        model = build_model(timm_name, 10)
    embed: Any = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    side = embed.feat_ratio() if hasattr(embed, "feat_ratio") else getattr(embed, "patch_size", 0)
    side = int(side[0] if isinstance(side, tuple | list) else side)
    step = side if side >= 8 else 32
    first = train_res // step * step + step
    return next((res for res in range(first, first + 256, step) if takes(model, res)), 0)
