"""Stage one against timm's own training loop at equal epochs: `python benchmarks/stage_one_vs_timm.py run icons DIR --weights FILE`.

timm's package has no train.py, so its parts stand here as that script puts them together: create_transform and create_loader,
Mixup, create_optimizer_v2, create_scheduler_v2 once per update, ModelEmaV3, autocast. Both start from the same weights and
a new classifier, and take the same optimizer, learning rate, batch, epochs, augmentation and size. With `--recipe derived`
stage one has the plain command's settings instead, at the same epochs, batch and size. A row in
benchmarks/results/stage_one_vs_timm.jsonl; `table` prints them. `demo` for DIR is the built-in example.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import load_file
from timm.data import Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import git, processor, versions
from fixres_dist.data import dataset
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predictions import Predictions, paired_gain

ROWS = ROOT / "benchmarks" / "results" / "stage_one_vs_timm.jsonl"
PLAIN: dict[str, Any] = {"optimizer": "nesterov", "base_lr": 0.02, "weight_decay": 1e-4}
# By our names. strong: all that stage one has besides; derived: plain in timm's loop alone.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "derived": PLAIN,
    "strong": {
        "optimizer": "adamw",
        "base_lr": 1e-3,
        "weight_decay": 0.05,
        "layer_decay": 0.8,
        "ema_decay": 0.99,
        "mixup": 0.2,
        "cutmix": 1.0,
        "rand_augment": "rand-m7-mstd0.5-inc1",
        "drop_path": 0.1,
    },
}


def ours(args: argparse.Namespace, name: str) -> tuple[NDArray[np.bool_], str]:
    """(hits on val after stage one, its precision)."""
    settings = {"epochs": args.epochs, "global_batch": args.batch, "res": args.res}
    if args.recipe != "derived":
        settings |= RECIPES[args.recipe] | {"classifier": "new", "bn_stats": "ema"}
        settings |= {"lr_rule": "none", "schedule": "cosine"}
    words = ["--model", args.model, "--data", args.folder, "--res", args.res, "--preset", "own_classes", "--name", name]
    words += ["--cluster", "local", "--gpus-per-node", 1, "--runs-dir", args.runs_dir, "tune.epochs=0"]
    words += [f"pretrain.{key}={value}" for key, value in settings.items()]
    words += [f"run.seed={args.seed}"]
    words += ["--weights", args.weights, "run.eval_every=0"]
    run = RunDir(args.runs_dir / name)
    if not run.done.exists():
        subprocess.run([sys.executable, "-m", "fixres_dist", "submit", *map(str, words)], check=True, cwd=ROOT)
    return Predictions.read(run.root / "predictions" / "after.npz").correct1, Results.read(run).precision


def timms(args: argparse.Namespace, root: Path, low: bool) -> NDArray[np.bool_]:
    """Hits on val after timm's loop. `low`: in bf16 autocast, as our run."""
    torch.manual_seed(args.seed)
    recipe = RECIPES[args.recipe]
    train, val = (torchvision.datasets.ImageFolder(str(root / split)) for split in ("train", "val"))
    model = started(args, len(train.classes), recipe.get("drop_path", 0.0))
    cfg = timm.data.resolve_data_config({}, model=model)
    how = {"mean": cfg["mean"], "std": cfg["std"], "use_prefetcher": False, "device": torch.device("cpu")}
    how |= {
        "input_size": (3, args.res, args.res),
        "batch_size": args.batch,
        "persistent_workers": False,
        "num_workers": 1,
    }
    augment = recipe.get("rand_augment")
    loader = create_loader(
        train,
        is_training=True,
        interpolation="random" if augment else cfg["interpolation"],
        auto_augment=augment,
        **how,
    )
    mixing = {"mixup_alpha": recipe.get("mixup", 0.0), "cutmix_alpha": recipe.get("cutmix", 0.0)}
    mix = Mixup(**mixing, label_smoothing=0.1, num_classes=len(train.classes)) if any(mixing.values()) else None
    options = {"layer_decay": recipe["layer_decay"]} if "layer_decay" in recipe else {}
    name = {"nesterov": "sgd"}.get(recipe["optimizer"], recipe["optimizer"])
    rate, decay = recipe["base_lr"], recipe["weight_decay"]
    optimizer = create_optimizer_v2(model, name, lr=rate, weight_decay=decay, momentum=0.9, **options)
    ema = ModelEmaV3(model, decay=recipe["ema_decay"], use_warmup=True) if "ema_decay" in recipe else None
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if low else contextlib.nullcontext
    loop(args.epochs, model, loader, mix, optimizer, ema, autocast)
    how |= {"crop_pct": cfg["crop_pct"], "interpolation": cfg["interpolation"]}
    return hits(ema.module if ema else model, create_loader(val, **how), autocast)


