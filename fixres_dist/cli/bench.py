"""`fixres bench data | trunk | step | end-to-end | gpu`"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError, check_output, unknown
from fixres_dist.base.files import write_text
from fixres_dist.base.text import parse_sizes
from fixres_dist.config import recipes
from fixres_dist.data import dataset

# Ours hand over uint8, since a GPU normalises for nothing; `torch normalised` does it on the CPU, as `pil` has to.
# `torch alone` decodes and scales, and drops the pictures in the worker: what handing over costs is the difference.
SOURCES, TRANSFORMS = ("folder", "shards"), ("random_resized_crop", "test_aug", "test")
LOADERS = ("pil", "torch", "torch normalised", "torch alone", "dali")
SIZES = "tf_efficientnet_b0@320x256,tf_efficientnet_b4@380x128,tf_efficientnet_b7@600x32,tf_efficientnet_l2@600x16"


EXAMPLES = ("data --data /data/imagenet", "step --model tf_efficientnet_b4 --res 380", "gpu --json gpu.json")


def add_arguments(p: argparse.ArgumentParser) -> None:
    sub = p.add_subparsers(dest="stage", required=True, metavar="STAGE")
    add_data(sub)
    texts = {
        "trunk": "images/s of the frozen trunk's forward, step by step from plain to ours, beside timm's inference",
        "step": "images/s and memory of an optimizer step from pictures in memory, beside the original protocol, full "
        "fine-tuning and timm's inference",
        "end-to-end": "images/s from JPEG files to the optimizer step, beside decoding alone and the step alone; "
        "runs with and without the feature cache",
        "gpu": "trunk, step and end-to-end at a GPU's sizes, compiled too",
    }
    for stage, text in texts.items():
        p = sub.add_parser(stage, help=text, description=text)
        if stage == "gpu":
            p.add_argument("--sizes", default=SIZES, help=f"MODEL@RESxBATCH,...; default: {SIZES}")
            p.set_defaults(compile=True)
        else:
            p.add_argument("--model", default="tf_efficientnet_b0", help="a timm model; default: tf_efficientnet_b0")
            p.add_argument("--res", type=int, default=320, help="pixels; default: 320")
            p.add_argument("--batch", type=int, default=16, help="images of a step; default: 16")
            p.add_argument("--compile", action="store_true", help="also compiled; always on a GPU")
        p.add_argument("--repeat", type=int, default=5, help="turns of each variant; medians count; default: 5")
        p.add_argument("--seconds", type=float, default=1.0, help="least length of a turn; default: 1")
        if stage in ("end-to-end", "gpu"):
            p.add_argument("--data", type=Path, help="data set for the pictures; default: synthetic photographs")
            p.add_argument("--images", type=int, default=256, help="of a run with and without cache; default: 256")
            p.add_argument("--epochs", type=int, default=11, help="of those runs; 0 leaves them out; default: 11")
        add_json(p, stage)


def add_data(sub: Any) -> None:
    text = "images/s and CPU-ms per image of both backends beside torch DataLoader + PIL; index and order at scale"
    p = sub.add_parser("data", help=text, description=text)
    p.add_argument("--data", type=Path, help="data set whose val/ is read; default: synthetic 500x375 photographs")
    p.add_argument("--res", default="224,320,600", help="default: 224,320,600")
    p.add_argument("--transforms", default=",".join(TRANSFORMS), help="default: all three")
    p.add_argument("--sources", default="folder", help="folder, shards, or both; default: folder")
    p.add_argument("--loaders", default=",".join(LOADERS), help=f"default: {','.join(LOADERS)}")
    p.add_argument("--images", type=int, default=320, help="of each turn; default: 320")
    p.add_argument("--repeat", type=int, default=5, help="turns of each loader; medians count; default: 5")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one per CPU")
    p.add_argument(
        "--no-scale", action="store_true", help="leave out the index and the order at a million and a billion"
    )
    add_json(p, "data")


def add_json(p: argparse.ArgumentParser, stage: str) -> None:
    p.add_argument("--json", type=Path, help="also write the result here")
    p.set_defaults(stage=stage)


def check(args: argparse.Namespace) -> None:
    """Refuse before anything is measured what would break on the way."""
    for name, low in (("batch", 1), ("images", 1), ("repeat", 1), ("epochs", 0), ("workers", 0), ("seconds", 0)):
        if (value := getattr(args, name, low)) < low:
            raise UserError(f"--{name} is {value}; accepted: {low} or more.")
    if "res" in args:
        parse_sizes(str(args.res))
    lists = (("source", SOURCES), ("transform", TRANSFORMS), ("loader", LOADERS))
    for kind, accepted in lists if args.stage == "data" else ():
        for value in getattr(args, f"{kind}s").split(","):
            if value not in accepted:
                raise unknown(kind, value, accepted)
    if "model" in args and args.model.partition(".")[0] not in (known := recipes.timm_names()):
        raise unknown("timm model", args.model, sorted(known))
    if folder := getattr(args, "data", None):
        if args.stage != "data":
            dataset.check_folder(folder)
        elif not (folder / "val").is_dir():
            raise UserError(f"no images at {folder / 'val'}. Accepted: --data with a data set that has val/.")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 where a variant failed, which the result names."""
    check(args)
    check_output(args.json)
    from fixres_dist.bench import turns

    module = {"data": "data", "trunk": "model", "step": "model"}.get(args.stage, "pipeline")
    found = importlib.import_module(f"fixres_dist.bench.{module}").run(args)  # imports torch
    if found["rows"]:
        print(turns.table(found))
    for name, value in (found.get("scale") or found.get("cached") or {}).items():
        print(f"{name}: {value}")
    for name, reason in found["failed"].items():
        print(f"{name} FAILED: {reason}")
    if args.json:
        write_text(args.json, json.dumps(found, indent=1) + "\n")
    return EXIT_FAILED if found["failed"] else EXIT_DONE
