"""The backend for GPUs: DALI decodes and scales the same pictures there, or on the CPU where there is no GPU.

We give DALI encoded files and, for each, the region to cut and the size to scale it to; order and augmentation are
ours. So it shows the same crop of the same sample as the other backend, starts at any sample, and has no state to save.
A file that it may decode differently from PIL (anything but a plain JPEG) is decoded by PIL and handed over as pixels.
A file that it refuses is skipped alone.

The photograph is decoded whole: decoding a region on a GPU crashes in the release of nvImageCodec that DALI 2.4 needs
(NVIDIA/nvImageCodec#55).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from fixres_dist.data import headers
from fixres_dist.data.decoding import Bad, Batch, Undecodable, load, rows
from fixres_dist.data.geometry import Resize, View, vertical_first
from fixres_dist.data.index import Index
from fixres_dist.data.requests import Request

READ_AHEAD = 2  # requests being read beyond those in the pipeline
INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC, "lanczos": types.INTERP_LANCZOS3}
BLACK_PIXEL = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)  # for a request without pictures: no batch may be empty


class Settings(NamedTuple):
    """How the pipeline runs; the pictures do not depend on it."""

    batch: int  # pictures of the largest request
    threads: int
    device_id: int | None = None  # None: CPU
    hw_decoder_load: float = 0.65  # share of the pictures that a GPU's JPEG engine takes
    preallocate_width: int = 0  # pixels of the largest photograph: decoder buffers are allocated once; 0: as needed
    preallocate_height: int = 0


@dataclass
class Part:
    """A request between the reading of its files and its batch."""

    request: Request
    files: list[Future[NDArray[np.uint8]]]
    decoded: bool  # the files are pixels, decoded by us because DALI refused one of them
    good: list[int] = field(default_factory=list)  # rows that were fed to the pipeline
    bad: list[Bad] = field(default_factory=list)  # the other rows' samples


def geometry(views: list[View], res: int, resize: Resize, two_passes: bool) -> dict[str, NDArray[Any]]:
    """What the graph takes of each view, [n, 2] of (y, x) or (height, width) each.

    `anchor`, `shape`: the box in source pixels. `size1`, `start1`, `end1`: output size of the scaling and the region of
    its input that it scales; `size2`, `start2`, `end2`: those of a second pass (without one, the first scales both
    axes).
    `place`: where the res x res window starts in the scaled region, below zero for a border; only where a window can
    leave it.
    """
    rows = [window(view, res, two_passes) for view in views]
    names = [
        "anchor",
        "shape",
        "size1",
        "start1",
        "end1",
    ]  # no others: DALI warns of inputs that the graph does not use
    names += ["size2", "start2", "end2"] if two_passes else []
    names += ["place"] if resize.leaves(res) else []
    whole = ("anchor", "shape", "place")
    return {name: np.array([row[name] for row in rows], np.int32 if name in whole else np.float32) for name in names}


def window(view: View, res: int, two_passes: bool) -> dict[str, tuple[float, float]]:
    """One view's rows of `geometry`. A region that runs backwards comes out mirrored: so a flip costs nothing."""
    y, x, h, w = view.box
    low = [max(0, offset) for offset in view.offset]
    high = [min(size, offset + res) for size, offset in zip(view.size, view.offset, strict=True)]
    shown = (high[0] - low[0], high[1] - low[1])  # less than res x res where the window leaves the image
    scale = (h / view.size[0], w / view.size[1])
    top, bottom = low[0] * scale[0], high[0] * scale[0]
    left, right = low[1] * scale[1], high[1] * scale[1]
    gap = [max(0, -offset) for offset in view.offset]
    if view.flip:
        left, right = right, left
        gap[1] = res - gap[1] - shown[1]
    found: dict[str, tuple[float, float]] = {"anchor": (y, x), "shape": (h, w), "place": (-gap[0], -gap[1])}
    if not two_passes:
        found |= {"size1": shown, "start1": (top, left), "end1": (bottom, right)}
    elif vertical_first(view):
        found |= {"size1": (shown[0], w), "start1": (top, 0), "end1": (bottom, w)}
        found |= {"size2": shown, "start2": (0, left), "end2": (shown[0], right)}
    else:
        found |= {"size1": (h, shown[1]), "start1": (0, left), "end1": (h, right)}
        found |= {"size2": shown, "start2": (top, 0), "end2": (bottom, shown[1])}
    return found


