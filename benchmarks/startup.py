"""What a login node waits for: CPU and wall time of the commands that load no torch, each in a process of its own.

    python benchmarks/startup.py [--repeat 5]      writes benchmarks/results/startup.json

The commands take turns. CPU time is that of user and system, so other work on the machine hardly counts. The mark is 0.5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import git, processor, versions
from fixres_dist.base.files import write_text
from fixres_dist.cli.main import COMMANDS

MARK_S = 0.5
WHOLE = (
    "--help",
    "submit --list",
    "submit --model l2 --res 600 --nodes 4 --dry-run",
    "submit --table 1 --nodes 4 --dry-run",
    "status",
    "status --json",
    "completion bash",
    "completion zsh",
)
LINES = (*WHOLE, *(f"{name} --help" for name in COMMANDS))


def once(line: str) -> tuple[float, float]:
    """(CPU, wall) seconds of a command; raises if it fails."""
    words = [sys.executable, "-m", "fixres_dist", *line.split()]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    after, wall = os.times(), time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{line}: {done.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system, wall


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--repeat", type=int, default=5, help="turns of each command; default: 5")
    args = p.parse_args()
    for line in LINES:
        once(line)  # compiles bytecode, fills the page cache
    taken = [{line: once(line) for line in LINES} for _ in range(args.repeat)]
    rows = []
    for line in LINES:
        cpu, wall = (sorted(turn[line][k] for turn in taken) for k in (0, 1))
        rows.append({"command": line, "cpu_s": round(median(cpu), 3), "wall_s": round(median(wall), 3)})
        print(
            f"{rows[-1]['cpu_s']:6.2f} s CPU {rows[-1]['wall_s']:6.2f} s  {'slow  ' * (rows[-1]['cpu_s'] > MARK_S)}fixres {line}"
        )
    found = {
        "command": "python benchmarks/startup.py",
        "n": args.repeat,
        "hardware": processor(),
        "versions": versions(),
    }
    found |= {"commit": git(ROOT, "rev-parse", "HEAD"), "load": os.getloadavg(), "rows": rows}
    write_text(ROOT / "benchmarks" / "results" / "startup.json", json.dumps(found, indent=1) + "\n")
    return int(any(row["cpu_s"] > MARK_S for row in rows))


if __name__ == "__main__":
    sys.exit(main())
