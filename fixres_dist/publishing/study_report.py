"""The report of a study: what is best at each cost in words and tables, every point, and what the numbers allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fixres_dist.base.text import markdown_table, table
from fixres_dist.evaluation import sweep
from fixres_dist.evaluation.sweep import Limit
from fixres_dist.publishing.figures import (
    BLUE,
    GREY,
    INCHES,
    MARK,
    OTHERS,
    SIGNS,
    TOP1,
    as_text,
    figure,
    interval,
    spread,
)
from fixres_dist.publishing.html_page import verbatim
from fixres_dist.publishing.study import CostOf, Point, Study, choices, front, multiply_adds, seconds_per_image

PICTURES = {
    "resolution.png": "top-1 against test resolution, before and after fixing",
    "gmacs.png": "top-1 against multiply-adds, with the Pareto front",
    "speed.png": "top-1 against measured images per second, with the Pareto front",
}


def draw(study: Study, limit: Limit, folder: Path) -> None:
    """The PICTURES of what is finished, and measured."""
    if not study.points:
        return
    plot(study.points, lambda p: p.res, "test resolution (px)", folder / "resolution.png")
    best = front(study.points, multiply_adds)
    label = "multiply-adds of a picture (billions)"
    plot(study.points, multiply_adds, label, folder / "gmacs.png", best, limit.max_gmacs)
    if measured := [p for p in study.points if p.images_per_second]:
        best, least = front(measured, seconds_per_image), limit.min_images_per_second
        plot(measured, images_per_second, "images per second", folder / "speed.png", best, least)


def plot(
    points: Sequence[Point], x: CostOf, x_label: str, file: Path, best: Sequence[Point] = (), limit: float | None = None
) -> None:
    """Top-1 with 95 % intervals against `x`: a colour and a marker for each model, hollow and dashed before fixing.

    `best`: the Pareto front, cheapest first. `limit`: the value of `x` up to which, or from which on, points are allowed.
    """
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.model, point.when), []).append(point)
    models = list(dict.fromkeys(model for model, _ in curves))
    beside = len(curves) > 4  # the legend
    with figure(file, f"top-1 against {x_label}", (8.5, 4.0) if beside else INCHES) as (axes,):
        if best:
            rises = x(best[0]) <= x(best[-1])  # a cost; a speed falls along the front
            band: dict[str, Any] = {"color": GREY, "lw": 5, "alpha": 0.4, "label": "Pareto front"}
            axes.step([x(p) for p in best], [p.top1 for p in best], where="post" if rises else "pre", **band)
        for i, ((model, when), curve) in enumerate(curves.items()):
            k, curve = models.index(model), sorted(curve, key=x)
            # Beside each other on the axis of resolutions, where the bars of all curves would stand on each other.
            aside = 0 if best else (i - (len(curves) - 1) / 2) * 0.004 * max(map(x, points))
            bars = np.array([interval(p.top1, int(p.predictions.counted.sum())) for p in curve]).T
            colour = (BLUE, *OTHERS)[k % (1 + len(OTHERS))]
            look: dict[str, Any] = {"color": colour, "marker": f"o{SIGNS}"[k % 9], "capsize": 2, "elinewidth": 0.8}
            # A ring and a dot, of which both are seen where fixing changes nothing.
            look |= {"ls": "-", "ms": 4, "zorder": 3} if when == "after" else {"ls": "--", "ms": 7, "mfc": "white"}
            label = as_text(f"{model}, {when} fixing")
            axes.errorbar([x(p) + aside for p in curve], [p.top1 for p in curve], bars, lw=1.3, label=label, **look)
        if limit is not None:
            axes.axvline(limit, color=GREY, lw=0.8, ls=":")
            axes.annotate("limit", (limit, 0.02), **MARK)
        axes.set(xlabel=x_label, ylabel=f"{TOP1}, 95 % intervals")
        if best:
            spread(axes, [x(p) for p in points])
        else:
            axes.set_xticks(sorted({round(x(p)) for p in points}))
        if beside:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def images_per_second(point: Point) -> float:
    return point.images_per_second or 0.0


def markdown(name: str, study: Study, limit: Limit, how_measured: str) -> str:
    """report.md of the study `name`. `how_measured`: its images/s, in words."""
    text = [f"# {verbatim(name)}: accuracy against resolution and cost", ""]
    if not study.points:
        return "\n".join([*text, "No point is finished yet.", "", *unfinished(study)])
    text += [
        f"{len(study.points)} points on {study.n:,} validation images of {verbatim(study.data)}. Intervals are 95 %; "
        "differences are paired image by image.",
        "",
        *(line for note in study.notes for line in (f"**Note:** {verbatim(note)}", "")),
    ]
    text += unfinished(study)
    if limit != Limit():
        text += [f"**{verbatim(line)}**\n" for line in within(study, limit)]
    text += [f"![{PICTURES['resolution.png']}](resolution.png)", ""]
    text += ["## Best at each number of multiply-adds", "", f"![{PICTURES['gmacs.png']}](gmacs.png)", ""]
    text += [best_markdown(study.points, multiply_adds), ""]
    if study.measured:
        text += ["## Best at each speed", "", f"![{PICTURES['speed.png']}](speed.png)", ""]
        text += [best_markdown(study.points, seconds_per_image), "", how_measured, ""]
    text += ["## Every point", "", point_table(study), "", *reading_it(study)]
    return "\n".join(text)


def speed(point: Point) -> str:
    return f"{point.images_per_second:,.0f}" if point.images_per_second else ""


def accuracy(point: Point) -> str:
    low, high = point.ci95
    return f"{point.top1:.2f} ({low:.2f} to {high:.2f})"


def best_table(points: Sequence[Point], cost: CostOf) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """(head, rows): the best point from each cost on."""
    by_speed = cost is seconds_per_image
    head = "up to images/s" if by_speed else "from G multiply-adds"
    rows: list[tuple[object, ...]] = []
    for choice in choices([p for p in points if cost(p) < math.inf], cost):
        best = choice.best
        cells = (best, accuracy(best), choice.over_cheaper, choice.as_good)
        rows.append((speed(best) if by_speed else f"{best.gmacs:.3g}", *cells))
    return (head, "best", "top-1 (95 %)", "over the line above (paired 95 %)", "cheaper, not told apart"), rows


def best_markdown(points: Sequence[Point], cost: CostOf) -> str:
    head, rows = best_table(points, cost)
    return markdown_table(head, [["" if cell is None else verbatim(cell) for cell in row] for row in rows])


def console(study: Study, limit: Limit) -> str:
    """What the command prints at its end."""
    lines = [table(*best_table(study.points, multiply_adds))] if study.points else ["no point is finished yet"]
    lines += within(study, limit) if study.points and limit != Limit() else []
    lines += [f"{one['name']} is {one['state']}: {one['reason'] or 'not started'}" for one in study.unfinished]
    return "\n".join(lines)


def point_table(study: Study) -> str:
    gains = {(after.model, after.res): gain for _, after, gain in study.gains()}
    on_front = {id(point) for point in front(study.points, multiply_adds)}
    speeds = ["images/s"] if study.measured else []
    head = (
        "model",
        "px",
        "G multiply-adds",
        *speeds,
        "fixing",
        "top-1 (95 %)",
        "gain of fixing (paired 95 %)",
        "on the front",
        "run",
    )
    rows = [
        (
            *(verbatim(p.model), p.res, f"{p.gmacs:.3g}", *([speed(p)] if speeds else []), p.when, accuracy(p)),
            *(
                gains[p.model, p.res] if p.when == "after" else "",
                "yes" if id(p) in on_front else "",
                verbatim(p.run.name),
            ),
        )
        for p in study.points
    ]
    return markdown_table(head, rows)


def within(study: Study, limit: Limit) -> list[str]:
    """The best point that the limit allows, and the cheapest one that is not told apart from it, in sentences."""
    allowed = [p for p in study.points if limit.allows(sweep.Cost(p.gmacs, images_per_second(p)))]
    if not allowed:
        cheapest = min(study.points, key=multiply_adds)
        return [f"No point is within {limit}: the cheapest has {cheapest.gmacs:.3g} GMACs."]
    best = choices(allowed, multiply_adds)[-1]
    cost = f"{best.best.gmacs:.3g} GMACs" + (f", {speed(best.best)} images/s" if study.measured else "")
    lines = [f"Best with {limit}: {best.best}, top-1 {accuracy(best.best)}, {cost}."]
    if best.as_good:
        lines.append(
            f"Not told apart from it on these images, and cheaper: {best.as_good}, top-1 {accuracy(best.as_good)}, "
            f"{best.as_good.gmacs:.3g} GMACs."
        )
    return lines


def unfinished(study: Study) -> list[str]:
    if not study.unfinished:
        return []
    lines = [
        (verbatim(w["name"]), w["state"], f"{w['step']} of {w['total_steps'] or '?'}", verbatim(w["reason"]))
        for w in study.unfinished
    ]
    return ["## Not finished", "", markdown_table(("run", "state", "step", "why"), lines), ""]


def reading_it(study: Study) -> list[str]:
    return [
        "## How to read it",
        "",
        "- Before fixing is the network as its weights, or stage one, leave it; after fixing is that network with its head "
        "tuned at the resolution in the line.",
        "- *Over the line above* is the plain paired 95 % interval. *Not told apart* names the cheapest point of lower cost "
        f"whose difference from the best may be zero, when the interval allows for having picked among {len(study.points)} "
        "points (Bonferroni's correction): where it names one, the dearer point is not shown to be better.",
        f"- The runs of this study have evaluated this validation set {study.evaluations} times. What is picked on it looks "
        "better than it is: measure the pick once more on pictures that nothing was chosen on.",
        "- One seed: the spread between trainings is not in these intervals.",
        "",
    ]
