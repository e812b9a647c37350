"""What a submission will do, in words and numbers, before anything starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.config import own_data, recipes, schema
from fixres_dist.config.recipes import Costs, Facts
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps, dataset, demo, deny_lists
from fixres_dist.models import nvidia_apex
from fixres_dist.models.sizes import Sizes, of_weights
from fixres_dist.runs import wandb_run
from fixres_dist.training.cache import rule
from fixres_dist.training.estimates import LEFT_OUT, Counts, here, memory_text, roughly, seconds, time_text
from fixres_dist.training.stages import Stage, batch_per_device, other_sizes, some_held_out, stages

FEWEST = 20  # held-out images on which settings are chosen
IMAGENET = (1_281_167, 50_000, 1000)


@dataclass(frozen=True)
class More:
    """What the plan of a data set with classes of its own says besides."""

    why: str = ""  # stage one was added
    costs: Costs | None = None  # of a picture, where no recipe has them


def classes(config: Config) -> tuple[str, ...]:
    """The names of the model's classes, in the order of its logits; numbers where no data set is given."""
    if config.data.root == "demo":
        return demo.CLASSES
    return (
        class_maps.trained_classes(config, None, "train") if config.data.root else tuple(map(str, range(IMAGENET[2])))
    )


def count(config: Config) -> Counts:
    """Images and classes of the data set; ImageNet-1k's where none is given (a dry run needs no data)."""
    root = Path(config.data.root)
    if config.data.root == "demo":
        return Counts(demo.N_TRAIN, demo.N_VAL, len(classes(config)), "the built-in example")
    if not config.data.root:
        return Counts(*IMAGENET, "ImageNet-1k assumed: no --data given")
    train, val = (dataset.survey(root, split, config.data) for split in ("train", "val"))
    denied = deny_lists.counted([train.denied, val.denied])
    nothing = train.passed == val.passed == "nothing"
    passed = "nothing" if nothing else f"{train.passed} (train), {val.passed} (val)"
    return Counts(
        train.images,
        val.images,
        len(classes(config)),
        str(root),
        "" if nothing and not denied else f"passed over: {passed}{denied}",
    )


def check(config: Config, world_size: int, dry: bool) -> None:
    """The mistakes that can be found before anything starts; raises UserError and writes nothing.

    `dry`: a dry run needs no data set.
    """
    if not config.data.root and not dry:
        raise UserError(
            "no data set given. Next: --data DIR (with train/ and val/), --data demo, or data.root in the profile."
        )
    if config.data.root not in ("", "demo"):
        dataset.check_folder(Path(config.data.root), config.data)
        class_maps.check(config)
        recipes.check_count(config.model.num_classes, len(classes(config)))
    check_weights(config)
    if config.run.logger == "wandb":
        wandb_run.check()
    schema.check_held_out(config)
    if config.tune.hold_out:
        held_out(config, count(config))
    containers = [config.cluster.python, *(word for word in config.cluster.srun_args if "container" in word)]
    if not any(containers):  # a container may hold another apex
        nvidia_apex.check_apex(config)
    rule.check(config.run.engine, stages(config, 1)[-1])
    for stage in stages(config, 1):
        section, batch = "tune" if stage.name == "fix" else "pretrain", stage.tune.global_batch
        whole = world_size * stage.together
        if batch % whole:
            near = max(whole, round(batch / whole) * whole)
            pairs = " in pairs, which mixup and cutmix mix" if stage.together > 1 else ""
            raise UserError(
                f"{section}.global_batch is {batch} and cannot be divided over {world_size} ranks{pairs}. "
                f"Next: {section}.global_batch={near}"
            )


def check_weights(config: Config) -> None:
    """Raises UserError for a file of weights that is not there, and for a recipe's weights of other classes."""
    weights = config.model.weights
    if weights not in recipes.WEIGHTS and not Path(weights).is_file():
        raise recipes.no_weights(weights)
    published = config.model.name in {name for name, _ in recipes.published()}
    if published and weights in recipes.TIMM_WEIGHTS:
        name, new_classifier = config.model.timm_name, config.pretrain is not None
        recipes.check_classes(name, IMAGENET[2], len(classes(config)), new_classifier)


