"""Where the samples of a split lie, and in which form: class folders, tar shards, or images beside a list of labels.

What is in these places and is no sample (hidden folders, other kinds of files) is passed over, and counted. No torch.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged, read_json

CLASSES = "classes.json"  # class names in the labels' order, beside shards
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
TRAINING = ("train", "training")
SPLITS = (*TRAINING, "val", "valid", "validation", "dev", "eval", "test", "testing")
# Of macOS, NAS boxes, Windows and file systems; besides, all names that begin with a dot or an @ (@eaDir).
HIDDEN = ("__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", "System Volume Information")
LISTS = ("{}.txt", "{}.csv", "{}.tsv", "{}_labels.txt", "{}_labels.csv", "{}_annotations.txt", "LOC_{}_solution.csv")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"  # of ImageNet's devkit, for val


@dataclass(frozen=True)
class Place:
    """Where a split lies."""

    folder: Path  # of the class folders, tar files or images
    shards: tuple[str, ...] = ()  # names of the tar files in `folder`; empty: every sample is a file of its own
    labels: Path | None = None  # list of the images' labels, where they stand in no class folders


def hidden(name: str) -> bool:
    return name.startswith((".", "@")) or name in HIDDEN


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def kind(name: str) -> str:
    """What a file that is passed over counts as."""
    if name.startswith("."):
        return "hidden file(s)"
    return os.path.splitext(name)[1].lower() or "without an extension"


def counted(passed: Counter[str]) -> str:
    """`12 .heic, 3 .txt`, the most frequent first; `nothing`."""
    return ", ".join(f"{n} {what}" for what, n in passed.most_common()) or "nothing"


def class_folders(folder: Path) -> dict[str, str]:
    """The subfolders of a split by class name, in the order of their names: the name in composed Unicode (NFC), and as it
    is spelled on the disk. macOS decomposes names. Raises UserError for two spellings of one name."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if not hidden(path.name) and path.is_dir():
            name = unicodedata.normalize("NFC", path.name)
            if name in found:
                raise UserError(
                    f"{folder} has two folders for class {name!r}, in two spellings of Unicode. Next: make them one."
                )
            found[name] = path.name
    return found


def class_names(folder: Path) -> list[str]:
    """The class names in the classes.json beside shards; raises UserError for another classes.json."""
    listed = folder / CLASSES
    try:
        return read_json(listed, list[str], "")
    except Damaged:
        raise UserError(
            f'{listed} is no list of class names. Accepted: such as ["ash", "birch"], in the labels\' order.'
        ) from None


def find(root: Path, split: str, labels: str = "") -> Place:
    """Where a split of the data set in `root` lies: in the folder of its name, or in tar files that carry it in theirs.

    `split` may also be a pattern of tar files, as WebDataset writes it: train-{000000..000146}.tar. `labels`
    (data.labels) is the list for images without class folders; by default one beside them is taken. Raises UserError.
    """
    if not root.is_dir():
        raise UserError(f"no data set at {root}. Accepted: a directory with train/ and val/, or --data demo.")
    folder = root / split
    if not folder.is_dir():
        if tars := split_tars(root, split):
            return Place(root, tars)
        raise UserError(missing(root, split))
    tars = tuple(sorted(path.name for path in folder.glob("*.tar") if not hidden(path.name)))
    classes = class_folders(folder)
    if tars and (not classes or (folder / CLASSES).is_file()):  # class folders: the tars were unpacked
        return Place(folder, tars)
    if len(classes) > 1:
        return Place(folder)
    if chosen := Path(labels) if labels else next(filter(Path.is_file, lists(root, folder)), None):
        return Place(folder, labels=chosen)
    loose = [name for name in os.listdir(folder) if is_image(name) and not hidden(name)] if not classes else ()
    if loose:
        raise UserError(
            f"{folder} holds {len(loose)} images ({min(loose)}, ..) and no class folders, and no list of their labels was "
            f"found. Next: data.labels=FILE with lines of `name label` ({split}.txt, LOC_val_solution.csv) or {TRUTH} with "
            f"its devkit; or move them into a folder per class."
        )
    return Place(folder)


def lists(root: Path, folder: Path) -> Iterable[Path]:
    """Where a list of the labels of `folder` may lie: in it, beside it, or in ImageNet's devkit."""
    names = [pattern.format(folder.name) for pattern in LISTS] + ([TRUTH] if folder.name.startswith("val") else [])
    devkits = sorted(path for path in root.glob("*devkit*") if path.is_dir())
    for base in (folder, root, *devkits, *(path / "data" for path in devkits)):
        yield from (base / name for name in names)


def split_tars(folder: Path, split: str) -> tuple[str, ...]:
    """The tar files in `folder` whose name has the split's as a word, or that a pattern (braces, ? and *) describes."""
    tars = sorted(path.name for path in folder.glob("*.tar") if not hidden(path.name))
    if split.endswith(".tar"):
        patterns = expanded(split)
        found = tuple(name for name in tars if any(fnmatch(name, pattern) for pattern in patterns))
        if lost := [p for p in patterns if not any(fnmatch(name, p) for name in found)]:
            raise UserError(
                f"{folder} has no {lost[0]}, which {split!r} names. Accepted: a pattern of tar files there."
            )
        return found
    return tuple(name for name in tars if split in re.split(r"[-_.]", name))


def expanded(pattern: str) -> list[str]:
    """Braces as a shell expands them: a{00..02} is a00, a01, a02, and {a,b} is a, b."""
    if not (brace := re.search(r"\{([^{}]*)\}", pattern)):
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", brace[1]):
        low, high = numbers.groups()
        parts = [f"{k:0{len(low)}d}" for k in range(int(low), int(high) + 1)]
    else:
        parts = brace[1].split(",")
    rest = expanded(pattern[brace.end() :])
    return [pattern[: brace.start()] + a + b for a, b in itertools.product(parts, rest)]


def missing(root: Path, split: str) -> str:
    """Why a split cannot be found, with the setting for one that is called otherwise."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not hidden(path.name))
    words = {word for path in root.glob("*.tar") for word in re.split(r"[-_.]", path.name)}
    found = [*folders, *sorted(words.intersection(SPLITS) - set(folders))]
    listed = ", ".join(found[:6]) or "no directories"
    if split not in ("train", "val"):
        return f"no split {split!r} in {root} (found: {listed}). Accepted: one of its folders, or tar files with it in their names."
    text, key = f"{root} has no {split}/ folder (found: {listed}). ", f"data.{split}_split"
    if named := next(
        (name for name in found if (name.lower() in TRAINING) == (split == "train") and name.lower() in SPLITS), ""
    ):
        return f"{text}Next: {key}={named} (in `data` commands --split), or point --data at another directory."
    if len(folders) > 1 and not set(found) & set(SPLITS) and any(map(is_image, os.listdir(root / folders[0]))):
        return f"{text}If these are classes, divide them into {root / 'train'} and {root / 'val'}."
    return f"{text}Point --data at the parent of train/ and val/, or name the folder: {key}=NAME (in `data` commands --split)."
