"""A module imports only from lines above its own, and each heavy library is imported in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fixres_dist"


def layers() -> list[str]:
    """The list of docs/architecture.md, a layer a line; what stands behind two spaces is a comment."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    block = page.partition("\n## Layers\n")[2].partition("\n## ")[0]
    lines = [line[4:].partition("  ")[0].strip() for line in block.splitlines() if line.startswith("    ")]
    return [line.replace("launch/*.py, ", "").replace(",", "") for line in lines]


LAYERS = layers()
NO_TORCH = LAYERS[: LAYERS.index("planning preempt evalsets") + 1]
ONE_HOME = {
    "submitit": "cluster",
    "tensorboard": "tracking",
    "matplotlib": "figures",
    "nvidia": "data.dali",
    "apex": "precision",
    "numba": "data.pixels",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "huggingface_hub": "export",
}


def imports(file: Path, top_level: bool) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> dict[str, Path]:
    files = (file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def level(module: str) -> int:
    return next(i for i, line in enumerate(LAYERS) if module in line.split())


def test_every_module_has_its_layer() -> None:
    assert sorted(modules()) == sorted(name for line in LAYERS for name in line.split())


def test_imports_point_upwards_only() -> None:
    known = modules()
    for module, file in known.items():
        for name in imports(file, top_level=False):
            if name.startswith("fixres_dist."):
                parts = name.removeprefix("fixres_dist.").split(".")
                target = next((t for k in (2, 1) if (t := ".".join(parts[:k])) in known), None)
                allowed = target is None or level(target) < level(module)
                assert allowed or (module, target) == ("cluster", "train"), f"{module} imports {target}"


def test_heavy_libraries_have_one_home() -> None:
    for module, file in modules().items():
        for name in imports(file, top_level=False):
            for part in name.split("."):
                assert ONE_HOME.get(part, module) == module, f"{module} imports {name}"


def test_light_layers_import_no_torch() -> None:
    for module, file in modules().items():
        if any(module in line.split() for line in NO_TORCH):
            assert not any(
                name.split(".")[0] in ("torch", "timm", "torchvision") for name in imports(file, top_level=False)
            ), module


def test_our_code_reads_no_pickle() -> None:
    for module, file in modules().items():
        text = file.read_text()
        assert "import pickle" not in text, module
        assert "weights_only=False" not in text, module
        assert "allow_pickle=True" not in text, module
