"""What is best at each cost, judged by plain counting over made-up predictions; and curves of runs given by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from publishing.test_report import made

from fixres_dist.base.errors import UserError
from fixres_dist.evaluation.sweep import Limit
from fixres_dist.publishing import study, study_report
from fixres_dist.publishing.html_page import html_page
from fixres_dist.publishing.study import Point, Study, choices, front, multiply_adds, seconds_per_image
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training.predictions import Predictions, paired_gain

N = 2000


def point(
    model: str, when: str, res: int, gmacs: float, hits: np.ndarray, images_per_second: float | None = None
) -> Point:
    loss = np.zeros(len(hits), np.float32)
    right = np.ones(len(hits), np.int32)
    predictions = Predictions(hits.astype(np.int32), hits, hits, loss, loss, labels=right)
    run = RunDir(Path(f"runs/{model}-{res}"))
    return Point(model, model, 3, when, res, gmacs, run, run.root / "x.npz", predictions, "same", images_per_second)


def some(seed: int) -> list[Point]:
    """Points of three models whose hits come from the same images, as difficult for all."""
    rng = np.random.default_rng(seed)
    difficulty, found = rng.random(N), []
    for model, when, res in itertools.product("abc", ("before", "after"), (96, 128, 160)):
        skill = 0.5 + 0.1 * "abc".index(model) + 0.03 * (when == "after") + res / 2000 + 0.02 * rng.standard_normal()
        hits = difficulty + 0.05 * rng.standard_normal(N) < skill
        cost = (1 + "abc".index(model)) * (res / 128) ** 2
        found.append(point(model, when, res, cost, hits, round(1000 / cost)))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", [multiply_adds, seconds_per_image])
def test_the_front_is_what_nothing_cheaper_equals(seed: int, cost: study.Cost) -> None:
    points = some(seed)
    best = front(points, cost)
    for p in points:
        beaten = [q for q in points if q is not p and cost(q) <= cost(p) and q.top1 >= p.top1]
        assert (p in best) == (not beaten)
    assert [cost(p) for p in best] == sorted(cost(p) for p in best)
    for budget in np.linspace(0, 6, 50):
        allowed = [p for p in points if p.gmacs <= budget]
        chosen = [p for p in front(points, multiply_adds) if p.gmacs <= budget]
        assert bool(allowed) == bool(chosen)
        if allowed:
            assert chosen[-1].top1 == max(p.top1 for p in allowed)


def test_of_equals_the_cheaper_one_and_before_fixing_is_best() -> None:
    hits = np.arange(N) < 1500
    points = [
        point("a", "after", 96, 1.0, hits),
        point("a", "before", 96, 1.0, hits),
        point("a", "before", 128, 2.0, hits),
    ]
    assert front(points, multiply_adds) == [points[1]]


def test_a_choice_has_the_paired_interval_over_the_cheaper_one_and_names_what_is_as_good() -> None:
    points = some(0)
    found = choices(points, multiply_adds)
    assert len(found) > 3
    for cheaper, choice in itertools.pairwise(found):
        best, other = choice.best.predictions.correct1, cheaper.best.predictions.correct1
        assert choice.over_cheaper == paired_gain(other, best)
    for choice in found:
        cheaper_points = sorted((p for p in points if p.gmacs < choice.best.gmacs), key=multiply_adds)
        equal = [p for p in cheaper_points if choice.best.over(p, of=len(points)).delta_ci95[0] <= 0]
        assert choice.as_good == (equal[0] if equal else None)
    assert found[0].over_cheaper is None
    assert any(choice.as_good for choice in found)
    assert any(choice.as_good is None for choice in found[1:])


def test_the_interval_of_an_accuracy() -> None:
    """Wilson's, as Newcombe 1998 (Statistics in Medicine 17, table I) has it; it stays within 0 and 100."""
    for hits, n, low, high in (
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (29, 29, 88.30, 100),
    ):
        found = point("a", "after", 96, 1.0, np.arange(n) < hits).ci95
        assert found == pytest.approx((low, high), abs=0.01)


