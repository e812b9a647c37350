"""Lists of images to leave out (data.deny_list), as `data verify` and people write them. No torch."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.base.files import lines_of, whole


class Denied(NamedTuple):
    """What a deny list means in one split."""

    denied: frozenset[str] = frozenset()  # names in its index
    unmatched: frozenset[str] = frozenset()  # lines that name none of its images


def names(deny_list: str, split: str, known: Iterable[str]) -> Denied:
    """Which of a split's `known` names the list names; nothing for "".

    A line is a path (absolute, from the data set, from the split, or from elsewhere through a folder of the split's name)
    or a file name that stands once; with / or \\, in quotes or not, in either Unicode form; a tab or ` #` begins a remark.
    Raises UserError for a list that cannot be read, and for a file name that stands in several folders.
    """
    if not deny_list:
        return Denied()
    try:
        lines = lines_of(Path(deny_list))
    except OSError as error:
        raise UserError(
            f"data.deny_list is {deny_list!r}: {error.strerror}. Next: {command('data', 'verify')} writes one."
        ) from None
    exact = set(known)
    composed: dict[str, str] = {}
    by_file: dict[str, list[str]] = {}
    if lines:
        composed = {unicodedata.normalize("NFC", name): name for name in exact if not name.isascii()}
    if any("/" not in line and "\\" not in line for line in lines):
        for name in exact:
            by_file.setdefault(name.rpartition("/")[2], []).append(name)
    denied, unmatched = set(), set()
    for line in lines:
        for path in spellings(line, split):
            spelled = path if path in exact else composed.get(unicodedata.normalize("NFC", path))
            named = [spelled] if spelled else by_file.get(path, [])
            if len(named) > 1:
                raise UserError(
                    f"{deny_list} has {path!r}, which is the name of {len(named)} images, {named[0]} and {named[1]} among "
                    "them. Accepted: a name that stands once, or class/name."
                )
            if named:
                denied.add(named[0])
                break
        else:
            unmatched.add(line)
    return Denied(frozenset(denied), frozenset(unmatched))


def spellings(line: str, split: str) -> Iterator[str]:
    """The names below `split` that a line may mean, the likeliest first."""
    bare = line.partition("\t")[0].strip()
    without_remarks = (bare, bare.rpartition(" #")[0].strip() or bare, bare.partition(" #")[0].strip())
    for text in dict.fromkeys(without_remarks):
        for path in dict.fromkeys((text, text.strip("\"'"), text.strip("\"'").replace("\\", "/"))):
            parts = [part for part in path.split("/") if part not in ("", ".")]
            yield from ("/".join(parts[k + 1 :]) for k, part in enumerate(parts) if part == split)
            if not path.startswith("/"):
                yield "/".join(parts)


def check(deny_list: str, splits: Sequence[Denied]) -> None:
    """Refuse a list of which no line names an image of any of the splits."""
    if splits and all(one.unmatched for one in splits) and not any(one.denied for one in splits):
        raise UserError(
            f"no line of {deny_list} names an image of the data set; one is {min(splits[0].unmatched)!r}. Accepted: "
            f"split/class/file, as {command('data', 'verify')} writes it, class/file, or absolute paths."
        )


def counted(splits: Sequence[Denied]) -> str:
    """`deny list: 3 images left out, 1 line names none (..)`; empty without one."""
    out = sum(len(one.denied) for one in splits)
    lost = frozenset.intersection(*(one.unmatched for one in splits)) if splits else frozenset()
    text = f"; deny list: {out} image(s) left out" if out else ""
    return text + (f", {len(lost)} line(s) name none (such as {min(lost)!r})" if lost else "")


def write(path: Path, found: dict[str, list[tuple[str, str]]]) -> None:
    """Write the (name, reason) pairs of every split as lines of `split/name`, a tab and the reason.

    By rename. Names keep their bytes, whatever their encoding.
    """
    lines = ["# files that cannot be decoded; used by data.deny_list"]
    for split, entries in found.items():
        lines += [f"{split}/{name}\t{' '.join(reason.split())}" for name, reason in entries]
    with whole(path) as part:
        part.write_bytes(b"".join(os.fsencode(line) + b"\n" for line in lines))
