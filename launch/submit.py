"""Submit a run: `python launch/submit.py --model l2 --res 600 --nodes 4`. The same command again resumes it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fixres_dist import cluster, planning, recipes, rundir
from fixres_dist import config as cfg
from fixres_dist.errors import EXIT_DONE, EXIT_USER, UserError

EXAMPLES = """\
examples:
  python launch/submit.py --list
  python launch/submit.py --model l2 --res 600 --nodes 4 --dry-run
  python launch/submit.py --model b0 --res 320 --data /data/imagenet --weights ap --profile slurm/profiles/generic.yaml
  python launch/submit.py --model b0 --res 320 --data DIR --cluster local --gpus-per-node 2 tune.epochs=3
  python launch/submit.py --data demo --cluster inline
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="a recipe (--list) or any timm model name")
    p.add_argument("--res", help="test resolution in pixels, the one that is fixed; default: the recipe's")
    p.add_argument("--weights", default="", help="ns, ap, pretrained, none, or a file; default: the recipe's")
    p.add_argument("--data", help="directory with train/ and val/, a folder per class; or demo")
    p.add_argument("--nodes", help="a number, or MIN-MAX: start with what there is")
    p.add_argument("--gpus-per-node", help="ranks per node; on a machine without GPUs: processes")
    p.add_argument("--profile", type=Path, help="YAML with the site's cluster settings (slurm/profiles/)")
    p.add_argument("--name", help="of the run directory; default: MODEL-RES")
    p.add_argument("--runs-dir", type=Path, default=Path("runs"))
    p.add_argument(
        "--cluster", choices=("slurm", "local", "inline"), help="default: slurm where sbatch is found, else local"
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and the sbatch text; write nothing")
    p.add_argument("--list", action="store_true", help="show the recipes with starting and published accuracy")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="any setting, such as tune.epochs=3")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    try:
        return list_recipes() if args.list else submit(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER


def list_recipes() -> int:
    print(f"{'--model':<8}{'--weights':<10}{'--res':>6}   {'timm starts at':<15}{'published, fixed':<18}timm name")
    for recipe in recipes.every():
        row = recipe.published
        assert row is not None
        start = f"{row['timm_base_top1']} @{row['train_res']}"
        print(
            f"{recipe.name:<8}{recipe.weights:<10}{row['fix_test_res']:>6}   {start:<15}{row['fix_top1'] + ' top-1':<18}{row['timm_name']}"
        )
    print("demo    none               the built-in example: trained and fixed from scratch in minutes on a CPU")
    print("Published: arXiv 2003.08237, Tables 1 and 2. Any other timm model name works too, with --res.")
    return EXIT_DONE


def configure(args: argparse.Namespace, kind: str) -> tuple[cfg.Config, recipes.Recipe]:
    """Defaults < recipe < profile < flags < section.key=value."""
    name = args.model or ("demo" if args.data in (None, "demo") and not args.profile else None)
    if name is None or (name == "demo" and args.data is None and args.model is None):
        raise UserError("no --model given. Next: --model b0 --res 320, or --list for the recipes, or --data demo.")
    recipe = recipes.find(name, args.weights)
    values = recipe.values
    if args.profile:
        if not args.profile.is_file():
            raise UserError(f"no profile {args.profile}. Accepted: a YAML file such as slurm/profiles/generic.yaml.")
        values = cfg.merge(values, cfg.read_yaml(args.profile.read_text()) or {})
    flags: dict[str, dict[str, str]] = {"data": {}, "cluster": {}}
    if args.res is not None:
        flags["data"]["res"] = args.res
    if args.data is not None:
        flags["data"]["root"] = args.data
    if args.nodes is not None:
        flags["cluster"]["nodes"] = args.nodes
    if args.gpus_per_node is not None:
        flags["cluster"]["gpus_per_node"] = args.gpus_per_node
    elif kind != "slurm":
        flags["cluster"]["gpus_per_node"] = str(cluster.local_devices() if kind == "local" else 1)
    values = cfg.merge(cfg.merge(values, flags), cfg.overrides(args.overrides))
    if "res" not in values["data"]:
        raise UserError(
            f"no --res given, and nothing is published for {name}. Next: --res 288, say: above its training resolution."
        )
    if values["data"].get("root") not in (None, "", "demo"):
        values["data"]["root"] = str(Path(values["data"]["root"]).expanduser().absolute())
    if values["model"].get("weights", "none") not in recipes.WEIGHTS:
        values["model"]["weights"] = str(Path(values["model"]["weights"]).expanduser().absolute())
    config = cfg.parse(cfg.Config, values)
    if kind != "slurm" and config.cluster.nodes != "1":
        raise UserError(
            f"--nodes {config.cluster.nodes} needs a cluster; --cluster {kind} is this machine alone. Next: --cluster slurm"
        )
    if kind == "inline" and config.cluster.gpus_per_node != 1:
        raise UserError(
            "--cluster inline is one process. Next: --cluster local --gpus-per-node "
            + str(config.cluster.gpus_per_node)
        )
    return config, recipe


def submit(args: argparse.Namespace) -> int:
    kind = args.cluster or cluster.default_cluster()
    config, recipe = configure(args, "slurm" if args.dry_run and args.cluster is None else kind)
    least, most = config.cluster.node_range()
    world_size = least * config.cluster.gpus_per_node
    planning.check(config, world_size if least == most else 1, dry=args.dry_run)
    name = args.name or recipes.run_name(config.model.name, config.data.res, config.model.weights)
    run = rundir.RunDir(args.runs_dir / name)
    rundir.check(run.root, config)
    plan = planning.lines(config, recipe.facts, planning.count(config), run.root, world_size)
    if args.dry_run:
        print("\n".join(plan))
        print(f"\n# what sbatch would get\n{cluster.sbatch_text(config, run)}")
        return EXIT_DONE
    if run.is_locked():
        print(f"{name} is running already. Next: python launch/status.py {name}")
        return EXIT_DONE
    if run.done.exists():
        print(f"{name} is finished; its results: {run.results}")
        return EXIT_DONE
    if config.model.weights not in recipes.WEIGHTS:
        from fixres_dist import models  # a file is checked here rather than in the queue; this imports torch

        models.check_weights(
            config.model.timm_name, planning.count(config).classes, config.model.weights, config.pretrain is not None
        )
    command = ["python", "launch/submit.py", *map(shlex.quote, sys.argv[1:])]
    run = rundir.prepare(run.root, config, command)
    run.event("submitted", cluster=kind, command=" ".join(command))
    print("\n".join(plan), flush=True)
    return start(run, config, kind)


def start(run: rundir.RunDir, config: cfg.Config, kind: str) -> int:
    if kind == "slurm":
        raise UserError(
            "submission to Slurm is not part of this version yet. Next: --cluster local, or --dry-run for the sbatch text."
        )
    if config.data.root == "demo":
        from fixres_dist.data import sources  # written here, where its progress bar can be seen

        sources.folder("demo", config.data.cache)
    rundir.write(run.root / "submission.sh", cluster.sbatch_text(config, run))
    if kind == "inline":
        from fixres_dist import train

        return train.run(run.root)
    return cluster.run_local(run, config.cluster.gpus_per_node)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
