"""What a data set holds: names, labels, class names and pixel sizes of an ImageFolder, scanned once and cached.

The sizes come from the headers, so that geometry (data/geometry.py) needs no pixels and every rank, backend and restart
agrees on the view of a sample before anything is decoded. No torch: the launcher checks a data set with this.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.environment import cache_folder
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import whole
from fixres_dist.data.headers import Seen, look, look_at
from fixres_dist.data.index import Index
from fixres_dist.data.listing import EXTENSIONS, class_names, directories, image_names, walk

FORMAT = 3  # of the cached arrays
Progress = Callable[[int, int], None]  # (done, total)


def cache_file(folder: Path, cache: Path | None) -> Path:
    return (cache or cache_folder()) / "index" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.npz"


def check_folder(root: Path) -> None:
    """The mistakes that can be seen without opening a file; raises UserError."""
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
        for name in () if (root / split / "classes.json").is_file() else classes:
            if next(walk(root / split / name), None) is None:
                raise UserError(
                    f"class folder {root / split / name} holds no image ({' '.join(EXTENSIONS)}). "
                    "Add images or remove the folder."
                )
    train, val = class_names(root / "train"), class_names(root / "val")
    if train != val:
        odd = sorted(set(train) ^ set(val))
        raise UserError(f"train/ and val/ have different classes: {', '.join(odd[:6])} stand(s) in only one of them.")


def load(root: Path, split: str, cache: Path | None = None, progress: Progress | None = None) -> Index:
    """The index of `root/split`, from the cache when no directory below it has changed since it was scanned.

    Raises UserError for a folder that cannot be listed, or that holds files whose header cannot be read.
    """
    return checked(load_all(root, split, cache, progress))


def checked(index: Index, on_bad: str = "stop") -> Index:
    """The index with the headers that could not be read tried again; with `stop` refused if any still cannot."""
    found, bad = recheck(index)
    if bad and on_bad == "stop":
        listed = "\n  ".join(f"{found.where(sample)}: {reason}" for sample, reason in list(bad.items())[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} of {len(found)} files in {found.folder} are no readable images:\n  {listed}{more}\n"
            f"Next: python -m fixres_dist data verify --data {found.folder.parent} --deny-list bad.txt, then data.deny_list=bad.txt "
            "(`data shard`: --deny-list bad.txt); or data.on_bad=skip; or move them away."
        )
    return found


def load_all(
    root: Path, split: str, cache: Path | None = None, progress: Progress | None = None, fresh: bool = False
) -> Index:
    """As `load`, with the files whose header cannot be read (size 0, 0). Only directories that changed are read again, or
    all of them for a `fresh` index: a file that was replaced in place leaves no trace in its directory."""
    folder = root / split
    kept = cache_file(folder, cache)
    cached = None if fresh else read_cached(kept)
    try:
        if cached and not stale(folder, cached[1]):
            return replace(cached[0], folder=folder)
        return scan(folder, kept, cached, progress)
    except OSError as error:
        raise UserError(
            f"cannot list {error.filename}: {error.strerror}. Accepted: a directory this user may read."
        ) from None


def stale(folder: Path, meta: dict[str, Any]) -> set[str]:
    """The directories of a cached index that have to be read again."""
    return {
        name
        for name, mtime_ns, _ in meta["directories"]
        if mtime(folder / name) != mtime_ns or just_before(mtime_ns, meta)
    }


def just_before(mtime_ns: int, meta: dict[str, Any]) -> bool:
    """A directory touched within a clock tick of the scan may hold a file that the scan did not see."""
    return mtime_ns > meta["scanned_ns"] - 2_000_000_000


def mtime(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def read_cached(kept: Path) -> tuple[Index, dict[str, Any]] | None:
    """(index, meta) as written by `keep`, whatever has happened to the folder since."""
    try:
        with np.load(kept, allow_pickle=False) as a:
            meta = json.loads(a["meta"].tobytes())
            if meta["format"] != FORMAT:
                return None
            places = a.get("places")
            index = Index(
                kept.parent, tuple(meta["classes"]), a["text"].tobytes(), a["ends"], a["labels"], a["sizes"], a["marks"],
                tuple(name for name, _ in meta.get("shards", ())), places,
            )  # fmt: skip
            return index, meta
    except Exception:  # a torn file has a dozen ways to say so
        return None


def scan(folder: Path, kept: Path, cached: tuple[Index, dict[str, Any]] | None, progress: Progress | None) -> Index:
    """List the folder, read the headers in the directories that are new or changed (threads: it is I/O), keep the result."""
    scanned_ns = time.time_ns()
    classes = class_names(folder)
    known: dict[str, tuple[int, int]] = {}  # unchanged directory -> its part of the cached index
    if cached:
        changed, start = stale(folder, cached[1]), 0
        for name, _, files in cached[1]["directories"]:
            if name not in changed:
                known[name] = (start, start + files)
            start += files
    listed: list[tuple[str, int, int]] = [(".", os.stat(folder).st_mtime_ns, 0)]
    labels: list[int] = []
    names: list[bytes] = []
    copied: list[tuple[int, int, int]] = []  # first sample here, part of the cached index
    for label, name in enumerate(classes):
        for base in directories(folder / name):
            relative, changed_ns = str(base.relative_to(folder)), os.stat(base).st_mtime_ns
            files = image_names(base)
            a, b = known.get(relative, (0, -1))
            if b - a == len(files):
                copied.append((len(names), a, b))
            names += [os.fsencode(f"{relative}/{file}") for file in files]
            labels += [label] * len(files)
            listed.append((relative, changed_ns, len(files)))
    sizes, marks = np.full((len(names), 2), -1, np.int32), np.zeros(len(names), np.uint32)
    if cached:
        for at, a, b in copied:
            sizes[at : at + b - a], marks[at : at + b - a] = cached[0].sizes[a:b], cached[0].marks[a:b]
    todo, done = np.flatnonzero(sizes[:, 0] < 0), len(names) - int((sizes[:, 0] < 0).sum())
    with ThreadPoolExecutor(max(4, (os.cpu_count() or 1) * 2)) as pool:
        for part in np.array_split(todo, max(1, -(-len(todo) // 1000))):  # a future per file would take gigabytes
            read = list(pool.map(lambda i: look(folder / os.fsdecode(names[i])), part.tolist()))
            sizes[part] = np.array([seen.size for seen in read]).reshape(-1, 2)
            marks[part] = [seen.mark for seen in read]
            done += len(part)
            if progress:
                progress(done, len(names))
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    index = Index(folder, tuple(classes), b"".join(names), ends, np.asarray(labels, np.int32), sizes, marks)
    keep(index, {"directories": listed, "scanned_ns": scanned_ns}, kept)
    return index


def keep(index: Index, meta: dict[str, Any], kept: Path) -> None:
    """Write the cache by rename; a cache that cannot be written only costs the next scan."""
    text = json.dumps({"format": FORMAT, "classes": index.classes, **meta}).encode()
    arrays: dict[str, NDArray[Any]] = {name: getattr(index, name) for name in ("ends", "labels", "sizes", "marks")}
    if index.places is not None:
        arrays["places"] = index.places
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with whole(kept) as part, open(part, "wb") as file:
            np.savez(file, meta=np.frombuffer(text, np.uint8), text=np.frombuffer(index.text, np.uint8), **arrays)  # type: ignore[arg-type]


def recheck(index: Index) -> tuple[Index, dict[int, str]]:
    """The index with the headers that could not be read tried again, and why each of the rest cannot be read."""
    reasons: dict[int, str] = {}
    unread = np.flatnonzero(index.sizes[:, 0] == 0).tolist()
    if not unread:
        return index, reasons
    sizes, marks = index.sizes.copy(), index.marks.copy()
    for sample in unread:
        try:
            seen = (
                look(index.path(sample))
                if index.places is None
                else look_at(io.BytesIO(index.read(sample).data), int(index.places[sample, 2]))
            )
        except OSError as error:
            seen = Seen((0, 0), 0, str(error))
        sizes[sample], marks[sample] = seen.size, seen.mark
        if seen.reason:
            reasons[sample] = seen.reason
    return replace(index, sizes=sizes, marks=marks), reasons
