"""Number format of the frozen trunk (its head is fp32) or, with last_block and all, of the whole model.

torch (autocast, GradScaler) and NVIDIA's apex.amp are used in the same way: `low` is the context of low-precision work,
`fp32` that of the rest, and `LossScale` takes the steps. apex is imported in this module only.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fixres_dist.base.errors import UserError, first_line
from fixres_dist.config.schema import Run
from fixres_dist.models import nvidia_apex

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(setting: str, device: torch.device) -> str:
    """run.precision without `auto`: that is bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU.

    torch emulates bf16 on GPUs before Ampere (V100, T4), which is slower than fp32 there.
    """
    if setting != "auto":
        return setting
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextlib.contextmanager
def refusal(setting: str, instead: str) -> Iterator[None]:
    """Turns what apex raises by itself (no GPU, a torch too new for it) into a UserError; nvidia_apex.check_apex comes before."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{setting}: apex refuses ({type(error).__name__}: {error}). Next: {instead}") from error


@contextlib.contextmanager
def determinism(settings: Run) -> Iterator[None]:
    """With run.deterministic: within it, torch takes deterministic algorithms, and a UserError names an operation without.

    It is entered before CUDA starts, which is when cuBLAS reads its variable.
    """
    if not settings.deterministic:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It guards reads of memory that was never written, and there are none.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined,unused-ignore]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(f"run.deterministic=true: {first_line(error)} Next: run.deterministic=false") from error
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


class Arithmetic:
    """How a session computes. `name`: fp32, tf32, bf16, fp16, apex-O1 or apex-O2, as `resolve` returns it.

    Raises UserError where apex is asked for and fails to import.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.dtype = DTYPES.get(name, torch.float32)  # of a frozen trunk's weights; apex casts by itself
        # Not by `fp32_precision`, the newer name: once it is set, torch.export fails in torch 2.15, since it reads the older.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
        self.amp: Any = None
        self.level = ""
        self.patched = False  # O1 replaces functions of torch in this process, once
        if name.startswith("apex-"):
            with refusal(f"run.precision={name}", nvidia_apex.NEAREST[name]):
                from apex import amp
            self.amp, self.level = amp, name.removeprefix("apex-")

    def initialize(self, *model_and_optimizer: Any) -> Any:
        """The model, or (model, optimizer), as amp.initialize returns it for this level; raises UserError where apex fails."""
        self.patched = True
        with refusal(f"run.precision={self.name}", nvidia_apex.NEAREST[self.name]):
            return self.amp.initialize(*model_and_optimizer, opt_level=self.level, verbosity=0)

    def frozen(self, trunk: nn.Module) -> nn.Module:
        """apex's form of a frozen trunk: under O2 a copy in fp16 with fp32 BatchNorms, under O1 `trunk` itself."""
        return self.initialize(copy.deepcopy(trunk)) if self.level == "O2" else trunk

    @contextlib.contextmanager
    def low(self) -> Iterator[None]:
        if self.level == "O1" and not self.patched:
            self.initialize(nn.Identity())  # O1 patches torch's functions; the model does not matter
        with torch.autocast(self.device.type, DTYPES[self.name]) if self.name in DTYPES else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def fp32(self) -> Iterator[None]:
        """Keeps O1's patched functions from casting: for the head of a frozen trunk, its statistics, and folding."""
        with self.amp.disable_casts() if self.level == "O1" and self.patched else contextlib.nullcontext():
            yield


class LossScale:
    """Backward pass and optimizer step with loss scaling (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740).

    `low_head`: the head, if it trains in low precision. With fp16 or apex its loss is scaled against underflow, and a step
    whose gradients overflow is skipped. With bf16, which does not underflow, or None nothing is scaled.
    """

    def __init__(self, arithmetic: Arithmetic, optimizer: torch.optim.Optimizer, low_head: nn.Module | None) -> None:
        self.optimizer, self.amp, self.skipped = optimizer, None, 0
        self.taken = False  # the last step; reading the scale instead would wait for the device
        if arithmetic.amp and low_head is not None:
            self.amp = arithmetic.amp
            arithmetic.initialize(low_head, optimizer)  # O1 changes both in place
        fp16 = arithmetic.name == "fp16" and low_head is not None
        self.scaler = torch.amp.GradScaler(arithmetic.device.type, enabled=fp16)
        optimizer.register_step_post_hook(self.note_taken)

    def note_taken(self, *_: object) -> None:
        self.taken = True

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch; after the `last` one of a step they are unscaled."""
        if self.amp:
            # Unscaled only once: apex would set the earlier sums aside, and DDP would not add them up over ranks.
            with self.amp.scale_loss(loss, self.optimizer, delay_unscale=not last) as scaled:
                scaled.backward()
            return
        torch.autograd.backward(self.scaler.scale(loss))
        if last:
            self.scaler.unscale_(self.optimizer)

    def step(self) -> bool:
        """Take the step and return True; if gradients overflowed, skip it, lower the scale and return False."""
        self.taken = False
        if self.amp:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.skipped += not self.taken
        return self.taken

    def metrics(self) -> dict[str, float]:
        return {"loss_scale": self.value, "skipped_steps": self.skipped} if self.amp or self.scaler.is_enabled() else {}

    @property
    def value(self) -> float:
        return float(self.amp.state_dict()["loss_scaler0"]["loss_scale"]) if self.amp else self.scaler.get_scale()

    def state(self) -> dict[str, Any]:
        """For the checkpoint: the scale depends on all overflows so far, so a resume without it would not be exact."""
        return {"skipped": self.skipped, "scaler": (self.amp or self.scaler).state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        if state and state["scaler"]:
            self.skipped = state["skipped"]
            (self.amp or self.scaler).load_state_dict(state["scaler"])


def sgd(implementation: str, parameters: list[nn.Parameter], momentum: float, decay: float) -> torch.optim.Optimizer:
    """SGD with momentum, by `torch` or by `apex` in one fused kernel: the same updates, to rounding, and the same state.

    The learning rate is 0 until the loop sets it. Raises UserError where apex fails.
    """
    options: dict[str, Any] = {"lr": 0.0, "momentum": momentum, "weight_decay": decay}
    if implementation == "torch":
        return torch.optim.SGD(parameters, **options)
    with refusal("run.optimizer=apex", "run.optimizer=torch"):
        from apex.optimizers import FusedSGD

        fused: torch.optim.Optimizer = FusedSGD(parameters, **options)
    return fused
