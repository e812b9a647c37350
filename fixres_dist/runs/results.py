"""What a run has measured: summaries of accuracy, the paired gain, and results.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fixres_dist.base.commands import command
from fixres_dist.base.small_files import Damaged, read_json, typed, write_json
from fixres_dist.runs.choice import Choice
from fixres_dist.runs.rundir import RunDir

OTHER_SIZE = "before, at another size"  # in metrics.jsonl: not comparable with the evaluations at the test resolution


@dataclass(frozen=True)
class Accuracy:
    """Of one model on one set: top-1 and top-5 in percent, and the mean cross-entropy without label smoothing."""

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class Measures:
    """What top-1 does not say, in percent: means over the classes as scikit-learn has them (training/confusion.py), expected
    calibration error and mean confidence (training/calibration.py)."""

    macro_precision: float
    macro_recall: float
    macro_f1: float
    ece: float
    mean_confidence: float


@dataclass(frozen=True)
class Before(Accuracy):
    """Accuracy before fixing at another resolution than the test's."""

    why: str  # timm's test | the weights' own | stage one's


@dataclass(frozen=True)
class Gain:
    """One model's top-1 minus another's on the same images, in percentage points, and its paired 95 % interval."""

    delta_top1: float
    delta_ci95: tuple[float, float]

    def __str__(self) -> str:
        """As in a table's cell: `+1.40 (+1.10 to +1.70)`."""
        low, high = self.delta_ci95
        return f"{self.delta_top1:+.2f} ({low:+.2f} to {high:+.2f})"

    def phrase(self, n: int | None = None) -> str:
        """As in a sentence: `+1.40 points (95 % interval +1.10 to +1.70, paired, n 50000)`."""
        low, high = self.delta_ci95
        count = "" if n is None else f", n {n}"
        return f"{self.delta_top1:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, paired{self.corrected}{count})"

    @property
    def corrected(self) -> str:
        """What the interval allows for, in words."""
        return ""


@dataclass(frozen=True)
class Floor(Accuracy):
    """Of a logistic classifier on the features of the network as it is given, which nothing has trained yet."""

    res: int
    penalty: float  # L2, chosen by folds inside train
    fold_loss: float  # cross-entropy there
    after: Gain | None = None  # of the run's result over it; in results.json

    def sentence(self) -> str:
        return f"first result: a logistic classifier on the untouched network at {self.res} px: top-1 {self.top1:.2f}"


@dataclass(frozen=True)
class Summary(Accuracy):
    """Accuracy with the images that it counts, and those skipped because they could not be decoded."""

    n: int
    skipped: int


@dataclass(frozen=True)
class Best(Gain):
    """The gain of fixing over the best accuracy before it, which was at `res` pixels.

    `of`: resolutions that this one was picked from, on the same images. The interval holds for all of them at once
    (Bonferroni's correction), so for the one that was picked too; runs of older versions have 1, and no correction.
    """

    res: int
    of: int = 1

    @property
    def corrected(self) -> str:
        return f", corrected for the best of {self.of}" if self.of > 1 else ""


@dataclass(frozen=True)
class BeforeAfter:
    """Accuracy before and after on one set: one line of a table."""

    set: str
    res: int
    n: int
    before: Accuracy
    after: Accuracy
    gain: Gain

    @staticmethod
    def read(record: Mapping[str, Any], **changes: Any) -> BeforeAfter:
        """From a record as the JSON files of a run hold it, with delta_top1 and delta_ci95 for the gain. Raises ValueError."""
        found = {**record, **changes}
        return typed(found | {"gain": found}, BeforeAfter)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Hardware:
    device: str  # the GPU's name, or the processor's
    devices: int
    nodes: list[str]
    gpu: bool = False
    cpus: int = 0  # that a rank may count on; older runs do not say


