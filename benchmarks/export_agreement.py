"""Does timm's own loader evaluate an exported run as we do? `python benchmarks/export_agreement.py --run runs/demo`

For each resize rule that timm can express, at the run's resolution and in fp32: the run's model through our evaluation,
and its export through `timm.create_model("local-dir:..")`, `timm.data.resolve_data_config` and `timm.data.create_loader`.
Prints a table, writes JSON, and fails (exit code 1) if top-1 differs by more than one image in 2,000.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fixres_dist.base.environment import git, processor, versions
from fixres_dist.config.schema import Config
from fixres_dist.data import class_maps, demo
from fixres_dist.evaluation.inputs import Subject, opened, parts_with, weights_after
from fixres_dist.models import weights
from fixres_dist.models.build import build_model
from fixres_dist.publishing import export
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predict import predict


def timms(folder: str, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted, labels) of the exported `folder` on the images below `data`, with nothing of ours."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    settings = timm.data.resolve_data_config({}, model=model, use_test_size=True)
    dataset = timm.data.create_dataset("", str(data), class_map={name: k for k, name in enumerate(names(model))})
    loader = timm.data.create_loader(dataset, batch_size=64, use_prefetcher=False, num_workers=2, **settings)
    with torch.no_grad():
        pairs = [(model(images).argmax(1), labels) for images, labels in loader]
    return torch.cat([p for p, _ in pairs]), torch.cat([labels for _, labels in pairs])


def names(model: Any) -> list[str]:
    return list(model.pretrained_cfg["label_names"])


def compare(run: RunDir, config: Config) -> dict[str, Any]:
    after, res = weights_after(run), config.data.res
    with opened(config, [Subject("after", after)], run.root) as live:
        (ours,) = predict(live, [parts_with(live, after)], res, config.data.resize_rule)
    classes = list(class_maps.trained_classes(config, run.root, "val"))
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(config.model.timm_name, len(classes))
        weights.fill(model, weights.read_state(after), str(after))
        weights.write_weights(model, Path(folder) / "model.safetensors", config, res, classes)
        export.write_config(model, Path(folder) / "config.json", config, res, classes)
        predicted, labels = timms(folder, Path(config.data.root) / "val")
    hits = int((predicted == labels).sum())
    return {
        "resize_rule": config.data.resize_rule,
        "res": res,
        "n": len(labels),
        "ours_top1": round(100 * int(ours.correct1.sum()) / len(labels), 4),
        "timm_top1": round(100 * hits / len(labels), 4),
        "images_apart_in_top1": abs(hits - int(ours.correct1.sum())),
        "images_predicted_otherwise": int((predicted.numpy() != ours.predicted).sum()),
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, required=True, help="a finished run")
    p.add_argument(
        "--data", type=Path, help="data set with val/; default: --n images of the built-in example, new ones"
    )
    p.add_argument("--n", type=int, default=2000)
    p.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "export_agreement.json")
    args = p.parse_args()
    run, config = RunDir(args.run), RunDir(args.run).config()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or demo.write_demo(Path(folder) / "demo", seed=1, n_train=16, n_val=args.n)
        rows = []
        for rule in ("fixefficientnet", "fixres", "timm"):
            settings = replace(config.data, root=str(data), resize_rule=rule)  # type: ignore[arg-type]
            fp32 = replace(config.run, precision="fp32")
            rows.append(compare(run, replace(config, data=settings, run=fp32)))
            print(json.dumps(rows[-1]))
    result = {
        "command": " ".join(["python", "benchmarks/export_agreement.py", *sys.argv[1:]]),
        "commit": git(ROOT, "rev-parse", "HEAD"),
        "hardware": processor(),
        "versions": versions(),
        "rows": rows,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["images_apart_in_top1"] > max(1, row["n"] / 2000) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
