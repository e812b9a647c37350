"""Decode every file of a data set, as training would, and say which ones cannot be."""

from __future__ import annotations

from fixres_dist.data import torch_cpu
from fixres_dist.data.decoding import Bad
from fixres_dist.data.geometry import Resize
from fixres_dist.data.index import Index
from fixres_dist.data.progress import Progress
from fixres_dist.data.requests import Pictures, every_sample

BATCH = 64
RES = 32  # small: next to decoding it costs little
RESIZE = Resize(RES, "shorter", "bilinear")


def verify(index: Index, workers: int, progress: Progress | None = None) -> list[Bad]:
    """Every sample of `index` that cannot be decoded, with the reason, in order."""
    found: list[Bad] = []
    done = 0
    requests = every_sample(index, Pictures("test", RES, RESIZE, 0), BATCH, 0, 1)
    for batch in torch_cpu.batches(index, requests, RES, RESIZE, max(1, workers)):
        found += batch.skipped
        done += len(batch.samples) + len(batch.skipped)
        if progress:
            progress(done, len(index))
    return found
