"""Commands in messages, in the form in which the user came: `fixres`, `python -m fixres_dist` or `python launch/NAME.py`."""

from __future__ import annotations

import os
import re
import shlex

# fixres | module | launch. It stands in the environment, so that jobs and local ranks name commands as their user does.
FORM = "FIXRES_COMMAND_FORM"
LAUNCH = ("submit", "status", "logs", "cancel", "resume", "board")  # the commands that launch/ has a file for


def command(name: str, *words: object) -> str:
    """A command line that can be pasted into a shell: `fixres status demo`, every word quoted where it has to be."""
    form = os.environ.get(FORM, "fixres")
    if form == "launch" and name in LAUNCH:
        start = ["python", f"launch/{name}.py"]
    else:
        start = ["fixres", name] if form == "fixres" else ["python", "-m", "fixres_dist", name]
    return shell(*start, *words)


def shell(*words: object) -> str:
    """A command line of other programs: every word quoted where it has to be, such as a path with a space."""
    return shlex.join(map(str, words))


def smaller_batch(line: str, images: int) -> str:
    """The command line again, with `images` in a forward pass instead of what it says."""
    return f"{re.sub(r' run[.]batch_per_device=[^ ]+', '', line)} run.batch_per_device={images}"
