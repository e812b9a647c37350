"""`fixres data index | verify | shard | demo | show`: prepare a data set, and look at it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, get_args

from fixres_dist.base.commands import command
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError, check_output, unknown
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Data, ResizeRule
from fixres_dist.config.stage_settings import Transform
from fixres_dist.data import dataset, deny_lists, shards
from fixres_dist.data.index import Limits
from fixres_dist.data.progress import progress_bar
from fixres_dist.data.requests import Pictures

EXAMPLES = (
    "index --data /data/imagenet",
    "verify --data /data/imagenet --deny-list bad.txt",
    "shard --data /data/imagenet --out /data/imagenet-shards",
    "demo --out pictures",
    "show --data /data/imagenet --res 320 --samples 0,5,9 --out pictures",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    sub = p.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    p = add(sub, "index", "read the header of every image, so that jobs need not", index_command)
    p.add_argument("--fresh", action="store_true", help="read all headers again, whatever is cached")
    p.add_argument(
        "--checksums", action="store_true", help="read whole files (of shards, always): runs notice any change"
    )

    p = add(sub, "verify", "decode every image, and list those that cannot be decoded", verify_command)
    p.add_argument("--deny-list", type=Path, help="write them here; runs leave them out with data.deny_list=FILE")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: one per CPU")

    p = add(sub, "shard", "write tar shards in WebDataset layout; the same command again resumes it", shard_command)
    p.add_argument("--out", type=Path, required=True, help="where the shards go: OUT/train, OUT/val")
    p.add_argument("--samples-per-shard", type=int, default=5000, help="default: 5000, about 600 MB of ImageNet")
    p.add_argument("--deny-list", default="", help="leave these out, as `data verify` lists them")

    p = sub.add_parser("demo", help="write the built-in example, a small data set of real JPEG files")
    p.add_argument("--out", type=Path, help="default: where --data demo looks for it")
    p.set_defaults(part=demo_command)

    p = add(sub, "show", "pictures as the model sees them: DIR/<sample>.png and .npy", show_command, splits="val")
    p.add_argument("--res", type=int, required=True, help="pixels")
    p.add_argument("--samples", required=True, help="positions in the split, such as 0,5,9")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--transform", default="test", help=f"{', '.join(get_args(Transform))}; default: test")
    p.add_argument("--resize-rule", default="", help=f"{', '.join(get_args(ResizeRule))}; default: the model's recipe")
    p.add_argument("--crop-pct", default="auto", metavar="C", help="data.crop_pct; default: the rule's")
    p.add_argument("--backend", default="auto", help="auto, dali or torch; default: auto")
    p.add_argument("--model", default="b0", help="its mean, std and interpolation; default: b0")
    p.add_argument("--seed", type=int, default=0, help="run.seed; default: 0")
    p.add_argument("--epoch", type=int, default=0, help="default: 0")


def run(args: argparse.Namespace) -> int:
    return int(args.part(args))


def add(sub: Any, name: str, text: str, function: Any, splits: str = "train,val") -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = sub.add_parser(name, help=text, description=text)
    p.add_argument("--data", required=True, help="directory with train/ and val/, or demo")
    p.add_argument("--split", default=splits, help=f"default: {splits}")
    p.add_argument("--max-pixels", type=int, default=Data.max_pixels, metavar="N", help="data.max_pixels of the runs")
    p.add_argument("--labels", default="", metavar="FILE", help="list of labels of images without class folders")
    p.add_argument("--cache", default="", help="where indexes are kept; default: $FIXRES_CACHE or ~/.cache/fixres_dist")
    p.set_defaults(part=function)
    return p


def folder(args: argparse.Namespace) -> Path:
    root = dataset.folder(args.data, args.cache)
    if not root.is_dir():
        raise UserError(f"no data set at {root}. Accepted: a directory with train/ and val/, or demo.")
    return root


def splits(args: argparse.Namespace) -> list[str]:
    return [name for name in args.split.split(",") if name]


def how(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of dataset.load that all of these commands have."""
    data = reading.parse(Data, {"max_pixels": args.max_pixels}, "data")
    return {"cache": args.cache, "labels": args.labels, "limits": Limits.of(data)}


def index_command(args: argparse.Namespace) -> int:
    root = folder(args)
    for split in splits(args):
        found = dataset.load(root, split, **how(args), on_bad="skip", fresh=args.fresh, checksums=args.checksums)
        passed = dataset.survey(root, split, Data(cache=args.cache, labels=args.labels)).passed
        bad = dataset.recheck(found)[1]
        where = f"{len(found.shards)} shards" if found.shards else "folders"
        print(f"{split}: {len(found)} images, {len(found.classes)} classes, {where}, fingerprint {found.fingerprint}")
        print(f"  passed over: {passed}")
        for sample, reason in bad.items():
            print(f"  {found.where(sample)}: {reason}")
        if bad:
            again = command("data", "verify", "--data", args.data, "--deny-list", "bad.txt")
            print(f"{len(bad)} cannot be read. Next: {again}")
    return EXIT_DONE


