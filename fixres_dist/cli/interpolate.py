"""`fixres interpolate`"""

from __future__ import annotations

import argparse
import json

from fixres_dist.base.environment import versions
from fixres_dist.base.errors import EXIT_DONE
from fixres_dist.base.files import write_text
from fixres_dist.cli.export import parse_alphas, starting_state
from fixres_dist.data import class_maps
from fixres_dist.evaluation.inputs import opened, source, split_with, subjects, weights_after
from fixres_dist.publishing import model_card
from fixres_dist.runs.rundir import RunDir


def interpolate(args: argparse.Namespace) -> int:
    """Top-1 of several mixtures of the starting and the fixed weights: one pass over the images, one trunk if it was frozen."""
    from fixres_dist.models import weights
    from fixres_dist.publishing import export, figures
    from fixres_dist.training import results
    from fixres_dist.training.predict import predict

    alphas, config = parse_alphas(args.alpha), source(args, None)
    run, before = RunDir(args.run), subjects(args, config)[0]
    sets = class_maps.named_sets(args.eval_set, "val")
    with opened(config, [before], args.run, sets=sets) as live:
        start, end = starting_state(run, live.model), weights.read_state(weights_after(run))
        every = [split_with(live, export.interpolated(start, end, alpha)) for alpha in [0.0, *alphas]]
        found = {split: predict(live, every, config.data.res, f"alpha on {split}", split) for split in live.splits}
        if not live.ranks.is_main:
            return EXIT_DONE
        hardware = results.hardware(live)
    curves = {
        split: [{"alpha": a, **p.summary(), **p.gain_over(first)} for a, p in zip(alphas, predictions, strict=True)]
        for split, (first, *predictions) in found.items()
    }
    for split, rows in curves.items():
        print(f"{split}, n {rows[0]['n']}\n{'alpha':>6}{'top-1':>8}{'top-5':>8}   gain over alpha 0 (paired 95 %)")
        for row in rows:
            gain = model_card.accuracy({**row, "before": row, "after": row})[-1]
            print(f"{row['alpha']:>6g}{row['top1']:>8.2f}{row['top5']:>8.2f}   {gain}")
    out = args.out or args.run
    out.mkdir(parents=True, exist_ok=True)
    data = {"data": config.data.root, "res": config.data.res, "resize_rule": config.data.resize_rule}
    made = {"model": config.model.name, **data, "curves": curves}
    write_text(out / "alpha.json", json.dumps({**made, "hardware": hardware, "versions": versions()}, indent=1) + "\n")
    figures.alpha_plot(curves, config, out / "alpha.png")
    print(f"curve: {out / 'alpha.png'}")
    return EXIT_DONE
