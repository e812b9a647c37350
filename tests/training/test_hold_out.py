"""Pictures held out of stage one: which they are, what is chosen on them, and that a stop changes nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import commands
from training.test_shared_stage_one import Steps
from training.test_step import made as index_of

from fixres_dist.base.errors import UserError
from fixres_dist.config import reading, schema
from fixres_dist.config.schema import Config
from fixres_dist.config.stage_settings import Tune
from fixres_dist.publishing import report
from fixres_dist.runs import preparation
from fixres_dist.runs.results import Results
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import hold_out, stages
from fixres_dist.training.ranks import Ranks, packed, unpacked

torch.set_num_threads(1)


def prepared(root: Path, photos: Path, *more: str) -> RunDir:
    items = (
        *("model.name=test_efficientnet", "model.timm_name=test_efficientnet", "model.weights=none"),
        *(
            f"data.root={photos}",
            "data.res=64",
            "data.workers=0",
            f"data.cache={root}-cache",
            "data.train_transform=test",
        ),
        *("tune.policy=classifier", "tune.bn_stats=kept", "tune.epochs=4", "tune.global_batch=14", "tune.lr_rule=none"),
        *("tune.base_lr=0.1", "run.precision=fp32", "run.log_every=1", "run.memory_format=channels_last"),
        *("pretrain.res=64", "pretrain.epochs=1", "pretrain.global_batch=14", "pretrain.lr_rule=none"),
        *("tune.hold_out=0.2", "tune.hold_out_sizes=[64, 96]", "run.eval_every=0", "pretrain.base_lr=0.05"),
    )
    return preparation.prepare(root, reading.parse(Config, reading.overrides([*items, *more])), "submit")


@pytest.mark.parametrize("share", [0.1, 0.15, 0.33])
def test_every_class_gives_its_share_and_keeps_a_picture(share: float) -> None:
    index = index_of(60)
    index.labels[:] = np.repeat([0, 1, 2, 3], [40, 14, 5, 1])
    rest, held = hold_out.parted(index, Tune(hold_out=share), 5)
    assert sorted([*rest, *held]) == list(range(60))
    assert len(held) == stages.held_out_count(Tune(hold_out=share), 60) == round(60 * share)
    counts = np.bincount(index.labels[held], minlength=4)
    assert counts[3] == 0
    assert all(abs(n - share * of) <= 1 for n, of in zip(counts, (40, 14, 5, 1), strict=True))
    assert np.array_equal(held, hold_out.parted(index, Tune(hold_out=share), 5)[1])
    assert not np.array_equal(held, hold_out.parted(index, Tune(hold_out=share), 6)[1])
    index.labels[:] = np.arange(60) // 2 * 2
    assert len(hold_out.parted(index, Tune(hold_out=0.5), 5)[1]) == 30
    index.labels[:] = np.arange(60)
    with pytest.raises(UserError, match=r"accepted: 1 to 0, so that each class keeps one\. Next: tune\.hold_out=0"):
        hold_out.parted(index, Tune(hold_out=0.15), 5)


def test_a_temperature_does_not_choose_and_a_better_order_does() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    z = torch.randn(40, 4, generator=generator) + 2 * torch.eye(4)[labels]
    folds = torch.arange(40) // 4 % 5
    plain = hold_out.held_out_loss(z, labels, folds)
    assert hold_out.held_out_loss(2 * z, labels, folds) == pytest.approx(plain, abs=0.02)
    assert hold_out.held_out_loss(z + torch.eye(4)[labels], labels, folds) < plain - 0.1


def stopping(steps: Steps) -> Any:
    real = hold_out.candidates

    def candidates(*given: Any) -> Any:
        steps.flag.signal = 15
        return real(*given)

    return candidates


def test_chosen_settings_are_used_and_a_stop_in_either_stage_one_changes_nothing(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    alone = Ranks.from_main

    def as_on_other_ranks(self: Ranks, compute: Any) -> Any:
        return alone(self, lambda: unpacked(packed(compute())))

    monkeypatch.setattr(Ranks, "from_main", as_on_other_ranks)
    calm, stopped = prepared(tmp_path / "calm", photos), prepared(tmp_path / "stopped", photos)
    code, count = steps.train(calm)
    n = sum(1 for _ in photos.glob("train/*/*"))
    held = round(0.2 * n)
    assert (code, count) == (0, -(-(n - held) // 14) + -(-n // 14)), "a first stage one on the rest, then on all"
    found = Results.read(calm).choice
    assert found
    assert (found.n, len(found.tried)) == (held, 2 * 3 * 7)
    assert found.chosen.loss == min(one.loss for one in found.tried)
    assert {one.bn_stats for one in found.tried} == {"kept", "exact", "mean"}
    config = calm.config()
    assert (config.data.res, config.tune.bn_stats) == (found.chosen.res, found.chosen.bn_stats)
    assert Results.read(calm).res == found.chosen.res
    assert calm.submitted().data.res == 64
    assert steps.train(stopped, stop=1)[0] == 1
    assert RunDir(stopped.held_out).saved_step() == 2, "in the first stage one"
    assert not stopped.chosen.exists()
    monkeypatch.setattr(hold_out, "candidates", stopping(steps))
    assert steps.train(stopped)[0] == 1, "while candidates are tried"
    assert RunDir(stopped.held_out).pretrained.exists()
    assert not stopped.chosen.exists()
    monkeypatch.undo()
    steps = Steps(monkeypatch)
    assert steps.train(stopped, stop=1)[0] == 1, "in the second one"
    assert (stopped.chosen.exists(), stopped.pretrained.exists()) == (True, False)
    assert steps.train(stopped)[0] == 0
    assert json.loads(stopped.chosen.read_text()) == json.loads(calm.chosen.read_text())
    weights = [load_file(run.root / "export" / "model.safetensors") for run in (calm, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rows, others = report.rows([calm])
    said = report.markdown([calm], rows, others, tmp_path)
    assert "## What calm has chosen" in said
    assert f"of {len(found.tried)} candidates" in said


LATE = """
_read = read
def read(file, again):
    import os
    return _read(file, again) if os.environ.get("SUBMITIT_LOCAL_LOCALID", "0") == "0" else None
