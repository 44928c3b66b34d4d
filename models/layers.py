"""Which blocks do transformer generators share? RMSNorm, SwiGLU, 2-D rotary positions, attention with a cache.

Shapes: B sequences, L positions, D channels, H heads of E = D / H channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Normed(torch.autograd.Function):
    """F.rms_norm in float32 on a CPU, where torch has no fused kernel: a third of its time, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, inverse, weight = ctx.saved_tensors
        product = grads[0] * unit
        along = (product @ weight).unsqueeze(-1).div_(unit.shape[-1])
        x = torch.addcmul(grads[0] * weight, unit, along, value=-1).mul_(inverse)
        return x, product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) x weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            return _Normed.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer 2020); ``gate`` and ``up`` are one product."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)  # rows: gate, then up
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def rotary(rows: int, cols: int, head: int, base: float = 10_000.0, prefix: int = 0) -> Tensor:
    """Table of 2-D rotary positions [2, prefix + rows x cols, head]: cosines, then signed sines.

    Channel pairs (i, i + head / 2) turn by position x base^(-2k / (head / 2)): the first half of the pairs with
    the row, the second half with the column, in raster order. ``prefix`` slots in front (class tokens) do not turn.
    """
    assert head % 4 == 0
    speed = base ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))  # [head / 4]
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(cols)
    col = torch.arange(cols, dtype=torch.float64).repeat(rows)
    angle = torch.cat((row[:, None] * speed, col[:, None] * speed), dim=1)  # [rows x cols, head / 2]
    angle = F.pad(angle, (0, 0, prefix, 0))
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1))).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the last axis of x [..., L, E] by ``table`` [2, L, E] (``rotary``)."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Cache:
    """Keys and values of earlier positions, at a static shape: [layers, 2, B, H, L, E]."""

    def __init__(self, layers: int, batch: int, heads: int, length: int, head: int, like: Tensor) -> None:
        self.held = torch.zeros(layers, 2, batch, heads, length, head, dtype=like.dtype, device=like.device)

    def extend(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, n, E] from position ``start`` on; return everything up to there."""
        stop = start + keys.shape[2]
        held = self.held[layer]
        held[0, :, :, start:stop] = keys
        held[1, :, :, start:stop] = values
        return held[0, :, :, :stop], held[1, :, :, :stop]


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions, without biases; queries, keys, values in one product.

    ``qk_norm`` RMS-normalises the queries and keys of each head before they are turned.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.ones(2 * self.head)) if qk_norm else None  # of queries, then of keys

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None = None, layer: int = 0, start: int = 0) -> Tensor:
        """x [B, n, D] -> [B, n, D]; with a cache, x holds positions ``start`` to ``start`` + n.

        ``table`` holds the rotary positions of x. With a cache either ``start`` is 0 or n is 1, so that no mask
        but the causal one is ever needed.
        """
        assert start == 0 or x.shape[1] == 1
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head)).permute(2, 0, 3, 1, 4)
        qk, v = qkv[:2], qkv[2]
        if self.scale is not None:
            scale = self.scale.to(qk.dtype).view(2, 1, 1, 1, self.head)
            qk = F.rms_norm(qk, (self.head,), eps=1e-5) * scale
        q, k = rotate(qk, table)
        if cache is not None:
            k, v = cache.extend(layer, start, k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return self.out(y.transpose(1, 2).flatten(2))
