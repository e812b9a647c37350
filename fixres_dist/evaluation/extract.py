"""Softmax and embeddings of every image as .npy, in the data set's order; and predictions from such files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import write_text
from fixres_dist.data.index import Index
from fixres_dist.data.requests import whole_batches
from fixres_dist.models.build import classifier_name
from fixres_dist.models.parts import Parts
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.predict import from_rows, score
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session

META = "extract.json"


@contextlib.contextmanager
def pooled(parts: Parts) -> Iterator[list[torch.Tensor]]:
    """Collects what enters the classifier, [n, channels], of every forward pass of the head while it is open."""
    found: list[torch.Tensor] = []
    classifier = parts.model.get_submodule(classifier_name(parts.model))
    hook = classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().float().flatten(1)))
    try:
        yield found
    finally:
        hook.remove()


@torch.no_grad()
def extract(live: Session, parts: Parts, split: str, out: Path, dtype: str) -> int:
    """Write softmax.npy [n, classes], embeddings.npy [n, channels], labels.npy, names.txt to `out`; returns n.

    Every rank streams its contiguous rows into the same files; batches are cut from the split, not from a rank's part, so
    the bytes are the same at any world size. `out` appears when it is whole. An image that cannot be decoded is a row of NaN.
    """
    index, ranks, res = live.splits[split], live.ranks, live.config.data.res
    parts.model.eval()
    parts.head.eval()
    part = out.with_name(f".{out.name}.part")
    with pooled(parts) as features, contextlib.ExitStack() as stack:
        nothing = torch.zeros(1, 3, res, res, dtype=torch.uint8)
        live.logits(parts, parts.head, live.inputs(parts, nothing))
        widths = {"softmax": len(live.classes), "embeddings": features.pop().shape[1]}
        if ranks.is_main:
            part.mkdir(parents=True, exist_ok=True)
            for name, width in widths.items():
                np.lib.format.open_memmap(part / f"{name}.npy", "w+", np.dtype(dtype), (len(index), width))
        ranks.barrier()
        # Written, not mapped: two nodes that map one page of a network file system overwrite each other's rows.
        files = {name: stack.enter_context(open(part / f"{name}.npy", "r+b")) for name in widths}
        starts = {name: np.lib.format.open_memmap(part / f"{name}.npy", "r").offset for name in widths}
        wrote = torch.zeros(1)
        requests = live.requests(whole_batches, index, res)
        mine, hidden = len(index) // ranks.world_size, None if ranks.is_main else True
        bar = stack.enter_context(tqdm(total=mine, desc="extracting", unit="img", leave=False, disable=hidden))
        for batch in live.batches(index, requests, res):
            logits = live.logits(parts, parts.head, live.inputs(parts, batch.images))
            for name, values in (("softmax", logits.softmax(1)), ("embeddings", features.pop())):
                write_rows(files[name], starts[name], batch, values.cpu().numpy().astype(dtype))
            rows = len(batch.labels) + len(batch.skipped)
            wrote += rows
            bar.update(rows)
    if int(ranks.total(wrote)) != len(index):
        raise RuntimeError(f"{int(wrote)} rows were written of {len(index)}")
    if ranks.is_main:
        np.save(part / "labels.npy", np.array(live.columns[split], np.int64)[index.labels])
        (part / "names.txt").write_bytes(b"".join(os.fsencode(index.name(k)) + b"\n" for k in range(len(index))))
        told = {"model": live.config.model.name, "split": split, "res": res, "sample_list": index.fingerprint}
        write_text(part / META, json.dumps(told, indent=1) + "\n")
        os.replace(part, out)
    ranks.barrier()
    return len(index)


def write_rows(file: IO[bytes], start: int, batch: Loaded, values: NDArray[Any]) -> None:
    """The rows of a request, which are consecutive samples: NaN for those that could not be decoded."""
    samples = batch.samples.numpy()
    first = min([*samples.tolist(), *(bad.sample for bad in batch.skipped)])
    rows = np.full((len(samples) + len(batch.skipped), values.shape[1]), np.nan, values.dtype)
    rows[samples - first] = values
    file.seek(start + first * rows[:1].nbytes)
    file.write(rows.tobytes())


def from_softmax(files: Sequence[Path], index: Index, columns: Sequence[int], classes: int) -> Predictions:
    """Predictions from softmax [n, classes] of the images of `index`; of several files, from their mean.

    Raises UserError for a file that is no softmax of these images: rows, classes, sample list.
    """
    n, given = len(index), [open_softmax(file, index, classes) for file in files]
    rows = torch.zeros(n, 6, dtype=torch.float64)
    rows[:, :2] = torch.tensor([1.0, -1.0])  # without a prediction, where the row is NaN
    smallest = max(float(np.finfo(a.dtype).smallest_subnormal) for a in given)
    chosen, labels = list(columns), torch.from_numpy(index.labels.astype(np.int64))
    for start in range(0, n, 4096):
        part = np.mean([a[start : start + 4096].astype(np.float64) for a in given], axis=0)
        there = ~np.isnan(part).any(1)
        if not (part[there] >= 0).all() or not np.allclose(part[there].sum(1), 1, atol=0.02):
            raise UserError(f"{files[0]} holds no softmax: its rows are not shares that add up to 1.")
        scores = torch.from_numpy(part[there][:, chosen]).clamp_min(smallest).log()
        places = start + torch.from_numpy(np.flatnonzero(there))
        rows[places] = score(scores, labels[places])
    found = from_rows(rows, index)
    return found.of_classes(columns)


def open_softmax(file: Path, index: Index, classes: int) -> NDArray[Any]:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--softmax {file} cannot be read: {error}. Accepted: softmax.npy as `extract` writes it."
        ) from None
    shape = list(getattr(values, "shape", ()))  # an .npz has none
    if shape != [len(index), classes] or values.dtype.kind != "f":
        raise UserError(
            f"--softmax {file} is {getattr(values, 'dtype', 'no array')} {shape}; {index.folder} has {len(index)} images and the model "
            f"{classes} classes. Accepted: float [{len(index)}, {classes}]. Next: python -m fixres_dist extract on this data set."
        )
    beside = file.with_name(META)
    if beside.is_file() and json.loads(beside.read_text())["sample_list"] != index.fingerprint:
        raise UserError(
            f"--softmax {file} is of other images than {index.folder}. Next: --data or --split of the extraction."
        )
    return values
