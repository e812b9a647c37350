"""The cached engine of a stage: whether it runs, and the trunk's one pass over the pictures that writes the features."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fixres_dist.base.environment import versions, writable
from fixres_dist.base.errors import UserError, unknown
from fixres_dist.base.text import decision, duration
from fixres_dist.data import backends, order
from fixres_dist.data.index import Index
from fixres_dist.data.progress import progress_bar
from fixres_dist.data.requests import make_request
from fixres_dist.models.fast_trunk import FastTrunk
from fixres_dist.models.weights import state_digest
from fixres_dist.runs.rundir import Locked, RunDir
from fixres_dist.training.cache import rule
from fixres_dist.training.cache.store import Span, Store, begin_writing, open_store, own_folder
from fixres_dist.training.session import Session, one_ahead, to_host
from fixres_dist.training.stage_session import StageSession

SEGMENT_BATCHES, SEGMENTS = 4, 512  # a segment is the larger of 4 forward passes and 1/512 of the split
WAIT_S = 2.0  # between looks at whether another run has finished writing the same features


def cache_key(work: StageSession, index: Index, views: int) -> dict[str, Any]:
    """What the features depend on. Leaves out memory format, compile and batch size: they change only rounding."""
    session, parts, res = work.session, work.parts, work.stage.res
    state, head, installed = parts.model.state_dict(), parts.head.state_dict(), versions()
    return {
        "model": session.config.model.timm_name,
        "trunk weights": state_digest({name: value for name, value in state.items() if name not in head}),
        "cut before": list(parts.tuned.modules),
        "sample list": index.fingerprint,
        "contents": index.contents,
        "views": views,
        "res": res,
        "resize": list(session.resize(res)),
        "mean and std": [list(session.spec.mean), list(session.spec.std)],
        "decoder": backends.choose(session.config.data.backend, session.ranks.device, session.spec.interpolation)[0],
        "precision": session.arithmetic.name,
        "device": session.ranks.device.type,
        "versions": {name: installed[name] for name in ("torch", "timm")},
    }


def open_stores(
    work: StageSession, resumed: bool, tell: Callable[..., None], decide_anew: bool = False
) -> StageSession:
    """`work` with the features of its train and val pictures, written where they are missing; as it is where it streams.

    Checksums of features that exist are compared. `resumed`: pictures that could not be decoded stay out. `tell`: an event of
    the run. `decide_anew`: whether it streams is no choice of the run's, since no step is taken: a later start may find more room,
    and each size needs its own. Raises Stopped, and UserError where run.engine=cached cannot be done (rule.py).
    """
    session, stage, trunk = work.session, work.stage, work.parts.trunk
    setting, ranks = session.config.run.engine, session.ranks
    rule.check(setting, stage)
    if rule.obstacle(stage) or setting == "stream" or not isinstance(trunk, FastTrunk):
        return work
    folder = rule.feature_folder(session.config)
    example = session.trunk_features(trunk, torch.zeros(1, 3, stage.res, stage.res, dtype=torch.uint8))
    stores, keys = {}, {}
    for split, index in session.splits.items():
        views = rule.VIEWS[stage.transform] if split == "train" else 1
        keys[split] = ranks.from_main(partial(cache_key, work, index, views))
        store = open_store(folder, keys[split], len(index), views, example)
        stores[split] = replace(store, folder=Path(ranks.from_main(partial(own_path, store.folder))))

    def decide() -> dict[str, Any]:
        pictures = sum(store.views * (b - a) for store in stores.values() for a, b in store.missing())
        size = sum(store.missing_bytes() for store in stores.values())
        free = min(rule.free_bytes(store.folder) for store in stores.values() if store.missing() or not size)
        need = rule.Need(pictures, size, free, folder)
        streamed = rule.streamed_pictures(stage, len(session.val), rule.evaluations(session.config))
        engine, why = rule.choose(setting, stage, streamed, need)
        return {"engine": engine, "why": why}

    if decide_anew:
        engine = (found := ranks.from_main(decide))["engine"]
        if ranks.is_main:
            print(decision(f"engine of {stage.name}", found), flush=True)
    else:
        engine = session.decided(f"engine of {stage.name} (run.engine={setting})", decide).get("engine")
    if engine not in ("cached", "stream"):
        raise unknown("engine", engine, ("cached", "stream"), "Next: remove the run's choices.json.")
    if engine == "stream" or (setting != "cached" and ranks.from_main(partial(shut, list(stores.values())))):
        return work
    for split, store in stores.items():
        check_shared(session, store)
        known = [(first, stop) for first, stop in ranks.from_main(store.segments)]
        store.verify(session.splits[split], known[ranks.rank :: ranks.world_size], again=not resumed)
        ranks.barrier()
        if ranks.from_main(store.missing):
            kept = [(first, stop) for first, stop in ranks.from_main(store.segments)]
            lost = [span for span in known if span not in kept]
            for span in lost if ranks.is_main else ():
                tell("damaged", file=str(store.path(span)), reason="it is written again")
            write_missing(work, trunk, store, keys[split], session.splits[split], lost)
    return replace(work, stores=stores)


def own_path(folder: Path) -> str:
    return str(own_folder(folder))


def shut(stores: list[Store]) -> bool:
    """Whether features are missing that nobody can write any more, though they were decided on; says so."""
    for store in stores:
        if store.missing() and not writable(store.folder):
            print(
                f"{store.folder} cannot be written to, and features are missing: pictures are streamed instead",
                flush=True,
            )
            return True
    return False


def check_shared(session: Session, store: Store) -> None:
    """Every rank reads what the others write; raises UserError where the folder is on a node's own disk."""
    ranks = session.ranks
    # Features that are complete may lie where nobody can write.
    name = ranks.from_main(lambda: f".seen-{time.time_ns()}" if writable(store.folder) else "spec.json")
    marks = ranks.is_main and name != "spec.json"
    if marks:
        store.folder.mkdir(parents=True, exist_ok=True)
        (store.folder / name).touch()
    ranks.barrier()
    seen = store.folder.is_dir() and name in {path.name for path in store.folder.iterdir()}
    lost = ranks.highest([int(not seen)])[0]
    if marks:
        (store.folder / name).unlink()
    if lost:
        raise UserError(
            f"features are to be kept in {store.folder.parent}, and not every node sees what rank 0 writes there. "
            "Accepted: run.feature_cache=DIR on storage that all nodes share, one node, or run.engine=stream."
        )


