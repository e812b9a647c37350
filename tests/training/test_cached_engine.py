"""The cached engine in whole runs: the head it ends with is the streamed one's, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from support.commands import killed_when, run, tiny

from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import read_lines
from fixres_dist.config import reading
from fixres_dist.config.schema import Config
from fixres_dist.data import dataset, headers
from fixres_dist.models.parts import parts_of
from fixres_dist.runs.preparation import prepare
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import worker
from fixres_dist.training.cache import build
from fixres_dist.training.ranks import Ranks
from fixres_dist.training.session import Session, open_session
from fixres_dist.training.stage_session import StageSession
from fixres_dist.training.stages import Stage


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the runs of other processes; two threads of a model this small wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trained(runs: Path, name: str, photos: Path, *more: str, flag: StopFlag | None = None) -> RunDir:
    """A run in this process, streamed unless `more` says otherwise."""
    items = [
        *("model.name=test_efficientnet", "model.timm_name=test_efficientnet", "model.weights=none", "data.res=64"),
        *(f"data.root={photos}", "data.workers=0", "data.train_transform=test", "data.resize_rule=fixefficientnet"),
        *("tune.global_batch=12", "tune.base_lr=0.02", "tune.epochs=2", "run.batch_per_device=12", "run.log_every=1"),
        *("run.precision=fp32", "run.memory_format=channels_last", "run.engine=stream", f"run.feature_cache={runs}/f"),
    ]
    here = prepare(runs / name, reading.parse(Config, reading.overrides([*items, *more])), "test")
    code = worker.train(here.root, flag or StopFlag())
    assert code == 0 or flag
    return here


def weights(here: Path) -> dict[str, torch.Tensor]:
    return load_file(here / "export" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return all(torch.equal(first[name], second[name]) for name in first)


def furthest(a: Path, b: Path) -> float:
    """Largest difference of two exports, relative to the largest value of each tensor."""
    first, second = weights(a), weights(b)
    return max(
        float((value - second[name]).abs().max() / value.abs().max().clamp(min=1)) for name, value in first.items()
    )


def segments(runs: Path) -> dict[str, int]:
    """When each segment was written."""
    return {str(path.relative_to(runs)): path.stat().st_mtime_ns for path in (runs / "f").glob("*/*.rows")}


@pytest.mark.parametrize("transform", ["test", "test_flip"])
def test_the_head_is_the_streamed_one(tmp_path: Path, photos: Path, transform: str) -> None:
    """To 1e-6: kernels round a picture otherwise at another place in another batch. The rows themselves are exact."""
    more = [f"data.train_transform={transform}", "tune.epochs=3"]
    streamed = trained(tmp_path, "streamed", photos, *more)
    cached = trained(tmp_path, "cached", photos, *more, "run.engine=auto")
    assert furthest(streamed.root, cached.root) < 1e-6
    results = [json.loads(here.results.read_text()) for here in (streamed, cached)]
    assert [found["engine"] for found in results] == ["stream", "cached"]
    for key in ("before", "after"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)
    losses = [[x["loss"] for x in read_lines(here.metrics) if "evaluation" not in x] for here in (streamed, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 21


def test_later_runs_write_nothing_and_do_not_run_the_trunk(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(tmp_path, "first", photos, "run.engine=cached")
    written = segments(tmp_path)
    assert len(written) == 3, "two segments of train, one of val"
    calls: list[int] = []
    pictures = Session.pictures
    monkeypatch.setattr(Session, "pictures", lambda *a: calls.append(1) or pictures(*a))
    other = ["tune.policy=classifier+bn_stats", "tune.base_lr=0.1", "tune.epochs=1", "tune.bn_stats_images=5"]
    for more in (other, [*other, "run.batch_per_device=5", "tune.bn_stats=ema"]):
        second = trained(tmp_path, f"second{len(more)}", photos, *more, "run.engine=auto")
        assert json.loads(second.results.read_text())["engine"] == "cached", "it costs nothing any more"
    assert segments(tmp_path) == written
    assert not calls
    trained(tmp_path, "third", photos, "run.engine=cached", "tune.policy=classifier")
    assert len(segments(tmp_path)) == 6, "another cut has features of its own"


def test_other_pictures_of_the_same_names_and_sizes_have_features_of_their_own(tmp_path: Path, photos: Path) -> None:
    """Such as ImageNet-C's, or an edited copy."""
    other = Path(shutil.copytree(photos, tmp_path / "inverted"))
    for file in other.rglob("*.jpg"):
        with Image.open(file) as image:
            ImageOps.invert(image).save(file)
    cached, streamed = ["run.engine=cached", "tune.epochs=1"], ["tune.epochs=1"]
    trained(tmp_path, "first", photos, *cached)
    written = segments(tmp_path)
    assert furthest(trained(tmp_path, "a", other, *cached).root, trained(tmp_path, "b", other, *streamed).root) < 1e-6
    assert len(segments(tmp_path)) == 2 * len(written)


def test_damaged_features_are_written_again(tmp_path: Path, photos: Path) -> None:
    first = trained(tmp_path, "first", photos, "run.engine=cached")
    written = segments(tmp_path)
    broken = tmp_path / max(written, key=lambda name: (tmp_path / name).stat().st_size)
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    second = trained(tmp_path, "second", photos, "run.engine=cached")
    assert same(first.root, second.root)
    assert {name for name, at in segments(tmp_path).items() if at != written[name]} == {
        str(broken.relative_to(tmp_path))
    }


