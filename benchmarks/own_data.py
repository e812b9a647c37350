"""Data sets with classes of their own, over seeds, by the plain command: `python benchmarks/own_data.py run photos DIR --weights FILE`.

For each seed a run of `fixres submit --model M --data DIR`; a row in benchmarks/results/own_data.jsonl once it is done, with
its accuracy after stage one at the weights' own size and after fixing. A run that was stopped goes on with the same command,
and a row that stands is not measured again. `python benchmarks/own_data.py table` prints means over seeds.
`benchmarks/picture_sets.py` makes sets.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import git, processor, versions
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predictions import Predictions

ROWS = ROOT / "benchmarks" / "results" / "own_data.jsonl"
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student, two-sided


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def measure(args: argparse.Namespace, seed: int) -> None:
    """One run, and its row."""
    name = re.sub(r"[^\w.=-]+", "_", "-".join([args.kind, *args.settings, f"s{seed}"]))
    key = {"set": args.kind, "model": args.model, "settings": args.settings, "seed": seed, "hardware": processor()}
    if any(key.items() <= row.items() for row in rows()):
        return
    words = ["--model", args.model, "--data", args.folder, "--cluster", "local", "--runs-dir", args.runs_dir]
    words += ["--name", name, "--gpus-per-node", args.ranks, f"run.seed={seed}", *args.settings]
    words += ["--weights", args.weights] if args.weights else []
    run = RunDir(args.runs_dir / name)
    if not run.done.exists():
        subprocess.run([sys.executable, "-m", "fixres_dist", "submit", *map(str, words)], check=True, cwd=ROOT)
    results, config = Results.read(run), run.config()
    assert config.pretrain is not None
    own = config.pretrain.res
    before = run.root / "predictions" / (f"before-{own}.npz" if own != results.res else "before.npz")
    gain = Predictions.read(run.root / "predictions" / "after.npz").gain_over(Predictions.read(before))
    row = {
        **key,
        "train": len(list(Path(args.folder).glob("train/*/*"))),
        "n": results.n,
        "own_res": own,
        "res": results.res,
        "floor": {floor.res: floor.top1 for floor in results.floor},
        "stage_one": results.before_at[own].top1 if own in results.before_at else results.before.top1,
        "before": results.before.top1,
        "after": results.after.top1,
        "gain": gain.delta_top1,
        "ci95": gain.delta_ci95,
        "choice": asdict(results.choice.chosen) if results.choice else None,
        "ranks": args.ranks,
        "commit": git(ROOT, "rev-parse", "HEAD"),
        "versions": versions(),
    }
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def without_hold_out(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a run shares with the plain one of the same set, sizes, seed and processor."""
    shared = tuple(s for s in row["settings"] if not s.startswith("tune.hold_out"))
    return row["set"], row["model"], shared, row["seed"], row["hardware"]


def table() -> None:
    """Means over seeds, the worst seed, and the 95 % interval of the mean gain over seeds (Student's t).

    The gain is that of the run's result over plain stage one on all of train at the weights' own size, of the same seed.
    """
    plain = {without_hold_out(row): row["stage_one"] for row in rows() if "hold_out" not in str(row["settings"])}
    groups = defaultdict(list)
    for row in rows():
        if (start := plain.get(without_hold_out(row))) is not None:
            groups[row["set"], row["model"], " ".join(row["settings"])].append({**row, "gain": row["after"] - start})
    print(
        "| set | settings | train / val | seeds | stage one | same, test size | after | over plain stage one | worst | 95 % of the mean |"
    )
    print("|-|-|-|-|-|-|-|-|-|-|")
    for (kind, _, settings), found in groups.items():
        gains = [row["gain"] for row in found]
        means = [statistics.mean(row[key] for row in found) for key in ("stage_one", "before", "after", "gain")]
        k = len(gains)
        half = T95[k] * statistics.stdev(gains) / math.sqrt(k) if k in T95 else math.nan
        interval = f"{means[3] - half:+.1f} to {means[3] + half:+.1f}" if k in T95 else "one seed"
        cells = [f"{mean:.1f}" for mean in means[:3]] + [f"{means[3]:+.1f}", f"{min(gains):+.1f}", interval]
        counts = f"{found[0]['train']} / {found[0]['n']}"
        sizes = f"{found[0]['own_res']} to {found[0]['res']} px {settings}".strip()
        print(f"| {kind} | {sizes} | {counts} | {k} | {' | '.join(cells)} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("kind", help="the set's name in the table")
    run.add_argument("folder", type=Path)
    run.add_argument("settings", nargs="*", help="section.key=value")
    run.add_argument("--model", default="tf_efficientnet_lite0")
    run.add_argument("--weights", default="")
    run.add_argument("--seeds", default="0,1,2,3,4")
    run.add_argument("--ranks", type=int, default=2)
    run.add_argument("--runs-dir", type=Path, default=Path("runs/own-data").absolute())
    commands.add_parser("table")
    args = p.parse_args()
    if args.command == "table":
        table()
        return
    for seed in map(int, args.seeds.split(",")):
        measure(args, seed)


if __name__ == "__main__":
    main()