@dataclass(frozen=True, kw_only=True)
class Results:
    """results.json: accuracy on the validation split before and after fixing, and what it was measured with."""

    model: str
    timm_name: str
    weights: str
    res: int
    policy: str
    transform: str
    resize_rule: str
    n: int
    skipped: int = 0
    before: Accuracy
    after: Accuracy
    delta_top1: float  # percentage points
    delta_ci95: tuple[float, float]
    before_at: dict[int, Before] = field(default_factory=dict)  # by resolution; older runs have none
    best_before: Best | None = None  # where there is any such
    measures: dict[str, Measures] = field(default_factory=dict)  # before and after; older runs have none
    # Evaluations by the command that made them, for each list of validation files by its fingerprint (runs/looks.py)
    looks: dict[str, dict[str, int]] = field(default_factory=dict)
    floor: tuple[Floor, ...] = ()  # of a run with a stage one on weights, at each of its sizes
    choice: Choice | None = None  # what a held-out share has chosen, and among what
    images_seen: int
    seconds: float
    world_size: int
    precision: str
    optimizer: str
    apex: str | None = None  # its version, where the run used it
    engine: str = ""  # of the fixing stage: stream or cached; older runs do not say
    trained: str = ""  # of the fixing stage, in words; older runs do not say
    trunk: str = ""  # memory format and compilation of the frozen trunk
    hardware: Hardware
    versions: dict[str, str | None]

    @property
    def gain(self) -> Gain:
        return Gain(self.delta_top1, self.delta_ci95)

    def write(self, run: RunDir) -> None:
        write_json(run.results, asdict(self), sealed=True)

    @staticmethod
    def read(run: RunDir) -> Results:
        """Raises UserError for a run that has not finished, and Damaged."""
        return read_json(run.finished(run.results), Results, run.evaluate_again())

    def sentence(self, run: RunDir) -> str:
        """The last line of a run: before and after at the test size, before at the others, the gain over the best of them."""
        text = (
            f"{self.model} at {self.res} px: top-1 {self.before.top1:.2f} before, {self.after.top1:.2f} after fixing: "
            f"{self.gain.phrase(self.n)}"
        )
        for res, before in self.before_at.items():
            text += f"; before at {res} px ({before.why}) {before.top1:.2f}"
        for floor in self.floor:
            if floor.res == self.res:
                text += f"; a logistic classifier on the untouched network {floor.top1:.2f}"
        return ". ".join(filter(None, ("; ".join(filter(None, (text, self.over_the_best()))), self.verdict(run))))

    def over_the_best(self) -> str:
        """The gain over the best of before, where that was not at the test size; empty where it is `gain`."""
        best = self.best_before
        return f"over the best before, at {best.res} px: {best.phrase()}" if best and best.res != self.res else ""

    def verdict(self, run: RunDir) -> str:
        """Of a run that has made its weights worse, or ends below its first result, by an interval below zero: that, and
        what to try; else empty.

        The last line, `status`, the report and the model card say it in these words.
        """
        found = {self.res: self.gain} | ({self.best_before.res: self.best_before} if self.best_before else {})
        worse = {res: gain for res, gain in found.items() if gain.delta_ci95[1] < 0}
        if not worse:
            return self.below_the_floor(run)
        res, gain = min(worse.items(), key=lambda one: one[1].delta_top1)
        tune = run.config().tune
        tries = [f"tune.base_lr={tune.base_lr / 10:g}"]
        tries += ["tune.policy=classifier, which keeps BatchNorm statistics"] if tune.policy != "classifier" else []
        return (
            f"WORSE after fixing than before it at {res} px: {gain.phrase()}. Both heads are kept: "
            f"`{command('export', '--run', run.root, '--alpha', 0)}` writes the one before, "
            f"`{command('interpolate', '--run', run.root)}` measures the way between. "
            f"Try under another --name: {', or '.join(tries)}"
        )

    def below_the_floor(self, run: RunDir) -> str:
        """As `verdict`, of a run that ends below its first result."""
        best = max(self.floor, key=lambda floor: floor.top1, default=None)
        if not best or not best.after or best.after.delta_ci95[1] >= 0:
            return ""
        first = run.config().pretrain
        assert first  # else there is no first result
        return (
            f"WORSE than its first result, {best.top1:.2f} by a logistic classifier on the untouched network at {best.res} px, "
            f"by {best.after.phrase(self.n)}. Try under another --name: pretrain.base_lr={first.base_lr / 10:g}, or "
            "pretrain.policy=classifier, which leaves the network as it is"
        )


def read_floors(run: RunDir) -> tuple[Floor, ...]:
    """What floor.json holds; none where there is no such file, or a damaged one, which is made again."""
    try:
        return read_json(run.floor, tuple[Floor, ...], "") if run.floor.exists() else ()
    except Damaged:
        return ()
