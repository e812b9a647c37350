"""The commands in this process, and the smallest run that they make: seconds instead of a process each."""

from __future__ import annotations

import contextlib
import io

from fixres_dist.cli.main import main

SETTINGS = (
    *("--model", "test_efficientnet", "--res", "64", "--weights", "none", "--cluster", "inline", "--name", "r"),
    *("tune.global_batch=4", "tune.epochs=2", "run.log_every=1", "run.save_every_s=0", "run.record_samples=true"),
    *("data.workers=0", "run.precision=fp32", "run.memory_format=auto", "run.engine=stream", "data.on_bad=skip"),
)


def called(*words: object) -> tuple[int, str]:
    """(exit code, all that was printed) of a command in this process; a traceback is the exception itself."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(list(map(str, words)))
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, said.getvalue()
