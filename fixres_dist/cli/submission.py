"""What submit and resume share: the checks before a run starts, and its start on Slurm or on this machine."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from fixres_dist.base.errors import EXIT_DONE, UserError
from fixres_dist.base.files import owner, write_text
from fixres_dist.base.secrets import redacted
from fixres_dist.cli.command_job import CommandJob
from fixres_dist.cluster import jobs, local, node_memory, notify, slurm, status
from fixres_dist.config import reading, recipes
from fixres_dist.config.recipes import Recipe
from fixres_dist.config.schema import Cluster, Config
from fixres_dist.runs import preparation, snapshots
from fixres_dist.runs.rundir import START_LOCK, RunDir
from fixres_dist.runs.states import UNFINISHED
from fixres_dist.training import plan
from fixres_dist.training.job import TrainJob
from fixres_dist.training.stages import batch_by_pixels, batch_per_device


def check(run: RunDir, config: Config, dry: bool = False) -> None:
    """Refuse what can be refused before anything starts: settings, data set, and a directory of another run."""
    least, most = config.cluster.node_range()
    if not run.task:
        plan.check(config, least * config.cluster.gpus_per_node if least == most else 1, dry=dry)
    jobs.check_times(config.cluster)
    preparation.check(run.root, config)


def check_model(config: Config, recipe: Recipe) -> None:
    """Build a model that no recipe describes on the meta device, so that it fails here and not in the queue; imports torch.

    Also one whose batch is set to more than `auto` takes, which any GPU can index.
    """
    batch = config.run.batch_per_device
    large = batch != "auto" and batch > min(batch_by_pixels(res) for res in config.resolutions())
    attention = any(stage.policy == "attention" for stage in config.stage_settings())  # recipes' networks have none
    if config.model.weights in recipes.WEIGHTS and recipe.facts and not attention and not large:
        return
    build_on_paper(reading.dump(replace(config, cluster=Cluster())), plan.classes(config))


@lru_cache(maxsize=4)
def build_on_paper(settings: str, classes: tuple[str, ...]) -> None:
    """`settings`: config.yaml's text; of equal ones the model is built once. Raises UserError."""
    config = reading.load(settings)
    batch = config.run.batch_per_device
    import torch

    from fixres_dist.models.build import preprocessing
    from fixres_dist.models.parts import parts_of
    from fixres_dist.models.resizing import check_batch
    from fixres_dist.models.weights import open_model

    preprocessing(config.model.timm_name)  # refuses pictures that are not made here
    with torch.device("meta"):
        model = open_model(config, classes)
    for stage in config.stage_settings():
        parts_of(model, stage.policy)
    if batch != "auto":
        check_batch(model, batch, config.resolutions())


def check_slurm(config: Config, *runs: RunDir, at_once: int = 0) -> None:
    """Refuse a job that Slurm refuses, or that no Slurm answers; prints what a person should know before it waits."""
    said = jobs.ask_slurm(jobs.sbatch_text(config, *runs, at_once=at_once), config.cluster)
    if not said:
        raise UserError(
            "Slurm does not answer here (sbatch --test-only). Next: a login node of the cluster, or --cluster local."
        )
    notes = jobs.check_limits(config.cluster)
    if left_out := jobs.told_of_the_shell():
        notes.append(f"of this shell, sbatch does not get {' '.join(left_out)}: the run's settings count")
    for note in [*([said] if "is queued" in said else []), *notes]:
        print(f"note: {note}", file=sys.stderr)


def shows_sbatch(args: argparse.Namespace) -> bool:
    """Whether a dry run shows what sbatch would get: where Slurm is meant, or asked for by `--show sbatch`."""
    if args.show or args.cluster == "slurm":
        return True
    return means_slurm(args) and (args.cluster is None or (args.command != "submit" and args.cluster == "inline"))


def means_slurm(args: argparse.Namespace) -> bool:
    """Whether a dry run without --cluster is of a cluster: Slurm is here, or nodes or a profile say that it is elsewhere."""
    return jobs.default_cluster() == "slurm" or bool(args.nodes or args.profile or args.show)


