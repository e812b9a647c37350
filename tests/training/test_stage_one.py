"""Stage one with timm's parts: optimizers, averages, mixed and augmented pictures, and the head first."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn
from training.test_step import made as index_of

from fixres_dist.base.errors import UserError
from fixres_dist.base.signals import StopFlag
from fixres_dist.base.small_files import read_lines
from fixres_dist.config import reading
from fixres_dist.config.schema import Config, Run
from fixres_dist.config.stage_settings import Optimizer, Pretrain
from fixres_dist.data import augment, geometry, order
from fixres_dist.data.requests import Pictures, train_steps
from fixres_dist.models.build import build_model
from fixres_dist.models.optimizers import optimizer_of
from fixres_dist.runs import checkpoint, preparation, restoring
from fixres_dist.runs.checkpoint import Progress, Tensors
from fixres_dist.runs.rundir import RunDir
from fixres_dist.training import loop, plan, worker
from fixres_dist.training.mixing import mixed
from fixres_dist.training.stages import Stage

EVERYTHING = (
    *("optimizer=adamw", "layer_decay=0.8", "ema_decay=0.9", "mixup=0.2", "cutmix=1.0", "drop_path=0.3"),
    *("rand_augment=rand-m9-mstd0.5-inc1", "head_epochs=1", "base_lr=0.01", "warmup_epochs=0.5"),
)


def prepared(root: Path, photos: Path, *first: str) -> RunDir:
    items = (
        *("model.name=test_efficientnet", "model.timm_name=test_efficientnet", "model.weights=none"),
        *(f"data.root={photos}", "data.res=64", "data.workers=0", f"data.cache={root}-cache"),
        *("tune.epochs=0", "tune.global_batch=28", "tune.bn_stats_images=28", "run.precision=fp32"),
        *("run.memory_format=channels_last", "run.batch_per_device=13", "run.eval_every=1"),
        *("pretrain.res=64", "pretrain.epochs=2", "pretrain.global_batch=28"),
    )
    config = reading.parse(Config, reading.overrides([*items, *(f"pretrain.{item}" for item in first)]))
    return preparation.prepare(root, config, "submit")


@pytest.mark.parametrize(("first", "stops"), [(EVERYTHING, (2, 5)), (("optimizer=lamb", "ema_decay=0.99"), (1, 4))])
def test_a_resume_is_exact(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[str, ...], stops: tuple[int, ...]
) -> None:
    """Stopped in the middle of every stage: the weights' moving average ends as undisturbed, bit for bit."""
    calm, stopped = prepared(tmp_path / "calm", photos, *first), prepared(tmp_path / "stopped", photos, *first)
    assert worker.train(calm.root, StopFlag()) == 0
    real = loop.backward
    for stop in stops:
        flag = StopFlag()

        def backward(work, head, scale, step, *rest, flag=flag, stop=stop):  # type: ignore[no-untyped-def]
            flag.signal = 15 if step == stop else flag.signal
            return real(work, head, scale, step, *rest)

        monkeypatch.setattr(loop, "backward", backward)
        assert worker.train(stopped.root, flag) == 1
        assert stopped.saved_step() >= stop
    monkeypatch.setattr(loop, "backward", real)
    torch.manual_seed(7)  # whatever the process has drawn before
    assert worker.train(stopped.root, StopFlag()) == 0
    a, b = load_file(calm.pretrained), load_file(stopped.pretrained)
    assert all(torch.equal(a[name], b[name]) for name in a)
    said = [x["evaluation"] for x in read_lines(stopped.metrics) if "evaluation" in x and x["evaluation"] != "before"]
    assert said[:-1] == (["head"] if "head_epochs=1" in first else []) + ["pretrain epoch 1", "pretrained"]


