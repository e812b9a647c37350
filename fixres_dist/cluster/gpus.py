"""The GPUs of this machine that a local run may use: those of CUDA_VISIBLE_DEVICES, in its order. No torch, no CUDA."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys

from fixres_dist.base.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
NVIDIA_SMI_S, TORCH_S = 60, 300  # a driver without persistence takes seconds to answer; torch may come from a slow disk


def visible() -> tuple[str, ...]:
    """Names of the GPUs that a process started here may use, in the caller's order: as CUDA_VISIBLE_DEVICES has them.

    Indices, GPU-UUIDs or MIG names. CUDA ignores what follows the first name that is no GPU, so that is left out here too.
    """
    names, chosen = installed(os.environ.get("PATH", "")), os.environ.get(VISIBLE)
    if chosen is None:
        return tuple(name for name in names if name.isdigit())
    # Without nvidia-smi no UUID is known, and older drivers call a MIG device MIG-GPU-UUID/x/y.
    taken = "MIG-GPU-" if any(name.startswith("GPU-") for name in names) else ("GPU-", "MIG-")
    found: list[str] = []
    for name in map(str.strip, chosen.split(",")):
        uuid = name.startswith(("GPU-", "MIG-"))  # it may be abbreviated
        if not names or not (
            name in names or name.startswith(taken) or any(uuid and n.startswith(name) for n in names)
        ):
            break
        found.append(name)
    return tuple(found) if len(set(found)) == len(found) else ()  # CUDA shows none where one is named twice


def ranks_here() -> int:
    """How many ranks `--cluster local` has where nobody says it: one for each GPU, or one process without any."""
    return max(1, len(visible()))


@functools.cache
def installed(path: str) -> tuple[str, ...]:
    """Names of all GPUs of this machine: their indices, GPU-UUIDs and MIG-UUIDs; empty: none. `path`: where programs are.

    By nvidia-smi, which asks the driver; a container may have it without device files. Without an answer, torch counts in
    a process of its own, but only where there is a driver.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", "-L"],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_S,
            check=False,
        )
        said = done.stdout if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if indices := re.findall(r"^GPU (\d+):", said, re.MULTILINE):
        return (*indices, *re.findall(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)", said))
    return tuple(map(str, range(counted_by_torch()))) if has_driver() else ()


def has_driver() -> bool:
    """Whether CUDA's driver library can be loaded; loading it starts nothing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def counted_by_torch() -> int:
    unset = {name: value for name, value in os.environ.items() if name != VISIBLE}
    words = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        done = subprocess.run(words, env=unset, capture_output=True, text=True, timeout=TORCH_S, check=False)
        return int(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0


def check(ranks: int, option: str) -> None:
    """Refuse more local ranks than GPUs, and GPUs that are not there; a machine without GPUs takes any number of processes.

    `option`: how the command spells the number of ranks, for the next one.
    """
    chosen, all_names = os.environ.get(VISIBLE), installed(os.environ.get("PATH", ""))
    found, count = visible(), sum(name.isdigit() for name in all_names)
    own = f" ({VISIBLE}={chosen})" if chosen is not None else ""
    on_cpu = f"or {VISIBLE}= before the command, for processes on the CPU"
    if not found and count and chosen and re.match(r"\d|GPU-|MIG-", chosen.strip()):
        raise UserError(
            f"{VISIBLE} is {chosen}, and names no GPU of this machine, which has {count}, or one twice. "
            f"Accepted: 0 .. {count - 1}, or names from nvidia-smi -L. Next: unset {VISIBLE}, {on_cpu}"
        )
    if found and ranks > len(found):
        raise UserError(
            f"{ranks} ranks need {ranks} GPUs, and this machine offers {len(found)}{own}. "
            f"Accepted: 1 .. {len(found)}. Next: {option}{len(found)}, {on_cpu}"
        )


def for_ranks(ranks: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to be for `ranks` local ranks: one GPU each, the caller's first ones.

    Where no GPU is found the caller's list stands, so that ranks never see more than their caller may use.
    """
    found = visible()
    if not found and not installed(os.environ.get("PATH", "")):
        found = tuple(filter(None, map(str.strip, os.environ.get(VISIBLE, "").split(","))))
    return list(found[:ranks])
