"""Made-up configurations and command lines: a plan or exit 2 with a message, never a traceback. `FIXRES_FUZZ=N` runs N of each
(of the commands but submit, which take longer, a fifth)."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER, UserError
from fixres_dist.cli.main import add_command, main
from fixres_dist.config import reading
from fixres_dist.config.schema import Config

COUNT = int(os.environ.get("FIXRES_FUZZ", 60))
SEEDED = settings(
    max_examples=COUNT, derandomize=COUNT == 60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SECTIONS = {**get_type_hints(Config), "pretrain": type(Config().tune)}
KEYS = [f"{section}.{key}" for section, kind in SECTIONS.items() for key in get_type_hints(kind)]
ODD = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "1e309",
        "nan",
        "inf",
        "1_000",
        "١",
        "0x10",
        "true",
        "none",
        "null",
        "auto",
        "all",
        "~",
        "[]",
        "{}",
    ),
    *(
        "[1, 2]",
        "{a: b}",
        "{a: [b]}",
        "{a: {b: c}}",
        "{? [1]: 2}",
        "[",
        "a: b",
        "&a [*a]",
        "*a",
        "!!python/object:os.system {}",
    ),
    *(
        "\n",
        "\x1b[2J",
        "\0",
        "\udcff",
        "‮",
        "$(id)",
        "'; rm -r x",
        "--",
        "-x",
        "%j",
        "\\",
        "9" * 400,
        "x" * 3000,
        "../..",
        "/",
    ),
    *(
        "1-4",
        "4-1",
        "24:00:00",
        "1-0",
        "fixres",
        "test",
        "cosine",
        "ns",
        "demo",
        "bf16",
        "1e-3",
        "64",
        "224",
        "REDACTED",
    ),
)
texts = st.one_of(st.sampled_from(ODD), st.text(max_size=30))
pairs = st.builds("{}={}".format, st.one_of(st.sampled_from(KEYS), texts), texts)
options = st.sampled_from(
    (
        *(
            "--model",
            "--res",
            "--weights",
            "--data",
            "--preset",
            "--nodes",
            "--gpus-per-node",
            "--profile",
            "--cluster",
        ),
        *(
            "--name",
            "--grid",
            "--table",
            "--at-once",
            "--list",
            "--prepared",
            "--runs-dir",
            "-h",
            "--res=224",
            "--model=b0",
        ),
    )
)
words = st.lists(st.one_of(pairs, options, texts), max_size=6)


@SEEDED
@given(st.lists(pairs, max_size=5))
def test_configurations(items: list[str]) -> None:
    with contextlib.suppress(UserError):
        config = reading.parse(Config, reading.overrides(items))
        assert reading.load(reading.dump(config)) == config
        reading.dump(config, public=True)


@SEEDED
@given(st.text(alphabet="abc:[]{}&*!?-|>'\"%@`#,. \n\t0123", max_size=200))
def test_yaml(text: str) -> None:
    with contextlib.suppress(UserError):
        reading.load(text)


@pytest.fixture(scope="module")
def where(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    known = ["--model", "test_efficientnet", "--weights", "none", "--res", "64", "--data", str(photos)]
    return [*known, "--runs-dir", str(tmp_path_factory.mktemp("runs")), "--dry-run"]


@SEEDED
@given(words=words, known=st.booleans())
def test_command_lines(words: list[str], known: bool, where: list[str]) -> None:
    check(["submit", *(where if known else where[-3:]), *words], {EXIT_DONE, EXIT_USER})


def check(line: list[str], codes: set[int]) -> None:
    """The command ends with one of `codes`, says something, and nothing that steers the terminal."""
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            code = main(line)
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
    assert code in codes, line
    assert said.getvalue() if code == EXIT_DONE else told.getvalue(), line
    assert "\x1b" not in said.getvalue() + told.getvalue(), "an escape reaches the terminal"


FOREVER = ("--watch", "--follow", "--push")


def options_of(name: str) -> list[str]:
    parser = add_command(argparse.ArgumentParser(prog=name), name)
    return [option for option in parser._option_string_actions if option not in FOREVER]


OTHERS: dict[str, tuple[str, ...]] = {
    "status": ("--runs-dir", "{root}"),
    "logs": ("r", "--runs-dir", "{root}"),
    "report": ("{root}/r",),
    "compare": ("{root}/r", "{root}/r"),
    "evaluate": ("--run", "{root}/r", "--dry-run"),
    "sweep": ("--run", "{root}/r", "--res", "64", "--dry-run"),
    "extract": ("--run", "{root}/r", "--out", "x", "--dry-run"),
    "interpolate": ("--run", "{root}/r", "--dry-run"),
    "data": ("index", "--data", "{root}/../data"),
    "cancel": ("no-such-run", "--runs-dir", "{root}"),
    "completion": ("bash",),
}


@st.composite
def other_lines(draw: st.DrawFn) -> list[str]:
    name = draw(st.sampled_from(list(OTHERS)))
    odd = draw(st.lists(st.one_of(st.sampled_from(options_of(name)), pairs, texts), max_size=4))
    return [name, *(OTHERS[name] if draw(st.booleans()) else OTHERS[name][-1:]), *odd]


@settings(SEEDED, max_examples=max(20, COUNT // 5))
@given(line=other_lines())
def test_other_commands(line: list[str], runs: Path, empty: Path) -> None:
    """A damaged picture or a failed run is exit 1, with words; reading what is there writes nothing into the run."""
    check([word.replace("{root}", str(runs / "runs")) for word in line], {EXIT_DONE, EXIT_FAILED, EXIT_USER})


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: paths that are made up are files in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        ["submit", "--model", "b0", "--res", "64", "--dry-run", "--profile", "9" * 400],
        ["submit", "--model", "b0", "--res", "64", "--dry-run", "--data", "9" * 400],
        ["status", "--runs-dir", "9" * 400],
        ["report", "9" * 400],
        ["evaluate", "--run", "loop"],
    ],
)
def test_a_path_that_no_file_system_takes(line: list[str], empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "loop").symlink_to("loop")
    assert main(line) == EXIT_USER
    assert "Traceback" not in capsys.readouterr().err
