"""Do norms, gates, rotary positions and cached attention compute what they say?"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from models.layers import Attention, Cache, RMSNorm, SwiGLU, rotary, rotate


def test_rms_norm_equals_torchs_both_ways() -> None:
    norm = RMSNorm(12)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(3, 5, 12) * 4).requires_grad_()
    grad = torch.randn(3, 5, 12)
    found = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    reference = F.rms_norm(x, (12,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), reference)
    torch.testing.assert_close(found, torch.autograd.grad(reference, (x, norm.weight), grad))


def test_rms_norm_is_finite_at_zero_and_keeps_the_type() -> None:
    norm = RMSNorm(8)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert norm(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    ffn = SwiGLU(6, 10)
    x = torch.randn(4, 6)
    gate, up = x @ ffn.up.weight[:10].T, x @ ffn.up.weight[10:].T
    torch.testing.assert_close(ffn(x), (gate * torch.sigmoid(gate) * up) @ ffn.down.weight.T)


def test_rotary_products_depend_on_row_and_column_differences_only() -> None:
    rows, cols, head = 4, 5, 8
    table = rotary(rows, cols, head)
    q, k = torch.randn(head), torch.randn(head)
    turned_q, turned_k = (rotate(v.expand(rows * cols, head), table) for v in (q, k))
    products = (turned_q @ turned_k.T).view(rows, cols, rows, cols)
    torch.testing.assert_close(products[0, 0, 2, 3], products[1, 1, 3, 4])
    torch.testing.assert_close(products[3, 1, 1, 0], products[2, 4, 0, 3])
    assert (products[0, 0, 0, 1] - products[0, 0, 1, 0]).abs() > 1e-3  # a row is not a column
    torch.testing.assert_close(turned_q.norm(dim=1), q.norm().expand(rows * cols))


def test_rotary_speeds_and_halves() -> None:
    cos, sin = rotary(3, 3, 8, base=100.0)
    place = 1 * 3 + 2  # row 1, column 2; pairs are (i, i + 4)
    angle = torch.tensor([1.0, 0.1, 2.0, 0.2])
    torch.testing.assert_close(cos[place], angle.cos().repeat(2))
    torch.testing.assert_close(sin[place], torch.cat((-angle.sin(), angle.sin())))


def test_rotary_prefix_does_not_turn() -> None:
    table = rotary(2, 2, 8, prefix=1)
    assert table.shape == (2, 5, 8)
    x = torch.randn(5, 8)
    torch.testing.assert_close(rotate(x, table)[0], x[0])
    torch.testing.assert_close(table[:, 1:], rotary(2, 2, 8))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_softmax_written_out(qk_norm: bool) -> None:
    width, heads, length = 16, 2, 6
    attention = Attention(width, heads, qk_norm)
    if attention.scale is not None:
        torch.nn.init.uniform_(attention.scale, 0.5, 2.0)
    table = rotary(2, 3, width // heads)
    x = torch.randn(3, length, width)
    q, k, v = (p.view(3, length, heads, 8).transpose(1, 2) for p in (x @ attention.qkv.weight.T).chunk(3, -1))
    if attention.scale is not None:
        q, k = (
            p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s
            for p, s in ((q, attention.scale[:8]), (k, attention.scale[8:]))
        )
    q, k = rotate(q, table), rotate(k, table)
    scores = q @ k.transpose(-1, -2) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x, table), y @ attention.out.weight.T)


def test_attention_reads_no_later_position() -> None:
    attention, table = Attention(16, 2), rotary(2, 3, 8)
    x = torch.randn(1, 6, 16, requires_grad=True)
    for position in range(6):
        (grad,) = torch.autograd.grad(attention(x, table)[0, position].square().sum(), x)
        assert grad[0, position + 1 :].eq(0).all()
        assert grad[0, : position + 1].ne(0).any(-1).all()


def test_cached_attention_equals_uncached() -> None:
    attention, table = Attention(16, 2), rotary(2, 4, 8)
    x = torch.randn(3, 8, 16)
    cache = Cache(2, 3, 2, 8, 8, x)
    parts = [attention(x[:, :3], table[:, :3], cache, layer=1)]
    for t in range(3, 8):
        parts.append(attention(x[:, t : t + 1], table[:, t : t + 1], cache, layer=1, start=t))
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, table), atol=1e-5, rtol=1e-5)
    assert cache.held[0].eq(0).all()  # the other layer's slot
