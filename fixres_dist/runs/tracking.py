"""What a person sees of a run: console, metrics.jsonl, TensorBoard, state.json. Rank 0 only."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fixres_dist.base.json_lines import append, keep_lines
from fixres_dist.base.text import duration
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.rundir import RunDir


class Tracker:
    """Opened for one stage at a step: what an earlier start wrote beyond it is dropped, so curves do not zigzag."""

    def __init__(self, run: RunDir, config: Config, first_step: int, total_steps: int, resumed: bool) -> None:
        self.run, self.first_step, self.total_steps, self.opened = run, first_step, total_steps, time.monotonic()
        # Evaluations at a stage's ends are made after the last save or before the first one, so they are made again.
        again = ("after", "pretrained") if resumed else ("before",)
        keep_lines(
            run.metrics,
            lambda x: x["step"] < first_step or (x["step"] == first_step and x.get("evaluation") not in again),
        )
        self.board = SummaryWriter(str(run.root / "tb"), purge_step=first_step + 1 if resumed else None)
        if resumed:
            self.board.add_scalar("events/restart", 1.0, first_step + 1)
        elif not first_step:
            self.board.add_text("config", "```yaml\n" + reading.dump(config) + "```", 0)
        layout = "{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=total_steps, initial=first_step, bar_format=layout, disable=None)  # only on a terminal

    def say(self, text: str) -> None:
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def step(self, step: int, stage: str, epoch: float, values: dict[str, float]) -> None:
        """One line per `run.log_every` optimizer steps; `values` are the train/ scalars."""
        eta_s = (self.total_steps - step) * (time.monotonic() - self.opened) / (step - self.first_step)
        append(
            self.run.metrics, {"step": step, "stage": stage, "epoch": round(epoch, 4), **values, "time": time.time()}
        )
        for name, value in values.items():
            self.board.add_scalar(f"train/{name}", value, step)
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

    def evaluation(self, step: int, label: str, res: int, summary: dict[str, float]) -> None:
        append(self.run.metrics, {"step": step, "evaluation": label, "res": res, **summary, "time": time.time()})
        for name in ("top1", "top5", "loss"):
            self.board.add_scalar(f"eval/{name}", summary[name], step)
        self.say(
            f"evaluation ({label}, {res} px): top-1 {summary['top1']:.2f} | top-5 {summary['top5']:.2f} | "
            f"loss {summary['loss']:.4f} | n {summary['n']}"
        )

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        self.bar.close()
        self.board.close()


def write_curve(run: RunDir, label: str, tag: str, points: dict[int, float]) -> None:
    """A curve over something other than steps, as a sub-run of its own."""
    with SummaryWriter(str(run.root / "tb" / label)) as board:
        for x, value in points.items():
            board.add_scalar(tag, value, x)


def write_histograms(run: RunDir, label: str, tag: str, values: dict[int, NDArray[np.float32]]) -> None:
    """The distribution of all `values` of each x, in the sub-run of that curve."""
    with SummaryWriter(str(run.root / "tb" / label)) as board:
        for x, found in values.items():
            board.add_histogram(tag, found.ravel(), x)
