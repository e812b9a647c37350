"""`fixres evaluate`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fixres_dist.base.errors import EXIT_DONE, UserError, check_output
from fixres_dist.base.small_files import write_json
from fixres_dist.base.text import parse_size
from fixres_dist.cli import as_job
from fixres_dist.cli.arguments import add_eval_sets, add_job, add_json, add_source
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps, dataset
from fixres_dist.evaluation import robustness
from fixres_dist.evaluation.inputs import check, data_config, model_config, opened, subjects
from fixres_dist.evaluation.measures import Evaluation
from fixres_dist.runs import looks
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.confusion import MOST_CLASSES

if TYPE_CHECKING:
    from fixres_dist.training.predictions import Predictions

EXAMPLES = (
    "--run runs/b0-320",
    "--run runs/b0-320 --eval-set v2=/data/imagenetv2 --labels real.json",
    "--model b0 --checkpoint last.pth.tar --data DIR --res 320 data.class_map=natural      # trained by timm's script",
    "--model b0 --checkpoint ns --data /data/imagenet --res 320 --json b0.json",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_source(p)
    p.add_argument("--res", metavar="PX", help="test resolution; default: the run's")
    p.add_argument("--split", default="val", metavar="NAME", help="folder of the data set; default: val")
    add_eval_sets(p)
    p.add_argument("--labels", type=Path, metavar="real.json", help="also top-1 by these ReaL labels of the split")
    p.add_argument("--only", choices=("before", "after"), help="of a run; default: both, and the gain")
    p.add_argument("--predictions", type=Path, metavar="FILE.npz", help="keep the predictions per image, for compare")
    text = "keep which class is taken for which, and FILE.png of it"
    p.add_argument("--confusion", type=Path, metavar="FILE.csv", help=text)
    text = "score what extract wrote; several: their mean"
    p.add_argument("--softmax", type=Path, action="append", metavar="FILE.npy", help=text)
    add_json(p)
    add_job(p)


def run(args: argparse.Namespace) -> int:
    """A run before and after, or a checkpoint, on the split and every named set; a run keeps the results."""
    check_output(args.json)
    check_output(args.predictions)
    if args.softmax:
        if as_job.asked(args):
            raise UserError("--softmax takes seconds and no GPU, so it is no job. Next: leave out --cluster.")
        return evaluate_softmax(args)
    config = model_config(args, parse_size(args.res))
    sets = class_maps.named_sets(args.eval_set, args.split)
    check_confusion(args, config)
    chosen = [s for s in subjects(args.run) if args.only in (None, s.label)]
    if not chosen:
        raise UserError(f"--only {args.only} is about a run. Next: --run DIR, or leave it out.")
    if args.labels and not args.labels.is_file():
        raise UserError(f"no file --labels {args.labels}. Accepted: real.json, a list of lists of class numbers.")
    if as_job.asked(args):
        check(config, args.run, args.split, sets)
        kept = (args.json, args.predictions, args.confusion, args.run and args.run / "evaluations")
        return as_job.start(args, config, ", ".join([*map(str, filter(None, kept)), "its log"]), 1 + len(sets))
    from fixres_dist.evaluation.evaluate import evaluate, keep

    records = {}
    with opened(config, chosen, args.run, args.split, sets, args.job, "evaluate") as session:
        for evaluation, predictions in evaluate(session, chosen, args.split, args.labels):
            if not session.ranks.is_main:
                continue
            is_split, sample_list = evaluation.set == args.split, session.splits[evaluation.set].fingerprint
            records[evaluation.set] = evaluation.record()
            show(config.model.name, evaluation, order_known=bool(args.run and config.pretrain and is_split))
            if evaluation.gain and not (args.data and is_split):
                keep(RunDir(args.run), config, evaluation, predictions, sample_list)
            of_set, last = "" if is_split else f"-{evaluation.set}", predictions[chosen[-1].label]
            if args.predictions:
                last.save(args.predictions.with_stem(args.predictions.stem + of_set), sample_list)
            if args.confusion:
                write_confusion(last, session.classes, args.confusion.with_stem(args.confusion.stem + of_set))
    measured = [robustness.line(record) for name, record in records.items() if name != args.split]
    if args.run and (lost := robustness.warning(RunDir(args.run), filter(None, measured))):
        print(f"warning: {lost}", file=sys.stderr)
    if args.json and records:
        main = records[args.split]
        summary = {"model": config.model.name, "split": args.split, **main[chosen[-1].label], **main, "sets": records}
        write_json(args.json, summary)
    return EXIT_DONE


def evaluate_softmax(args: argparse.Namespace) -> int:
    from fixres_dist.evaluation.extract import from_softmax
    from fixres_dist.evaluation.measures import measure

    config = data_config(args)
    check_confusion(args, config)
    data, classes = config.data, class_maps.trained_classes(config, args.run, args.split)
    root = dataset.folder(data.root, data.cache)
    index = dataset.of(data, root / data.split_name(args.split), "skip")
    index, columns = class_maps.fitted(index, classes, config, args.split)
    predictions = from_softmax(args.softmax, index, columns, len(classes))
    real = class_maps.real_labels(args.labels, index, len(classes)) if args.labels else None
    evaluation = measure(args.split, None, index, columns, classes, {"softmax": predictions}, real)
    if args.run:
        looks.count(RunDir(args.run), index.fingerprint, "evaluate", 1)
    show(str(args.softmax[0]), evaluation)
    if args.predictions:
        predictions.save(args.predictions, index.fingerprint)
    if args.confusion:
        write_confusion(predictions, classes, args.confusion)
    if args.json:
        record = evaluation.record()
        write_json(args.json, {**record["softmax"], **record})
    return EXIT_DONE


def check_confusion(args: argparse.Namespace, config: Config) -> None:
    """Refuse --confusion before the pass whose result it is to hold."""
    file = args.confusion
    check_output(file)
    if not file:
        return
    if file.suffix != ".csv":
        raise UserError(f"--confusion is {file}; accepted: FILE.csv, beside which FILE.png is written.")
    classes = len(class_maps.trained_classes(config, args.run, args.split))
    if classes > MOST_CLASSES:
        raise UserError(f"--confusion of {classes} classes; accepted: {MOST_CLASSES}. Next: --predictions FILE.npz")


def write_confusion(predictions: Predictions, classes: Sequence[str], file: Path) -> None:
    from fixres_dist.training import confusion, pictures

    matrix = confusion.matrix_of(predictions, len(classes))
    confusion.write_csv(matrix, classes, file)
    pictures.save(pictures.confusion_sheet(matrix, classes), file.with_suffix(".png"))
    print(f"confusion: {file}, {file.with_suffix('.png')}")


def show(model: str, evaluation: Evaluation, order_known: bool = False) -> None:
    """`order_known`: the run has trained its classifier on these folders, so their order is not the weights'."""
    print(evaluation_text(model, evaluation))
    if evaluation.doubt and not order_known:
        print(evaluation.doubt, file=sys.stderr)


