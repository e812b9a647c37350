"""The one exception a user is meant to see, and the help it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE, EXIT_FAILED, EXIT_USER = 0, 1, 2


class UserError(Exception):
    """A mistake the user can mend: one message with the value seen, what is accepted and the next command.

    Commands print it without a traceback and exit with 2.
    """


def unknown(kind: str, value: object, accepted: Iterable[str], hint: str = "") -> UserError:
    """A refusal of `value` that names the nearest accepted spelling first.

    Matching ignores case, so `B0` is answered with `b0`.
    """
    names = list(accepted)
    folded = {name.lower(): name for name in names}
    near = [folded[match] for match in difflib.get_close_matches(str(value).lower(), folded, n=1, cutoff=0.5)]
    text = f"unknown {kind} {str(value)!r}."
    if near:
        text += f" Did you mean {near[0]!r}?"
    text += f" Accepted: {', '.join(names)}." if 0 < len(names) <= 24 else ""
    return UserError(f"{text} {hint}".rstrip())