def print_sbatch(config: Config, runs: Sequence[RunDir], at_once: int = 0) -> None:
    """What a job asks of memory, the text that sbatch would get, without secrets, and what Slurm says of it."""
    text = jobs.sbatch_text(config, *runs, at_once=at_once)
    said = jobs.ask_slurm(text, config.cluster) if jobs.default_cluster() == "slurm" else ""
    print(f"{node_memory.note(config.cluster)}\n\n# what sbatch would get\n{redacted(text, config.cluster.env)}")
    print(f"\n# Slurm says: {said or 'nothing here (sbatch --test-only got no answer)'}")


def needs_no_job(run: RunDir) -> bool:
    """Whether the run is finished, running or queued already; prints which."""
    following = f"Next: {run.command('status')}"
    if run.done.exists():
        print(f"{run.name} is finished; its results: {run.result}")
        return True
    if run.is_locked() or run.is_locked(START_LOCK):
        print(f"{run.name} is running already. {following}")
        return True
    job = run.state().slurm_job
    queued = slurm.queue([owner(run.root)]) if job else {}
    if queued is None and run.state().state in UNFINISHED and jobs.default_cluster() == "slurm":
        raise UserError(
            f"{run.name} is job {job}, and squeue does not answer whether that is still there. Next: a login node of the cluster."
        )
    if job and queued and job in queued:
        print(f"{run.name} is in the queue already, as job {job} ({queued[job].state}). {following}")
        return True
    return False


def renew_old_snapshot(run: RunDir) -> None:
    """Replace a code snapshot from before the package had its rooms: its job would not find what this version submits."""
    if not run.code.joinpath(*TrainJob.__module__.split(".")).with_suffix(".py").is_file():
        print(
            f"{run.code} is of an earlier version, which cannot be resumed by this one: the installed code replaces it"
        )
        snapshots.keep(run.code)


def write_demo(config: Config) -> None:
    """Write the built-in example now, where its progress bar can be seen."""
    if config.data.root == "demo":
        from fixres_dist.data import dataset

        dataset.folder("demo", config.data.cache)


def job_of(run: RunDir) -> type[TrainJob]:
    """What the ranks of its job do."""
    return CommandJob if run.task else TrainJob


def start_slurm(runs: list[RunDir], config: Config, at_once: int = 0) -> int:
    """Submit the prepared runs, several as one array of which `at_once` run at a time (0: all)."""
    write_demo(config)
    print(node_memory.note(config.cluster), flush=True)
    for run, job in zip(runs, jobs.submit_slurm(config, runs, job_of(runs[0]), at_once), strict=True):
        print(f"submitted {run.name} as job {job}")
    return EXIT_DONE


def print_next(runs: Sequence[RunDir], grid: str = "") -> None:
    """The commands that follow for all of these runs, by the name of their `grid` where that stands for them alone.

    A run may have the same name, or runs of another grid begin with it: those are not to be cancelled.
    """
    folder = runs[0].root.parent
    of_name = {run.root for run in status.every(folder) if status.of_grid(run.name, grid)} if grid else set()
    alone = of_name == {run.root for run in runs} and not RunDir(folder / grid).config_file.exists()
    first, *others = [RunDir(folder / grid)] if alone else runs
    more = [*(["resume"] if len(runs) > 1 else []), *([] if runs[0].task else ["board"])]
    for name in ("status", "logs", "cancel", *more):
        words = ["--follow"] if name == "logs" else []
        print(f"  {first.command(name, *words, others=[run.name for run in others])}")


def start_here(run: RunDir, config: Config, kind: str) -> int:
    """Work on the run to its end, in this process (`inline`) or in several (`local`); returns the exit code."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # a rank's log is followed as it is written
    write_demo(config)
    whole = replace(config, cluster=replace(config.cluster, mem=node_memory.WHOLE))  # Slurm need not be asked
    text = jobs.sbatch_text(whole, run)
    write_text(run.submission, text, private=reading.has_secrets(config))
    # These ranks are the command's own: not those of the job, srun or torchrun in which it was typed.
    with jobs.clean_environment(), contextlib.ExitStack() as stack:
        stack.callback(lambda: notify.tell(run, log=local.log_of_main(run) if kind == "local" else None))
        if kind == "inline":
            return job_of(run)(str(run.root.resolve()))()  # messages that it keeps hold in any folder
        smaller = max(1, max(batch_per_device(config, res) for res in config.resolutions()) // 2)
        return local.run_local(run, config.cluster.gpus_per_node, job_of(run), smaller)
