"""The cached engine of a stage: whether it runs, and the trunk's one pass over the pictures that writes the features."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fixres_dist.base.environment import versions
from fixres_dist.base.errors import UserError
from fixres_dist.data import order
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.models import weights
from fixres_dist.models.fast_trunk import FastTrunk
from fixres_dist.models.parts import Parts
from fixres_dist.runs.rundir import Locked, RunDir
from fixres_dist.training.cache import rule
from fixres_dist.training.cache.store import Span, Store, begin_writing, open_store
from fixres_dist.training.session import Session
from fixres_dist.training.stages import Stage, batch_per_device

SEGMENT_BATCHES, SEGMENTS = 4, 512  # a segment is the larger of 4 forwards and 1/512 of the split
WAIT_S = 2.0  # between looks at whether another run has finished writing the same features
Stop = Callable[[], int]  # number of the stop signal that has come, or 0


class Stopped(Exception):
    """A stop signal, agreed by all ranks; what is written stays, and the next start goes on there."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def specification(session: Session, stage: Stage, parts: Parts, index: Index, views: int) -> dict[str, Any]:
    """All that decides a feature but for rounding: memory format, compiling and batch move its last digits only."""
    state, head = parts.model.state_dict(), parts.head.state_dict()
    resize, found = session.resize(stage.res), versions()
    return {
        "model": session.config.model.timm_name,
        "trunk weights": weights.digest({name: value for name, value in state.items() if name not in head}),
        "cut before": list(parts.tuned.modules),
        "sample list": index.fingerprint,
        "contents": index.contents,
        "views": views,
        "res": stage.res,
        "resize": list(resize),
        "mean and std": [list(session.spec.mean), list(session.spec.std)],
        "precision": session.arithmetic.name,
        "device": session.ranks.device.type,
        "versions": {name: found[name] for name in ("torch", "timm")},
    }


def open_stores(session: Session, stage: Stage, parts: Parts, stop: Stop, check: bool) -> dict[str, Store]:
    """The features of the stage's train and val pictures by split, written where they are missing; {} when it streams.

    Give them to `Session.batches` or `Session.evaluate`, and what comes back to `Session.inputs`. `check`: compare the
    checksums of what is there. Raises Stopped, and UserError where the cached engine is asked for and cannot run (rule.py).
    """
    setting, trunk = session.config.run.engine, parts.trunk
    rule.check(setting, stage)
    if rule.obstacle(stage) or setting == "stream" or not isinstance(trunk, FastTrunk):
        return {}
    folder = rule.feature_folder(session.config)
    specs = {}
    for split, index in session.splits.items():
        views = rule.VIEWS[stage.transform] if split == "train" else 1
        specs[split] = session.ranks.from_main(
            session.ranks.is_main and specification(session, stage, parts, index, views)
        )
    found = stores(session, trunk, stage.res, specs, folder)

    def decide() -> dict[str, Any]:
        gaps = {split: sum(b - a for a, b in s.missing()) * s.views for split, s in found.items()}
        size = sum(s.missing_bytes() for s in found.values())
        need = rule.Need(sum(gaps.values()), size, rule.free_bytes(folder), folder)
        streamed = rule.streamed_pictures(stage, len(session.val), rule.evaluations(session.config))
        chosen, why = rule.choose(setting, stage, streamed, need)
        return {"engine": chosen, "why": why}

    decided = session.decided(f"engine of {stage.name} (run.engine={setting})", decide)
    if decided["engine"] == "stream":
        return {}
    for split, store in found.items():
        check_shared(session, store)
        if check:
            store.verify(session.splits[split], session.ranks.rank, session.ranks.world_size)
        session.ranks.barrier()
        if session.ranks.from_main(session.ranks.is_main and bool(store.missing())):
            write_missing(session, stage, trunk, store, specs[split], session.splits[split], stop)
    return found


def stores(
    session: Session, trunk: FastTrunk, res: int, specs: dict[str, dict[str, Any]], folder: Path
) -> dict[str, Store]:
    """Of each split, written or not."""
    example = session.features(trunk, torch.zeros(1, 3, res, res, dtype=torch.uint8))
    return {
        split: open_store(folder, spec, len(session.splits[split]), spec["views"], example)
        for split, spec in specs.items()
    }


