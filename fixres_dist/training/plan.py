"""What a submission will do, in words and numbers, before anything starts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.base.text import duration
from fixres_dist.config import recipes
from fixres_dist.config.recipes import Facts
from fixres_dist.config.schema import Config
from fixres_dist.data import dataset, demo
from fixres_dist.data.folders import class_names
from fixres_dist.models import nvidia_apex
from fixres_dist.training.cache import rule
from fixres_dist.training.stages import Stage, batch_per_device, stages

IMAGENET = (1_281_167, 50_000, 1000)
# An eager EfficientNet is bound by memory traffic; 55 % of the nominal bandwidth is what published A100 timings reach.
H200_MIB_PER_S = 0.55 * 4.8e12 / 2**20
# Of the bytes that a forward writes and reads, what a backward pass needs: tensors that autograd saves, counted on the meta
# device for b0 at 320 px (0.49) and b4 at 380 px (0.48), fp32, timm 1.0.31; and the share of them left by checkpointing
# (0.11 and 0.07).
SAVED, CHECKPOINTED = 0.49, 0.11


@dataclass(frozen=True)
class Counts:
    train: int
    val: int
    classes: int
    source: str


def class_count(config: Config) -> int:
    root = config.data.root
    return len(demo.CLASSES if root == "demo" else class_names(Path(root) / "train")) if root else IMAGENET[2]


def count(config: Config) -> Counts:
    """Images and classes of the data set; ImageNet-1k's where none is given (a dry run needs no data)."""
    root = Path(config.data.root)
    if config.data.root == "demo":
        return Counts(demo.N_TRAIN, demo.N_VAL, class_count(config), "the built-in example")
    if not config.data.root:
        return Counts(*IMAGENET, "ImageNet-1k assumed: no --data given")
    files = [dataset.count(root, split) for split in ("train", "val")]
    return Counts(files[0], files[1], class_count(config), str(root))


def check(config: Config, world_size: int, dry: bool) -> None:
    """The mistakes that can be found before anything starts; raises UserError and writes nothing."""
    if not config.data.root and not dry:
        raise UserError(
            "no data set given. Next: --data DIR (with train/ and val/), --data demo, or data.root in the profile."
        )
    if config.data.root not in ("", "demo"):
        dataset.check_folder(Path(config.data.root))
    dataset.denied(config.data.deny_list, "train")
    weights = config.model.weights
    if weights not in recipes.WEIGHTS and not Path(weights).is_file():
        raise recipes.no_weights(weights)
    published = config.model.name in {name for name, _ in recipes.published()}
    if published and weights in recipes.TIMM_WEIGHTS:
        recipes.check_classes(
            config.model.timm_name, IMAGENET[2], class_count(config), new_classifier=config.pretrain is not None
        )
    if not any("container" in argument for argument in config.cluster.srun_args):  # there the worker looks
        nvidia_apex.check(config)
    rule.check(config.run.engine, stages(config, 1)[-1])
    batches = {
        "tune": config.tune.global_batch,
        **({"pretrain": config.pretrain.global_batch} if config.pretrain else {}),
    }
    for section, batch in batches.items():
        if batch % world_size:
            near = max(world_size, round(batch / world_size) * world_size)
            raise UserError(
                f"{section}.global_batch is {batch} and cannot be divided over {world_size} ranks. Next: {section}.global_batch={near}"
            )


