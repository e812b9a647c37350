"""From `data.root` to the index of a split: folders of images, tar shards, or the built-in example. No torch."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fixres_dist.base.commands import command
from fixres_dist.base.environment import cache_folder
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import no_room, whole
from fixres_dist.data import demo, folders, shards
from fixres_dist.data.folders import class_names
from fixres_dist.data.headers import read_headers
from fixres_dist.data.index import Index, cache_file
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
    on_bad: str = "stop",
    fresh: bool = False,
    show: bool = True,
) -> Index:
    """The index of one split, without the samples on the deny list; `show`: a progress bar while headers are read.

    It is cached: headers are read where files changed, or all of them if `fresh`. Files whose header cannot be read are
    refused with `on_bad: stop`; with `skip` they stay in and are skipped when their batch is decoded, so the order of
    the others does not depend on them. Raises UserError: no such split, nothing left of it, or files that are refused.
    """
    here = root / split
    if not here.is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:6]) if root.is_dir() else ""
        raise UserError(
            f"no split {split!r} in {root} (found: {found or 'no directories'}). Accepted: one of its folders."
        )
    read = shards.load if shards.is_sharded(here) else folders.load
    with progress_bar(f"reading {split} headers", show) as progress:
        whole_split = read(here, cache_file(here, cache_folder(cache)), progress, fresh)
    index = whole_split.without(denied(deny_list, split))
    if not len(index):
        why = f"data.deny_list={deny_list} names all {len(whole_split)} of them" if len(whole_split) else "it is empty"
        raise UserError(f"no image is left in {here}: {why}. Accepted: one image or more.")
    index, bad = recheck(index)
    if bad and on_bad == "stop":
        listed = "\n  ".join(f"{index.where(sample)}: {reason}" for sample, reason in list(bad.items())[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} of {len(index)} files in {here} are no readable images:\n  {listed}{more}\n"
            f"Next: {command('data verify', '--data', root, '--deny-list', 'bad.txt')}, then data.deny_list=bad.txt "
            "(`data shard`: --deny-list bad.txt); or data.on_bad=skip; or move them away."
        )
    return index


def recheck(index: Index) -> tuple[Index, dict[int, str]]:
    """Read the unreadable headers again: the updated index, and of every sample that still has none the reason."""
    return read_headers(index, np.flatnonzero(index.sizes[:, 0] == 0))


def count(root: Path, split: str) -> int:
    """The images of a split. Headers are read only where shards have no index yet."""
    here = root / split
    if shards.is_sharded(here):
        return len(shards.load(here, cache_file(here, cache_folder())))
    return sum(folders.count(here / name) for name in class_names(here))


def check_folder(root: Path) -> None:
    """Refuse what can be seen to be wrong without opening a file; raises UserError."""
    if not root.is_dir():
        raise UserError(f"no data set at {root}. Accepted: a directory with train/ and val/, or --data demo.")
    found = sorted(p.name for p in root.iterdir() if p.is_dir())
    for split in ("train", "val"):
        if split not in found:
            seen = ", ".join(found[:6]) or "no directories"
            raise UserError(
                f"{root} has no {split}/ folder (found: {seen}). Point --data at the parent of train/ and val/."
            )
        classes = class_names(root / split)
        if len(classes) < 2:
            raise UserError(
                f"{root / split} has {len(classes)} class folder(s){': ' + classes[0] if classes else ''}; "
                "accepted: two or more, one folder per class."
            )
        for name in () if (root / split / folders.CLASSES).is_file() else classes:
            if not folders.count(root / split / name):
                raise UserError(
                    f"class folder {root / split / name} holds no image ({' '.join(folders.EXTENSIONS)}). "
                    "Add images or remove the folder."
                )
    train, val = class_names(root / "train"), class_names(root / "val")
    if train != val:
        odd = sorted(set(train) ^ set(val))
        raise UserError(f"train/ and val/ have different classes: {', '.join(odd[:6])} stand(s) in only one of them.")


def denied(deny_list: str, split: str) -> list[str]:
    """The names of this split in a deny list, as `write_deny_list` writes it; none for "". Raises UserError."""
    if not deny_list:
        return []
    try:
        lines = Path(deny_list).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"data.deny_list is {deny_list!r}: {error.strerror}. Next: {command('data verify')} writes one."
        ) from None
    names = (os.fsdecode(line.partition(b"\t")[0]) for line in lines if not line.startswith(b"#"))
    return [name.removeprefix(f"{split}/") for name in names if name.startswith(f"{split}/") and name != f"{split}/"]


def write_deny_list(path: Path, found: dict[str, list[tuple[str, str]]]) -> None:
    """Write the (name, reason) pairs of every split as lines of `split/name`, a tab and the reason.

    By rename. Names keep their bytes, whatever their encoding.
    """
    lines = ["# files that cannot be decoded; used by data.deny_list"]
    for split, entries in found.items():
        lines += [f"{split}/{name}\t{' '.join(reason.split())}" for name, reason in entries]
    with whole(path) as part:
        part.write_bytes(b"".join(os.fsencode(line) + b"\n" for line in lines))
