"""Tar shards: the same samples as the folder they come from, written once whatever interrupts, refused when torn."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import pictures as p

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Data
from fixres_dist.data import dataset, index, order, shards, tar_members
from fixres_dist.data.index import Index
from fixres_dist.data.requests import every_sample, make_request, train_steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 small images in 3 classes, one with a name that is no UTF-8, one that a plain tar header cannot hold."""
    root = tmp_path_factory.mktemp("hundred")
    for i in range(101):
        folder = root / "val" / f"class_{i % 3}" / ("deep" if i % 7 == 0 else "")
        folder.mkdir(parents=True, exist_ok=True)
        name = os.fsdecode(
            {5: b"caf\xe9.jpg", 6: b"n" * 240 + b".jpg", 8: b"a.b.jpg", 11: b"a.c.jpg"}.get(i, b"%03d.jpg" % i)
        )
        (folder / name).write_bytes(p.encode(p.photograph(40 + i % 30, 60 - i % 20, i)))
    return root


@pytest.fixture
def sharded(data: Path, tmp_path: Path) -> Path:
    shards.write_shards(dataset.load(data, "val"), tmp_path / "val", 30)
    return tmp_path


def test_the_same_samples_from_folder_and_shards(data: Path, sharded: Path) -> None:
    a, b = dataset.load(data, "val"), dataset.load(sharded, "val")
    assert [path.name for path in sorted((sharded / "val").glob("*.tar"))] == [f"00000{k}.tar" for k in range(4)]
    assert (a.classes, a.text, a.labels.tolist(), a.sizes.tolist()) == (
        b.classes,
        b.text,
        b.labels.tolist(),
        b.sizes.tolist(),
    )
    assert (a.fingerprint, a.contents) == (b.fingerprint, b.contents)
    assert all(np.array_equal(a.read(i), b.read(i)) for i in range(101))


@p.both_backends
def test_the_same_pictures_from_folder_and_shards(data: Path, sharded: Path, backend: p.Backend) -> None:
    a, b = dataset.load(data, "val"), dataset.load(sharded, "val")
    pictures = p.pictures_of("test_aug", 32, "fixres")
    request = make_request(a, pictures, np.arange(101), 4)
    assert torch.equal(backend(a, [request], pictures)[0].images, backend(b, [request], pictures)[0].images)


def test_without_our_index_the_tars_are_read(data: Path, sharded: Path, tmp_path: Path) -> None:
    (sharded / "val" / shards.INDEX).unlink()
    assert dataset.load(sharded, "val", str(tmp_path / "cache")).fingerprint == dataset.load(data, "val").fingerprint
    assert all(dataset.survey(root, "val", Data()).images == 101 for root in (sharded, data))


def test_writing_goes_on_where_it_was_stopped(data: Path, tmp_path: Path) -> None:
    samples, out = dataset.load(data, "val"), tmp_path / "val"

    def stop_at(done: int, total: int) -> None:
        if done == 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(samples, out, 30, stop_at)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(before) == 2
    assert shards.write_shards(samples, out, 30) == 2
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert shards.write_shards(samples, out, 30) == 0
    assert dataset.load(tmp_path, "val").fingerprint == samples.fingerprint


def test_another_data_set_or_size_is_not_mixed_in(data: Path, sharded: Path) -> None:
    samples = dataset.load(data, "val")
    with pytest.raises(UserError, match="another data set or of another size"):
        shards.write_shards(samples, sharded / "val", 31)
    with pytest.raises(UserError, match="not empty"):
        shards.write_shards(samples, data / "val", 30)


@pytest.mark.parametrize("after", ["half of it", "its last member"])
def test_a_torn_shard_is_named(sharded: Path, after: str) -> None:
    shard = sharded / "val" / "000002.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    os.truncate(shard, shard.stat().st_size // 2 if after == "half of it" else last.offset_data + 512)
    with pytest.raises(UserError, match=r"000002\.tar is torn.*data shard"):
        dataset.load(sharded, "val")


