"""The exact tensors that train and that change, per policy, and the cut between trunk and head."""

from __future__ import annotations

import copy

import pytest
import torch
from support.networks import BN_BUFFERS, one_step
from torch import nn

from fixres_dist.base.errors import UserError
from fixres_dist.models import batchnorm
from fixres_dist.models.build import build_model
from fixres_dist.models.parts import frozen_digest, parts_of, set_modes

EFFICIENTNET = {
    "classifier": (["classifier"], [], None),
    "classifier+bn_stats": (["classifier"], [], "bn2"),
    "classifier+bn": (["classifier", "bn2"], [], "bn2"),
    "classifier+bn+conv_head": (["classifier", "bn2", "conv_head"], [], "bn2"),
    "last_block": (["classifier", "bn2", "conv_head"], ["blocks.4.0."], "bn2"),
}
RESNET = {
    "classifier": (["fc"], [], None),
    "classifier+bn_stats": (["fc"], [], "layer4.1.bn2"),
    "classifier+bn": (["fc", "layer4.1.bn2"], [], "layer4.1.bn2"),
    "classifier+bn+conv_head": (["fc", "layer4.1.bn2", "layer4.1.conv2"], [], "layer4.1.bn2"),
    "last_block": (["fc"], ["layer4.1."], "layer4.1.bn2"),
}
CASES = [
    (name, policy, *row)
    for name, table in (("test_efficientnet", EFFICIENTNET), ("resnet18", RESNET))
    for policy, row in table.items()
]


def parameters_below(model: nn.Module, modules: list[str], prefixes: list[str]) -> set[str]:
    return {
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[0] in modules or name.startswith(tuple(prefixes))
    }


@pytest.mark.parametrize("bn_stats", ["exact", "ema"])
@pytest.mark.parametrize(("name", "policy", "modules", "prefixes", "last_bn"), CASES)
def test_exactly_the_tuned_tensors_train_and_change(
    name: str, policy: str, modules: list[str], prefixes: list[str], last_bn: str | None, bn_stats: str
) -> None:
    model = build_model(name, 5)
    for p in model.parameters():  # affine weights away from 1 and 0, so that a change shows
        p.data += 0.01
    before = copy.deepcopy(model.state_dict())
    parts = parts_of(model, policy)
    expected = parameters_below(model, modules, prefixes)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert set(parts.tuned.parameters) == expected
    one_step(parts, bn_stats)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    statistics = {f"{last_bn}.{b}" for b in BN_BUFFERS} if last_bn else set()
    if bn_stats == "exact":
        statistics.discard(f"{last_bn}.num_batches_tracked")
    assert changed == expected | statistics
    assert changed <= set(parts.tuned.tensors)


@pytest.mark.parametrize("bn_stats", ["ema", "kept"])
@pytest.mark.parametrize("name", ["test_efficientnet", "resnet18"])
def test_policy_all_trains_and_changes_everything(name: str, bn_stats: str) -> None:
    """With kept statistics all but these."""
    model = build_model(name, 5)
    for p in model.parameters():  # ResNets start the last BN of a block at zero, which stops the gradient before it
        p.data += 0.01
    before = copy.deepcopy(model.state_dict())
    parts = parts_of(model, "all")
    assert parts.trunk is None
    one_step(parts, bn_stats)
    assert all(p.requires_grad for p in model.parameters())
    statistics = {n for n in before if n.endswith(BN_BUFFERS)} if bn_stats == "kept" else set()
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == set(before) - statistics


