"""`fixres fetch`"""

from __future__ import annotations

import argparse

from fixres_dist.base.errors import EXIT_DONE
from fixres_dist.config import recipes

EXAMPLES = ("--model l2", "--model b0 --weights ap", "--model resnet50.a1_in1k")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, metavar="M", help="a recipe or a timm model name")
    p.add_argument("--weights", choices=("ns", "ap", "pretrained"), default="", help="ns or ap for the recipes")


def run(args: argparse.Namespace) -> int:
    recipe = recipes.find(args.model, args.weights)
    from fixres_dist.models import sources

    name = recipe.values["model"]["timm_name"]
    size = sum(t.numel() * t.element_size() for t in sources.hub_state(name).values())
    print(f"{name}: {size / 2**20:,.0f} MiB, in the local cache now")
    return EXIT_DONE
