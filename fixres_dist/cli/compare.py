"""`fixres compare`"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE, UserError, check_output
from fixres_dist.base.small_files import write_json
from fixres_dist.cli.arguments import add_json
from fixres_dist.runs.rundir import RunDir

EXAMPLES = ("runs/b0-320 runs/b0-320-ap", "before.npz after.npz --json gain.json")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("before", type=Path, help="FILE.npz, or a run: what it predicts after fixing")
    p.add_argument("after", type=Path, help="the same")
    add_json(p)


def run(args: argparse.Namespace) -> int:
    """The gain of one file's predictions over another's, or of one run's over another's after fixing."""
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
    summaries, gain = (before.summary(), after.summary()), after.gain_over(before)
    print(f"top-1 {summaries[0].top1:.2f} and {summaries[1].top1:.2f}: {gain.phrase()}")
    if args.json:
        record = {"before": asdict(summaries[0]), "after": asdict(summaries[1]), **asdict(gain)}
        write_json(args.json, record)
    return EXIT_DONE
