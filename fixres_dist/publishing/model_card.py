"""The model card: a README.md in the hub's form, with the numbers of results.json. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir

RULES = {
    "fixefficientnet": "the shorter side is scaled to {res} px, bicubic, and the centre {res} x {res} is cut",
    "fixres": "the shorter side is scaled to int(256/224 · {res}) px, bilinear, and the centre {res} x {res} is cut",
    "fixres_height": "the **height** is scaled to int(256/224 · {res}) px, bilinear, and the centre {res} x {res} is cut, "
    "with black bars where a portrait is narrower. timm's configuration cannot express this: `config.json` scales the "
    "shorter side instead, so timm's own evaluation differs from the numbers above",
    "timm": "the model's own crop_pct and interpolation at {res} px",
}


def results(run: RunDir) -> dict[str, Any]:
    return json.loads(run.finished(run.results).read_text())


def class_names(run: RunDir) -> list[str]:
    """In the order of the classifier's outputs."""
    names = json.loads((run.root / "class_index.json").read_text())
    return [names[str(k)] for k in range(len(names))]


def evaluations(run: RunDir) -> list[dict[str, Any]]:
    """What `evaluate --eval-set` left in the run directory: before, after and the paired gain, beyond results.json's."""
    found = [json.loads(file.read_text()) for file in sorted((run.root / "evaluations").glob("*.json"))]
    return [one for one in found if (one["set"], one["res"]) != ("val", results(run)["res"])]


def measured(run: RunDir, alpha: float) -> dict[str, Any] | None:
    """before, after, delta_top1, delta_ci95, n of the exported weights: of the run, or of its curve over alpha; None
    where that alpha was not measured."""
    found = results(run)
    if alpha == 1:
        return found
    file = run.root / "alpha.json"
    curve = json.loads(file.read_text()) if file.exists() else {}
    data = run.config().data
    if any(
        curve.get(key) != value
        for key, value in (("data", data.root), ("res", data.res), ("resize_rule", data.resize_rule))
    ):
        return None
    return next(({**found, **row, "after": row} for row in curve["curves"]["val"] if row["alpha"] == alpha), None)


def front_matter(name: str, data: str, licence: str | None, found: dict[str, Any] | None) -> str:
    """The YAML head that the hub reads; the metrics are those of the exported weights."""
    head: dict[str, Any] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "fixres"],
        **({"license": licence} if licence else {}),
    }
    if found:
        metrics = [
            {"type": "accuracy", "name": "top-1 (%)", "value": found["after"]["top1"]},
            {"type": "accuracy", "name": "top-5 (%)", "value": found["after"]["top5"]},
        ]
        result = {"dataset": {"name": data, "type": "imagefolder"}, "metrics": metrics}
        head["model-index"] = [{"name": name, "results": [{"task": {"type": "image-classification"}, **result}]}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


TEMPLATE = """\
# {name}

`{base[timm_name]}` with {classes} classes, from {start}; its `{base[policy]}` re-tuned at {base[res]} px as FixRes
does (arXiv 1906.06423, 2003.08237).
{alpha}
## Accuracy
{table}

Single crop, every image once: {rule}.

## Use
{use}

Files: {files}.

## How it was made
    {command}

Training transform `{base[transform]}`; {base[images_seen]:,} images seen in {base[seconds]:,.0f} s on
{base[world_size]} x {base[hardware][device]}, {base[precision]}; torch {base[versions][torch]}, timm {base[versions][timm]}.

## Licence
The licence of these weights is that of the weights they start from, {licence}. The original FixRes code and weights (CC BY-NC 4.0)
are no part of them.
"""
USE = """\
```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # from the hub: "hf-hub:OWNER/NAME"
# or: timm.create_model("{timm_name}", num_classes={classes}, checkpoint_path="FOLDER/{file}")
settings = timm.data.resolve_data_config({{}}, model=model)
transform = timm.data.create_transform(**settings, is_training=False)
```"""
USE_ONNX = """\
Input `images`: [n, 3, px, px] in fp32, px as in the file's name, normalised with `mean` and `std` of `config.json`. Output `logits`:
[n, {classes}]."""


def accuracy(found: dict[str, Any]) -> tuple[str, str, str]:
    """Top-1 before and after, and the gain with its interval, in points."""
    low, high = found["delta_ci95"]
    gain = f"{found['delta_top1']:+.2f} ({low:+.2f} to {high:+.2f})"
    return f"{found['before']['top1']:.2f}", f"{found['after']['top1']:.2f}", gain


def row(name: str, found: dict[str, Any]) -> str:
    before, after, gain = accuracy(found)
    count = found.get("n") or found["after"].get("n", "")
    both = [f"{top1} / {found[when]['top5']:.2f}" for top1, when in ((before, "before"), (after, "after"))]
    return "| " + " | ".join(map(str, (name, found["res"], count, *both, gain))) + " |"


def text(run: RunDir, files: list[str], licence: str | None, alpha: float = 1.0) -> str:
    """The card for a finished run's exported `files`; `licence` is that of the starting weights, where timm knows it."""
    config, base, found = run.config(), results(run), measured(run, alpha)
    name, data, classes = f"{config.model.name} fixed at {base['res']} px", data_name(config), len(class_names(run))
    table = (
        "| data set | px | n | before: top-1 / top-5 | after | gain in top-1 (paired 95 % interval) |\n|-|-|-|-|-|-|\n"
    )
    if found:
        sets = evaluations(run) if alpha == 1 else []
        table += "\n".join([row(data, found), *(row(one["set"], one) for one in sets)])
    else:
        table = f"Not measured: `python -m fixres_dist interpolate --run {run.root} --alpha 0,{alpha:g},1` does."
    weights = next((file for file in files if file.startswith("model.")), "")
    start = "new weights" if config.model.weights == "none" else f"weights `{Path(config.model.weights).name}`"
    if config.pretrain:
        start += f" trained at {config.pretrain.res} px for {config.pretrain.epochs} epochs"
    body = TEMPLATE.format(
        base=base,
        name=name,
        classes=classes,
        start=start,
        alpha=""
        if alpha == 1
        else f"\nThese weights are {alpha:g} of the way from the starting head to the fixed one.\n",
        table=table,
        rule=RULES[base["resize_rule"]].format(res=base["res"]),
        use=(USE if weights else USE_ONNX).format(timm_name=base["timm_name"], classes=classes, file=weights),
        files=", ".join(f"`{file}`" for file in files),
        command=run.submit_command(),
        licence="which timm gives as " + licence if licence else "and of the data they were trained on",
    )
    return front_matter(name, data, licence, found) + body


def data_name(config: Config) -> str:
    return "the built-in example" if config.data.root == "demo" else Path(config.data.root).name
