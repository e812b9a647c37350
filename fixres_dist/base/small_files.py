"""The small files of this project and of people: JSON, files with a JSON object per line, UTF-8 text. Written whole or line
by line, and read by one reader, which says of a damaged file what is wrong and what to run next. No torch."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import shutil
import stat
import types
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from fixres_dist.base.commands import shell
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import remove, whole, write_text
from fixres_dist.base.storage import patiently

T = TypeVar("T")
SEAL = "crc32"  # the key of the checksum in JSON files that have one
LARGEST = 256 * 2**20  # bytes of a file that is read as a whole
ANYWHERE = Path("/")  # `patiently` waits where this is away: a folder that is gone is no error that passes


class Damaged(UserError):
    """A small file that cannot be used as it is."""

    def __init__(self, path: Path, why: object, next_step: str) -> None:
        super().__init__(f"{path} cannot be read: {why}. Next: {next_step}")
        self.path, self.why = path, str(why)


class Lines(NamedTuple):
    """The objects of a file that has one per line, and how many of its lines are damaged."""

    found: list[dict[str, Any]]
    damaged: int


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON text; null where a number is not finite, since JSON has no NaN and other readers refuse it."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(with_nulls(value), indent=indent, allow_nan=False)


def with_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Write by rename, as write_text does. `sealed`: a mapping that nobody edits gets its checksum, which read_json
    compares: a wrong digit in a result is no less damage than a torn file."""
    value = {**value, SEAL: seal(value)} if sealed else value
    text = as_json(value, indent=1) + "\n"
    patiently(lambda: write_text(path, text), path, ANYWHERE, "written")


def seal(values: Mapping[str, Any]) -> str:
    """CRC-32 of all but the seal, whatever their order and the spaces between them."""
    plain = json.loads(as_json({key: value for key, value in values.items() if key != SEAL}))
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True).encode()):08x}"


def read_bytes(path: Path, largest: int | None = LARGEST) -> bytes:
    """Raises FileNotFoundError, StorageError, and OSError for what is no file or cannot be read."""
    status = patiently(lambda: os.stat(path), path, ANYWHERE)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if largest and status.st_size > largest:
        raise OSError(f"it has {status.st_size} bytes, accepted: {largest}")
    return patiently(path.read_bytes, path, ANYWHERE)


def read_text(path: Path, next_step: str) -> str:
    """UTF-8 text, without a byte order mark. Raises FileNotFoundError, StorageError, and Damaged, which tells `next_step`."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise Damaged(path, f"it is no UTF-8 text ({error.reason} at byte {error.start})", next_step) from None
    except OSError as error:
        raise Damaged(path, error.strerror or error, next_step) from None


def read_note(path: Path) -> str:
    """What a note says, such as FAILED, whatever its bytes; empty where there is none, or nobody can read it."""
    try:
        return read_bytes(path).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def read_json(path: Path, hint: type[T], next_step: str) -> T:
    """The file's JSON as `hint` says (`typed`). Raises FileNotFoundError, StorageError, and Damaged."""
    text = read_text(path, next_step)
    try:
        found = parsed(text)
        if isinstance(found, dict) and found.pop(SEAL, given := seal(found)) != given:
            raise ValueError("its checksum is wrong")
        return typed(found, hint)  # type: ignore[no-any-return]
    except ValueError as error:
        raise Damaged(path, error, next_step) from None


