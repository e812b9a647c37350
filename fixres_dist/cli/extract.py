"""`fixres extract`"""

from __future__ import annotations

import argparse
import shlex

from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.text import parse_size
from fixres_dist.evaluation.inputs import opened, source, split_with, subjects


def extract(args: argparse.Namespace) -> int:
    """Of a run after fixing, or of a checkpoint."""
    config = source(args, parse_size(args.res))
    if args.out.exists():
        raise UserError(f"--out {args.out} exists. Next: give another --out, or remove it.")
    subject = subjects(args, config)[-1]
    from fixres_dist.evaluation.extract import extract

    with opened(config, [subject], args.run, args.split) as live:
        n = extract(live, split_with(live, subject.weights), args.split, args.out.resolve(), args.dtype)
        if live.ranks.is_main:
            again = ["--softmax", args.out / "softmax.npy", "--split", args.split]
            again += ["--run", args.run] if args.run else ["--data", config.data.root]
            again += [*(["--data", args.data] if args.run and args.data else []), *args.overrides]
            print(f"{n} rows in {args.out}. Next: python -m fixres_dist evaluate {shlex.join(map(str, again))}")
    return EXIT_DONE
