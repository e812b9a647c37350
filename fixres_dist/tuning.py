"""What trains under each policy, found by structure, and the model split there into a frozen trunk and a head.

The trunk is everything that no tuned module precedes: it runs without autograd, in low precision if asked. The head is
the rest, in fp32, and the only part that is wrapped in DDP. The split is a graph cut (torch.fx), so a last BN inside a
residual branch works as one before the pooling does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from timm.models import group_parameters
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.errors import UserError
from fixres_dist.models import classifier_name, meta_forward, own_size

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


@dataclass(frozen=True)
class Split:
    """`head(*trunk(images))` are the logits; trunk is None when gradients reach the images' first layer."""

    model: nn.Module
    tuned: Tuned
    trunk: nn.Module | None
    head: nn.Module
    trains_blocks: bool = False  # whole blocks train, so the head is worth low precision
    recomputes: bool = False  # activation checkpointing runs its layers again in the backward pass


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


def described(parts: Split) -> str:
    """What trains, in a sentence for the log."""
    count = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    kept = "" if parts.tuned.last_bn or parts.trunk is None else "; no layer whose statistics are measured"
    return f"training {', '.join(parts.tuned.modules) if parts.trunk else 'everything'} ({count:,} parameters){kept}"


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


def split(model: nn.Module, policy: str, recompute: bool = False) -> Split:
    """Set what trains and cut the model there. Parameters and buffers stay shared with `model`.

    `recompute`: checkpoint activations where gradients run through every block, policy `all`.
    """
    checkpoint_activations(model, recompute and policy == "all")
    tuned = select(model, policy)
    chosen = set(tuned.parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)  # on the parameter: on a module it is a silent no-op
    if policy == "all":
        return Split(model, tuned, None, model, True, recompute)
    model.eval()
    try:
        trunk, head = cut(model, tuned.modules)
    except fx.proxy.TraceError as error:
        raise UserError(
            f"{type(model).__name__} cannot be cut at {', '.join(tuned.modules)} ({error}). Next: tune.policy=all"
        ) from None
    check_crossing(model, policy, trunk)
    return Split(model, tuned, trunk, head, policy == "last_block")


def check_crossing(model: nn.Module, policy: str, trunk: nn.Module) -> None:
    """Refuse a cut through which more than features passes: a head's input has to be a row per image."""
    if not all(isinstance(f, torch.Tensor) and f.shape[0] == 2 for f in meta_forward(trunk, 2, own_size(model))):
        raise UserError(
            f"policy {policy!r} cuts {type(model).__name__} where more than image features passes (a rotary embedding, "
            "say). Next: tune.policy=classifier+bn"
        )


class OutlineTracer(fx.Tracer):
    """Traces only into modules that contain a tuned one: everything else is a leaf, whatever its control flow."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        # Functions whose control flow timm keeps from tracers, such as the resampling of a ViT's position embedding.
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self.opened = {name[:i] for name in modules for i, c in enumerate(name) if c == "."}

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Optional arguments of the model (a ViT's attention mask) are their defaults: only pictures enter."""
        fn, given = super().create_args_for_root(*args, **kwargs)
        return fn, [a.node.args[0] if isinstance(a, fx.Proxy) and a.node.args else a for a in given]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def cut(model: nn.Module, modules: tuple[str, ...]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(trunk, head): the trunk returns a tuple of the tensors that cross the cut, the head takes them in that order."""
    graph = OutlineTracer(modules).trace(model)
    after: set[fx.Node] = set()
    constant: set[fx.Node] = set()  # made of parameters alone: both sides compute it, it does not cross
    for node in graph.nodes:
        if (node.op == "call_module" and node.target in modules) or any(a in after for a in node.all_input_nodes):
            after.add(node)
        elif node.op != "placeholder" and constant.issuperset(node.all_input_nodes):
            constant.add(node)
    crossing = [n for n in graph.nodes if n not in after | constant and any(user in after for user in n.users)]
    trunk, head = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in after and node.op != "output":
            copies[node] = trunk.node_copy(node, copies.__getitem__)
    trunk.output(tuple(copies[node] for node in crossing))
    inner = {node: head.placeholder(f"feature_{i}") for i, node in enumerate(crossing)}
    for node in graph.nodes:
        if node in after | constant:
            inner[node] = head.node_copy(node, inner.__getitem__)
    sides = fx.GraphModule(model, trunk), fx.GraphModule(model, head)
    for side in sides:
        side.graph.eliminate_dead_code()
        side.recompile()
    return sides


def set_modes(parts: Split, bn_stats: str) -> None:
    """Re-applied at every epoch and after every evaluation: one stray train() would move frozen BN statistics.

    Dropout and stochastic depth stay off unless the whole network trains, as in the original.
    """
    parts.model.train(parts.trunk is None)
    parts.head.train(parts.trunk is None)
    if parts.trunk is not None and bn_stats == "ema" and parts.tuned.last_bn:
        parts.model.get_submodule(parts.tuned.last_bn).train()


def checkpoint_activations(model: nn.Module, enable: bool) -> None:
    """Let timm keep only the blocks' inputs and compute the rest again in the backward pass; UserError where it cannot."""
    try:
        model.set_grad_checkpointing(enable)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        if enable:
            raise UserError(
                f"run.activation_checkpointing: timm cannot do it for {type(model).__name__} ({error}). "
                "Next: run.activation_checkpointing=false"
            ) from None


@torch.no_grad()
def average_weights(optimizer: torch.optim.Optimizer, count: int, use: bool) -> None:
    """Take the weights into their running mean as the `count`-th (kept with the momenta, so a resume has it); `use`: take it.

    Statistics stay as they are: those of a last BN before which nothing trains belong to any weights.
    """
    for parameter, state in ((p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]):
        state["average"] = parameter.clone() if count == 1 else state["average"].lerp_(parameter, 1 / count)
        if use:
            parameter.copy_(state["average"])


def frozen_digest(parts: Split) -> str:
    """Of every tensor the policy must not change; compared at resume and at the end of a run."""
    return digest({k: v for k, v in parts.model.state_dict().items() if k not in parts.tuned.tensors})


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names and bytes, whatever the order and the memory format."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
