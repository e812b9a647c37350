"""Plots of what was measured. Every function draws plain numbers to a PNG; only this module imports matplotlib."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.base.errors import printable
from fixres_dist.base.files import whole
from fixres_dist.config.schema import Config
from fixres_dist.publishing.report import Row
from fixres_dist.runs.results import OTHER_SIZE, Summary
from fixres_dist.training.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fixres_dist.evaluation.interpolation import Mixture

TOP1 = "top-1 (%)"
# A resolution's name along its line, three points to the left.
MARK: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
MARK |= {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 8}
# Okabe and Ito's colours, which all eyes tell apart; in grey print the lines and signs still differ.
BLACK, GREY, BLUE = "#000000", "#777777", "#0072B2"
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B3A8E", "#8C6D31", BLACK)
BEFORE: dict[str, Any] = {"color": GREY, "ls": "--", "marker": "o", "mfc": "white"}
AFTER: dict[str, Any] = {"color": BLUE, "ls": "-", "marker": "o"}
SIGNS = "s^Dv<>Pp"
LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 5,
}
INCHES = (6.3, 4.0)  # the width of a page's text: drawn at the size of print, so that its letters are read there
DPI = 160


def as_text(name: str) -> str:
    """`name` as it is written: matplotlib reads what stands between two dollars as a formula, and fails where it is none."""
    return printable(name).replace("$", r"\$")


def style(label: str, k: int) -> dict[str, Any]:
    """Of the curve `label`, the k-th of its figure."""
    plain = {"before": BEFORE, "after": AFTER}
    return plain.get(label) or {"color": OTHERS[k % 8], "ls": ":", "marker": SIGNS[k % 8]}


def interval(percent: float, n: int) -> tuple[float, float]:
    """How far the 95 % interval of a share of `n` images goes below and above it, in percentage points (Wilson, 1927)."""
    p, n, z = percent / 100, max(1, n), 1.96
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(0.0, p - low), 100 * max(0.0, high - p)


@contextlib.contextmanager
def figure(
    file: Path, title: str = "", size: tuple[float, float] = INCHES, panels: int = 1, share_y: bool = False
) -> Iterator[list[Axes]]:
    """The axes of a new figure, side by side. At the end of the block they get grids and legends and are saved as `file`."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot as plt

    with plt.rc_context(LOOK):
        drawing, axes = plt.subplots(1, panels, figsize=size, dpi=DPI, sharey=share_y, squeeze=False)
        try:
            yield list(axes[0])
            for one in axes[0]:
                one.grid(alpha=0.25)
                drawn = one.get_legend() or (share_y and one is not axes[0][0])
                if one.get_legend_handles_labels()[0] and not drawn:
                    one.legend(fontsize=9 if panels == 1 else 8)
            drawing.suptitle(as_text(title), fontsize=11)
            drawing.tight_layout()
            with whole(file) as part:
                drawing.savefig(part, format=file.suffix[1:])
        finally:
            plt.close(drawing)


def sweep_plot(curves: Mapping[str, Mapping[int, Summary]], config: Config, file: Path) -> None:
    """Top-1 against test resolution with 95 % intervals; marks where the model was trained and fixed.

    A line for each model, or for each model and crop ("before, timm 0.875"): the colour is the crop's then.
    """
    crops = list(dict.fromkeys(label.partition(", ")[2] for label in curves))
    size = (8.5, 4.0) if len(crops) > 1 else INCHES
    n = max(summary.n for curve in curves.values() for summary in curve.values())
    with figure(file, f"{config.model.name}: top-1 against test resolution", size) as (axes,):
        for k, (label, curve) in enumerate(curves.items()):
            model, _, crop = label.partition(", ")
            look = {**style(model, k), **({"color": OTHERS[crops.index(crop) % 8]} if crop else {})}
            bars = np.array([interval(s.top1, s.n) for s in curve.values()]).T
            axes.errorbar(
                list(curve), [s.top1 for s in curve.values()], bars, label=label, capsize=2, elinewidth=1, **look
            )
        marks = {"fixed at": config.data.res, **({"trained at": config.pretrain.res} if config.pretrain else {})}
        for text, res in marks.items():
            axes.axvline(res, color=GREY, lw=0.8, ls=":")
            axes.annotate(text, (res, 0.02), **MARK)
        axes.set(xticks=list(next(iter(curves.values()))), ylabel=TOP1)
        axes.set_xlabel(f"test resolution (px); bars: 95 % interval of each point, n {n:,}")
        axes.tick_params("x", labelrotation=45 if len(axes.get_xticks()) > 10 else 0)
        if len(crops) > 1:
            axes.legend(
                loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
            )  # beside the many lines, not over them


