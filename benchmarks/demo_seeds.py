"""The built-in example over several seeds: `python benchmarks/demo_seeds.py --seeds 0,1,2`.

For each seed: train at 128 px, fix at 192 px, fix at 128 px (the control), sweep. Prints a table and writes JSON with the
hardware and versions. Nothing is skipped that already stands in --runs-dir: a finished run is not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import git, processor, versions

SIZES = "96,128,160,192,224,256"


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=ROOT)


def one(seed: int, runs: Path) -> dict[str, object]:
    submit = [
        "launch/submit.py",
        "--data",
        "demo",
        "--runs-dir",
        runs,
        "--cluster",
        "local",
        "--gpus-per-node",
        1,
        f"run.seed={seed}",
    ]
    name, control = f"seed{seed}", f"seed{seed}-control"
    started = time.monotonic()
    call(*submit, "--name", name)
    call(*submit, "--name", control, "--weights", runs / name / "pretrained.safetensors", "--res", 128, "pretrain=none")
    call("-m", "fixres_dist", "sweep", "--run", runs / name, "--also", f"control={runs / control}", "--res", SIZES)
    sweep = json.loads((runs / name / "sweep.json").read_text())
    best = {label: max(curve.values(), key=lambda s: s["top1"])["top1"] for label, curve in sweep["curves"].items()}
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "best_top1": best,
        "best_res": sweep["best_res"],
        "best_after_minus_best_before": sweep["best_after_minus_best_before"],
        "best_after_minus_best_control": sweep["best_after_minus_best_control"],
        "curves": sweep["curves"],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--runs-dir", type=Path, default=Path("runs/demo-seeds").absolute())
    p.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "demo_seeds.json")
    args = p.parse_args()
    rows = [one(int(seed), args.runs_dir.absolute()) for seed in args.seeds.split(",")]
    result = {
        "command": "python benchmarks/demo_seeds.py --seeds " + args.seeds,
        "commit": git(ROOT, "rev-parse", "HEAD"),
        "hardware": processor(),
        "versions": versions(),
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(json.dumps({k: v for k, v in row.items() if k != "curves"}))


if __name__ == "__main__":
    main()
