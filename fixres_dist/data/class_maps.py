"""Evaluation sets: which of the model's classes their folders stand for, and ReaL labels. No torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fixres_dist.base.commands import shell
from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged, read_json
from fixres_dist.config import recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import class_names, dataset
from fixres_dist.data.index import Index


def trained_classes(config: Config, run: Path | None, split: str) -> tuple[str, ...]:
    """The model's class names in the order of its logits: from the run, data.class_map, the data set's train/, or the split.

    Folders are sorted by name, as torchvision does. Empty if there is no such split.
    """
    if run and (kept := class_index(run)):
        return kept
    folders = split_folders(config, split)
    if folders and (setting := chosen_map(config, split)):
        return class_names.named(setting, folders, config.model.num_classes).names
    return tuple(folders)


def class_index(run: Path) -> tuple[str, ...]:
    """The class names in the run's class_index.json; where that is damaged or gone, in the weights that it has exported;
    empty where there are neither. Raises Damaged."""
    file, exported = run / "class_index.json", run / "export" / "model.safetensors"
    names: tuple[str, ...] = ()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        names = class_names.in_header(exported)
    again = (
        f"{shell('rm', '-r', file)}, then the same command takes the names in {exported if names else 'the data set'}"
    )
    try:
        found = read_json(file, dict[int, str], again)
        if sorted(found) != list(range(len(found))):
            raise Damaged(file, "its numbers are not 0, 1 and so on", again)
        kept = tuple(found[k] for k in range(len(found)))
        if names and names != kept:
            raise Damaged(file, f"it has other names than {exported}", again)
        return kept
    except FileNotFoundError:
        return names


def split_folders(config: Config, split: str) -> list[str]:
    """The class folders of train/, or where there is none of `split`; none if that is missing: opening it raises the error."""
    return dataset.classes(config.data, "train") or dataset.classes(config.data, split)


def chosen_map(config: Config, split: str) -> str:
    """data.class_map; or `imagenet` where folders are ImageNet's 1,000 by number or name and the weights are taken in
    ImageNet's order: timm's own, or a file's on a lone validation set such as ImageNet-V2."""
    weights = config.model.weights
    if config.data.class_map or config.pretrain or weights == "none" or config.data.root == "demo":
        return config.data.class_map
    known = weights in recipes.TIMM_WEIGHTS or not dataset.classes(config.data, "train")
    return "imagenet" if known and class_names.is_imagenet(split_folders(config, split)) else ""


def class_map(
    folders: Sequence[str], trained: Sequence[str], where: Path, aliases: Mapping[str, int] | None = None
) -> tuple[int, ...]:
    """The model's class of each folder: by class name or alias; if all folders are numbers and not all are names, by number.

    Raises UserError for folders that are no class of the model, and for two folders of one class.
    """
    position: dict[str, int] = {name: k for k, name in enumerate(trained)}
    if not set(folders) <= set(trained) and all(name.isdecimal() for name in folders):
        position = {name: int(name) for name in folders if int(name) < len(trained)}
    elif aliases:
        by_alias = {name: aliases[folded] for name in folders if (folded := class_names.folded(name)) in aliases}
        position = by_alias | position
    unknown = [name for name in folders if name not in position]
    if unknown:
        listed = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        raise UserError(
            f"{where} has {len(unknown)} class folder(s) of {len(folders)} that the model does not know: {listed}. "
            f"Accepted: names of its {len(trained)} classes ({', '.join(trained[:3])}, ..), "
            f"or their numbers 0 to {len(trained) - 1}. Next: data.class_map=FILE, with lines of `folder index`"
        )
    found = tuple(position[name] for name in folders)
    if len(set(found)) < len(found):
        raise UserError(f"{where} has two folders for one class of the model. Accepted: one folder per class.")
    return found


def aliases(config: Config, split: str) -> Mapping[str, int]:
    """Further names of the model's classes, as data.class_map has them."""
    setting = chosen_map(config, split)
    return class_names.named(setting, ()).aliases if setting not in ("", "natural") else {}


def fitted(index: Index, trained: tuple[str, ...], config: Config, split: str) -> tuple[Index, tuple[int, ...]]:
    """The index of `split`, and the model's class of each of its classes.

    Under a class map the index has all classes of the model: accuracy is judged among all of them.
    """
    columns = class_map(index.classes, trained, index.folder, aliases(config, split))
    if not chosen_map(config, split):
        return index, columns
    return index.relabelled(trained, columns), tuple(range(len(trained)))


def check(config: Config) -> None:
    """Refuse a class map that does not fit the folders of train/, before anything starts."""
    if config.data.class_map:
        folders = split_folders(config, "train")
        class_map(folders, trained_classes(config, None, "train"), Path(config.data.root), aliases(config, "train"))


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
        given = read_json(path, list[list[int]], "real.json, a list of lists of class numbers")
    except FileNotFoundError:
        raise UserError(
            f"--labels {path} is not there. Accepted: real.json, a list of lists of class numbers."
        ) from None
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
