"""Tar shards in WebDataset layout: fewer, larger files for shared file systems, with random access to each sample.

A sample is two members, `class/file.JPEG` and `class/file.cls` (its label as text); names, labels and sizes are those
of the folder it was written from. Any WebDataset reader can read the shards; any tar of such pairs can be read here.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from fixres_dist.base.commands import command, shell
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import sweep, whole, write_text
from fixres_dist.data import checksum_files, order
from fixres_dist.data.folders import modified_ns
from fixres_dist.data.headers import read_headers, same_first_bytes, within
from fixres_dist.data.index import CachedIndex, Index, may_tell, open_shard, read_cached, write_cached
from fixres_dist.data.layout import CLASSES, Place, class_names, counted
from fixres_dist.data.progress import Progress
from fixres_dist.data.tar_members import label_name, read_members

INDEX = "index.npz"  # the cached index that is written beside the shards


def write_shards(index: Index, out: Path, samples_per_shard: int, progress: Progress | None = None) -> int:
    """Write `index` as shards and their index into `out`; returns how many shards were missing. Safe to run again.

    Which sample goes into which shard is a function of the sample list alone, and a shard is there in full or not at
    all, so a second run goes on where the first one stopped. Samples are mixed over the shards, for readers that
    shuffle only within a buffer. Raises UserError where `out` holds shards of something else, or a file cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    check_labels(index)
    mark, plan = out / ".source", f"{index.fingerprint} {samples_per_shard}\n"
    if mark.exists() and mark.read_text() != plan:
        raise UserError(
            f"{out} holds shards of another data set or of another size. Next: give another --out, or remove it."
        )
    if not mark.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and was not written by this command. Next: give another --out.")
    sweep(out, age_s=0)  # of a start that was killed
    write_text(mark, plan)
    write_text(out / CLASSES, json.dumps(index.classes))
    n, made = len(index), 0
    for number, start in enumerate(range(0, n, samples_per_shard)):
        stop = min(n, start + samples_per_shard)
        shard = out / f"{number:06d}.tar"
        if not shard.exists():
            samples = order.positions_to_samples(n, 0, 0, np.arange(start, stop))
            write_tar(index, samples.tolist(), shard)
            made += 1
        if progress:
            progress(stop, n)
    tars = tuple(sorted(path.name for path in out.glob("*.tar")))
    written = within(load(Place(out, tars), out / INDEX, fresh=True), index.limits)
    if read_headers(written, np.flatnonzero(written.sizes[:, 0] == 0))[0].fingerprint != index.fingerprint:
        raise UserError(
            f"{out} does not hold the samples of {index.folder}: a file has changed since it was indexed. "
            f"Next: remove {out}, {command('data', 'index', '--data', index.folder.parent, '--fresh')}, "
            "and the same command again."
        )
    return made


def check_labels(index: Index) -> None:
    """Raises UserError for pictures of different labels whose label WebDataset has under one name, that up to the first dot."""
    labels: dict[str, tuple[int, str]] = {}
    for label, name in zip(index.labels.tolist(), index.names(), strict=True):
        other, first = labels.setdefault(label_name(name), (label, name))
        if other != label:
            raise UserError(
                f"{name!r} and {first!r} have other labels, and WebDataset has them under one name, {label_name(name)!r}. "
                "Accepted: names that differ before their first dot, or folders of their own. Next: rename them."
            )


def write_tar(index: Index, samples: list[int], shard: Path) -> None:
    with whole(shard) as part, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            try:
                data = index.read(sample).tobytes()
            except OSError as error:
                step = "the same command again" if error.errno else "--deny-list FILE, which leaves it out"
                raise UserError(
                    f"cannot read {index.where(sample)}: {error.strerror or error}. Next: {step}."
                ) from None
            name = index.name(sample)
            for member, content in ((name, data), (label_name(name), str(int(index.labels[sample])).encode())):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def load(place: Place, file: Path, progress: Progress | None = None, fresh: bool = False) -> Index:
    """The index of a split's shards: the cached `file`, the index beside the shards, or, if neither fits the shards and the
    class names, and always with `fresh`, a new one, compared with those two. Raises UserError for a shard that cannot be read,
    or has changed."""
    folder, tars = place.folder, [place.folder / name for name in place.shards]
    sizes = tuple((path.name, path.stat().st_size) for path in tars)
    written = max(modified_ns(path) or 0 for path in (*tars, folder / CLASSES))
    open_shard.cache_clear()  # a shard may have been replaced by another file
    known = {
        path: cached
        for path in (file, folder / INDEX)
        if may_tell(path, folder)
        and (cached := read_cached(path))
        and cached.index.checksums is not None
        and cached.index.places is not None  # else it is of class folders that stood here
    }
    for path, cached in {} if fresh else known.items():
        if cached.shards == sizes and (modified_ns(path) or 0) >= written:
            index = replace(cached.index, folder=folder)
            if same_first_bytes(index, np.arange(len(index))):
                return index
    for shard in tars:
        checksum_files.compare(shard)
    index = listed(folder, tars)
    index, _ = read_headers(index, np.arange(len(index)), progress)
    for path, cached in known.items():
        refuse_changed(index, dict(sizes), cached, path)
    write_cached(CachedIndex(index, shards=sizes), file)
    return index


