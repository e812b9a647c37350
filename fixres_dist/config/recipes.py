"""`--model b0 --res 320 --weights ns` to a configuration: the recipes in configs/, and a generic one for any timm model.

A recipe also carries the facts a plan needs of its model (parameters, multiply-adds, memory), measured by
configs/write.py on the meta device, so that a dry run imports no torch.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import UserError, unknown
from fixres_dist.config.reading import merge, parse, read_yaml

FROM_SCRATCH = ("demo", "r50")  # recipes with a first stage of their own and no weights
TIMM_WEIGHTS = ("ns", "ap", "pretrained")
WEIGHTS = (*TIMM_WEIGHTS, "none")
# Keys that hold a path, and the words that are none.
PATHS = {
    "model.weights": WEIGHTS,
    "data.root": ("demo",),
    "data.deny_list": (),
    "data.cache": (),
    "run.feature_cache": (),
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the plan needs of a model; counts for 1,000 classes, costs for one image at the recipe's resolution."""

    res: int
    train_res: int  # the weights' own resolution
    parameters: int
    features: int  # inputs of the classifier
    bn_parameters: int  # affine of the last BN
    conv_head_parameters: int
    last_block_parameters: int  # of the last block alone
    modules: tuple[str, ...]  # last block, conv_head, last BN, classifier
    multiply_adds_g: float  # 1e9, forward
    traffic_mib: float  # activations read and written by an eager bf16 forward
    peak_mib: float  # largest input + output of one layer, bf16
    feature_kib: float  # before conv_head, which is where the cached engine cuts (trunk.py); bf16
    last_block_feature_kib: float  # before the last block

    def tuned(self, policy: str) -> str:
        """The modules that train under `policy`, as tuning.select finds them."""
        count = {"classifier": 1, "classifier+bn_stats": 1, "classifier+bn": 2, "classifier+bn+conv_head": 3}
        names = "everything" if policy == "all" else ", ".join(self.modules[-count.get(policy, 4) :])
        return names + (f" and statistics of {self.modules[-2]}" if policy == "classifier+bn_stats" else "")

    def trainable(self, policy: str, num_classes: int) -> int:
        """Parameters that train under `policy`."""
        count = (self.features + 1) * num_classes
        if policy == "all":
            return self.total(num_classes)
        if policy in ("classifier+bn", "classifier+bn+conv_head", "last_block"):
            count += self.bn_parameters
        if policy in ("classifier+bn+conv_head", "last_block"):
            count += self.conv_head_parameters
        return count + (self.last_block_parameters if policy == "last_block" else 0)

    def kept_kib(self, policy: str, res: int) -> float:
        """bf16 features of one picture that the cached engine keeps under `policy`."""
        if policy == "classifier":
            return 2 * self.features / 1024
        size = self.last_block_feature_kib if policy == "last_block" else self.feature_kib
        return size * (-(-res // 32) / -(-self.res // 32)) ** 2

    def total(self, num_classes: int) -> int:
        return self.parameters + (self.features + 1) * (num_classes - 1000)


@dataclass(frozen=True)
class Recipe:
    name: str  # what --model takes
    weights: str
    values: dict[str, Any]  # sections of the configuration
    facts: Facts | None
    published: dict[str, str] | None  # row of configs/published.csv


def folder() -> Path:
    """configs/ of the checkout, of a run's code snapshot, or as installed."""
    beside = Path(__file__).parents[2] / "configs"
    return beside if beside.is_dir() else Path(__file__).parents[1] / "configs"


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
    if name in FROM_SCRATCH:
        recipe = read(folder() / f"{name}.yaml", name, "none")
        return with_weights(recipe, weights) if weights else recipe
    variants = [w for n, w in published() if n == name]
    if variants:
        if weights in ("ns", "ap") and weights not in variants:
            raise UserError(f"{name} has no {weights!r} weights; accepted: {', '.join(variants)}, none, or a file.")
        default = weights if weights in variants else variants[0]
        recipe = read(folder() / f"{name}_{default}.yaml", name, default)
        return with_weights(recipe, weights) if weights and weights not in (default, "pretrained") else recipe
    known = timm_names()
    if name.partition(".")[0] not in known:
        hint = "`python launch/submit.py --list` shows the recipes; any timm model name works too."
        raise unknown("model", name, [*model_names(), *(sorted(known) if len(name) > 3 else ())], hint)
    if weights in ("ns", "ap"):
        raise UserError(
            f"weights {weights!r} belong to the recipes b0 .. b8 and l2; for {name} accepted: pretrained, none, a file."
        )
    values = read_yaml((folder() / "generic.yaml").read_text())
    values = merge(values, {"model": {"name": name, "timm_name": name}})
    if "efficientnet" not in name:
        values["data"]["resize_rule"] = "timm"
    recipe = Recipe(name, "pretrained", values, None, None)
    return with_weights(recipe, weights) if weights else recipe


def no_weights(file: str | Path) -> UserError:
    return UserError(f"no weights file {file}. Accepted: ns, ap, pretrained, none, or a .safetensors or .pth file.")


def check_classes(origin: str, own: int, wanted: int, new_classifier: bool) -> None:
    """Raise UserError where weights for `own` classes meet a data set of `wanted`, unless stage one trains a new classifier."""
    if own != wanted and not new_classifier:
        raise UserError(
            f"{origin} classifies {own} classes, the data set has {wanted}: a new classifier has to be trained first. "
            "Next: add stage one, --preset own_classes (or pretrain.epochs=10 and the like)"
        )


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with its paths as they are meant here: a job starts in the run's code/."""
    changes: dict[str, dict[str, str]] = {}
    for name, words in PATHS.items():
        section, _, key = name.partition(".")
        path = (values.get(section) or {}).get(key)
        if isinstance(path, str) and path not in ("", *words):
            changes.setdefault(section, {})[key] = str(Path(path).expanduser().absolute())
    return merge(values, changes)


def presets() -> list[str]:
    return sorted(path.stem for path in (folder() / "presets").glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """Sections of the configuration that `--preset name` lays over a recipe; raises UserError for an unknown one."""
    if name not in presets():
        raise unknown("preset", name, presets())
    return read_yaml((folder() / "presets" / f"{name}.yaml").read_text())


def with_weights(recipe: Recipe, weights: str) -> Recipe:
    return Recipe(recipe.name, weights, merge(recipe.values, {"model": {"weights": weights}}), recipe.facts, None)


@cache
def timm_names() -> frozenset[str]:
    """timm's model entry points and our own, read from the sources: importing timm would import torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise UserError("timm is not installed. Next: make setup")
    pattern = re.compile(r"^@register_model\s+def (\w+)\(", re.MULTILINE)
    sources = [*(Path(spec.origin).parent / "models").glob("*.py"), Path(__file__).parents[1] / "models" / "build.py"]
    return frozenset(name for path in sources for name in pattern.findall(path.read_text(encoding="utf-8")))


def run_name(name: str, res: int, weights: str) -> str:
    """The default name of a run: the same command again finds the same directory."""
    default = next((w for n, w in published() if n == name), "none" if name in FROM_SCRATCH else "pretrained")
    if name == "demo":
        return "demo" if weights == default else f"demo-{res}-{Path(weights).stem}"
    return f"{name.replace('/', '_')}-{res}" + ("" if weights in (default, "pretrained") else f"-{Path(weights).stem}")
