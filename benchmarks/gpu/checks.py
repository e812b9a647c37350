"""What an owner wants to know first on a GPU: does a run train there, stop and resume exactly, and how fast is a step?

    python benchmarks/gpu/checks.py --json checks.json          # within --seconds
    python benchmarks/gpu/checks.py --cpu --json checks.json    # every section at tiny sizes, without a GPU

Each section has its share of the time, and a failure costs only its section, or its row where there are rows. The JSON is
written after every row; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import runs, speeds
from benchmarks.gpu.section import Section
from fixres_dist.base.environment import versions
from fixres_dist.base.errors import EXIT_DONE, EXIT_FAILED
from fixres_dist.base.files import write_text
from fixres_dist.bench.result import hardware

# Seconds of each, which --seconds scales, in the order of what an owner wants first.
SECTIONS: dict[str, tuple[float, Callable[[Section], dict[str, Any]]]] = {
    "nccl": (15, runs.nccl),
    "train": (80, runs.train),
    "resume": (80, runs.resume),
    "speed": (130, speeds.speed),
    "memory": (40, speeds.memory),
    "compiled": (60, speeds.compiled),
    "loss_scale": (30, runs.loss_scale),
    "cached": (40, runs.cached),
    "bad_file": (25, runs.bad_file),
    "apex": (15, speeds.apex),
    "end_to_end": (100, speeds.end_to_end),
    "tests": (90, runs.tests),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="every section at tiny sizes on the CPU")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"default: {','.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all of them; default: 520")
    parser.add_argument("--backend", default="auto", choices=("auto", "dali", "torch"), help="data.backend of the runs")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="for the runs")
    args = parser.parse_args()
    chosen = args.sections.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(unknown)}; accepted: {', '.join(SECTIONS)}")
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here; --cpu runs every section at tiny sizes")
    command = " ".join(["python benchmarks/gpu/checks.py", *sys.argv[1:]])
    sections: dict[str, dict[str, Any]] = {}
    result = {"command": command, "hardware": hardware(), "versions": versions(), "sections": sections}

    def save(name: str, found: dict[str, Any]) -> None:
        sections[name] = found
        write_text(args.json, json.dumps(result, indent=1) + "\n")

    share, end = args.seconds / sum(SECTIONS[name][0] for name in chosen), time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            seconds, measure = SECTIONS[name]
            started = time.monotonic()
            (folder := Path(scratch) / name).mkdir()
            until = min(end, started + share * seconds)
            section = Section(name, args.cpu, [f"data.backend={args.backend}", *args.set], folder, until, save)
            try:
                found = measure(section)
            except Exception as error:
                traceback.print_exc()
                found = {**sections.get(name, {}), "failed": f"{type(error).__name__}: {error}"}
            save(name, {**found, "seconds": round(time.monotonic() - started, 1)})
            print(f"{name}: {json.dumps(sections[name])[:900]}", flush=True)
    broken = [name for name, found in sections.items() if found.get("failed")]
    print(f"written to {args.json}" + (f"; not complete: {', '.join(broken)}" if broken else ""))
    return EXIT_FAILED if broken else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
