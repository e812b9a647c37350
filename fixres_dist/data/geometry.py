"""Which part of a photograph a picture shows: resize rules, crop windows and augmentation, as numbers, without pixels.

Both backends take their windows from here, so they make the same picture of the same sample. Accuracies under different
resize rules cannot be compared (docs/method.md), and training and testing use the same rule.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fixres_dist.data.order import uniforms

DRAWS = 27  # flip, 3 jitter, shift, 10 x (area, ratio), y, x
ATTEMPTS = 10  # of random_resized_crop before it falls back to the centre, as in torchvision


INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "box", "hamming")  # Pillow's antialiased filters, by timm's names
BLACK = (0, 0, 0)
SIDES = {  # the side that Resize.size is the length of, in words
    "shorter": "the shorter side is scaled",
    "height": "the **height** is scaled",  # as in the original repository
    "both": "both sides are scaled",  # timm's crop_mode squash: the aspect ratio changes
    "longer": "the longer side is scaled",  # timm's crop_mode border
}


class Resize(NamedTuple):
    """How a whole photograph is scaled before its crop is taken."""

    size: int  # pixels of the scaled side
    side: str  # which side that is: a key of SIDES
    interpolation: str  # one of INTERPOLATIONS
    fill: tuple[int, int, int] = BLACK  # where the crop leaves the scaled photograph

    def leaves(self, res: int) -> bool:
        """Whether a crop of `res` px can leave the scaled photograph."""
        return self.side in ("height", "longer") or self.size < res

    def described(self, res: int) -> str:
        """In a sentence of the model card."""
        scaled = f"{SIDES[self.side]} to {self.size} px, {self.interpolation}"
        around = "black" if self.fill == BLACK else f"in the colour {', '.join(map(str, self.fill))}"
        bars = f", with bars {around} where the photograph is smaller" if self.leaves(res) else ""
        return f"{scaled}, and the centre {res} x {res} is cut{bars}"


class Augment(NamedTuple):
    """RandAugment of a picture (arXiv 1909.13719) by timm: data/augment.py."""

    config: str  # timm's notation
    fill: tuple[int, int, int]  # colour of what a turned or shifted picture leaves free
    seed: int = 0  # of this picture's draws


class View(NamedTuple):
    """One picture of one sample: cut `box` from the photograph, scale it to `size`, crop at `offset`, flip, jitter, augment.

    The part of the window outside the scaled photograph has the colour Resize.fill.
    """

    flip: bool
    box: tuple[int, int, int, int]  # y, x, height, width in pixels of the photograph
    size: tuple[int, int]  # height, width after scaling
    offset: tuple[int, int]  # y, x of the crop in the scaled box; may be negative
    jitter: tuple[float, float, float]  # brightness, contrast, saturation factors, applied in this order
    augment: Augment | None = None

    def record(self) -> list[float]:
        """The view in samples/rank_K.jsonl: flip; y, x, h, w of the box; size h, w; offset y, x; jitter factors."""
        return [int(self.flip), *self.box, *self.size, *self.offset, *(round(f, 6) for f in self.jitter)]


class Rule(NamedTuple):
    """A value of data.resize_rule; None: as the model's own preprocessing has it."""

    crop_pct: float | None  # the crop's side over the scaled side
    interpolation: str | None
    side: str | None = "shorter"


RULES = {
    # The published numbers of the FixEfficientNet note (arXiv 2003.08237, Tables 1 and 2) were evaluated with this one,
    # by the authors' benchmark script.
    "fixefficientnet": Rule(1.0, "bicubic"),
    "fixres": Rule(224 / 256, "bilinear"),  # the FixRes paper (arXiv 1906.06423)
    "fixres_height": Rule(224 / 256, "bilinear", "height"),  # the Resize of the paper's code
    "timm": Rule(None, None, None),
}