@p.both_backends
def test_a_shard_torn_during_the_run_costs_its_lost_samples_only(sharded: Path, backend: p.Backend) -> None:
    samples = dataset.load(sharded, "val")
    assert samples.places is not None
    shard = sharded / "val" / "000001.tar"
    with open(shard, "rb+") as file:
        file.truncate(shard.stat().st_size // 2)
    index.open_shard.cache_clear()
    lost = [
        i
        for i, (number, offset, size) in enumerate(samples.places.tolist())
        if number == 1 and offset + size > shard.stat().st_size
    ]
    assert lost
    batch = p.one_batch(backend, samples, list(range(101)), "test", 32, "fixres")
    assert [bad.sample for bad in batch.skipped] == lost
    assert "the shard ends" in batch.skipped[0].reason


def member(name: str, content: bytes = b"0", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, io.BytesIO]:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type, entry.linkname = (len(content) if kind == tarfile.REGTYPE else 0), kind, "/etc/passwd"
    return entry, io.BytesIO(content)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (member("../../outside.jpg"), "points outside"),
        (member("/etc/outside.jpg"), "points outside"),
        (member("class_0/link.jpg", kind=tarfile.SYMTYPE), "a link, device or sparse file"),
        (member("class_0/lonely.jpg"), "without its label"),
        (member("class_0/x.cls", b"seven"), "are numbers for some pictures"),
        (member("class_0/x.cls", b"-1"), "holds label -1 in 'class_0/x.cls'"),
        (member("class_0/x.cls", b"99999999999"), "holds label 99999999999"),
    ],
)
def test_tar_members_that_are_refused(tmp_path: Path, odd: tuple[tarfile.TarInfo, io.BytesIO], words: str) -> None:
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "0.tar", "w") as tar:
        tar.addfile(*member("class_0/a.jpg", p.encode(p.photograph(20, 20, 0))))
        tar.addfile(*member("class_0/a.cls"))
        tar.addfile(*odd)
    with pytest.raises(UserError, match=words):
        dataset.load(tmp_path, "val", str(tmp_path / "cache"))


@pytest.mark.parametrize("text", ["[1, 2]", "7", "[", '"ash"'])
def test_class_names_that_are_no_list_are_refused(sharded: Path, text: str) -> None:
    (sharded / "val" / shards.CLASSES).write_text(text)
    with pytest.raises(UserError, match=r"classes\.json is no list of class names"):
        dataset.load(sharded, "val")


def test_an_unreadable_shard_is_not_called_torn(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards.tarfile, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*000000\.tar: Permission denied"):
        dataset.load(sharded, "val", fresh=True)


def test_a_shard_or_class_names_written_later_are_read_anew(sharded: Path, tmp_path: Path) -> None:
    """Tars are padded to 10 KB, so another one is easily of the same size."""
    first = dataset.load(sharded, "val")
    shard, beside = sharded / "val" / "000003.tar", sharded / "val" / shards.INDEX
    with tarfile.open(shard) as tar:
        entries = [(entry, tar.extractfile(entry).read()) for entry in tar.getmembers()]  # type: ignore[union-attr]
    size = shard.stat().st_size
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in (*entries[2:], *entries[:2]):
            tar.addfile(entry, io.BytesIO(data))
    assert shard.stat().st_size == size
    os.utime(shard, ns=(beside.stat().st_mtime_ns + 1,) * 2)
    again = dataset.load(sharded, "val", str(tmp_path / "cache"))
    assert (again.fingerprint, again.contents) == (first.fingerprint, first.contents)
    assert again.places.tolist() != first.places.tolist()  # type: ignore[union-attr]
    assert all(
        np.array_equal(again.read(k), first.read(k)) == (again.places[k] == first.places[k]).all() for k in range(101)
    )  # type: ignore[index]
    kept = index.cache_file(sharded / "val", tmp_path / "cache")
    (sharded / "val" / shards.CLASSES).write_text('["x", "y", "z"]')
    os.utime(sharded / "val" / shards.CLASSES, ns=(kept.stat().st_mtime_ns + 1,) * 2)
    assert dataset.load(sharded, "val", str(tmp_path / "cache")).classes == ("x", "y", "z")


def test_names_of_other_writers(tmp_path: Path) -> None:
    """`tar -C folder .` writes ./class/file; a file name may begin with dots."""
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "0.tar", "w") as tar:
        for number, name in enumerate(("./a/x.jpg", "./a/.y.b.jpg", "b/..jpg", "b/z")):
            if name != "b/z":
                tar.addfile(*member(name, p.encode(p.photograph(20, 20, 0))))
            tar.addfile(*member(tar_members.label_name(name), str(number // 2).encode()))
    found = dataset.load(tmp_path, "val", str(tmp_path / "cache"))
    assert [found.name(k) for k in range(len(found))] == ["a/.y.b.jpg", "a/x.jpg", "b/..jpg"]
    assert found.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("a/x.b.jpg", "a/x.cls"),
        ("a.d/x.jpg", "a.d/x.cls"),
        (".x.jpg", ".x.cls"),
        ("..jpg", "..jpg.cls"),
        (".jpg", ".jpg.cls"),
    ],
)
def test_names_of_label_files(name: str, label: str) -> None:
    assert tar_members.label_name(name) == label


def test_a_tar_beside_class_folders_is_not_the_data_set(data: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(data, tmp_path / "copy"))
    (root / "val" / "n01440764.tar").write_bytes(b"as ImageNet's extraction leaves it")
    assert dataset.load(root, "val").fingerprint == dataset.load(data, "val").fingerprint


def test_what_a_killed_start_left_is_removed(data: Path, tmp_path: Path) -> None:
    samples, out = dataset.load(data, "val"), tmp_path / "val"
    shards.write_shards(samples, out, 60)
    (out / ".000001.tar.4711").write_bytes(b"half")
    assert shards.write_shards(samples, out, 60) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        ".source",
        "000000.tar",
        "000001.tar",
        shards.CLASSES,
        shards.INDEX,
    ]


