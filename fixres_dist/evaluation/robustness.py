"""Sets on which fixing loses, and the interpolation between the two heads that gains without losing. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fixres_dist.base.commands import command, shell
from fixres_dist.base.small_files import Damaged, read_json, typed
from fixres_dist.runs.results import BeforeAfter, Gain
from fixres_dist.runs.rundir import RunDir

Gains = Mapping[str, Sequence[tuple[float, Gain]]]  # set -> (alpha, gain over alpha 0)


def lost(gain: Gain) -> bool:
    """Whether the interval lies below zero."""
    return gain.delta_ci95[1] < 0


def line(record: Mapping[str, Any]) -> BeforeAfter | None:
    """Of a record of `evaluate`; None where it was not evaluated before and after."""
    return BeforeAfter.read(record, n=record["after"]["n"]) if "delta_ci95" in record else None


def without_losing(curves: Gains, split: str = "val") -> tuple[float, Gain] | None:
    """The alpha with the largest gain on `split` among those whose interval there lies above zero and below zero on no set."""
    others = [dict(points) for name, points in curves.items() if name != split]
    found = [
        (alpha, gain)
        for alpha, gain in curves.get(split, ())
        if gain.delta_ci95[0] > 0 and not any(alpha in one and lost(one[alpha]) for one in others)
    ]
    return max(found, key=lambda one: one[1].delta_top1, default=None)


def read_alphas(run: RunDir) -> dict[str, list[tuple[float, Gain]]]:
    """Of alpha.json, as `interpolate` writes it; empty where there is none, or one of another size than the run's. Raises Damaged."""
    file = run.root / "alpha.json"
    again = f"{shell('rm', '-r', file)}, then {command('interpolate', '--run', run.root)} again"
    own = run.config().data.res
    try:
        found = read_json(file, dict[str, Any], again)
        curves = found["curves"] if found.get("res", own) == own else {}
        return {name: [(float(row["alpha"]), typed(row, Gain)) for row in rows] for name, rows in curves.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(file, error, again) from None


def warning(run: RunDir, sets: Iterable[BeforeAfter]) -> str:
    """Of a run that loses on one of `sets`: where, and the alpha that gains without, or how to find it; else empty.

    Heads are weighed at the run's own size alone, which is what fixing is for: a loss at another is said and no more.
    """
    own = run.config().data.res
    lines = [line for line in sets if lost(line.gain)]
    losers = [line for line in lines if line.res == own]
    elsewhere = [line for line in lines if line.res != own]
    text = ""
    if elsewhere:
        text = f"LOST by fixing at another size: {named(elsewhere)}; fixing is for the run's own, {own} px"
    if not losers:
        return text
    text = f"{text}{'. ' * bool(text)}LOST by fixing: {named(losers)}. "
    curves = read_alphas(run)
    unmeasured = [line.set for line in losers if line.set not in curves]
    if unmeasured:
        words = [word for name in unmeasured for word in ("--eval-set", f"{name}=DIR")]
        again = command("interpolate", "--run", run.root, *words)
        return f"{text}Next: {again} looks for a weight between the two heads that does not"
    if not (best := without_losing(curves)):
        return f"{text}No alpha of alpha.json gains on val without losing there"
    alpha, gain = best
    export = command("export", "--run", run.root, "--alpha", f"{alpha:g}")
    return f"{text}alpha {alpha:g} gains {gain} on val and loses on none of the sets: {export}"


def named(lines: Iterable[BeforeAfter]) -> str:
    return ", ".join(f"{line.set} at {line.res} px {line.gain}" for line in lines)
