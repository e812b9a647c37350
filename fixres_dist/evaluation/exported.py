"""The trained model that a path stands for: a finished run, its export, or a folder of the hub's form. No torch at import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.base.small_files import Damaged, read_json
from fixres_dist.config import reading
from fixres_dist.config.schema import Config, Data, ResizeRule
from fixres_dist.config.stage_settings import Policy
from fixres_dist.config.timm_names import FOLDER
from fixres_dist.data import class_maps, class_names, dataset
from fixres_dist.data.layout import is_image
from fixres_dist.evaluation.inputs import weights_after
from fixres_dist.runs.rundir import RunDir

FILES = ("model.safetensors", "model.pth", "pytorch_model.bin")  # weights in a folder, the first that is there
CONFIG = "config.json"
TEMPERATURE = "temperature.json"
KEY = "fixres"  # in config.json: an Export


@dataclass(frozen=True, kw_only=True)
class Export:
    """What config.json says beside timm's keys, so that a picture is shown to the model, and its logits read, as here."""

    res: int  # test resolution in pixels
    resize_rule: ResizeRule = "timm"
    crop_pct: float | Literal["auto"] = "auto"
    policy: Policy = "classifier"  # which tells the layers that compute in fp32 in any case
    precision: Literal["auto", "fp32"] = "auto"  # of the others
    temperature: float = 1.0  # by which logits are divided before the softmax

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; accepted: above 0.")


@dataclass(frozen=True)
class Trained:
    """A whole model as it is used: its settings, classes in the order of its logits, and weights."""

    config: Config
    classes: tuple[str, ...]
    weights: Path
    temperature: float
    run: Path | None  # where it is a run


def find(path: Path, overrides: Sequence[str] = ()) -> Trained:
    """The model at `path`: a run, a folder with config.json and weights, or a file of weights with config.json beside it.

    `overrides`: `section.key=value` of the settings. Raises UserError for any other path.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and RunDir(path).config_file.exists():
        found = of_run(RunDir(path), weights_after(RunDir(path)))
    elif path.is_file() and is_image(path.name):
        raise UserError(f"{path} is a picture; the model stands before it. Next: {command('predict', 'RUN', path)}")
    elif path.is_dir() or path.is_file():
        weights = path if path.is_file() else weights_in(path)
        run = RunDir(folder.resolve().parent)
        bare = not (folder / CONFIG).exists() and folder.name == "export" and run.config_file.exists()
        found = of_run(run, weights) if bare else of_export(folder, weights)
    else:
        raise UserError(f"there is no {path}. Accepted: a run directory, a folder that `{command('export')}` wrote, or the "
                        f"weights in it. Next: {command('status')} lists the runs.")  # fmt: skip
    values = reading.merge(asdict(found.config), reading.overrides(list(overrides)))
    return replace(found, config=reading.parse(Config, values))


def of_run(run: RunDir, weights: Path) -> Trained:
    config, settings = run.config(), exported_settings(run.root / "export")
    classes = class_maps.trained_classes(config, run.root, "val")
    if not classes:
        raise Damaged(run.root / "class_index.json", "it is gone, and so are the data", "put back a copy")
    return Trained(config, classes, weights, settings.temperature if settings else 1.0, run.root)


def weights_in(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    there = sorted(os.listdir(folder))
    onnx = next((name for name in there if name.endswith(".onnx")), "")
    why = f"{onnx} is for ONNX Runtime" if onnx else f"in it: {', '.join(there[:6]) or 'nothing'}"
    raise UserError(
        f"{folder} is no run and holds no weights ({why}). Accepted: {', '.join(FILES)} with {CONFIG} beside it. "
        f"Next: {command('export', '--run', 'RUN')} writes such a folder"
    )


def exported_settings(folder: Path) -> Export | None:
    """Those in the folder's config.json; None where it is not there, or another program or an older version wrote it."""
    again = command("export", "--run", "RUN", "--out", folder)
    try:
        found = read_json(folder / CONFIG, dict[str, Any], again).get(KEY)
    except FileNotFoundError:
        return None
    try:
        return None if found is None else reading.parse(Export, found, KEY)
    except (UserError, TypeError, AttributeError) as error:
        raise Damaged(folder / CONFIG, error, again) from None