def resize_of(
    rule: str, res: int, crop_pct: float, interpolation: str, side: str = "shorter", fill: tuple[int, int, int] = BLACK
) -> Resize:
    """The resize of data.resize_rule at test resolution `res`; all else is the model's own, for the rule `timm`."""
    chosen = RULES[rule]
    size = math.floor(res / (chosen.crop_pct or crop_pct))
    colour = BLACK if chosen.side else fill
    return Resize(size, chosen.side or side, chosen.interpolation or interpolation, colour)


def scaled(height: int, width: int, resize: Resize) -> tuple[int, int]:
    """Height and width in pixels after scaling, rounded as torchvision's Resize and timm's ResizeKeepRatio round."""
    if resize.side == "both":
        return resize.size, resize.size
    if resize.side == "longer":
        ratio = max(height, width) / resize.size
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    base = height if resize.side == "height" else min(height, width)
    return max(1, resize.size * height // base), max(1, resize.size * width // base)


def centre(outer: int, inner: int) -> int:
    """Start of a centred window: torchvision's rounding (half to even); an odd border is smaller in front."""
    return round((outer - inner) / 2) if outer >= inner else -((inner - outer) // 2)


def vertical_first(view: View) -> bool:
    """Whether the height is scaled before the width. Values are rounded to 8 bits in between, so the order matters.

    The rule of Pillow 13 and later: the height first if it shrinks by more than twice as many pixels as the width.
    """
    (_, _, h, w), (oh, ow) = view.box, view.size
    return h > oh and h - oh > 2 * (w - ow)


def test_view(height: int, width: int, res: int, resize: Resize) -> View:
    """Scale and centre crop: the view of evaluation and of `train_transform: test`."""
    oh, ow = scaled(height, width, resize)
    return View(False, (0, 0, height, width), (oh, ow), (centre(oh, res), centre(ow, res)), (1.0, 1.0, 1.0))


def train_views(
    transform: str,
    sizes: NDArray[np.integer],
    samples: NDArray[np.integer],
    res: int,
    resize: Resize,
    seed: int,
    epoch: int | NDArray[np.integer],
) -> list[View]:
    """The view of each of `samples` [n], whose photographs have `sizes` [n, 2] (height, width in pixels), in `epoch`.

    `epoch` may be an array [n] of view keys (order.train_draws). A view depends on seed, epoch and sample alone.
    `test`: as evaluated. `test_flip`: the same, half of them flipped.
    `test_aug`: flip, horizontally shifted crop, jitter 0.05 (transforms_v2 of the paper's code).
    `random_resized_crop`: area 0.08-1, ratio 3/4-4/3, flip, jitter 0.3 (its training transform).
    """
    if transform == "test":
        return [test_view(int(h), int(w), res, resize) for h, w in sizes]
    draws = uniforms(seed, epoch, samples, DRAWS)
    strength = 0.05 if transform == "test_aug" else 0.3
    views = []
    for (h, w), u in zip(sizes.tolist(), draws.tolist(), strict=True):
        b, c, s = (1 - strength + 2 * strength * x for x in u[1:4])
        if transform == "test_flip":
            views.append(test_view(h, w, res, resize)._replace(flip=u[0] < 0.5))
        elif transform == "test_aug":
            view = test_view(h, w, res, resize)
            y, x = view.offset
            x = int(u[4] * (view.size[1] - res + 1)) if view.size[1] > res else x
            views.append(view._replace(flip=u[0] < 0.5, offset=(y, x), jitter=(b, c, s)))
        else:
            views.append(View(u[0] < 0.5, random_box(h, w, u[5:]), (res, res), (0, 0), (b, c, s)))
    return views


def random_box(height: int, width: int, u: list[float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop window (y, x, height, width) from 22 uniforms: 10 x (area, ratio), y, x."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for k in range(ATTEMPTS):
        area = height * width * (0.08 + 0.92 * u[2 * k])
        ratio = math.exp(low + (high - low) * u[2 * k + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w = min(width, round(height * 4 / 3)) if width > height * 4 / 3 else width
    h = round(width * 4 / 3) if height > width * 4 / 3 else height
    return (height - h) // 2, (width - w) // 2, h, w