def verify_command(args: argparse.Namespace) -> int:
    from fixres_dist.data import verify

    root, found = folder(args), {}
    check_output(args.deny_list)
    for split in splits(args):
        samples = dataset.load(root, split, **how(args), on_bad="skip")
        if samples.checksums is None:  # nothing to compare whole files with: it reads them all anyway
            samples = dataset.load(root, split, **how(args), on_bad="skip", fresh=True)
        reasons = dataset.recheck(samples)[1]
        with progress_bar(f"decoding {split}") as bar:
            bad = verify.verify(samples, args.workers, bar)
        found[split] = [(samples.name(b.sample), reasons.get(b.sample, b.reason)) for b in bad]
        print(f"{split}: {len(samples)} images, {len(bad)} cannot be decoded")
        for b in bad:
            print(f"  {samples.where(b.sample)}: {reasons.get(b.sample, b.reason)}")
    if args.deny_list:
        deny_lists.write(args.deny_list, found)
        print(f"Next: submit with data.deny_list={args.deny_list.resolve()}")
    elif any(found.values()):
        deny_list = Path("bad.txt").resolve()
        print(f"Next: the same command with --deny-list bad.txt, then submit with data.deny_list={deny_list}")
    return EXIT_FAILED if any(found.values()) and not args.deny_list else EXIT_DONE


def shard_command(args: argparse.Namespace) -> int:
    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {args.samples_per_shard}; accepted: 1 or more.")
    root = folder(args)
    for split in splits(args):
        samples = dataset.load(root, split, **how(args), deny_list=args.deny_list)
        if samples.shards:
            raise UserError(f"{root / split} is sharded already. Accepted: folders of images.")
        with progress_bar(f"writing {split} shards") as bar:
            made = shards.write_shards(samples, args.out / split, args.samples_per_shard, bar)
        total = -(-len(samples) // args.samples_per_shard)
        print(f"{split}: {len(samples)} images in {total} shards, {made} written now")
    print(f"Next: {command('submit', '--data', args.out)}, with --model and --res")
    return EXIT_DONE


def demo_command(args: argparse.Namespace) -> int:
    if args.out:
        from fixres_dist.data import demo

        with progress_bar("writing the built-in example") as bar:
            demo.write_demo(args.out, progress=bar)
    print(f"the built-in example is in {args.out or dataset.folder('demo')}")
    return EXIT_DONE


def show_command(args: argparse.Namespace) -> int:
    for kind, value, accepted in (
        ("transform", args.transform, get_args(Transform)),
        ("resize rule", args.resize_rule or "timm", get_args(ResizeRule)),
        ("backend", args.backend, ("auto", "dali", "torch")),
    ):
        if value not in accepted:
            raise unknown(kind, value, accepted)
    root = folder(args)
    samples = dataset.load(root, args.split, **how(args), on_bad="skip")
    chosen = positions(args.samples, len(samples), args.split)
    from fixres_dist.data import show
    from fixres_dist.models.build import preprocessing

    recipe = recipes.find(args.model).values
    data = recipe.get("data", {})
    spec = preprocessing(recipe["model"]["timm_name"])
    rule = args.resize_rule or data.get("resize_rule", "timm")
    chosen_settings = {"res": args.res, "backend": args.backend, "resize_rule": rule, "crop_pct": args.crop_pct}
    settings = reading.parse(Data, chosen_settings, "data")
    resize = spec.resize(settings, args.res)
    pictures = Pictures(args.transform, args.res, resize, 2 * args.seed)  # the fixing stage's, see schedule.stages
    written = show.show(samples, pictures, chosen, args.epoch, settings, spec.mean, spec.std, args.out)
    names = ", ".join(path.name for path in written)
    print(f"{len(chosen)} pictures ({args.transform}, {rule}, {args.res} px) in {args.out}: {names}")
    return EXIT_DONE


def positions(text: str, n: int, split: str) -> list[int]:
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--samples is {text!r}; accepted: numbers such as 0,5,9.") from None
    if wrong := [k for k in chosen if not 0 <= k < n]:
        raise UserError(f"--samples names {wrong[0]}, and {split} has {n} images; accepted: 0 to {n - 1}.")
    return chosen
