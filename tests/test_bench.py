from __future__ import annotations

import json
from pathlib import Path

from conftest import run

from fixres_dist import bench


def test_bench_data_has_the_promised_form(photos: Path, tmp_path: Path) -> None:
    small = ["--images", "8", "--repeat", "1", "--res", "32", "--transforms", "test", "--sources", "folder,shards"]
    out = tmp_path / "out.json"
    done = run("bench", "data", "--data", photos, *small, "--loaders", "pil,torch", "--no-scale", "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"stage", "hardware", "versions", "command", "rows", "ratios"} <= set(result)
    keys = {"name", "images_per_second", "cpu_ms_per_image", "peak_memory_mib", "n"}
    assert all(set(row) == keys and row["cpu_ms_per_image"] > 0 for row in result["rows"])
    names = [f"test 32 {source} {loader}" for source in ("folder", "shards") for loader in ("pil", "torch")]
    assert [row["name"] for row in result["rows"]] == names
    assert set(result["ratios"]["vs_pil_loader"]) == {names[1], names[3]}
    assert "test 32 shards torch" in done.stdout


def test_ratios_are_against_the_pil_loader_on_folders() -> None:
    costs = {"test 224 folder pil": 4.0, "test 224 folder torch": 2.0, "test 224 shards torch alone": 1.0}
    rows = [{"name": name, "cpu_ms_per_image": cost} for name, cost in costs.items()]
    assert bench.ratios(rows) == {"test 224 folder torch": 0.5, "test 224 shards torch alone": 0.25}
