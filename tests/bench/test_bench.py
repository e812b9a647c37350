from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fixres_dist.base.errors import UserError
from fixres_dist.bench import feature_cache, loaders, step, turns
from fixres_dist.bench.result import Row, row_of
from fixres_dist.bench.turns import Failed, Turn
from fixres_dist.cli.bench import parse_size
from fixres_dist.cli.main import main
from fixres_dist.data import dataset, shards

Bench = Callable[..., dict[str, Any]]
ROW = {"name", "images_per_second", "cpu_ms_per_image", "peak_memory_mib", "n"}
TINY = ["--model", "test_efficientnet", "--res", "64", "--batch", "4", "--repeat", "1", "--seconds", "0"]


@pytest.fixture
def bench(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON of a `bench` command, checked for the form all stages share."""

    def measured(*arguments: object) -> dict[str, Any]:
        out = tmp_path / "out.json"
        code = main(["bench", *map(str, arguments), "--json", str(out)])  # here: torch is imported once for all stages
        said = capfd.readouterr()
        assert code == 0, said.out + said.err
        result = json.loads(out.read_text())
        assert {"stage", "hardware", "versions", "command", "rows", "ratios"} <= set(result)
        assert result["stage"] == arguments[0]
        assert {"processor", "cpus", "threads", "load_average"} <= set(result["hardware"])
        for row in result["rows"]:
            assert set(row) == ROW
            assert min(row["images_per_second"], row["peak_memory_mib"], row["n"]) > 0
            assert row["name"] in said.out
        return result

    return measured


@pytest.mark.parametrize("sharded", [False, True])
def test_data(photos: Path, tmp_path: Path, bench: Bench, sharded: bool) -> None:
    if sharded:
        shards.write_shards(dataset.load(photos, "val"), tmp_path / "shards" / "val", 1000)
    small = ["--images", "8", "--repeat", "1", "--res", "32", "--transforms", "test", "--loaders", "pil,torch"]
    result = bench("data", "--data", tmp_path / "shards" if sharded else photos, *small)
    assert [row["name"] for row in result["rows"]] == ["test 32 pil", "test 32 torch"]
    assert all(row["n"] == 8 and row["cpu_ms_per_image"] > 0 for row in result["rows"])
    assert set(result["ratios"]["vs_pil_loader"]) == {"test 32 torch"}


def test_trunk(bench: Bench) -> None:
    result = bench("trunk", *TINY)
    names = [row["name"] for row in result["rows"]]
    assert {"timm fp32 channels_last", "timm bf16 channels_last"} <= set(names)
    plain = "fp32 channels_last"  # what `auto` chooses on a processor without bf16
    assert {f"trunk {plain}", f"trunk auto ({plain})"} & set(names)
    assert sum("trunk auto (" in name for name in names) == 1
    assert set(result["ratios"]) == {"vs_timm_inference"}


def test_step(bench: Bench) -> None:
    result = bench("step", *TINY)
    speed = {row["name"]: row["images_per_second"] for row in result["rows"]}
    auto = next(name for name in speed if name.startswith("ours auto ("))
    assert result["ratios"]["vs_original"] == round(speed[auto] / speed["original fp32"], 3)
    same = "original fp32, our allocator"
    assert result["ratios"]["vs_original_our_allocator"] == round(speed[auto] / speed[same], 3)
    references = {"vs_original", "vs_original_our_allocator", "vs_full_finetune", "vs_timm_inference"}
    assert set(result["ratios"]) == references
    assert all(row["n"] == 4 for row in result["rows"])


def test_end_to_end(bench: Bench) -> None:
    result = bench("end-to-end", *TINY, "--images", "32", "--epochs", 3)
    names = [row["name"] for row in result["rows"]]
    assert names[:3] == ["data alone", "step alone", "end to end"]
    assert {"vs_slower_part", "vs_cpu_bound", "data_wait_percent"} == set(result["rows_vs"])
    assert names[3:] == ["3 epochs, stream", "3 epochs, cached"]
    assert result["ratios"]["cached_vs_streamed"] == result["cached"]["epoch_speedup"]
    assert result["cached"]["head_difference"] < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_what_it_needs(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu"]) == 2
    assert "needs a GPU" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["step", "--model", "tf_efficientnet_bo"], "Did you mean 'tf_efficientnet_b"),
        (["trunk", "--model", "resnet50.a1_in1"], "Did you mean 'a1_in1k'"),
        (["step", "--batch", "0"], "--batch is 0; accepted: 1 or more."),
        (["end-to-end", "--data", "/nope"], "no data set at /nope"),
        (["data", "--data", "/nope"], "no data set at /nope"),
        (["data", "--res", "abc"], "--res is 'abc'; accepted: whole numbers"),
        (["data", "--transforms", "tst"], "Did you mean 'test'"),
        (["data", "--loaders", "pill"], "Did you mean 'pil'"),
        (["step", "--json", "/nope/out.json"], "/nope/out.json cannot be written"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_sizes() -> None:
    assert parse_size("resnet50.a1_in1k@288x64") == ("resnet50.a1_in1k", 288, 64)
    with pytest.raises(UserError, match="MODEL@RESxBATCH"):
        parse_size("b0@320")


def test_ratios_are_against_the_pil_loader() -> None:
    costs = {"test 224 pil": 4.0, "test 224 torch": 2.0, "test 224 torch normalised": 3.0, "test 320 torch": 1.0}
    rows = [Row(name, 1.0, cost, 1.0, 1) for name, cost in costs.items()]
    assert loaders.vs_pil_loader(rows) == {"vs_pil_loader": {"test 224 torch": 0.5, "test 224 torch normalised": 0.75}}


def test_ratios_are_against_timm_at_the_same_settings() -> None:
    speed = {
        "original fp32": 10.0,
        "ours fp32 channels_last": 20.0,
        "ours auto (bf16 channels_last)": 40.0,
        "timm fp32 channels_last": 25.0,
        "timm bf16 channels_last": 50.0,
    }
    found = step.ratios({name: Row(name, value, 1.0, 1.0, 1) for name, value in speed.items()})
    assert found["vs_timm_inference"] == {"ours fp32 channels_last": 0.8, "ours auto (bf16 channels_last)": 0.8}
    assert step.of_auto(found) == {"vs_original": 4.0, "vs_timm_inference": 0.8}


def steady() -> Iterator[Turn]:
    while True:
        yield Turn(2, 0.5, 0.25, 100.0, 2)


def broken(how: str) -> Iterator[Turn]:
    yield Turn(1, 1.0, 1.0, 1.0)
    if how == "raises":
        raise RuntimeError("out of memory")
    os._exit(3)


def hanging() -> Iterator[Turn]:
    time.sleep(600)
    yield Turn(1, 1.0, 1.0, 1.0)


def test_a_variant_that_fails_costs_only_itself() -> None:
    variants = {"steady": steady, **{how: partial(broken, how) for how in ("raises", "dies")}}
    found, failed = turns.alternate(variants, 2, "test")
    assert row_of("steady", found.pop("steady")) == Row("steady", 4.0, 125.0, 100.0, 4)
    assert not found
    assert failed == {"raises": "RuntimeError: out of memory", "dies": "its process ended with exit code 3"}


def test_a_variant_that_hangs_is_given_up() -> None:
    with turns.Worker(hanging) as worker:
        with pytest.raises(Failed, match="no answer within 1 s"):
            worker.next(timeout_s=1)
        worker.process.join(10)
        assert worker.process.exitcode == -signal.SIGKILL


def test_the_difference_of_two_heads_is_relative_to_each_tensor() -> None:
    a = {"w": torch.tensor([1000.0, 1.0]), "b": torch.tensor([1e-3]), "n": torch.tensor(3)}
    b = {**a, "b": torch.tensor([1.001e-3])}
    assert feature_cache.difference(a, a) == 0
    assert feature_cache.difference(a, b) == pytest.approx(1e-3, rel=1e-3)
