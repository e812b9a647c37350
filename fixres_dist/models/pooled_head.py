"""An EfficientNet's head in training behind a frozen trunk: norm, activation and pooling in one pass over the feature map.

With fixed statistics (bn_stats=exact) the backward pass needs only the gradient of the BN's affine, and that takes two
numbers per image and channel. The forward pass computes them, on pieces that fit into a CPU's cache: the map is read
once, and nothing of its size is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from torch import fx, nn

from fixres_dist.models.parts import Parts, cut

PIECE_BYTES = 1 << 20  # of fp32 values that are taken at once


class PooledSilu(torch.autograd.Function):
    """[n, C] of x [n, C, h, w], scale [C] and shift [C]: the map's mean of silu(scale * x + shift).

    x must not require grad: none is computed for it.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        scale, shift = scale.detach(), shift.detach()
        points = x.permute(0, 2, 3, 1).flatten(1, 2)  # [n, h w, C], a view of a channels-last map
        n, area, channels = points.shape
        training = any(ctx.needs_input_grad[1:])
        sums = x.new_empty(3 if training else 1, n, channels)
        size = max(1, PIECE_BYTES // (4 * max(1, area * channels)))
        one = scale.new_ones(())
        for first in range(0, n, size):
            piece = points[first : first + size]
            values = piece.new_empty(len(sums), *piece.shape)
            y = torch.addcmul(shift, piece, scale, out=values[0])
            gate = y.sigmoid()
            y.mul_(gate)
            if training:  # the slope of SiLU is gate + y (1 - gate)
                torch.mul(torch.lerp(y, one, gate, out=values[1]), piece, out=values[2])
            torch.sum(values, 2, out=sums[:, first : first + size])
        means = sums.div_(area)
        ctx.save_for_backward(*means[1:])
        return means[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slope, slope_x = ctx.saved_tensors
        return None, (grad * slope_x).sum(0), (grad * slope).sum(0)


class PooledHead(nn.Module):
    """`rest(pool(norm(x)))`, in one pass where `norm` has fixed statistics. The layers are the model's own."""

    def __init__(self, norm: BatchNormAct2d, pool: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.norm, self.pool, self.rest = norm, pool, rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [n, C, h, w] to logits [n, classes]."""
        norm = self.norm
        if norm.training:
            return cast(torch.Tensor, self.rest(self.pool(norm(x))))
        mean, variance = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
        scale = norm.weight * torch.rsqrt(variance + norm.eps)
        return cast(torch.Tensor, self.rest(PooledSilu.apply(x, scale, norm.bias - mean * scale)))


def pooled_head(parts: Parts) -> nn.Module:
    """The same function as `parts.head`; that head itself where it is not BN, SiLU, mean and the rest."""
    if not isinstance(parts.head, fx.GraphModule):
        return parts.head
    before, rest = cut(parts.head, (parts.tuned.modules[-1],))
    called = [before.get_submodule(str(n.target)) for n in before.graph.nodes if n.op == "call_module"]
    others = [n for n in before.graph.nodes if n.op not in ("placeholder", "call_module", "output")]
    if len(called) != 2 or others or not isinstance(called[0], BatchNormAct2d):
        return parts.head
    norm, pool = called
    silu = isinstance(norm.act, nn.SiLU) and isinstance(norm.drop, nn.Identity) and norm.affine
    mean = isinstance(pool, SelectAdaptivePool2d) and pool.pool_type == "avg" and isinstance(pool.flatten, nn.Flatten)
    return PooledHead(norm, pool, rest) if silu and mean else parts.head
