"""Softmax and embeddings of every image as .npy, in the data set's order; and predictions from softmax files."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import named, publish
from fixres_dist.base.small_files import Damaged, read_json, write_json
from fixres_dist.data.index import Index
from fixres_dist.data.progress import progress_bar
from fixres_dist.data.requests import whole_batches
from fixres_dist.models.parts import Parts, classifier_inputs
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.partial import Partial, unseen
from fixres_dist.training.predict import from_rows, score
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session, one_ahead, to_host

META = "extract.json"


@torch.no_grad()
def extract(session: Session, parts: Parts, split: str, out: Path, dtype: str) -> int:
    """Write softmax.npy [n, classes], embeddings.npy [n, channels], labels.npy [n] and names.txt to `out`; returns n.

    Rows are in the order of the split's index; an image that cannot be decoded is a row of NaN. Every rank writes its rows
    into the same files. Batches are cut from the split, not from a rank's part of it, so the bytes are the same at any
    world size. `out` appears when it is complete. In a job, rows that an earlier start has written are kept.
    """
    index, ranks, res = session.splits[split], session.ranks, session.config.data.res
    parts.model.eval()
    parts.head.eval()
    unfinished = out.with_name(f".{out.name}.part")
    with named(out), classifier_inputs(parts) as embeddings, contextlib.ExitStack() as stack:
        blank = torch.zeros(1, 3, res, res, dtype=torch.uint8)
        session.logits(parts, parts.head, session.inputs(parts, blank))
        widths = {"softmax": len(session.classes), "embeddings": embeddings.pop().shape[1]}
        partial = session.partial([parts], res, split, dtype, str(out))
        done = ranks.from_main(lambda: begin(unfinished, widths, np.dtype(dtype), len(index), partial))
        # Written, not mapped: two nodes that map one page of a network file system overwrite each other's rows.
        files = {name: stack.enter_context(open(unfinished / f"{name}.npy", "r+b")) for name in widths}
        starts = {name: np.lib.format.open_memmap(unfinished / f"{name}.npy", "r").offset for name in widths}
        seen = torch.from_numpy(
            done if ranks.is_main else np.zeros_like(done)
        )  # rows, of which rank 0 counts the kept ones

        def keep() -> torch.Tensor:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            everywhere = ranks.total(seen.clone())
            if partial and ranks.is_main:
                partial.write(everywhere.numpy())
            return everywhere

        requests = unseen(session.requests(whole_batches, index, res), done > 0)
        every_s = partial.every_s if partial else math.inf
        batches = ranks.together(session.batches(index, requests, res), keep, every_s)
        report = stack.enter_context(progress_bar("extracting", ranks.is_main))
        logits = ((b, session.logits(parts, parts.head, session.inputs(parts, b.images))) for b in batches)
        computed = ((batch, to_host((values.softmax(1), embeddings.pop()))) for batch, values in logits)
        for batch, wait in one_ahead(computed):
            for name, values in zip(widths, wait(), strict=True):
                write_rows(files[name], starts[name], batch, values.numpy().astype(dtype))
            seen[batch.samples] += 1
            seen[[bad.sample for bad in batch.skipped]] += 1
            report(int(seen.sum()), len(index) // ranks.world_size)
        written = keep()
    if not bool((written == 1).all()):
        raise RuntimeError(f"{int(written.sum())} rows were written of {len(index)}, each should be written once")
    if ranks.is_main:
        np.save(unfinished / "labels.npy", np.array(session.columns[split], np.int64)[index.labels])
        (unfinished / "names.txt").write_bytes(b"".join(os.fsencode(index.name(k)) + b"\n" for k in range(len(index))))
        meta = {"model": session.config.model.name, "split": split, "res": res, "sample_list": index.fingerprint}
        write_json(unfinished / META, meta)
        publish(unfinished, out)
    session.passed()
    ranks.barrier()
    return len(index)


def begin(
    unfinished: Path, widths: Mapping[str, int], dtype: np.dtype[Any], n: int, partial: Partial | None
) -> NDArray[np.float64]:  # fmt: skip
    """Make the files of `n` rows, or go on with those of an earlier start; returns [n]: 1 where a row is written."""
    kept = partial.read() if partial else None
    if kept is not None and all((unfinished / f"{name}.npy").is_file() for name in widths):
        print(f"{int(kept.sum())} of {n} rows are written already", flush=True)
        return kept
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, width in widths.items():
        np.lib.format.open_memmap(unfinished / f"{name}.npy", "w+", dtype, (n, width))
    return np.zeros(n)


def write_rows(file: IO[bytes], start: int, batch: Loaded, values: NDArray[Any]) -> None:
    """Write a batch of consecutive samples, NaN for skipped ones, into a .npy file whose data begin at `start`."""
    samples = batch.samples.numpy()
    first = min([*samples.tolist(), *(bad.sample for bad in batch.skipped)])
    rows = np.full((len(samples) + len(batch.skipped), values.shape[1]), np.nan, values.dtype)
    rows[samples - first] = values
    file.seek(start + first * rows[:1].nbytes)
    file.write(rows.tobytes())


def from_softmax(files: Sequence[Path], index: Index, columns: Sequence[int], classes: int) -> Predictions:
    """Predictions from softmax.npy [n, classes] that `extract` wrote; from several such files, of their mean.

    `columns`: the model's class of each folder of `index`. A row of NaN is an image without a prediction. Raises
    UserError for a file of other images or classes.
    """
    mean = torch.from_numpy(np.mean([read_softmax(file, index, classes) for file in files], axis=0, dtype=np.float64))
    decoded, labels = ~mean.isnan().any(1), torch.from_numpy(index.labels.astype(np.int64))
    rows = torch.zeros(len(index), 6, dtype=torch.float64)
    rows[:, :2] = torch.tensor([1.0, -1.0])
    rows[decoded] = score(mean[decoded][:, list(columns)].log(), labels[decoded])
    return from_rows(rows, index).of_classes(columns)


def read_softmax(file: Path, index: Index, classes: int) -> NDArray[np.floating]:
    accepted = f"Accepted: softmax.npy of `{command('extract')}`"
    try:
        values: NDArray[np.floating] = np.load(file, allow_pickle=False)
        meta = read_json(file.with_name(META), dict[str, Any], "")
    except (OSError, ValueError, EOFError, Damaged) as error:
        raise UserError(f"--softmax {file} cannot be read: {error}. {accepted}, with {META} beside it.") from None
    if meta.get("sample_list") != index.fingerprint or values.shape != (len(index), classes):
        raise UserError(
            f"--softmax {file} is {list(values.shape)} of split {meta.get('split')!r}, of other images or classes than "
            f"{index.folder} and its model: [{len(index)}, {classes}]. {accepted} on the same files of one data set."
        )
    # In float16 a small share is 0, whose logarithm would be infinite.
    return values.clip(np.finfo(values.dtype).smallest_subnormal)
