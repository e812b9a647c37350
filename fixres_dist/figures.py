"""Pictures of what was measured: matplotlib's one home. Every function draws plain numbers to a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fixres_dist import config as cfg

Table = dict[str, dict[int, dict[str, float]]]  # label -> resolution -> summary


def pyplot() -> Any:
    """matplotlib without a display; imported when something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def sweep_plot(table: Table, config: cfg.Config, file: Path) -> None:
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
    """Distribution of all activations, and each channel's mean, per (weights, resolution) -> [n, channels].

    Channels stand in the order of their mean in the first entry, which the classifier was trained on.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), dpi=120)
    rank, shares = np.argsort(next(iter(features.values())).mean(0)), np.linspace(0, 1, 501)
    sizes = list(dict.fromkeys(res for _, res in features))
    for (label, res), values in features.items():
        colour = {"before": "tab:gray", "after": "tab:blue"}.get(label, "tab:green")
        style = {"color": colour, "ls": ("--", "-")[sizes.index(res)], "lw": 1.2, "label": f"{label}, {res} px"}
        left.plot(np.quantile(values, shares), 100 * shares, **style)
        right.plot(values.mean(0)[rank], **style)
    left.set_xlim(*np.quantile(np.concatenate([v.ravel() for v in features.values()]), [0, 0.995]))
    left.set_xlabel("activation after pooling")
    left.set_ylabel("activations at or below (%)")
    right.set_xlabel("channel, by its mean in the dashed grey curve" if len(sizes) > 1 else "channel, by its mean")
    right.set_ylabel("mean activation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)
