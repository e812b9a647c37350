"""`python -m fixres_dist evaluate | extract | compare | fetch`: a model from a run or a file, on a data set."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import EXIT_DONE, UserError, check_output
from fixres_dist.base.files import write_text
from fixres_dist.base.text import parse_size
from fixres_dist.cli.compare import compare
from fixres_dist.cli.extract import extract
from fixres_dist.cli.fetch import fetch
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps
from fixres_dist.evaluation.inputs import add_source, data_source, opened, source, split_with, subjects
from fixres_dist.runs.rundir import RunDir


def add_parsers(commands: Any) -> None:
    p = commands.add_parser(
        "evaluate", help="a run before and after, or a weights file, on one or several sets: every image once"
    )
    add_source(p)
    p.add_argument("--res", help="test resolution in pixels; default: the run's")
    p.add_argument("--split", default="val", help="folder of the data set to evaluate on; default: val")
    p.add_argument(
        "--eval-set", action="append", default=[], metavar="NAME=DIR", help="also on this folder of class folders"
    )
    p.add_argument("--labels", type=Path, metavar="real.json", help="also top-1 by these ReaL labels of the split")
    p.add_argument("--only", choices=("before", "after"), help="of a run; default: both, and the gain")
    p.add_argument("--predictions", type=Path, metavar="FILE.npz", help="keep the predictions per image, for `compare`")
    p.add_argument("--json", type=Path, help="also write the result here")
    p.add_argument(
        "--softmax", type=Path, action="append", metavar="FILE.npy", help="what `extract` wrote; several: their mean"
    )
    p.set_defaults(func=evaluate)
    p = commands.add_parser("extract", help="softmax and embeddings of every image, in the data set's order, to .npy")
    add_source(p)
    p.add_argument("--res", help="test resolution in pixels; default: the run's")
    p.add_argument("--split", default="val", help="folder of the data set; default: val")
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="softmax.npy, embeddings.npy, labels.npy, names.txt"
    )
    p.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: float32")
    p.set_defaults(func=extract)
    p = commands.add_parser("compare", help="the gain between two files of predictions, paired image by image")
    p.add_argument("before", type=Path, help="FILE.npz, or a run: what it predicts after fixing")
    p.add_argument("after", type=Path, help="the same")
    p.add_argument("--json", type=Path, help="also write the result here")
    p.set_defaults(func=compare)
    p = commands.add_parser("fetch", help="put pretrained weights where offline nodes find them")
    p.add_argument("--model", required=True, help="a recipe or a timm model name")
    p.add_argument("--weights", choices=("ns", "ap", "pretrained"), default="", help="ns or ap for the recipes")
    p.set_defaults(func=fetch)


def evaluate(args: argparse.Namespace) -> int:
    """A run before and after, or a checkpoint, on the split and every named set; a run keeps the results."""
    check_output(args.json)
    if args.softmax:
        return evaluate_softmax(args)
    config = source(args, parse_size(args.res))
    sets = class_maps.named_sets(args.eval_set, args.split)
    found = [s for s in subjects(args, config) if args.only in (None, s.label)]
    if not found:
        raise UserError(f"--only {args.only} is about a run. Next: --run DIR, or leave it out.")
    results = {}
    from fixres_dist.training.predict import predict

    with opened(config, found, args.run, args.split, sets) as live:
        real = class_maps.real_labels(args.labels, live.splits[args.split], len(live.classes)) if args.labels else None
        every = [split_with(live, subject.weights) for subject in found]
        for name in live.splits:
            made = predict(live, every, config.data.res, name, name)
            predictions = {subject.label: p for subject, p in zip(found, made, strict=True)}
            if live.ranks.is_main:
                results[name] = describe(live, name, predictions, real if name == args.split else None)
                keep(args, config, live.splits[name].fingerprint, results[name], predictions)
        if results:
            main = results[args.split]
            told = {"model": config.model.name, "split": args.split, **main[found[-1].label], **main, "sets": results}
            show(config.model.name, results, args.json, told)
    return EXIT_DONE


def describe(live: Any, name: str, predictions: dict[str, Any], real: list[list[int]] | None) -> dict[str, Any]:
    from fixres_dist.evaluation.measures import describe

    index, res = live.splits[name], live.config.data.res
    return describe(name, res, index, live.columns[name], live.classes, predictions, real)


def keep(
    args: argparse.Namespace,
    config: Config,
    sample_list: str,
    result: dict[str, Any],
    predictions: dict[str, Any],
) -> None:
    """evaluations/SET-RES.json in the run, with the predictions beside it; --predictions FILE.npz and FILE-SET.npz.

    A run keeps only what was evaluated as it says itself, at any resolution: its own split, its own settings.
    """
    if len(predictions) == 2 and not (args.data and result["set"] == args.split) and same_settings(args.run, config):
        folder = args.run / "evaluations"
        folder.mkdir(exist_ok=True)
        stem = f"{result['set']}-{result['res']}"
        for label, made in predictions.items():
            made.save(folder / f"{stem}-{label}.npz", sample_list)
        write_text(folder / f"{stem}.json", json.dumps(result, indent=1) + "\n")
    if args.predictions:
        main = result["set"] == args.split
        file = args.predictions if main else args.predictions.with_stem(f"{args.predictions.stem}-{result['set']}")
        list(predictions.values())[-1].save(file, sample_list)


def same_settings(run: Path, config: Config) -> bool:
    differ = reading.differences(reading.identity(RunDir(run).config()), reading.identity(config))
    return all(text.startswith("data.res ") for text in differ)


def show(model: str, results: dict[str, dict[str, Any]], file: Path | None, told: dict[str, Any]) -> None:
    from fixres_dist.publishing import tables

    for result in results.values():
        print("\n".join(tables.evaluation_lines(model, result)))
    if file:
        write_text(file, json.dumps(told, indent=1) + "\n")


def evaluate_softmax(args: argparse.Namespace) -> int:
    config = data_source(args)
    from fixres_dist.data import dataset
    from fixres_dist.evaluation.extract import from_softmax
    from fixres_dist.evaluation.measures import describe

    data = config.data
    classes = class_maps.trained_classes(config, args.run, args.split)
    root = dataset.folder(data.root, data.cache)
    index = dataset.load(root, args.split, data.cache, deny_list=data.deny_list, on_bad="skip")
    columns = class_maps.class_map(index.classes, classes, index.folder)
    predictions = {"softmax": from_softmax(args.softmax, index, columns, len(classes))}
    real = class_maps.real_labels(args.labels, index, len(classes)) if args.labels else None
    result = describe(args.split, None, index, columns, classes, predictions, real)
    keep(args, config, index.fingerprint, result, predictions)
    show(str(args.softmax[0]), {args.split: result}, args.json, {**result["softmax"], **result})
    return EXIT_DONE
