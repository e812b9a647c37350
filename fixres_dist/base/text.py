"""Numbers as people write and read them: times, sizes in bytes, resolutions. No torch."""

from __future__ import annotations

from fixres_dist.base.errors import UserError


def duration(seconds: float) -> str:
    """`2h14m`, `3m05s`, `41s`."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def parse_sizes(text: str) -> list[int]:
    """Test resolutions as given to --res."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--res is {text!r}; accepted: whole numbers of pixels, such as 224 or 224,256,288.") from None
    if min(sizes) < 32:
        raise UserError(f"--res {min(sizes)} is below 32 px, the models' stride; accepted: 32 or more.")
    return sizes


def parse_size(text: str | None) -> int | None:
    """The one test resolution of a command that takes one; None: the run's."""
    sizes = parse_sizes(text) if text else [None]
    if len(sizes) > 1:
        raise UserError(
            f"--res is {text!r}; accepted: one resolution here. Next: python -m fixres_dist sweep for several."
        )
    return sizes[0]


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