def build(
    feed: Iterator[tuple[list[NDArray[np.uint8]], list[View]]],
    res: int,
    resize: Resize,
    settings: Settings,
    two_passes: bool,
) -> Pipeline:
    """The one graph, for training and evaluation: files and geometry in, uint8 [n, res, res, 3] out.

    Scaling in two passes with 8 bits between them is what PIL does (0.005 grey levels from it on average); one pass
    rounds once (0.19), which is all that a CPU affords: there two passes take over half as long again.
    """
    device = "cpu" if settings.device_id is None else "gpu"
    pipe = Pipeline(settings.batch, settings.threads, settings.device_id, prefetch_queue_depth=2)
    with pipe:
        black = [View(False, (0, 0, 1, 1), (res, res), (0, 0), (1.0, 1.0, 1.0))]
        names = list(geometry(black, res, resize, two_passes))
        source = (
            [files or [BLACK_PIXEL], *geometry(views or black, res, resize, two_passes).values()]
            for files, views in feed
        )
        files, *numbers = fn.external_source(source, num_outputs=1 + len(names), batch=True)
        g = dict(zip(names, numbers, strict=True))
        options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
        if device == "gpu":
            options |= {
                "hw_decoder_load": settings.hw_decoder_load,
                "preallocate_width_hint": settings.preallocate_width,
                "preallocate_height_hint": settings.preallocate_height,
            }
        x = fn.decoders.image(files, device="mixed" if device == "gpu" else "cpu", **options)
        x = fn.slice(x, g["anchor"], g["shape"], axis_names="HW", normalized_anchor=False, normalized_shape=False)
        how = {"interp_type": INTERPOLATION[resize.interpolation], "antialias": True, "roi_relative": False}
        x = fn.resize(x, size=g["size1"], roi_start=g["start1"], roi_end=g["end1"], **how)
        if two_passes:
            x = fn.resize(x, size=g["size2"], roi_start=g["start2"], roi_end=g["end2"], **how)
        if resize.leaves(res):
            fill = [float(value) for value in resize.fill]
            x = fn.slice(x, g["place"], (res, res), axes=(0, 1), out_of_bounds_policy="pad", fill_values=fill)
        pipe.set_outputs(x)
    pipe.build()
    return pipe


def readable(index: Index, sample: int, decoded: bool) -> NDArray[np.uint8]:
    """A sample for DALI: the file if DALI decodes it as PIL does, else its pixels as a PPM. Raises Undecodable."""
    if not decoded:
        try:
            data = index.read(sample)
        except OSError as error:
            raise Undecodable(error.strerror or str(error)) from None
        header = headers.header(data.data)
        as_indexed = header is not None and [header.height, header.width] == index.sizes[sample].tolist()
        if (
            header
            and header.plain
            and as_indexed
            and not headers.stray_marker(data)
            and not headers.changed(index, sample, data)
        ):
            return data
    pixels = load(index, sample).permute(1, 2, 0).contiguous().numpy()
    start = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0])
    return np.concatenate([np.frombuffer(start, np.uint8), pixels.reshape(-1)])


class Queue:
    """The requests on their way: their files are read ahead by threads, and fed to the pipeline in order."""

    def __init__(self, index: Index, requests: Iterable[Request], pool: ThreadPoolExecutor) -> None:
        self.index, self.requests, self.pool = index, iter(requests), pool
        self.reading: deque[Part] = deque()
        self.running: deque[Part] = deque()  # in the pipeline

    def start(self, request: Request, decoded: bool) -> Part:
        files = [self.pool.submit(readable, self.index, sample, decoded) for sample in request.samples.tolist()]
        return Part(request, files, decoded)

    def feed(self) -> Iterator[tuple[list[NDArray[np.uint8]], list[View]]]:
        """The files and views of one request after another, without its undecodable samples."""
        while True:
            while len(self.reading) <= READ_AHEAD and (request := next(self.requests, None)) is not None:
                self.reading.append(self.start(request, False))
            if not self.reading:
                return
            part, files = self.reading.popleft(), []
            for row, file in enumerate(part.files):
                try:
                    files.append(file.result())
                    part.good.append(row)
                except Undecodable as error:
                    part.bad.append(Bad(int(part.request.samples[row]), str(error)))
            self.running.append(part)
            yield files, [part.request.views[row] for row in part.good]

    def repeat(self) -> None:
        """Put what was in the pipeline before what is being read; its first request is now decoded by us."""
        again = [self.start(part.request, decoded=k == 0) for k, part in enumerate(self.running)]
        self.reading.extendleft(reversed(again))
        self.running.clear()


