"""Tables of what was measured."""

from __future__ import annotations

from typing import Any

from fixres_dist.figures import Table
from fixres_dist.rundir import RunDir


def sweep_table(table: Table) -> str:
    """Top-1 by resolution, one column per set of weights."""
    labels = list(table)
    rows = ["test px " + "".join(f"{label:>12}" for label in labels)]
    for res in next(iter(table.values())):
        rows.append(f"{res:>7} " + "".join(f"{table[label][res]['top1']:>12.2f}" for label in labels))
    return "\n".join(rows)


def sweep_board(table: Table, run: RunDir) -> None:
    """eval_by_res/top1 in the run's TensorBoard: one sub-run per curve, the resolution as the step."""
    from fixres_dist.tracking import write_curve

    for label, curve in table.items():
        write_curve(run, label, "eval_by_res/top1", {res: s["top1"] for res, s in curve.items()})


def evaluation_lines(model: str, result: dict[str, Any]) -> list[str]:
    """One evaluated set (evaluate.describe) in words: its numbers, the gain, and where accuracy is low and high."""
    labels = [label for label in ("before", "after", "checkpoint", "softmax") if label in result]
    of = result["classes"]
    k, total = of["of_set"], of["of_model"]
    lines = [] if k == total else [f"{result['set']}: logits restricted to its {k} of {total} classes"]
    at = f"{model} at {result['res']} px on {result['set']}" if result["res"] else f"{model} on {result['set']}"
    for label in labels:
        s = result[label]
        calibration = f"ECE {s['ece']:.2f} | " if "ece" in s else ""
        who = f"{at}, {label}" if label in ("before", "after") else at
        lines.append(
            f"{who}: top-1 {s['top1']:.2f} | top-5 {s['top5']:.2f} | loss {s['loss']:.4f} | {calibration}n {s['n']}"
        )
    if "delta_top1" in result:
        lines.append(f"  gain {gain(result)}")
    if real := result.get("real"):
        scores = ", ".join(f"{real[label]:.2f} {label}" for label in labels)
        lines.append(
            f"  by ReaL labels: top-1 {scores}, n {real['n']}"
            + (f"; gain {gain(real)}" if "delta_top1" in real else "")
        )
    last = labels[-1]
    ranked = sorted((row[last], name) for name, row in result["by_class"].items() if row["n"])
    for text, rows in (("worst", ranked[:3]), ("best", ranked[::-1][:3])):
        lines.append(f"  {text} classes: " + ", ".join(f"{name} {share:.1f}" for share, name in rows))
    if sizes := result.get("by_size"):
        lines.append(
            "  by apparent size: "
            + ", ".join(f"{r['from_px']:.0f}-{r['to_px']:.0f} px {r[last]:.1f}" for r in sizes if r["n"])
        )
    return lines


def gain(result: dict[str, Any]) -> str:
    low, high = result["delta_ci95"]
    return f"{result['delta_top1']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, paired)"
