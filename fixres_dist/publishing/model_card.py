"""The model card: a README.md in the form of the hub, with the numbers of results.json. No torch at import."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fixres_dist.base.commands import command, shell
from fixres_dist.base.errors import printable
from fixres_dist.base.secrets import redacted
from fixres_dist.base.small_files import Damaged, read_json
from fixres_dist.base.text import markdown_table
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import THROUGH_ALL, Tune
from fixres_dist.data import class_maps
from fixres_dist.evaluation import robustness
from fixres_dist.evaluation.exported import Fitted
from fixres_dist.runs.results import Accuracy, BeforeAfter, Results
from fixres_dist.runs.rundir import RunDir

BY_HEIGHT = """. timm's configuration cannot express this: `config.json` scales the shorter side instead, so timm's own evaluation
differs from the numbers above"""


def data_name(config: Config) -> str:
    return "the built-in example" if config.data.root == "demo" else Path(config.data.root).name


def evaluations(run: RunDir) -> list[dict[str, Any]]:
    """Records that `evaluate` kept in the run; without the validation split at the run's resolution (results.json)."""
    found, own = [], Results.read(run).res
    for file in sorted((run.root / "evaluations").glob("*.json")):
        again = f"{shell('rm', '-r', file)}, then {command('evaluate', '--run', run.root)} with the same set again"
        one = read_json(file, dict[str, Any], again)
        try:
            of_sets([one])
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(file, error, again) from None
        if (one["set"], one["res"]) != ("val", own):
            found.append(one)
    return found


def of_sets(records: Iterable[dict[str, Any]]) -> list[BeforeAfter]:
    return [BeforeAfter.read(one, n=one["after"]["n"]) for one in records]


def of_exported(run: RunDir, results: Results, alpha: float) -> BeforeAfter | None:
    """Accuracy of the weights at `alpha` on the validation split: from results.json at 1, else from alpha.json.

    None if `interpolate` has not measured this alpha on the run's own data.
    """
    data, file = run.config().data, run.root / "alpha.json"
    line = {**asdict(results), "set": data_name(run.config())}
    if alpha == 1:
        return BeforeAfter.read(line)
    if alpha == 0:
        return BeforeAfter.read(line, after=line["before"], delta_top1=0.0, delta_ci95=(0.0, 0.0))
    again = f"{shell('rm', '-r', file)}, then {command('interpolate', '--run', run.root)} again"
    try:
        found = read_json(file, dict[str, Any], again)
    except FileNotFoundError:
        return None
    measured = (found.get("data"), found.get("res"), found.get("resize_rule"), found.get("crop_pct", "auto"))
    if measured != (data.root, data.res, data.resize_rule, data.crop_pct):
        return None
    try:
        rows = (row for row in found["curves"]["val"] if row["alpha"] == alpha)
        return next((BeforeAfter.read({**line, **row}, after=row) for row in rows), None)
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(file, error, again) from None


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

{stages}

{arithmetic} {results.images_seen:,} images seen in {results.seconds:,.0f} s on {results.world_size} x {results.hardware.device};
torch {results.versions[torch]}, timm {results.versions[timm]}.

## Licence
- Weights: {licence}
- Data: {data_licence}

The original FixRes code and weights (CC BY-NC 4.0) are no part of these.
"""
USE = """\
```python
import timm

model = timm.create_model("{place}", pretrained=True).eval(){where}
# or, in that folder: timm.create_model("{timm_name}", num_classes={classes}, checkpoint_path="{file}")
settings = timm.data.resolve_data_config({{}}, model=model)
transform = timm.data.create_transform(**settings, is_training=False)
```"""
USE_ONNX = """\
Input `images`: [n, 3, px, px] in fp32, px as in the file's name, normalised with `mean` and `std` of `config.json`. Output `logits`:
[n, {classes}]. A file `.onnx.data` holds the weights of the `.onnx` of its name, and stays beside it."""


START = "; the classifier started as a logistic one on the untouched network's features"


def stage_lines(config: Config, results: Results) -> str:
    """What each stage trained, on which pictures, how long and at which rate."""
    whole = {"attention": "the attention layers", "all": "all layers"}
    lines, data = [], config.data
    if one := config.pretrain:
        if one.head_epochs:
            lines.append(f"The new classifier alone, on test crops of {one.res} px: {one.head_epochs} epochs.")
        lines.append(
            f"Stage one: {whole.get(one.policy, f'`{one.policy}`')} on `{one.train_transform}` of {one.res} px: {how_long(one)}, "
            f"{one.optimizer}; BatchNorm statistics `{one.bn_stats}`{START * (one.classifier == 'first_result')}."
        )
    trained = results.trained or whole.get(config.tune.policy, f"`{config.tune.policy}`")
    lines.append(
        f"Fixing: {trained} on `{data.train_transform}` of {data.res} px: {how_long(config.tune)}, {results.optimizer}; "
        f"BatchNorm statistics `{config.tune.bn_stats}`."
    )
    return "\n".join(f"{k}. {line}" for k, line in enumerate(lines, 1))


def how_long(tune: Tune) -> str:
    rate = f"learning rate {tune.peak_learning_rate():.3g} ({tune.schedule})"
    return f"{tune.epochs} epochs, batches of {tune.global_batch}, {rate}"


def arithmetic(config: Config, results: Results) -> str:
    """The formats of numbers: of a frozen trunk and of what trains."""
    if config.tune.policy in ("last_block", *THROUGH_ALL):
        return f"All layers in {results.precision}."
    return f"The frozen layers in {results.precision}, those that fixing trains in fp32."


def licences(config: Config, licence: str | None) -> tuple[str, str]:
    """(of the weights, of the data), as far as they are known; nothing is made up."""
    weights = "that of the weights they start from, which is not known here."
    if licence:
        weights = f"that of the weights they start from, which timm gives as {licence}."
    elif config.model.weights == "none":
        weights = "they start from no weights of others; who publishes them chooses."
    if config.data.root == "demo":
        return weights, "pictures that this project's program draws (Apache-2.0)."
    return weights, f"`{data_name(config)}`, whose terms hold beside the weights'; the run does not know them."


PLACES = ("--profile", "--runs-dir", "--cluster", "--at-once")  # options about the site, each with a value


def without_places(line: str) -> str:
    """A command line without what only its author's machine has: cluster settings, and the folders that files lie in."""
    try:
        words = shlex.split(line)
    except ValueError:
        return ""
    kept = []
    for k, word in enumerate(words):
        of_site = word.partition("=")[0] in PLACES or (k and words[k - 1] in PLACES) or word.startswith("cluster.")
        if not of_site:
            kept.append(file_name(word))
    return redacted(shell(*kept))


