"""What the installed apex can do, found without importing it: apex imports torch, and commands on a login node must not.

NVIDIA removed apex.amp from its apex in May 2025 (NVIDIA/apex #1896), and PyPI's `apex` is an unrelated web toolkit of
2013. So the parts themselves are looked for, never a version. models/precision.py imports them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import THROUGH_ALL

SOURCE = "git+https://github.com/NVIDIA/apex"
BUILD = f"APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation {SOURCE}"
# The tags that still have amp take their build options from pip; the environment variables came later.
BUILD_WITH_AMP = (
    'pip install -v --no-build-isolation --config-settings "--build-option=--cpp_ext" '
    f'--config-settings "--build-option=--cuda_ext" {SOURCE}@25.05'
)
NEAREST = {
    "apex-O1": "run.precision=fp16 or run.precision=bf16: autocast, which O1 became, loss scaling included",
    "apex-O2": "run.precision=fp16 or run.precision=bf16: the frozen trunk in low precision, the head in fp32",
}


@dataclass(frozen=True)
class Apex:
    """The `apex` that Python would import."""

    path: str  # empty: there is none
    is_nvidia: bool
    has_amp: bool  # apex.amp
    has_kernels: bool  # amp_C, which the fused optimizers need
    version: str  # commit if pip built it from git, else the version in its metadata

    def describe(self) -> str:
        if not self.path:
            return "no apex is installed"
        if not self.is_nvidia:
            return f"the apex at {self.path} ({self.version}) is not NVIDIA's (PyPI's package of that name is an unrelated web toolkit)"
        return f"NVIDIA's apex at {self.path} ({self.version})"


def find() -> Apex:
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return Apex("", False, False, False, "")
    root = Path(next(iter(spec.submodule_search_locations)))
    nvidia = (root / "multi_tensor_apply").is_dir()
    kernels = nvidia and importlib.util.find_spec("amp_C") is not None
    return Apex(str(root), nvidia, nvidia and (root / "amp" / "__init__.py").exists(), kernels, version())


def version() -> str:
    """The commit where pip recorded it (PEP 610): NVIDIA's metadata say 0.1 for every source."""
    try:
        installed = importlib.metadata.distribution("apex")
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"
    commit = json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return f"commit {commit[:10]}" if commit else f"version {installed.version}"


def check_apex(config: Config) -> None:
    """The one check of apex: raises UserError if run.precision or run.optimizer need what the apex here, or its amp, cannot do.

    Called at submission and again by the worker, because its node or container may have another apex.
    """
    run, policy = config.run, config.tune.policy
    if run.precision not in NEAREST and run.optimizer != "apex":
        return
    apex = find()
    instead = NEAREST.get(run.precision, "")
    remove = "" if apex.is_nvidia or not apex.path else "pip uninstall apex; "
    no_amp = ", which has no apex.amp" if apex.is_nvidia else ""
    no_kernels = ", built without its CUDA extensions (no amp_C)" if apex.is_nvidia else ""
    of_amp = [
        (run.compile is True, " cannot be compiled: apex.amp patches torch", ""),
        (
            run.engine == "cached",
            " with run.engine=cached: the cache holds features of our own trunk, not of apex's",
            "",
        ),
        (config.pretrain is not None, " with stage one: apex.amp can be set up only once in a process", ""),
        (
            run.precision == "apex-O2" and policy in ("last_block", *THROUGH_ALL),
            f" with tune.policy={policy}: O2 trains fp32 copies inside the optimizer, and a checkpoint of the model's own "
            "tensors does not resume them exactly",
            "run.precision=apex-O1, or ",
        ),
        (
            not apex.has_amp,
            f" needs apex.amp: {apex.describe()}{no_amp}. NVIDIA removed amp in May 2025; the last tags with it are 25.04 "
            f"and 25.05. To build one: {remove}{BUILD_WITH_AMP}",
            "",
        ),
    ]
    for refused, why, other in of_amp if run.precision in NEAREST else []:
        if refused:
            raise UserError(f"run.precision={run.precision}{why}. Next: {other}{instead}")
    if run.optimizer == "apex" and not apex.has_kernels:
        raise UserError(
            f"run.optimizer=apex needs apex.optimizers.FusedSGD: {apex.describe()}{no_kernels}. "
            f"Next: run.optimizer=torch (the same updates), or {remove}{BUILD}"
        )
