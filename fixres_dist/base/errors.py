"""The one exception a user is meant to see, the help it carries, and the exit codes of commands."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fixres_dist.base.files import no_room
from fixres_dist.base.memory import does_not_fit
from fixres_dist.base.secrets import redacted

EXIT_DONE, EXIT_FAILED, EXIT_USER = 0, 1, 2
AWAY = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ETIMEDOUT, errno.EREMOTEIO)
REFUSED = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)  # places that were given
IMPOSSIBLE = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)  # the same


class UserError(Exception):
    """A mistake the user can mend: one message with the value seen, what is accepted and the next command.

    Commands print it without a traceback and exit with 2. What a file or a library said within it cannot steer the
    terminal: characters that do not print are escaped. It ends in logs and reports: secrets are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(printable(message)))


def printable(text: str) -> str:
    """`text` with characters that do not print as their escapes, such as a terminal's; ends of lines stay."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


class StorageError(Exception):
    """A file system that does not answer: nothing is wrong with the file, and a retry may help. The text names the file.

    No OSError: those of a picture are reasons to leave it out.
    """


def exit_code(work: Callable[[], int]) -> int:
    """The exit code of a command: a mistake, a full disk or memory, or a forbidden place is a line on stderr, all else keeps its
    traceback."""
    try:
        return work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except StorageError as error:
        print(f"error: {error}. Next: the same command, when it is back.", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if full := no_room(error):
            print(f"error: {full}. Next: make room, then the same command.", file=sys.stderr)
            return EXIT_FAILED
        said = f"{error.strerror}: {error.filename2 or error.filename}"
        # One file that is missing is our mistake; where its folder is missing too, that has vanished.
        vanished = error.errno == errno.ENOENT and not os.path.isdir(os.path.dirname(str(error.filename)) or ".")
        if error.filename and (error.errno in AWAY or vanished):
            print(f"error: {said}. Next: the same command, when its file system is back.", file=sys.stderr)
            return EXIT_FAILED
        if not (error.filename and (isinstance(error, REFUSED) or error.errno in IMPOSSIBLE)):
            raise
        print(f"error: {said}. Accepted: a place that this user may read and write.", file=sys.stderr)
        return EXIT_USER
    except Exception as error:
        if not does_not_fit(error):
            raise
        smaller = "a smaller size, or fewer pictures at a time (run.batch_per_device=1)"
        print(f"error: memory ran out: {first_line(error)}. Next: {smaller}.", file=sys.stderr)
        return EXIT_FAILED


def only_prints(work: Callable[[], int]) -> int:
    """The exit code of `work`, which changes nothing: Ctrl-C and a reader that has seen enough, as `head`, may end it."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_DONE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the text that is left must not fail at exit
        return EXIT_DONE


def first_line(error: Exception) -> str:
    """Of the error's message; its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_output(file: Path | None) -> None:
    """Refuse a file to write to before the work that it is for."""
    if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise UserError(f"{file} cannot be written. Accepted: a file in a folder that is there, and writable.")


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
