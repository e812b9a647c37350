"""Progress of a run: on the console, in metrics.jsonl, TensorBoard and state.json. Rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fixres_dist.base.small_files import append, keep_lines, read_lines
from fixres_dist.base.text import duration
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.results import OTHER_SIZE, Summary
from fixres_dist.runs.rundir import RunDir


class Tracker:
    """The log of one stage, from step `first_step` on: lines that an earlier start wrote beyond it are dropped, so that
    curves do not go back, and with them the evaluations `again` at that step, which this start makes again. `resumed`:
    from a checkpoint of this stage. Steps count over both stages, to `total_steps`.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        first_step: int,
        total_steps: int,
        resumed: bool,
        again: Sequence[str] = (),
        evaluations_left: Callable[[int], int] = lambda step: 0,
    ) -> None:
        self.evaluations_left, self.evaluated_s = evaluations_left, list[float]()
        self.run, self.first_step, self.total_steps, self.opened = run, first_step, total_steps, time.monotonic()
        damaged = keep_lines(
            run.metrics,
            lambda x: x["step"] < first_step or (x["step"] == first_step and x.get("evaluation") not in again),
            step=int,
        )
        if damaged:
            run.event("rebuilt", file=run.metrics.name, reason=f"without {damaged} damaged lines")
        # TensorBoard drops whole steps: what is kept of this one is written again.
        self.board = SummaryWriter(str(run.root / "tb"), purge_step=first_step)
        if not first_step:
            self.board.add_text("config", "```yaml\n" + reading.dump(config, public=True) + "```", 0)
        for line in read_lines(run.metrics, step=int):
            if (x_of(line) or 0) >= first_step:
                self.scalars(line)
        if resumed:
            self.board.add_scalar("events/restart", 1.0, first_step + 1)
        layout = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=total_steps, initial=first_step, bar_format=layout, disable=None)  # only on a terminal

    def say(self, text: str) -> None:
        """Print a line; above the progress bar where there is one."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def step(self, step: int, stage: str, epoch: float, values: dict[str, float]) -> None:
        """Log the steps up to `step`, and the time left; `values` are the train/ scalars, `epoch` may be a fraction."""
        trained_s = time.monotonic() - self.opened - sum(self.evaluated_s)
        eta_s = (self.total_steps - step) * trained_s / (step - self.first_step)
        if self.evaluated_s:
            eta_s += self.evaluations_left(step) * sum(self.evaluated_s) / len(self.evaluated_s)
        line = {"step": step, "stage": stage, "epoch": round(epoch, 4), **values, "time": time.time()}
        append(self.run.metrics, line)
        self.scalars(line)
        self.run.update_state(
            step=step, epoch=int(epoch), images_per_second=round(values["images_per_second"], 2), eta_s=round(eta_s, 1)
        )
        text = f"{stage} | loss {values['loss']:.3f} | lr {values['learning_rate']:.2e} | "
        text += f"{values['images_per_second']:,.0f} img/s | data {values['data_wait_percent']:.0f}%"
        if values["memory_gib"]:
            text += f" | mem {values['memory_gib']:.1f} GiB"
        if self.bar.disable:
            share = 100 * step / self.total_steps
            print(f"step {step}/{self.total_steps} {share:.0f}% | {text} | eta {duration(eta_s)}", flush=True)
        else:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)

    def evaluation(self, step: int, label: str, res: int, summary: Summary, seconds: float) -> None:
        """Log an evaluation at `res` pixels, which took `seconds`."""
        self.evaluated_s.append(seconds)
        line = {"step": step, "evaluation": label, "res": res, **asdict(summary), "time": time.time()}
        append(self.run.metrics, line)
        self.scalars(line)
        text = f"evaluation ({label}, {res} px): top-1 {summary.top1:.2f} | top-5 {summary.top5:.2f}"
        self.say(f"{text} | loss {summary.loss:.4f} | n {summary.n}")

    def other_size(self, step: int, res: int, why: str, summary: Summary) -> None:
        """Log the accuracy before fixing at another resolution than the test's."""
        line = {"step": step, "evaluation": OTHER_SIZE, "res": res, **asdict(summary), "time": time.time()}
        append(self.run.metrics, line)
        self.scalars(line)
        self.say(f"evaluation (before, {res} px, {why}): top-1 {summary.top1:.2f} | n {summary.n}")

    def scalars(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl in TensorBoard, as far as it has numbers."""
        evaluated, at = "evaluation" in line, x_of(line)
        names = {"top1", "top5", "loss"} if evaluated else set(line) - {"step", "stage", "epoch", "time"}
        kind = "eval" if evaluated else "train"
        if line.get("evaluation") == OTHER_SIZE:
            names, kind = {"top1"}, "eval_by_res"
        for name in sorted(names):
            if at is not None and isinstance(line.get(name), int | float):
                self.board.add_scalar(f"{kind}/{name}", line[name], at, walltime=line.get("time"))

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        self.bar.close()
        self.board.close()


def x_of(line: dict[str, Any]) -> int | None:
    """Where a line stands on its curve: its step, or the resolution of an evaluation at another size."""
    at = line.get("res") if line.get("evaluation") == OTHER_SIZE else line["step"]
    return at if isinstance(at, int) else None


def write_curve(run: RunDir, label: str, tag: str, points: dict[int, float]) -> None:
    """A curve over resolutions instead of steps, in TensorBoard's sub-run `label`."""
    with SummaryWriter(str(run.root / "tb" / label)) as board:
        for x, value in points.items():
            board.add_scalar(tag, value, x)


def write_histograms(run: RunDir, label: str, tag: str, values: dict[int, NDArray[np.float32]]) -> None:
    """The distribution of `values` at each resolution, in TensorBoard's sub-run `label`."""
    with SummaryWriter(str(run.root / "tb" / label)) as board:
        for x, found in values.items():
            board.add_histogram(tag, found.ravel(), x)
