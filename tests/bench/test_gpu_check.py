from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.commands import ROOT, environment


def check(tmp_path: Path, *arguments: object) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON, what was said) of the check in CPU mode with the smallest settings."""
    out = tmp_path / "check.json"
    small = ["--cpu", "--repeat", "1", "--seconds", "0", "--json", str(out)]
    command = [sys.executable, "benchmarks/gpu_check.py", *small, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


def test_every_section_runs_without_a_gpu(tmp_path: Path) -> None:
    sections = ["step", "trunk", "data", "end_to_end", "memory", "apex", "cached"]
    code, result, said = check(tmp_path, "--sections", ",".join(sections))
    assert code == 0, said
    assert {"stage", "hardware", "versions", "command", "rows", "ratios", "sections"} <= set(result)
    assert list(result["sections"]) == sections
    keys = {"name", "images_per_second", "cpu_ms_per_image", "peak_memory_mib", "n"}
    assert all(set(row) == keys for row in result["rows"])
    names = " | ".join(row["name"] for row in result["rows"])
    for expected in ("original fp32", "trunk bf16 channels_last", "timm fp32", "end to end"):
        assert expected in names
    found = result["sections"]
    assert found["memory"]["largest_batch"] == 16
    assert {"amp", "fused_optimizers", "installed"} <= set(found["apex"])
    assert [entry["max"] for entry in found["data"]["difference_from_cpu"]] == [0, 0, 0]
    assert "data_wait_percent" in result["ratios"]["end_to_end"]["test_efficientnet"]


def test_a_section_that_fails_costs_only_itself(tmp_path: Path) -> None:
    code, result, said = check(tmp_path, "--data", tmp_path / "nowhere", "--sections", "data,memory")
    assert code == 1
    assert "nowhere" in result["sections"]["data"]["error"]
    assert result["sections"]["memory"]["largest_batch"] == 16
    assert "not complete: data" in said


def test_the_scaling_page_has_the_tables_of_its_script(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs/scaling.md").read_text())
    subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--page", str(page)], cwd=ROOT, check=True, capture_output=True
    )
    assert page.read_text() == (ROOT / "docs/scaling.md").read_text()
    assert sum(line.startswith("| l2@600 |") for line in page.read_text().splitlines()) == 2
