"""The model card: a README.md in the form of the hub, with the numbers of results.json. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.text import markdown_table
from fixres_dist.config.schema import Config
from fixres_dist.evaluation.measures import Evaluation, read_mixture
from fixres_dist.runs.results import Accuracy, Gain, Results
from fixres_dist.runs.rundir import RunDir

RULES = {
    "fixefficientnet": "the shorter side is scaled to {res} px, bicubic, and the centre {res} x {res} is cut",
    "fixres": "the shorter side is scaled to int(256/224 · {res}) px, bilinear, and the centre {res} x {res} is cut",
    "fixres_height": "the **height** is scaled to int(256/224 · {res}) px, bilinear, and the centre {res} x {res} is cut, "
    "with black bars where a portrait is narrower. timm's configuration cannot express this: `config.json` scales the "
    "shorter side instead, so timm's own evaluation differs from the numbers above",
    "timm": "the model's own crop_pct and interpolation at {res} px",
}


def class_names(run: RunDir) -> list[str]:
    """In the order of the classifier's outputs."""
    names = json.loads((run.root / "class_index.json").read_text())
    return [names[str(k)] for k in range(len(names))]


def data_name(config: Config) -> str:
    return "the built-in example" if config.data.root == "demo" else Path(config.data.root).name


def evaluations(run: RunDir) -> list[Evaluation]:
    """What `evaluate` kept in the run, without the validation split at the run's resolution, which results.json holds."""
    found = [Evaluation.read(file) for file in sorted((run.root / "evaluations").glob("*.json"))]
    return [one for one in found if (one.set, one.res) != ("val", Results.read(run).res)]


TEMPLATE = """\
# {name}

`{results.timm_name}` with {classes} classes, from {start}; its `{results.policy}` re-tuned at {results.res} px as FixRes
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

Training transform `{results.transform}`; {results.images_seen:,} images seen in {results.seconds:,.0f} s on
{results.world_size} x {results.hardware.device}, {results.precision}; torch {results.versions[torch]}, timm {results.versions[timm]}.

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


def row(name: str, res: int | None, n: int, before: Accuracy, after: Accuracy, gain: Gain | None) -> list[object]:
    """A row of the card's table."""
    return [name, res, n, *(f"{a.top1:.2f} / {a.top5:.2f}" for a in (before, after)), gain]


def text(run: RunDir, files: list[str], licence: str | None, alpha: float = 1.0) -> str:
    """The card for a finished run's exported `files`; `licence` is that of the starting weights, where timm knows it."""
    config, results = run.config(), Results.read(run)
    name, data, classes = f"{config.model.name} fixed at {results.res} px", data_name(config), len(class_names(run))
    exported: Accuracy | None
    if alpha == 1:
        exported = results.after
        rows = [row(data, results.res, results.n, results.before, exported, results.gain)]
        for one in evaluations(run):
            before, after = one.summaries["before"], one.summaries["after"]
            rows.append(row(one.set, one.res, after.n, before, after, one.gain))
    elif mixture := read_mixture(run, alpha):
        exported = mixture.summary
        rows = [row(data, results.res, mixture.summary.n, results.before, exported, mixture.gain)]
    else:
        exported, rows = None, []
    head = ("data set", "px", "n", "before: top-1 / top-5", "after", "gain in top-1 (paired 95 % interval)")
    measure = command("interpolate", "--run", run.root, "--alpha", f"0,{alpha:g},1")
    weights = next((file for file in files if file.startswith("model.")), "")
    start = "new weights" if config.model.weights == "none" else f"weights `{Path(config.model.weights).name}`"
    if config.pretrain:
        start += f" trained at {config.pretrain.res} px for {config.pretrain.epochs} epochs"
    mixed = f"\nThese weights are {alpha:g} of the way from the starting head to the fixed one.\n"
    body = TEMPLATE.format(
        results=results,
        name=name,
        classes=classes,
        start=start,
        alpha="" if alpha == 1 else mixed,
        table=markdown_table(head, rows) if rows else f"Not measured: `{measure}` does.",
        rule=RULES[results.resize_rule].format(res=results.res),
        use=(USE if weights else USE_ONNX).format(timm_name=results.timm_name, classes=classes, file=weights),
        files=", ".join(f"`{file}`" for file in files),
        command=run.submit_command(),
        licence="which timm gives as " + licence if licence else "and of the data they were trained on",
    )
    return f"---\n{front_matter(name, data, licence, exported)}\n---\n{body}"


def front_matter(name: str, data: str, licence: str | None, exported: Accuracy | None) -> str:
    """The YAML that the hub reads; the accuracies are those of the exported weights, where they were measured."""
    from huggingface_hub import EvalResult, ModelCardData

    task, measured = "image-classification", []
    if exported:
        for metric, value in (("top-1 (%)", exported.top1), ("top-5 (%)", exported.top5)):
            measured.append(EvalResult(task, "imagefolder", data, "accuracy", value, metric_name=metric))
    return ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "fixres"],
        license=licence,
        model_name=name if measured else None,
        eval_results=measured or None,
    ).to_yaml()
