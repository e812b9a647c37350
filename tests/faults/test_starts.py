"""What the starts of one run are made of: other pictures or another release of timm are refused until they are accepted,
other code and other libraries are told, and each start's snapshot stays."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.folders import write_photos
from support.in_process import called

from fixres_dist.base.errors import EXIT_DONE, EXIT_USER
from fixres_dist.base.small_files import read_json, read_lines, write_json
from fixres_dist.data import dataset, decoding
from fixres_dist.runs import snapshots
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.starts import Start, changes

START = Start("c0de", {"python": "3.11.2", "timm": "1.0.20", "torch": "2.11.0"}, {"train": "a", "val": "b"})


@pytest.mark.parametrize(
    ("now", "refused", "told"),
    [
        (START, [], []),
        (replace(START, code="beef"), [], ["the code was c0de and is beef"]),
        (replace(START, versions=START.versions | {"torch": "3.0"}), [], ["torch was 2.11.0 and is 3.0"]),
        (replace(START, versions=START.versions | {"timm": "1.0.31"}), [], ["timm was 1.0.20 and is 1.0.31"]),
        (replace(START, versions=START.versions | {"timm": "1.1.0"}), ["timm was 1.0.20 and is 1.1.0"], []),
        (
            replace(START, pictures={"train": "a", "val": "c"}),
            ["pictures of val are others, of the same names and sizes"],
            [],
        ),
        (replace(START, pictures={"train": "a"}), [], []),
    ],
)
def test_the_rule(now: Start, refused: list[str], told: list[str]) -> None:
    assert changes(START, now) == (refused, told)


@pytest.fixture
def half(runs: Path, tmp_path: Path) -> RunDir:
    """A copy of the half-finished run, and of its data."""
    shutil.copytree(runs / "half", tmp_path / "half", symlinks=True)
    return RunDir(tmp_path / "half" / "r")


def resume(run: RunDir, *more: object) -> tuple[int, str]:
    return called("resume", "r", "--runs-dir", run.root.parent, "--cluster", "inline", *more)


def repaint(path: Path) -> None:
    """Another picture of the same name and size, written in place: its folder's time does not change."""
    with Image.open(path) as image:
        pixels = 255 - np.asarray(image)
    with open(path, "r+b") as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        file.truncate()


def test_exchanged_pictures_are_refused_until_they_are_accepted(half: RunDir, runs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(runs / "data", data)
    root = f"data.root={data}"
    picture = data / "train" / "birch" / "002.jpg"
    repaint(picture)
    code, text = resume(half, root)
    assert (code, "pictures of train are others, of the same names and sizes" in text) == (EXIT_USER, True), text
    assert f"fixres resume r --runs-dir {half.root.parent} --accept-change" in text
    assert not half.done.exists()
    code, text = resume(half, root, "--accept-change")
    assert code == EXIT_DONE, text
    assert "change accepted" in [line["event"] for line in read_lines(half.events)]


def test_a_picture_that_is_exchanged_while_the_run_reads_is_not_taken(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "data", 2, 1, ("ash", "birch"))
    index = dataset.load(data, "train", str(tmp_path / "cache"))
    decoding.load(index, 0)
    repaint(index.path(0))
    with pytest.raises(decoding.Undecodable, match="another picture than the one that was indexed"):
        decoding.load(index, 0)


def test_other_code_is_told_and_its_snapshot_stays(half: RunDir) -> None:
    module = half.code / "fixres_dist" / "__init__.py"
    module.write_text(module.read_text() + "# another version\n")
    before = read_json(half.start_file, Start, "")
    write_json(half.start_file, vars(replace(before, code=snapshots.digest(half.code / "fixres_dist"))), sealed=True)
    code, text = resume(half)
    assert code == EXIT_DONE, text
    assert f"and is {before.code}; the earlier snapshot: code-1" in text
    assert (half.root / "code-1" / "fixres_dist" / "__init__.py").read_text().endswith("# another version\n")
    assert not module.read_text().endswith("# another version\n")
    events = read_lines(half.events, event=str)
    assert [line["what"][0][:8] for line in events if line["event"] == "changed"] == ["the code"]
    assert [line["code"] for line in events if line["event"] == "made of"] == [before.code, before.code]
    assert read_json(half.start_file, Start, "") == before
