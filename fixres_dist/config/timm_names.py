"""The names of models that timm takes, without importing timm: that would import torch."""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import UserError, printable, unknown
from fixres_dist.base.small_files import Damaged, read_json

HUB, FOLDER = "hf-hub:", "local-dir:"


@cache
def sources() -> list[str]:
    """The texts of timm's model files and of our own."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise UserError("timm is not installed. Next: pip install timm")
    files = [*(Path(spec.origin).parent / "models").glob("*.py"), Path(__file__).parents[1] / "models" / "build.py"]
    return [path.read_text(encoding="utf-8") for path in files]


@cache
def architectures() -> frozenset[str]:
    """timm's model entry points and our own."""
    pattern = re.compile(r"^@register_model\b.*\s+def (\w+)\(", re.MULTILINE)
    return frozenset(name for text in sources() for name in pattern.findall(text))


@cache
def former() -> dict[str, str]:
    """Names that timm has given up, and the present ones with the same weights; empty where the model is gone."""
    block = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
    pair = re.compile(r"'([\w.]+)'\s*:\s*(?:'([\w.]+)'|None)")
    return {old: new for text in sources() for found in block.findall(text) for old, new in pair.findall(found)}


def resolved(name: str, recipes: list[str], hint: str) -> str:
    """What timm builds for `name`: architecture[.tag], hf-hub:OWNER/NAME, or local-dir:FOLDER with an absolute path.

    A former name becomes the present one with the same weights, and timm's own repositories on the hub become its names.
    Raises UserError for any other, with the nearest of timm's names and of the `recipes`, and with `hint`.
    """
    source, _, place = name.partition(":")
    prefix = f"{source.lower().replace('_', '-')}:"
    if prefix == FOLDER:
        return FOLDER + checked_folder(place)
    plain = (place if prefix == HUB else name).removeprefix("timm/")
    gone = former().get(plain) == ""
    plain = former().get(plain) or plain
    if plain.partition(".")[0] in architectures():
        return plain
    if prefix == HUB and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", place):
        return HUB + place
    if gone:
        raise UserError(f"timm has taken {printable(name)!r} out and has no other model with its weights. {hint}")
    if "/" in name or ":" in name:
        raise UserError(
            f"unknown model {printable(name)!r}. Accepted: a timm name, hf-hub:OWNER/NAME, or local-dir:FOLDER with a config.json"
        )
    raise unknown("model", name, [*recipes, *(sorted(architectures()) if len(name) > 3 else ())], hint)


def checked_folder(folder: str) -> str:
    """The absolute path of a model that was exported in timm's hub form; raises UserError where it is none."""
    path = os.path.abspath(os.path.expanduser(folder))
    try:
        config = read_json(Path(path, "config.json"), dict[str, Any], "")
        known = config.get("architecture") in list(architectures())
    except (OSError, Damaged):
        config, known = None, False
    if not known:
        why = "has no readable config.json" if not isinstance(config, dict) else "names no architecture of timm"
        raise UserError(
            f"{FOLDER}{printable(folder)}: {printable(path)} {why}. Accepted: a folder that `export --format safetensors` or timm wrote"
        )
    return path
