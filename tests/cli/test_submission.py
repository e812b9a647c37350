"""What submit and resume refuse before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.cli.main import main
from fixres_dist.cli.submission import check_model
from fixres_dist.cluster import jobs
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config


@pytest.mark.parametrize(
    ("model", "res", "batch", "most"),
    [("l2", 600, 56, 54), ("b0", 320, 10**6, 862)],
)
def test_a_batch_that_no_gpu_can_index_is_refused(model: str, res: int, batch: int, most: int) -> None:
    def check(size: int | str) -> None:
        recipe = recipes.find(model)
        items = [f"data.res={res}", f"run.batch_per_device={size}"]
        check_model(reading.parse(Config, reading.merge(recipe.values, reading.overrides(items))), recipe)

    with pytest.raises(UserError, match=rf"is {batch}: at {res} px .* Accepted: 1 .. {most}, auto. Next: .*={most}"):
        check(batch)
    check(most)
    check("auto")


@pytest.mark.parametrize(
    ("slurm_is_here", "more", "on_gpus"),
    [
        (False, [], False),
        (False, ["--nodes", "1"], True),
        (False, ["--profile", "site.yaml"], True),
        (False, ["--show", "sbatch"], True),
        (False, ["--nodes", "1", "--cluster", "local"], False),
        (True, [], True),
        (True, ["--cluster", "inline"], False),
    ],
)
def test_a_dry_run_plans_what_the_same_command_would_start(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slurm_is_here: bool,
    more: list[str],
    on_gpus: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(jobs, "default_cluster", lambda: "slurm" if slurm_is_here else "local")
    monkeypatch.setattr(jobs, "ask_slurm", lambda text, cluster: "")
    (tmp_path / "site.yaml").write_text("cluster: {partition: gpu}\n")
    assert main(["submit", "--model", "b0", "--data", str(photos), "--dry-run", *more]) == 0
    said = capsys.readouterr().out
    assert ("ranks      8 (1 node(s) x 8)" in said, "ranks      1 (1 node(s) x 1)" in said) == (on_gpus, not on_gpus)
    assert ("8 H200" in said, "CPUs of this machine" in said) == (on_gpus, not on_gpus)
    assert ("what sbatch would get" in said) == on_gpus


def test_a_grid_sums_what_its_runs_cost_here_without_a_recipe_too(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["--data", str(photos), "--cluster", "inline", "--runs-dir", str(tmp_path), "--dry-run"]
    words += ["--preset", "own_classes", "--weights", "none", "--grid", "tune.epochs=1,2"]
    assert main(["submit", "--model", "resnet10t", *words]) == 0
    runs = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("run ", "all "))]
    assert "not estimated" not in "".join(runs)
    assert "on the " in runs[-1]
    assert "CPUs of this machine" in runs[-1]
    assert "H200" not in "".join(runs)


def test_both_stages_bound_the_batch() -> None:
    """Stage one's pictures may be the larger ones."""
    recipe = recipes.find("b0")
    items = ["data.res=128", "pretrain.res=320", "run.batch_per_device=900"]
    with pytest.raises(UserError, match=r"at 320 px .* Accepted: 1 .. 862,"):
        check_model(reading.parse(Config, reading.merge(recipe.values, reading.overrides(items))), recipe)
