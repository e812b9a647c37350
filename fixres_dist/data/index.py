"""What a data set holds: files, labels, class names and pixel sizes of an ImageFolder, scanned once and cached.

The sizes come from the headers, so that geometry (data/geometry.py) needs no pixels and every rank, backend and restart
agrees on the view of a sample before anything is decoded. No torch: the launcher checks a data set with this.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fixres_dist.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
FORMAT = 1  # of the cached arrays
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class Index:
    """One split. Sample i is the i-th file in class order, then path order, as torchvision's ImageFolder has it."""

    folder: Path  # the split's directory
    classes: tuple[str, ...]
    text: bytes  # all paths relative to `folder`, joined: a million Python strings would take 100 MB per process
    ends: NDArray[np.int64]  # end of each path in `text`
    labels: NDArray[np.int32]
    sizes: NDArray[np.int32]  # [n, 2] height, width in pixels

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, sample: int) -> Path:
        start = int(self.ends[sample - 1]) if sample else 0
        return self.folder / os.fsdecode(self.text[start : int(self.ends[sample])])

    @cached_property
    def fingerprint(self) -> str:
        """Of the sample list: names, labels and sizes, not of where the data set lies nor of the pixels."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for part in (self.text, self.ends.tobytes(), self.labels.tobytes(), self.sizes.tobytes()):
            digest.update(part)
        return digest.hexdigest()[:16]


def cache_folder(setting: str = "") -> Path:
    """Where indexes and the built-in example are kept: `data.cache`, $FIXRES_CACHE, or ~/.cache/fixres_dist."""
    return Path(setting or os.environ.get("FIXRES_CACHE") or "~/.cache/fixres_dist").expanduser()


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
        for name in classes:
            if next(walk(root / split / name), None) is None:
                raise UserError(
                    f"class folder {root / split / name} holds no image ({' '.join(EXTENSIONS)}). "
                    "Add images or remove the folder."
                )
    train, val = class_names(root / "train"), class_names(root / "val")
    if train != val:
        odd = sorted(set(train) ^ set(val))
        raise UserError(f"train/ and val/ have different classes: {', '.join(odd[:6])} stand(s) in only one of them.")


def class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def walk(folder: Path) -> Iterator[Path]:
    """The images below a class folder, in torchvision's order."""
    for base, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS):
                yield Path(base, name)


def load(root: Path, split: str, cache: Path | None = None, progress: Progress | None = None) -> Index:
    """The index of `root/split`, from the cache when no directory below it has changed since it was scanned.

    Raises UserError for a folder that is no data set or an image whose header cannot be read.
    """
    folder = root / split
    kept = (cache or cache_folder()) / "index" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.npz"
    index = read_cached(folder, kept)
    if index is None:
        index = scan(folder, kept, progress)
    return index


def read_cached(folder: Path, kept: Path) -> Index | None:
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            if meta["format"] != FORMAT or any(
                # A directory touched within a clock tick of the scan may hold a file the scan did not see.
                os.stat(folder / name).st_mtime_ns != mtime_ns or mtime_ns > meta["scanned_ns"] - 2_000_000_000
                for name, mtime_ns in meta["directories"].items()
            ):
                return None
            return Index(
                folder,
                tuple(meta["classes"]),
                arrays["text"].tobytes(),
                arrays["ends"],
                arrays["labels"],
                arrays["sizes"],
            )
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def scan(folder: Path, kept: Path, progress: Progress | None) -> Index:
    """Walk the folder, read every header (threads: it is I/O), and keep the result."""
    scanned_ns = time.time_ns()
    classes = class_names(folder)
    paths: list[Path] = []
    labels: list[int] = []
    directories = {".": os.stat(folder).st_mtime_ns}
    for label, name in enumerate(classes):
        directories[name] = os.stat(folder / name).st_mtime_ns
        for base, subfolders, _ in os.walk(folder / name, followlinks=True):
            for sub in subfolders:
                path = Path(base, sub)
                directories[str(path.relative_to(folder))] = os.stat(path).st_mtime_ns
        found = list(walk(folder / name))
        paths += found
        labels += [label] * len(found)
    sizes = np.zeros((len(paths), 2), np.int32)
    bad: list[str] = []
    with ThreadPoolExecutor(max(4, (os.cpu_count() or 1) * 2)) as pool:
        for i, size in enumerate(pool.map(header_size, paths)):
            if isinstance(size, str):
                bad.append(f"{paths[i]}: {size}")
            else:
                sizes[i] = size
            if progress and (i % 1000 == 999 or i + 1 == len(paths)):
                progress(i + 1, len(paths))
    if bad:
        listed = "\n  ".join(bad[:5])
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} of {len(paths)} files in {folder} are no readable images:\n  {listed}{more}\nMove them away."
        )
    names = [os.fsencode(path.relative_to(folder)) for path in paths]
    index = Index(
        folder,
        tuple(classes),
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        np.asarray(labels, np.int32),
        sizes,
    )
    meta = {"format": FORMAT, "classes": classes, "directories": directories, "scanned_ns": scanned_ns}
    keep(index, meta, kept)
    return index


def keep(index: Index, meta: dict[str, object], kept: Path) -> None:
    """Write the cache by rename; a cache that cannot be written only costs the next scan."""
    part = kept.with_name(f".{kept.stem}.{os.getpid()}.npz")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            part,
            meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            text=np.frombuffer(index.text, np.uint8),
            ends=index.ends,
            labels=index.labels,
            sizes=index.sizes,
        )
        os.replace(part, kept)
    except OSError:
        part.unlink(missing_ok=True)


def header_size(path: Path) -> tuple[int, int] | str:
    """(height, width), or why the header cannot be read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except UnidentifiedImageError:
        return "not an image" if path.stat().st_size else "empty file"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
