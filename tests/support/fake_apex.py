"""Writes stand-ins for the packages named `apex`: NVIDIA's with amp and without, and PyPI's.

The first one's amp does on a CPU, in bfloat16, what apex.amp documents: O1 patches torch's functions to cast, O2 casts the
model, scale_loss scales and unscales. It writes every call to $FAKE_APEX_LOG.
"""

from __future__ import annotations

from pathlib import Path

AMP = """
import contextlib, json, os
import torch
import torch.nn.functional as F

LOW = torch.bfloat16
active, scalers = False, []

def note(call, **details):
    with open(os.environ["FAKE_APEX_LOG"], "a") as file:
        file.write(json.dumps({"call": call, **details}) + "\\n")

def casting(function):
    def cast(x, weight, bias=None, *rest, **named):
        if not active:
            return function(x, weight, bias, *rest, **named)
        low = [None if t is None else t.to(LOW) for t in (x, weight, bias)]
        return function(*low, *rest, **named)
    return cast

def initialize(model, optimizer=None, opt_level="O1", verbosity=1):
    global active
    note("initialize", level=opt_level, model=type(model).__name__, optimizer=type(optimizer).__name__)
    if opt_level == "O1":
        F.conv2d, F.linear = casting(F.conv2d), casting(F.linear)
        torch.conv2d, active = F.conv2d, True
    else:
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.to(LOW)
        inner = model.forward
        def forward(x):
            out = inner(x.to(LOW))
            return tuple(t.float() for t in out)
        model.forward = forward
    scalers[:] = [{"loss_scale": 2.0**16, "unskipped": 0}]
    return model if optimizer is None else (model, optimizer)

@contextlib.contextmanager
def disable_casts():
    global active
    active = False
    yield
    active = True

@contextlib.contextmanager
def scale_loss(loss, optimizer, delay_unscale=False):
    scaler = scalers[0]
    note("scale_loss", delay=delay_unscale, scale=scaler["loss_scale"])
    yield loss.float() * scaler["loss_scale"]
    if not delay_unscale:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.div_(scaler["loss_scale"])
        if not all(g.isfinite().all() for g in gradients):
            scaler["loss_scale"] /= 2
            step = optimizer.step
            def skip():
                optimizer.step = step
            optimizer.step = skip
        else:
            scaler["unskipped"] += 1

def state_dict():
    return {"loss_scaler0": dict(scalers[0])}

def load_state_dict(state):
    note("load_state_dict", **state["loss_scaler0"])
    scalers[0] = dict(state["loss_scaler0"])
"""

OPTIMIZERS = """
import importlib.util
import torch
from .. import note

class FusedSGD(torch.optim.SGD):
    def __init__(self, params, **options):
        if importlib.util.find_spec("amp_C") is None:
            raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")
        note("FusedSGD", **options)
        super().__init__(params, **options)
"""

NOTE = """
import json, os
def note(call, **details):
    with open(os.environ["FAKE_APEX_LOG"], "a") as file:
        file.write(json.dumps({"call": call, **details}) + "\\n")
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def today(root: Path, kernels: bool = False) -> Path:
    """NVIDIA's master since May 2025: fused optimizers, no amp."""
    files = {
        "apex/__init__.py": NOTE,
        "apex/multi_tensor_apply/__init__.py": "",
        "apex/optimizers/__init__.py": OPTIMIZERS,
    }
    metadata = "Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n"
    url = '{"url": "https://github.com/NVIDIA/apex", "vcs_info": {"vcs": "git", "commit_id": "6424da3b0123456789"}}'
    files |= {"apex-0.1.dist-info/METADATA": metadata, "apex-0.1.dist-info/direct_url.json": url}
    return write(root, files | ({"amp_C.py": ""} if kernels else {}))


def with_amp(root: Path) -> Path:
    """NVIDIA's tags up to 25.05."""
    return write(today(root, kernels=True), {"apex/amp/__init__.py": AMP})


def pypi(root: Path) -> Path:
    """Pyramid toolkit of 2013, apex 0.9.10.dev0."""
    metadata = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n"
    files = {"apex/__init__.py": "import pyramid", "apex/views.py": "", "apex-0.9.10.dev0.dist-info/METADATA": metadata}
    return write(root, files)
