"""What a run says when its numbers are no longer finite. Checked where they are read anyway, so no step waits for it."""

from __future__ import annotations

import re

import torch

from fixres_dist.config.schema import Config
from fixres_dist.models.parts import Parts
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.stages import Stage


class Diverged(Exception):
    """Loss or weights are not finite, the same on all ranks. No retry can help: the same steps lead there again."""

    def __init__(self, why: str, next_command: str) -> None:
        super().__init__(why)
        self.why, self.next_command = why, next_command


@torch.no_grad()
def not_finite(parts: Parts, optimizer: torch.optim.Optimizer) -> str:
    """The first tuned tensor, or the optimizer's state of one, with a value that is not finite; empty if there is none.

    One wait for the device.
    """
    state, parameters = parts.model.state_dict(), dict(parts.model.named_parameters())
    tensors = {name: state[name] for name in parts.tuned.tensors}
    for name in parts.tuned.parameters:
        kept = optimizer.state.get(parameters[name], {})
        tensors |= {f"{key} of {name}": v for key, v in kept.items() if isinstance(v, torch.Tensor) and key != "step"}
    flags = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    return next((name for name, fine in zip(tensors, flags, strict=True) if not fine), "")


def diverged(run: RunDir, config: Config, stage: Stage, step: int, precision: str, what: str) -> Diverged:
    """`what` is not finite after `step` steps: where that was, and a command that tries something else."""
    section, saved = "tune" if stage.name == "fix" else "pretrain", run.saved_step()
    why, tries = f"{what} at step {step} (stage {stage.name}, precision {precision}", []
    if step > stage.first:
        why += f", learning rate {stage.learning_rate(step - 1):.3g}, {section}.base_lr {stage.tune.base_lr:g}"
        tries.append(f"{section}.base_lr={stage.tune.base_lr / 10:g}")
    if precision != "fp32":
        tries.append("run.precision=fp32")
    kept = f"the checkpoint of step {saved} is the last one, and finite" if saved >= 0 else "there is no checkpoint yet"
    if not tries:
        return Diverged(f"{why}); {kept}", "other weights (--weights), or photographs that can be decoded")
    kept_words = re.sub(rf" (--name[ =]|{section}\.base_lr=|run\.precision=)\S+", "", run.submit_command())
    again = f"{kept_words} --name {run.name}-finite {' '.join(tries)}"
    return Diverged(f"{why}); {kept}", f"a lower learning rate or more precision, such as: {again}")
