"""Damaged files: seeded damage to checkpoints, index files, feature segments, tar shards, partial passes, exports and .pth files,
and what the readers make of it.

    python benchmarks/fuzz_files.py --count checkpoints=2000,indexes=1000,segments=1000,tars=1000

Each file is `right` (read, and equal to what was written), `rebuilt` (found damaged, and made again or taken from the one
before) or `refused` (by name). `wrong` (read, and not equal) and `traceback` have to be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged
from fixres_dist.data import dataset, shards
from fixres_dist.data.index import CachedIndex, Index, read_cached, write_cached
from fixres_dist.models import tensor_files
from fixres_dist.models.weights import read_state
from fixres_dist.runs import checkpoint, restoring
from fixres_dist.training.cache.store import Store, begin_writing, open_store
from fixres_dist.training.partial import Partial

Case = Callable[[random.Random, Path], str]
COUNTS = {
    "checkpoints": 2000,
    "indexes": 1000,
    "segments": 1000,
    "tars": 1000,
    "partials": 1000,
    "exports": 1000,
    "pth": 1000,
}


def damage(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to three changes: bits, bytes, runs of zeros or noise, pieces cut out, moved, repeated, of another file, or its end."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(len(data) + 1), rng.choice((1, 4, 64, 512, 4096))
        piece, kind = data[at : at + length], rng.randrange(9)
        if kind < 3 and piece:  # one bit, the commonest
            new = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:]
        elif kind == 3:
            new = bytes(len(piece))
        elif kind == 4:
            new = rng.randbytes(len(piece))
        elif kind == 5:
            new = piece + piece
        elif kind == 6:
            new = b""
        elif kind == 7:
            other = rng.choice(others)
            new = other[at : at + len(piece)]
        else:
            data, new = data[:at], b""
        data = data[:at] + new + data[at + len(piece) :]
    return rng.choice(others) if rng.random() < 0.05 else data


def change(rng: random.Random, files: list[Path], others: list[Path]) -> bool:
    """Damage one of `files` in place, or delete it; False where it is as it was. Its time stamp stays, as a disk leaves it."""
    file = rng.choice(files)
    data, stamp = file.read_bytes(), file.stat().st_mtime_ns
    new = damage(rng, data, [other.read_bytes() for other in others])
    file.write_bytes(new)
    os.utime(file, ns=(stamp, stamp))
    return new != data


def checkpoints(scratch: Path) -> Case:
    """Two, of which the newer is damaged: it, or the older one, has to be what is restored."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, tuple[str, ...]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        return model, torch.optim.SGD(model.parameters(), 0.1, 0.9), tuple(model.state_dict())

    made, source = fresh(), scratch / "source"
    model, optimizer, names = made
    seen: dict[int, list[torch.Tensor]] = {}
    for step in (3, 5):
        model(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        tensors = checkpoint.Tensors.of(model, names, optimizer)
        checkpoint.write(source, tensors, checkpoint.Progress(step, "fix", seconds=1.5), {"stage": "fix"})
        seen[step] = [*tensors.head.values(), *tensors.optimizer.values()]

    def case(rng: random.Random, folder: Path) -> str:
        shutil.copytree(source, folder)
        newest, older = folder / "step_00000005", folder / "step_00000003"
        change(rng, sorted(newest.iterdir()), [*older.iterdir(), *newest.iterdir()])
        if rng.random() < 0.05:
            rng.choice(sorted(newest.iterdir())).unlink()
        checkpoint.put_damaged_aside(folder, lambda error: None)
        other, second, _ = fresh()
        progress, _ = restoring.resume(folder, checkpoint.Progress(0, "fix"), other, names, second, {"stage": "fix"})
        found = checkpoint.Tensors.of(other, names, second)
        equal = map(torch.equal, seen[progress.step], [*found.head.values(), *found.optimizer.values()])
        if not all(equal) or progress != checkpoint.Progress(progress.step, "fix", seconds=1.5):
            return "wrong"
        return "right" if progress.step == 5 else "rebuilt"

    return case


def same(a: Index, b: Index) -> bool:
    return (a.fingerprint, a.contents) == (b.fingerprint, b.contents)


def split(n: int) -> Index:
    rng = np.random.default_rng(0)
    names = [f"{'abc'[k % 3]}/{k:04d}.jpg" for k in range(n)]
    ends, sizes = np.cumsum([len(name) for name in names]), rng.integers(50, 500, (n, 2)).astype(np.int32)
    labels, marks = (np.arange(n) % 3).astype(np.int32), rng.integers(0, 2**32, n).astype(np.uint32)
    return Index(Path("x"), ("a", "b", "c"), "".join(names).encode(), ends, labels, sizes, marks)


def indexes(scratch: Path) -> Case:
    """None is what the caller reads as `make it again`."""
    whole, source, other = (
        CachedIndex(split(90), (("a", 7, 90),), 9, passed={}),
        scratch / "index.npz",
        scratch / "other.npz",
    )
    write_cached(whole, source)
    write_cached(CachedIndex(split(40), (("a", 7, 40),), 9, passed={}), other)

    def case(rng: random.Random, folder: Path) -> str:
        folder.mkdir()
        file = folder / "index.npz"
        file.write_bytes(damage(rng, source.read_bytes(), [source.read_bytes()]))
        found = read_cached(file)
        if found is None:
            return "rebuilt"
        return "right" if same(found.index, whole.index) and found.directories == whole.directories else "wrong"

    return case


def segments(scratch: Path) -> Case:
    samples, example = 48, torch.randn(48, 6, 2, 2, generator=torch.Generator().manual_seed(1))

    def written(key: str) -> Store:
        store = open_store(scratch, {"key": key}, samples, 1, (example,))
        begin_writing(store, {"key": key})
        for a in range(0, samples, 16):
            store.write((a, a + 16), [(np.arange(a, a + 16), [(example[a : a + 16],)])])
        return store

    source, foreign, index = written("one"), written("other"), split(samples)
    good = {file.name: file.read_bytes() for file in source.folder.glob("*.rows")}

    def case(rng: random.Random, folder: Path) -> str:
        shutil.copytree(source.folder, folder / source.folder.name)
        store = open_store(folder, {"key": "one"}, samples, 1, (example,))
        files = sorted(store.folder.glob("*.rows"))
        change(rng, files, [*files, *foreign.folder.glob("*.rows")])
        store.verify(index, store.segments(), again=False)
        left = {file.name: file.read_bytes() for file in store.folder.glob("*.rows")}
        rows = {name: data[:-8] for name, data in left.items()}
        if any(good[name][:-8] != data for name, data in rows.items()):
            return "wrong"
        return "right" if len(left) == len(good) else "rebuilt"

    return case


def tars(scratch: Path) -> Case:
    """A shard that was indexed before, beside its index or beside a list of checksums; time stamps are as they were (a disk)
    or new (a copy)."""
    rng = np.random.default_rng(0)
    for k in range(12):
        (scratch / "data" / "val" / f"class_{k % 3}").mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (24, 30, 3), dtype=np.uint8))
        picture.save(scratch / "data" / "val" / f"class_{k % 3}" / f"{k:02d}.png")
    reference = dataset.load(scratch / "data", "val", str(scratch / "cache"), show=False)
    shards.write_shards(reference, scratch / "val", 6)
    pictures = [reference.read(k).tobytes() for k in range(len(reference))]

    def case(rng: random.Random, folder: Path) -> str:
        shutil.copytree(scratch / "val", folder / "val")
        files = sorted((folder / "val").glob("*.tar"))
        known = rng.choice(("beside", "cache", "list"))
        if known != "beside":
            (folder / "val" / shards.INDEX).unlink()
        if known == "cache":
            dataset.load(folder, "val", str(folder / "cache"), show=False)
        if known == "list":
            lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
            (folder / "val" / "SHA256SUMS").write_text("".join(lines))
        changed = change(rng, files, files)
        if rng.random() < 0.5:
            for file in files:
                os.utime(file)
        index = dataset.load(folder, "val", str(folder / "cache"), show=False)
        for k in range(len(index)):
            with contextlib.suppress(OSError):  # as a picture that cannot be decoded, by name
                if index.read(k).tobytes() != pictures[k]:
                    return "wrong"
                continue
            return "refused"
        if not same(index, reference):
            return "wrong"
        return "rebuilt" if changed else "right"

    return case