def activation_plot(inputs: Mapping[tuple[str, int], NDArray[np.float32]], title: str, file: Path) -> None:
    """Classifier inputs [n, channels] per (label, resolution), of which the first is the reference, as in training.

    Left: how far each channel's mean is from its mean in training, in that channel's standard deviations there: boxes from
    the first to the third quartile of the channels, whiskers to 5 and 95 %. Right: all values' quantiles minus training's.
    """
    (reference, low), base = next(iter(inputs.items()))
    spread = np.where(base.std(0) > 0, base.std(0), np.inf)
    shares = np.linspace(0.005, 0.995, 199)
    others = [(key, values) for key, values in inputs.items() if values is not base]
    with figure(file, title, (8.5, 3.6), panels=2) as (left, right):
        for k, ((label, res), values) in enumerate(others):
            look = {**style(label, k), "ls": "--" if res == low else "-"}
            shift = np.abs(values.mean(0) - base.mean(0)) / spread
            five, *box, most = np.quantile(shift, [0.05, 0.25, 0.5, 0.75, 0.95])
            y = len(others) - 1 - k
            left.plot([five, most], [y, y], color=look["color"], lw=1)
            left.barh(y, box[2] - box[0], 0.5, box[0], color=look["color"], alpha=0.35, edgecolor=look["color"])
            left.plot([box[1]] * 2, [y - 0.25, y + 0.25], color=look["color"], lw=2)
            left.annotate(f"median {box[1]:.2f}", (box[1], y + 0.28), ha="center", fontsize=8)
            difference = (np.quantile(values, shares) - np.quantile(base, shares)) / base.std()
            right.plot(100 * shares, difference, color=look["color"], ls=look["ls"], lw=1.3, label=f"{label}, {res} px")
        left.set(xlim=(0, None), ylim=(-0.6, len(others) - 0.3), yticks=range(len(others)))
        left.set_yticklabels([f"{label}, {res} px" for (label, res), _ in reversed(others)])
        left.set_xlabel(
            "shift of a channel's mean from training\n(standard deviations; 5, 25, 50, 75, 95 % of the channels)",
            fontsize=9,
        )
        right.axhline(0, color=BLACK, lw=1, label=f"{reference}, {low} px")
        right.set_xlabel("activations at or below (%)", fontsize=9)
        right.set_ylabel("value there minus training's (std)", fontsize=9)


def alpha_plot(curves: Mapping[str, Sequence[Mixture]], config: Config, file: Path) -> None:
    """Top-1 against alpha, a curve for each set: 0 is the starting head, 1 the fixed one. The bars are those of the gain
    over alpha 0, image by image: the interval of a point alone is several times wider and the same for all."""
    with figure(file, f"{config.model.name} at {config.data.res} px between the two heads") as (axes,):
        for k, (name, mixtures) in enumerate(curves.items()):
            top1, gains = [m.summary.top1 for m in mixtures], [m.gain for m in mixtures]
            bars = np.array([[g.delta_top1 - g.delta_ci95[0], g.delta_ci95[1] - g.delta_top1] for g in gains]).T
            n = mixtures[0].summary.n
            look = AFTER if not k else style(name, k)
            axes.errorbar(
                [m.alpha for m in mixtures],
                top1,
                np.maximum(bars, 0),
                label=as_text(f"{name}, n {n:,}"),
                capsize=2,
                **look,
            )
        axes.set_xlabel(
            "alpha: 0 the starting head, 1 the fixed one\nbars: 95 % interval of the gain over alpha 0, paired",
            fontsize=9,
        )
        axes.set_ylabel(TOP1)