def started(args: argparse.Namespace, classes: int, drop_path: float) -> nn.Module:
    """The network with the weights, its classifier new."""
    model = timm.create_model(args.model, num_classes=classes, drop_path_rate=drop_path)
    given = load_file(args.weights)
    model.load_state_dict(
        {name: given[name] if given[name].shape == t.shape else t for name, t in model.state_dict().items()}
    )
    return model


def loop(
    epochs: int,
    model: nn.Module,
    loader: Any,
    mix: Mixup | None,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    """The order of timm's train_one_epoch."""
    loss_of = SoftTargetCrossEntropy() if mix else LabelSmoothingCrossEntropy(0.1)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", epochs, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    step = 0
    for epoch in range(epochs):
        model.train()
        for images, labels in loader:
            x, y = mix(images, labels) if mix else (images, labels)
            with autocast():
                loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            if ema:
                ema.update(model, step=step)
        print(f"timm: epoch {epoch + 1} of {epochs}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def hits(model: nn.Module, loader: Any, autocast: Any) -> NDArray[np.bool_]:
    model.eval()
    found = []
    for images, labels in loader:
        with autocast():
            found.append(model(images).argmax(1) == labels)
    return torch.cat(found).numpy()


def measure(args: argparse.Namespace) -> None:
    key = {"set": args.kind, "model": args.model, "recipe": args.recipe, "res": args.res, "epochs": args.epochs}
    key |= {"batch": args.batch, "seed": args.seed}
    if any(key.items() <= row.items() for row in rows()):
        return
    name = "-".join(map(str, [*key.values()])).replace("/", "_")
    own, precision = ours(args, name)
    root = dataset.folder(args.folder, "")
    other = timms(args, root, low=precision == "bf16")
    gain = paired_gain(other, own)
    row = {**key, "n": len(own), "timm": 100 * float(other.mean()), "ours": 100 * float(own.mean())}
    row |= {"difference": gain.delta_top1, "ci95": gain.delta_ci95, "precision": precision}
    row |= {"hardware": processor(), "commit": git(ROOT, "rev-parse", "HEAD"), "versions": versions()}
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table() -> None:
    print("| set | recipe | px, epochs, batch | seed | n | timm's loop | stage one | difference (paired 95 %) |")
    print("|-|-|-|-|-|-|-|-|")
    for r in rows():
        low, high = r["ci95"]
        cells = [r["set"], r["recipe"], f"{r['res']}, {r['epochs']}, {r['batch']}", r["seed"], r["n"]]
        cells += [f"{r['timm']:.1f}", f"{r['ours']:.1f}", f"{r['difference']:+.1f} ({low:+.1f} to {high:+.1f})"]
        print(f"| {' | '.join(map(str, cells))} |")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("kind", help="the set's name in the table")
    run.add_argument("folder", help="data set with train/ and val/, or demo")
    run.add_argument("--weights", required=True, help="safetensors file of timm's names")
    run.add_argument("--model", default="tf_efficientnet_lite0")
    run.add_argument("--recipe", choices=RECIPES, default="plain")
    run.add_argument("--res", type=int, default=64)
    run.add_argument("--epochs", type=int, default=10)
    run.add_argument("--batch", type=int, default=32)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--runs-dir", type=Path, default=Path("runs/stage-one").absolute())
    commands.add_parser("table")
    args = p.parse_args()
    table() if args.command == "table" else measure(args)


if __name__ == "__main__":
    main()