def check_shared(session: Session, store: Store) -> None:
    """Every rank reads what every other one writes; raises UserError where the folder is on a disk of a node's own."""
    ranks = session.ranks
    name = ranks.from_main(f".seen-{time.time_ns()}")
    if ranks.is_main:
        store.folder.mkdir(parents=True, exist_ok=True)
        (store.folder / name).touch()
    ranks.barrier()
    seen = store.folder.is_dir() and name in {path.name for path in store.folder.iterdir()}
    lost = ranks.highest([int(not seen)])[0]
    if ranks.is_main:
        (store.folder / name).unlink()
    if lost:
        raise UserError(
            f"features are to be kept in {store.folder.parent}, and not every node sees what rank 0 writes there. "
            "Accepted: run.feature_cache=DIR on storage that all nodes share, one node, or run.engine=stream."
        )


def write_missing(
    session: Session, stage: Stage, trunk: FastTrunk, store: Store, spec: dict[str, Any], index: Index, stop: Stop
) -> None:
    """One pass of the trunk over the samples without features, each rank over a part; alone, or after another run's."""
    ranks, size = session.ranks, batch_per_device(session.config, stage.res)
    with contextlib.ExitStack() as stack:
        for k in itertools.count():
            if ranks.from_main(ranks.is_main and locked(stack, store, say=k == 0)):
                break
            agree(session, stop)
            time.sleep(WAIT_S)
        if ranks.is_main:
            begin_writing(store, spec)
        gaps = ranks.from_main(ranks.is_main and store.missing())
        shares = [share(gaps, rank, ranks.world_size, segment_length(store, size)) for rank in range(ranks.world_size)]
        own, rounds, started = shares[ranks.rank], max(map(len, shares)), time.monotonic()
        chunks = [(a, min(b, a + size)) for first, b in own for a in range(first, b, size)]
        pictures = Pictures("test", stage.res, session.resize(stage.res), 0)
        requests = (make_request(index, pictures, np.arange(a, b), 0) for a, b in chunks)
        loaded = session.pictures(index, requests, stage.res)

        def made(span: Span) -> Iterator[tuple[NDArray[np.int64], list[tuple[torch.Tensor, ...]]]]:
            for _ in range(-(-(span[1] - span[0]) // size)):
                batch = next(loaded)
                views = [batch.images, batch.images.flip(-1)][: store.views]
                yield batch.samples.cpu().numpy(), [session.features(trunk, images) for images in views]

        for k in range(rounds):
            if k < len(own):
                store.write(own[k], made(own[k]))
            agree(session, stop)
            if ranks.is_main and (k + 1) * 10 // rounds > k * 10 // rounds:
                text = f"features of {index.folder.name}: {100 * (k + 1) // rounds} % written to {store.folder}"
                print(f"{text}, {time.monotonic() - started:.0f} s", flush=True)
        ranks.barrier()


def locked(stack: contextlib.ExitStack, store: Store, say: bool) -> bool:
    try:
        stack.enter_context(RunDir(store.folder).lock())
        return True
    except Locked:
        if say:
            print(f"another run is writing the features in {store.folder}; waiting for it", flush=True)
        return False


def agree(session: Session, stop: Stop) -> None:
    if number := session.ranks.highest([stop()])[0]:
        raise Stopped(number)


def segment_length(store: Store, batch: int) -> int:
    return batch * max(SEGMENT_BATCHES, math.ceil(store.samples / SEGMENTS / batch))


def share(gaps: list[Span], rank: int, world_size: int, length: int) -> list[Span]:
    """The segments that `rank` writes: its contiguous part of all missing samples, cut at gaps and after `length` samples."""
    low, high = order.rank_part(0, sum(b - a for a, b in gaps), rank, world_size)
    found, at = [], 0
    for a, b in gaps:
        first, stop = a + max(0, low - at), a + min(b - a, high - at)
        found += [(k, min(stop, k + length)) for k in range(first, stop, length)]
        at += b - a
    return found
