"""A fresh job into an existing run directory: `python launch/resume.py NAME`. It goes on from the last checkpoint.

For a run that failed, was cancelled, or whose job Slurm cannot requeue any more. The code snapshot stays; the submit
command takes a new one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist.base.errors import EXIT_DONE, UserError, exit_code
from fixres_dist.base.files import write_text
from fixres_dist.base.json_lines import read_lines
from fixres_dist.cluster import jobs, status
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.runs import rundir
from fixres_dist.training import plan
from launch import submit


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", metavar="NAME")
    p.add_argument("--nodes", help="a number, or MIN-MAX; default: as before")
    p.add_argument("--cluster", choices=("slurm", "local", "inline"), help="default: as before")
    p.add_argument("--runs-dir", type=Path, default=Path("runs"))
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as cluster.exclude=n7")
    args = p.parse_intermixed_args()
    return exit_code(lambda: resume(status.find(args.name, args.runs_dir), args))


def resume(run: rundir.RunDir, args: argparse.Namespace) -> int:
    nodes = [f"cluster.nodes={args.nodes}"] if args.nodes else []
    values = reading.merge(asdict(run.config()), reading.overrides([*nodes, *args.overrides]))
    config = reading.parse(Config, recipes.with_absolute_paths(values))
    least, most = config.cluster.node_range()
    plan.check(config, least * config.cluster.gpus_per_node if least == most else 1, dry=False)
    rundir.check(run.root, config)
    submitted = [e for e in read_lines(run.root / "events.jsonl") if e["event"] == "submitted"]
    kind = args.cluster or (submitted[-1]["cluster"] if submitted else jobs.default_cluster())
    if kind == "slurm" and not jobs.ask_slurm(jobs.sbatch_text(config, run)):
        raise UserError("Slurm does not answer here. Next: a login node of the cluster, or --cluster local.")
    with run.lock(".submit.lock", wait_s=60):
        if submit.told_already(run, kind):
            return EXIT_DONE
        write_text(run.root / "config.yaml", reading.dump(config))
        run.event("submitted", cluster=kind, command=run.command("resume"))
        if kind == "slurm":
            return submit.start_slurm([run], config, 0)
    return submit.start_here(run, config, kind)


if __name__ == "__main__":
    sys.exit(main())