def partials(scratch: Path) -> Case:
    """Of a pass: rows that were kept, or none."""
    whole = Partial(scratch / "0.npz", "key", 1.0)
    whole.write(rows := np.random.default_rng(0).random((40, 6)))
    other = Partial(scratch / "1.npz", "another key", 1.0)
    other.write(rows + 1)

    def case(rng: random.Random, folder: Path) -> str:
        folder.mkdir()
        shutil.copy(other.path if rng.random() < 0.2 else whole.path, folder / "0.npz")
        change(rng, [folder / "0.npz"], [whole.path, other.path])
        found = replace(whole, path=folder / "0.npz").read()
        if found is None:
            return "rebuilt"
        return "right" if np.array_equal(found, rows) else "wrong"

    return case


def weights_files(scratch: Path, name: str, write: Callable[[dict[str, torch.Tensor], Path], object]) -> Case:
    generator = torch.Generator().manual_seed(0)
    state = {f"layer{k}.weight": torch.randn(40, 8, generator=generator) for k in range(4)}
    write(state, scratch / name)

    def case(rng: random.Random, folder: Path) -> str:
        folder.mkdir()
        shutil.copy(scratch / name, folder)
        change(rng, [folder / name], [scratch / name])
        found = read_state(folder / name)
        same_values = found.keys() == state.keys() and all(map(torch.equal, found.values(), state.values()))
        return "right" if same_values else "wrong"

    return case


def exports(scratch: Path) -> Case:
    return weights_files(scratch, "model.safetensors", lambda state, file: tensor_files.save(file, state))


def pth(scratch: Path) -> Case:
    return weights_files(scratch, "model.pth", torch.save)


KINDS: dict[str, Callable[[Path], Case]] = {
    "partials": partials,
    "exports": exports,
    "pth": pth,
    "checkpoints": checkpoints,
    "indexes": indexes,
    "segments": segments,
    "tars": tars,
}


def fuzz(kind: str, count: int, seed: int = 0) -> Counter[str]:
    """How many of `count` damaged files had which end."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nothing:
        (Path(scratch) / "made").mkdir()
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            case = KINDS[kind](Path(scratch) / "made")
        for k in range(count):
            folder = Path(scratch) / str(k)
            try:
                with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                    end = case(random.Random(f"{kind} {seed} {k}"), folder)
            except (Damaged, UserError):
                end = "refused"
            except Exception:
                end = "traceback"
                traceback.print_exc()
            if end in ("wrong", "traceback"):
                print(f"{kind}, seed {seed}, case {k}: {end}", file=sys.stderr)
            found[end] += 1
            shutil.rmtree(folder, ignore_errors=True)
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", default=",".join(f"{kind}={n}" for kind, n in COUNTS.items()), metavar="KIND=N,...")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    bad = 0
    for kind, count in (part.split("=") for part in args.count.split(",")):
        found = fuzz(kind, int(count), args.seed)
        print(f"{kind}: {', '.join(f'{n} {end}' for end, n in sorted(found.items()))}", flush=True)
        bad += found["wrong"] + found["traceback"]
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
