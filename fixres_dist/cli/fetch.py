"""`fixres fetch`"""

from __future__ import annotations

import argparse

from fixres_dist.base.errors import EXIT_DONE
from fixres_dist.config import recipes


def fetch(args: argparse.Namespace) -> int:
    recipe = recipes.find(args.model, args.weights)
    from fixres_dist.models import weights

    name = recipe.values["model"]["timm_name"]
    size = sum(t.numel() * t.element_size() for t in weights.hub_state(name).values())
    print(f"{name}: {size / 2**20:,.0f} MiB, in the local cache now")
    return EXIT_DONE
