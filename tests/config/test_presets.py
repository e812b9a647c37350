"""The presets, the first: against the original's protocol written down as a plain loop; own classes in one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.commands import run
from support.folders import write_photos

from fixres_dist.base.errors import UserError
from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import read_lines
from fixres_dist.config import reading, recipes
from fixres_dist.config.schema import Config
from fixres_dist.data import dataset, geometry, order, torch_cpu
from fixres_dist.data.requests import Pictures, every_sample
from fixres_dist.models.build import build_model
from fixres_dist.runs import checkpoint, preparation
from fixres_dist.training import worker
from fixres_dist.training.stages import stages

NAME = "test_efficientnet"


def started(root: Path, data: Path, preset: str, *items: str) -> Config:
    """A run of the smallest model under `preset`, prepared and not yet worked on."""
    base = reading.merge(recipes.find(NAME, "none").values, recipes.preset(preset))
    exact = [
        "run.precision=fp32",
        "run.memory_format=channels_last",
    ]  # a probe of formats may choose another for each run
    keys = ["data.res=64", f"data.root={data}", "data.workers=0", "run.eval_every=0", *exact, *items]
    config = reading.parse(Config, reading.merge(base, reading.overrides(keys)))
    preparation.prepare(root, config, "test")
    return config


def test_as_coded_is_the_original_protocol(tmp_path: Path) -> None:
    """Eval mode except for the last BN, SGD on the classifier alone, StepLR(30), the test picture, plain cross-entropy."""
    data = write_photos(tmp_path / "photos", 4, 1)
    items = ("tune.epochs=32", "tune.global_batch=6", "tune.base_lr=0.4", "run.log_every=1")
    config = started(tmp_path / "run", data, "as_coded", *items)
    assert worker.train(tmp_path / "run", StopFlag()) == 0

    model = build_model(NAME, 3, config.run.seed)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.classifier.parameters():
        p.requires_grad_(True)
    model.eval()
    model.bn2.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0 * 0.4 * 6 / 512, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)
    found = dataset.load(data, "train", str(tmp_path))
    pictures = Pictures("test", 64, geometry.Resize(int(256 / 224 * 64), "height", "bilinear"), 0)
    (batch,) = torch_cpu.batches(found, every_sample(found, pictures, 12, 0, 1), 64, pictures.resize, workers=0)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (batch.images / 255 - mean) / std
    losses = []
    for epoch in range(32):
        samples = order.positions_to_samples(12, 0, epoch, torch.arange(12).numpy())
        for chosen in (samples[:6], samples[6:]):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), batch.labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()

    ours = load_file(tmp_path / "run" / "export" / "model.safetensors")
    start = build_model(NAME, 3, config.run.seed).state_dict()
    assert float((ours["classifier.weight"] - start["classifier.weight"]).abs().max()) > 1e-2
    assert float((ours["bn2.running_mean"] - start["bn2.running_mean"]).abs().max()) > 1e-2
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in lines if "learning_rate" in line]
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), rtol=1e-5, atol=1e-5)


def test_presets_change_what_they_say_and_nothing_else() -> None:
    base = reading.parse(Config, recipes.find("b0").values)
    coded, published, own = (
        reading.parse(Config, reading.merge(recipes.find("b0").values, recipes.preset(name)))
        for name in ("as_coded", "as_published", "own_classes")
    )
    assert (coded.tune.policy, coded.tune.bn_stats, coded.data.train_transform, coded.data.resize_rule) == (
        *("classifier+bn_stats", "ema", "test"),
        "fixres_height",
    )
    assert (coded.tune.label_smoothing, coded.tune.schedule, coded.tune.lr_rule) == (0, "step", "fixres")
    assert (published.tune.policy, published.tune.label_smoothing) == ("classifier+bn", 0.1)
    assert (published.data.train_transform, published.data.resize_rule) == ("test_aug", "fixefficientnet")
    assert own.pretrain is not None
    assert (own.tune, own.data, own.pretrain.policy) == (base.tune, base.data, "all")
    for config in (coded, published):
        assert (config.model, config.data.res, config.tune.epochs) == (base.model, base.data.res, base.tune.epochs)
        assert config.tune.global_batch == base.tune.global_batch
    with pytest.raises(UserError, match="Did you mean 'as_coded'"):
        recipes.preset("as_code")


def test_own_classes_in_one_command(tmp_path: Path, photos: Path) -> None:
    """Weights of ten classes on a data set of three: the plain command adds stage one, and shows a floor first."""
    weights = tmp_path / "ten.pth"
    torch.save(build_model(NAME, 10, 5).state_dict(), weights)
    arguments = (
        *("submit", "--model", NAME, "--res", "64", "--weights", weights, "--data", photos, "--runs-dir", tmp_path),
        *(
            "--cluster",
            "inline",
            "data.workers=0",
            "pretrain.res=32",
            "pretrain.epochs=2",
            "tune.epochs=1",
            "--name",
            "own",
        ),
        *("pretrain.global_batch=42", "tune.global_batch=42", "run.eval_every=0"),
    )
    refused = run(*(a for a in arguments if not str(a).startswith("pretrain")), "--preset", "none")
    assert refused.returncode == 2
    assert "--preset own_classes" in refused.stderr
    done = run(*arguments, "tune.policy=classifier+bn")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{weights} classifies 10 classes, the data set has 3: stage one trains a new classifier" in done.stdout
    assert "warning: only 4 steps. Next: pretrain.epochs=50" in done.stdout
    floors = json.loads((tmp_path / "own" / "results.json").read_text())["floor"]
    assert [floor["res"] for floor in floors] == [32, 64]
    assert min(floor["top1"] for floor in floors) > 80
    assert done.stdout.index("first result") < done.stdout.index("training everything")
    assert "training everything (" in done.stdout
    assert "training bn2, classifier (" in done.stdout
    first, fixed = (load_file(tmp_path / "own" / f) for f in ("pretrained.safetensors", "export/model.safetensors"))
    assert first["classifier.weight"].shape == (3, 256)
    assert {n for n in first if not torch.equal(first[n], fixed[n])} == {
        *(f"bn2.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
        *("classifier.weight", "classifier.bias"),
    }
    names = json.loads((tmp_path / "own" / "class_index.json").read_text())
    assert names == {"0": "ash", "1": "birch", "2": "cedar"}


def test_averaged_weights_are_the_mean_of_the_last_epochs_and_survive_a_stop(tmp_path: Path) -> None:
    data = write_photos(tmp_path / "photos", 4, 1)
    items = ("tune.epochs=4", "tune.global_batch=5", "tune.base_lr=0.4", "run.save_every_s=0")
    for name, more in (("plain", ()), ("mean", ("tune.average_epochs=3",)), ("stopped", ("tune.average_epochs=3",))):
        started(tmp_path / name, data, "as_published", *items, *more)
    kept = {}

    flag, save = StopFlag(), checkpoint.Writer.save

    def keep(self, model, names, optimizer, progress, *others):  # type: ignore[no-untyped-def]
        kept[progress.step] = model.classifier.weight.detach().clone()
        flag.signal = 15 if progress.step == 7 else 0
        save(self, model, names, optimizer, progress, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Writer, "save", keep)
        assert worker.train(tmp_path / "plain", StopFlag()) == 0
        plain = dict(kept)
        assert worker.train(tmp_path / "stopped", flag) == 1
    assert worker.train(tmp_path / "mean", StopFlag()) == 0
    assert worker.train(tmp_path / "stopped", StopFlag()) == 0
    mean, again = (load_file(tmp_path / n / "export" / "model.safetensors") for n in ("mean", "stopped"))
    expected = torch.stack([plain[step] for step in (6, 9, 12)]).mean(0)  # three steps an epoch
    torch.testing.assert_close(mean["classifier.weight"], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(mean["classifier.weight"], plain[12])
    assert all(torch.equal(value, again[name]) for name, value in mean.items())


def test_repeated_samples_are_recorded_in_views_of_their_own(tmp_path: Path, photos: Path) -> None:
    items = ("pretrain.repeats=3", "pretrain.epochs=2", "pretrain.res=32", "pretrain.global_batch=42")
    started(tmp_path / "run", photos, "own_classes", *items, "tune.epochs=0", "run.record_samples=true")
    assert worker.train(tmp_path / "run", StopFlag()) == 0
    lines = read_lines(tmp_path / "run" / "samples" / "rank_0.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for epoch in (lines[:2], lines[2:]):
        samples = [s for line in epoch for s in line["samples"]]
        views = [tuple(v) for line in epoch for v in line["views"]]
        assert (len(samples), len(set(samples)), len(set(views))) == (84, 28, 84)
        assert samples[::3] == samples[1::3] == samples[2::3]


def test_resnet_50_from_scratch_has_the_originals_steps_and_rates() -> None:
    config = reading.parse(Config, recipes.find("r50").values)
    first, second = stages(config, 1_281_167)
    assert first.stop == pytest.approx(120 * 5005, rel=1e-3)
    rates = [first.learning_rate(int(share * first.stop)) for share in (0.0, 0.24, 0.26, 0.49, 0.51, 0.76)]
    assert rates == pytest.approx([0.16, 0.16, 0.016, 0.016, 0.0016, 0.00016])
    assert (first.res, second.res, first.tune.repeats, first.transform) == (128, 224, 3, "random_resized_crop")
    assert second.learning_rate(second.first) == pytest.approx(8e-3)