def training_plot(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Of the lines of metrics.jsonl: loss in training, and top-1 of each evaluation, by stage and resolution."""
    with figure(file, size=(8.5, 3.2), panels=2) as (left, right):
        stages = dict.fromkeys(line["stage"] for line in lines if "stage" in line)
        for k, stage in enumerate(stages):
            found = [(line["step"], line["loss"]) for line in lines if line.get("stage") == stage]
            sign, fix = "." if len(found) < 30 else "", stage == "fix"
            look: dict[str, Any] = {"color": BLUE if fix else OTHERS[k], "ls": "-" if fix else ("--", "-.")[k % 2]}
            left.plot(*zip(*found, strict=True), lw=1.2, label=stage, marker=sign, **look)
        points: dict[str, list[tuple[int, float]]] = {}
        for line in lines:
            if "evaluation" in line and line["evaluation"] != OTHER_SIZE:
                points.setdefault(f"{line.get('res')} px", []).append((line["step"], line["top1"]))
        for k, (res, found) in enumerate(points.items()):
            last = k == len(points) - 1
            right.plot(*zip(*found, strict=True), label=res, **(AFTER if last else style(res, k)))
        left.set(xlabel="step", ylabel="loss in training")
        right.set(xlabel="step", ylabel=TOP1)


def reliability_plot(found: Mapping[str, Reliability], file: Path) -> None:
    """Accuracy against confidence in bins, before and after; points near the diagonal can be believed."""
    with figure(file, "how far confidence is to be believed", (4.6, 4.2)) as (axes,):
        axes.plot([0, 100], [0, 100], color=BLACK, lw=0.8)
        for k, (label, one) in enumerate(found.items()):
            full = one.n > 0
            text = f"{label} (calibration error {100 * one.ece:.1f} points)"
            right = 100 * one.accuracy[full]
            bars = np.array([interval(p, n) for p, n in zip(right, one.n[full].tolist(), strict=True)]).T
            axes.errorbar(
                100 * one.confidence[full], right, bars, label=text, capsize=2, elinewidth=1, **style(label, k)
            )
        axes.set(ylabel="right (%)", xlim=(-2, 102), ylim=(-2, 102))  # points at the ends are seen whole
        axes.set_xlabel("confidence (%); bars: 95 % interval of each bin", fontsize=9)


def gain_plot(rows: Sequence[Row], file: Path) -> None:
    """Top-1 of each run before and after fixing at its test resolution, an arrow between them, with 95 % intervals."""
    with figure(file, size=(6.3, 1.2 + 0.42 * len(rows))) as (axes,):
        for k, row in enumerate(rows):
            y, r = len(rows) - 1 - k, row.results
            for accuracy, look, label in ((r.before, BEFORE, "before"), (r.after, AFTER, "after")):
                bars = np.array([interval(accuracy.top1, r.n)]).T
                look = {**look, "ls": ""}
                axes.errorbar(
                    accuracy.top1, y, xerr=bars, label=label if not k else None, capsize=2, elinewidth=1, **look
                )
            axes.annotate(
                f"{r.gain.delta_top1:+.2f}", ((r.before.top1 + r.after.top1) / 2, y + 0.18), ha="center", fontsize=8
            )
        axes.set(ylim=(-0.6, len(rows) - 0.3), yticks=range(len(rows)))
        axes.set_yticklabels(
            [as_text(f"{row.run} ({row.data}, {row.results.res} px)") for row in reversed(rows)], fontsize=8
        )
        axes.set_xlabel("top-1 (%), each with its 95 % interval", fontsize=9)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)


def published_plot(curves: Mapping[str, Sequence[tuple[float, float, float]]], rows: Sequence[Row], file: Path) -> None:
    """Top-1 against parameters (as Figure 1 of arXiv 2003.08237) and against multiply-adds.

    `curves`: the published ones, see `report.published_curves`; none where no run is of their data. Each run is an arrow
    from before to after.
    """
    colours, signs = {"Noisy Student": GREY, "AdvProp": "#B0A070"}, {"Noisy Student": "o", "AdvProp": "x"}
    with figure(file, size=(8.5, 4.0), panels=2, share_y=True) as axes:
        for k, cost_label in enumerate(("parameters (millions)", "multiply-adds (billions)")):
            for name, points in curves.items():
                x, top1 = [point[k] for point in points], [point[2] for point in points]
                family, line = name.partition(",")[0], "-" if name.endswith("fixed") else "--"
                label = f"{name} (published, ImageNet)"
                axes[k].plot(x, top1, signs[family], ms=3, lw=1, color=colours[family], ls=line, label=label)
            for i, row in enumerate(rows):
                colour, sign = (BLUE, *OTHERS)[i % 9], f"o{SIGNS}"[i % 9]
                cost = (row.parameters_m, row.multiply_adds_g)[k]
                before, after = ((cost, accuracy.top1) for accuracy in (row.results.before, row.results.after))
                axes[k].annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour})
                axes[k].plot(*before, sign, mfc="white", color=colour, ms=5)
                axes[k].plot(*after, sign, color=colour, ms=6, label=as_text(f"{row.run} ({row.data})"))
            costs = [(row.parameters_m, row.multiply_adds_g)[k] for row in rows]
            costs += [point[k] for points in curves.values() for point in points]
            axes[k].set(xscale="log" if max(costs) > 10 * min(costs) else "linear", xlabel=cost_label)
        axes[0].set_ylabel(TOP1)


def spread(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than three times the smallest, with plain numbers at its ticks."""
    if max(values) > 3 * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
