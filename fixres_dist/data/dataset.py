"""From `data.root` to the index of a split: folders of images, tar shards, or the built-in example. No torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fixres_dist.base.commands import command
from fixres_dist.base.environment import cache_folder
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import no_room
from fixres_dist.config.schema import Data
from fixres_dist.data import demo, deny_lists, folders, shards
from fixres_dist.data.headers import read_headers, within
from fixres_dist.data.index import USUAL, Index, Limits, cache_file
from fixres_dist.data.layout import CLASSES, EXTENSIONS, class_folders, class_names, counted, find
from fixres_dist.data.progress import progress_bar


def folder(root: str, cache: str = "") -> Path:
    """The directory of a data set; `demo` is generated on first use (half a minute), always the same images."""
    if root != "demo":
        return Path(root)
    target = cache_folder(cache) / "demo"
    try:
        with progress_bar("writing the built-in example") as progress:
            demo.write_demo(target, progress=progress)
    except OSError as error:
        if no_room(error):
            raise
        raise UserError(
            f"the built-in example cannot be written to {target}: {error.strerror}. "
            "Accepted: data.cache=DIR, or FIXRES_CACHE=DIR in the environment, that can be written."
        ) from None
    return target


def load(
    root: Path,
    split: str,
    cache: str = "",
    *,
    deny_list: str = "",
    labels: str = "",
    on_bad: str = "stop",
    fresh: bool = False,
    show: bool = True,
    checksums: bool = False,
    limits: Limits = USUAL,
) -> Index:
    """The index of one split, without the samples on the deny list; `show`: a progress bar while headers are read.

    `split`, `labels`: as layout.find has them. The index is cached: headers are read where files changed, or all of them
    if `fresh`; with `checksums` whole files. `limits`: of a picture. Files whose header cannot be read are refused with
    `on_bad: stop`; with `skip` they stay in and are skipped when their batch is decoded, so the order of the others does
    not depend on them. Raises UserError: no such split, nothing left of it, or files that are refused.
    """
    whole_split, where = whole_index(root, split, cache, labels, fresh, show, checksums), root / split
    index = whole_split.without(deny_lists.names(deny_list, split, whole_split.names()).denied if deny_list else ())
    if not len(index):
        why = f"data.deny_list={deny_list} names all {len(whole_split)} of them" if len(whole_split) else "it is empty"
        raise UserError(f"no image is left in {where}: {why}. Accepted: one image or more.")
    index, bad = recheck(within(index, limits))
    if bad and on_bad == "stop":
        listed = "\n  ".join(f"{index.where(sample)}: {reason}" for sample, reason in list(bad.items())[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} of {len(index)} files in {where} are no readable images:\n  {listed}{more}\n"
            f"Next: {verify_command(root, split)}, then data.deny_list=bad.txt "
            "(`data shard`: --deny-list bad.txt); or data.on_bad=skip; or move them away."
        )
    return index


def of(data: Data, where: Path, on_bad: str | None = None, show: bool = True) -> Index:
    """The index of the folder `where` under the settings `data`, all of them that concern it; `on_bad` instead of theirs."""
    return load(
        where.parent,
        where.name,
        data.cache,
        deny_list=data.deny_list,
        labels=data.labels,
        on_bad=on_bad or data.on_bad,
        show=show,
        limits=Limits.of(data),
    )


def verify_command(root: Path, split: str) -> str:
    """`data verify` for the data set; its splits are train and val unless they are named."""
    named = () if split in ("train", "val") else ("--split", split)
    return command("data", "verify", "--data", root, *named, "--deny-list", "bad.txt")


def whole_index(
    root: Path,
    split: str,
    cache: str,
    labels: str,
    fresh: bool = False,
    show: bool = True,
    checksums: bool = False,
) -> Index:
    """The index of a split with all its samples, whether or not they can be read."""
    place, file = find(root, split, labels), cache_file(root / split, cache_folder(cache))
    with suppress(OSError):  # that of the write is told
        file.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar(f"reading {split} headers", show) as progress:
        if place.shards:
            return shards.load(place, file, progress, fresh)
        return folders.load(place, file, progress, fresh, checksums)


def recheck(index: Index) -> tuple[Index, dict[int, str]]:
    """Read the unreadable headers again: the updated index, and of every sample that still has none the reason."""
    return read_headers(index, np.flatnonzero(index.sizes[:, 0] == 0))


@dataclass(frozen=True)
class Survey:
    """What a split holds, as far as names tell: no image is opened."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]  # images of each class
    passed: str  # what is passed over, counted by kind
    denied: deny_lists.Denied
    by_list: bool  # labels do not come from class folders: a class may have no image

    @property
    def images(self) -> int:
        """Those that are left of the deny list."""
        return sum(self.counts) - len(self.denied.denied)


