"""From `data.root` to an index: an ImageFolder, or the built-in example, which is written where it is first asked for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tqdm import tqdm

from fixres_dist.base.environment import cache_folder
from fixres_dist.base.errors import UserError
from fixres_dist.data import demo, scan, shards
from fixres_dist.data.index import Index


def folder(root: str, cache: str = "") -> Path:
    """The directory of a data set; `demo` is generated on first use (half a minute), always the same images."""
    if root != "demo":
        return Path(root)
    target = cache_folder(cache) / "demo"
    with Bar("writing the built-in example") as bar:
        demo.write_demo(target, progress=bar)
    return target


def load(
    root: Path,
    split: str,
    cache: str = "",
    show: bool = True,
    deny_list: str = "",
    on_bad: str = "stop",
    fresh: bool = False,
) -> Index:
    """The index of one split, of folders or of shards, less the deny list; with a progress bar while headers are read,
    which is all of them if `fresh`.

    With `on_bad: stop` files whose header cannot be read are refused, with `skip` they stay in, to be skipped at their
    turn: so the order of the others does not depend on them.
    """
    folder, kept = root / split, cache_folder(cache)
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:6]) if root.is_dir() else ""
        raise UserError(
            f"no split {split!r} in {root} (found: {found or 'no directories'}). Accepted: one of its folders."
        )
    with Bar(f"reading {split} headers", show) as bar:
        read = shards.load if shards.is_sharded(folder) else scan.load_all
        found_all = read(root, split, kept, bar, fresh)
    left = found_all.without(denied(deny_list, split))
    if not len(left):
        denies = f"data.deny_list={deny_list} names all {len(found_all)} of them" if len(found_all) else "it is empty"
        raise UserError(f"no image is left in {folder}: {denies}. Accepted: one image or more.")
    return scan.checked(left, on_bad)


def denied(deny_list: str, split: str) -> list[str]:
    """The names of this split in a deny list: lines of `split/name`, a tab and a reason; `#` starts a comment."""
    if not deny_list:
        return []
    try:
        lines = Path(deny_list).read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"data.deny_list is {deny_list!r}: {error.strerror}. Next: python -m fixres_dist data verify writes one."
        ) from None
    names = (os.fsdecode(line.partition(b"\t")[0]) for line in lines if not line.startswith(b"#"))
    return [name.removeprefix(f"{split}/") for name in names if name.startswith(f"{split}/") and name != f"{split}/"]


class Bar:
    """A bar that appears only if there is something to wait for."""

    def __init__(self, note: str, show: bool = True) -> None:
        self.note, self.show = note, show
        self.bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(
                total=total,
                desc=self.note,
                unit="img",
                leave=False,
                file=sys.stderr,
                disable=None if self.show else True,
            )
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