def parsed(text: str) -> Any:
    """The value of JSON text; raises ValueError for text that is no JSON, or nested too deeply."""
    if not text.strip("\0 \n"):
        raise ValueError("it is empty" if not text.strip() else "it holds zero bytes only")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def typed(value: Any, hint: Any, where: str = "it") -> Any:
    """`value` from JSON as the annotation `hint`: a dataclass, tuple, list, mapping, enum, X | None, or scalar.

    Keys that a dataclass does not have are left out, since a newer version may write more. null is nan where a float is
    wanted, as `as_json` writes it. Raises ValueError that names the place, `where`.
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return value
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else typed(value, inner[0], where)
    if origin in (dict, Mapping) and isinstance(value, dict):
        key, item = inner or (str, Any)
        return {whole_number(k, where) if key is int else k: typed(v, item, f"{where}: {k}") for k, v in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        counted = inner if origin is tuple and inner[-1] is not ... else (*inner, Any)[:1] * len(value)
        if len(counted) != len(value):
            raise ValueError(f"{where} has {len(value)} values, and should have {len(counted)}")
        return origin(
            typed(v, item, f"{where}: value {k}") for k, (v, item) in enumerate(zip(value, counted, strict=True))
        )
    if dataclasses.is_dataclass(origin) and isinstance(value, dict):
        return record(value, origin, where)  # type: ignore[arg-type]
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        if value not in list(origin):
            raise ValueError(f"{where} is {str(value)[:60]!r}, which this version does not know")
        return origin(value)
    if origin is float and (value is None or type(value) is int):
        return math.nan if value is None else float(value)
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    if type(value) is not origin:
        raise ValueError(f"{where} is {str(value)[:60]!r}, which is no {NAMES.get(origin, 'mapping')}")
    return value


NAMES = {str: "text", int: "whole number", float: "number", bool: "truth value", list: "list", tuple: "list"}


def record(values: dict[str, Any], cls: type[T], where: str) -> T:
    """The dataclass `cls` of its fields in `values`; raises ValueError for one that is missing or does not fit."""
    hints, found = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            found[field.name] = typed(values[field.name], hints[field.name], f"{where}: {field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {field.name}")
    return cls(**found)


def whole_number(key: str, where: str) -> int:
    if not key.isdecimal():
        raise ValueError(f"{where} has the key {key[:60]!r}, which is no whole number")
    return int(key)


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line; one that a kill has cut off before it gets its end first. Raises StorageError, and OSError."""
    if path.is_dir():
        put_aside(path)

    def write() -> None:
        with open(path, "ab+") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
            torn = end and file.read(1) != b"\n"
            file.write(("\n" if torn else "").encode() + as_json(line).encode() + b"\n")

    patiently(write, path, ANYWHERE, "written")


def lines_of(path: Path, **needed: Any) -> Lines:
    """The lines whose object has the keys `needed`, with values of these types. A last line that a kill has cut off is
    left out, and is no damage; none where there is no file. Raises StorageError, and Damaged for what is no file."""
    try:
        data = read_bytes(path, largest=None)
    except FileNotFoundError:
        return Lines([], 0)
    except OSError as error:
        raise Damaged(path, error.strerror or error, shell("mv", path, f"{path}.damaged")) from None
    *ended, _ = texts = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    found, damaged = [], 0
    for number, text in enumerate(texts):
        try:
            line = typed(parsed(text.decode()), dict)
            for key, hint in needed.items():
                typed(line[key], hint, key)
            found.append(line)
        except (ValueError, KeyError):
            damaged += bool(text.strip()) and number < len(ended)
    return Lines(found, damaged)


def read_lines(path: Path, **needed: Any) -> list[dict[str, Any]]:
    return lines_of(path, **needed).found


def keep_lines(path: Path, kept: Callable[[dict[str, Any]], bool], **needed: Any) -> int:
    """Drop the other lines, such as those that a killed start wrote after the checkpoint from which the run resumes, and the
    damaged ones, of which NAME.damaged keeps a copy; returns how many those are."""
    if path.is_dir():
        put_aside(path)
        return 1
    found, damaged = lines_of(path, **needed)
    if damaged:
        with whole(aside(path)) as part:
            shutil.copyfile(path, part)
    if path.exists():
        write_text(path, "".join(as_json(line) + "\n" for line in found if kept(line)))
    return damaged


def aside(path: Path) -> Path:
    """Where what is damaged is kept, to be looked at."""
    return path.with_name(f"{path.name}.damaged")


def put_aside(path: Path) -> None:
    """Rename a damaged file, or what stands in a file's place, out of the way."""
    remove(aside(path))
    os.replace(path, aside(path))
