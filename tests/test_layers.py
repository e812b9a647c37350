"""A room imports only rooms below its own, light rooms load no torch, and each heavy library has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fixres_dist"
ROOMS = (
    "base",
    "config",
    "data",
    "models",
    "runs",
    "cluster",
    "training",
    "evaluation",
    "publishing",
    "bench",
    "cli",
)  # lowest first
LIGHT = ("base", "config", "cluster", "cli", "training.plan", "training.stages", "training.cache.rule", "training.job")
ONE_HOME = {
    "submitit": {"cluster.jobs", "cluster.local", "training.job"},
    "tensorboard": {"runs.board", "runs.event_file"},
    "wandb": {"runs.wandb_run"},
    "matplotlib": {"publishing.figures"},
    "nvidia": {"data.dali"},
    "apex": {"models.precision"},
    "numba": {"data.pixels"},
    "onnx": {"publishing.export"},
    "onnxruntime": {"publishing.export"},
    "onnxscript": {"publishing.export"},
    "huggingface_hub": {"publishing.export", "publishing.model_card"},
    "markdown": {"publishing.html_page"},
}


def modules() -> dict[str, Path]:
    """`data.index`: its file."""
    found = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE and path.name != "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in found}


def imports(file: Path) -> Iterator[str]:
    """Every imported name, in whatever scope, as `package.module.name`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_room_imports_itself_and_rooms_below() -> None:
    for module, file in modules().items():
        own = module.partition(".")[0]
        for name in imports(file):
            top, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if top == "fixres_dist" and room != own:
                assert ROOMS.index(room) < ROOMS.index(own), f"{module} imports {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    """In whatever scope, for types too."""
    known, left = modules(), dict[str, set[str]]()
    for module, file in known.items():
        names = [name.removeprefix("fixres_dist.") for name in imports(file)]
        left[module] = {*names, *(name.rpartition(".")[0] for name in names)} & known.keys() - {module}
    while left:
        used = set().union(*left.values())
        ends = {module for module, names in left.items() if module not in used or not names & left.keys()}
        assert ends, f"in circles: {sorted(left)}"
        left = {module: names & left.keys() for module, names in left.items() if module not in ends}


def test_the_picture_shows_the_rooms_and_their_files() -> None:
    """docs/architecture.md has a line for each room, highest first, and its files on the lines below it."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    block = page.partition("\n## The rooms\n")[2].partition("\n## ")[0]
    drawn: dict[str, list[str]] = {}
    for line in block.splitlines():
        if line.startswith(" " * 16):
            drawn[list(drawn)[-1]] += line.split()
        elif line.startswith(" " * 4):
            drawn[line.split()[0]] = []
    assert list(drawn) == list(reversed(ROOMS))
    for room, files in drawn.items():
        stand = [name.partition(".")[2].replace(".", "/") for name in modules() if name.startswith(f"{room}.")]
        assert sorted(files) == sorted(stand), f"{room} is drawn with other files than it has"


def test_heavy_libraries_have_one_home() -> None:
    for module, file in modules().items():
        for name in imports(file):
            for part in name.split("."):
                assert module in ONE_HOME.get(part, {module}), f"{module} imports {name}"


@pytest.mark.parametrize("start", LIGHT)
def test_light_rooms_load_no_torch(start: str) -> None:
    chosen = [f"fixres_dist.{name}" for name in modules() if name == start or name.startswith(f"{start}.")]
    heavy = "[name for name in ('torch', 'timm', 'torchvision', 'matplotlib', 'submitit') if name in sys.modules]"
    code = f"import sys, {', '.join(chosen)}; found = {heavy}; sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_our_code_reads_no_pickle() -> None:
    for module, file in modules().items():
        text = file.read_text()
        for word in ("import pickle", "weights_only=False", "allow_pickle=True"):
            assert word not in text, f"{module}: {word}"
