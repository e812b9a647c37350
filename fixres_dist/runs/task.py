"""What a job does whose run directory is no training: a command, as it was typed. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fixres_dist.base.commands import command
from fixres_dist.base.files import write_text
from fixres_dist.base.secrets import redacted
from fixres_dist.base.small_files import as_json, read_json


@dataclass(frozen=True)
class Task:
    """A command and its words as they were typed in `folder`, and where its result will be, in words."""

    command: str
    words: tuple[str, ...]
    folder: str
    result: str

    @classmethod
    def read(cls, file: Path) -> Task | None:
        """None where there is no such file."""
        try:
            return read_json(file, cls, "the command again, with --cluster")
        except FileNotFoundError:
            return None

    def write(self, file: Path) -> None:
        text = as_json(asdict(self), indent=1) + "\n"
        write_text(file, text, private=redacted(text) != text)

    def typed(self) -> str:
        """The command line, without secrets."""
        return command(self.command, *map(redacted, self.words))