def file_name(word: str) -> str:
    """`--data=/home/me/photos` as `--data=photos`; a path relative to the folder where the command was typed stays."""
    return re.sub(r"(?:(?<=[=:])|^)(?:~[^/]*|\.{1,2})?/(?:.*/)?([^/]+)/*$", r"\1", word)


def row(line: BeforeAfter) -> list[object]:
    """A row of the card's table."""
    scores = (f"{a.top1:.2f} / {a.top5:.2f}" for a in (line.before, line.after))
    return [line.set, line.res, line.n, *scores, line.gain]


def notes(run: RunDir, results: Results, alpha: float) -> list[str]:
    """What the table does not say: accuracy before fixing at other sizes, the gain over the best of all, and its verdict."""
    before = [f"{one.top1:.2f} at {res} px ({one.why})" for res, one in results.before_at.items()]
    found = [f"Top-1 before fixing at other sizes: {', '.join(before)}."] if before else []
    chosen = results.choice.sentence() if results.choice else ""
    lost = robustness.warning(run, of_sets(evaluations(run))) if alpha == 1 else ""
    told = (results.over_the_best(), chosen, results.verdict(run), lost) if alpha == 1 else ()
    return found + [f"{one[0].upper()}{one[1:]}." for one in told if one]


def text(
    run: RunDir,
    files: list[str],
    licence: str | None,
    alpha: float = 1.0,
    repo: str = "",
    fitted: Fitted | None = None,
) -> str:
    """The card for a finished run's exported `files`; `licence` is that of the starting weights, where timm knows it. `repo`:
    where on the hub they will be. `fitted`: their temperature."""
    run = RunDir(run.whole_path)  # which is told from all other text of the card, as `.` is not
    config, results = run.config(), Results.read(run)
    from fixres_dist.models.build import preprocessing

    classes = len(class_maps.trained_classes(config, run.root, "val"))
    resize = preprocessing(results.timm_name).resize(config.data, results.res)
    name, exported = f"{file_name(config.model.name)} fixed at {results.res} px", of_exported(run, results, alpha)
    table = f"Not measured: `{command('interpolate', '--run', run.name, '--alpha', f'0,{alpha:g},1')}` does."
    if exported:
        head = ("data set", "px", "n", "before: top-1 / top-5", "after", "gain in top-1 (paired 95 % interval)")
        others = of_sets(evaluations(run)) if alpha == 1 else []
        table = markdown_table(head, map(row, [exported, *others]))
        table += "".join(f"\n\n{note}" for note in notes(run, results, alpha))
    if fitted:
        said = fitted.sentence()
        table += (
            f"\n\n{said[0].upper()}{said[1:]}. Divide the logits by it before the softmax, as `fixres predict` does."
        )
    weights = next((file for file in files if file.startswith("model.")), "")
    of_weights, of_data = licences(config, licence)
    start = "new weights" if config.model.weights == "none" else f"weights `{Path(config.model.weights).name}`"
    if config.pretrain:
        start += f" trained at {config.pretrain.res} px for {config.pretrain.epochs} epochs"
    mixed = f"\nThese weights are {alpha:g} of the way from the starting head to the fixed one.\n"
    body = TEMPLATE.format(
        results=replace(results, timm_name=file_name(results.timm_name)),
        name=name,
        classes=classes,
        start=start,
        alpha="" if alpha == 1 else mixed,
        table=table,
        rule=resize.described(results.res) + (BY_HEIGHT if resize.side == "height" else ""),
        use=(USE if weights else USE_ONNX).format(
            timm_name=file_name(results.timm_name),
            classes=classes,
            file=weights,
            place=f"hf-hub:{repo}" if repo else "local-dir:.",
            where="" if repo else "  # in the folder of this file",
        ),
        files=", ".join(f"`{file}`" for file in files),
        command=without_places(run.typed),
        stages=stage_lines(config, results),
        arithmetic=arithmetic(config, results),
        licence=of_weights,
        data_licence=of_data,
    )
    front = front_matter(name, data_name(config), licence, exported.after if exported else None)
    card = f"---\n{front}\n---\n{body}".replace(str(run.root), run.name)  # commands in it name a path of this machine
    return printable(card)


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
