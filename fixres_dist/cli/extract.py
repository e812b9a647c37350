"""`fixres extract`"""

from __future__ import annotations

import argparse
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.text import parse_size
from fixres_dist.cli import as_job
from fixres_dist.cli.arguments import add_job, add_source
from fixres_dist.evaluation.inputs import check, model_config, opened, parts_with, subjects

EXAMPLES = (
    "--run runs/b0-320 --out b0-320",
    "--model b0 --checkpoint ns --data /data/imagenet --res 320 --dtype float16 --out b0",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_source(p, "--out DIR")
    p.add_argument("--res", metavar="PX", help="test resolution; default: the run's")
    p.add_argument("--split", default="val", metavar="NAME", help="folder of the data set; default: val")
    text = "new folder of softmax.npy, embeddings.npy, labels.npy, names.txt"
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)
    p.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: float32")
    add_job(p)


def run(args: argparse.Namespace) -> int:
    """Of a run after fixing, or of a checkpoint."""
    config = model_config(args, parse_size(args.res))
    if args.out.exists():
        if args.job:  # it did not exist at the submission, and appears when it is complete
            print(f"{args.out} is complete", flush=True)
            return EXIT_DONE
        raise UserError(f"--out {args.out} exists. Next: give another --out, or remove it.")
    subject = subjects(args.run)[-1]
    if as_job.asked(args):
        check(config, args.run, args.split)
        return as_job.start(args, config, str(args.out), 1)
    from fixres_dist.evaluation.extract import extract

    with opened(config, [subject], args.run, args.split, job=args.job) as session:
        n = extract(session, parts_with(session, subject.weights), args.split, args.out.resolve(), args.dtype)
        if session.ranks.is_main:
            again = ["--softmax", args.out / "softmax.npy", "--split", args.split]
            again += ["--run", args.run] if args.run else ["--data", config.data.root]
            again += [*(["--data", args.data] if args.run and args.data else []), *args.overrides]
            print(f"{n} rows in {args.out}. Next: {command('evaluate', *again)}")
    return EXIT_DONE
