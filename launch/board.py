"""TensorBoard on runs: `python launch/board.py [NAME...] [--port 6006]`."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.base.errors import EXIT_DONE, UserError, exit_code
from fixres_dist.cluster import status


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="runs; default: all of them")
    p.add_argument("--runs-dir", type=Path, default=Path("runs"))
    p.add_argument("--port", default="6006")
    args = p.parse_args()
    return exit_code(lambda: board(args))


def board(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("tensorboard is not installed. Next: make setup")
    runs = [status.find(name, args.runs_dir) for name in args.names] or status.every(args.runs_dir)
    if not runs:
        raise UserError(f"no runs in {args.runs_dir}. Next: --runs-dir DIR")
    # A folder of links: one log directory whose runs carry the run names, and not the other files beside tb/.
    with tempfile.TemporaryDirectory(prefix="fixres-board-") as folder:
        for run in runs:
            (Path(folder) / run.name).symlink_to((run.root / "tb").resolve())
        print(f"TensorBoard of {', '.join(run.name for run in runs)}; Ctrl-C ends it", flush=True)
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", args.port]
        server = subprocess.Popen(command)
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True
            server.terminate()

        # Handlers of our own, since a shell starts background commands with SIGINT ignored; TensorBoard never outlives us.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        code = server.wait()
        return EXIT_DONE if stopped else code


if __name__ == "__main__":
    sys.exit(main())
