"""What a person should look at once: training crops beside test crops, the most confident mistakes, the confusion matrix.

Drawn by rank 0 with Pillow into the run's folder pictures/, from where TensorBoard and the HTML report take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fixres_dist.base.errors import printable
from fixres_dist.base.files import whole
from fixres_dist.data import backends
from fixres_dist.data.geometry import View
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Pictures, make_request
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.confusion import MOST_CLASSES, confusion_matrix, counted, write_csv
from fixres_dist.training.predictions import Predictions
from fixres_dist.training.session import Session
from fixres_dist.training.stages import stages

PHOTOGRAPHS, MISTAKES = 4, 12
LARGEST = 256  # pixels of a picture's side; all pictures of a sheet are scaled alike
MOST_SHOWN = 40  # classes that the picture of a confusion matrix shows: those with the most mistakes
GAP, LINE = 8, 16  # pixels
Pixels = NDArray[np.uint8]


def draw_crops(run: RunDir, session: Session) -> None:
    """pictures/crops.png: photographs of train in each stage's training crop and as they are tested, in equal scale."""
    index, config = session.train, session.config
    chosen = np.unique(np.linspace(0, len(index) - 1, PHOTOGRAPHS + 2).round().astype(np.int64)[1:-1])
    tested = session.pictures_of("test", config.data.res)
    found = [
        (f"{stage.name}, {stage.res} px", session.pictures_of(stage.transform, stage.res, stage.seed))
        for stage in stages(config, len(index))
        if stage.name != "head"
    ]
    columns = []
    sizes = np.array([magnification(v) for v in views(index, tested, chosen)])
    for name, pictures in [*found, (f"test, {config.data.res} px", tested)]:
        larger = np.array([magnification(v) for v in views(index, pictures, chosen)]) / sizes
        columns.append((name, decoded(session, index, pictures, chosen), larger))
    rows = [sample for sample in chosen.tolist() if all(sample in pictures for _, pictures, _ in columns)]
    places = {sample: k for k, sample in enumerate(chosen.tolist())}
    sheet = [
        [(pictures[sample], [name, f"objects x {larger[places[sample]]:.2f}"]) for name, pictures, larger in columns]
        for sample in rows
    ]
    write(run, "crops", grid(sheet))


def views(index: Index, pictures: Pictures, samples: NDArray[np.int64]) -> list[View]:
    return make_request(index, pictures, samples, 0).views


def magnification(view: View) -> float:
    """Pixels of the picture per pixel of the photograph: how large an object appears."""
    (_, _, height, width), (high, wide) = view.box, view.size
    return float(np.sqrt(high * wide / (height * width)))


def draw_results(run: RunDir, session: Session, predictions: Predictions) -> None:
    """pictures/mistakes.png, confusion.png and confusion.csv of the predictions after fixing."""
    if (known := counted(predictions)) is None:
        return
    names, index = session.classes, session.val
    if len(names) <= MOST_CLASSES:
        matrix = confusion_matrix(*known, classes=len(names))
        write(run, "confusion", confusion_sheet(matrix, names))
        write_csv(matrix, names, run.root / "pictures" / "confusion.csv")
    wrong = np.flatnonzero(predictions.counted & (predictions.predicted != predictions.labels))
    chosen = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MISTAKES].astype(np.int64)
    found = decoded(session, index, session.pictures_of("test", session.config.data.res), np.sort(chosen))
    cells = [
        (
            found[sample],
            [
                f"is {names[predictions.labels[sample]]}",
                f"taken for {names[predictions.predicted[sample]]}",
                f"{100 * predictions.confidence[sample]:.0f} % sure",
            ],
        )
        for sample in chosen.tolist()
        if sample in found
    ]
    if cells:
        write(run, "mistakes", grid([cells[k : k + 4] for k in range(0, len(cells), 4)]))


