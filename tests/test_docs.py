"""The pages: the site is whole and asks nobody, references are the code's, and the commands on them do what they say."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mkdocs.commands import build
from mkdocs.config import load_config
from support.commands import ROOT
from support.folders import write_photos
from support.in_process import SETTINGS, called

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
    """The code on a page: indented lines, fences of `sh`, and what peers.md names."""
    text = page.read_text()
    fenced = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    shown = re.findall(r"`(fixres [^`]+)`", text) if page.stem == "peers" else []
    return "\n".join([*fenced, *shown, *(line[4:] for line in plain.splitlines() if line.startswith("    "))])


def words(line: str) -> list[str]:
    """Of a command that a page shows, as `fixres` takes them."""
    return shlex.split(re.sub(r"\s+[>|&]+ .*", "", line), comments=True)


def commands(page: Path) -> list[str]:
    """The lines with a command of ours."""
    lines = blocks(page).replace("\\\n", " ").splitlines()
    ours = [re.sub(r"^python (?:-m fixres_dist|launch/(\w+)\.py)", r"fixres \1", line) for line in lines]
    return [line for line in ours if line.startswith("fixres ")]


SHOWN = [pytest.param(line, id=f"{page.stem}: {line[:70]}") for page in PAGES for line in commands(page)]
RUN = (
    "evaluate",
    "sweep",
    "interpolate",
    "extract",
    "export",
    "compare",
    "report",
    "status",
    "cancel",
    "resume",
    "data",
    "study",
    "predict",
)
# What a test of seconds cannot do: weights from the network, uploads, labels of ImageNet's 50,000 images, a job's files,
# ONNX, hundreds of pictures.
PARSED_ONLY = re.compile(r"--push|--checkpoint|\.pth|real\.json|/jobs/|onnx|\.npz|hold_out")


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_on_a_page_is_one(line: str) -> None:
    _, name, *rest = words(line)
    if not name.startswith("-"):
        assert cli.parse(cli.add_command(argparse.ArgumentParser(prog=command(name)), name), rest).func


STAGE_ONE = ("pretrain.epochs=1", "pretrain.res=48", "pretrain.global_batch=8")
THE_RUN = (*SETTINGS, "--data", "DIR", "--name", "finished", *STAGE_ONE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages have it: the data set DIR, a site's profile, and a finished run of the smallest model."""
    folder = tmp_path_factory.mktemp("world")
    write_photos(folder / "DIR", 8, 3)
    shutil.copy(ROOT / "slurm" / "profiles" / "generic.yaml", folder / "mysite.yaml")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    (folder / "photos").symlink_to(folder / "DIR" / "val" / "ash")
    shutil.copy(folder / "photos" / "000.jpg", folder / "cat.jpg")
    (folder / "list.txt").write_text("# one that is not there is named\ncat.jpg\nphotos/001.jpg\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, said = called("submit", *THE_RUN)
    assert code == 0, said
    return folder


def here(line: str) -> list[str]:
    """The words of a command for the world: its data set, a plan instead of a run, the sbatch text instead of a job."""
    folder = "DIR/val" if "--eval-set" in line else "DIR"
    found = [re.sub(r"(^|=)/data/imagenet[\w-]*", rf"\1{folder}", word) for word in words(line)[1:]]
    trains = found[0] == "submit" or (found[0] == "study" and not any(word.startswith("runs/") for word in found))
    if trains:
        found += ["--runs-dir", "planned"]
    job = trains or "--cluster" in found
    return [*found, *(["--dry-run"] if job and not {"--dry-run", "--list"} & {*found} else [])]


def runs_of(given: list[str]) -> list[str]:
    """The names of the runs that a command speaks of."""
    names = [word.partition("runs/")[2] for word in given if "runs/" in word]
    shown = given[1:] if given[0] in ("status", "cancel", "resume") else []
    return names + [word for word in shown if re.fullmatch(r"[\w]+-[\w-]+", word)]


@pytest.fixture(scope="module")
def done() -> list[list[str]]:
    return []  # what other pages have shown already


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in ("commands", "peers")], ids=lambda page: str(page.stem)
)
def test_the_commands_of_a_page_do_what_it_says(
    page: Path, done: list[list[str]], world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order. What starts a run or a job is planned. commands.md and peers.md name what is on other pages."""
    monkeypatch.chdir(world)
    for line in commands(page):
        given = here(line)
        if given in done or given[0] not in (*RUN, "submit") or PARSED_ONLY.search(line):
            continue
        done.append(given)
        for name in runs_of(given):
            if not (world / "runs" / name).exists():
                shutil.copytree(world / "runs" / "finished", world / "runs" / name)
        code, said = called(*given)
        assert code == 0, f"{line}\n{said}"


def test_a_run_of_this_shell_says_where_its_log_is(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """logs said `no log yet` of a run that had ended."""
    monkeypatch.chdir(world)
    code, said = called("logs", "finished")
    assert code == 2
    assert "has no log: the command that ran it (--cluster inline) printed it. Next: fixres status finished" in said


def test_the_exported_model_is_read_by_the_lines_on_the_page(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    code, said = called("export", "--run", "runs/finished", "--format", "hub")
    assert code == 0, said
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "publish.md").read_text(), re.S)
    names: dict[str, Any] = {}
    exec(lines.replace("b0-320", "finished"), names)
    assert names["model"].num_classes == 3
    assert names["transform"]


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code in one process, as a kernel runs it, on the run of this world."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("EXAMPLE", shlex.join(THE_RUN))
    monkeypatch.setenv("RUN", "runs/finished")
    monkeypatch.setenv("SIZES", "64,96")
    cells = json.loads((ROOT / "docs" / "example.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    said = capsys.readouterr().out
    timm, ours = re.findall(r": timm ([\d.]+), fixres_dist ([\d.]+)", said)[0]
    assert timm == ours
    assert "best after fixing" in said


def test_a_symptom_on_the_page_of_recovery_is_what_the_product_says() -> None:
    """Texts that are divided over lines of code are joined; values in braces are the `...` of the page."""
    code = "\n".join(path.read_text() for path in (ROOT / "fixres_dist").rglob("*.py"))
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)
    rows = (ROOT / "docs" / "recover.md").read_text().partition("| symptom")[2].splitlines()
    symptoms = [
        found for line in rows if line.startswith("| `") for found in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert len(symptoms) > 15
    for symptom in symptoms:
        said = r"\{[^}]*\}".join(re.escape(part) for part in symptom.split("..."))
        assert re.search(said, code), symptom


def test_the_containers_have_what_the_package_needs() -> None:
    """There is no builder here: hadolint reads the Dockerfile, and Apptainer's definition says the same as it."""
    dockerfile, definition = ((ROOT / "container" / name).read_text() for name in ("Dockerfile", "fixres.def"))
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "-"], input=dockerfile, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    (image,) = re.findall(r"^FROM (\S+)", dockerfile, re.M)
    assert f"From: {image}" in definition
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    numbers = [tuple(map(int, text.split("."))) for text in (re.findall(r"python:([\d.]+)", image)[0], oldest)]
    assert numbers[0] >= numbers[1]
    for text in (dockerfile, definition):
        (extra,) = re.findall(r"pip install .*\[(\w+)\]", text)
        assert extra in setup["options.extras_require"]
    (packages,) = re.findall(r"^RUN (apt-get .*)$", dockerfile, re.M)
    assert packages in definition
