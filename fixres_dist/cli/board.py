"""`fixres board`"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from fixres_dist.base.commands import shell
from fixres_dist.base.errors import EXIT_DONE, StorageError, UserError
from fixres_dist.base.files import owner
from fixres_dist.cli.arguments import add_runs_dir
from fixres_dist.cluster import status
from fixres_dist.runs.rundir import RunDir

EXAMPLES = ("", "b0-320 b1-384 --port 6007", "--host 0.0.0.0    # for other machines too; there is no password")
LOOK_EVERY_S = 5.0  # for runs that have started since


def add_arguments(p: argparse.ArgumentParser) -> None:
    text = "runs, or a grid or table by its name; default: all of them, and those that start later"
    p.add_argument("names", nargs="*", metavar="NAME", help=text)
    add_runs_dir(p)
    p.add_argument("--port", default="6006", help="default: 6006")
    p.add_argument("--host", default="localhost", help="where it listens; default: localhost, this machine alone")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed. Next: pip install tensorboard")
    runs = shown(args)
    if not runs:
        raise UserError(f"no runs in {args.runs_dir}. Next: --runs-dir DIR")
    # A folder of links: one log directory whose runs carry the run names, without the other files beside tb/.
    with tempfile.TemporaryDirectory(prefix="fixres-board-") as folder:
        link(runs, Path(folder))
        print(f"TensorBoard of {', '.join(run.name for run in runs)}; Ctrl-C ends it", flush=True)
        print(address(args.host, args.port, owner(Path(folder))), flush=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", args.host, "--port", args.port]
        )
        stopped = threading.Event()

        def stop(*_: object) -> None:
            stopped.set()
            server.terminate()

        def look() -> None:
            while not stopped.wait(LOOK_EVERY_S):
                with contextlib.suppress(UserError, StorageError, OSError):  # a run that was deleted
                    link(shown(args), Path(folder))

        # Own handlers, since a shell starts background commands with SIGINT ignored; TensorBoard ends with this command.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        code = server.wait()
        by_hand = stopped.is_set()
        stopped.set()
        looking.join()
        return EXIT_DONE if by_hand else code


def shown(args: argparse.Namespace) -> list[RunDir]:
    return status.named(args.names, args.runs_dir) or [run for run in status.every(args.runs_dir) if not run.task]


def link(runs: list[RunDir], folder: Path) -> None:
    """A link in `folder` for each run that has none there."""
    for run in runs:
        if not (folder / run.name).is_symlink():
            (folder / run.name).symlink_to((run.root / "tb").resolve())


def address(host: str, port: str, user: str) -> str:
    """How to open it in the browser of one's own machine."""
    here = socket.gethostname()
    if host not in ("localhost", "127.0.0.1", "::1"):
        return (
            f"open http://{here if host in ('0.0.0.0', '::') else host}:{port}: everyone who reaches this machine can"
        )
    tunnel = shell("ssh", "-N", "-L", f"{port}:localhost:{port}", f"{user}@{here}")
    return f"from another machine: {tunnel}, then http://localhost:{port} there"