def test_files_that_cannot_be_decoded_count_as_little_as_when_streaming(tmp_path: Path, photos: Path) -> None:
    data = shutil.copytree(photos, tmp_path / "data")
    torn = data / "train" / "birch" / "007.jpg"
    torn.write_bytes(torn.read_bytes()[:-400])
    (data / "val" / "cedar" / "002.jpg").write_bytes(b"")
    runs = [trained(tmp_path, e, data, "data.on_bad=skip", f"run.engine={e}") for e in ("stream", "cached")]
    results = [json.loads(here.results.read_text()) for here in runs]
    assert [(found["skipped"], found["n"]) for found in results] == [(2, 32), (2, 32)]
    assert furthest(*(here.root for here in runs)) < 1e-6
    counts = [[line["skipped"] for line in read_lines(here.metrics) if "loss" in line] for here in runs]
    assert counts[0] == counts[1]
    assert sum(count for count in counts[1] if count) >= 2, "once in each epoch"


def test_a_picture_that_can_be_decoded_again_has_features_again(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn file that is made whole in place, and is none of those whose first bytes are compared: the cached index does
    not see it."""
    monkeypatch.setattr(headers, "PROBES", 0)
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    for directory in (data / "train").iterdir():
        os.utime(directory, (1e9, 1e9))
    whole, torn = (photos / "train" / "birch" / "007.jpg"), data / "train" / "birch" / "007.jpg"
    dataset.load(data, "train", on_bad="skip")
    torn.write_bytes(whole.read_bytes()[:-400])
    cached = ["run.engine=cached", "run.batch_per_device=4", "data.on_bad=skip"]
    assert json.loads(trained(tmp_path, "torn", data, *cached).results.read_text())["skipped"] == 1
    written = segments(tmp_path)
    torn.write_bytes(whole.read_bytes())
    mended, calm = trained(tmp_path, "mended", data, *cached), trained(tmp_path, "calm", photos)
    assert json.loads(mended.results.read_text())["skipped"] == 0
    assert furthest(mended.root, calm.root) < 1e-6
    assert len([name for name, at in segments(tmp_path).items() if at != written[name]]) == 1


def test_a_stop_while_features_are_written_goes_on_there(tmp_path: Path, photos: Path) -> None:
    class AfterOneSegment(StopFlag):
        signal = property(  # type: ignore[assignment]
            lambda self: signal.SIGINT if len(segments(tmp_path)) else 0, lambda self, value: None
        )

    more = ["run.engine=cached", "run.batch_per_device=4"]
    stopped = trained(tmp_path, "run", photos, *more, flag=AfterOneSegment())
    assert stopped.state().state == "cancelled"
    written = segments(tmp_path)
    assert len(written) == 1
    choices = stopped.root / "choices.json"
    choices.write_text(choices.read_text().replace('"engine"', '"features": "wide", "engine"'))  # as runs once kept it
    done = trained(tmp_path, "run", photos, *more)
    assert done.done.exists()
    assert written.items() <= segments(tmp_path).items()
    assert len(segments(tmp_path)) == 9


def test_killed_while_writing_and_while_training(tmp_path: Path, photos: Path) -> None:
    """By SIGKILL, on one rank; and on two ranks undisturbed, against the streamed run."""
    more = ["data.train_transform=test", "run.batch_per_device=4", "run.save_every_s=0"]
    cached = [*more, "run.engine=cached"]
    calm = run(*tiny(tmp_path, "calm", photos, 1, *cached, f"run.feature_cache={tmp_path}/calm_features"))
    assert calm.returncode == 0, calm.stdout + calm.stderr
    arguments = tiny(tmp_path, "killed", photos, 1, *cached, f"run.feature_cache={tmp_path}/f")
    killed_when(arguments, lambda: len(segments(tmp_path)) >= 2)
    kept = segments(tmp_path)
    killed_when(arguments, lambda: RunDir(tmp_path / "killed").saved_step() >= 9)
    assert kept.items() <= segments(tmp_path).items()
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(tmp_path / "calm", tmp_path / "killed")


def test_two_ranks_write_and_read_the_same_rows(tmp_path: Path, photos: Path) -> None:
    for engine in ("stream", "cached"):
        more = [
            "data.train_transform=test_flip",
            "run.batch_per_device=6",
            "tune.epochs=1",
            f"run.feature_cache={tmp_path}/f",
        ]
        done = run(*tiny(tmp_path, engine, photos, 2, *more, f"run.engine={engine}"))
        assert done.returncode == 0, done.stdout + done.stderr
    assert furthest(tmp_path / "stream", tmp_path / "cached") < 1e-6
    assert len({name.split("-")[0] for name in segments(tmp_path)}) == len(segments(tmp_path)) > 3


def test_what_cannot_be_cached_is_refused_before_anything_starts(tmp_path: Path, photos: Path) -> None:
    done = run(*tiny(tmp_path, "no", photos, 1, "run.engine=cached"))
    assert done.returncode == 2
    assert "test_aug" in done.stderr
    assert "run.engine=stream" in done.stderr
    assert not (tmp_path / "no").exists()


def test_features_of_another_decoder_are_others(tmp_path: Path, photos: Path) -> None:
    """DALI and torch differ by some grey levels."""
    keys = []
    for backend in ("torch", "dali"):
        items = (
            f"data.root={photos}",
            "data.res=64",
            f"data.backend={backend}",
            "model.weights=none",
            "model.timm_name=test_resnet",
        )
        config = reading.parse(Config, reading.overrides([*items, "tune.policy=classifier", "run.precision=fp32"]))
        session = open_session(config, Ranks(0, 1, 1, ("here",), torch.device("cpu")))
        stage = Stage("fix", config.tune, 64, "test", 0, len(session.train), 0)
        work = StageSession(session, stage, session.with_fast_trunk(parts_of(session.model, "classifier")))
        keys.append(build.cache_key(work, session.train, 1))
    assert {name for name in keys[0] if keys[0][name] != keys[1][name]} == {"decoder"}