def lines(
    config: Config,
    facts: Facts | None,
    counts: Counts,
    run_folder: Path,
    world_size: int,
    on_cpu: bool = False,
    more: More = More(),
) -> list[str]:
    """The plan: at most seventeen lines. `on_cpu`: the ranks are to be processes on this machine's CPU."""
    model, data, tune, cluster = config.model, config.data, config.tune, config.cluster
    others, _ = before(config, facts)
    todo, classes = stages(config, counts.train), f"{counts.classes:,} classes ({counts.source})"
    trained = f" ({facts.tuned(tune.policy)})" if facts else ""
    engine, why, pictures = engine_plan(config, facts, counts, todo[-1])
    size = min(batch_per_device(config, data.res), -(-tune.global_batch // world_size))
    rows = {
        "model": f"{model.name} = {model.timm_name}, weights {model.weights}",
        "data": f"{counts.train:,} training and {counts.val:,} validation images, {classes}"
        + (f", class map {data.class_map}" if data.class_map else ""),
        "files": counts.files,
        "own data": more.why,
        "policy": f"{tune.policy}{trained}, BN statistics {tune.bn_stats}, transform {data.train_transform}, "
        f"resize {data.resize_rule}",
        "parameters": "known once the model is built (no recipe carries its facts)",
        "resolution": f"{starting(config, facts).train} px weights, fixed at {data.res} px",
    }
    costs = facts or more.costs
    if facts:
        count = model.num_classes or counts.classes
        total, trainable = facts.total(count), facts.trainable(tune.policy, count)
        rows["parameters"] = f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)"
    elif costs:
        rows["parameters"] = f"{costs.parameters:,}"
    if costs:
        cost = f"{costs.multiply_adds_g * (data.res / costs.res) ** 2:.2f} G multiply-adds per image"
        rows["resolution"] += f": {cost}"
    for stage in todo:
        t = stage.tune
        rows[stage.name] = (
            f"{stage.stop - stage.first:,} steps ({t.epochs} epochs of {stage.per_epoch:,}) at {stage.res} px, "
            f"global batch {t.global_batch}, learning rate {t.peak_learning_rate():.3g} {t.schedule}"
            + (f", {stage.ordinary.optimizer}" if stage.ordinary.optimizer != "sgd" else "")
            + ", from the first result's classifier" * (stage.ordinary.classifier == "first_result")
        )
        if config.pretrain and stage.name != "head":
            section = "pretrain" if stage.name == "pretrain" else "tune"
            rows[stage.name] += own_data.few_steps(section, t, stage.stop - stage.first, counts.train)
    rows["held out"] = held_out(config, counts)
    where = f"{cluster.nodes} node(s) x {cluster.gpus_per_node}"
    rows |= {"before": others} if others else {}
    rows["ranks"] = f"{world_size} ({where}); {size} images per forward and rank"
    rows["engine"] = f"{engine}: {why}"
    if costs:
        rows["memory"] = memory_text(config, costs, counts, world_size, on_cpu)
        rows["time"] = time_text(config, costs, counts, pictures, world_size, on_cpu)
    rows["run"] = str(run_folder)
    return [f"{key:<11}{text}" for key, text in rows.items() if text]


def held_out(config: Config, counts: Counts) -> str:
    """Which pictures stay out of stage one, and why; empty for none. Raises UserError where a class would keep none."""
    tune, n = config.tune, counts.train
    if not tune.hold_out:
        return ""
    count = some_held_out(tune, n, counts.classes)
    if not tune.chooses:
        return f"{count:,} images stay out of stage one, and are half of what the fixing stage draws"
    listed = ", ".join(map(str, tune.hold_out_sizes or (config.data.res,)))
    few = (
        f"; warning: few to choose on. Next: tune.hold_out=0, where {FEWEST} are not to be had"
        if count < FEWEST
        else ""
    )
    return f"{count:,} images stay out of a first stage one and choose the fixing stage's settings at {listed} px; then all again{few}"


def starting(config: Config, facts: Facts | None) -> Sizes:
    """Of the weights that the run starts from."""
    return Sizes(facts.train_res, 0) if facts and config.model.weights in recipes.WEIGHTS else of_weights(config.model)


def before(config: Config, facts: Facts | None) -> tuple[str, float]:
    """(at which other sizes the weights are measured before fixing, what that costs in evaluations at the test size)."""
    others, done = other_sizes(config, starting(config, facts)), config.pretrain.res if config.pretrain else 0
    listed = " and ".join(f"{res} px ({why})" for res, why in others.items())
    evaluations = sum((res / config.data.res) ** 2 for res in others if res != done)
    cost = f"{evaluations:.2f} of an evaluation at {config.data.res} px more" if evaluations else "as stage one ends"
    return f"also measured at {listed}: {cost}" if listed else "", evaluations


def several(runs: list[tuple[Path, Config, Facts | None, Costs | None]], on_cpu: bool = False) -> list[str]:
    """Lines for a table or a grid: the estimate of each run, and the sum.

    The costs are of a picture, where no recipe has them. `on_cpu`: as in `lines`.
    """
    lines, total, gpu_s, unknown = [], 0.0, 0.0, 0
    for root, config, facts, counted in runs:
        counts, ranks = count(config), config.cluster.node_range()[0] * config.cluster.gpus_per_node
        stage = stages(config, counts.train)[-1]
        costs, pictures = facts or counted, engine_plan(config, facts, counts, stage)[2]
        estimate = seconds(config, costs, counts, pictures, ranks, on_cpu) if costs else None
        total, gpu_s = total + (estimate or (0,))[0], gpu_s + (estimate or (0,))[0] * ranks
        unknown += estimate is None
        where = f"in {ranks} process(es)" if on_cpu else f"on {ranks}"
        lines.append(f"run        {root}: {f'{roughly(estimate[0])} {where}' if estimate else 'not estimated'}")
    rest = f"; {unknown} of them not estimated" if unknown else ""
    of_gpus = f", {gpu_s / 3600:,.1f} hours of one H200 (+-40 %, {LEFT_OUT})"
    what = f"{roughly(total)} one after another{f' {here()}' if on_cpu else of_gpus}"
    return [*lines, f"{'all':<11}{len(runs)} runs: {what}{rest}"]


def engine_plan(config: Config, facts: Facts | None, counts: Counts, stage: Stage) -> tuple[str, str, int]:
    """(engine of the fixing stage, why, pictures that go through the trunk), as far as it can be told from here.

    The worker decides with the measured size of the features and keeps that in choices.json (cache/build.py).
    """
    setting, folder = config.run.engine, rule.feature_folder(config)
    streamed = rule.streamed_pictures(stage, counts.val, rule.evaluations(config))
    others = round(before(config, facts)[1] * counts.val)  # whatever the engine
    if config.run.precision in nvidia_apex.NEAREST:
        return "stream", f"run.precision={config.run.precision} runs the trunk through apex", streamed + others
    pictures, size = rule.VIEWS.get(stage.transform, 0) * counts.train + counts.val, 0.0
    if facts:
        wide = 2 if config.run.precision in ("fp32", "tf32") else 1
        size = 1024 * wide * facts.kept_kib(config.tune.policy, stage.res) * pictures
    try:
        engine, why = rule.choose(
            setting, stage, streamed, rule.Need(pictures, int(size), rule.free_bytes(folder), folder)
        )
    except UserError as error:
        return "refused", str(error), streamed + others
    if engine == "cached" and not facts:
        why = f"if there is room in {folder}; the size of the features is known once the model is built"
    return engine, why, (pictures if engine == "cached" else streamed) + others
