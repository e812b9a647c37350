"""Values that end in a batch script, on sbatch's command line or in a path that Slurm expands: what may stand in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from fixres_dist.base.commands import command
from fixres_dist.base.errors import UserError
from fixres_dist.base.secrets import REDACTED

# sbatch's options that a run's other settings give, and those that it needs as they are to be stopped and requeued.
OTHER_KEYS = {
    **dict.fromkeys(("nodes", "mem", "time", "partition", "account", "qos", "constraint", "exclude"), ""),
    **dict.fromkeys(("ntasks", "ntasks-per-node", "ntasks-per-gpu", "gpus"), "gpus_per_node"),
    "cpus-per-task": "cpus_per_task",
    "signal": "signal_delay_s",
}
FIXED = frozenset(
    ("array", "chdir", "clusters", "error", "export-file", "job-name", "no-requeue", "open-mode", "output", "parsable")
) | {"requeue", "test-only", "wait", "wrap"}
LEFT_OUT = ("", "false", "none", "null")  # as the value of an option: it is not given; NONE is a value of sbatch


def no_stand_in(where: str, values: Iterable[str]) -> None:
    """Refuse a value that a printed command has in place of a secret."""
    if any(REDACTED in value for value in values):
        raise UserError(
            f"{where} has {REDACTED}, which stands for a secret in printed commands. "
            f"Next: the secret itself; or {command('resume', 'NAME')}, which knows it."
        )


def one_line(where: str, text: str) -> str:
    """`text`, if it has no control characters, which a shell line or `#SBATCH` line would not survive."""
    if not text.isprintable():
        raise UserError(f"{where} is {text!r}; accepted: one line of printable characters.")
    return text


def words(where: str, text: str) -> None:
    """Raises UserError for text that a shell cannot divide into words."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where} is {text!r}: {error}. Accepted: words of a shell, such as python3.") from None


def variables(where: str, values: Mapping[str, str]) -> Mapping[str, str]:
    """`values`, if the keys are names of environment variables, and no value has a byte that ends it."""
    for name, value in values.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UserError(
                f"{where} has the key {name!r}; accepted: names of environment variables, such as NCCL_DEBUG."
            )
        one_line(f"{where}: {name}", value.replace("\n", "").replace("\t", ""))
    return values


def sbatch_options(where: str, values: Mapping[str, str]) -> dict[str, str]:
    """`values` by the long names of sbatch's options; raises UserError for one that a run sets itself."""
    options = {}
    for given, value in values.items():
        name = given.lstrip("-").replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
            raise UserError(
                f"{where} has the key {given!r}; accepted: long names of sbatch's options, such as comment."
            )
        if name in FIXED:
            raise UserError(
                f"{where}: a run sets --{name} itself, to be stopped and requeued; accepted: other options."
            )
        if name in OTHER_KEYS:
            key = f"cluster.{OTHER_KEYS[name] or name}"
            raise UserError(f"{where} has --{name}, which has a key of its own. Next: {key}={value}")
        options[name] = one_line(f"{where}: {name}", value)
    return options
