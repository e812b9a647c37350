"""What a submission will do, in words and numbers, before anything starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fixres_dist.base import memory
from fixres_dist.base.errors import UserError
from fixres_dist.base.text import duration
from fixres_dist.config import recipes
from fixres_dist.config.recipes import Facts
from fixres_dist.config.schema import THROUGH_ALL, Config
from fixres_dist.data import class_maps, dataset, demo, deny_lists
from fixres_dist.models import nvidia_apex
from fixres_dist.models.sizes import Sizes, of_weights
from fixres_dist.training.cache import rule
from fixres_dist.training.stages import Stage, batch_per_device, other_sizes, stages

IMAGENET = (1_281_167, 50_000, 1000)
# An eager EfficientNet is bound by memory traffic; 55 % of the nominal bandwidth is what published A100 timings reach.
H200_MIB_PER_S = 0.55 * 4.8e12 / 2**20
# Of the bytes that a forward writes and reads, what a backward pass needs: tensors that autograd saves, counted on the meta
# device for b0 at 320 px (0.49) and b4 at 380 px (0.48), fp32, timm 1.0.31; and the share of them left by checkpointing
# (0.11 and 0.07).
SAVED, CHECKPOINTED = 0.49, 0.11
PROCESS_GIB = 0.8  # of a process that has imported torch and timm, before it has a model (torch 2.15: 825 MB)


@dataclass(frozen=True)
class Counts:
    train: int
    val: int
    classes: int
    source: str
    files: str = "passed over: nothing"  # what in the data set is no sample


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
    passed = train.passed if train.passed == val.passed == "nothing" else f"{train.passed} (train), {val.passed} (val)"
    return Counts(
        train.images,
        val.images,
        len(classes(config)),
        str(root),
        f"passed over: {passed}{deny_lists.counted([train.denied, val.denied])}",
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
    weights = config.model.weights
    if weights not in recipes.WEIGHTS and not Path(weights).is_file():
        raise recipes.no_weights(weights)
    published = config.model.name in {name for name, _ in recipes.published()}
    if published and weights in recipes.TIMM_WEIGHTS:
        name, new_classifier = config.model.timm_name, config.pretrain is not None
        recipes.check_classes(name, IMAGENET[2], len(classes(config)), new_classifier)
    if not any("container" in argument for argument in config.cluster.srun_args):  # a container may hold another apex
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


def lines(
    config: Config, facts: Facts | None, counts: Counts, run_folder: Path, world_size: int, on_cpu: bool = False
) -> list[str]:
    """The plan: at most fifteen lines. `on_cpu`: the ranks are to be processes on this machine's CPU."""
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
        "policy": f"{tune.policy}{trained}, BN statistics {tune.bn_stats}, transform {data.train_transform}, "
        f"resize {data.resize_rule}",
        "parameters": "known once the model is built (no recipe carries its facts)",
        "resolution": f"{starting(config, facts).train} px weights, fixed at {data.res} px",
    }
    if facts:
        count = model.num_classes or counts.classes
        total, trainable = facts.total(count), facts.trainable(tune.policy, count)
        rows["parameters"] = f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)"
        cost = f"{facts.multiply_adds_g * (data.res / facts.res) ** 2:.2f} G multiply-adds per image"
        rows["resolution"] += f": {cost}"
    for stage in todo:
        t = stage.tune
        rows[stage.name] = (
            f"{stage.stop - stage.first:,} steps ({t.epochs} epochs of {stage.per_epoch:,}) at {stage.res} px, "
            f"global batch {t.global_batch}, learning rate {t.peak_learning_rate():.3g} {t.schedule}"
            + (f", {stage.ordinary.optimizer}" if stage.ordinary.optimizer != "sgd" else "")
        )
    where = f"{cluster.nodes} node(s) x {cluster.gpus_per_node}"
    rows |= {"before": others} if others else {}
    rows["ranks"] = f"{world_size} ({where}); {size} images per forward and rank"
    rows["engine"] = f"{engine}: {why}"
    if facts:
        gib = memory_gib(config, facts, counts, world_size)
        rows["memory"] = f"about {gib:.1f} GiB per GPU: weights, head, activations (estimate)"
        if on_cpu:
            gib = cpu_memory_gib(config, facts, counts, world_size, world_size)
            rows["memory"] = f"about {gib:.1f} GiB of this machine's memory for {world_size} process(es) (estimate)"
            if short := shortage(config, facts, counts, world_size, world_size):
                rows["memory"] += f"; {short}"
        rows["time"] = time_text(config, facts, pictures, world_size)
    rows["run"] = str(run_folder)
    return [f"{key:<11}{text}" for key, text in rows.items()]


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


