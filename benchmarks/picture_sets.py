"""Picture sets of 600 to 2,300 images out of Debian's packages: `python benchmarks/picture_sets.py photos DIR`.

    photos   14 classes: cut-outs of tuxpaint-stamps-default and openclipart-png on backgrounds and on plain grounds
    things   the categories of openclipart-png with 24 drawings and more, on the same grounds
    icons    faenza-icon-theme's 8 kinds of icons, as they are

Needs apt-get and dpkg; writes JPEGs to DIR/train and DIR/val. The same seed writes the same pictures.
"""

from __future__ import annotations

import argparse
import random
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # some backgrounds have 168 million

STAMPS, CLIPS = "usr/share/tuxpaint/stamps", "usr/share/openclipart/png"
GROUNDS = ("usr/share/backgrounds/gnome", "usr/share/backgrounds/mate/nature")
ICONS = "usr/share/icons/Faenza"
PACKAGES = {
    "photos": ("tuxpaint-stamps-default", "openclipart-png", "gnome-backgrounds", "mate-backgrounds"),
    "things": ("openclipart-png", "gnome-backgrounds", "mate-backgrounds"),
    "icons": ("faenza-icon-theme",),
}
PHOTOS = {  # class -> folders of stamps, folders of clip art
    "beverages": ((), ("food/beverages",)),
    "birds": (("animals/birds",), ("animals/birds",)),
    "boats": (("vehicles/ship",), ("transportation/boating",)),
    "clothing": (("clothes",), ("people/clothing",)),
    "desserts": (("food/dessert",), ("food/desserts",)),
    "fish": (("animals/fish",), ("animals/fish",)),
    "flowers": (("plants/flowers",), ("plants/flowers",)),
    "fruit": (("food/fruit",), ("food/fruit",)),
    "houses": (("town/houses",), ("buildings/homes",)),
    "insects": (("animals/insects",), ("animals/bugs",)),
    "mammals": (("animals/mammals",), ("animals/mammals",)),
    "music": (("hobbies/music",), ("recreation/music",)),
    "vegetables": (("food/vegetables",), ("food/vegetables",)),
    "vehicles": (("vehicles/auto", "vehicles/emergency", "vehicles/locomotive"), ("transportation/vehicles",)),
}
MOST = {"photos": 92, "things": 60, "icons": 300}  # pictures of a class
ABSTRACT = ("shapes", "signs_and_symbols", "special", "unsorted")  # clip art that shows no things
VAL = 0.26  # of each class


def unpacked(packages: tuple[str, ...], folder: Path) -> Path:
    """`folder` with the files of the packages, downloaded where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in packages:
        if not (folder / "usr/share/doc" / name).exists():
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
            (deb,) = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg", "-x", deb.name, "."], cwd=folder, check=True)
    return folder


def images(*folders: Path) -> list[Path]:
    return sorted(p for folder in folders for p in folder.rglob("*.png") if p.is_file() and not p.is_symlink())


def classes(kind: str, root: Path) -> dict[str, list[Path]]:
    """The pictures of each class."""
    if kind == "photos":
        return {
            name: images(*(root / STAMPS / s for s in stamps), *(root / CLIPS / c for c in clips))
            for name, (stamps, clips) in PHOTOS.items()
        }
    if kind == "icons":
        found = {folder.parent.name: images(folder) for folder in (root / ICONS).glob("*/96")}
        return {name: files for name, files in found.items() if len(files) >= 10}
    folders = [f for f in (root / CLIPS).glob("*/*") if f.is_dir() and f.parent.name not in ABSTRACT]
    found = {f"{f.parent.name}-{f.name}": images(f) for f in folders}
    return {name: files for name, files in found.items() if len(files) >= 24}


@cache
def background(file: Path) -> Image.Image:
    """With a shorter side of 1,200 px."""
    with Image.open(file) as opened:
        scale = 1200 / min(opened.size)
        return opened.convert("RGB").resize((round(opened.width * scale), round(opened.height * scale)))


def ground(random_: random.Random, backgrounds: list[Path]) -> Image.Image:
    """A part of a background, 300 to 420 px in both directions; one time in three a single colour."""
    size = (random_.randrange(300, 421), random_.randrange(300, 421))
    if random_.random() < 1 / 3:
        return Image.new("RGB", size, tuple(random_.randrange(256) for _ in range(3)))
    whole = background(random_.choice(backgrounds))
    side = random_.uniform(0.3, 0.9) * min(whole.size)
    x, y = random_.uniform(0, whole.width - side), random_.uniform(0, whole.height - side)
    return whole.resize(size, Image.Resampling.BICUBIC, (x, y, x + side, y + side))


def picture(file: Path, random_: random.Random, backgrounds: list[Path]) -> Image.Image:
    """The cut-out at 35 to 75 % of the shorter side, somewhere on a ground; an icon fills its white ground."""
    with Image.open(file) as opened:
        drawing = opened.convert("RGBA")
    if not backgrounds:
        whole = Image.new("RGB", drawing.size, "white")
        whole.paste(drawing, (0, 0), drawing)
        return whole.resize((224, 224), Image.Resampling.BICUBIC)
    whole = ground(random_, backgrounds)
    scale = random_.uniform(0.35, 0.75) * min(whole.size) / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.resize(size, Image.Resampling.BICUBIC)
    place = (random_.randrange(whole.width - size[0] + 1), random_.randrange(whole.height - size[1] + 1))
    whole.paste(drawing, place, drawing)
    return whole


def make(kind: str, target: Path, root: Path, seed: int) -> Iterator[str]:
    """Write the set to `target`; yields a line for each split."""
    backgrounds = sorted(p for g in GROUNDS for p in (root / g).glob("*") if p.suffix in (".jpg", ".webp"))
    if kind == "icons":
        backgrounds = []
    written = {"train": 0, "val": 0}
    found = classes(kind, root)
    for name in sorted(found):
        random_ = random.Random(f"{seed} {name}")
        files = random_.sample(found[name], min(len(found[name]), MOST[kind]))
        for k, file in enumerate(files):
            split = "val" if k < VAL * len(files) else "train"
            out = target / split / name / f"{k:04d}.jpg"
            out.parent.mkdir(parents=True, exist_ok=True)
            picture(file, random_, backgrounds).save(out, quality=92)
            written[split] += 1
    for split, count in written.items():
        yield f"{target / split}: {count} pictures, {len(found)} classes"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kind", choices=PACKAGES)
    p.add_argument("folder", type=Path)
    p.add_argument("--packages", type=Path, default=Path.home() / ".cache" / "fixres_dist" / "debian")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    for line in make(args.kind, args.folder, unpacked(PACKAGES[args.kind], args.packages), args.seed):
        print(line)


if __name__ == "__main__":
    main()
