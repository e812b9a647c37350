"""Which of timm's models the program takes: `nice python benchmarks/census.py` appends to benchmarks/results/census.jsonl.

One row per architecture, the first of every family first: built as its weights are described, checked as a submission
checks it, at its own size and at the default of --res; up to --real million parameters also cut, compared with the whole
model and trained for a step on real tensors. Names that have a row are left out, so it can be stopped and started again;
`--again failed` repeats those rows. `--table` prints the counts by family.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import timm
import torch
import torch.nn.functional as F
from torch import nn

from fixres_dist.base.errors import UserError, first_line
from fixres_dist.models import fast_trunk, sizes, sources, weights
from fixres_dist.models.build import build_model, own_size, pretrained_cfg, small_size
from fixres_dist.models.parts import Parts, parts_of, set_modes
from fixres_dist.models.resizing import check_resolutions, for_size

ROWS = ROOT / "benchmarks" / "results" / "census.jsonl"
CLASSES, DEFAULT, WITHOUT_NORM = 7, "classifier+bn", "classifier"
CHUNK, CHUNK_S = 32, 1800  # models in one process, and the seconds that it may take


def examine(name: str, real_m: float) -> dict[str, Any]:
    """The row of timm's model `name`: supported, refused with a reason, or failed, and the parameters in millions."""
    row: dict[str, Any] = {"name": name, "family": timm.model_entrypoint(name).__module__.rpartition(".")[2]}
    try:
        with torch.device("meta"):
            model = build_model(name, CLASSES)
        row |= {"model": type(model).__name__, "parameters_m": millions(model), "res": own_size(model)}
        row |= {"larger": sizes.sizes(name).larger, "headless": (cfg := pretrained_cfg(name)) and cfg.num_classes == 0}
        check_resolutions(model, [row["res"], *([row["larger"]] if row["larger"] else [])])
        if cfg is not None and cfg.has_weights:
            weights.fill(model, weights.fitted(model, sources.hub_state(name, meta=True)), name, new_classifier=True)
        row["policy"] = policy_of(model)
        if row["parameters_m"] <= real_m:
            row["real"] = step_is_exact(name, row["policy"], row["larger"])
        row["status"] = "supported"
    except UserError as error:
        row |= {"status": "refused", "reason": first_line(error)}
    except Exception as error:  # what the census is for
        row |= {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"[:300]}
    return row


def millions(model: nn.Module) -> float:
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


def policy_of(model: nn.Module) -> str:
    """The default policy, or the one that its refusal names where a model has no norm to tune."""
    try:
        parts_of(model, DEFAULT)
    except UserError as error:
        if not str(error).endswith("Next: tune.policy=classifier"):
            raise
        parts_of(model, WITHOUT_NORM)
        return WITHOUT_NORM
    return DEFAULT


def step_is_exact(name: str, policy: str, larger: int) -> bool:
    """Whether both parts are the whole model bit for bit at its own size and at `larger`, a step reaches every tuned
    tensor, and stage one trains; as in a run: stage one first, then the cut, on the model that it has trained."""
    torch.manual_seed(0)
    model = build_model(name, CLASSES)
    for parameter in model.parameters():  # scales that start at zero would stop the gradient
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.train()
    model(torch.randn(2, 3, own_size(model), own_size(model))).sum().backward()
    model.zero_grad(set_to_none=True)
    return all(exact(for_size(model, res), policy, res) for res in (own_size(model), larger) if res)


def exact(model: nn.Module, policy: str, res: int) -> bool:
    parts, images = parts_of(model, policy), torch.randn(2, 3, res, res)
    assert parts.trunk is not None
    with torch.no_grad():
        inputs = parts.trunk(images)
        same = torch.equal(parts.head(*inputs), model(images))
        for dtype in (torch.float32, torch.bfloat16):  # as it runs: folded, in low precision
            fast_trunk.prepared(parts.trunk, dtype, small_size(model))[0](images.to(dtype))
    set_modes(parts, "exact")
    F.cross_entropy(parts.head(*inputs), torch.tensor([0, 1])).backward()
    return same and all(p.grad is not None for n, p in model.named_parameters() if n in tuned(parts))


def tuned(parts: Parts) -> set[str]:
    return set(parts.tuned.parameters)


def in_turns(names: list[str]) -> list[str]:
    """The first of every family, then the second, and so on."""
    families: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        families[timm.model_entrypoint(name).__module__].append(name)
    return sorted(names, key=lambda name: families[timm.model_entrypoint(name).__module__].index(name))


def rows() -> dict[str, dict[str, Any]]:
    """By name; of two rows the later."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def work(names: list[str], real_m: float) -> None:
    """Examine the names in processes of their own: one that crashes or hangs costs its row alone."""
    command = [sys.executable, __file__, "--real", str(real_m), "--these"]
    while names:
        chunk, names = names[:CHUNK], names[CHUNK:]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            code = subprocess.run([*command, *chunk], env=environment, timeout=CHUNK_S).returncode
        except subprocess.TimeoutExpired:
            code = 124
        there = rows()
        if left := [name for name in chunk if name not in there]:
            append({"name": left[0], "status": "failed", "reason": f"its process ended with {code}"})
            names = left[1:] + names


def append(row: dict[str, Any]) -> None:
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def table() -> str:
    """Counts by family, in Markdown; families that are wholly supported share the last line."""
    families: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows().values():
        families[row.get("family", "?")][row["status"]] += 1
    whole = [family for family, counts in families.items() if set(counts) == {"supported"}]
    lines = ["| family | supported | refused | failed |", "|---|---|---|---|"]
    for family, counts in sorted(families.items()):
        if family not in whole:
            lines.append(f"| {family} | {counts['supported']} | {counts['refused']} | {counts['failed']} |")
    total = sum(families.values(), Counter[str]())
    lines.append(f"| {len(whole)} other families | {sum(families[f]['supported'] for f in whole)} | 0 | 0 |")
    lines.append(f"| all {sum(total.values())} | {total['supported']} | {total['refused']} | {total['failed']} |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--real", type=float, default=12.0, metavar="M", help="million parameters up to which tensors are real"
    )
    p.add_argument("--these", nargs="+", default=[], help="examine these names in this process")
    p.add_argument("--again", nargs="+", default=[], choices=("refused", "failed"), help="repeat rows of these states")
    p.add_argument("--table", action="store_true", help="print the counts")
    args = p.parse_args()
    if args.table:
        print(table())
        return
    for name in args.these:
        append(examine(name, args.real))
    if not args.these:
        there = rows()
        kept = {name for name, row in there.items() if row["status"] not in args.again}
        if args.again:
            ROWS.write_text("".join(json.dumps(there[name]) + "\n" for name in there if name in kept))
        work([name for name in in_turns(timm.list_models()) if name not in kept], args.real)
        print(table())


if __name__ == "__main__":
    main()
