"""The snapshots of the code that a run's jobs import: code/ of the newest start, code-1/ and so on of earlier ones. No torch."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from pathlib import Path

from fixres_dist.base.environment import shipped
from fixres_dist.base.files import whole

CODE = (".py", ".yaml", ".csv")  # files of the package and its recipes


def keep(code: Path) -> Path | None:
    """Copy the package and the recipes that are running now to `code`, whole or not at all. A snapshot of other code that is
    there becomes code-1, code-2, and so on, and is returned.

    A checkout has configs/ beside the package, an installed package has it inside.
    """
    package, configs = Path(__file__).resolve().parents[1], shipped("configs")
    inside = configs.is_relative_to(package)
    if package.parent == code.resolve():
        return None
    earlier = None
    if code.is_dir():
        if digest(code) == digest(*([package] if inside else [package, configs])):
            return None
        earlier = next(p for n in itertools.count(1) if not (p := code.with_name(f"{code.name}-{n}")).exists())
        os.replace(code, earlier)
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    with whole(code) as part:
        shutil.copytree(package, part / "fixres_dist", ignore=ignore)
        if not inside:
            shutil.copytree(configs, part / "configs", ignore=ignore)
    return earlier


def digest(*folders: Path) -> str:
    """Of the files of code and recipes below the folders, by their names and bytes; what Python has compiled is left out."""
    found = hashlib.sha256()
    files = (
        (file.relative_to(folder), file)
        for folder in folders
        for file in folder.rglob("*")
        if file.suffix in CODE and file.is_file()
    )
    for name, file in sorted(
        (name.as_posix().removeprefix("fixres_dist/").removeprefix("configs/"), file) for name, file in files
    ):
        found.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:12]
