"""Numbers as people write and read them (times, sizes in bytes, resolutions), and the tables they stand in. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError, printable

BAR = r"\|"
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%)?")


def duration(seconds: float) -> str:
    """`2h14m`, `3m05s`, `41s`."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def parse_sizes(text: str) -> list[int]:
    """Test resolutions as given to --res."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--res is {text!r}; accepted: whole numbers of pixels, such as 224 or 224,256,288.") from None
    if min(sizes) < 32:
        raise UserError(f"--res {min(sizes)} is below 32 px, the models' stride; accepted: 32 or more.")
    return sizes


def parse_size(text: str | None) -> int | None:
    """The one test resolution of a command that takes one; None: the run's."""
    sizes = parse_sizes(text) if text else [None]
    if len(sizes) > 1:
        raise UserError(f"--res is {text!r}; accepted: one resolution here. Next: {command('sweep')} for several.")
    return sizes[0]


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def decision(name: str, value: Mapping[str, object]) -> str:
    """What was decided, as a line of the log: `trunk at 64 px: memory format contiguous; ms per image: contiguous 3.19`.

    A key that the name begins with, and the reason's (`why`), are not repeated; what is not so is left out.
    """
    chosen, because = [], []
    for key, one in value.items():
        words = key.replace("_", " ")
        if isinstance(one, dict):
            because.append(
                f"{words}: " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in one.items())
            )
        elif key == "why":
            because.append(str(one))
        elif one is not False:
            chosen.append(words if one is True else str(one) if name.startswith(words) else f"{words} {one}")
    return f"{name}: {'; '.join([', '.join(chosen), *because])}"


def one_line(cell: object) -> str:
    """What a cell of a table says: names and reasons from damaged files may hold ends of lines, and signs for terminals."""
    return "" if cell is None else printable(str(cell)).replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for the console: one line per row, columns aligned, those that hold only numbers to the right.

    Cells are printed by `str`, so the caller formats numbers; None is an empty cell. Without rows, only the head.
    """
    lines = [[str(cell) for cell in head], *([one_line(cell) for cell in row] for row in rows)]
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        filled = [cell for cell in column[1:] if cell]
        to_right = bool(filled) and all(NUMBER.fullmatch(cell) for cell in filled)
        columns.append([cell.rjust(width) if to_right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The same in markdown; a bar inside a cell is escaped."""

    def line(row: Sequence[object]) -> str:
        return f"| {' | '.join(one_line(cell).replace('|', BAR) for cell in row)} |"

    return "\n".join([line(head), f"|{'-|' * len(head)}", *map(line, rows)])
