"""A run directory is made, or reopened by the command that it belongs to. No torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from fixres_dist.base.commands import shell
from fixres_dist.base.environment import environment
from fixres_dist.base.errors import StorageError, UserError
from fixres_dist.base.files import write_text
from fixres_dist.base.secrets import redacted
from fixres_dist.base.small_files import Damaged, read_json, write_json
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.runs import names, snapshots
from fixres_dist.runs.rundir import RunDir


def prepare(root: Path, config: Config, typed: str) -> RunDir:
    """Create the run directory, or reopen the one that belongs to this configuration.

    Raises UserError when `root` holds something else: another configuration (the differences are named) or other files.
    """
    check(root, config)
    return write(root, config, typed)


def write(root: Path, config: Config, typed: str) -> RunDir:
    """The files of a run that is not finished; `typed`: the command that submits it."""
    run = RunDir(root)
    root.mkdir(parents=True, exist_ok=True)
    write_config(run, config)
    if not run.state_file.exists():
        run.update_state()
    if not run.done.exists():
        write_text(root / "command.txt", redacted(typed, config.cluster.env) + "\n")
        write_json(root / "environment.json", environment())
        snapshots.keep(run.code)
    return run


def write_config(run: RunDir, config: Config) -> None:
    write_text(run.config_file, reading.dump(config), private=reading.has_secrets(config))


def check(root: Path, config: Config) -> None:
    """Refuse a directory that is not this run's; writes nothing."""
    if not root.exists():
        names.check(root)
        return
    run = RunDir(root)
    if not (run.config_file.exists() or run.state_file.exists()):
        if root.is_dir() and all(path.name.startswith(".") for path in root.iterdir()):
            return
        raise UserError(f"{root} exists and is no run directory. Pick another --name.")
    known = fixed_settings(run)
    differ = reading.differences(known, reading.identity(config)) if known is not None else []
    if differ:
        listed = "; ".join(differ[:6])
        raise UserError(
            f"run directory {root} holds a run with other settings ({listed}). "
            f"Pick another --name, or move it away: {shell('mv', root, f'{root}.old')}"
        )


def mend_config(run: RunDir, config: Config) -> None:
    """Write config.yaml again where it is damaged."""
    with contextlib.suppress(UserError):  # a new directory
        try:
            run.submitted()
        except Damaged as error:
            print(f"{error.why}: {run.config_file} is written again from this command")
            write_config(run, config)


def fixed_settings(run: RunDir) -> dict[str, Any] | None:
    """The settings of the run that may not change: of its config.yaml; where that is damaged, of its newest checkpoint, or
    None where there is none either, so that nothing depends on them, and where they are those that it has chosen."""
    try:
        return reading.identity(run.submitted())
    except Damaged:
        for file in () if run.chosen.exists() else sorted(run.checkpoints.glob("step_*/meta.json"), reverse=True):
            with contextlib.suppress(OSError, UserError, StorageError, KeyError):
                kept = read_json(file, dict[str, Any], "")["fingerprint"]
                return reading.identity(reading.parse(Config, kept.get("configuration", {})))
    return None
