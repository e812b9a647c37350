"""`fixres compare`"""

from __future__ import annotations

import argparse
import json

from fixres_dist.base.errors import EXIT_DONE, UserError, check_output
from fixres_dist.base.files import write_text
from fixres_dist.runs.rundir import RunDir


def compare(args: argparse.Namespace) -> int:
    from fixres_dist.publishing import tables
    from fixres_dist.training.predictions import Predictions

    check_output(args.json)
    files = [
        RunDir(path).finished(path / "predictions" / "after.npz") if path.is_dir() else path
        for path in (args.before, args.after)
    ]
    (before, old), (after, new) = (Predictions.read_with_list(file) for file in files)
    if old != new:
        raise UserError(
            f"{files[0]} and {files[1]} are of different images (sample lists {old} and {new}). "
            "Accepted: predictions on the same files of one data set."
        )
    result = {"before": before.summary(), "after": after.summary(), **after.gain_over(before)}
    print(f"top-1 {before.summary()['top1']:.2f} and {after.summary()['top1']:.2f}: {tables.gain(result)}")
    if args.json:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    return EXIT_DONE