def of_export(folder: Path, weights: Path) -> Trained:
    """Raises UserError where config.json is missing or of other classes than the weights."""
    again = command("export", "--run", "RUN", "--out", folder)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{weights} has no {CONFIG} beside it, which says what model it is and how pictures are shown to it. Next: {again}, "
            "and keep the folder together"
        )
    timm_name = FOLDER + os.path.abspath(folder)
    from fixres_dist.models.build import preprocessing

    spec = preprocessing(timm_name)
    settings = exported_settings(folder) or Export(res=spec.test_res or spec.train_res)
    given = read_json(folder / CONFIG, dict[str, Any], again)
    model = {"name": str(given.get("architecture", "")), "timm_name": timm_name, "weights": str(weights.absolute())}
    data = {"res": settings.res, "resize_rule": settings.resize_rule, "crop_pct": settings.crop_pct}
    values = {
        "model": model,
        "data": data,
        "tune": {"policy": settings.policy},
        "run": {"precision": settings.precision},
    }
    return Trained(reading.parse(Config, values), names(given, folder), weights, settings.temperature, None)


def names(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """The class names in config.json; where it has none, ImageNet's of 1,000 classes, else their numbers."""
    of_timm = config.get("pretrained_cfg") or {}
    listed = config.get(class_names.NAMES, of_timm.get(class_names.NAMES))
    if isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed):
        return tuple(listed)
    count = of_timm.get("num_classes", config.get("num_classes"))
    if not (isinstance(count, int) and count > 0):
        raise UserError(
            f"{folder / CONFIG} has no {class_names.NAMES} and no num_classes. Accepted: a model that classifies."
        )
    return class_names.imagenet().names if count == 1000 else tuple(map(class_names.nameless, range(count)))


@dataclass(frozen=True)
class Fitted:
    """A temperature, and the expected calibration error in percentage points without it and with it."""

    temperature: float
    fitted_on: str  # val of the run's data set alone, or another folder's name, which is not `val`
    n: int
    measured_on: str
    ece_before: float
    ece_after: float
    weights: str = ""  # models.weights.state_digest of those it was fitted for; older versions did not say

    def sentence(self) -> str:
        same = ", the same pictures" if self.fitted_on == self.measured_on else ""
        return (
            f"temperature {self.temperature:.4f}, fitted on {self.fitted_on} ({self.n:,} images); expected calibration error on "
            f"{self.measured_on}{same}: {self.ece_before:.2f} points without it, {self.ece_after:.2f} with it"
        )


def fitted_temperature(folder: Path) -> Fitted | None:
    """Of the export in `folder`; None where it has none. Raises Damaged."""
    try:
        return read_json(folder / TEMPERATURE, Fitted, command("export", "--run", "RUN", "--temperature-from", "SPLIT"))
    except FileNotFoundError:
        return None


def place(given: str, data: Data) -> Path:
    """The folder that `--temperature-from` names: a split of the data set, or a folder of class folders. Raises UserError."""
    root = dataset.folder(data.root, data.cache).absolute()
    split, other, train = root / data.split_name(given), Path(given).absolute(), root / data.train_split
    folder = other if "/" in given or (other.is_dir() and not split.is_dir()) else split
    if split == train or folder.resolve() == train.resolve():
        raise UserError(
            f"--temperature-from {given} is what the model was trained on, where it is surer than on other pictures. Accepted: "
            "val, or a folder of class folders with pictures of its own. Next: --temperature-from val"
        )
    dataset.survey(folder.parent, folder.name, data)  # refuses one that is not there
    return folder
