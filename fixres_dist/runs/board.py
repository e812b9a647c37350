"""TensorBoard's view of a run. All of it stands in the run directory's own files, from which every start writes it anew.

So a resumed run has no point twice, and a run of an older version gets this one's tags. docs/curves.md has the tags.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import summary

from fixres_dist.base.files import remove
from fixres_dist.base.secrets import redacted
from fixres_dist.base.small_files import read_lines, read_note
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs.event_file import EventFile
from fixres_dist.runs.results import OTHER_SIZE, Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.runs.states import Event, details
from fixres_dist.runs.wandb_run import WandbRun

POINTS = 2000  # of a training curve that a start writes anew; TensorBoard shows half of them
NOT_DRAWN = {"step", "stage", "epoch", "time"}  # keys of a line of metrics.jsonl
MARKS = {
    "saved": "save",
    Event.STOP_REQUESTED: "stop",
    Event.REQUEUED: "requeue",
    Event.STARTED: "restart",  # but for the first
    Event.LOST: "failure",
    Event.FAILED: "failure",
    Event.CANCELLED: "cancel",
    "rebuilt": "repair",
    "damaged": "repair",
}
# The stage of an evaluation by its label; others are called `fix epoch 3`.
STAGE_OF = {"head": "head", "pretrained": "pretrain", "before": "fix", "after": "fix"}
RESULT = ("top1_before", "top1_after", "gain", "gain_over_best_before", "hours")  # tags result/..., of every run
GIVEN = re.compile(r"(\w+\.\w+)=")  # settings in a command


class Board:
    """The event file of a run's newest start, from the run's first step on."""

    def __init__(self, run: RunDir, config: Config) -> None:
        self.run, self.config = run, config
        self.other: WandbRun | None = None
        folder = run.root / "tb"
        for old in folder.glob("events.out.tfevents.*"):
            remove(old)
        self.file = EventFile(folder)
        self.epoch, self.losses = 0.0, list[float]()
        self.told, self.size, self.starts, self.step, self.last = 0, 0, 0, 0, 0
        self.marked: dict[str, int] = {}  # kind of event -> newest step
        self.texts()
        lines = read_lines(run.metrics, step=int)
        every = math.ceil(sum("evaluation" not in line for line in lines) / POINTS) or 1
        for k, line in enumerate(lines):
            self.line(line, drawn=(len(lines) - 1 - k) % every == 0)
        self.shown: set[str] = set()
        self.pictures()
        self.flush()
        # Only what this start adds: W&B has what the others have sent.
        self.other = WandbRun(run, settings(config)) if config.run.logger == "wandb" else None

    def point(self, tag: str, value: Any, x: int, walltime: float | None = None) -> None:
        """A value of a curve, wherever it is logged."""
        self.file.add(summary.scalar(tag, value), x, walltime)
        if self.other:
            self.other.scalar(tag, float(value), x)

    def texts(self) -> None:
        """Configuration, plan and sbatch text without secrets, and the settings by which `hparams` compares runs."""
        env = self.config.cluster.env
        plan, script = (redacted(read_note(self.run.root / name), env) for name in ("plan.txt", "submission.sh"))
        texts = {
            "config": ("yaml", reading.dump(self.config, public=True)),
            "plan": ("", plan),
            "sbatch": ("sh", script),
        }
        for name, (kind, text) in texts.items():
            if text:
                self.file.add(summary.text(name, f"```{kind}\n{text.rstrip()}\n```"))
        found = settings(self.config)
        metrics = {f"result/{name}": 0 for name in RESULT}
        experiment, start, self.end = summary.hparams(found, metrics)
        # TensorBoard shows those columns first that differ: of one run, those that somebody has set.
        plugin, given = (
            experiment.value[0].metadata.plugin_data,
            GIVEN.findall(f"model.name= data.res= {self.run.typed}"),
        )
        content = HParamsPluginData.FromString(plugin.content)
        for column in content.experiment.hparam_infos:
            column.differs = column.name in given
        plugin.content = content.SerializeToString()
        self.file.add(experiment)
        self.file.add(start)

    def line(self, line: Mapping[str, Any], drawn: bool = True) -> None:
        """A line of metrics.jsonl; one of training that is not `drawn` counts in its epoch's mean alone."""
        self.last = line["step"]
        if "evaluation" in line:
            self.evaluation(line)
            return
        epoch = first_epoch(self.config).get(str(line.get("stage")), 0) + number(line.get("epoch", 0.0))
        if drawn:
            for name in sorted(set(line) - NOT_DRAWN):
                self.scalar(f"train/{name}", line[name], line)
            self.scalar("train/epoch", epoch, line)
        loss, begins = number(line.get("loss")), int(epoch) > int(self.epoch) and epoch > int(epoch)
        if not (begins and self.losses):  # else the line is of the next epoch
            self.losses.append(loss)
        if int(epoch) > int(self.epoch):
            self.point("by_epoch/train_loss", np.mean(self.losses), int(epoch), walltime=line.get("time"))
            self.losses = [loss] if begins else []
        self.epoch = epoch

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Each stage and resolution has tags of its own; `eval/` are those at the run's test resolution while it is fixed."""
        label, res = str(line["evaluation"]), line.get("res")
        stage, _, epochs = label.partition(" epoch ")
        stage = "before" if label == OTHER_SIZE else STAGE_OF.get(label, stage)
        groups = [f"eval_{stage}_{res}px"] + ["eval"] * (stage == "fix" and res == self.config.data.res)
        for name in ("top1", "top5", "loss"):
            for group in groups:
                self.scalar(f"{group}/{name}", line.get(name), line)
        if label == OTHER_SIZE:
            self.scalar("eval_by_res/top1", line.get("top1"), {**line, "step": res})
            return
        first = first_epoch(self.config)
        last = {"head": "pretrain", "pretrained": "fix", "after": "end"}.get(label)
        at = first[last] if last else first.get(stage, 0) + (int(epochs) if epochs.isdecimal() else 0)
        self.scalar(f"by_epoch/top1_{stage}_{res}px", line.get("top1"), {**line, "step": at})

    def scalar(self, tag: str, value: Any, line: Mapping[str, Any]) -> None:
        if isinstance(value, int | float) and isinstance(line["step"], int):
            self.point(tag, value, line["step"], walltime=line.get("time"))

    def marks(self) -> None:
        """What events.jsonl has that is not shown yet: a point and a text for each kind and step, which never goes back."""
        size = self.run.events.stat().st_size if self.run.events.exists() else 0
        if size == self.size:
            return
        events, self.size = read_lines(self.run.events, event=str, time=float), size
        found: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for event in events[self.told :]:
            if isinstance(event.get("step"), int):
                self.step = max(0, event["step"])
            self.starts += event["event"] == Event.STARTED
            kind = MARKS.get(event["event"])
            if kind and not (kind == "restart" and self.starts == 1):
                found.setdefault((self.step, kind), []).append(event)
        self.told = len(events)
        for (step, kind), same in sorted(found.items()):
            if step > self.marked.get(kind, -1):
                self.marked[kind] = step
                self.point(f"events/{kind}", len(same), step, walltime=same[0]["time"])
                text = summary.text(f"events/{kind}", "\n".join(map(told, same)))
                self.file.add(text, step, same[0]["time"])

    def pictures(self) -> None:
        """The run's pictures that are not shown yet: `crops` are of before the first step, the others of after the last."""
        for file in sorted((self.run.root / "pictures").glob("*.png")):
            if file.stem not in self.shown:
                self.shown.add(file.stem)
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
                step = 0 if file.stem == "crops" else self.last
                found = summary.image(f"pictures/{file.stem}", pixels, dataformats="HWC")
                self.file.add(found, step)

    def curve(self, tag: str, points: Mapping[int, float]) -> None:
        """A curve over something else than steps, such as confidence in percent."""
        for x, y in sorted(points.items()):
            self.point(tag, y, x)

    def result(self, result: Results, step: int) -> None:
        """The final numbers under the same tags in every run, which `hparams` puts beside the settings."""
        best = result.best_before or result.gain
        values = (result.before.top1, result.after.top1, result.delta_top1, best.delta_top1, result.seconds / 3600)
        for name, value in zip(RESULT, values, strict=True):
            self.point(f"result/{name}", value, step)
        self.file.add(self.end)

    def flush(self) -> None:
        self.marks()
        self.file.flush()

    def close(self) -> None:
        self.marks()
        self.file.close()
        if self.other:
            self.other.close()


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def told(event: Mapping[str, Any]) -> str:
    """An event as a line of a text: its time, its name, and what else it has."""
    return f"- {time.strftime('%F %T', time.localtime(event['time']))} **{event['event']}** {details(event)}"


