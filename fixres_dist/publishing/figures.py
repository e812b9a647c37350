"""Pictures of what was measured: matplotlib's one home. Every function draws plain numbers to a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist.config.schema import Config

Table = dict[str, dict[int, dict[str, float]]]  # label -> resolution -> summary


def pyplot() -> Any:
    """matplotlib without a display; imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def sweep_plot(table: Table, config: Config, file: Path) -> None:
    """Top-1 against test resolution with one-sigma bars, the training resolution marked."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    styles = {"before": ("tab:gray", "o--"), "after": ("tab:blue", "o-")}
    for k, (label, curve) in enumerate(table.items()):
        colour, style = styles.get(label, (f"C{k + 1}", "s:"))
        shares = [s["top1"] / 100 for s in curve.values()]
        bars = [100 * (p * (1 - p) / s["n"]) ** 0.5 for p, s in zip(shares, curve.values(), strict=True)]
        axes.errorbar(
            list(curve), [s["top1"] for s in curve.values()], bars, fmt=style, color=colour, label=label, capsize=2
        )
    marks = {"fixed at": config.data.res, **({"trained at": config.pretrain.res} if config.pretrain else {})}
    for text, res in marks.items():
        axes.axvline(res, color="tab:gray", lw=0.8, ls=":")
        where = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
        axes.annotate(text, (res, 0.02), rotation=90, va="bottom", ha="right", fontsize=8, **where)
    axes.set_xticks(list(next(iter(table.values()))))
    axes.set_xlabel("test resolution (px)")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(f"{config.model.name}: top-1 against test resolution")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def activation_plot(features: dict[tuple[str, int], NDArray[np.float32]], title: str, file: Path) -> None:
    """Pooled features [n, channels] per (label, resolution), the first being what training showed: the distribution of all
    of them, and of how far each channel's mean is from its mean in training, in its standard deviations there.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    base, shares = next(iter(features.values())), np.linspace(0, 1, 501)
    spread = np.where(base.std(0) > 0, base.std(0), np.inf)
    low = next(iter(features))[1]
    for (label, res), values in features.items():
        colour = {"training": "black", "before": "tab:gray", "after": "tab:blue"}.get(label, "tab:green")
        style = {"color": colour, "ls": "--" if res == low else "-", "lw": 1.3, "label": f"{label}, {res} px"}
        left.plot(np.quantile(values, shares), 100 * shares, **style)
        if values is not base:
            shift = np.abs(values.mean(0) - base.mean(0)) / spread
            right.plot(np.sort(shift), 100 * np.arange(1, len(shift) + 1) / len(shift), **style)
    left.set_xlim(*np.quantile(np.concatenate([v.ravel() for v in features.values()]), [0.001, 0.995]))
    left.set_xlabel("activation after pooling")
    left.set_ylabel("activations at or below (%)")
    right.set_xlabel("shift of a channel's mean from training (standard deviations)")
    right.set_ylabel("channels at or below (%)")
    right.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def alpha_plot(curves: dict[str, list[dict[str, Any]]], config: Config, file: Path) -> None:
    """Top-1 against alpha, a curve for each set: 0 is the starting head, 1 the fixed one."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    for name, rows in curves.items():
        axes.plot([r["alpha"] for r in rows], [r["top1"] for r in rows], "o-", label=name)
    axes.set_xlabel("alpha: 0 the starting head, 1 the fixed one")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(f"{config.model.name} at {config.data.res} px between the two heads")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def published_plot(curves: dict[str, list[tuple[float, float, float]]], rows: list[dict[str, Any]], file: Path) -> None:
    """Top-1 against parameters (the paper's Figure 1) and against multiply-adds: the published curves, and an arrow from
    before to after for each run (`comparison.row`)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), dpi=120, sharey=True)
    colours = {"Noisy Student": "tab:blue", "AdvProp": "tab:orange"}
    columns = {"parameters_m": "parameters (millions)", "multiply_adds_g": "multiply-adds (billions)"}
    for k, (key, label) in enumerate(columns.items()):
        for name, points in curves.items():
            style = {"color": colours[name.partition(",")[0]], "ls": "-" if name.endswith("fixed") else "--"}
            x, top1 = [point[k] for point in points], [point[2] for point in points]
            axes[k].plot(x, top1, "o", ms=4, lw=1, label=f"{name} (published, ImageNet)", **style)
        for i, row in enumerate(rows):
            colour, cost = f"C{2 + i % 8}", row[key]
            before, after = ((cost, row[when]["top1"]) for when in ("before", "after"))
            axes[k].annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour})
            axes[k].plot(*before, "s", mfc="white", color=colour, ms=5)
            axes[k].plot(*after, "s", color=colour, ms=6, label=f"{row['run']} ({row['data']})")
        axes[k].set_xscale("log")
        axes[k].set_xlabel(label)
        axes[k].grid(alpha=0.3)
    axes[0].set_ylabel("top-1 (%)")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
