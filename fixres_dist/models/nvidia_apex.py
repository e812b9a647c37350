"""What the installed apex can do, found without importing it: apex imports torch, and a login node's commands must not.

NVIDIA's apex has carried ever less since apex.amp left it (NVIDIA/apex #1896, May 2025), and PyPI's `apex` is a web
toolkit of 2013 with nothing but the name in common. So a capability is looked for, never a version. precision.py uses it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from fixres_dist.base.errors import UserError
from fixres_dist.config.schema import Config

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
    has_kernels: bool  # amp_C, which the fused optimizers run on
    version: str  # the commit where pip built it from git, else what the metadata say

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
    """NVIDIA's metadata say 0.1 whatever the source, so the commit is told where pip recorded it (PEP 610)."""
    try:
        installed = importlib.metadata.distribution("apex")
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"
    commit = json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {}).get("commit_id")
    return f"commit {commit[:10]}" if commit else f"version {installed.version}"


def check(config: Config) -> None:
    """Raise UserError where `run.precision` or `run.optimizer` ask for what the installed apex lacks, or cannot do here."""
    run = config.run
    if run.precision not in NEAREST and run.optimizer != "apex":
        return
    found = find()
    instead = NEAREST.get(run.precision, "")
    remove = "" if found.is_nvidia or not found.path else "pip uninstall apex; "
    if run.precision in NEAREST:
        trained = {config.tune.policy} & {"all", "last_block"}
        if run.compile is True:
            raise UserError(
                f"run.precision={run.precision} cannot be compiled: apex.amp patches torch. Next: {instead}"
            )
        if run.engine == "cached":
            raise UserError(
                f"run.precision={run.precision} with run.engine=cached: features are kept as our own trunk makes them. Next: {instead}"
            )
        if config.pretrain:
            raise UserError(
                f"run.precision={run.precision} with stage one: apex.amp is set up once in a process. Next: {instead}"
            )
        if run.precision == "apex-O2" and trained:
            raise UserError(
                f"run.precision=apex-O2 with tune.policy={config.tune.policy}: O2 trains fp32 copies inside the optimizer, which "
                f"no checkpoint of the model's own tensors resumes exactly. Next: run.precision=apex-O1, or {instead}"
            )
        if not found.has_amp:
            lacks = ", which has no apex.amp" if found.is_nvidia else ""
            raise UserError(
                f"run.precision={run.precision} needs apex.amp: {found.describe()}{lacks}. NVIDIA removed amp in May 2025; the "
                f"last tags with it are 25.04 and 25.05. Nearest here: {instead}. Next: that, or {remove}{BUILD_WITH_AMP}"
            )
    if run.optimizer == "apex" and not found.has_kernels:
        lacks = ", built without its CUDA extensions (no amp_C)" if found.is_nvidia else ""
        raise UserError(
            f"run.optimizer=apex needs apex.optimizers.FusedSGD: {found.describe()}{lacks}. "
            f"Next: run.optimizer=torch (the same updates), or {remove}{BUILD}"
        )
