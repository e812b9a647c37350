"""Names that a run may have. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.base.secrets import redacted

LONGEST_NAME = 200  # bytes: file systems take 255, and some files of a run are called by its name and more


def check(root: Path) -> None:
    """Refuse a new run directory whose path a shell, an option parser, Slurm or a file system would take for another."""
    name, path = root.name, str(root.absolute())
    if not name.isprintable() or name != name.strip() or name.startswith(("-", ".")):
        raise UserError(
            f"a run cannot be called {name!r}; accepted: printable characters, no dash or dot in front, no space around. "
            "Next: another --name"
        )
    if redacted(name) != name:
        raise UserError(f"a run cannot be called {name}: it has the form of a secret, and everyone reads names.")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(
            f"the run's name has {len(os.fsencode(name))} bytes; accepted: {LONGEST_NAME}. Next: a shorter --name"
        )
    if not path.isprintable() or "%" in path or "\\" in path:
        raise UserError(
            f"run directory {path!r}: Slurm reads % and backslash in the paths of logs as signs of its own. "
            "Accepted: a path of printable characters without them. Next: another --name or --runs-dir"
        )