def first_epoch(config: Config) -> dict[str, int]:
    """Epochs of the run that are complete when each stage begins, and at the `end`."""
    one = config.pretrain
    head = one.head_epochs if one else 0
    fix = head + (one.epochs if one else 0)
    return {"head": 0, "pretrain": head, "fix": fix, "end": fix + config.tune.epochs}


def settings(config: Config) -> dict[str, Any]:
    """`section.key` -> value of all settings that decide a result."""
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float) else redacted(str(value))
        for section, values in reading.identity(config).items()
        for key, value in (values or {}).items()
    }


def write_curve(run: RunDir, label: str, tag: str, points: Mapping[int, float]) -> None:
    """A curve over resolutions instead of steps, in TensorBoard's sub-run `label`; it replaces an earlier one."""
    with sub_run(run, label, tag) as board:
        for x, value in sorted(points.items()):
            board.add(summary.scalar(tag, value), x)


def write_histograms(run: RunDir, label: str, tag: str, values: Mapping[int, NDArray[np.float32]]) -> None:
    """The distribution of `values` at each resolution, in TensorBoard's sub-run `label`; it replaces an earlier one."""
    with sub_run(run, label, tag) as board:
        for x, found in sorted(values.items()):
            board.add(summary.histogram(tag, found.ravel(), bins=100), x)


def sub_run(run: RunDir, label: str, tag: str) -> EventFile:
    """A sub-run has one tag's points, so a second measurement leaves nothing of the first."""
    (run.root / "tb").mkdir(exist_ok=True)
    folder = run.root / "tb" / re.sub(r"[^\w.=-]+", "-", label)
    suffix = f".{re.sub(r'[^a-z0-9]', '_', tag)}"
    for old in folder.glob(f"events.out.tfevents.*{suffix}"):
        remove(old)
    return EventFile(folder, suffix)
