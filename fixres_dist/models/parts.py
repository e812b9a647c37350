"""What trains under each policy, found by structure, and the model split there into a frozen trunk and a head.

The trunk is everything that no tuned module precedes: it runs without autograd, in low precision if asked. The head is
the rest, in fp32, and the only part that is wrapped in DDP. The split is a graph cut (torch.fx), so a last BN inside a
residual branch works as one before the pooling does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from torch import fx, nn

from fixres_dist.base.errors import UserError
from fixres_dist.models.build import meta_forward, own_size
from fixres_dist.models.policies import Tuned, select
from fixres_dist.models.weights import digest


@dataclass(frozen=True)
class Parts:
    """`head(*trunk(images))` are the logits; trunk is None when gradients reach the images' first layer."""

    model: nn.Module
    tuned: Tuned
    trunk: nn.Module | None
    head: nn.Module
    trains_blocks: bool = False  # whole blocks train, so the head is worth low precision
    recomputes: bool = False  # activation checkpointing runs its layers again in the backward pass


def described(parts: Parts) -> str:
    """What trains, in a sentence for the log."""
    count = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    kept = "" if parts.tuned.last_bn or parts.trunk is None else "; no layer whose statistics are measured"
    return f"training {', '.join(parts.tuned.modules) if parts.trunk else 'everything'} ({count:,} parameters){kept}"


def parts_of(model: nn.Module, policy: str, recompute: bool = False) -> Parts:
    """Set what trains and cut the model there. Parameters and buffers stay shared with `model`.

    `recompute`: checkpoint activations where gradients run through every block, policy `all`.
    """
    checkpoint_activations(model, recompute and policy == "all")
    tuned = select(model, policy)
    chosen = set(tuned.parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)  # on the parameter: on a module it is a silent no-op
    if policy == "all":
        return Parts(model, tuned, None, model, True, recompute)
    model.eval()
    try:
        trunk, head = cut(model, tuned.modules)
    except fx.proxy.TraceError as error:
        raise UserError(
            f"{type(model).__name__} cannot be cut at {', '.join(tuned.modules)} ({error}). Next: tune.policy=all"
        ) from None
    check_cut(model, policy, trunk)
    return Parts(model, tuned, trunk, head, policy == "last_block")


def check_cut(model: nn.Module, policy: str, trunk: nn.Module) -> None:
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


def set_modes(parts: Parts, bn_stats: str) -> None:
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


def frozen_digest(parts: Parts) -> str:
    """Of every tensor the policy must not change; compared at resume and at the end of a run."""
    return digest({k: v for k, v in parts.model.state_dict().items() if k not in parts.tuned.tensors})
