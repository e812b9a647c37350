"""Reading torch's files without running code: weights_only, with an allow-list of plain data beside the tensors."""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import pathlib
import re
import types
import uuid
import warnings
from collections import OrderedDict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from fixres_dist.base.errors import UserError, first_line

NEWER = range(0x8C, 0x99)  # instructions of pickle's protocols 4 and 5
STATE_DICT = 'Next: where the file was made: torch.save(model.state_dict(), "weights.pth"), and that file.'


class Settings(OrderedDict[str, Any]):
    """Stands for a container of settings or statistics, whose own class is not imported and whose code does not run."""

    def __new__(cls, *_: object, **__: object) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()  # the only mapping, beside dict, whose items torch's reader sets


class Items(list[Any]):
    """Stands for a sequence that is no list: torch's reader appends to lists only."""

    def __init__(self, *_: object) -> None:
        super().__init__()


# By the names in the files: of other versions of Python and numpy too, and of libraries that are not installed here.
PATHS = {
    f"{module}.{kind}": getattr(pathlib, f"Pure{kind}" if kind in ("PosixPath", "WindowsPath") else kind)
    for module in ("pathlib", "pathlib._local")
    for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}
NUMPY: dict[str, Any] = {
    **{f"numpy.{core}.multiarray.scalar": np.float64(0).__reduce__()[0] for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": np.zeros(0).__reduce__()[0] for core in ("core", "_core")},
    **{f"numpy.dtypes.{kind.__name__}": kind for kind in vars(np.dtypes).values() if isinstance(kind, type)},
    **{
        f"numpy.{name}": getattr(np, name)
        for name in ("ndarray", "dtype", *(k.__name__ for k in np.sctypeDict.values()))
    },
}
CONTAINERS = (
    *("collections.defaultdict", "collections.ChainMap", "yacs.config.CfgNode", "fvcore.common.config.CfgNode"),
    *("easydict.EasyDict", "addict.addict.Dict", "mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String", "Path")),
    *("omegaconf.base.Metadata", "typing.Any", "mmengine.logging.history_buffer.HistoryBuffer"),
    *("lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict"),
    *("pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict"),
    "torchvision.transforms.functional.InterpolationMode",
)
ALLOWED: list[Any] = [
    *(argparse.Namespace, types.SimpleNamespace, uuid.UUID, decimal.Decimal, fractions.Fraction),
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone),
    *(bool, int, float, str, bytes, list, dict, tuple, frozenset, range, slice, object),
    *((kind, name) for name, kind in {**PATHS, **NUMPY, "torch.torch_version.TorchVersion": str}.items()),
    *((Settings, name) for name in CONTAINERS),
    (Items, "collections.deque"),
]


def load_pickled(path: Path) -> Any:
    """What torch.save wrote to `path`, with its tensors on the CPU.

    Raises UserError for a class outside of the allow-list, which it names, and for a file that ends early.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise refused(path, str(error)) from None
    except RuntimeError as error:
        if "magic number" in str(error):  # a pickle of something else
            raise refused(path, "") from None
        raise damaged(path, error) from None
    except Exception as error:  # a damaged file breaks in as many ways as there are instructions in it
        raise damaged(path, error) from None


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged or incomplete ({path.stat().st_size:,} bytes): {first_line(error)}. "
        "Next: download or copy it again, and compare its size with the source's."
    )


def refused(path: Path, said: str) -> UserError:
    """The refusal of a pickle in which torch's reader met an instruction or a class that it does not run."""
    if found := re.search(r"GLOBAL (.+?) (?:was not|whose module)", said):
        name = found[1]
        model = re.match(r"(torch\.nn|timm|torchvision)\.", name) or ".models." in name
        holds = f"a pickled model (class {name})" if model else f"an object of class {name}"
        return UserError(
            f"{path} holds {holds} and is not opened: reading it would run the file's code. "
            f"Accepted: tensors, numbers, texts, paths, dates, numpy arrays, Namespace. {STATE_DICT}"
        )
    if "DTensor" in said or "torch.distributed" in said:
        return UserError(f"{path} holds a model sharded over ranks. Next: save its full_state_dict, and that file.")
    if (found := re.search(r"Unsupported operand (\d+)", said)) and int(found[1]) in NEWER:
        return UserError(f"{path} is pickled in a protocol above torch's own, 2, and is not opened. {STATE_DICT}")
    return UserError(
        f"{path} is damaged, or is no file of torch.save, and is not opened. Next: copy it again; or {STATE_DICT[6:]}"
    )
