"""Tables of what was measured."""

from __future__ import annotations

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