def memory_gib(config: Config, facts: Facts, counts: Counts, world_size: int) -> float:
    """Peak of a rank's device over both stages, with activations as wide as run.precision makes them."""
    width = 4 if config.run.precision in ("fp32", "tf32") else 2
    peaks = []
    for stage in stages(config, counts.train):
        tune, most = stage.tune, batch_per_device(config, stage.res)
        # Evaluation and statistics have no gradients, and take as many images at once as are left for a rank.
        without = max(counts.val, min(tune.bn_stats_images, counts.train))
        step = min(most, -(-tune.global_batch // world_size))
        picture = 3 * facts.res**2 * (1 + 4 + width) / 2**20  # as uint8, as fp32, and cast
        mib = max(step, min(most, -(-without // world_size))) * (picture + facts.peak_mib * width)
        if tune.policy == "all":
            kept = CHECKPOINTED if config.run.activation_checkpointing else 1.0
            mib += step * SAVED * kept * facts.traffic_mib * width / 2
        trainable = facts.trainable(tune.policy, counts.classes)
        own = stage.ordinary  # gradient, momentum (Adam's kind: and the squares') and DDP's bucket; the moving average
        each = 12 + (
            0 if own.optimizer in ("sgd", "nesterov", "lars", "lion") else 4 if own.optimizer != "adan" else 12
        )
        weights = 4 * facts.parameters * (2 if own.ema_decay else 1) + each * trainable
        peaks.append(weights / 2**30 + mib * (stage.res / facts.res) ** 2 / 2**10)
    return max(peaks)


def cpu_memory_gib(config: Config, facts: Facts, counts: Counts, world_size: int, processes: int) -> float:
    """Of `processes` ranks on one machine's CPU, each with its libraries; `auto` is taken to be fp32, the wider format."""
    wide = replace(config, run=replace(config.run, precision="fp32")) if config.run.precision == "auto" else config
    return processes * (PROCESS_GIB + memory_gib(wide, facts, counts, world_size))


def shortage(
    config: Config, facts: Facts, counts: Counts, world_size: int, processes: int, started: bool = False
) -> str:
    """What is missing on a CPU, and the batch that would fit; empty where the estimate fits. `started`: they run already."""
    have = memory.available_bytes()
    if have is None:
        return ""
    have_gib = have / 2**30 + (processes * PROCESS_GIB if started else 0.0)

    def need(batch: int) -> float:
        tried = replace(config, run=replace(config.run, batch_per_device=batch))
        return cpu_memory_gib(tried, facts, counts, world_size, processes)

    batch = max(batch_per_device(config, res) for res in config.resolutions())
    needed = cpu_memory_gib(config, facts, counts, world_size, processes)
    if needed <= have_gib:
        return ""
    while batch > 1 and need(batch) > have_gib:
        batch //= 2
    way = f"run.batch_per_device={batch}" if need(batch) <= have_gib else "a smaller --res, or fewer processes"
    return f"{have_gib:.1f} of the {needed:.1f} GiB are available, and the kernel kills processes that take more. Next: {way}"


LEFT_OUT = "without decoding, start-up, compiling and the wait in a queue"


def seconds(config: Config, facts: Facts | None, pictures: int, world_size: int) -> tuple[float, float] | None:
    """(seconds that `pictures` take through the frozen trunk, images per second of a rank), by memory traffic.

    None where nothing is known of the model, or the trunk trains.
    """
    if not facts or config.pretrain or config.tune.policy in ("last_block", *THROUGH_ALL):
        return None
    images_per_second = H200_MIB_PER_S / (facts.traffic_mib * (config.data.res / facts.res) ** 2)
    return pictures / images_per_second / world_size, images_per_second


def time_text(config: Config, facts: Facts, pictures: int, world_size: int) -> str:
    estimate = seconds(config, facts, pictures, world_size)
    if not estimate:
        return "not estimated for policies that train the trunk"
    eta, images_per_second = duration(estimate[0]), f"{estimate[1]:,.0f} images/s each"
    return (
        f"about {eta} on {world_size} H200 ({images_per_second}; an estimate from memory traffic, +-40 %, {LEFT_OUT})"
    )


def several(runs: list[tuple[Path, Config, Facts | None]]) -> list[str]:
    """Lines for a table or a grid: the estimate of each run, and the sum."""
    lines, total, gpu_s, unknown = [], 0.0, 0.0, 0
    for root, config, facts in runs:
        counts, ranks = count(config), config.cluster.node_range()[0] * config.cluster.gpus_per_node
        stage = stages(config, counts.train)[-1]
        estimate = seconds(config, facts, engine_plan(config, facts, counts, stage)[2], ranks)
        total, gpu_s = total + (estimate or (0,))[0], gpu_s + (estimate or (0,))[0] * ranks
        unknown += estimate is None
        lines.append(
            f"run        {root}: {f'about {duration(estimate[0])} on {ranks}' if estimate else 'not estimated'}"
        )
    rest = f"; {unknown} of them not estimated" if unknown else ""
    what = f"about {duration(total)} one after another, {gpu_s / 3600:,.1f} hours of one H200 (+-40 %, {LEFT_OUT})"
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
