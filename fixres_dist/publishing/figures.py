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
from fixres_dist.runs.results import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fixres_dist.evaluation.interpolation import Mixture

TOP1 = "top-1 (%)"
# A resolution's name along its line, three points to the left.
MARK: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
MARK |= {"rotation": 90, "va": "bottom", "ha": "right", "fontsize": 8}


def as_text(name: str) -> str:
    """`name` as it is written: matplotlib reads what stands between two dollars as a formula, and fails where it is none."""
    return printable(name).replace("$", r"\$")


@contextlib.contextmanager
def figure(
    file: Path, title: str = "", size: tuple[float, float] = (7, 4.5), panels: int = 1, share_y: bool = False
) -> Iterator[list[Axes]]:
    """The axes of a new figure, side by side. At the end of the block they get grids and legends and are saved as `file`."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a display
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, panels, figsize=size, dpi=120, sharey=share_y, squeeze=False)
    yield list(axes[0])
    for one in axes[0]:
        one.grid(alpha=0.3)
        drawn = one.get_legend() or (share_y and one is not axes[0][0])
        if one.get_legend_handles_labels()[0] and not drawn:
            one.legend(fontsize="medium" if panels == 1 else 8)
    if panels == 1:
        axes[0][0].set_title(as_text(title))
    elif title:
        drawing.suptitle(as_text(title))
    drawing.tight_layout()
    with whole(file) as part:
        drawing.savefig(part, format=file.suffix[1:])
    plt.close(drawing)


def sweep_plot(curves: Mapping[str, Mapping[int, Summary]], config: Config, file: Path) -> None:
    """Top-1 against test resolution with bars of one standard error; marks where the model was trained and fixed.

    A line for each model, or for each model and crop ("before, timm 0.875"): the colour is the crop's then.
    """
    styles = {"before": ("tab:gray", "o--"), "after": ("tab:blue", "o-")}
    crops = list(dict.fromkeys(label.partition(", ")[2] for label in curves))
    size = (9.5, 4.5) if len(crops) > 1 else (7, 4.5)
    with figure(file, f"{config.model.name}: top-1 against test resolution", size) as (axes,):
        for k, (label, curve) in enumerate(curves.items()):
            model, _, crop = label.partition(", ")
            colour, style = styles.get(model, (f"C{k + 1}", "s:"))
            colour = f"C{crops.index(crop)}" if crop else colour
            top1 = [s.top1 for s in curve.values()]
            bars = [(s.top1 * (100 - s.top1) / s.n) ** 0.5 for s in curve.values()]
            axes.errorbar(list(curve), top1, bars, fmt=style, color=colour, label=label, capsize=2)
        marks = {"fixed at": config.data.res, **({"trained at": config.pretrain.res} if config.pretrain else {})}
        for text, res in marks.items():
            axes.axvline(res, color="tab:gray", lw=0.8, ls=":")
            axes.annotate(text, (res, 0.02), **MARK)
        axes.set(xticks=list(next(iter(curves.values()))), xlabel="test resolution (px)", ylabel=TOP1)
        if len(crops) > 1:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the many lines, not over them


def activation_plot(inputs: Mapping[tuple[str, int], NDArray[np.float32]], title: str, file: Path) -> None:
    """Classifier inputs [n, channels] per (label, resolution), of which the first is the reference, as in training.

    Left: the distribution of all values. Right: how far each channel's mean is from its mean in the reference, in that
    channel's standard deviations there.
    """
    base, shares = next(iter(inputs.values())), np.linspace(0, 1, 501)
    spread = np.where(base.std(0) > 0, base.std(0), np.inf)
    low = next(iter(inputs))[1]
    with figure(file, title, (11, 4.5), panels=2) as (left, right):
        for (label, res), values in inputs.items():
            colour = {"training": "black", "before": "tab:gray", "after": "tab:blue"}.get(label, "tab:green")
            style: dict[str, Any] = {"color": colour, "lw": 1.3, "label": f"{label}, {res} px"}
            style["ls"] = "--" if res == low else "-"
            left.plot(np.quantile(values, shares), 100 * shares, **style)
            if values is not base:
                shift = np.abs(values.mean(0) - base.mean(0)) / spread
                right.plot(np.sort(shift), 100 * np.arange(1, len(shift) + 1) / len(shift), **style)
        left.set_xlim(*np.quantile(np.concatenate([v.ravel() for v in inputs.values()]), [0.001, 0.995]))
        right.set_xlim(left=0)
        left.set(xlabel="activation after pooling", ylabel="activations at or below (%)")
        shift_label = "shift of a channel's mean from training (standard deviations)"
        right.set(xlabel=shift_label, ylabel="channels at or below (%)")


def alpha_plot(curves: Mapping[str, Sequence[Mixture]], config: Config, file: Path) -> None:
    """Top-1 against alpha, a curve for each set: 0 is the starting head, 1 the fixed one."""
    with figure(file, f"{config.model.name} at {config.data.res} px between the two heads") as (axes,):
        for name, mixtures in curves.items():
            axes.plot([m.alpha for m in mixtures], [m.summary.top1 for m in mixtures], "o-", label=name)
        axes.set(xlabel="alpha: 0 the starting head, 1 the fixed one", ylabel=TOP1)


def published_plot(curves: Mapping[str, Sequence[tuple[float, float, float]]], rows: Sequence[Row], file: Path) -> None:
    """Top-1 against parameters (as Figure 1 of arXiv 2003.08237) and against multiply-adds.

    `curves`: the published ones, see `report.published_curves`. Each run is an arrow from before to after.
    """
    colours = {"Noisy Student": "tab:blue", "AdvProp": "tab:orange"}
    with figure(file, size=(13, 5), panels=2, share_y=True) as axes:
        for k, cost_label in enumerate(("parameters (millions)", "multiply-adds (billions)")):
            for name, points in curves.items():
                x, top1 = [point[k] for point in points], [point[2] for point in points]
                colour, line = colours[name.partition(",")[0]], "-" if name.endswith("fixed") else "--"
                label = f"{name} (published, ImageNet)"
                axes[k].plot(x, top1, "o", ms=4, lw=1, color=colour, ls=line, label=label)
            for i, row in enumerate(rows):
                colour, cost = f"C{2 + i % 8}", (row.parameters_m, row.multiply_adds_g)[k]
                before, after = ((cost, accuracy.top1) for accuracy in (row.results.before, row.results.after))
                axes[k].annotate("", after, before, arrowprops={"arrowstyle": "->", "color": colour})
                axes[k].plot(*before, "s", mfc="white", color=colour, ms=5)
                axes[k].plot(*after, "s", color=colour, ms=6, label=as_text(f"{row.run} ({row.data})"))
            axes[k].set(xscale="log", xlabel=cost_label)
        axes[0].set_ylabel(TOP1)
