"""`fixres board`"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import status

EXAMPLES = ("", "b0-320 b1-384 --port 6007")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "names", nargs="*", metavar="NAME", help="runs, or a grid or table by its name; default: all of them"
    )
    add_runs_dir(p)
    p.add_argument("--port", default="6006", help="default: 6006")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed. Next: pip install tensorboard")
    runs = status.named(args.names, args.runs_dir)
    runs = runs or [run for run in status.every(args.runs_dir) if not run.task]
    if not runs:
        raise UserError(f"no runs in {args.runs_dir}. Next: --runs-dir DIR")
    # A folder of links: one log directory whose runs carry the run names, without the other files beside tb/.
    with tempfile.TemporaryDirectory(prefix="fixres-board-") as folder:
        for run in runs:
            (Path(folder) / run.name).symlink_to((run.root / "tb").resolve())
        print(f"TensorBoard of {', '.join(run.name for run in runs)}; Ctrl-C ends it", flush=True)
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", args.port])
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True
            server.terminate()

        # Own handlers, since a shell starts background commands with SIGINT ignored; TensorBoard ends with this command.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        code = server.wait()
        return EXIT_DONE if stopped else code
