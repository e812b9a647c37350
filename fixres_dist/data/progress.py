"""Progress of long work over images: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from fixres_dist.base import watchdog
from fixres_dist.base.text import duration

Progress = Callable[[int, int], None]  # (done, total)
LINE_EVERY_S = 30.0


@contextmanager
def progress_bar(note: str, show: bool = True) -> Iterator[Progress]:
    """A bar that appears with the first report: work that is done already shows none. Short work has no line in a log."""
    bar: tqdm[Any] | None = None
    began = told = time.monotonic()
    first = -1

    def report(done: int, total: int) -> None:
        nonlocal bar, told, first
        watchdog.beat()
        if not show:
            return
        if sys.stderr.isatty():
            bar = bar or tqdm(total=total, initial=done, desc=note, unit="img", leave=False, file=sys.stderr)
            bar.update(done - bar.n)
            return
        now = time.monotonic()
        first = done if first < 0 else first
        if now - told >= LINE_EVERY_S and done > first:
            told, rate = now, (done - first) / (now - began)
            text = f"{done:,} of {total:,} images ({100 * done / total:.0f} %), {rate:,.0f} img/s"
            print(f"{note}: {text}, eta {duration((total - done) / rate)}", file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()
