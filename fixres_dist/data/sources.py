"""From `data.root` to an index: an ImageFolder, or the built-in example, which is written where it is first asked for."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from fixres_dist.data import demo, index


def folder(root: str, cache: str = "") -> Path:
    """The directory of a data set; `demo` is generated on first use (half a minute), always the same images."""
    if root != "demo":
        return Path(root)
    target = index.cache_folder(cache) / "demo"
    with Bar("writing the built-in example") as bar:
        demo.write_demo(target, progress=bar)
    return target


def load(root: Path, split: str, cache: str = "", show: bool = True) -> index.Index:
    """The index of one split; with a progress bar while headers are read."""
    with Bar(f"reading {split} headers", show) as bar:
        return index.load(root, split, index.cache_folder(cache), bar)


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
