"""What trains under each policy, found by structure, and the model split there into a frozen trunk and a head.

The trunk is everything that no tuned module precedes: it runs without autograd, in low precision if asked. The head is
the rest, in fp32, and the only part that is wrapped in DDP. The split is a graph cut (torch.fx), so a last BN inside a
residual branch works as one before the pooling does.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fixres_dist.errors import UserError
from fixres_dist.models import classifier_name


@dataclass(frozen=True)
class Tuned:
    """The exact tensors a policy may change, by name in the model's state dict."""

    modules: tuple[str, ...]  # the tuned modules, in forward order
    last_bn: str  # empty when the policy leaves the last BN alone
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


def forward_order(model: nn.Module) -> list[str]:
    """Names of the layers (modules without children, and BatchNorms) in the order a forward pass calls them."""
    probe = copy.deepcopy(model).to("meta").eval()
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    for name, module in probe.named_modules():
        if isinstance(module, _BatchNorm) or not list(module.children()):
            module.register_forward_hook(note(name))
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    with torch.no_grad():
        probe(torch.zeros(1, 3, max(size, 64), max(size, 64), device="meta"))
    return called


def select(model: nn.Module, policy: str) -> Tuned:
    """The tuned tensors of `policy`; raises UserError where the model has no layer the policy needs.

    `classifier+bn_stats` is what the original code trains, `classifier+bn` what the paper says (docs/method.md).
    """
    classifier = classifier_name(model)
    if policy == "all":
        buffers = tuple(
            n for n, _ in model.named_buffers() if n.rpartition(".")[2].startswith(("running_", "num_batches"))
        )
        return Tuned(("",), "", tuple(n for n, _ in model.named_parameters()), buffers)
    modules = [classifier]
    last_bn = ""
    if policy != "classifier":
        order = forward_order(model)
        norms = [name for name in order if isinstance(model.get_submodule(name), _BatchNorm)]
        if not norms:
            raise UserError(
                f"policy {policy!r} tunes the last BatchNorm, and {type(model).__name__} has none. Next: tune.policy=classifier"
            )
        last_bn = norms[-1]
        modules.insert(0, last_bn)
    if policy in ("classifier+bn+conv_head", "last_block"):
        convs = [n for n in order[: order.index(last_bn)] if isinstance(model.get_submodule(n), nn.Conv2d)]
        modules.insert(0, convs[-1])
    if policy == "last_block":
        block = last_block(model)
        modules = [block, *(name for name in modules if not name.startswith(f"{block}."))]
    trained = [
        f"{module}.{name}"
        for module in modules
        if not (module == last_bn and policy == "classifier+bn_stats")
        for name, _ in model.get_submodule(module).named_parameters()
    ]
    statistics = [f"{last_bn}.{name}" for name, _ in model.get_submodule(last_bn).named_buffers()] if last_bn else []
    return Tuned(tuple(modules), last_bn, tuple(dict.fromkeys(trained)), tuple(statistics))


def last_block(model: nn.Module) -> str:
    for stages in ("blocks", "layer4"):
        children = getattr(model, stages, None)
        while isinstance(children, nn.Sequential) and len(children) and isinstance(children[-1], nn.Sequential):
            stages, children = f"{stages}.{len(children) - 1}", children[-1]
        if isinstance(children, nn.Sequential) and len(children):
            return f"{stages}.{len(children) - 1}"
    raise UserError(f"policy 'last_block' finds no stages in {type(model).__name__}. Next: tune.policy=classifier+bn")


def split(model: nn.Module, policy: str) -> Split:
    """Set what trains and cut the model there. Parameters and buffers stay shared with `model`."""
    tuned = select(model, policy)
    chosen = set(tuned.parameters)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)  # on the parameter: on a module it is a silent no-op
    if policy == "all":
        return Split(model, tuned, None, model)
    model.eval()
    trunk, head = cut(model, tuned.modules)
    return Split(model, tuned, trunk, head)


