"""The commands in this process, and the smallest run that they make: seconds instead of a process each."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Iterator

from fixres_dist.cli.main import main

SETTINGS = (
    *("--model", "test_efficientnet", "--res", "64", "--weights", "none", "--cluster", "inline", "--name", "r"),
    *("tune.global_batch=4", "tune.epochs=2", "run.log_every=1", "run.save_every_s=0", "run.record_samples=true"),
    *("data.workers=0", "run.precision=fp32", "run.memory_format=auto", "run.engine=stream", "data.on_bad=skip"),
)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """The signal handlers of before are back at the end: a run in this process sets its own."""
    kept = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler != signal.getsignal(number):
                signal.signal(number, handler)


def called(*words: object) -> tuple[int, str]:
    """(exit code, all that was printed) of a command in this process; a traceback is the exception itself."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(list(map(str, words)))
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, said.getvalue()
