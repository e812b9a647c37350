"""Which tensors train under each policy, found by the model's structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm.layers
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.base.errors import UserError
from fixres_dist.models.build import classifier_name, meta_forward, own_size

NORMS = (
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(timm.layers.RmsNorm, timm.layers.RmsNorm2d, timm.layers.SimpleNorm, timm.layers.SimpleNorm2d),
)


@dataclass(frozen=True)
class Tuned:
    """The exact tensors a policy may change, by name in the model's state dict."""

    modules: tuple[str, ...]  # the tuned modules, in forward order
    last_bn: str  # empty when the policy leaves the last BN alone, or the last norm keeps no statistics
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]  # BN statistics

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.parameters + self.buffers


def forward_order(model: nn.Module) -> list[str]:
    """Names of the layers (modules without children, and norms) in the order a forward pass calls them."""
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, NORMS) or not list(module.children())
    ]
    meta_forward(model, 1, own_size(model))
    for hook in hooks:
        hook.remove()
    return called


def select(model: nn.Module, policy: str) -> Tuned:
    """The tuned tensors of `policy`; raises UserError where the model has no layer the policy needs.

    `classifier+bn_stats` is what the original code trains, `classifier+bn` what the paper says (docs/method.md). The
    last norm layer in forward order plays the BN's part where it is another kind: it has an affine and no statistics.
    """
    classifier = classifier_name(model)
    if policy == "all":
        buffers = tuple(
            n for n, _ in model.named_buffers() if n.rpartition(".")[2].startswith(("running_", "num_batches"))
        )
        return Tuned(("",), "", tuple(n for n, _ in model.named_parameters()), buffers)
    modules, frozen, statistics = [classifier], set(), []
    order = forward_order(model) if policy != "classifier" else []
    norm = next((name for name in reversed(order) if isinstance(model.get_submodule(name), NORMS)), "")
    has_statistics = bool(norm) and getattr(model.get_submodule(norm), "running_mean", None) is not None
    if policy == "last_block":
        modules = last_block(model, order)
    elif policy != "classifier":
        check_norm(model, policy, norm, has_statistics)
        modules.insert(0, norm)
    if policy == "classifier+bn_stats":
        frozen = {norm}
    if policy == "classifier+bn+conv_head":
        modules.insert(0, feeding_conv(model, order, norm))
    if policy != "classifier" and has_statistics:
        statistics = [f"{norm}.{name}" for name, _ in model.get_submodule(norm).named_buffers()]
    trained = [
        f"{module}.{name}"
        for module in modules
        if module not in frozen
        for name, _ in model.get_submodule(module).named_parameters()
    ]
    return Tuned(tuple(modules), norm if statistics else "", tuple(dict.fromkeys(trained)), tuple(statistics))


def check_norm(model: nn.Module, policy: str, norm: str, has_statistics: bool) -> None:
    """Refuse a policy that tunes the last norm layer where that layer lacks what it tunes."""
    name = type(model).__name__
    if not norm:
        raise UserError(
            f"policy {policy!r} tunes the last norm layer, and {name} has none. Next: tune.policy=classifier"
        )
    kind = type(model.get_submodule(norm)).__name__
    if policy == "classifier+bn_stats" and not has_statistics:
        raise UserError(
            f"policy {policy!r} moves the last BatchNorm's statistics, and the last norm of {name}, {norm} ({kind}), "
            "keeps none. Next: tune.policy=classifier+bn tunes its affine"
        )
    if policy != "classifier+bn_stats" and not list(model.get_submodule(norm).parameters()):
        raise UserError(
            f"the last norm of {name}, {norm} ({kind}), has no affine to tune. Next: tune.policy=classifier"
        )


def feeding_conv(model: nn.Module, order: list[str], norm: str) -> str:
    """The convolution whose output the last norm takes: the layer with parameters before it, with as many channels."""
    before = order[: len(order) - 1 - order[::-1].index(norm)]
    layer = next((name for name in reversed(before) if list(model.get_submodule(name).parameters())), norm)
    module = model.get_submodule(layer)
    if isinstance(module, nn.Conv2d) and module.out_channels == next(model.get_submodule(norm).parameters()).numel():
        return layer
    raise UserError(
        f"policy 'classifier+bn+conv_head' tunes the convolution before the last norm, and in {type(model).__name__} "
        f"{layer} ({type(module).__name__}) stands before {norm}. Next: tune.policy=classifier+bn, or last_block"
    )


def last_block(model: nn.Module, order: list[str]) -> list[str]:
    """The last block and all that comes after it, as few modules as hold exactly that, in forward order.

    What a block is, timm says: its models group their parameters by depth, for learning rates that differ by layer.
    """
    groups = list(group_parameters(model, model.group_matcher()).values()) if hasattr(model, "group_matcher") else []  # type: ignore[operator]
    chosen = {name for group in groups[-2:] for name in group}
    held = [
        name
        for name, module in model.named_modules()
        if name and (own := [f"{name}.{n}" for n, _ in module.named_parameters()]) and chosen.issuperset(own)
    ]
    found = [name for name in held if name.rpartition(".")[0] not in held]
    covered = {f"{name}.{n}" for name in found for n, _ in model.get_submodule(name).named_parameters()}
    blocks = {name.rpartition(".")[0] for name in groups[-2]} if len(groups) > 2 else set()
    if len(blocks) < 2 or covered != chosen:
        raise UserError(
            f"policy 'last_block' finds no blocks in {type(model).__name__}. Next: tune.policy=classifier+bn"
        )
    first = {name: next(i for i, layer in enumerate(order) if f"{layer}.".startswith(f"{name}.")) for name in found}
    return sorted(found, key=first.__getitem__)