def batches(
    index: Index,
    requests: Iterable[Request],
    res: int,
    resize: Resize,
    settings: Settings,
    two_passes: bool | None = None,
) -> Iterator[Batch]:
    """The batch of every request, in their order, read and decoded ahead; on the pipeline's device.

    `two_passes` (see `build`): by default on a GPU. Raises RuntimeError where DALI fails on pixels that we decoded.
    """
    passes = settings.device_id is not None if two_passes is None else two_passes
    with ThreadPoolExecutor(max(2, settings.threads)) as pool:
        queue = Queue(index, requests, pool)
        pipe = build(queue.feed(), res, resize, settings, passes)
        while True:
            try:
                (output,) = pipe.run()
            except StopIteration:
                return
            except RuntimeError:
                # A file that DALI cannot decode fails its whole batch, often unnamed, and ends the pipeline. We decode
                # that batch, which finds the file, and start a new pipeline with it and the batches after it.
                if not queue.running or queue.running[0].decoded:
                    raise
                queue.repeat()
                pipe = build(queue.feed(), res, resize, settings, passes)
                continue
            part = queue.running.popleft()
            images = pictures(output, len(part.good), settings.device_id)
            cuda = settings.device_id is not None
            factors = [part.request.views[row].jitter for row in part.good]
            if any(row != (1.0, 1.0, 1.0) for row in factors):
                given = torch.tensor(factors, pin_memory=cuda)
                images = jittered(images, given.to(images.device, non_blocking=True))
            yield Batch(images, *rows(index, part.request.samples[part.good], pin=cuda), tuple(part.bad))


def pictures(output: Any, count: int, device_id: int | None) -> torch.Tensor:
    """A copy of the output, whose memory DALI reuses: uint8 [count, 3, res, res], channels last in memory."""
    if device_id is None:
        images = torch.from_numpy(np.array(output.as_tensor()))
    else:
        dense = output.as_tensor()
        images = torch.empty(dense.shape(), dtype=torch.uint8, device=torch.device("cuda", device_id))
        feed_ndarray(dense, images, cuda_stream=torch.cuda.current_stream(images.device))
    return images[:count].permute(0, 3, 1, 2)


def jittered(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`jitter` on a GPU for the batch at once, on a CPU picture by picture."""
    if images.is_cuda:
        return jitter(images, factors)
    # One picture at a time stays in the CPU's cache.
    return torch.cat([jitter(image[None], row[None]) for image, row in zip(images, factors, strict=True)])


def jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of uint8 [n, 3, h, w] by `factors` [n, 3], in this order, as PIL does it.

    The result is channels last in memory. As `pixels.jitter`, but for a batch on any device: every step truncates to
    whole numbers, in fp32, which holds all of them exactly. torchvision's ColorJitter of tensors is off by a grey level
    for strong factors.
    """
    brightness, contrast, saturation = factors.float().view(-1, 3, 1, 1, 1).unbind(1)
    # One plane per colour: `grey` reads them twice as fast as channels last.
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    x = x.mul_(brightness).clamp_(0, 255).floor_()
    mean = grey(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().float()
    x = x.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 255).floor_()
    base = grey(x)
    x = x.sub_(base).mul_(saturation).add_(base).clamp_(0, 255)
    # Through int32, because torch's cast from float to uint8 is not vectorised.
    return x.contiguous(memory_format=torch.channels_last).to(torch.int32).to(torch.uint8)


def grey(x: torch.Tensor) -> torch.Tensor:
    """PIL's convert("L") of whole numbers in fp32 [n, 3, h, w]: [n, 1, h, w]."""
    r, g, b = x.unbind(1)
    return (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471).add_(32768).div_(65536).floor_()[:, None]