def test_the_best_within_a_limit_is_said_with_what_is_as_good_and_cheaper() -> None:
    found = Study(some(0), [], [], "set", 24)
    for limit in (Limit(2.5), Limit(None, 400), Limit(2.5, 600)):
        lines = study_report.within(found, limit)
        allowed = [
            p
            for p in found.points
            if p.gmacs <= (limit.max_gmacs or 99) and (p.images_per_second or 0) >= (limit.min_images_per_second or 0)
        ]
        best = max(allowed, key=lambda p: p.top1)
        assert lines[0].startswith(f"Best with {limit}: {best}, top-1 {best.top1:.2f} (")
    (line,) = study_report.within(found, Limit(0.01))
    assert line == "No point is within at most 0.01 GMACs: the cheapest has 0.562 GMACs."


def test_a_report_says_what_is_missing_and_how_often_was_looked(tmp_path: Path) -> None:
    missing = {"name": "study-model=<b>-res=9", "state": "failed", "step": 3, "total_steps": 9, "reason": "disk full"}
    found = Study(some(1), [missing], ["a before fixing is not one network"], "my set", 24)
    study_report.draw(found, Limit(2.5), tmp_path)
    text = study_report.markdown("study", found, Limit(2.5), "how")
    for words in (
        "18 points on 2,000 validation images of my set",
        "24 times",
        "disk full",
        "not one network",
        "Best with at most 2.5 GMACs",
    ):
        assert words in text, words
    page = html_page("study", text, tmp_path)
    assert page.count("data:image/png;base64,") == 3
    assert "study-model=&lt;b&gt;-res=9" in page
    nothing = Study([], [missing], [], "", 0)
    study_report.draw(nothing, Limit(), tmp_path / "nothing")
    assert "No point is finished yet" in study_report.markdown("study", nothing, Limit(), "")


def run_with(root: Path, res: int, hits: np.ndarray, sample_list: str = "same", **tune: object) -> RunDir:
    run = made(root, "b0", res)
    if tune:
        text = run.config_file.read_text()
        for key, value in tune.items():
            text = text.replace(f"  {key}: ", f"  {key}: {value} #")
        run.config_file.write_text(text)
    for when in ("before", "after", "before-224"):
        point("b0", when, res, 1.0, hits).predictions.save(run.root / "predictions" / f"{when}.npz", sample_list)
    return run


def test_runs_given_by_hand_are_curves_by_their_settings(tmp_path: Path) -> None:
    hits = np.arange(N) < 1500
    plain = [run_with(tmp_path / f"b0-{res}", res, hits) for res in (320, 384)]
    other = run_with(tmp_path / "epochs", 320, hits, epochs=7)
    again = run_with(tmp_path / "again", 320, hits)
    found = study.read([*plain, *plain, other, again])
    names = list(dict.fromkeys(p.model for p in found.points))
    assert len(names) == 3
    assert sum("tune.epochs=7" in name for name in names) == 1
    assert sum("(again)" in name for name in names) == 1
    first = [(p.when, p.res) for p in found.points if p.model == names[0]]
    assert first == [("before", 224), ("before", 320), ("before", 384), ("after", 320), ("after", 384)]
    assert found.notes == []
    assert [p.gmacs for p in found.points[:3]] == pytest.approx(
        [0.785 * (r / 320) ** 2 for r in (224, 320, 384)], abs=1e-3
    )
    foreign = run_with(tmp_path / "foreign", 320, hits, sample_list="another")
    with pytest.raises(UserError, match=r"foreign was measured on another validation set than .*b0-320"):
        study.read([*plain, foreign])
    apart = run_with(tmp_path / "apart", 256, ~hits)
    assert study.read([plain[0], apart]).notes == []
    plain[0].pretrained.write_bytes(b"header" + bytes(2 * study.END))
    plain[1].pretrained.write_bytes(b"HEADER" + bytes(2 * study.END))
    apart.pretrained.write_bytes(b"header" + bytes(2 * study.END - 1) + b"1")
    assert study.read(plain).notes == []
    assert "is 2 networks" in study.read([*plain, apart]).notes[0]