def test_the_steps_of_stage_one_are_not_forgotten_while_fixing_has_no_checkpoint(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last checkpoint is put aside for fixing's first one; a run that was killed between had lost stage one's sample lines."""
    run = prepared(tmp_path / "run", photos)
    config = run.config()
    run = preparation.prepare(
        tmp_path / "recorded", replace(config, run=replace(config.run, record_samples=True)), "submit"
    )
    real = checkpoint.tensor_files.save

    def save(path: Path, *rest: Any) -> str:
        if checkpoint.stage_end(run.checkpoints, 6).exists():
            raise RuntimeError("killed")
        return real(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.tensor_files, "save", save)
        with pytest.raises(RuntimeError, match="killed"):
            worker.train(run.root, StopFlag())
    assert run.saved_step() == 6
    run.pretrained.write_bytes(b"damaged")  # it is made again of the one that was put aside
    assert worker.train(run.root, StopFlag()) == 0
    assert [line["step"] for line in read_lines(run.root / "samples" / "rank_0.jsonl")] == list(range(6))


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """And takes the steps of timm's own, with a rate of its own for each layer."""
    tune = Pretrain(optimizer=name, weight_decay=0.05, layer_decay=0.5 if name != "sgd" else 1.0)  # type: ignore[arg-type]

    def model() -> nn.Module:
        return build_model("test_efficientnet", 3)

    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
        for k in which:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * group.get("lr_scale", 1.0)
            generator = torch.Generator().manual_seed(k)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    calm, other, timms = model(), model(), model()
    steps(calm, optimizer_of(calm, Run(), tune), range(4))
    first = optimizer_of(other, Run(), tune)
    steps(other, first, range(2))
    names = tuple(dict(other.named_parameters()))
    checkpoint.write(tmp_path, Tensors.of(other, names, first), Progress(2, "pretrain"), {})
    fresh = model()
    second = optimizer_of(fresh, Run(), tune)
    restoring.restore(tmp_path / "step_00000002", fresh, names, second, {})
    steps(fresh, second, range(2, 4))
    for a, b in zip(calm.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    if name == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(timms.parameters(), 0.01, 0.9, weight_decay=0.05)
    else:
        groups = param_groups_layer_decay(timms, 0.05, layer_decay=0.5)
        assert len({group["lr_scale"] for group in groups}) > 3
        called = {"nesterov": "sgd"}.get(name, name)
        reference = create_optimizer_v2(groups, called, lr=0.01, weight_decay=0.05, momentum=0.9)
    steps(timms, reference, range(4))
    for a, b in zip(calm.parameters(), timms.parameters(), strict=True):
        assert torch.equal(a, b)


def stage(**settings: float) -> Stage:
    return Stage("pretrain", Pretrain(global_batch=12, **settings), 32, "random_resized_crop", 0, 23, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_mixed_pictures_are_timms_however_the_step_is_cut(settings: dict[str, float]) -> None:
    one, images, labels = stage(**settings), torch.randn(12, 3, 16, 16), torch.arange(12) % 5
    outwards = [0, 2, 4, 6, 8, 10, 11, 9, 7, 5, 3, 1]  # timm mixes the first with the last
    timms = Mixup(settings.get("mixup", 0), settings.get("cutmix", 0), label_smoothing=0.1, num_classes=5)
    for step in (3, 4):
        seed = int(order.keyed(5, 4, step)[0])
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        expected, targets = timms(images[outwards].clone(), labels[outwards])
        back = [outwards.index(k) for k in range(12)]
        whole = mixed(one, 5, step, images.clone(), labels)
        assert torch.equal(whole[0][back], expected[back])
        assert torch.equal(whole[1], targets)
        assert not torch.equal(whole[0][back], images)
        for first, stop in ((0, 4), (4, 10), (10, 12)):  # micro-batches, or ranks
            part, soft = mixed(one, 5, step, images[first:stop].clone(), labels[first:stop])
            inner = [k for k in outwards if first <= k < stop]
            assert torch.equal(part, torch.stack([expected[outwards.index(k)] for k in inner]))
            assert torch.equal(soft, torch.stack([targets[outwards.index(k)] for k in inner]))
    rest, soft = mixed(one, 5, 3, images[:1], labels[:1])
    assert torch.equal(rest, images[:1])
    torch.testing.assert_close(soft, torch.tensor([[0.92, 0.02, 0.02, 0.02, 0.02]]))
    assert mixed(one, 5, 3, images[:0], labels[:0])[1].shape == (0, 5)
    assert mixed(stage(), 5, 3, images, labels)[1] is labels


@pytest.mark.parametrize(("world_size", "batch"), [(1, 4), (2, 4), (3, 2), (3, 6)])
def test_pairs_stay_on_one_rank_in_one_forward_pass(world_size: int, batch: int) -> None:
    """Also of an epoch's last step, whose 11 images are an odd number."""
    pictures = Pictures("test", 32, geometry.resize_of("fixefficientnet", 32, 1.0, "bicubic"), 7)
    args = (index_of(23), pictures, 12)
    alone = [r.samples.tolist() for (r,) in train_steps(*args, 12, 0, 2, 0, 1, together=2)]
    ranks = [list(train_steps(*args, batch, 0, 2, rank, world_size, together=2)) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        assert len({len(of[step]) for of in ranks}) == 1, "every rank has as many forward passes"
        parts = [request.samples.tolist() for of in ranks for request in of[step]]
        assert list(itertools.chain.from_iterable(parts)) == whole
        assert max(map(len, parts)) <= batch
        assert all(len(part) % 2 == 0 for part in parts if part and part[-1] != whole[-1])


def test_rand_augment_at_its_highest_strength_draws_black_where_no_bit_is_left() -> None:
    """timm asks Pillow for 0 bits there, which Pillow 13 refuses."""
    fill = (124, 116, 104)
    for operation in augment.transform("rand-m10-inc1", fill, 32).ops:
        operation.prob = 1.0
        image = operation(Image.new("RGB", (32, 32), (200, 100, 50)))
        if operation.name == "PosterizeIncreasing":
            assert image.getextrema() == ((0, 0), (0, 0), (0, 0))
    for seed in range(60):
        augment.apply(
            torch.zeros(32, 32, 3, dtype=torch.uint8).permute(2, 0, 1),
            geometry.Augment("rand-m9-mstd9-inc1", fill, seed),
        )


def test_rand_augment_is_timms_for_each_picture_and_epoch() -> None:
    config, fill = "rand-m9-n2-mstd0.5-inc1", (124, 116, 104)
    resize = geometry.resize_of("fixefficientnet", 32, 1.0, "bicubic")
    pictures = Pictures("random_resized_crop", 32, resize, 7, geometry.Augment(config, fill))
    ((first,), (again,)) = (next(train_steps(index_of(8), pictures, 8, 8, k, k + 1, 0, 1)) for k in (0, 1))
    seeds = {view.augment.seed for request in (first, again) for view in request.views if view.augment}
    assert len(seeds) == 16, "every picture draws its own, in every epoch another"
    assert all(view.jitter == (1.0, 1.0, 1.0) for view in first.views)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    for view in first.views:
        assert view.augment
        canvas = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        state = np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index,union-attr]
        augment.apply(canvas, view.augment)
        assert np.array_equal(np.random.get_state()[1], state[0])  # type: ignore[index,arg-type]
        assert random.getstate() == state[1]
        random.seed(view.augment.seed)
        np.random.seed(view.augment.seed & 0xFFFFFFFF)
        timms = rand_augment_transform(config, {"translate_const": 14, "img_mean": fill})(Image.fromarray(pixels))
        assert np.array_equal(canvas.permute(1, 2, 0).numpy(), np.asarray(timms))


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (("pretrain.optimizer=lamb", "run.optimizer=apex"), "run.optimizer=torch, or pretrain.optimizer=sgd"),
        (("pretrain.layer_decay=0.7", "run.precision=apex-O1"), "run.precision=auto"),
        (("pretrain.optimizer=adamm",), "adamw"),
        (("pretrain.layer_decay=1.2",), "accepted: above 0, to 1"),
        (("pretrain.ema_decay=1",), "accepted: 0 <= ema_decay < 1"),
        (("pretrain.rand_augment=m9",), "pretrain.rand_augment=rand-m9-mstd0.5-inc1"),
        (("pretrain.rand_augment=rand-m9", "data.backend=dali"), "data.backend=auto"),
        (("pretrain.rand_augment=rand-m9", "pretrain.train_transform=test"), "train_transform=random_resized_crop"),
        (("pretrain.mixup=0.2", "pretrain.policy=last_block"), "pretrain.policy=all"),
        (("pretrain.cutmix=1", "pretrain.repeats=3"), "pretrain.repeats=1"),
        (("pretrain.mixup=-1",), "mixup is -1.0; accepted: 0 or more"),
        (("pretrain.mixup=0.2", "run.batch_per_device=1"), "run.batch_per_device=2"),
        (("pretrain.drop_path=0.1", "pretrain.policy=attention"), "pretrain.drop_path=0"),
        (("pretrain.head_epochs=2", "pretrain.policy=classifier"), "pretrain.head_epochs=0"),
        (("pretrain.classifier=first_result", "model.weights=none"), "pretrain.classifier=new"),
    ],
)
def test_what_excludes_each_other_is_refused_at_submission(items: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        reading.parse(Config, reading.overrides(["pretrain.epochs=1", *items]))


def test_a_batch_that_the_ranks_cannot_share_in_pairs_is_refused() -> None:
    config = reading.parse(Config, {"pretrain": {"mixup": 0.2, "global_batch": 6}, "tune": {"global_batch": 6}})
    with pytest.raises(UserError, match=r"6 and cannot be divided over 2 ranks in pairs.*pretrain.global_batch=8"):
        plan.check(config, 2, dry=True)
    plan.check(config, 3, dry=True)


def test_a_model_without_stochastic_depth_is_refused() -> None:
    with pytest.raises(UserError, match=r"vgg11 has no stochastic depth. Next: pretrain.drop_path=0"):
        build_model("vgg11", 3, drop_path=0.1)


ALIKE = (
    ("optimizer=nesterov", "base_lr=0.02", "weight_decay=0.0001"),
    (
        *("optimizer=lamb", "base_lr=0.005", "weight_decay=0.05", "layer_decay=0.8", "ema_decay=0.9"),
        *("mixup=0.2", "cutmix=1.0", "rand_augment=rand-m7-mstd0.5-inc1", "drop_path=0.1", "warmup_epochs=1"),
    ),
)


@pytest.mark.parametrize("first", ALIKE, ids=["plain", "strong"])
def test_it_ends_where_timms_loop_does_on_the_same_pictures(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[str, ...]
) -> None:
    """Its optimizer, losses, mixing, averages and BatchNorm statistics are those of a loop written with timm's parts.

    The loop here takes the pictures, the learning rates and the seeds of stage one, and nothing else of it. No AdamW: it
    takes whole steps along gradients that are all rounding (test_every_optimizer_goes_on_from_a_checkpoint has it).
    """
    config = prepared(tmp_path / "first", photos, *first, "bn_stats=ema", "lr_rule=none").config()
    run = preparation.prepare(tmp_path / "run", replace(config, run=replace(config.run, batch_per_device=28)), "submit")
    own, real, taken, start = config.pretrain, loop.backward, [], {}
    assert own is not None

    def backward(work, head, scale, step, micro_batches, meter):  # type: ignore[no-untyped-def]
        if not taken:
            start.update({name: value.clone() for name, value in work.session.model.state_dict().items()})
        batches = list(micro_batches)
        if work.stage.name == "pretrain":
            rate, seeds = (
                work.stage.learning_rate(step),
                (order.keyed(work.stage.seed, 4, step, 0, 0), order.keyed(work.stage.seed, 4, step)),
            )
            taken.append((torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]), rate, seeds))
        return real(work, head, scale, step, iter(batches), meter)

    monkeypatch.setattr(loop, "backward", backward)
    assert worker.train(run.root, StopFlag()) == 0

    classes = len(start["classifier.bias"])
    model = timm.create_model("test_efficientnet", num_classes=classes, drop_path_rate=own.drop_path)
    model.load_state_dict(start)
    options = {"layer_decay": own.layer_decay} if own.layer_decay < 1 else {}
    name = {"nesterov": "sgd"}.get(own.optimizer, own.optimizer)
    optimizer = create_optimizer_v2(model, name, lr=0.0, weight_decay=own.weight_decay, momentum=0.9, **options)
    ema = ModelEmaV3(model, own.ema_decay, use_warmup=True) if own.ema_decay else None
    mix = Mixup(own.mixup, own.cutmix, label_smoothing=0.1, num_classes=classes) if own.mixes else None
    cfg = timm.data.resolve_data_config({}, model=model)
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    model.train()
    for step, (images, labels, rate, (noise, mixing)) in enumerate(taken, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        x, y = (images / 255 - mean) / std, labels
        if mix:
            outwards = [*range(0, len(x), 2), *range(len(x) - 1, 0, -2)]
            with augment.seeded(int(mixing[0])):
                x, y = mix(x[outwards], y[outwards])
        torch.manual_seed(int(noise[0]) >> 1)
        loss = (SoftTargetCrossEntropy() if mix else LabelSmoothingCrossEntropy(0.1))(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema:
            ema.update(model, step=step)
    # What the networks say is compared, not their weights: a bias before a BatchNorm has a gradient that is all rounding.
    pictures = (torch.cat([images for images, *_ in taken]) / 255 - mean) / std

    def said(state: dict[str, torch.Tensor]) -> torch.Tensor:
        model.load_state_dict(state)
        with torch.no_grad():
            return model.eval()(pictures)

    ends = said((ema.module if ema else model).state_dict())
    assert (said(load_file(run.pretrained)) - ends).norm() < 1e-3 * (said(start) - ends).norm()
