"""Progress of long work, as a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from fixres_dist.base import watchdog

Progress = Callable[[int, int], None]  # (done, total)


@contextmanager
def progress_bar(note: str, show: bool = True) -> Iterator[Progress]:
    """A bar that appears with the first report: work that is done already shows none."""
    bar: tqdm[Any] | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        watchdog.beat()
        if bar is None:
            hidden = None if show else True  # None: hidden where stderr is no terminal
            bar = tqdm(total=total, desc=note, unit="img", leave=False, file=sys.stderr, disable=hidden)
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()
