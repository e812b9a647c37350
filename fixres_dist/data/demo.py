"""The built-in example: a small image classification data set, drawn rather than downloaded.

A class is a shape with a texture (`star_stripes`). In every picture the object has about the same size relative to the
short side. That shows the discrepancy that FixRes is about (arXiv 1906.06423, section 3): RandomResizedCrop enlarges a
part of the picture, so objects look larger in training than in testing; a higher test resolution brings their size
back.
"""

from __future__ import annotations

import colorsys
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fixres_dist.base.errors import UserError
from fixres_dist.base.files import whole, write_text
from fixres_dist.base.small_files import Damaged, read_json
from fixres_dist.data.progress import Progress

Array = NDArray[np.floating[Any]]
Colour = tuple[int, int, int]
Job = tuple[str, int]  # split and index

VERSION = 1  # of the pictures: raise it when a change of the drawing changes a pixel
MARKER = "demo.json"
SPLITS = ("train", "val")
N_TRAIN, N_VAL = 4096, 1920
OBJECT_RADIUS = (0.27, 0.33)  # of the short side: nearly constant, as the effect needs it
TEXTURE_PERIOD = (0.08, 0.1)  # of the radius: about 6.5 px in the file, 3.5 px after a resize to 128

# The outline: a radius, of about 1 at most, at an angle in radians.
SHAPES: dict[str, Callable[[Array], Array]] = {
    "disc": lambda a: np.full_like(a, 0.9),
    "flower": lambda a: 0.78 + 0.22 * np.abs(np.sin(4 * a)),
    "star": lambda a: 0.45 + 0.55 * np.abs(1 - (a * 5 / math.pi) % 2) ** 1.5,
    "triangle": lambda a: 0.55 / np.cos(a % (2 * math.pi / 3) - math.pi / 3),
}
# Ink where the value is positive; coordinates have a period of 2 pi.
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "checks": lambda u, v: np.sin(u * 0.7) * np.sin(v * 0.7),
    "dots": lambda u, v: 0.5 * (np.sin(u) + np.sin(v)) - 0.3,
    "stripes": lambda u, v: np.sin(u),
    "waves": lambda u, v: np.sin(u + 1.8 * np.sin(v * 0.5)),
}
CLASSES = tuple(f"{shape}_{texture}" for shape, texture in itertools.product(SHAPES, TEXTURES))