def survey(root: Path, split: str, data: Data) -> Survey:
    """The split (`train`, `val` or another name) of the data set in `root` under the settings. Headers are read only where
    shards have no index yet. Raises UserError."""
    where = root / data.split_name(split)
    root, name = where.parent, where.name
    place = find(root, name, data.labels)
    if place.shards:
        index = whole_index(root, name, data.cache, data.labels)
        classes, names, labels, passed = index.classes, index.names(), index.labels.tolist(), "nothing"
    else:
        found = folders.listing(place)
        classes, names, passed = found.classes, iter(found.names()), counted(found.passed)
        labels = [label for one in found.directories for label in one.labels]
    denied = deny_lists.names(data.deny_list, name, names)
    counts = tuple(np.bincount(labels, minlength=len(classes)).tolist())
    return Survey(classes, counts, passed, denied, by_list=bool(place.shards or place.labels))


def classes(data: Data, split: str) -> list[str]:
    """The class names of a split, in the order of its labels; none if there is no such split. Of folders only names are
    read."""
    where = folder(data.root, data.cache) / data.split_name(split)
    try:
        place = find(where.parent, where.name, data.labels)
    except UserError:
        return []  # opening it raises the error
    if place.labels:
        return list(folders.listing(place).classes)
    if place.shards and not (place.folder / CLASSES).is_file():
        return list(whole_index(where.parent, where.name, data.cache, data.labels).classes)
    return class_names(place.folder) if place.shards else list(class_folders(place.folder))


def check_folder(root: Path, data: Data | None = None) -> dict[str, Survey]:
    """What train and val hold. Refuse what can be seen to be wrong without opening an image; raises UserError."""
    data = data or Data()
    surveys = {split: survey(root, split, data) for split in ("train", "val")}
    if data.labels and not any(found.by_list for found in surveys.values()):
        raise UserError(
            f"data.labels={data.labels} is the labels of images without class folders, and both splits have subfolders, which "
            "are taken for classes. Next: leave data.labels out, or move the images of the split out of its subfolders."
        )
    for split, found in surveys.items():
        where = root / data.split_name(split)
        if len(found.classes) < 2:
            raise UserError(
                f"{where} has {len(found.classes)} class folder(s){': ' + found.classes[0] if found.classes else ''}; "
                f"passed over: {found.passed}. Accepted: two or more, one folder per class, or .tar files (.tar.gz: unpack it)."
            )
        if 0 in found.counts and not found.by_list:
            raise UserError(
                f"class folder {where / found.classes[found.counts.index(0)]} holds no image ({' '.join(EXTENSIONS)}); "
                f"passed over in {where}: {found.passed}. Add images or remove the folder."
            )
    deny_lists.check(data.deny_list, [found.denied for found in surveys.values()])
    train, val = (surveys[split].classes for split in ("train", "val"))
    numbers = list(val) == list(map(str, range(len(val)))) and len(val) <= len(train)
    if set(train) != set(val) and not (surveys["val"].by_list and (numbers or set(val) <= set(train))):
        odd = sorted(set(train) ^ set(val))
        raise UserError(f"train/ and val/ have different classes: {', '.join(odd[:6])} stand(s) in only one of them.")
    return surveys
