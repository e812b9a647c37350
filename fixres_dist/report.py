"""Tables and pictures of what was measured."""

from __future__ import annotations

from pathlib import Path

from fixres_dist import config as cfg
from fixres_dist.rundir import RunDir

Table = dict[str, dict[int, dict[str, float]]]  # label -> resolution -> summary


def sweep_table(table: Table) -> str:
    """Top-1 by resolution, one column per set of weights."""
    labels = list(table)
    rows = ["test px " + "".join(f"{label:>12}" for label in labels)]
    for res in next(iter(table.values())):
        rows.append(f"{res:>7} " + "".join(f"{table[label][res]['top1']:>12.2f}" for label in labels))
    return "\n".join(rows)


def sweep_plot(table: Table, config: cfg.Config, file: Path) -> None:
    """Top-1 against test resolution with one-sigma bars, the training resolution marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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


def sweep_board(table: Table, run: RunDir) -> None:
    """eval_by_res/top1 in the run's TensorBoard: one sub-run per curve, the resolution as the step."""
    from fixres_dist.tracking import write_curve

    for label, curve in table.items():
        write_curve(run, label, "eval_by_res/top1", {res: s["top1"] for res, s in curve.items()})
