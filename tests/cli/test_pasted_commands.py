"""What a submission is called and made of: profiles, names of runs, and the commands in messages, which people paste."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs import checkpoint, preparation
from fixres_dist.runs.rundir import RunDir


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"partition gpu", "holds 'partition gpu'; accepted: sections"),
        (b"- cluster\n- data", "accepted: sections"),
        (b"clutser: {nodes: 2}", "Did you mean 'cluster'?"),
        (b"cluster: gpu", "section cluster is 'gpu'; accepted: a mapping"),
        (b"cluster: [nodes, 2]", "accepted: a mapping"),
        ("cluster: {account: Größe}".encode("latin-1"), "is no UTF-8 text"),
        ("cluster: {nodes: 2}".encode("utf-16"), "is no UTF-8 text"),
        (b"cluster: {nodes: 2", "cannot read the configuration"),
    ],
)
def test_a_profile_that_is_none_is_refused_by_name(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_bytes(content)
    with pytest.raises(UserError) as refused:
        reading.read_sections(tmp_path / "site.yaml")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("content", "sections"),
    [
        (b"", {}),
        (b"cluster:\n", {"cluster": {}}),
        (b"\xef\xbb\xbfcluster: {nodes: 2}", {"cluster": {"nodes": "2"}}),
        (b"pretrain: null", {"pretrain": None}),
        (b"cluster: {time: 24:00:00}", {"cluster": {"time": "24:00:00"}}),
    ],
)
def test_profiles_as_editors_write_them(content: bytes, sections: object, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_bytes(content)
    assert reading.read_sections(tmp_path / "site.yaml") == sections


@pytest.mark.parametrize(
    "name",
    [
        "-r",
        ".r",
        "a\nrm -r b",
        "tab\there",
        "\x1b[2J",
        "lr%j",
        "back\\slash",
        "x" * 201,
        "ü" * 101,
        " r",
        "r ",
        "\udcff",
    ],
)
def test_names_that_a_shell_slurm_or_a_file_system_would_take_for_another(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        preparation.check(tmp_path / name, Config())


@pytest.mark.parametrize("name", ["b0-320", "with space", "a=1,b=2", "ü" * 100, "x" * 200, "it's", "#1"])
def test_names_that_people_give(name: str, tmp_path: Path) -> None:
    preparation.check(tmp_path / name, Config())


def test_the_submit_command_works_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold relative paths, and FAILED is read anywhere."""
    project = tmp_path / "my project"
    project.mkdir()
    monkeypatch.chdir(project)
    run = preparation.prepare(project / "runs" / "r", Config(), "fixres submit --data photos")
    assert run.submit_command() == "fixres submit --data photos"
    monkeypatch.chdir("/")
    assert shlex.split(run.submit_command()) == ["cd", str(project), "&&", *["fixres", "submit", "--data", "photos"]]
    (run.root / "environment.json").write_text('{"torn')
    assert run.submit_command() == run.typed == "fixres submit --data photos"


def test_commands_that_delete_or_move_name_a_path_with_a_space_as_one_word(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "my run")
    broken = run.checkpoints / "step_00000001" / "meta.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(UserError) as refused:
        checkpoint.read(broken.parent)
    printed = str(refused.value).partition("Next: ")[2].partition(", then")[0]
    assert shlex.split(printed) == ["rm", "-r", str(broken.parent)]
    run.config_file.write_text(reading.dump(reading.parse(Config, {"tune": {"epochs": "7"}})))
    with pytest.raises(UserError) as refused:
        preparation.check(run.root, Config())
    assert shlex.split(str(refused.value).partition("away: ")[2]) == ["mv", str(run.root), f"{run.root}.old"]


def test_values_of_a_mapping_are_single(tmp_path: Path) -> None:
    for value in ("{mail-type: [END, FAIL]}", "{gres: {gpu: 8}}"):
        with pytest.raises(UserError, match="one value for each name"):
            reading.parse(Config, reading.overrides([f"cluster.sbatch={value}"]))


def test_the_environment_of_a_run_tells_the_folder_of_its_command(tmp_path: Path) -> None:
    run = preparation.prepare(tmp_path / "r", Config(), "fixres submit")
    assert json.loads((run.root / "environment.json").read_text())["folder"] == os.getcwd()
