"""What the gain is made of: `python benchmarks/ablation.py --seeds 0,1,2` (policy x transform x BN statistics, built-in example).

Each seed's stage one is run once (or taken from benchmarks/demo_seeds.py, which names its runs alike); every row then
fixes the same pretrained weights at 192 px. Finished runs are not run again. Prints docs/method.md's table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import git, processor, versions
from fixres_dist.cli import main as fixres
from fixres_dist.runs.rundir import RunDir

# policy, transform, BN statistics, epochs averaged
ROWS = [
    ("classifier", "test_aug", "exact", 0),
    *(
        (p, t, s, 0)
        for p in ("classifier+bn_stats", "classifier+bn")
        for t in ("test", "test_aug")
        for s in ("exact", "ema")
    ),
    ("classifier+bn", "random_resized_crop", "exact", 0),
    ("classifier+bn+conv_head", "test_aug", "exact", 0),
    ("last_block", "test_aug", "exact", 0),
    ("classifier+bn", "test_aug", "exact", 2),
]
DEFAULT = ("classifier+bn", "test_aug", "exact", 0)  # the recipe: the seed's own run


def submit(*arguments: object) -> None:
    """`fixres submit` in this process: loading torch for each of forty runs would take minutes."""
    if fixres.main(["submit", *map(str, arguments), "--cluster", "inline"]) != 0:
        raise SystemExit(f"stopped in {arguments}; the same command goes on from here")


def fixed(seed: int, row: tuple[str, str, str, int], runs: Path, data: str, overrides: list[str]) -> float:
    """The gain in top-1 points of one row from one seed's pretrained weights, before against after at the fixed size."""
    policy, transform, stats, averaged = row
    base = ["--model", "demo", "--data", data, "--runs-dir", runs]
    keys = [f"run.seed={seed}", *overrides]
    name = f"seed{seed}"
    if row != DEFAULT:
        name = f"seed{seed}-{policy}-{transform}-{stats}" + (f"-mean{averaged}" if averaged else "")
        base += ["--weights", runs / f"seed{seed}" / "pretrained.safetensors"]
        keys = [k for k in keys if not k.startswith("pretrain.")] + ["pretrain=none", f"tune.average_epochs={averaged}"]
        keys += [f"tune.policy={policy}", f"data.train_transform={transform}", f"tune.bn_stats={stats}"]
    if not RunDir(runs / name).done.exists():
        submit(*base, "--name", name, *keys)
    return float(json.loads(RunDir(runs / name).results.read_text())["delta_top1"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", default="0,1,2")
    p.add_argument("--runs-dir", type=Path, default=ROOT / "runs" / "demo-seeds")
    p.add_argument("--data", default="demo")
    p.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "ablation.json")
    p.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for every run, to try this script quickly"
    )
    args = p.parse_args()
    started, seeds, rows = time.monotonic(), [int(seed) for seed in args.seeds.split(",")], []
    for row in [DEFAULT, *(row for row in ROWS if row != DEFAULT)]:
        gains = [fixed(seed, row, args.runs_dir.absolute(), args.data, args.overrides) for seed in seeds]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        names = ("policy", "transform", "bn_stats", "average_epochs")
        rows.append(
            {**dict(zip(names, row, strict=True)), "gains": gains, "mean": statistics.mean(gains), "error": error}
        )
    result = {
        "command": " ".join(["python benchmarks/ablation.py --seeds", args.seeds, *args.overrides]),
        "commit": git(ROOT, "rev-parse", "HEAD"),
        "hardware": processor(),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("| policy | transform | BN statistics | gain, points | by seed |\n|---|---|---|---|---|")
    for row in sorted(
        rows, key=lambda row: ROWS.index((row["policy"], row["transform"], row["bn_stats"], row["average_epochs"]))
    ):
        averaged = f", mean of {row['average_epochs']} epochs" if row["average_epochs"] else ""
        error = f" ± {row['error']:.2f}" if row["error"] is not None else ""
        stats = "-" if row["policy"] == "classifier" else row["bn_stats"]
        gains = ", ".join(f"{gain:+.2f}" for gain in row["gains"])
        print(f"| {row['policy']}{averaged} | {row['transform']} | {stats} | {row['mean']:+.2f}{error} | {gains} |")


if __name__ == "__main__":
    main()
