"""Evaluation sets: which of the model's classes their folders stand for, and ReaL labels. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config
from fixres_dist.data import dataset
from fixres_dist.data.folders import class_names
from fixres_dist.data.index import Index


def trained_classes(config: Config, run: Path | None, split: str) -> tuple[str, ...]:
    """The model's class names in the order of its logits: from the run, or the data set's train/, or the split.

    The split's folders are sorted by name, or as numbers if all of them are (ImageNet-V2). Empty if there is no such
    split.
    """
    if run and (kept := run / "class_index.json").is_file():
        return tuple(json.loads(kept.read_text()).values())
    root = dataset.folder(config.data.root, config.data.cache)
    if (root / "train").is_dir():
        return tuple(class_names(root / "train"))
    if not (root / split).is_dir():
        return ()  # opening the split raises the error
    names = class_names(root / split)
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


def class_map(folders: Sequence[str], trained: Sequence[str], where: Path) -> tuple[int, ...]:
    """The model's class of each folder: by class name; if all folders are numbers and not all are names, by number.

    Raises UserError for folders that are no class of the model, and for two folders of one class.
    """
    position: dict[str, int] = {name: k for k, name in enumerate(trained)}
    if not set(folders) <= set(trained) and all(name.isdecimal() for name in folders):
        position = {name: int(name) for name in folders if int(name) < len(trained)}
    unknown = [name for name in folders if name not in position]
    if unknown:
        listed = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        raise UserError(
            f"{where} has {len(unknown)} class folder(s) of {len(folders)} that the model does not know: {listed}. "
            f"Accepted: names of its {len(trained)} classes ({', '.join(trained[:3])}, ..), "
            f"or their numbers 0 to {len(trained) - 1}."
        )
    found = tuple(position[name] for name in folders)
    if len(set(found)) < len(found):
        raise UserError(f"{where} has two folders for one class of the model. Accepted: one folder per class.")
    return found


def named_sets(items: Sequence[str], split: str) -> dict[str, Path]:
    """The folders of `NAME=DIR` items as given to --eval-set. Raises UserError; names must be usable as file names."""
    found: dict[str, Path] = {}
    for item in items:
        name, _, folder = item.partition("=")
        if not folder or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--eval-set is {item!r}; accepted: NAME=DIR, such as imagenet-v2=/data/imagenetv2.")
        if name == split or name in found:
            raise UserError(f"--eval-set {name!r} stands for two sets. Next: give each a name of its own.")
        if not Path(folder).is_dir():
            raise UserError(f"--eval-set {name} is at {folder}, which is no directory. Accepted: a folder per class.")
        found[name] = Path(folder).absolute()
    return found


def real_labels(path: Path, index: Index, classes: int) -> list[list[int]]:
    """The ReaL labels (arXiv 2006.07159) of every sample of `index`: all right classes. Samples without
    any do not count.

    The file is a list of lists in the order of ImageNet's ILSVRC2012_val_00000001 and on; for other names, in the order
    of the sorted file names. Raises UserError if it does not fit the index or the number of `classes`.
    """
    try:
        given = json.loads(path.read_text())
        if not all(isinstance(k, int) for labels in given for k in labels):
            raise ValueError("it holds something else than numbers")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--labels {path}: {error}. Accepted: real.json, a list of lists of class numbers.") from None
    if (top := max((k for labels in given for k in labels), default=0)) >= classes:
        raise UserError(f"--labels {path} names class {top}, the model has {classes}. Accepted: 0 to {classes - 1}.")
    names = [name.rpartition("/")[2] for name in index.names()]
    numbers = [re.match(r"ILSVRC2012_val_(\d{8})\.", name) for name in names]
    if all(numbers):
        places = [int(found[1]) - 1 for found in numbers if found]
    elif len(set(names)) < len(names):
        raise UserError(
            f"--labels {path} needs an order, and file names of {index.folder} stand in several class folders. "
            "Accepted: ImageNet's own names, or names that stand once."
        )
    else:
        order = sorted(range(len(names)), key=names.__getitem__)
        places = [0] * len(names)
        for place, sample in enumerate(order):
            places[sample] = place
    if (len(given) != len(names) and not all(numbers)) or max(places) >= len(given):
        raise UserError(f"--labels {path} has {len(given)} entries, {index.folder} has {len(names)} images.")
    if not any(given[place] for place in places):
        raise UserError(
            f"--labels {path} has no label for any image of {index.folder}. Accepted: the file of this split."
        )
    return [given[place] for place in places]
