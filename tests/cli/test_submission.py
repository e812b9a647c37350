"""What submit and resume refuse before anything starts."""

from __future__ import annotations

import pytest

from fixres_dist.base.errors import UserError
from fixres_dist.cli.submission import check_model
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


def test_both_stages_bound_the_batch() -> None:
    """Stage one's pictures may be the larger ones."""
    recipe = recipes.find("b0")
    items = ["data.res=128", "pretrain.res=320", "run.batch_per_device=900"]
    with pytest.raises(UserError, match=r"at 320 px .* Accepted: 1 .. 862,"):
        check_model(reading.parse(Config, reading.merge(recipe.values, reading.overrides(items))), recipe)