def evaluation_text(model: str, evaluation: Evaluation) -> str:
    """One evaluated set for the console: accuracy, gain, and the classes with the lowest and the highest top-1."""
    known, total, labels = evaluation.classes_of_set, evaluation.classes_of_model, list(evaluation.summaries)
    lines = [] if known == total else [f"{evaluation.set}: logits restricted to its {known} of {total} classes"]
    where = f" at {evaluation.res} px" if evaluation.res else ""
    for label, s in evaluation.summaries.items():
        more = evaluation.measures.get(label)
        means = f"macro F1 {more.macro_f1:.2f} | ECE {more.ece:.2f} | " if more else ""
        who = f", {label}" if label in ("before", "after") else ""
        accuracy = f"top-1 {s.top1:.2f} | top-5 {s.top5:.2f} | loss {s.loss:.4f} | {means}n {s.n}"
        lines.append(f"{model}{where} on {evaluation.set}{who}: {accuracy}")
    if evaluation.gain:
        lines.append(f"  gain {evaluation.gain.phrase()}")
    if real := evaluation.real:
        scores = ", ".join(f"{real.top1[label]:.2f} {label}" for label in labels)
        gain = f"; gain {real.gain.phrase()}" if real.gain else ""
        lines.append(f"  by ReaL labels: top-1 {scores}, n {real.n}{gain}")
    ranked = sorted((row[labels[-1]] or 0.0, name) for name, row in evaluation.by_class.items() if row["n"])
    for text, rows in (("worst", ranked[:3]), ("best", ranked[::-1][:3])):
        lines.append(f"  {text} classes: " + ", ".join(f"{name} {top1:.1f}" for top1, name in rows))
    return "\n".join(lines)
