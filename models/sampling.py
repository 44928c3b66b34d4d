"""How are codes drawn from an autoregressive model? Cached steps, temperature, top-k, top-p, guidance.

Sample i of a request is a function of (model, label i, seed, i): its random numbers are counted off, not drawn in
turn, so that results depend neither on the batch size nor on how many samples are asked for.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from models.config import Latent
from models.data import key, uniforms
from models.layers import Cache


class Causal(Protocol):
    """What sampling needs of a model (an ``nn.Module``); ``classes`` is also the index of the null class."""

    classes: int
    latent: Latent
    training: bool

    def train(self, mode: bool = True) -> object: ...
    def cache(self, batch: int) -> Cache: ...
    def first(self, labels: Tensor, cache: Cache) -> Tensor: ...
    def following(self, codes: Tensor, position: int, cache: Cache) -> Tensor: ...


def choose(logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One code per row of logits [B, K] by inverse CDF at u [B] in [0, 1); int64 [B].

    ``top_k`` keeps the k most likely (0: all; ties by index), then ``top_p`` the shortest head of the sorted rest
    whose probability reaches p.
    """
    p = (logits.double() / temperature).softmax(-1)  # float64: a sum over 131,072 codes has to stay exact
    ordered = None
    if 0 < top_k < p.shape[-1] or top_p < 1:
        p, ordered = p.sort(dim=-1, descending=True, stable=True)
        if 0 < top_k < p.shape[-1]:
            p, ordered = p[:, :top_k], ordered[:, :top_k]
        if top_p < 1:
            before = p.cumsum(-1) - p
            p = torch.where(before < top_p * p.sum(-1, keepdim=True), p, 0.0)
    cdf = p.cumsum(-1)
    chosen = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)
    return (chosen if ordered is None else ordered.gather(1, chosen))[:, 0]


@torch.no_grad()
def sample(
    model: Causal,
    labels: Tensor,
    *,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = 256,
) -> Tensor:
    """Codes int64 [N, L] for labels int64 [N], on the labels' device, without dropout.

    ``guidance`` s mixes logits as l_null + s (l_label - l_null), both branches in one forward pass; at 1 only the
    labelled branch is run. ValueError when a model without classes is to be guided.
    """
    if guidance != 1 and not model.classes:
        raise ValueError(f"guidance: {guidance} asked of a model without classes; allowed: 1")
    training = model.training
    model.train(False)
    try:
        return torch.cat(
            [
                _batch(model, part, number, guidance, temperature, top_k, top_p, seed)
                for part, number in zip(
                    labels.split(batch), torch.arange(len(labels), device=labels.device).split(batch), strict=True
                )
            ]
        )
    finally:
        model.train(training)


def _batch(
    model: Causal,
    labels: Tensor,
    number: Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Tensor:
    count, tokens = len(labels), model.latent.tokens
    u = uniforms(key("sample", seed), number, tokens)
    guided = guidance != 1
    cache = model.cache(2 * count if guided else count)
    codes = torch.empty(count, tokens, dtype=torch.int64, device=labels.device)
    read = torch.cat((labels, torch.full_like(labels, model.classes))) if guided else labels
    logits = model.first(read, cache)
    for position in range(tokens):
        if position:
            read = codes[:, position - 1]
            logits = model.following(torch.cat((read, read)) if guided else read, position, cache)
        if guided:
            labelled, null = logits.float().chunk(2)
            logits = null + guidance * (labelled - null)
        codes[:, position] = choose(logits, u[:, position], temperature, top_k, top_p)
    return codes