def refuse_changed(index: Index, sizes: dict[str, int], cached: CachedIndex, source: Path) -> None:
    """Raises UserError for a shard whose images have other bytes or labels than `source` has under the same names; and, where
    the size is the same or `source` is the index of `data shard` beside it, for images that came or went."""
    now, before = by_shard(index), by_shard(replace(cached.index, folder=index.folder))
    beside = source.parent == index.folder
    for name, size in cached.shards:
        lost = beside and not (index.folder / name).exists()
        if not lost and (name not in sizes or any(now[k][name] == before[k][name] for k in (0, 1))):
            continue
        here, there = (found[0].get(name, set()) for found in (now, before))
        changed = {member[0] for member in here ^ there}
        if sizes.get(name) != size and not beside:  # written again, or appended to
            changed &= {member[0] for member in here} & {member[0] for member in there}
        if changed:
            images = "it is gone" if lost else f"{len(changed)} of its images have changed, such as {min(changed)!r}"
            raise UserError(
                f"{index.folder / name} is not what it was when {source} was written: {images}. Next: copy it again, or put "
                f"it back; or, if it was changed on purpose, {shell('rm', source)}, and the same command again."
            )


Samples = dict[str, set[tuple[str, object, int]]]


def by_shard(index: Index) -> tuple[Samples, Samples]:
    """Of each shard the names, labels and checksums of its images; with labels as numbers, and as the classes' names, since a
    new class may change either of them."""
    numbers: Samples = {name: set() for name in index.shards}
    words: Samples = {name: set() for name in index.shards}
    assert index.places is not None
    assert index.checksums is not None
    rows = zip(index.names(), index.places[:, 0].tolist(), index.labels.tolist(), index.checksums.tolist(), strict=True)
    for name, shard, label, checksum in rows:
        numbers[index.shards[shard]].add((name, label, checksum))
        words[index.shards[shard]].add((name, index.classes[label], checksum))
    return numbers, words


def listed(folder: Path, shards: list[Path]) -> Index:
    """The index as far as the tables of contents tell: without sizes and marks."""
    passed: Counter[str] = Counter()
    members = [member for number, shard in enumerate(shards) for member in read_members(shard, number, passed)]
    if passed:
        print(f"{folder}: passed over {counted(passed)}", file=sys.stderr, flush=True)
    if len({(member.directory, member.file) for member in members}) < len(members):  # each shard counts from zero
        members = [m._replace(directory=f"{shards[m.place[0]].stem}/{m.directory}".rstrip("/")) for m in members]
    words = sorted({str(member.label) for member in members})
    classes = class_names(folder) if (folder / CLASSES).is_file() else words
    if all(isinstance(member.label, int) for member in members):
        numbers = range(max((int(member.label) for member in members), default=-1) + 1)
        classes = classes if (folder / CLASSES).is_file() else list(map(str, numbers))
        if len(numbers) > len(classes):
            raise UserError(
                f"{folder} has label {numbers[-1]} and {len(classes)} classes in {CLASSES}. "
                f"Accepted: 0 to {len(classes) - 1}."
            )
    elif unknown := sorted(set(words) - set(classes)):
        raise UserError(f"{folder} has label {unknown[0]!r}, which {CLASSES} does not name. Accepted: its names.")
    else:
        number = {name: k for k, name in enumerate(classes)}
        members = [member._replace(label=number[str(member.label)]) for member in members]
    members.sort()
    names = [os.fsencode(member.name) for member in members]
    if len(set(names)) < len(names):
        raise UserError(f"a name stands twice in a shard of {folder}. Next: write them again with `data shard`.")
    return Index(
        folder,
        tuple(classes),
        b"".join(names),
        np.cumsum([len(name) for name in names], dtype=np.int64),
        labels=np.array([member.label for member in members], np.int32),
        sizes=np.zeros((len(names), 2), np.int32),
        marks=np.zeros(len(names), np.uint32),
        shards=tuple(shard.name for shard in shards),
        places=np.array([member.place for member in members], np.int64).reshape(-1, 3),
        checksums=np.zeros(len(names), np.uint32),
    )
