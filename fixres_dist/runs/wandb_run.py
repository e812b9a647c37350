"""The values of TensorBoard in Weights & Biases as well, on request (run.logger=wandb). What W&B's own variables say holds, such as
WANDB_PROJECT, and WANDB_MODE=offline on nodes without network."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from fixres_dist.base.errors import UserError
from fixres_dist.runs.rundir import RunDir

AT = "step"  # the x axis of every curve: optimizer steps, or what its tag says


def check() -> None:
    """Raises UserError where the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("run.logger=wandb needs the package wandb. Next: pip install -e .[wandb], or run.logger=none")


class WandbRun:
    """One start of a stage; all of a run's have one id, under which W&B puts them together."""

    def __init__(self, run: RunDir, settings: Mapping[str, Any]) -> None:
        check()
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fixres_dist"),
            id=hashlib.sha256(os.fsencode(run.root.resolve())).hexdigest()[:16],
            name=run.name,
            dir=run.root,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self.run.define_metric("*", step_metric=AT)

    def scalar(self, tag: str, value: float, at: int) -> None:
        self.run.log({tag: value, AT: at})

    def close(self) -> None:
        self.run.finish()
