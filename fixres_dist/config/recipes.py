"""From `--model b0 --weights ns` to a configuration: the recipes in configs/, and a generic one for any timm model.

A recipe also carries facts about its model (parameters, multiply-adds, memory), which configs/write.py has measured on
the meta device, so that the plan of a dry run imports no torch.
"""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fixres_dist.base.commands import command
from fixres_dist.base.environment import shipped
from fixres_dist.base.errors import UserError, unknown
from fixres_dist.config import timm_names
from fixres_dist.config.reading import merge, parse, read_yaml

FROM_SCRATCH = ("demo", "r50")  # recipes with a first stage of their own and no weights
TIMM_WEIGHTS = ("ns", "ap", "pretrained")
WEIGHTS = (*TIMM_WEIGHTS, "none")
# (section, key) of paths, and the values that are no path.
PATHS = {
    ("model", "weights"): WEIGHTS,
    ("data", "root"): ("demo",),
    ("data", "class_map"): ("natural", "imagenet"),
    **dict.fromkeys([("data", "deny_list"), ("data", "labels"), ("data", "cache"), ("run", "feature_cache")], ()),
}
# How many of classifier, last BN, conv_head, last block a policy trains; classifier+bn_stats: the BN's statistics too.
TRAINED = {"classifier": 1, "classifier+bn_stats": 1, "classifier+bn": 2, "classifier+bn+conv_head": 3, "last_block": 4}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one image costs a model at the resolution `res`."""

    res: int  # pixels
    parameters: int
    multiply_adds_g: float  # 1e9, forward
    traffic_mib: float  # activations that an eager bf16 forward reads and writes
    peak_mib: float  # largest input + output of one layer, bf16

    def trainable(self, policy: str, num_classes: int) -> int:
        """Parameters that train under `policy`, as far as they weigh: all of them, or a head that is small beside them."""
        return self.parameters if policy == "all" else 0


@dataclass(frozen=True, kw_only=True)
class Facts(Costs):
    """A recipe's facts about its model: counts for 1,000 classes."""

    train_res: int  # pixels; the resolution of the weights' training
    classifier_inputs: int
    bn_parameters: int  # affine of the last BN
    conv_head_parameters: int
    last_block_parameters: int  # of the last block alone
    modules: tuple[str, ...]  # last block, conv_head, last BN, classifier
    feature_kib: float  # conv_head's input, which the cached engine stores; bf16
    last_block_feature_kib: float  # the last block's input, bf16

    def tuned(self, policy: str) -> str:
        """The modules that train under `policy`, as models/policies.py selects them; raises UserError for attention."""
        if policy == "attention":
            raise UserError(
                "policy 'attention' tunes attention layers, and the recipes' networks have none. Accepted: "
                f"{', '.join(TRAINED)}, all. Next: tune.policy=classifier+bn"
            )
        names = "everything" if policy == "all" else ", ".join(self.modules[-TRAINED[policy] :])
        return names + (f" and statistics of {self.modules[-2]}" if policy == "classifier+bn_stats" else "")

    def trainable(self, policy: str, num_classes: int) -> int:
        """Parameters that train under `policy`."""
        if policy == "all":
            return self.total(num_classes)
        classifier = (self.classifier_inputs + 1) * num_classes
        others = (self.bn_parameters, self.conv_head_parameters, self.last_block_parameters)
        return classifier + sum(others[: TRAINED[policy] - 1])

    def total(self, num_classes: int) -> int:
        """All parameters."""
        return self.parameters + (self.classifier_inputs + 1) * (num_classes - 1000)

    def kept_kib(self, policy: str, res: int) -> float:
        """KiB of the bf16 features of one image at `res` pixels that the cached engine stores under `policy`."""
        if policy == "classifier":
            return 2 * self.classifier_inputs / 1024
        size = self.last_block_feature_kib if policy == "last_block" else self.feature_kib
        return size * (-(-res // 32) / -(-self.res // 32)) ** 2


@dataclass(frozen=True)
class Recipe:
    name: str  # the value of --model
    weights: str
    values: dict[str, Any]  # sections of the configuration
    facts: Facts | None = None
    published: dict[str, str] | None = None  # row of configs/published.csv

    def with_weights(self, weights: str) -> Recipe:
        return Recipe(self.name, weights, merge(self.values, {"model": {"weights": weights}}), self.facts)


def folder() -> Path:
    """configs/ of the checkout, of a run's code snapshot, or of the installed package."""
    return shipped("configs")


@cache
def published() -> dict[tuple[str, str], dict[str, str]]:
    """Rows of the note's Tables 1 and 2 by (model, ns | ap), with timm's names and timm's own starting accuracy."""
    with open(folder() / "published.csv", newline="") as file:
        return {(row["model"], "ns" if row["table"] == "1" else "ap"): row for row in csv.DictReader(file)}


def model_names() -> list[str]:
    """The names with a recipe, smallest first."""
    return [*dict.fromkeys(model for model, _ in sorted(published())), *FROM_SCRATCH]


def read(path: Path, name: str, weights: str) -> Recipe:
    values = read_yaml(path.read_text())
    facts = parse(Facts, values.pop("facts"), "facts") if "facts" in values else None
    return Recipe(name, weights, values, facts, published().get((name, weights)))


def every() -> list[Recipe]:
    """The recipes of both published tables."""
    return [read(folder() / f"{name}_{weights}.yaml", name, weights) for name, weights in published()]


def find(name: str, weights: str = "") -> Recipe:
    """The recipe for `--model name --weights weights`; raises UserError for an unknown model or weights it lacks."""
    variants = [w for n, w in published() if n == name]
    if name in FROM_SCRATCH:
        recipe = read(folder() / f"{name}.yaml", name, "none")
    elif variants:
        if weights in ("ns", "ap") and weights not in variants:
            raise UserError(f"{name} has no {weights!r} weights; accepted: {', '.join(variants)}, none, or a file.")
        chosen = weights if weights in variants else variants[0]
        recipe = read(folder() / f"{name}_{chosen}.yaml", name, chosen)
        weights = "" if weights == "pretrained" else weights
    else:
        recipe = generic(name, weights)
    return recipe.with_weights(weights) if weights not in ("", recipe.weights) else recipe


def generic(name: str, weights: str) -> Recipe:
    """The recipe for any timm model."""
    hint = f"`{command('submit', '--list')}` shows the recipes; any timm model name works too."
    timm_name = timm_names.resolved(name, model_names(), hint)
    if timm_name.startswith(timm_names.FOLDER):
        name = timm_name
    if weights in ("ns", "ap"):
        raise UserError(
            f"weights {weights!r} belong to the recipes b0 .. b8 and l2; for {name} accepted: pretrained, none, a file."
        )
    values = merge(
        read_yaml((folder() / "generic.yaml").read_text()), {"model": {"name": name, "timm_name": timm_name}}
    )
    if "efficientnet" not in timm_name or ":" in timm_name:  # another's model says itself how it is evaluated
        values["data"]["resize_rule"] = "timm"
    return Recipe(name, "pretrained", values)


def no_weights(file: str | Path) -> UserError:
    """The refusal of a path that is no file; of a folder, with the files in it that may be meant."""
    if Path(file).is_dir():
        if (Path(file) / ".metadata").exists():
            return UserError(
                f"{file} is a checkpoint in pieces of each rank (torch.distributed.checkpoint). Next: "
                f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {file} weights.pth, and --weights weights.pth"
            )
        found = sorted(p.name for p in Path(file).iterdir() if re.search(r"\.(safetensors|pth?|bin|ckpt|tar)$", p.name))
        return UserError(f"{file} is a folder. Accepted: a file of weights (in it: {', '.join(found[:6]) or 'none'}).")
    return UserError(f"no weights file {file}. Accepted: ns, ap, pretrained, none, or a .safetensors or .pth file.")


class OtherClasses(UserError):
    """The weights have a classifier of other classes than the data set, or none."""


def check_classes(origin: str, own: int, wanted: int, new_classifier: bool) -> None:
    """Raise OtherClasses for weights of `own` classes on a data set of `wanted`, unless stage one trains a new classifier.

    0: the weights are a backbone's, without a classifier (DINOv2, CLIP).
    """
    if own != wanted and not new_classifier:
        has = f"classifies {own} classes" if own else "has no classifier"
        raise OtherClasses(
            f"{origin} {has}, the data set has {wanted}{'' if own else ' classes'}: a new classifier has to be trained first. "
            "Next: add stage one, --preset own_classes (or pretrain.epochs=10 and the like)"
            + (
                f"; or if the folders are some of its classes: data.class_map=imagenet, or FILE with model.num_classes={own}"
            )
            * (own > wanted)
        )


def check_count(num_classes: int, found: int) -> None:
    """Raise UserError for a model.num_classes that is not the number of classes `found`."""
    if num_classes not in (0, found):
        raise UserError(
            f"model.num_classes is {num_classes}; the data set has {found} classes. Accepted: 0, or that number."
        )


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with absolute paths: relative ones are meant from here, and a job starts in the run's code/."""
    for (section, key), words in PATHS.items():
        path = (values.get(section) or {}).get(key)
        if isinstance(path, str) and path not in ("", *words):
            values = merge(values, {section: {key: os.path.abspath(os.path.expanduser(path))}})
    return values


def presets() -> list[str]:
    return sorted(path.stem for path in (folder() / "presets").glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """Sections of the configuration that `--preset name` lays over a recipe; raises UserError for an unknown one."""
    if name not in presets():
        raise unknown("preset", name, presets())
    return dict(read_yaml((folder() / "presets" / f"{name}.yaml").read_text()))


def run_name(name: str, res: int, weights: str) -> str:
    """The default name of a run: the same command again finds the same directory."""
    default = next((w for n, w in published() if n == name), "none" if name in FROM_SCRATCH else "pretrained")
    if name == "demo":
        return "demo" if weights == default else f"demo-{res}-{Path(weights).stem}"
    if name.startswith(timm_names.FOLDER):
        name = Path(name).name
    return f"{re.sub('[/:@]', '_', name)}-{res}" + (
        "" if weights in (default, "pretrained") else f"-{Path(weights).stem}"
    )
