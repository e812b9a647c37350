"""A trained model on pictures: which classes they are of, their embeddings, and its accuracy on a data set with labels.

`fixres predict` and `fixres_dist.load` are this. The loaders, the fast trunk and the arithmetic are those of `evaluate`, so a
picture gets the same class in both.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from fixres_dist.base import watchdog
from fixres_dist.base.commands import command
from fixres_dist.base.environment import scratch_folder
from fixres_dist.base.errors import UserError
from fixres_dist.config import recipes
from fixres_dist.data import class_maps, dataset, unlabelled
from fixres_dist.data.index import Index, Limits
from fixres_dist.data.requests import every_sample
from fixres_dist.data.unlabelled import Given
from fixres_dist.evaluation.exported import CONFIG, Trained, find
from fixres_dist.evaluation.measures import measure
from fixres_dist.models import sources, state_dicts
from fixres_dist.models.network import open_network
from fixres_dist.models.parts import Parts, classifier_inputs, parts_of
from fixres_dist.models.resizing import check_resolutions
from fixres_dist.models.weights import fill, fitted
from fixres_dist.runs import looks
from fixres_dist.training.cache.store import Loaded
from fixres_dist.training.predict import predict
from fixres_dist.training.ranks import Launched, join
from fixres_dist.training.session import Session, one_ahead, to_host

Of = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Prediction:
    """The classes of one picture, the most probable first; none, and why, where it cannot be read."""

    image: str  # the file, or `picture 3` for the fourth one given where that was in memory
    classes: tuple[str, ...] = ()
    confidences: tuple[float, ...] = ()  # softmax of each of these, 0 to 1, at the model's temperature
    error: str = ""


class Row(NamedTuple):
    """Of one picture."""

    sample: int  # its position among those given
    values: NDArray[np.float32] | None  # what was asked for; None: it cannot be read
    error: str = ""


class Tempered(nn.Module):
    """A head whose logits are divided by the temperature."""

    def __init__(self, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.head, self.temperature = head, temperature

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(*features)
        return logits / self.temperature


@dataclass(frozen=True)
class Classifier:
    """A trained model, opened by `load`. Its methods are not for several threads at once."""

    session: Session
    parts: Parts
    temperature: float

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return self.session.classes

    @property
    def res(self) -> int:
        """Test resolution in pixels."""
        return self.session.config.data.res

    def predict(self, images: Given | Sequence[Given], top: int = 5) -> list[Prediction]:
        """The `top` classes of each picture: of paths (files, folders, .txt lists) and PIL images, in the order given.

        A picture that cannot be read has no classes, and its `error` says why. Raises UserError where none was given.
        """
        return list(self.predictions(several(images), top))

    def predictions(self, images: Sequence[Given], top: int = 5, show: bool = False) -> Iterator[Prediction]:
        """The same one by one, as they are made; `show`: with a progress bar on a terminal."""
        if top < 1:
            raise UserError(f"top is {top}; accepted: 1 or more classes.")
        index, unreadable = unlabelled.index_of(images, show, Limits.of(self.session.config.data))
        count = min(top, len(self.classes))

        def best(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            confidences, classes = logits.softmax(1).topk(count)
            return torch.stack([confidences, classes.float()], 1)

        for sample, values, error in self.rows(index, unreadable, best, show):
            if values is None:
                yield Prediction(index.where(sample), error=error)
            else:
                names = tuple(self.classes[int(k)] for k in values[1])
                yield Prediction(index.where(sample), names, tuple(values[0].tolist()))

    def embed(self, images: Given | Sequence[Given]) -> NDArray[np.float32]:
        """[n, channels]: what enters the classifier, for pictures as `predict` takes them; NaN for one that cannot be read."""
        index, unreadable = unlabelled.index_of(several(images), False, Limits.of(self.session.config.data))
        found = [values for _, values, _ in self.rows(index, unreadable, lambda _, embeddings: embeddings)]
        width = next((len(row) for row in found if row is not None), 0)
        return np.stack([np.full(width, np.nan, np.float32) if row is None else row for row in found])

    def evaluate(self, data: str | os.PathLike[str], split: str = "val") -> dict[str, Any]:
        """Accuracy on the split of a data set, or on a folder of class folders: top1, top5, macro_f1, ece in percent, and so
        on, as `evaluate --json` writes it. Logits are restricted to the classes of the set. Raises UserError."""
        settings = self.session.config.data
        root = dataset.folder(os.fspath(data), settings.cache)
        whole = root / settings.split_name(split)
        folder = whole if whole.is_dir() or not root.is_dir() or list(root.glob("*.tar")) else root
        index = dataset.of(settings, folder)
        columns = class_maps.class_map(index.classes, self.classes, folder)
        session = replace(self.session, splits={split: index}, columns={split: columns})
        (made,) = predict(session, [self.parts], self.res, split, split)
        record = measure(split, self.res, index, columns, self.classes, {"model": made}).record()
        return {**record.pop("model"), **record}

    @torch.no_grad()
    def rows(self, index: Index, unreadable: dict[int, str], of: Of, show: bool = False) -> Iterator[Row]:
        """A row per picture, in order: `of(logits, embeddings)` [n, ..] of a batch; `show`: a progress bar."""
        parts, session = self.parts, one_off(self.session, index)
        requests = session.requests(every_sample, index, self.res)
        parts.model.eval()
        parts.head.eval()
        with classifier_inputs(parts) as embeddings:

            def computed() -> Iterator[tuple[Loaded, Callable[[], tuple[torch.Tensor, ...]]]]:
                for batch in session.batches(index, requests, self.res):
                    logits = session.logits(parts, parts.head, session.inputs(parts, batch.images))
                    yield batch, to_host((of(logits, embeddings.pop()[: len(logits)]),))

            hidden = None if show else True
            with tqdm(total=len(index), desc="predicting", unit="img", leave=False, disable=hidden) as bar:
                for batch, wait in one_ahead(computed()):
                    watchdog.beat()
                    values = dict(zip(batch.samples.tolist(), wait()[0].numpy(), strict=True))
                    bad = {one.sample: unreadable.get(one.sample, one.reason) for one in batch.skipped}
                    for sample in sorted(values | bad):
                        yield Row(sample, values.get(sample), bad.get(sample, ""))
                    bar.update(len(values) + len(bad))


def several(images: Given | Iterable[Given]) -> list[Given]:
    return [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)


def one_off(session: Session, index: Index) -> Session:
    """For pictures without labels: bad ones are left out; loader processes start where there is more than one batch."""
    data = replace(session.config.data, on_bad="skip")
    if len(index) <= session.batch_per_device(data.res):
        data = replace(data, workers=0)
    return replace(session, config=replace(session.config, data=data), on_skip=lambda index, bad: None)


def load(path: str | os.PathLike[str], res: int | None = None, settings: Sequence[str] = ()) -> Classifier:
    """The trained model at `path`: a run, its export, or a folder of the hub's form (see `exported.find`).

    `res`: another test resolution, in pixels. `settings`: such as "run.precision=fp32". On the first GPU where there is one.
    Raises UserError. What loading has to say goes to stderr.
    """
    with contextlib.redirect_stdout(sys.stderr):
        return opened(find(Path(path).expanduser(), [*settings, *([] if res is None else [f"data.res={res}"])]))


def opened(trained: Trained) -> Classifier:
    config = replace(trained.config, run=replace(trained.config.run, compile=trained.config.run.compile is True))
    ranks = join(scratch_folder(), launcher=Launched(0, 1, 0, 1, "alone"))
    model, spec, arithmetic, layout = open_network(config, trained.classes, ranks.device, load_weights=False, say=quiet)
    check_resolutions(model, [config.data.res])
    file = sources.read_file(trained.weights)
    if len(file.classes) and tuple(file.classes) != trained.classes:
        raise other_classes(trained, f"its own are {', '.join(file.classes[:3])}, .. ({len(file.classes)})")
    try:
        chosen = state_dicts.choose(
            file.loaded, list(model.state_dict()), config.model.checkpoint_key, str(trained.weights)
        )
        fill(model, fitted(model, chosen.state), str(trained.weights))
    except recipes.OtherClasses as error:
        raise other_classes(trained, str(error).partition(",")[0]) from None
    kept = trained.run / "choices.json" if trained.run and os.access(trained.run, os.W_OK) else None
    run = looks.run_of(trained.weights)
    counted = (run, "evaluate") if run else None
    session = Session(
        config, ranks, model, spec, {}, trained.classes, {}, arithmetic, layout, ignored, kept, counted=counted
    )
    parts = session.with_fast_trunk(parts_of(model, config.tune.policy))
    tempered = parts if trained.temperature == 1 else replace(parts, head=Tempered(parts.head, trained.temperature))
    return Classifier(session, tempered, trained.temperature)


def other_classes(trained: Trained, why: str) -> UserError:
    where = trained.run or trained.weights.with_name(CONFIG)
    return UserError(
        f"{trained.weights} is of other classes than {where} says ({', '.join(trained.classes[:3])}, .. "
        f"({len(trained.classes)})): {why}. Next: {command('export', '--run', trained.run or 'RUN', '--out', 'DIR')} "
        "writes both anew, and give that folder"
    )


def quiet(_: str) -> None: ...


def ignored(*_: object) -> None: ...
