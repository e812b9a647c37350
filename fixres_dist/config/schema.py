"""The configuration: frozen dataclasses, two levels. The comments of the fields are the reference documentation.

Each section refuses values out of range with a UserError. No torch: every login-node command imports this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fixres_dist.base.errors import UserError
from fixres_dist.config import shell_values
from fixres_dist.config.stage_settings import THROUGH_ALL, Pretrain, Transform, Tune, at_least

ResizeRule = Literal["fixefficientnet", "fixres", "fixres_height", "timm"]


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = ""  # recipe (b0 .. b8, l2, demo) or any timm model name
    timm_name: str = ""  # what timm builds; follows from name and weights
    weights: str = "pretrained"  # ns | ap | pretrained | none | a file (safetensors, or a plain torch state dict)
    # Of a file with several models: the entry or prefix of one, such as state_dict; empty: averaged weights first
    checkpoint_key: str = ""
    num_classes: int = 0  # 0: as many as the data set has

    def __post_init__(self) -> None:
        at_least(self, 0, "num_classes")


@dataclass(frozen=True, kw_only=True)
class Data:
    root: str = ""  # directory with train/ and val/, a folder per class in each; or demo, the built-in example
    train_split: str = "train"  # folder below root, or its tar files: a word of their names, or train-{000..146}.tar
    val_split: str = "val"  # the same, of the images that accuracy is measured on
    labels: str = ""  # list of `name label` lines for images that stand in no class folders; empty: one beside them
    res: int = 224  # test resolution in pixels: the model is fixed for it, and evaluated at it
    resize_rule: ResizeRule = "timm"  # how an image becomes res x res, in tests and in training (docs/method.md)
    crop_pct: float | Literal["auto"] = "auto"  # the crop's side over that of the scaled photograph; auto: the rule's
    # Class folders to classes of the weights: natural (timm's order), imagenet, or a file; empty: in torchvision's order
    class_map: str = ""
    train_transform: Transform = "test_aug"  # how the fixing stage augments an image
    backend: Literal["auto", "dali", "torch"] = "auto"  # decoder and resizer; auto: dali on a GPU, torch on a CPU
    on_bad: Literal["stop", "skip"] = "stop"  # a file that cannot be decoded: stop and name it, or do without it
    deny_list: str = ""  # file of images to leave out, as `data verify --deny-list` writes it
    # With on_bad=skip: images that a run may do without; more end it. auto: 1 in 100 of the data set, at least 10
    max_skipped: int | Literal["auto"] = "auto"
    max_pixels: int = 2**27  # of a picture: one with more counts as undecodable; the default takes 0.4 GB when decoded
    max_file_mib: int = 1024  # of a picture's file or tar member: the same
    hw_decoder_load: float = 0.65  # share of the JPEGs that the GPU's decoding engine takes (dali)
    preallocate_width: int = 0  # pixels of the largest photograph, for the GPU decoder's buffers (dali); 0: they grow
    preallocate_height: int = 0  # the same, of its height
    workers: int | Literal["auto"] = "auto"  # loader processes per rank; auto: the CPUs this rank may use; 0: none
    cache: str = ""  # directory of scanned indexes and features; empty: $FIXRES_CACHE or ~/.cache/fixres_dist

    def __post_init__(self) -> None:
        if self.train_split == self.val_split:
            raise UserError(f"train_split and val_split are both {self.val_split!r}; accepted: two different names.")
        at_least(self, 32, "res")
        at_least(self, 0, "workers", "max_skipped", "preallocate_width", "preallocate_height")
        at_least(self, 1, "max_pixels", "max_file_mib")
        if self.crop_pct != "auto" and not 0.25 <= self.crop_pct <= 2:
            raise UserError(f"crop_pct is {self.crop_pct}; accepted: auto, or 0.25 to 2, such as 0.875 (1: no margin).")
        if not 0 <= self.hw_decoder_load <= 1:
            raise UserError(f"hw_decoder_load is {self.hw_decoder_load}; accepted: 0 to 1.")

    def split_name(self, split: str) -> str:
        """How the data set calls the split `train` or `val`; other splits have their own names."""
        return {"train": self.train_split, "val": self.val_split}.get(split, split)


@dataclass(frozen=True, kw_only=True)
class Run:
    seed: int = 0  # of the order, the augmentation and new weights
    # Number format of the frozen trunk (the head is fp32), or with last_block and all of the whole model; apex-*: apex.amp
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "apex-O1", "apex-O2"] = "auto"
    optimizer: Literal["torch", "apex"] = "torch"  # torch's SGD, or apex's FusedSGD: equal updates, up to rounding
    activation_checkpointing: bool = False  # with policy all: run blocks twice instead of keeping their activations
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"  # auto: a short probe of the frozen trunk
    compile: bool | Literal["auto"] = "auto"  # torch.compile the frozen trunk; auto: on a GPU, if the probe says so
    deterministic: bool = False  # only algorithms that repeat to the bit on the same kind of GPU; no probes by time
    engine: Literal["auto", "stream", "cached"] = "auto"  # stream: the trunk runs in every epoch; cached: once
    feature_cache: str = ""  # directory of the cached engine's files, seen by all ranks; empty: features/ in data.cache
    batch_per_device: int | Literal["auto"] = "auto"  # images per forward of a rank; auto: chosen from the resolution
    log_every: int = 10  # optimizer steps
    save_every_s: float = 300.0  # seconds between checkpoints
    watchdog_s: float = 600.0  # without a batch the run is ended and tried again (0: never); thrice before step one
    eval_every: int = 1  # epochs; 0: only before and after
    logger: Literal["none", "wandb"] = "none"  # a second place of TensorBoard's values: Weights & Biases
    profile: int | Literal["steps"] = 0  # optimizer steps that are traced once, into tb/profile/; steps: 5 of them
    record_samples: bool = False  # samples/rank_K.jsonl: which sample, in which view, at which step

    def __post_init__(self) -> None:
        at_least(self, 1, "log_every", "batch_per_device")
        at_least(self, 0, "save_every_s", "watchdog_s", "eval_every", "profile")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; accepted: 0 .. 2**63 - 1.")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    nodes: str = "1"  # a number, or MIN-MAX: start with as many as are free
    gpus_per_node: int = 8  # ranks per node; on a node without GPUs: processes
    cpus_per_task: int = 8  # per rank; decoding needs them
    mem: str = "auto"  # per node, Slurm's units; 0: all of it; auto: the GPUs' share of it, where a node is shared
    time: str = "24:00:00"  # Slurm's format; the job saves, requeues and goes on, so this bounds a start, not the run
    partition: str = ""  # sbatch's, as the next four; empty: the site's default
    account: str = ""  # whose time is used
    qos: str = ""  # quality of service, which may bound time and jobs
    constraint: str = ""  # features that a node must have, such as h200
    exclude: str = ""  # nodes to avoid, such as n7,n12
    signal_delay_s: int = 120  # warning before the time limit; must cover one step and one save
    max_restarts: int = 20  # after failures; preemptions and time limits are not counted
    env: Mapping[str, str] = field(default_factory=dict)  # exported in the job, e.g. NCCL_SOCKET_IFNAME
    setup: tuple[str, ...] = ()  # shell lines before srun, e.g. module load
    python: str = ""  # what starts it in the ranks, such as: apptainer exec --nv my.sif python3; empty: what submits
    srun_args: tuple[str, ...] = ()  # e.g. --container-image=..., --container-mounts=...
    # Any other option of sbatch by its long name, e.g. {reservation: maint, gres: "gpu:h100:8"}; true: a flag; none: not given
    sbatch: Mapping[str, str] = field(default_factory=dict)
    # A shell command that runs when the run is done, has failed or is requeued (docs/cluster.md has its variables)
    on_change: str = ""

    def __post_init__(self) -> None:
        self.node_range()
        for name in ("mem", "time", "partition", "account", "qos", "constraint", "exclude", "python"):
            shell_values.one_line(f"cluster.{name}", getattr(self, name))
        shell_values.words("cluster.python", self.python)
        for argument in self.srun_args:
            shell_values.one_line("cluster.srun_args", argument)
        shell_values.variables("cluster.env", self.env)
        for name in ("setup", "srun_args"):
            shell_values.no_stand_in(f"cluster.{name}", getattr(self, name))
        shell_values.no_stand_in("cluster.on_change", [self.on_change])
        shell_values.one_line("cluster.on_change", self.on_change.replace("\n", "").replace("\t", ""))
        for name in ("env", "sbatch"):
            shell_values.no_stand_in(f"cluster.{name}", getattr(self, name).values())
        object.__setattr__(self, "sbatch", shell_values.sbatch_options("cluster.sbatch", self.sbatch))
        at_least(self, 1, "gpus_per_node", "cpus_per_task", "signal_delay_s")
        at_least(self, 0, "max_restarts")

    def node_range(self) -> tuple[int, int]:
        """(fewest, most) nodes."""
        low, _, high = self.nodes.partition("-")
        try:
            least, most = int(low), int(high or low)
        except ValueError:
            least, most = 0, 0
        if not 1 <= least <= most:
            raise UserError(f"nodes is {self.nodes!r}; accepted: a number from 1, or MIN-MAX such as 1-4.")
        return least, most


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    tune: Tune = Tune()  # noqa: RUF009 (it is frozen)
    pretrain: Pretrain | None = None
    run: Run = Run()
    cluster: Cluster = Cluster()

    def __post_init__(self) -> None:
        policies = [stage.policy for stage in self.stage_settings()]
        if self.run.activation_checkpointing and not {*THROUGH_ALL} & {*policies}:
            raise UserError(
                f"activation_checkpointing with policy {policies[-1]}: no gradient runs through the frozen blocks, so they "
                "keep no activations. Next: run.activation_checkpointing=false, or tune.policy=all"
            )
        if self.pretrain:
            check_stage_one(self, self.pretrain)

    def stage_settings(self) -> tuple[Tune, ...]:
        """The settings of the stages, in order."""
        first = (self.pretrain,) if self.pretrain else ()
        head = (self.pretrain.head(),) if self.pretrain and self.pretrain.head_epochs else ()
        return (*head, *first, self.tune)

    def resolutions(self) -> tuple[int, ...]:
        """The resolutions of the stages, in order, in pixels; and those that are to be chosen from."""
        more = self.tune.hold_out_sizes if self.tune.chooses else ()
        return (*((self.pretrain.res,) if self.pretrain else ()), self.data.res, *more)


def check_stage_one(config: Config, first: Pretrain) -> None:
    """Raises UserError for settings of stage one that another section excludes."""
    timms = first.optimizer != "sgd" or first.layer_decay < 1
    if timms and (config.run.optimizer == "apex" or config.run.precision.startswith("apex")):
        key = "run.optimizer=torch" if config.run.optimizer == "apex" else "run.precision=auto"
        raise UserError(
            f"pretrain.optimizer={first.optimizer} with pretrain.layer_decay={first.layer_decay:g} is timm's, and apex is "
            f"asked for, whose optimizer is plain SGD. Next: {key}, or pretrain.optimizer=sgd pretrain.layer_decay=1"
        )
    if first.rand_augment and config.data.backend == "dali":
        raise UserError(
            "pretrain.rand_augment is Pillow's work, and data.backend=dali draws no pictures with Pillow. "
            "Next: data.backend=auto, or pretrain.rand_augment="
        )
    if first.mixes and config.run.batch_per_device == 1:
        raise UserError(
            "pretrain.mixup and cutmix mix pairs of a forward pass, and run.batch_per_device is 1. "
            "Next: run.batch_per_device=2, or both 0"
        )
    if first.classifier == "first_result" and config.model.weights == "none":
        raise UserError(
            "pretrain.classifier=first_result starts from a classifier on the weights' features, and model.weights is none. "
            "Next: pretrain.classifier=new"
        )


def check_held_out(config: Config) -> None:
    """Raises UserError where pictures are held out of no stage one, or other settings than the classifier's are to be chosen.

    At submission, since stage one and tune.policy=auto are decided after a configuration is first read.
    """
    tune = config.tune
    if not tune.hold_out:
        return
    if not config.pretrain:
        raise UserError(
            "tune.hold_out keeps pictures out of stage one, and there is none: published weights have seen all of train, "
            "and stay as they are published. Next: tune.hold_out=0"
        )
    policy, shown = tune.policy, config.data.train_transform
    if config.tune.chooses and (policy not in ("classifier", "classifier+bn_stats") or shown != "test"):
        raise UserError(
            f"tune.hold_out_use=choose tries classifiers on kept features of test pictures, and tune.policy is {policy} "
            f"with data.train_transform={shown}. Next: tune.policy=auto, or tune.hold_out_use=train"
        )
