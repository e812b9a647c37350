"""What crosses the network: the head's gradients, one sum of BN statistics, and flags."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import timm
from support.commands import ROOT, environment, run, tiny

from fixres_dist.base.small_files import read_lines

CLASSES, STEPS, RANKS = 3, 7, 2


def test_every_byte_between_two_ranks_is_accounted_for(tmp_path: Path, photos: Path) -> None:
    arguments = tiny(tmp_path, "counted", photos, RANKS, "tune.epochs=1", "--prepare")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    common = {
        "TORCHELASTIC_RUN_ID": "count",
        "MASTER_PORT": "0",
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "count_bytes.py"),
        str(tmp_path / "counted"),
        str(tmp_path),
    ]
    workers = [
        subprocess.Popen(
            command,
            env={**environment(), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * RANKS, said

    model = timm.create_model("test_efficientnet", num_classes=CLASSES)
    channels = model.num_features
    trainable = channels * CLASSES + CLASSES + 2 * channels  # classifier, affine of the last BN
    for rank in range(RANKS):
        lines = read_lines(tmp_path / f"rank_{rank}.jsonl")
        moved: Counter[str] = Counter()
        for line in lines:
            moved[line["caller"]] += line["bytes"]
        calls = Counter(line["caller"] for line in lines)
        assert moved.pop("work") < 1024, "meeting, once a start"
        # One batch a rank and evaluation, and one question more, after which nobody has another: three flags each time.
        asked = 3 * 8 * 2
        assert moved.pop("predict") == 2 * (8 + 5), "whether an interrupted evaluation goes on"
        assert moved.pop("score_batches") == 2 * asked
        assert moved.pop("keep") == 2 * 33 * 6 * 8, "each validation image's result, before and after"
        # Two empty backward passes come before the first step (stepping.distribute).
        assert moved.pop("gradients") == 4 * trainable * (STEPS + 2)
        assert moved.pop("measure_statistics") == 8 * (2 * channels + 1) + 8 + 5 + asked
        assert calls["measure_statistics"] == 1 + 2 + 2
        assert moved.pop("loop") == 2 * 8 * STEPS, "two flags a step"
        assert moved.pop("read") == 5 * 8 * STEPS, "the logged scalars, here at every step"
        settings = 8 + 1 + len(json.dumps((tmp_path / "counted" / "config.yaml").read_text()))
        assert moved.pop("train_stages") == 8 + (8 + 6) + settings, (
            "a flag before the stage; is stage one complete; settings"
        )
        assert moved.pop("open_stage") == 8 + 5, "whether what was measured before fixing is lost"
        assert moved == {}, "something else was sent"
