"""Write the recipes of both published tables, or with `sizes` the resolutions of timm's weights.

    python configs/write.py          # *_ns.yaml, *_ap.yaml
    python configs/write.py sizes    # timm_sizes.csv: builds every architecture of timm, half an hour

Needs torch and timm; tests check the results. Facts about a model are measured here, on the meta device, so that plans
need no torch.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import astuple
from pathlib import Path
from typing import TextIO

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.models import policies
from fixres_dist.models.build import preprocessing, pretrained_cfg
from fixres_dist.models.sizes import Sizes, measured

TEMPLATE = """\
# Fix{title}: python launch/submit.py --model {model} --res {fix_test_res} --weights {weights} --data DIR --nodes 4
# Published (arXiv 2003.08237, Table {table}): {base_top1}/{base_top5} at {base_test_res} -> {fix_top1}/{fix_top5} at {fix_test_res}.
# timm's weights start at {timm_base_top1}/{timm_base_top5}.
# From the paper: the test resolution, the resize rule, classifier + last BN, label smoothing (without its value).
# Our choice: epochs, batch, learning rate, schedule, the smoothing's 0.1, exact BN statistics; nothing is published.
model: {{name: {model}, timm_name: {timm_name}, weights: {weights}}}
data: {{res: {fix_test_res}, resize_rule: fixefficientnet, train_transform: test_aug}}
tune:
  {{policy: classifier+bn, bn_stats: exact, epochs: 1, global_batch: 384, base_lr: 1.0e-3, schedule: cosine}}
facts:  # measured on the meta device by configs/write.py
  {facts}
"""


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def measure(timm_name: str, res: int, train_res: int) -> dict[str, object]:
    """Parameters and per-image costs of one forward at `res`; memory of bf16 activations."""
    with torch.device("meta"):
        model = timm.create_model(timm_name, pretrained=False).eval()
    tuned = policies.select(model, "last_block").modules
    multiply_adds, traffic, peak = 0, 0, 0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal multiply_adds, traffic, peak
        size = 2 * (inputs[0].numel() + output.numel())
        traffic += size
        peak = max(peak, size)
        if isinstance(module, nn.Conv2d):
            multiply_adds += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            multiply_adds += output.shape[0] * module.weight.numel()

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    inputs: dict[nn.Module, int] = {}
    for module in (model.conv_head, model.blocks[-1][-1]):
        module.register_forward_pre_hook(lambda m, x: inputs.update({m: 2 * x[0].numel()}))
    with torch.no_grad():
        model(torch.zeros(1, 3, res, res, device="meta"))
    return {
        "res": res,
        "train_res": train_res,
        "parameters": count(model),
        "classifier_inputs": model.num_features,
        "bn_parameters": count(model.bn2),
        "conv_head_parameters": count(model.conv_head),
        "last_block_parameters": count(model.blocks[-1][-1]),
        "modules": f"[{', '.join(tuned)}]",
        "multiply_adds_g": round(multiply_adds / 1e9, 3),
        "traffic_mib": round(traffic / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
        "feature_kib": round(inputs[model.conv_head] / 1024, 1),
        "last_block_feature_kib": round(inputs[model.blocks[-1][-1]] / 1024, 1),
    }


def recipe(row: dict[str, str]) -> str:
    weights = "ns" if row["table"] == "1" else "ap"
    facts = measure(row["timm_name"], int(row["fix_test_res"]), int(row["train_res"]))
    title = f"EfficientNet-{row['model'].upper()}, {'Noisy Student' if weights == 'ns' else 'AdvProp'}"
    lines = "\n  ".join(f"{key}: {value}" for key, value in facts.items())
    return TEMPLATE.format(title=title, weights=weights, facts=lines, **row)


def write_sizes(file: TextIO) -> None:
    """A row for each of timm's weights, an architecture's default first, and for architectures without weights."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("name", "train", "test", "larger"))
    tagged = timm.list_pretrained()
    for architecture in timm.list_models():
        default = pretrained_cfg(architecture)
        names = [name for name in tagged if name.partition(".")[0] == architecture]
        first = f"{architecture}.{default.tag}" if default and default.tag else ""
        known: dict[tuple[int, int], Sizes] = {}  # the same model at the same sizes takes the same next one
        for name in sorted(names, key=lambda name: name != first) or [architecture]:
            spec = preprocessing(name)
            key = (spec.train_res, spec.test_res or 0)
            if key not in known:
                known[key] = measured(name)
            rows.writerow((name, *astuple(known[key])))


if __name__ == "__main__":
    here = Path(__file__).parent
    if sys.argv[1:] == ["sizes"]:
        with open(here / "timm_sizes.csv", "w", newline="") as file:
            write_sizes(file)
        sys.exit()
    with open(here / "published.csv", newline="") as file:
        for row in csv.DictReader(file):
            path = here / f"{row['model']}_{'ns' if row['table'] == '1' else 'ap'}.yaml"
            path.write_text(recipe(row))
            print(path.name)
