"""Progress of a run: on the console, in metrics.jsonl, TensorBoard and state.json. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from tqdm import tqdm

from fixres_dist.base.small_files import append, keep_lines, read_lines
from fixres_dist.base.text import duration
from fixres_dist.config.schema import Config
from fixres_dist.runs.board import Board
from fixres_dist.runs.results import OTHER_SIZE, Results, Summary
from fixres_dist.runs.rundir import RunDir


class Left(NamedTuple):
    """What a run has left to do when some of its steps are done."""

    steps: float  # each of them counted as that many steps of the stage under way
    evaluations: int


class Tracker:
    """The log of one stage, from step `first_step` on: lines that an earlier start wrote beyond it are dropped, so that
    curves do not go back, and with them the evaluations `again` at that step, which this start makes again. Steps count
    over both stages, to `total_steps`.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        first_step: int,
        total_steps: int,
        again: Sequence[str] = (),
        left: Callable[[int], Left] | None = None,
    ) -> None:
        self.left = left or (lambda step: Left(total_steps - step, 0))
        self.run, self.first_step, self.total_steps = run, first_step, total_steps
        self.clocks = [(time.monotonic(), first_step)]  # times without evaluations, and the steps done then
        damaged = keep_lines(
            run.metrics,
            lambda x: x["step"] < first_step or (x["step"] == first_step and x.get("evaluation") not in again),
            step=int,
        )
        if damaged:
            run.event("rebuilt", file=run.metrics.name, reason=f"without {damaged} damaged lines")
        self.evaluated_s = [x["seconds"] for x in read_lines(run.metrics, step=int, seconds=float)]
        self.board = Board(run, config)
        layout = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
        self.bar = tqdm(total=total_steps, initial=first_step, bar_format=layout, disable=None)  # only on a terminal

    def say(self, text: str) -> None:
        """Print a line; above the progress bar where there is one."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def begin_steps(self) -> None:
        """The first step begins now: what came before it (features, statistics, evaluations) is no part of a step's time."""
        self.clocks = [(time.monotonic(), self.first_step)]

    def first(self, step: int, phases: dict[str, float]) -> None:
        """The first step of this start is done, which took `phases` from the start of the process."""
        self.clocks.append((time.monotonic(), step))  # later steps are timed from here: the first one compiles
        parts = dict(phases)
        total_s = parts.pop("time_to_first_step_s")
        took = ", ".join(f"{name.removesuffix('_s')} {duration(s)}" for name, s in parts.items() if s >= 1)
        self.say(f"step {step}/{self.total_steps} is done, {duration(total_s)} after the start{took and f' ({took})'}")

    def step(self, step: int, stage: str, epoch: float, values: dict[str, float]) -> None:
        """Log the steps up to `step`, and the time left; `values` are the train/ scalars, `epoch` may be a fraction."""
        left = self.left(step)
        began, first = next(clock for clock in reversed(self.clocks) if clock[1] < step)
        eta_s = left.steps * max(0.0, time.monotonic() - began) / (step - first)
        if self.evaluated_s:
            eta_s += left.evaluations * sum(self.evaluated_s) / len(self.evaluated_s)
        self.log({"step": step, "stage": stage, "epoch": round(epoch, 4), **values, "time": time.time()})
        self.run.update_state(
            step=step, epoch=int(epoch), images_per_second=round(values["images_per_second"], 2), eta_s=round(eta_s, 1)
        )
        text = f"{stage} | loss {values['loss']:.3f} | lr {values['learning_rate']:.2e} | "
        text += f"{values['images_per_second']:,.0f} img/s | data {values['data_wait_percent']:.0f}%"
        if values["memory_gib"]:
            text += f" | mem {values['memory_gib']:.1f} GiB"
        text += f" | eta {duration(eta_s)}"
        if self.bar.disable:
            print(f"step {step}/{self.total_steps} {100 * step / self.total_steps:.0f}% | {text}", flush=True)
        else:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)

    def evaluation(self, step: int, label: str, res: int, summary: Summary, seconds: float) -> None:
        """Log an evaluation at `res` pixels, which took `seconds`."""
        self.evaluated_s.append(seconds)
        self.clocks = [(began + seconds, first) for began, first in self.clocks]
        self.log_evaluation(step, label, res, summary, seconds)
        text = f"evaluation ({label}, {res} px): top-1 {summary.top1:.2f} | top-5 {summary.top5:.2f}"
        self.say(f"{text} | loss {summary.loss:.4f} | n {summary.n}")

    def other_size(self, step: int, res: int, why: str, summary: Summary) -> None:
        """Log the accuracy before fixing at another resolution than the test's."""
        self.log_evaluation(step, OTHER_SIZE, res, summary)
        self.say(f"evaluation (before, {res} px, {why}): top-1 {summary.top1:.2f} | n {summary.n}")

    def log_evaluation(self, step: int, label: str, res: int, summary: Summary, seconds: float | None = None) -> None:
        took = {} if seconds is None else {"seconds": round(seconds, 3)}
        self.log({"step": step, "evaluation": label, "res": res, **asdict(summary), **took, "time": time.time()})

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, and its points in TensorBoard."""
        append(self.run.metrics, line)
        self.board.line(line)
        self.board.flush()

    def show_pictures(self) -> None:
        """Those of the run's folder pictures/ that TensorBoard has not."""
        self.board.pictures()

    def result(self, found: Results, reliability: Mapping[str, Mapping[int, float]], step: int) -> None:
        """The final numbers; `reliability`: accuracy by confidence, in percent, before and after."""
        for when, points in reliability.items():
            self.board.curve(f"reliability/{when}", points)
        self.board.result(found, step)

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
