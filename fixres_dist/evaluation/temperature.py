"""The temperature of an exported model: fitted on pictures that it was not trained on, and what that does to its calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Data
from fixres_dist.data import class_maps, dataset
from fixres_dist.evaluation.classifier import Classifier
from fixres_dist.evaluation.exported import Fitted, place
from fixres_dist.runs import looks
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.calibration import fit_temperature, reliability


def fit(model: Classifier, given: str, data: Data, run: RunDir) -> Fitted:
    """Fit on what `given` names as `place` has it; measured on val. `model`, of the `run`, has no temperature yet. Raises
    UserError."""
    folder, val = place(given, data), dataset.folder(data.root, data.cache).absolute() / data.val_split
    z, labels = logits(model, folder, data, run)
    temperature, n = fit_temperature(z, labels), len(labels)
    same = folder.resolve() == val.resolve()
    if not same:
        z, labels = logits(model, val, data, run)
    before, after = (error(z / t, labels) for t in (1.0, temperature))
    # Only the run's own is called val; of another folder of that name the folder above it is told too.
    other = f"{folder.parent.name}/{folder.name}" if folder.name == "val" else folder.name
    return Fitted(temperature, "val" if same else other, n, "val", before, after)


def logits(model: Classifier, folder: Path, data: Data, run: RunDir) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """([n, classes], the model's class [n]) of the pictures in the class folders of `folder` that can be read, which the
    run counts as an evaluation."""
    index = dataset.of(data, folder, "skip")
    columns = np.array(class_maps.class_map(index.classes, model.classes, folder))
    rows = [row for row in model.rows(index, {}, lambda z, _: z, show=True) if row.values is not None]
    if not rows:
        raise UserError(
            f"none of the {len(index)} images of {folder} can be read. Next: {command('data', 'verify', '--data', folder.parent)}"
        )
    looks.count(run, index.fingerprint, "export", 1)
    labels = columns[index.labels[[row.sample for row in rows]]]
    return np.stack([row.values for row in rows if row.values is not None]), labels


def error(z: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Expected calibration error in percentage points."""
    shares = np.exp(z - z.max(1, keepdims=True))
    confidence = 1 / shares.sum(1)
    return round(100 * reliability(confidence, z.argmax(1) == labels).ece, 4)
