"""A room imports only rooms below its own, light rooms load no torch, and each heavy library has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fixres_dist"
# Lowest first. Rooms of one line do not import each other; bench stands beside cli, which starts it.
ROOMS = (
    ("base",),
    ("config",),
    ("data",),
    ("models",),
    ("runs",),
    ("cluster",),
    ("training",),
    ("evaluation",),
    ("publishing",),
    ("bench",),
    ("cli",),
)
LIGHT = ("base", "config", "cluster", "cli", "training.plan", "training.stages", "training.cache.rule", "training.job")
ONE_HOME = {
    "submitit": {"cluster.jobs", "cluster.local", "training.job"},
    "tensorboard": {"runs.tracking"},
    "matplotlib": {"publishing.figures"},
    "nvidia": {"data.dali"},
    "apex": {"models.precision"},
    "numba": {"data.pixels"},
    "onnx": {"publishing.export"},
    "onnxruntime": {"publishing.export"},
    "onnxscript": {"publishing.export"},
    "huggingface_hub": {"publishing.export", "publishing.model_card"},
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


def level(room: str) -> int:
    return next(k for k, rooms in enumerate(ROOMS) if room in rooms)


def test_a_room_imports_itself_and_rooms_below() -> None:
    for module, file in modules().items():
        own = module.partition(".")[0]
        for name in imports(file):
            top, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if top == "fixres_dist" and room != own:
                assert level(room) < level(own), f"{module} imports {name}"


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