def steps_seen(backend: p.Backend, samples: Index, first: int, world: int, transform: str) -> list[tuple[object, ...]]:
    """(step, sample, view) of every rank from step `first` on, with the pictures' sums: what training would be fed."""
    pictures = p.pictures_of(transform, 32, "fixres", 9)
    seen: list[tuple[object, ...]] = []
    for rank in range(world):
        steps = list(train_steps(samples, pictures, 20, 6, first, 9, rank, world))
        requests = [request for step in steps for request in step]
        batches = iter(backend(samples, requests, pictures))
        for number, step in enumerate(steps):
            for request in step:
                batch = next(batches)
                assert batch.samples.tolist() == request.samples.tolist()
                sums = batch.images.sum((1, 2, 3)).tolist()
                seen += zip(
                    [first + number] * len(sums),
                    batch.samples.tolist(),
                    map(tuple, (v.record() for v in request.views)),
                    sums,
                    strict=True,
                )
    return sorted(seen)  # type: ignore[type-var]


@p.both_backends
def test_any_resume_world_size_and_source_sees_the_same(data: Path, sharded: Path, backend: p.Backend) -> None:
    """9 steps of 20 over 101 samples: past the end of the first epoch, whose last step has one sample."""
    folder = dataset.load(data, "val")
    whole = steps_seen(backend, folder, 0, 1, "test_aug")
    assert sorted(sample for step, sample, *_ in whole if step < 6) == list(range(101))  # type: ignore[operator,type-var]
    for first, world, split in ((0, 2, sharded), (1, 3, data), (4, 7, sharded), (5, 1, sharded), (8, 2, data)):
        resumed = steps_seen(backend, dataset.load(split, "val"), first, world, "test_aug")
        assert resumed == [row for row in whole if row[0] >= first]


@p.both_backends
def test_evaluation_sees_101_files_on_3_ranks_once_each(data: Path, backend: p.Backend) -> None:
    samples = dataset.load(data, "val")
    pictures = p.pictures_of("test", 32, "fixres")
    seen: list[int] = []
    for rank in range(3):
        requests = list(every_sample(samples, pictures, 8, rank, 3))
        seen += [s for batch in backend(samples, requests, pictures) for s in batch.samples.tolist()]
    assert seen == list(range(101))


def test_a_late_step_costs_no_more_than_the_first() -> None:
    """Work is counted, not timed: positions asked for, whatever the step."""
    asked: list[int] = []
    real = order.positions_to_samples

    def counted(n: int, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        asked.append(len(positions))
        return real(n, seed, epoch, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "positions_to_samples", counted)
        for step in (0, 4000):
            order.train_draws(10**9, 0, step, 512, 3, 8)
    assert asked == [64, 64]


def test_a_shard_stays_open_while_it_is_read(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other threads do to the cache of open shards: here it keeps nothing at all."""
    samples = dataset.load(sharded, "val")
    wanted = [samples.read(k) for k in range(101)]
    monkeypatch.setattr(index, "open_shard", lambda path: io.FileIO(path))
    assert all(np.array_equal(samples.read(k), wanted[k]) for k in range(101))
