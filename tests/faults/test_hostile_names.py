"""Names of folders, classes and files that would steer a terminal, break a table, or are markup: shown as they are written."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.folders import write_photos
from support.in_process import SETTINGS, called

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED
from fixres_dist.base.terminal import Escaped
from fixres_dist.base.text import markdown_table, table

CLASSES = ("\x1b[2Jash", "bir\nch | x", "elm\u202etxt", "<img src=x>", "$\\frac{", "z" * 240)
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/r, a finished run on such a data set, with one such picture that could not be decoded."""
    root = tmp_path_factory.mktemp("names")
    data = write_photos(root / "pho\x1b[31mtos $\\x$ | <b>", 4, 2, CLASSES)
    (data / "train" / CLASSES[0] / "tor\x1b[8mn\n.jpg").write_bytes(b"no picture")
    (data / "val" / CLASSES[1] / "\udcff.jpg").write_bytes(b"no picture")
    code, text = called("submit", "--data", data, "--runs-dir", root / "runs", *SETTINGS)
    assert code == EXIT_DONE, text
    assert not STEERS.search(text), STEERS.findall(text)
    assert r"tor\x1b[8mn" in text
    return root


def test_commands_print_them_escaped(root: Path) -> None:
    data, run = next(root.glob("pho*")), root / "runs" / "r"
    shutil.copytree(run, root / "runs" / "re\x1b[2Jd", symlinks=True)
    for words, codes in (
        (("status", "--runs-dir", root / "runs"), {EXIT_DONE}),
        (("logs", "r", "--runs-dir", root / "runs"), {2}),
        (("evaluate", "--run", run), {EXIT_DONE}),
        (("report", run, root / "runs" / "re\x1b[2Jd", "--out", root / "out"), {EXIT_DONE}),
        (("export", "--run", run, "--out", root / "exported"), {EXIT_DONE}),
        (("data", "index", "--data", data), {EXIT_DONE}),
        (("data", "verify", "--data", data, "--workers", "1"), {EXIT_FAILED}),
        (("data", "index", "--data", root / "no\x1b[2J\nfolder"), {2}),
    ):
        code, text = called(*words)
        assert code in codes, text
        assert not STEERS.search(text), (words, STEERS.findall(text))
    for file in (root / "out" / "report.md", root / "exported" / "README.md"):
        assert not STEERS.search(file.read_text()), file
    tables = [
        part.splitlines() for part in (root / "out" / "report.md").read_text().split("\n\n") if part.startswith("|")
    ]
    assert any(line.startswith("| r") for rows in tables for line in rows)
    for rows in tables:
        assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1, rows


def test_what_is_printed_is_escaped_and_bars_and_pasted_lines_stay() -> None:
    said = io.StringIO()
    stream = Escaped(said)
    for text in ("\r 50%|#####\r", "a\tb\n", "x\ry\x1b]0;t\x07", "\u202egnp.exe", "\udcff"):
        stream.write(text)
    assert said.getvalue() == "\r 50%|#####\r" + "a\tb\n" + r"x\ry\x1b]0;t\x07" + r"\u202egnp.exe" + r"\udcff"
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Escaped(plain).write("café\n")
    plain.flush()
    assert plain.buffer.getvalue() == rb"caf\xe9" + b"\n"  # type: ignore[attr-defined]


def test_a_name_is_one_cell_of_a_table() -> None:
    cells = table(["name"], [["a\nb\x1b[2J"]]).splitlines()
    assert cells[1] == r"a b\x1b[2J"
    assert markdown_table(["name"], [["a\nb | c\u202e"]]).splitlines()[2] == r"| a b \| c\u202e |"


def test_streams_are_the_processes_own_again_after_a_command() -> None:
    before = sys.stdout
    called("--help")
    assert sys.stdout is before
