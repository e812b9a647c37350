"""`fixres predict`"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base.commands import command
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, UserError, only_prints
from fixres_dist.base.text import duration, one_line, parse_size
from fixres_dist.cli.arguments import settings_and_names

if TYPE_CHECKING:
    from fixres_dist.evaluation.classifier import Prediction

EXAMPLES = (
    "runs/b0-320 photos/ cat.jpg",
    "runs/b0-320/export list.txt --csv > predictions.csv",
    "runs/b0-320 - --top 1 --json",
)
SHOWN = 5  # of the pictures that cannot be read, in the last line
WIDEST = 24  # characters of a class name that columns make room for


def add_arguments(p: argparse.ArgumentParser) -> None:
    text = "a finished run, or an export: its folder, or the weights in it beside config.json"
    p.add_argument("model", type=Path, metavar="RUN|EXPORT", help=text)
    text = "files, folders, .txt lists of paths, or - for such lines on stdin; settings such as run.precision=fp32"
    p.add_argument("images", nargs="+", metavar="IMAGES", help=text)
    p.add_argument("--top", type=int, default=5, metavar="K", help="classes of each picture; default: 5")
    p.add_argument("--res", metavar="PX", help="test resolution; default: the model's")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="a row per picture on stdout, and nothing else there")
    form.add_argument("--json", action="store_true", help="the same as a JSON list")


def run(args: argparse.Namespace) -> int:
    """Predictions on stdout as they are made; pictures that cannot be read, progress and a last line on stderr."""
    settings, _ = settings_and_names([word for word in args.images if not os.path.exists(word)])
    images = [word for word in args.images if word not in settings]
    if not images:
        raise UserError(f"no picture was given. Next: {command('predict', args.model, *settings, 'FILE')}")
    if args.top < 1:
        raise UserError(f"--top is {args.top}; accepted: 1 or more classes.")
    res = parse_size(args.res)

    def work() -> int:
        from fixres_dist.evaluation.classifier import load

        model, good, bad = load(args.model, res, settings), 0, []
        started = time.monotonic()

        def readable() -> Iterator[Prediction]:
            nonlocal good
            for one in model.predictions(images, args.top, show=not sys.stdout.isatty()):
                if one.error:
                    bad.append(one)
                    print(f"cannot read {one_line(one.image)}: {one.error}", file=sys.stderr, flush=True)
                else:
                    good += 1
                    yield one

        try:
            if args.csv:
                write_csv(readable(), min(args.top, len(model.classes)))
            elif args.json:
                write_json(readable())
            else:
                write_table(readable(), model.classes)
        except KeyboardInterrupt:  # what is written is not all
            return EXIT_FAILED
        if not good:
            raise UserError(
                f"none of the {len(bad)} pictures can be read. Accepted: image files, such as .jpg and .png."
            )
        print(last_line(good, bad, time.monotonic() - started), file=sys.stderr)
        return EXIT_DONE

    return only_prints(work)


def write_csv(predictions: Iterable[Prediction], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    head = ["file", *(name for k in range(1, top + 1) for name in (f"class_{k}", f"confidence_{k}"))]
    for k, one in enumerate(predictions):
        if k == 0:  # nothing is on stdout where all is refused
            writer.writerow(head)
        pairs = zip(one.classes, one.confidences, strict=True)
        writer.writerow([one.image, *(cell for name, share in pairs for cell in (name, f"{share:.6f}"))])


def write_json(predictions: Iterable[Prediction]) -> None:
    """A list of {file, predictions: [{class, confidence}]}, an entry on each line."""
    before = "["
    for one in predictions:
        pairs = zip(one.classes, one.confidences, strict=True)
        found = [{"class": name, "confidence": round(share, 6)} for name, share in pairs]
        print(f"{before}\n{json.dumps({'file': one.image, 'predictions': found})}", end="")
        before = ","
    print("[]" if before == "[" else "\n]")


def write_table(predictions: Iterable[Prediction], classes: Sequence[str]) -> None:
    """Lines of the best class with its confidence, the file, and the classes after it."""
    width = min(WIDEST, max(map(len, classes)))
    for one in predictions:
        cells = [f"{name} {100 * share:.1f} %" for name, share in zip(one.classes, one.confidences, strict=True)]
        first = f"{100 * one.confidences[0]:5.1f} %  {one.classes[0]:<{width}}"
        print(
            one_line("  ".join([first, one.image, *([f"({', '.join(cells[1:])})"] if cells[1:] else [])])), flush=True
        )


def last_line(good: int, bad: Sequence[Prediction], seconds: float) -> str:
    text = f"{good:,} pictures in {duration(seconds)} ({good / seconds:,.0f} img/s)"
    if bad:
        names = ", ".join(one_line(one.image) for one in bad[:SHOWN])
        text += f"; {len(bad):,} cannot be read: {names}" + (
            f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        )
    return text