def write_demo(
    root: Path,
    *,
    seed: int = 0,
    n_train: int = N_TRAIN,
    n_val: int = N_VAL,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `root/{train,val}/<class>/<index>.jpg` if it does not exist; a file depends on (seed, split, index) alone.

    `workers`: processes; by default one for each CPU this process may use. The pictures are written to a directory
    beside `root`, named after everything they depend on and renamed to `root` when it is complete. So the next call
    continues an interrupted one, and `root` is never incomplete. Raises UserError if `root` holds anything else.
    """
    root = root.resolve()
    spec = {"version": VERSION, "seed": seed, "train": n_train, "val": n_val}
    if _is_written(root, spec):
        return root
    workers = workers or len(os.sched_getaffinity(0))
    partial_root = root.with_name(f".{root.name}-" + "-".join(str(value) for value in spec.values()))
    jobs = [(split, index) for split in SPLITS for index in range(spec[split])]
    try:
        for split, name in itertools.product(SPLITS, CLASSES):
            (partial_root / split / name).mkdir(parents=True, exist_ok=True)
        for done, _ in enumerate(_run(partial(_write_picture, partial_root, seed), jobs, workers), start=1):
            if progress:
                progress(done, len(jobs))
        write_text(partial_root / MARKER, json.dumps(spec | {"classes": CLASSES}, indent=1) + "\n")
        os.sync()  # the pictures: before the name that says that they are there
        partial_root.replace(root)
    except OSError:
        if not _is_written(root, spec):  # otherwise another process has just written the same files
            raise
    return root


def _is_written(root: Path, spec: dict[str, int]) -> bool:
    """Whether `root` holds exactly this data set; refuses a directory that holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = read_json(root / MARKER, dict[str, Any], "")
    except (OSError, Damaged):
        raise UserError(
            f"{root} holds something else (no {MARKER} that can be read). Choose another directory."
        ) from None
    if wrong := [f"{key} {found.get(key)}, not {value}" for key, value in spec.items() if found.get(key) != value]:
        raise UserError(
            f"{root} holds another demo data set ({', '.join(wrong)}). Remove it, or choose another directory."
        )
    return True


def _run(work: Callable[[Job], None], jobs: list[Job], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(work, jobs, chunksize=32)


def _write_picture(root: Path, seed: int, job: Job) -> None:
    split, index = job
    label = index % len(CLASSES)
    path = root / split / CLASSES[label] / f"{index:05d}.jpg"
    if not path.exists():
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        with whole(path, durable=False) as part:
            draw(label, rng).save(part, format="JPEG", quality=90)


def draw(label: int, rng: np.random.Generator) -> Image.Image:
    """A picture of a class; everything but its shape and texture is random."""
    shape, texture = CLASSES[label].split("_")
    short = int(rng.integers(200, 281))
    size = (short, int(short * rng.uniform(1, 1.45)))
    width, height = size if rng.random() < 0.35 else size[::-1]
    radius = short * rng.uniform(*OBJECT_RADIUS)
    centre = np.array([width, height]) / 2 + rng.uniform(-0.12, 0.12, 2) * short

    picture = _background(width, height, rng)
    mask = _outline(shape, radius, rng.uniform(0, 2 * math.pi), centre % 1)
    corner = (int(centre[0]) - mask.width // 2, int(centre[1]) - mask.height // 2)
    shadow = mask.point([round(value * 0.5) for value in range(256)]).filter(ImageFilter.BoxBlur(6))
    picture.paste((0, 0, 0), (corner[0] + 5, corner[1] + 7), shadow)

    period = radius * rng.uniform(*TEXTURE_PERIOD)
    ink = _texture(texture, mask.width, period, rng)
    hue = rng.random()
    light = _colour(hue, rng.uniform(0.1, 0.4), rng.uniform(0.8, 1))
    dark = _colour(hue + rng.uniform(0.2, 0.8), rng.uniform(0.4, 0.9), rng.uniform(0.35, 0.7))
    surface = Image.composite(Image.new("RGB", mask.size, light), Image.new("RGB", mask.size, dark), ink)
    picture.paste(surface, corner, mask)

    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(4, 14)
    return Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))


def _background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Soft patches of colour with lines and blobs, out of focus, which say nothing about the class."""
    patches = rng.uniform(20, 235, (4, 4, 3))
    muted = (0.6 * patches.mean(axis=2, keepdims=True) + 0.4 * patches).astype(np.uint8)
    picture = Image.fromarray(muted).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(8, 20)):
        x, y, dx, dy = rng.uniform(-0.3, 1.3, 4) * (width, height, width, height)
        colour = _colour(rng.random(), rng.uniform(0, 0.8), rng.uniform(0.2, 1))
        if rng.random() < 0.6:
            pen.line((x, y, dx, dy), fill=colour, width=int(rng.integers(1, 9)))
        else:
            extent = rng.uniform(3, 22)
            pen.ellipse((x - extent, y - extent, x + extent, y + extent), fill=colour)
    return picture.filter(ImageFilter.BoxBlur(rng.uniform(0.6, 1.6)))


def _outline(shape: str, radius: float, angle: float, shift: Array) -> Image.Image:
    """The mask of a shape, drawn at twice the size for a smooth edge, in a square with room for its shadow."""
    half = int(radius) + 12
    angles = np.linspace(0, 2 * math.pi, 280, endpoint=False, dtype=np.float32)
    reach = SHAPES[shape](angles) * radius
    points = np.stack([np.cos(angles + angle), np.sin(angles + angle)], axis=1) * reach[:, None] + half + shift
    mask = Image.new("L", (4 * half, 4 * half))
    ImageDraw.Draw(mask).polygon((points * 2).ravel().tolist(), fill=255)
    return mask.reduce(2)


def _texture(texture: str, side: int, period: float, rng: np.random.Generator) -> Image.Image:
    """A mask of ink, turned by a random angle, with edges as soft as a lens makes them."""
    y, x = np.mgrid[:side, :side].astype(np.float32) * np.float32(2 * math.pi / period)
    angle, phase_u, phase_v = rng.uniform(0, 2 * math.pi, 3)
    u = x * np.float32(math.cos(angle)) + y * np.float32(math.sin(angle)) + np.float32(phase_u)
    v = y * np.float32(math.cos(angle)) - x * np.float32(math.sin(angle)) + np.float32(phase_v)
    ink = TEXTURES[texture](u, v) * np.float32(period / 4)  # about the distance to the edge in pixels
    return Image.fromarray(((ink + 0.5).clip(0, 1) * 255).astype(np.uint8))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(channel * 255) for channel in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue
