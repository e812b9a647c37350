"""A rank's log: `python launch/logs.py NAME [--rank K] [--follow]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.base.errors import EXIT_DONE, UserError, exit_code
from fixres_dist.cluster import status
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import UNFINISHED


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("name", metavar="NAME")
    p.add_argument("--rank", type=int, default=0)
    p.add_argument("--follow", action="store_true", help="go on until the run ends; Ctrl-C leaves the run alone")
    p.add_argument("--runs-dir", type=Path, default=Path("runs"))
    args = p.parse_args()
    try:
        return exit_code(lambda: show(status.find(args.name, args.runs_dir), args.rank, args.follow))
    except (KeyboardInterrupt, BrokenPipeError):
        return EXIT_DONE


def show(run: RunDir, rank: int, follow: bool) -> int:
    """Both streams of a rank, what was written meanwhile included; over requeues, whose logs are appended."""
    shown: dict[Path, int] = {}
    told_waiting = False
    while True:
        ended = status.rows([run])[0].state not in UNFINISHED
        logs = status.logs(run)
        ranks = sorted({number for number, _ in logs})
        if logs and rank not in ranks:
            raise UserError(f"{run.name} has no rank {rank}; accepted: {ranks[0]} .. {ranks[-1]}.")
        if not logs and (ended or not follow):
            raise UserError(f"{run.name} has no log yet. Next: {run.command('status')}")
        if not logs and not told_waiting:
            print(f"{run.name} has not started yet: waiting", file=sys.stderr)
            told_waiting = True
        for stream, out in (("err", sys.stderr), ("out", sys.stdout)):
            if file := logs.get((rank, stream)):
                with open(file, errors="replace") as text:
                    text.seek(shown.get(file, 0))
                    out.write(text.read())
                    out.flush()
                    shown[file] = text.tell()
        if ended or not follow:
            return EXIT_DONE
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
