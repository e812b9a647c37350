"""Which tensors each policy trains, found by the model's structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm.layers
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.base.errors import UserError
from fixres_dist.models.build import classifiers, meta_forward, own_size

NORMS = (
    *(_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(timm.layers.RmsNorm, timm.layers.RmsNorm2d, timm.layers.SimpleNorm, timm.layers.SimpleNorm2d),
)


ATTENTION_POOLS = (
    *(timm.layers.AttentionPoolLatent, timm.layers.AttentionPool2d, timm.layers.RotAttentionPool2d),
    timm.layers.AttentionPoolPrr,
)


@dataclass(frozen=True)
class Tuned:
    """The tensors that a policy changes, by name in the model's state dict."""

    modules: tuple[str, ...]  # the tuned modules, in forward order
    last_bns: tuple[str, ...]  # whose statistics move: the last BN, or those of all classifiers; empty where none do
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]  # BN statistics

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.parameters + self.buffers


def forward_order(model: nn.Module) -> list[str]:
    """Names of the layers (modules without children, and norms) in the order in which a forward pass calls them."""
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


def parameters_of(model: nn.Module, module: str) -> list[str]:
    return [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]


def select(model: nn.Module, policy: str) -> Tuned:
    """The tuned tensors of `policy`; raises UserError where the model has no layer that the policy tunes.

    `classifier+bn_stats` is what the original code trains, `classifier+bn` what the paper says (docs/method.md). Where
    the last norm layer in forward order is no BatchNorm, its affine is tuned all the same; it has no statistics.
    `attention` tunes the attention layers and the classifier (Touvron et al., Three things everyone should know about
    Vision Transformers, arXiv 2203.09795, section 4).
    """
    classifier = classifiers(model)
    if policy == "all":
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        buffers = tuple(name for name, _ in model.named_buffers() if name.rpartition(".")[2] in statistics)
        return Tuned(("",), (), tuple(name for name, _ in model.named_parameters()), buffers)
    if policy == "classifier":
        return Tuned(classifier, (), tuple(name for c in classifier for name in parameters_of(model, c)), ())
    if policy == "attention":
        layers = (*attention_layers(model), *classifier)
        return Tuned(layers, (), tuple(name for layer in layers for name in parameters_of(model, layer)), ())
    order = forward_order(model)
    norms = last_norms(model, order, classifier)
    bns = [name for name in norms if getattr(model.get_submodule(name), "running_mean", None) is not None]
    if policy == "last_block":
        modules = last_block(model, order)
    else:
        check_norm(model, policy, norms[-1] if norms else "", bool(bns))
        conv = [feeding_conv(model, order, norms[-1])] if policy == "classifier+bn+conv_head" else []
        modules = [*conv, *(name for name in norms if not inside(name, classifier)), *classifier]
    trained = dict.fromkeys(name for m in modules for name in parameters_of(model, m))
    if policy == "classifier+bn_stats":
        trained = dict.fromkeys(name for name in trained if not inside(name, norms))
    moved = [f"{bn}.{name}" for bn in bns for name, _ in model.get_submodule(bn).named_buffers()]
    return Tuned(tuple(modules), tuple(bns), tuple(trained), tuple(moved))


def attention_layers(model: nn.Module) -> list[str]:
    """The attention layers of all blocks; raises UserError where there are none.

    By structure: the innermost layers with heads and parameters. Those that pool a map into a vector are no block's.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int) and parameters_of(model, name) and name
        if not isinstance(module, ATTENTION_POOLS)
    ]
    pools = [name for name, module in model.named_modules() if isinstance(module, ATTENTION_POOLS)]
    layers = [n for n in found if not inside(n, pools) and not any(inside(other, [n]) for other in found)]
    if not layers:
        raise UserError(
            f"policy 'attention' tunes the attention layers of a transformer's blocks, and {type(model).__name__} has none. "
            "Accepted: classifier, classifier+bn_stats, classifier+bn, classifier+bn+conv_head, last_block, all. "
            "Next: tune.policy=classifier+bn"
        )
    return layers


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether `name` is a layer or tensor within one of `modules`."""
    return any(name.startswith(f"{module}.") for module in modules)


def last_norms(model: nn.Module, order: list[str], classifier: tuple[str, ...]) -> list[str]:
    """The last norm layer in forward order; of classifiers that begin with a norm each (LeViT), all of theirs."""
    norms = [name for name in dict.fromkeys(order) if isinstance(model.get_submodule(name), NORMS)]
    return (
        [name for name in norms if inside(name, classifier)] if inside((norms or [""])[-1], classifier) else norms[-1:]
    )


def check_norm(model: nn.Module, policy: str, norm: str, has_statistics: bool) -> None:
    """Raise UserError where the last norm layer lacks what the policy tunes; `norm` is empty where there is none."""
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
    if policy != "classifier+bn_stats" and not parameters_of(model, norm):
        raise UserError(
            f"the last norm of {name}, {norm} ({kind}), has no affine to tune. Next: tune.policy=classifier"
        )


def feeding_conv(model: nn.Module, order: list[str], norm: str) -> str:
    """The convolution before the last norm: the last layer with parameters before it, with as many channels."""
    before = order[: len(order) - 1 - order[::-1].index(norm)]
    layer = next((name for name in reversed(before) if parameters_of(model, name)), norm)
    module = model.get_submodule(layer)
    if isinstance(module, nn.Conv2d) and module.out_channels == next(model.get_submodule(norm).parameters()).numel():
        return layer
    raise UserError(
        f"policy 'classifier+bn+conv_head' tunes the convolution before the last norm, and in {type(model).__name__} "
        f"{layer} ({type(module).__name__}) stands before {norm}. Next: tune.policy=classifier+bn, or last_block"
    )


def last_block(model: nn.Module, order: list[str]) -> list[str]:
    """The last block and everything after it, as the fewest modules that hold exactly that, in forward order.

    timm says what a block is: its models group their parameters by depth, for learning rates that differ by layer.
    """
    groups = list(group_parameters(model, model.group_matcher()).values()) if hasattr(model, "group_matcher") else []  # type: ignore[operator]
    chosen = {name for group in groups[-2:] for name in group}
    held = [
        name
        for name, _ in model.named_modules()
        if name and (own := parameters_of(model, name)) and chosen.issuperset(own)
    ]
    found = [name for name in held if name.rpartition(".")[0] not in held]
    covered = {parameter for name in found for parameter in parameters_of(model, name)}
    blocks = {name.rpartition(".")[0] for name in groups[-2]} if len(groups) > 2 else set()
    if len(blocks) < 2 or covered != chosen:
        raise UserError(
            f"policy 'last_block' finds no blocks in {type(model).__name__}. Next: tune.policy=classifier+bn"
        )
    first = {name: next(i for i, layer in enumerate(order) if f"{layer}.".startswith(f"{name}.")) for name in found}
    return sorted(found, key=first.__getitem__)
