"""Several models on several sets, one pass over the images of each set; and what a run keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fixres_dist.base.small_files import write_json
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps
from fixres_dist.evaluation.inputs import Subject, parts_with
from fixres_dist.evaluation.measures import Evaluation, measure
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predict import predict
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session


def evaluate(
    session: Session, subjects: Sequence[Subject], split: str, labels: Path | None
) -> Iterator[tuple[Evaluation, dict[str, Predictions]]]:
    """(evaluation, predictions by label) of every set of the session, in turn; on every rank.

    `labels`: a file of ReaL labels for `split`.
    """
    lists = class_maps.real_labels(labels, session.splits[split], len(session.classes)) if labels else None
    models = [parts_with(session, subject.weights) for subject in subjects]
    for name, index in session.splits.items():
        made = predict(session, models, session.config.data.res, name, name)
        predictions = {subject.label: p for subject, p in zip(subjects, made, strict=True)}
        real = lists if name == split else None
        columns, classes = session.columns[name], session.classes
        yield measure(name, session.config.data.res, index, columns, classes, predictions, real), predictions


def keep(
    run: RunDir, config: Config, evaluation: Evaluation, predictions: Mapping[str, Predictions], sample_list: str
) -> None:
    """Write evaluations/SET-RES.json to the run, and the predictions beside it.

    Only what was evaluated with the run's own settings, at any resolution, is kept.
    """
    differ = reading.differences(reading.identity(run.config()), reading.identity(config))
    if any(not text.startswith("data.res ") for text in differ):
        return
    folder, stem = run.root / "evaluations", f"{evaluation.set}-{evaluation.res}"
    folder.mkdir(exist_ok=True)
    for label, made in predictions.items():
        made.save(folder / f"{stem}-{label}.npz", sample_list)
    write_json(folder / f"{stem}.json", evaluation.record(), sealed=True)
