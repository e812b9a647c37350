"""`fixres bench data | trunk | step | end-to-end | gpu`"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base.commands import command
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError, check_output, unknown
from fixres_dist.base.small_files import write_json
from fixres_dist.base.text import parse_sizes
from fixres_dist.config import timm_names
from fixres_dist.data import dataset
from fixres_dist.data.layout import find

if TYPE_CHECKING:
    from fixres_dist.bench.result import Result

TRANSFORMS = ("random_resized_crop", "test_aug", "test")
# Ours yield uint8, since a GPU normalises for nothing; `torch normalised` does it on the CPU, as `pil` has to.
LOADERS = ("pil", "torch", "torch normalised", "dali")
SIZES = "tf_efficientnet_b0@320x256,tf_efficientnet_b4@380x128,tf_efficientnet_b7@600x32,tf_efficientnet_l2@600x16"
STAGES = {
    "data": "images/s and CPU-ms per image of both backends beside torch's DataLoader with PIL",
    "trunk": "images/s of the frozen trunk's forward in fp32, bf16 and as auto chooses, beside timm's inference",
    "step": "images/s and memory of an optimizer step from pictures in memory, beside the original protocol, full "
    "fine-tuning and timm's inference",
    "end-to-end": "images/s from JPEG files to the optimizer step, beside decoding alone and the step alone; "
    "runs with and without the feature cache",
    "gpu": "trunk, step and end-to-end at a GPU's sizes",
}
EXAMPLES = (
    "data --data /data/imagenet",
    "trunk --model resnet50 --res 224",
    "step --model tf_efficientnet_b4 --res 380",
    "end-to-end --images 512",
    "gpu --json gpu.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sub = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in STAGES.items():
        p = sub.add_parser(stage, help=text, description=text)
        p.set_defaults(stage=stage)
        p.add_argument("--json", type=Path, help="also write the result here")
        p.add_argument("--repeat", type=int, default=5, help="turns of each variant; medians count; default: 5")
        if stage == "data":
            p.add_argument("--res", default="224,320,600", help="default: 224,320,600")
            p.add_argument("--transforms", default=",".join(TRANSFORMS), help="default: all three")
            p.add_argument("--loaders", default=",".join(LOADERS), help=f"default: {','.join(LOADERS)}")
            p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU")
            p.add_argument("--images", type=int, default=320, help="of each turn; default: 320")
        else:
            p.add_argument("--seconds", type=float, default=1.0, help="least length of a turn; default: 1")
        if stage in ("trunk", "step", "end-to-end"):
            p.add_argument("--model", default="tf_efficientnet_b0", help="a timm model; default: tf_efficientnet_b0")
            p.add_argument("--res", type=int, default=320, help="pixels; default: 320")
            p.add_argument("--batch", type=int, default=16, help="images of a step; default: 16")
        if stage in ("data", "end-to-end", "gpu"):
            p.add_argument("--data", type=Path, help="data set whose pictures are used; default: synthetic photographs")
        if stage == "end-to-end":
            p.add_argument("--images", type=int, default=256, help="of a run with and without cache; default: 256")
            p.add_argument("--epochs", type=int, default=11, help="of those runs; 0 leaves them out; default: 11")
        if stage == "gpu":
            p.add_argument("--sizes", default=SIZES, help=f"MODEL@RESxBATCH,...; default: {SIZES}")


def check(args: argparse.Namespace) -> None:
    """Refuse wrong arguments before anything is measured."""
    for name, low in (("batch", 1), ("images", 1), ("repeat", 1), ("epochs", 0), ("workers", 0), ("seconds", 0)):
        if (value := getattr(args, name, low)) < low:
            raise UserError(f"--{name} is {value}; accepted: {low} or more.")
    if "res" in args:
        parse_sizes(str(args.res))
    for kind, accepted in (("transform", TRANSFORMS), ("loader", LOADERS)) if args.stage == "data" else ():
        for value in getattr(args, f"{kind}s").split(","):
            if value not in accepted:
                raise unknown(kind, value, accepted)
    if "model" in args and args.model.partition(".")[0] not in (known := timm_names.architectures()):
        raise unknown("timm model", args.model, sorted(known))
    if (folder := getattr(args, "data", None)) and args.stage != "data":
        dataset.check_folder(folder)
    elif folder:
        find(folder, "val")
    check_output(args.json)


def parse_size(text: str) -> tuple[str, int, int]:
    """(model, resolution, batch) of MODEL@RESxBATCH."""
    name, _, rest = text.partition("@")
    res, _, batch = rest.partition("x")
    if not (name and res.isdigit() and batch.isdigit()):
        raise UserError(f"size {text!r} cannot be read; accepted: MODEL@RESxBATCH, such as tf_efficientnet_b0@320x256.")
    return name, int(res), int(batch)


def measure(args: argparse.Namespace) -> Result:
    import torch

    from fixres_dist.bench import end_to_end, feature_cache, loaders, step
    from fixres_dist.bench.result import Result
    from fixres_dist.bench.setting import prepared

    if args.stage == "gpu" and not torch.cuda.is_available():
        raise UserError(f"bench gpu needs a GPU, and torch sees none. Next: {command('bench', 'step')}, on the CPU.")
    if args.stage == "data":
        lists = args.transforms.split(","), parse_sizes(args.res), args.loaders.split(",")
        return loaders.measure(args.data, *lists, args.images, args.workers, args.repeat)
    with tempfile.TemporaryDirectory() as folder:
        scratch, data = Path(folder), getattr(args, "data", None)
        if args.stage != "gpu":
            setting = prepared(args.model, args.res, args.batch, args.seconds, scratch, data)
            if args.stage != "end-to-end":
                return step.measure(args.stage, setting, args.repeat)
            found = end_to_end.measure(setting, args.repeat)
            if args.epochs:
                feature_cache.measure(setting, args.images, args.epochs, scratch, found)
            return found
        found = Result()
        for model, res, batch in map(parse_size, args.sizes.split(",")):
            setting = prepared(model, res, batch, args.seconds, scratch / f"{model} {res}", data)
            for stage in ("trunk", "step"):
                found.add(step.measure(stage, setting, args.repeat), f"{model} {res}")
            found.add(end_to_end.measure(setting, args.repeat), f"{model} {res}")
        return found


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 where a variant failed, which the result names."""
    check(args)
    found = measure(args)
    print(found.text())
    if args.json:
        write_json(args.json, found.json(args.stage))
    return EXIT_FAILED if found.failed else EXIT_DONE
