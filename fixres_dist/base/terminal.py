"""What a process prints cannot steer the terminal that shows it, now or from a log: names of files and classes are other people's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from fixres_dist.base.errors import printable


class Escaped:
    """A stream in which signs that do not print are their escapes, and so are those that its encoding does not have.

    Ends of lines and tabs stay, and carriage returns at the ends of what is written at a time, as progress bars write them.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        inner = text.strip("\r")
        start = text[: len(text) - len(text.lstrip("\r"))]
        end = text[len(start) + len(inner) :]
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        kept = "\t".join(map(printable, inner.split("\t")))
        return self.stream.write(start + kept.encode(encoding, "backslashreplace").decode(encoding) + end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def escaping() -> Iterator[None]:
    """What is printed within is escaped."""
    streams = [stream if isinstance(stream, Escaped) else Escaped(stream) for stream in (sys.stdout, sys.stderr)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        yield


def raw(stream: TextIO) -> TextIO:
    """The stream itself, for what steers the terminal on purpose, such as a table in place; its caller escapes names."""
    return stream.stream if isinstance(stream, Escaped) else stream