def write_missing(
    work: StageSession, trunk: FastTrunk, store: Store, key: dict[str, Any], index: Index, lost: list[Span]
) -> None:
    """One pass of the trunk over the samples without features, each rank over a part of them; complete segments stay
    where a stop signal ends it (Stopped).

    Where another run is writing the same features, wait for it and write what it has left. The segments `lost` are written
    as they were, each by one rank, in the same batches: so with the same bits.
    """
    session, size = work.session, work.batch_per_device
    ranks = session.ranks
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            if ranks.from_main(partial(locked, stack, store, say=attempt == 0)):
                break
            ranks.check_stop()
            time.sleep(WAIT_S)
        if ranks.is_main:
            begin_writing(store, key)
        gaps, again = apart(ranks.from_main(store.missing), lost)
        length, started = segment_length(store, size), time.monotonic()
        own = share(gaps, ranks.rank, ranks.world_size, store.samples, length)
        own += again[ranks.rank :: ranks.world_size]
        pictures = session.pictures_of("test", work.stage.res)
        spans = ((a, min(b, a + size)) for first, b in own for a in range(first, b, size))
        requests = (make_request(index, pictures, np.arange(a, b), 0) for a, b in spans)
        loaded = ranks.together(session.pictures(index, requests, work.stage.res), lambda: None, math.inf)

        report = stack.enter_context(progress_bar(f"features of {index.folder.name}", ranks.is_main))
        passed, total = itertools.count(1), sum(b - a for a, b in own)

        def computed(span: Span) -> Iterator[tuple[torch.Tensor, list[Callable[[], tuple[torch.Tensor, ...]]]]]:
            for _ in range(-(-(span[1] - span[0]) // size)):
                batch = next(loaded)
                views = [batch.images, batch.images.flip(-1)][: store.views]
                report(min(total, size * next(passed)), total)
                yield batch.samples, [to_host(session.trunk_features(trunk, images)) for images in views]

        for span in own:
            made = one_ahead(computed(span))
            store.write(span, ((samples.numpy(), [wait() for wait in views]) for samples, views in made))
        if ranks.is_main:
            took = duration(time.monotonic() - started)
            print(f"features of {index.folder.name} are written to {store.folder} in {took}", flush=True)
        for _ in loaded:  # nothing is left of this rank's; the others may have batches yet
            pass
        ranks.barrier()


def locked(stack: contextlib.ExitStack, store: Store, say: bool) -> bool:
    try:
        stack.enter_context(RunDir(store.folder).lock())
        return True
    except Locked:
        if say:
            print(f"another run is writing the features in {store.folder}; waiting for it", flush=True)
        return False


def segment_length(store: Store, batch: int) -> int:
    return batch * max(SEGMENT_BATCHES, math.ceil(store.samples / SEGMENTS / batch))


def apart(gaps: Sequence[Span], lost: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """(the gaps without the spans `lost`, those of `lost` that are missing)."""
    again = [span for span in lost if any(a <= span[0] and span[1] <= b for a, b in gaps)]
    rest = []
    for a, b in gaps:
        for first, stop in [*(span for span in again if a <= span[0] < b), (b, b)]:
            if first > a:
                rest.append((a, first))
            a = stop
    return rest, again


def share(gaps: list[Span], rank: int, world_size: int, samples: int, length: int) -> list[Span]:
    """The segments that `rank` writes of those that are missing, about as many samples as the others.

    They begin and end as in one pass over all `samples`, in which each rank has a contiguous part and cuts it after `length`:
    a pass that is gone on with after a stop makes the same batches. In a batch of another size the last bit may differ.
    """
    parts = (order.rank_part(0, samples, r, world_size) for r in range(world_size))
    segments = [(first, min(high, first + length)) for low, high in parts for first in range(low, high, length)]
    cut = [(max(a, first), min(b, stop)) for first, stop in segments for a, b in gaps]
    missing = [(first, stop) for first, stop in cut if first < stop]
    low, high = order.rank_part(0, sum(stop - first for first, stop in missing), rank, world_size)
    at, own = 0, []
    for first, stop in missing:
        if low <= at + (stop - first) // 2 < high:  # its middle is in this rank's part of what is missing
            own.append((first, stop))
        at += stop - first
    return own