"""


def test_a_choice_reaches_ranks_that_do_not_see_its_file_yet(tmp_path: Path, photos: Path) -> None:
    """NFS remembers for up to a minute that a name was not there. The run is stopped after the choice, too, and goes on."""
    here = prepared(
        tmp_path / "late", photos, "cluster.gpus_per_node=2", "run.watchdog_s=60", "tune.hold_out_sizes=[96]"
    )
    with open(here.code / "fixres_dist" / "runs" / "choice.py", "a") as file:
        file.write(LATE)
    done = commands.run("resume", "late", "--runs-dir", tmp_path, "--cluster", "local", "--gpus-per-node", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert Results.read(here).res == 96
    for file in (here.done, here.results):
        file.unlink()
    done = commands.run("resume", "late", "--runs-dir", tmp_path, "--cluster", "local", "--gpus-per-node", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert Results.read(here).res == 96


def test_the_held_out_share_trains_the_head_and_half_of_its_pictures_are_its(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    run = prepared(tmp_path / "run", photos, "tune.hold_out_use=train", "run.record_samples=true")
    code, count = steps.train(run)
    n = sum(1 for _ in photos.glob("train/*/*"))
    held = round(0.2 * n)
    assert (code, count) == (0, -(-(n - held) // 14))
    lines: list[dict[str, Any]] = [
        json.loads(x) for x in (run.root / "samples" / "rank_0.jsonl").read_text().splitlines()
    ]
    first = [s for line in lines if line["stage"] == "pretrain" and line["epoch"] == 0 for s in line["samples"]]
    fixing = [s for line in lines if line["stage"] == "fix" and line["epoch"] == 0 for s in line["samples"]]
    assert sorted(first) == list(range(n - held))
    assert sum(s >= n - held for s in fixing) / len(fixing) == pytest.approx(0.5, abs=0.1)
    assert not run.chosen.exists()
    assert Results.read(run).choice is None


def test_what_it_does_not_go_with_is_refused() -> None:
    def config(*items: str) -> Config:
        found = reading.parse(Config, reading.overrides(["tune.hold_out=0.2", *items]))
        schema.check_held_out(found)
        return found

    with pytest.raises(UserError, match=r"stay as they are published\. Next: tune\.hold_out=0"):
        config()
    with pytest.raises(UserError, match=r"Next: tune\.policy=auto, or tune\.hold_out_use=train"):
        config("pretrain.res=64", "tune.policy=all")
    with pytest.raises(UserError, match=r"are settings of the fixing stage\. Next: tune\.alpha, tune\.hold_out"):
        config("pretrain.hold_out=0.1", "tune.hold_out=0")
    with pytest.raises(UserError, match=r"hold_out is 0\.9; accepted: 0 to 0\.5"):
        config("tune.hold_out=0.9")
    with pytest.raises(UserError, match="accepted: 32 px or more"):
        config("tune.hold_out_sizes=[16]")
    assert config("pretrain.res=64", "tune.policy=all", "tune.hold_out_use=train").tune.hold_out == 0.2