def decoded(session: Session, index: Index, pictures: Pictures, samples: NDArray[np.int64]) -> dict[int, Pixels]:
    """Sample -> uint8 [res, res, 3], without those that cannot be decoded."""
    if not len(samples):
        return {}
    settings = replace(session.config.data, backend="torch", on_bad="skip")
    request, device = make_request(index, pictures, samples, 0), torch.device("cpu")
    args = (index, [request], pictures.res, pictures.resize, settings, device, 0, len(samples), lambda *_: None)
    batch = next(iter(backends.batches(*args)))
    return dict(zip(batch.samples.tolist(), batch.images.permute(0, 2, 3, 1).numpy(), strict=True))


def grid(rows: Sequence[Sequence[tuple[Pixels, list[str]]]]) -> Image.Image:
    """Pictures in rows, each with lines of text below it."""
    side = max(len(pixels) for row in rows for pixels, _ in row) if rows else 1
    scale, lines = min(1.0, LARGEST / side), max((len(text) for row in rows for _, text in row), default=0)
    cell = max(round(side * scale), 96)
    wide, high = max(map(len, rows), default=1) * (cell + GAP) + GAP, len(rows) * (cell + lines * LINE + 2 * GAP) + GAP
    sheet = Image.new("RGB", (wide, high), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, row in enumerate(rows):
        for k, (pixels, text) in enumerate(row):
            x, y = GAP + k * (cell + GAP), GAP + i * (cell + lines * LINE + 2 * GAP)
            image = Image.fromarray(pixels)
            size = max(1, round(len(pixels) * scale))
            sheet.paste(image if size == len(pixels) else image.resize((size, size), Image.Resampling.LANCZOS), (x, y))
            for line, words in enumerate(text):
                draw.text((x, y + cell + 2 + line * LINE), fitting(words, cell, font), "black", font)
    return sheet


def fitting(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the text as `width` pixels hold, on one line."""
    text = printable(text).replace("\n", " ")
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}..") > width:
        text = text[:-1]
    return f"{text}.."


def confusion_sheet(matrix: NDArray[np.int64], names: Sequence[str]) -> Image.Image:
    """Images by true class (rows) and predicted class (columns). A cell's shade is its share of the row's images."""
    mistakes = matrix.sum(1) + matrix.sum(0) - 2 * np.diag(matrix)
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_SHOWN])
    part = matrix[np.ix_(shown, shown)]
    share = part / np.maximum(matrix[shown].sum(1, keepdims=True), 1)
    font, n = ImageFont.load_default(12), len(shown)
    cell = max(36 if n <= 12 else 22, round(font.getlength(str(part.max()))) + 6)  # of the longest number too
    labels = [fitting(names[k], 150, font) for k in shown]
    left = GAP + round(max(font.getlength(label) for label in labels)) + GAP
    top = left + 2 * LINE
    title = "images by true class (rows) and predicted class (columns)" + (
        f" ({n} of {len(names)} classes)" if n < len(names) else ""
    )
    sheet = Image.new(
        "RGB", (max(left + n * cell + GAP, round(font.getlength(title)) + 2 * GAP), top + n * cell + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", font)
    for i, label in enumerate(labels):
        draw.text((GAP, top + i * cell + (cell - LINE) // 2), label, "black", font)
        upright = Image.new("RGB", (left, LINE), "white")
        ImageDraw.Draw(upright).text((0, 0), label, "black", font)
        sheet.paste(upright.rotate(90, expand=True), (left + i * cell + (cell - LINE) // 2, top - left - 2))
        for k in range(n):
            x, y, dark = left + k * cell, top + i * cell, share[i, k]
            low, high = np.array([255, 255, 255]), np.array([0, 68, 136])  # one hue: read in grey and by all eyes alike
            colour = tuple(int(v) for v in low + (high - low) * dark)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour, outline="#dddddd")
            text = str(part[i, k])
            if part[i, k]:
                draw.text(
                    (x + (cell - font.getlength(text)) / 2, y + (cell - LINE) // 2),
                    text,
                    "white" if dark > 0.5 else "black",
                    font,
                )
    return sheet


def write(run: RunDir, name: str, sheet: Image.Image) -> None:
    (run.root / "pictures").mkdir(exist_ok=True)
    save(sheet, run.root / "pictures" / f"{name}.png")


def save(sheet: Image.Image, file: Path) -> None:
    with whole(file) as part:
        sheet.save(part, "png")
