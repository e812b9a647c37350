"""One command: its overview, the help of each command, the form in which messages name commands, completion."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ROOT, environment

from fixres_dist.base.commands import FORM, LAUNCH, command
from fixres_dist.cli import main as cli
from fixres_dist.cli.main import COMMANDS, main

NO_COMMANDS = {"__init__", "main", "arguments", "as_job", "command_job", "settings", "submission"}  # no commands


@pytest.fixture(autouse=True)
def _own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORM, "fixres")


def parser(name: str) -> argparse.ArgumentParser:
    return cli.add_command(argparse.ArgumentParser(prog=command(name)), name)


def test_the_overview_names_every_command_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    files = {path.stem for path in (ROOT / "fixres_dist" / "cli").glob("*.py")} - NO_COMMANDS
    assert {line.split()[0] for line in lines if line.startswith("  ")} == files == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_fits_a_screen_and_ends_in_examples_that_hold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    p = parser(name)
    text, _, examples = p.format_help().partition("examples:\n")
    assert len(text.splitlines()) + len(examples.splitlines()) <= 50
    lines = examples.splitlines()
    assert lines
    for line in lines:
        first, called, *words = shlex.split(line.partition(" > ")[0], comments=True)
        assert (first, called) == ("fixres", name)
        cli.parse(p, words)


@pytest.mark.parametrize("name", ["data", "bench"])
def test_the_help_of_a_part_of_a_command_ends_in_examples_of_it(name: str) -> None:
    (parts,) = (action.choices for action in parser(name)._actions if isinstance(action, argparse._SubParsersAction))
    for part, p in parts.items():
        text, _, examples = p.format_help().partition("examples:\n")
        assert len(text.splitlines()) < 50
        assert examples.splitlines()
        assert all(line.split()[:3] == ["fixres", name, part] for line in examples.splitlines())


def test_settings_stand_anywhere_between_the_options() -> None:
    words = ["--run", "a", "data.resize_rule=timm", "--split", "test", "run.seed=1"]
    assert cli.parse(parser("evaluate"), words).overrides == ["data.resize_rule=timm", "run.seed=1"]
    assert cli.parse(parser("evaluate"), ["--run", "a"]).overrides == []


def test_grid_had_another_name() -> None:
    words = ["--grid", "tune.base_lr=1,2", "--sweep", "tune.epochs=3,4"]
    p = parser("submit")
    assert cli.parse(p, words).grid == ["tune.base_lr=1,2", "tune.epochs=3,4"]
    assert "--sweep" not in p.format_help()


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute"]) == 2
    assert "unknown command 'evalute'. Did you mean 'evaluate'?" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage: fixres COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "status", "sweep"),
    [
        ("fixres", "fixres status 'a b'", "fixres sweep"),
        ("module", "python -m fixres_dist status 'a b'", "python -m fixres_dist sweep"),
        ("launch", "python launch/status.py 'a b'", "python -m fixres_dist sweep"),
    ],
)
def test_commands_are_named_in_the_form_in_which_the_user_came(
    monkeypatch: pytest.MonkeyPatch, form: str, status: str, sweep: str
) -> None:
    monkeypatch.setenv(FORM, form)
    assert command("status", "a b") == status
    assert command("sweep") == sweep


def test_a_worker_keeps_the_form_of_the_user_who_submitted_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FORM, "launch")
    assert main(["train", "--run", str(tmp_path)], form="module") == 2
    assert "Next: python launch/submit.py --help" in capsys.readouterr().err
    assert main(["status", "x", "--runs-dir", str(tmp_path)], form="module") == 2
    assert os.environ[FORM] == "module"


@pytest.mark.parametrize("name", LAUNCH)
def test_every_file_of_launch_is_its_command(name: str, tmp_path: Path) -> None:
    arguments = [sys.executable, ROOT / "launch" / f"{name}.py", "--help"]
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python launch/{name}.py")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_runs_and_models(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert name in script
    for option in ("--dry-run", "--follow", "--eval-set", "--samples-per-shard"):
        assert option in script
    if shell == "zsh":
        assert '"*:runs, or a grid or table by its name:_fixres_runs"' in script, "not the first name alone"
        assert '"*:any setting, such as tune.epochs\\=3:( )"' in script
        (models,) = re.findall(r"^_fixres_models\(\) .*$", script, re.M)
        assert "echo demo; echo r50;" in models, "a line each: zsh divides at ends of lines alone"
        if zsh := shutil.which("zsh"):
            subprocess.run([zsh, "-n"], input=script, text=True, check=True)
        return
    (tmp_path / "runs" / "b0-320").mkdir(parents=True)
    for typed, expected in (
        (["fixres", "status", "b0"], ["b0-320"]),
        (["fixres", "cancel", "b0-320", "b0"], ["b0-320"]),
        (["fixres", "submit", "--model", "l"], ["l2", "lambda_resnet26rpt_256.c1_in1k"]),
        (["fixres", "evaluate", "--model", "dem"], ["demo"]),
    ):
        words = " ".join(map(shlex.quote, typed))
        asked = (
            f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _shtab_fixres; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        )
        done = subprocess.run(
            ["bash"], input=f"{script}\n{asked}", text=True, capture_output=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        assert set(expected) <= set(done.stdout.split()), typed
