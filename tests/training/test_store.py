"""Features on disk: rows come back as they were written, and what is torn, damaged or missing is found."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import geometry
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.training.cache import rule
from fixres_dist.training.cache.build import apart, share
from fixres_dist.training.cache.store import Store, begin_writing, open_store
from fixres_dist.training.stages import Stage, stages

N = 40
PICTURES = Pictures("test_flip", 64, geometry.resize_of("fixefficientnet", 64, 0.875, "bicubic"), 7)


def made() -> Index:
    sizes, labels = np.full((N, 2), 100, np.int32), np.arange(N, dtype=np.int32) % 3
    return Index(Path("x"), ("a", "b", "c"), b"", np.zeros(N, np.int64), labels, sizes, np.zeros(N, np.uint32))


def trunk_output(dtype: torch.dtype, flip: int) -> tuple[torch.Tensor, ...]:
    """Two tensors cross the cut, as in a ResNet."""
    generator = torch.Generator().manual_seed(int(flip))
    return tuple(torch.randn(N, *shape, generator=generator).to(dtype) for shape in ((6, 3, 2), (5,)))


def written(folder: Path, dtype: torch.dtype, views: int, bad: tuple[int, ...] = ()) -> Store:
    every = [trunk_output(dtype, flip) for flip in range(views)]
    store = open_store(folder, {"key": str(dtype)}, N, views, every[0])
    begin_writing(store, {"key": str(dtype)})
    for span in ((0, 16), (16, 32), (32, N)):
        batches = []
        for first in range(span[0], span[1], 5):
            kept = np.array([s for s in range(first, min(first + 5, span[1])) if s not in bad])
            batches.append((kept, [tuple(tensor[kept] for tensor in view) for view in every]))
        store.write(span, batches)
    return store


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_by_bit_in_any_order(tmp_path: Path, dtype: torch.dtype, views: int) -> None:
    store = written(tmp_path, dtype, views)
    assert store.missing() == []
    pictures = dataclasses.replace(PICTURES, transform="test_flip" if views == 2 else "test")
    orders = [np.array([39, 0, 16, 15, 31, 32]), np.arange(N), np.array([], np.int64)]
    requests = [make_request(made(), pictures, samples, 3) for samples in orders]
    found = list(store.batches(made(), iter(requests)))
    flips = set()
    for rows, request in zip(found, requests, strict=True):
        assert rows.samples.tolist() == request.samples.tolist()
        assert rows.labels.tolist() == [s % 3 for s in request.samples]
        for k, (sample, view) in enumerate(zip(request.samples, request.views, strict=True)):
            flips.add(view.flip)
            for tensor, expected in zip(rows.images, trunk_output(dtype, view.flip), strict=True):
                assert torch.equal(tensor[k], expected[sample])
    assert len(flips) == views


def test_a_sample_without_a_picture_has_no_row(tmp_path: Path) -> None:
    store = written(tmp_path, torch.float32, 2, bad=(0, 15, 39))
    (rows,) = store.batches(made(), [make_request(made(), PICTURES, np.array([39, 14, 0, 38]), 0)])
    assert rows.samples.tolist() == [14, 38]
    assert [bad.sample for bad in rows.skipped] == [39, 0]
    view = make_request(made(), PICTURES, np.array([38]), 0).views[0]
    assert torch.equal(rows.images[1][1], trunk_output(torch.float32, view.flip)[1][38])


def test_damage_is_found_and_only_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = written(tmp_path, torch.float32, 1)
    for span, change in (((0, 16), lambda data: data[:-1]), ((32, N), lambda data: data[:99] + b"?" + data[100:])):
        path = store.path(span)
        path.write_bytes(change(path.read_bytes()))
    assert store.missing() == [(0, 16)]
    store.verify(made(), store.segments(), again=True)
    assert store.missing() == [(0, 16), (32, N)]
    said = capsys.readouterr().out
    assert "length is wrong" in said
    assert "checksum is wrong" in said
    with pytest.raises(FileNotFoundError, match="no features of the samples"):
        next(store.batches(made(), [make_request(made(), PICTURES, np.arange(3), 0)]))


def swap(a: Path, b: Path) -> None:
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


@pytest.mark.parametrize("other", ["samples", "store"])
def test_a_segment_of_other_samples_or_of_another_store_is_found(tmp_path: Path, other: str) -> None:
    """Whole segments, each with a right checksum; also on a resume, which does not look at pictures again."""
    store, foreign = written(tmp_path, torch.float16, 1), written(tmp_path, torch.bfloat16, 1)
    swap(store.path((0, 16)), store.path((16, 32)) if other == "samples" else foreign.path((0, 16)))
    store.verify(made(), store.segments(), again=False)
    assert store.missing() == ([(0, 32)] if other == "samples" else [(0, 16)])


def test_a_segment_of_an_older_version_is_read_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = written(tmp_path, torch.float32, 1)
    path = store.path((16, 32))
    rows = path.read_bytes()[:-8]
    path.write_bytes(rows + zlib.crc32(rows).to_bytes(4, "little"))
    store.verify(made(), store.segments(), again=True)
    assert store.missing() == []
    assert "1 segments are of an older version" in capsys.readouterr().out
    path.write_bytes(b"?" + path.read_bytes()[1:])
    store.verify(made(), store.segments(), again=True)
    assert store.missing() == [(16, 32)]


def test_lost_segments_are_written_as_they_were() -> None:
    assert apart([(0, 32), (40, 50)], [(0, 16), (16, 32)]) == ([(40, 50)], [(0, 16), (16, 32)])
    assert apart([(0, 32)], [(8, 16), (64, 80)]) == ([(0, 8), (16, 32)], [(8, 16)])
    assert apart([(4, 9)], []) == ([(4, 9)], [])


def test_an_interrupted_segment_is_invisible(tmp_path: Path) -> None:
    store = written(tmp_path, torch.float32, 1)
    store.path((16, 32)).unlink()

    def torn() -> Iterator[Any]:
        yield np.arange(16, 20), [tuple(tensor[16:20] for tensor in trunk_output(torch.float32, 0))]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write((16, 32), torn())
    assert store.missing() == [(16, 32)]
    begin_writing(store, {})
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".0")]


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    one, other = (open_store(tmp_path, {"res": res}, N, 1, (torch.zeros(1, 4),)).folder for res in (64, 96))
    assert one != other


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_what_is_missing(world_size: int) -> None:
    gaps = [(5, 9), (20, 47), (90, 91)]
    shares = [share(gaps, rank, world_size, 100, 6) for rank in range(world_size)]
    covered = [sample for spans in shares for first, stop in spans for sample in range(first, stop)]
    assert covered == [*range(5, 9), *range(20, 47), 90]
    assert all(0 < stop - first <= 6 for spans in shares for first, stop in spans)
    counts = [sum(stop - first for first, stop in spans) for spans in shares]
    assert all(abs(count - sum(counts) / world_size) <= 6 for count in counts), "within a segment"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_missing_after_a_stop_is_written_in_the_same_segments(world_size: int) -> None:
    """Other batches, such as one of a single picture, differ in the last bit."""
    ranks = range(world_size)
    first_pass = [share([(0, 51)], rank, world_size, 51, 16) for rank in ranks]
    counts = [sum(stop - first for first, stop in spans) for spans in first_pass]
    assert max(counts) - min(counts) <= 1
    whole = [span for spans in first_pass for span in spans]
    assert [stop - first for first, stop in whole] == {
        1: [16, 16, 16, 3],
        2: [16, 9, 16, 10],
        3: [16, 1, 16, 1, 16, 1],
    }[world_size]
    for done in ({whole[0]}, {whole[-1]}, {whole[1], whole[2]}):
        gaps: list[tuple[int, int]] = []
        for first, stop in (span for span in whole if span not in done):
            if gaps and gaps[-1][1] == first:
                gaps[-1] = gaps[-1][0], stop
            else:
                gaps.append((first, stop))
        again = [span for rank in ranks for span in share(gaps, rank, world_size, 51, 16)]
        assert again == [span for span in whole if span not in done]


def fixing(*items: str) -> Stage:
    config = reading.parse(Config, reading.overrides(["data.train_transform=test", *items]))
    return stages(config, 1000)[-1]


ROOM, NONE = (rule.Need(1100, 100, free, Path("/f")) for free in (1000, 50))


@pytest.mark.parametrize(
    ("items", "need", "chosen", "why"),
    [
        (["tune.epochs=11"], ROOM, "cached", "1,100 pictures through the trunk instead of 12,200"),
        (["tune.epochs=1", "tune.bn_stats_images=1000"], ROOM, "cached", "instead of 2,200"),
        (["tune.epochs=1", "tune.bn_stats_images=10"], ROOM, "stream", "would save too little"),
        (["tune.epochs=1", "tune.bn_stats_images=10"], dataclasses.replace(ROOM, pictures=0), "cached", "0 pictures"),
        (["tune.epochs=11"], NONE, "stream", "no room"),
        (["tune.epochs=11", "data.train_transform=test_aug"], ROOM, "stream", "draws new pictures every epoch"),
        (["tune.epochs=11", "tune.policy=all"], ROOM, "stream", "no frozen trunk"),
    ],
)
def test_auto_chooses_and_says_why(items: list[str], need: rule.Need, chosen: str, why: str) -> None:
    stage = fixing(*items)
    found = rule.choose("auto", stage, rule.streamed_pictures(stage, 100, 2), need)
    assert found[0] == chosen
    assert why in found[1]
    assert rule.choose("stream", stage, 10**6, need)[0] == "stream"


@pytest.mark.parametrize(
    ("items", "need", "words"),
    [
        (["data.train_transform=test_aug"], ROOM, ["test_aug", "test or test_flip", "run.engine=stream"]),
        (["tune.policy=all"], ROOM, ["policy all", "run.engine=stream"]),
        ([], NONE, ["0.0 MiB in /f", "run.feature_cache=DIR", "tune.policy=classifier", "run.engine=stream"]),
    ],
)
def test_cached_is_refused_with_what_would_work(items: list[str], need: rule.Need, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        rule.choose("cached", fixing(*items), 10**6, need)
    for word in words:
        assert word in str(caught.value)