def lines(config: Config, facts: Facts | None, counts: Counts, run_folder: Path, world_size: int) -> list[str]:
    """The plan: at most fifteen lines."""
    tune, res = config.tune, config.data.res
    todo = stages(config, counts.train)
    size = min(batch_per_device(config, res), -(-tune.global_batch // world_size))
    trained = f" ({facts.tuned(tune.policy)})" if facts else ""
    rows = [
        ("model", f"{config.model.name} = {config.model.timm_name}, weights {config.model.weights}"),
        (
            "data",
            f"{counts.train:,} training and {counts.val:,} validation images, {counts.classes:,} classes ({counts.source})",
        ),
        (
            "policy",
            f"{tune.policy}{trained}, BN statistics {tune.bn_stats}, transform "
            f"{config.data.train_transform}, resize {config.data.resize_rule}",
        ),
    ]
    if facts:
        classes = config.model.num_classes or counts.classes
        total, trainable = facts.total(classes), facts.trainable(tune.policy, classes)
        rows.append(("parameters", f"{trainable:,} trainable of {total:,} ({100 * trainable / total:.2f} %)"))
        rows.append(
            (
                "resolution",
                f"{facts.train_res} px weights, fixed at {res} px: "
                f"{facts.multiply_adds_g * (res / facts.res) ** 2:.2f} G multiply-adds per image",
            )
        )
    else:
        rows.append(("parameters", "known once the model is built (no recipe carries its facts)"))
        rows.append(("resolution", f"fixed at {res} px"))
    for stage in todo:
        peak = stage.tune.peak_learning_rate()
        rows.append(
            (
                stage.name,
                f"{stage.stop - stage.first:,} steps ({stage.tune.epochs} epochs of {stage.per_epoch:,}) at {stage.res} px, "
                f"global batch {stage.tune.global_batch}, learning rate {peak:.3g} {stage.tune.schedule}",
            )
        )
    rows.append(
        (
            "ranks",
            f"{world_size} ({config.cluster.nodes} node(s) x {config.cluster.gpus_per_node}); {size} images per forward and rank",
        )
    )
    chosen, why, pictures = engine_plan(config, facts, counts, todo[-1])
    rows.append(("engine", f"{chosen}: {why}"))
    if facts:
        rows.append(
            (
                "memory",
                f"about {memory_gib(config, facts, counts, world_size):.1f} GiB per GPU: weights, head, activations (estimate)",
            )
        )
        rows.append(("time", time_text(config, facts, pictures, world_size)))
    rows.append(("run", str(run_folder)))
    return [f"{key:<11}{text}" for key, text in rows]


def memory_gib(config: Config, facts: Facts, counts: Counts, world_size: int, bytes_per_value: int = 0) -> float:
    """Peak of a rank's device over both stages; `bytes_per_value`: of activations, 0: as run.precision says."""
    width = bytes_per_value or (4 if config.run.precision in ("fp32", "tf32") else 2)
    peaks = []
    for tune, res in zip(config.stage_settings(), config.resolutions(), strict=True):
        # Evaluation and statistics have no gradients, and take as many images at once as are left for a rank.
        most, without = batch_per_device(config, res), max(counts.val, min(tune.bn_stats_images, counts.train))
        step = min(most, -(-tune.global_batch // world_size))
        picture = 3 * facts.res**2 * (1 + 4 + width) / 2**20  # as uint8, as fp32, and cast
        mib = max(step, min(most, -(-without // world_size))) * (picture + facts.peak_mib * width)
        if tune.policy == "all":
            kept = CHECKPOINTED if config.run.activation_checkpointing else 1.0
            mib += step * SAVED * kept * facts.traffic_mib * width / 2
        weights = 4 * facts.parameters + 12 * facts.trainable(
            tune.policy, counts.classes
        )  # + gradient, momentum, bucket
        peaks.append(weights / 2**30 + mib * (res / facts.res) ** 2 / 2**10)
    return max(peaks)


def seconds(config: Config, facts: Facts, pictures: int, world_size: int) -> float | None:
    """Of `pictures` through the trunk, from memory traffic, on `world_size` H200; None where the trunk trains."""
    if config.pretrain or config.tune.policy in ("last_block", "all"):
        return None
    return pictures / images_per_second(config, facts) / world_size


def images_per_second(config: Config, facts: Facts) -> float:
    return H200_MIB_PER_S / (facts.traffic_mib * (config.data.res / facts.res) ** 2)


def time_text(config: Config, facts: Facts, pictures: int, world_size: int) -> str:
    predicted = seconds(config, facts, pictures, world_size)
    if predicted is None:
        return "not estimated for policies that train the trunk"
    speed = images_per_second(config, facts)
    return f"about {duration(predicted)} on {world_size} H200 ({speed:,.0f} images/s each; an estimate from memory traffic, +-40 %)"


def engine_plan(config: Config, facts: Facts | None, counts: Counts, stage: Stage) -> tuple[str, str, int]:
    """(engine of the fixing stage, why, pictures that go through the trunk), as far as it can be told from here."""
    setting, tune, folder = config.run.engine, config.tune, rule.feature_folder(config)
    streamed = rule.streamed_pictures(stage, counts.val, rule.evaluations(config))
    if config.run.precision in nvidia_apex.NEAREST:
        return "stream", f"run.precision={config.run.precision} runs the trunk through apex", streamed
    pictures, size = rule.VIEWS.get(stage.transform, 0) * counts.train + counts.val, 0.0
    if facts:
        wide = 2 if config.run.precision in ("fp32", "tf32") else 1
        size = 1024 * wide * facts.kept_kib(tune.policy, stage.res) * pictures
    need = rule.Need(pictures, int(size), rule.free_bytes(folder), folder)
    try:
        chosen, why = rule.choose(setting, stage, streamed, need)
    except UserError as error:
        return "refused", str(error), streamed
    if chosen == "cached" and not facts:
        why = f"if there is room in {folder}; the size of the features is known once the model is built"
    return chosen, why, pictures if chosen == "cached" else streamed