class OutlineTracer(fx.Tracer):
    """Traces only into modules that contain a tuned one: everything else is a leaf, whatever its control flow."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        super().__init__()
        self.opened = {name[:i] for name in modules for i, c in enumerate(name) if c == "."}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def cut(model: nn.Module, modules: tuple[str, ...]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(trunk, head): the trunk returns a tuple of the tensors that cross the cut, the head takes them in that order."""
    graph = OutlineTracer(modules).trace(model)
    after: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "call_module" and node.target in modules) or any(a in after for a in node.all_input_nodes):
            after.add(node)
    crossing = [n for n in graph.nodes if n not in after and any(user in after for user in n.users)]
    trunk, head = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in after and node.op != "output":
            copies[node] = trunk.node_copy(node, copies.__getitem__)
    trunk.output(tuple(copies[node] for node in crossing))
    inner = {node: head.placeholder(f"feature_{i}") for i, node in enumerate(crossing)}
    for node in graph.nodes:
        if node in after:
            inner[node] = head.node_copy(node, inner.__getitem__)
    module = fx.GraphModule(model, trunk)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, fx.GraphModule(model, head)


def set_modes(parts: Split, bn_stats: str) -> None:
    """Re-applied at every epoch and after every evaluation: one stray train() would move frozen BN statistics.

    Dropout and stochastic depth stay off unless the whole network trains, as in the original.
    """
    parts.model.train(parts.trunk is None)
    parts.head.train(parts.trunk is None)
    if parts.trunk is not None and bn_stats == "ema" and parts.tuned.last_bn:
        parts.model.get_submodule(parts.tuned.last_bn).train()


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


class Moments:
    """Sums of a BN's input per channel, in fp64: count, sum, sum of squares. One all-reduce makes them global."""

    def __init__(self, channels: int) -> None:
        self.sums = torch.zeros(2 * channels + 1, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        flat = x.detach().double().transpose(0, 1).flatten(1)
        self.sums += torch.cat([flat.sum(1), flat.square().sum(1), flat.new_tensor([flat.shape[1]])]).cpu()

    def set(self, bn: nn.Module) -> None:
        """Mean and unbiased variance, as PyTorch keeps them."""
        count = self.sums[-1]
        mean, square = self.sums[:-1].chunk(2)
        mean = mean / count
        variance = (square / count - mean.square()).clamp(min=0) * count / (count - 1)
        bn.running_mean.copy_(mean)  # type: ignore[operator]
        bn.running_var.copy_(variance)  # type: ignore[operator]


class AllReduceSum(torch.autograd.Function):
    """Sum over ranks, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def normalise_over_ranks(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A BatchNorm's forward whose batch is every rank's (torch's SyncBatchNorm refuses CPUs and drops timm's activation)."""
    if not self.training:
        return type(self).forward(self, x)
    x = x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    shift = self.running_mean.clone().view(shape)  # the same on every rank; keeps the sum of squares from cancelling
    centred = x - shift
    count = x.new_tensor([x.numel() / x.shape[1]])
    sums = AllReduceSum.apply(torch.cat([centred.sum(dims), centred.square().sum(dims), count]))
    count = sums[-1].detach()
    mean, square = (sums[:-1] / count).chunk(2)
    variance = square - mean.square()
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean + shift.flatten(), self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
    x = (centred - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
    x = x * self.weight.view(shape) + self.bias.view(shape) if self.affine else x
    return self.act(self.drop(x)) if hasattr(self, "act") else x


def share_batch_statistics(parts: Split) -> None:
    """Let every BN that runs in train mode see the batch of all ranks: the same result at any world size."""
    names = [parts.tuned.last_bn] if parts.trunk is not None else [n for n, _ in parts.model.named_modules()]
    for name in filter(None, names):
        module = parts.model.get_submodule(name)
        if isinstance(module, _BatchNorm):
            module.forward = MethodType(normalise_over_ranks, module)  # type: ignore[method-assign]
