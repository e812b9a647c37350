"""The model cut in two where a policy starts to train: a frozen trunk and a head.

The trunk is everything before the first tuned module: it runs without autograd, in low precision if asked. The head is
the rest, in fp32, and the only part that DDP wraps. The cut is made in the model's graph (torch.fx), so a last BN inside
a residual branch can be tuned as well as one right before the pooling.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.base.errors import UserError
from fixres_dist.config.stage_settings import THROUGH_ALL
from fixres_dist.models.build import classifiers, copied, meta_forward, own_size
from fixres_dist.models.policies import Tuned, select
from fixres_dist.models.weights import state_digest


@dataclass(frozen=True)
class Parts:
    """`head(*trunk(images))` are the logits [n, classes] of images [n, 3, h, w]. Without a trunk the head is the model."""

    model: nn.Module
    tuned: Tuned
    trunk: nn.Module | None  # None where gradients reach the first layer
    head: nn.Module
    trains_blocks: bool = False  # whole blocks train, so low precision pays in the head too
    folded: str = ""  # how many of the frozen trunk's BatchNorms are folded (fast_trunk.py), for the log
    recomputes: bool = False  # activation checkpointing runs layers a second time in the backward pass

    @property
    def everything(self) -> bool:
        """Whether the whole network trains, in training mode."""
        return self.tuned.modules == ("",)


def described(parts: Parts) -> str:
    """What trains, in a sentence for the log."""
    count = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    kept = "" if parts.tuned.last_bns or parts.trunk is None else "; no layer whose statistics are measured"
    names = list(parts.tuned.modules)
    names = names if len(names) <= 6 else [*names[:2], "...", *names[-2:]]
    return f"training {'everything' if parts.everything else ', '.join(names)} ({count:,} parameters){kept}"


def parts_of(model: nn.Module, policy: str, recompute: bool = False) -> Parts:
    """Cut `model` before what `policy` tunes, and let nothing else require grad. The parts share the model's tensors.

    `recompute`: under policies `all` and `attention`, where gradients run through every block, checkpoint activations. Raises UserError
    for a model that lacks what the policy tunes, or that cannot be cut there.
    """
    checkpoint_activations(model, recompute and policy in THROUGH_ALL)
    model.eval()
    tuned = select(model, policy)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tuned.parameters)  # set on a module it would be ignored without a word
    if policy in THROUGH_ALL:
        return Parts(model, tuned, None, model, True, recomputes=recompute)
    trunk, head = parted(model, policy, tuned)
    return Parts(model, tuned, trunk, head, policy == "last_block")


def parted(model: nn.Module, policy: str, tuned: Tuned) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(trunk, head) as `cut` makes them, cut before the tuned modules, or before the modules around them where that is impossible.

    A block whose forward decides by sizes can't be opened: then all of it belongs to the head, where its other layers
    stay frozen. Raises UserError where that helps neither.
    """
    name, why, points = type(model).__name__, "", tuned.modules
    while True:
        try:
            # Checked on the meta device, by a graph of its own: a graph keeps the device that tensors are made on.
            checked, _ = cut(copied(model, "meta"), points)
            features = meta_forward(checked, 3, own_size(model))
            if not all(isinstance(f, torch.Tensor) and f.shape[0] == 3 for f in features):
                raise fx.proxy.TraceError("more than image features passes there, a rotary embedding, say")
            if not {n for n, _ in checked.named_parameters()}.isdisjoint(tuned.parameters):
                raise fx.proxy.TraceError("it has no single module around them")
            return cut(model, points)
        except fx.proxy.TraceError as error:
            why = why or str(error)
        around = tuple(dict.fromkeys(point.rpartition(".")[0] or point for point in points))
        if around == points:
            other = "tune.policy=all" if policy == "classifier+bn" else "tune.policy=classifier+bn"
            raise UserError(
                f"policy {policy!r}: {name} cannot be cut at {', '.join(tuned.modules)} ({why}). Next: {other}"
            )
        points = around


