"""From recipe, presets and what a person gives to the configuration; stage one where the data set has classes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fixres_dist.base import memory
from fixres_dist.base.errors import UserError
from fixres_dist.cli import submission
from fixres_dist.config import own_data, reading, recipes
from fixres_dist.config.recipes import Costs, Recipe
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import Tune
from fixres_dist.data import dataset
from fixres_dist.models import sizes
from fixres_dist.training import estimates, plan

OWN = "own_classes"
SHARE = 0.8  # of this machine's free memory that a run is to take; what is free changes while it runs


@dataclass(frozen=True)
class Settings:
    config: Config
    recipe: Recipe
    presets: tuple[str, ...]  # as they are in the run's name
    why: str = ""  # stage one was added; for the plan
    costs: Costs | None = None  # of a picture at the test size, where no recipe has them


def settle(recipe: Recipe, presets: Sequence[str], given: dict[str, Any], on_cpu: bool) -> Settings:
    """Defaults < recipe < preset < what is `given`. Raises UserError.

    Where the weights have other classes than the data set and no preset is asked for, `own_classes` is added; `none`
    asks for no preset. `on_cpu`: the ranks are to be processes on this machine's CPU.
    """
    chosen, why = tuple(name for name in presets if name != "none"), ""
    config = merged(recipe, chosen, given)
    if not presets and (why := other_classes(config, given, recipe)):
        chosen = (OWN,)
        config = merged(recipe, chosen, given)
    costs = None
    if OWN in chosen and not recipe.facts and config.data.root:
        from fixres_dist.models import costs as counted

        costs = counted.costs(config.model.timm_name, len(plan.classes(config)), config.data.res)
    if OWN in chosen and on_cpu and (known := recipe.facts or costs):
        config = fitting(config, known)
    return Settings(config, recipe, chosen, why, costs)


def merged(recipe: Recipe, presets: Sequence[str], given: dict[str, Any]) -> Config:
    values = recipe.values
    for name in presets:
        values = reading.merge(values, recipes.preset(name))
    if OWN in presets:
        values = reading.merge(values, for_own_classes(recipe, values, given))
    values = reading.merge(values, own_data.without_auto(given))
    values = with_resolutions(recipes.with_absolute_paths(values), recipe, OWN in presets)
    if OWN in presets and "res" not in given.get("data", {}):
        values = with_sizes_to_choose(values)
    return reading.parse(Config, values)


def with_sizes_to_choose(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the test resolutions from which a held-out share chooses, where nobody gives one or them."""
    tune, name = values.get("tune", {}), values["model"]["timm_name"]
    if not reading.parse(Tune, {**tune, "hold_out_sizes": ()}).chooses:
        return values
    own, res = sizes.sizes(name).train, reading.convert(values["data"]["res"], int, "data.res")
    found = {sizes.enlarged(name, factor) for factor in own_data.SIZES} | {own, res}
    return reading.merge({"tune": {"hold_out_sizes": sorted(found - {0})}}, values)


def for_own_classes(recipe: Recipe, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What follows from the number of images (config/own_data.py), and how timm itself resizes for a model without a recipe."""
    plain = {key: value for key, value in own_data.without_auto(given).items() if key in ("model", "data", "cluster")}
    config = reading.parse(Config, recipes.with_absolute_paths(reading.merge({**values, "pretrain": None}, plain)))
    if config.data.root not in ("", "demo"):
        dataset.check_folder(Path(config.data.root), config.data)
    ranks = config.cluster.node_range()[0] * config.cluster.gpus_per_node
    counts, new = plan.count(config), config.model.weights == "none"
    found = own_data.derived(counts.train, counts.classes, ranks, given, new)
    if not recipe.facts:
        found["data"] = {**found.get("data", {}), "resize_rule": "timm"}
    return found


def other_classes(config: Config, given: dict[str, Any], recipe: Recipe) -> str:
    """Why the weights need a new classifier for the data set; empty where they do not, or where stage one is refused.

    All else that is wrong is said where the run is checked.
    """
    asked = config.data.root and not config.data.class_map and config.model.weights != "none"
    if not asked or given.get("pretrain", {}) is None or recipe.name in recipes.FROM_SCRATCH:
        return ""
    plain = replace(config, pretrain=None)
    try:
        if config.data.root != "demo":
            dataset.check_folder(Path(config.data.root), config.data)
        plan.check_weights(plain)
        submission.check_model(plain, recipe)
    except recipes.OtherClasses as error:
        return f"{str(error).partition(':')[0]}: stage one trains a new classifier (--preset none refuses)"
    except UserError:
        pass
    return ""


def fitting(config: Config, costs: Costs) -> Config:
    """`config` with as many images in a forward pass as this machine's memory holds, where `auto` would take more."""
    ranks, have = config.cluster.gpus_per_node, memory.available_bytes()
    if config.run.batch_per_device != "auto" or not config.data.root or have is None:
        return config
    counts = plan.count(config)
    if estimates.cpu_memory_gib(config, costs, counts, ranks, ranks) <= SHARE * have / 2**30:
        return config
    return estimates.with_batch(
        config, estimates.fitting_batch(config, costs, counts, ranks, ranks, SHARE * have / 2**30)
    )


def with_resolutions(values: dict[str, Any], recipe: Recipe, own: bool = False) -> dict[str, Any]:
    """`values` with data.res and pretrain.res, where neither the recipe nor a person says: the test resolution that timm
    has, or the next one above the weights' own; stage one at the weights' own, or at the test resolution if that is less.

    `own`: a data set of other classes, which is tested at 1.29 times the weights' own, or the next one that the model takes.
    """
    name, res, first = values["model"]["timm_name"], values["data"].get("res"), values.get("pretrain")
    if res is None:
        res = sizes.enlarged(name, own_data.SIZE) if own else sizes.sizes(name).larger
        if not res:
            own_res = sizes.sizes(name).train
            raise UserError(
                f"no --res given, and no square above {own_res} px is known that {name} takes. Next: --res {own_res}"
            )
        values = reading.merge(values, {"data": {"res": res}})
    if first is not None and "res" not in first:
        train = (
            min(sizes.sizes(name).train, reading.convert(res, int, "data.res"))
            if not recipe.facts
            else recipe.facts.train_res
        )
        values = reading.merge(values, {"pretrain": {"res": train}})
    return values
