"""The names of a model's classes in the order of its logits: as ImageNet, timm or a file has them. No torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged, parsed, read_json, read_text

NAMES = "label_names"  # key of the names in a header, and in config.json
ACCEPTED = (
    "Accepted: natural (timm's order of the folders), imagenet (folders by WordNet id, number or name), or a file: "
    "lines of class names in the order of the logits, lines of `folder index`, or the same as JSON"
)


@dataclass(frozen=True)
class Classes:
    names: tuple[str, ...]
    aliases: Mapping[str, int] = field(default_factory=dict)  # further names of a class


def natural(folders: Iterable[str]) -> list[str]:
    """timm's order of class folders: without case, and numbers by value (1, 2, 10; apple, Bee)."""
    split = {name: re.split(r"(\d+)", name.lower()) for name in folders}
    return sorted(sorted(split), key=lambda name: [int(s) if s.isdecimal() else s for s in split[name]])


def named(class_map: str, folders: Sequence[str], count: int = 0) -> Classes:
    """The classes that `class_map` (data.class_map) names for these folders; at least `count` of them.

    Raises UserError for a file that cannot be read as a class map.
    """
    if class_map == "natural":
        return Classes(tuple(natural(folders)))
    found = imagenet() if class_map == "imagenet" else from_file(Path(class_map))
    more = map(nameless, range(len(found.names), count))
    return Classes((*found.names, *more), found.aliases)


def nameless(number: int) -> str:
    """The name of a class that no folder stands for, where a map gives only some folders their numbers."""
    return f"class_{number}"


def unnamed(names: Sequence[str]) -> bool:
    """Whether a class among `names` is nameless: the names then say less than the numbers."""
    return any(name == nameless(k) for k, name in enumerate(names))


@cache
def imagenet() -> Classes:
    """ImageNet-1k's WordNet ids, from timm; their aliases are its words, alone where they are unique (tench), and whole."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise UserError("timm is not installed. Next: pip install timm")
    folder = Path(spec.origin).parent / "data" / "_info"  # importing timm would import torch
    names = tuple((folder / "imagenet_synsets.txt").read_text().split())
    lines = (line.split("\t") for line in (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    words = dict(line for line in lines if len(line) == 2)
    found: dict[str, set[int]] = {}
    for k, name in enumerate(names):
        for word in (words[name], *words[name].split(",")):
            found.setdefault(folded(word), set()).add(k)
    return Classes(names, {word: min(classes) for word, classes in found.items() if len(classes) == 1})


def folded(name: str) -> str:
    """A class name without case, underscores and spaces: great_white_shark and Great white shark are one."""
    return re.sub(r"[\s_]+", " ", name.strip().lower())


LARGEST_HEADER = 100_000_000  # as the safetensors library has it


def is_imagenet(folders: Sequence[str]) -> bool:
    """Whether these are ImageNet's 1,000 classes by number or by name: in an order of theirs that is not ImageNet's."""
    if len(folders) != 1000:
        return False
    return sorted(folders) == sorted(map(str, range(1000))) or all(folded(n) in imagenet().aliases for n in folders)


def from_file(path: Path) -> Classes:
    """The classes in a file: a list of names, a mapping of folders to numbers or of numbers to names, or weights with names
    in their header. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            return Classes(in_header(path))
        text = read_text(path, ACCEPTED)
        return of_json(parsed(text)) if text.lstrip().startswith(("{", "[")) else of_lines(text.splitlines())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.class_map is {str(path)!r}: {reason}. {ACCEPTED}.") from None


def of_lines(lines: Sequence[str]) -> Classes:
    """Lines of a name each, as timm's --class-map has them; of `name index`; of `index name`; or of a WordNet id and words."""
    rows = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    cells = [re.split(r"[\s,;]+", row) for row in rows]
    if (
        cells
        and not cells[0][-1].isdecimal()
        and all(c[-1].isdecimal() and len(c) > 1 for c in cells[1:])
        and cells[1:]
    ):
        rows, cells = rows[1:], cells[1:]  # a table's head
    places = {
        re.sub(r"[\s,;]+\d+$", "", row): int(c[-1]) for row, c in zip(rows, cells, strict=True) if c[-1].isdecimal()
    }
    if len(places) == len(rows) and all(len(c) > 1 for c in cells):
        return of_places(places)
    if [c[0] for c in cells] == list(map(str, range(len(cells)))) and all(len(c) > 1 for c in cells):
        return Classes(tuple(re.sub(r"^\d+[\s,;]+", "", row) for row in rows))
    if all(re.fullmatch(r"n\d{8}", c[0]) for c in cells):
        return of_rows([[row[:9], *row[9:].strip(" ,;\t").split(",")] for row in rows])
    return of_rows([[row] for row in rows])


def of_json(found: Any) -> Classes:
    """A list of names, {name: index}, {index: name}, {index: [WordNet id, name]}, or config.json with label_names."""
    if isinstance(found, dict):
        found = found.get(NAMES) or found.get("id2label") or found.get("class_to_idx") or found
    if isinstance(found, dict):
        if all(isinstance(value, int) for value in found.values()):
            return of_places(found)
        found = [found[str(k)] for k in range(len(found))]
    return of_rows([[row] if isinstance(row, str) else list(row) for row in found])


def of_rows(rows: Sequence[Sequence[str]]) -> Classes:
    """A row for each class, in order: its name, and aliases."""
    names = tuple(row[0] for row in rows)
    if len(set(names)) < len(names) or not names:
        raise ValueError("a name stands twice" if names else "it is empty")
    return Classes(names, {folded(word): k for k, row in enumerate(rows) for word in row[1:] if word.strip()})


def of_places(places: Mapping[str, int]) -> Classes:
    """A number for each folder; numbers without a folder are classes without a name."""
    if len(set(places.values())) < len(places) or min(places.values(), default=-1) < 0:
        raise ValueError("two folders have one number" if places else "it is empty")
    by_number = {number: name for name, number in places.items()}
    return Classes(tuple(by_number.get(k, nameless(k)) for k in range(max(by_number) + 1)))


def in_header(path: Path) -> tuple[str, ...]:
    """The class names in a safetensors file's header; empty where it has none."""
    return unique(parsed(metadata(path).get(NAMES, "[]")))


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file's header says besides its tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parsed(file.read(check_header(path, length)).decode())
    return dict(header.get("__metadata__", {}))


def check_header(path: Path, length: int) -> int:
    """`length` in bytes of a safetensors header; raises ValueError for one that the library does not take either."""
    if length > LARGEST_HEADER:
        raise ValueError(f"its header is said to have {length:,} bytes; accepted: {LARGEST_HEADER:,}")
    return length


def beside(path: Path) -> tuple[str, ...]:
    """The class names in a config.json beside `model.pth` or `pytorch_model.bin`, as timm and the hub lay them out."""
    config = path.with_name("config.json")
    if not (path.stem.startswith(("model", "pytorch_model")) and config.is_file()):
        return ()
    try:
        return in_checkpoint(read_json(config, dict[str, Any], ""))
    except Damaged:
        return ()


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names; none where two classes have one, which tells them not apart."""
    return tuple(names) if len(set(names)) == len(names) else ()


def in_checkpoint(loaded: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names that a training script has put beside the weights; empty where it has none."""
    for key in (NAMES, "class_names", "classes", "class_to_idx"):
        value = loaded.get(key)
        if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return unique(value)
        if (
            isinstance(value, Mapping)
            and value
            and all(isinstance(k, int) for k in value.values())
            and sorted(value.values()) == list(range(len(value)))
        ):
            return tuple(sorted(value, key=value.__getitem__))
    return ()