@pytest.mark.parametrize("policy", list(EFFICIENTNET))
@pytest.mark.parametrize("name", ["test_efficientnet", "resnet18", "tf_efficientnet_b0"])
def test_trunk_and_head_are_the_model(name: str, policy: str) -> None:
    model = build_model(name, 7)
    images = torch.randn(2, 3, 96, 64)
    expected = model(images).detach()
    parts = parts_of(model, policy)
    assert parts.trunk is not None
    features = parts.trunk(images)
    assert torch.equal(parts.head(*features), expected)
    below_head = {id(p) for p in parts.head.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= below_head
    assert parts.head(*parts.trunk(images[:0])).shape == (0, 7), "a rank without a sample still takes part in a step"


def test_setting_requires_grad_on_a_module_is_a_silent_no_op() -> None:
    """What the original code does with conv_head; the reason why tuning sets it on parameters."""
    model = build_model("test_efficientnet", 5)
    for p in model.parameters():
        p.requires_grad_(False)
    model.conv_head.requires_grad = True
    assert not any(p.requires_grad for p in model.parameters())


def test_modes_after_an_evaluation() -> None:
    parts = parts_of(build_model("test_efficientnet", 5), "classifier+bn")
    parts.model.train()
    set_modes(parts, "ema")
    training = [
        n for n, m in parts.model.named_modules() if m.training and isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert training == ["bn2"]
    set_modes(parts, "exact")
    assert not any(m.training for m in parts.model.modules())


def test_moments_are_those_of_the_whole_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 4, 5, 5) * 3 + 100
    moments, other = batchnorm.Moments(4), batchnorm.Moments(4)
    moments.add(x[:5])
    other.add(x[5:])
    moments.sums += other.sums  # what the all-reduce does
    bn = nn.BatchNorm2d(4)
    moments.set(bn)
    torch.testing.assert_close(bn.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_var, x.transpose(0, 1).flatten(1).var(1))


def test_statistics_over_ranks_equal_ordinary_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one rank the sum over ranks is the identity: values, gradients and running statistics must be torch's."""
    monkeypatch.setattr(batchnorm.dist, "all_reduce", lambda x: x)
    torch.manual_seed(0)
    models_ = [build_model("test_efficientnet", 5) for _ in range(2)]
    models_[1].load_state_dict(models_[0].state_dict())
    images, losses = torch.randn(6, 3, 64, 64), []
    for k, model in enumerate(models_):
        parts = parts_of(model, "all")
        set_modes(parts, "ema")
        if k:
            batchnorm.share_batch_statistics(parts)
        loss = parts.head(images).square().mean()
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[1], losses[0])
    for (name, a), (_, b) in zip(models_[0].named_parameters(), models_[1].named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=2e-3, atol=2e-5, msg=name)
    for name, value in models_[0].state_dict().items():
        torch.testing.assert_close(models_[1].state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("low", [False, True])
def test_statistics_over_ranks_keep_no_more_for_the_backward_pass_than_one_rank(
    low: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all tensors that autograd saves, each storage once; in bf16 too."""
    monkeypatch.setattr(batchnorm.dist, "all_reduce", lambda x: x)
    kept = []
    for shared in (False, True):
        parts = parts_of(build_model("test_efficientnet", 5), "all")
        set_modes(parts, "ema")
        if shared:
            batchnorm.share_batch_statistics(parts)
        storages: dict[int, tuple[torch.Tensor, int]] = {}

        def note(x: torch.Tensor, storages: dict[int, tuple[torch.Tensor, int]] = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", enabled=low):
            loss = parts.head(torch.randn(8, 3, 64, 64)).square().mean()
        kept.append(sum(size for _, size in storages.values()))
        loss.backward()
    assert kept[1] < 1.02 * kept[0]


def test_a_step_whose_images_were_all_skipped_leaves_statistics_and_weights_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batchnorm.dist, "all_reduce", lambda x: x)
    model = build_model("test_efficientnet", 5)
    parts = parts_of(model, "all")
    set_modes(parts, "ema")
    batchnorm.share_batch_statistics(parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts.head(torch.zeros(0, 3, 64, 64)).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_of_no_image_are_refused_and_of_one_value_have_no_variance() -> None:
    bn = nn.BatchNorm2d(4)
    with pytest.raises(UserError, match="could be decoded"):
        batchnorm.Moments(4).set(bn)
    moments = batchnorm.Moments(4)
    moments.add(torch.ones(1, 4, 1, 1))
    moments.set(bn)
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([1.0] * 4, [0.0] * 4)


def test_digest_sees_one_changed_frozen_element_and_no_tuned_one() -> None:
    model = build_model("test_efficientnet", 5)
    parts = parts_of(model, "classifier+bn")
    first = frozen_digest(parts)
    with torch.no_grad():
        model.classifier.weight += 1
    assert frozen_digest(parts) == first
    with torch.no_grad():
        model.conv_stem.weight[0, 0, 0, 0] += 1e-6
    assert frozen_digest(parts) != first
