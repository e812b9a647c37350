"""Tables of what was measured."""

from __future__ import annotations

from typing import Any

from fixres_dist.publishing.figures import Table


def sweep_table(table: Table, costs: dict[int, dict[str, float]]) -> str:
    """Top-1 by resolution, one column per set of weights, and what an image costs there."""
    labels = list(table)
    rows = ["test px " + "".join(f"{label:>12}" for label in [*labels, "GMACs", "images/s"])]
    for res, cost in costs.items():
        scores = "".join(f"{table[label][res]['top1']:>12.2f}" for label in labels)
        rows.append(f"{res:>7} {scores}{cost['gmacs']:>12.3g}{cost['images_per_second']:>12.0f}")
    return "\n".join(rows)


def best_lines(summary: dict[str, Any], gains: dict[str, dict[str, Any]]) -> list[str]:
    """The best resolution of each curve, under the limits asked for too, and what fixing gains between the best ones."""
    table, best = summary["curves"], summary["best_res"]

    def named(found: dict[str, Any]) -> str:
        return ", ".join(f"{k} {res} px ({table[k][res]['top1']:.2f})" for k, res in found.items())

    lines = [f"best resolution: {named(best)}"]
    if limit := summary.get("limit"):
        texts = {"max_gmacs": "at most {:g} GMACs", "min_images_per_second": "at least {:g} images/s"}
        asked = " and ".join(text.format(limit[key]) for key, text in texts.items() if limit[key] is not None)
        none = None in limit["best_res"].values()
        lines.append(f"best with {asked}: {'none of these resolutions' if none else named(limit['best_res'])}")
    for label, row in gains.items():
        what = {"delta_top1": row["points"], "delta_ci95": row["ci95"]}
        lines.append(
            f"best after fixing ({best['after']} px) minus best {label} ({best[label]} px): {gain(what)}, n {row['n']}"
        )
    return lines


def activation_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Statistics of the pooled features; shift and distance from the first row, which is what training showed."""
    lines = [
        f"{'pooled features':<20}" + "".join(f"{x:>11}" for x in ("mean", "std", "near zero", "shift", "distance"))
    ]
    for r in rows:
        name = f"{r['weights']}, {r['res']} px"
        lines.append(
            f"{name:<20}{r['mean']:>11.4f}{r['std']:>11.4f}{r['near_zero_percent']:>9.1f} %"
            f"{r['channel_shift']:>11.3f}{r['distance']:>11.3f}"
        )
    return [
        *lines,
        "(shift of a channel's mean and distance of its distribution from training's, in standard deviations)",
    ]


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
    return lines


def gain(result: dict[str, Any]) -> str:
    low, high = result["delta_ci95"]
    return f"{result['delta_top1']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, paired)"