@contextlib.contextmanager
def classifier_inputs(parts: Parts) -> Iterator[list[torch.Tensor]]:
    """A list; every forward pass of the head within the block appends the classifier's input, fp32 [n, channels].

    Of a model with two classifiers: both inputs side by side.
    """
    found: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    layers = [parts.model.get_submodule(name) for name in classifiers(parts.model)]

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        given.append(inputs[0].detach().float().flatten(1))
        if len(given) == len(layers):
            found.append(torch.cat(given, 1))
            given.clear()

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class TunedModulesTracer(fx.Tracer):
    """Traces only into modules that contain a tuned one: all others stay whole, whatever their control flow."""

    def __init__(self, model: nn.Module, modules: tuple[str, ...]) -> None:
        # Functions that timm hides from tracers for their control flow, such as the resampling of a ViT's position embedding;
        # called by the model's class or by one that it inherits from.
        super().__init__(autowrap_functions=tuple(timm.layers.get_notrace_functions()))
        self._autowrap_search += [sys.modules[c.__module__] for c in type(model).__mro__ if c.__module__ in sys.modules]
        self.opened = {name[:i] for name in modules for i, c in enumerate(name) if c == "."}

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Optional arguments of the model (a ViT's attention mask) take their defaults: images are the only input."""
        fn, given = super().create_args_for_root(*args, **kwargs)
        return fn, [a.node.args[0] if isinstance(a, fx.Proxy) and a.node.args else a for a in given]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def cut(model: nn.Module, modules: tuple[str, ...]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(trunk, head) of `model` before `modules`: the trunk returns a tuple of tensors that the head takes in that order.

    Both are graphs over the model's own modules. Raises fx.proxy.TraceError where a path to `modules` has control flow.
    """
    traced = copied(model)
    graph = TunedModulesTracer(model, modules).trace(traced)
    root = copy.copy(model)  # with what the trace has computed without the images, such as a rotary embedding's periods
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            setattr(root, str(node.target), getattr(traced, str(node.target)))
    after: set[fx.Node] = set()
    constant: set[fx.Node] = set()  # made of parameters alone: both parts compute it
    for node in graph.nodes:
        if (node.op == "call_module" and node.target in modules) or any(a in after for a in node.all_input_nodes):
            after.add(node)
        elif node.op != "placeholder" and constant.issuperset(node.all_input_nodes):
            constant.add(node)
    features = [n for n in graph.nodes if n not in after | constant and any(user in after for user in n.users)]
    trunk, head = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in after and node.op != "output":
            copies[node] = trunk.node_copy(node, copies.__getitem__)
    trunk.output(tuple(copies[node] for node in features))
    copies = {node: head.placeholder(f"feature_{i}") for i, node in enumerate(features)}
    for node in graph.nodes:
        if node in after | constant:
            copies[node] = head.node_copy(node, copies.__getitem__)
    parts = fx.GraphModule(root, trunk), fx.GraphModule(root, head)
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts


def set_modes(parts: Parts, bn_stats: str) -> None:
    """Train or eval mode of every layer, set again at each epoch and after each evaluation: a train() would move frozen statistics.

    Dropout and stochastic depth are off unless the whole network trains, as in the original code. With `kept` statistics a
    BatchNorm trains its affine alone.
    """
    parts.model.train(parts.everything)
    parts.head.train(parts.everything)
    if parts.trunk is not None and bn_stats == "ema":
        for name in parts.tuned.last_bns:
            parts.model.get_submodule(name).train()
    keep_no_biases(parts.head)
    if parts.everything and bn_stats == "kept":
        for module in parts.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def keep_no_biases(head: nn.Module) -> None:
    """Attention of LeViT's kind keeps a table of biases, with its graph, wherever its `training` is False: a second backward
    pass would run through the first one's graph. The flag alone is set, so that its BatchNorms stay as they are; timm drops
    the table whenever a mode is set."""
    for module in head.modules():
        if hasattr(module, "attention_bias_cache"):
            module.training = True


def remembers(head: nn.Module) -> bool:
    """Whether a forward pass moves the statistics of one of its BatchNorms."""
    return any(module.training and isinstance(module, _BatchNorm) for module in head.modules())


def checkpoint_activations(model: nn.Module, enable: bool) -> None:
    """Let timm keep only the blocks' inputs and compute the rest again in the backward pass; UserError where it cannot.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174).
    """
    try:
        model.set_grad_checkpointing(enable)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        if enable:
            raise UserError(
                f"run.activation_checkpointing: timm cannot do it for {type(model).__name__} ({error}). "
                "Next: run.activation_checkpointing=false"
            ) from None


def frozen_digest(parts: Parts) -> str:
    """Digest of every tensor that the policy must not change; compared at resume and at the end of a run."""
    return state_digest({k: v for k, v in parts.model.state_dict().items() if k not in parts.tuned.tensors})
