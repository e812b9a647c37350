"""The pages: the site is whole and asks nobody, references are the code's, and the commands on them do what they say."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mkdocs.commands import build
from mkdocs.config import load_config
from support.commands import ROOT

from fixres_dist.base.commands import FORM, command
from fixres_dist.cli import main as cli

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORM, "fixres")
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_no_broken_link_and_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    build.build(config)
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    for page in (tmp_path / "site").rglob("*.html"):
        asked = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)', page.read_text())
        assert not asked, page
    assert "fixres_dist" in (tmp_path / "site" / "index.html").read_text()


@pytest.mark.parametrize("name", ["settings", "commands"])
def test_a_reference_is_what_the_code_says(name: str, pages: Any) -> None:
    written = (ROOT / "docs" / f"{name}.md").read_text()
    assert written == getattr(pages, f"{name}_page")(), "Next: python docs/pages.py"
    assert not [line for line in written.splitlines() if re.match(r"\| `.*\|\s*\|$", line)], "no meaning"


def blocks(page: Path) -> str:
    """The code on a page: indented lines, and fences of `sh`."""
    text = page.read_text()
    fenced = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return "\n".join([*fenced, *(line[4:] for line in plain.splitlines() if line.startswith("    "))])


def words(line: str) -> list[str]:
    """Of a command that a page shows, as `fixres` takes them."""
    return shlex.split(re.sub(r"\s+[>|&]+ .*", "", line), comments=True)


def commands(page: Path) -> list[str]:
    """The lines with a command of ours."""
    lines = blocks(page).replace("\\\n", " ").splitlines()
    ours = [re.sub(r"^python (?:-m fixres_dist|launch/(\w+)\.py)", r"fixres \1", line) for line in lines]
    return [line for line in ours if line.startswith("fixres ")]


SHOWN = [pytest.param(page, line, id=f"{page.stem}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_a_command_on_a_page_is_one(page: Path, line: str) -> None:
    _, name, *rest = words(line)
    if name.startswith("-"):
        return
    args = cli.parse(cli.add_command(argparse.ArgumentParser(prog=command(name)), name), rest)
    assert args.func
