"""How likely is a sequence of codes given a class, and how is one drawn? A Llama-style causal transformer.

Structure of LlamaGen (arXiv 2406.06525, sec. 3.2 and its public code): the class is one token in front, codes
follow in raster order, position t predicts code t. Shapes: B images, L tokens, K codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import Latent, Llama
from models.layers import Attention, Cache, RMSNorm, SwiGLU, rotary


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, fields: Llama) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(fields.width)
        self.attention = Attention(fields.width, fields.heads, fields.qk_norm)
        self.ffn_norm = RMSNorm(fields.width)
        self.ffn = SwiGLU(fields.width, fields.hidden)
        self.dropout = nn.Dropout(fields.dropout) if fields.dropout else nn.Identity()

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None, layer: int, start: int) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), table, cache, layer, start))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """p(codes | class), factorised in raster order.

    ``draws`` names the random number per image that class dropout takes from the batch. The null class, which
    stands for "no label", has the index ``classes``.
    """

    table: Tensor

    def __init__(self, fields: Llama, latent: Latent, classes: int) -> None:
        super().__init__()
        assert latent.codebook is not None
        self.fields, self.latent, self.classes = fields, latent, classes
        self.draws = {"drop": ("uniform", ())} if fields.class_dropout and classes else {}
        self.classes_in = nn.Embedding(classes + 1, fields.width)
        self.codes_in = nn.Embedding(latent.codebook, fields.width)
        self.dropout = nn.Dropout(fields.dropout) if fields.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(fields) for _ in range(fields.layers))
        self.norm = RMSNorm(fields.width)
        self.head = nn.Linear(fields.width, latent.codebook, bias=False)
        head = fields.width // fields.heads
        table = rotary(latent.rows, latent.cols, head, fields.rope_base, prefix=1)
        # the last code is predicted, never read
        self.register_buffer("table", table[:, : latent.tokens].contiguous(), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def _run(self, x: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        x = self.dropout(x)
        table = self.table[:, start : start + x.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, table, cache, layer, start)
        return self.head(self.norm(x))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, L, K] of every position given those before it; codes int64 [B, L], labels int64 [B]."""
        return self._run(torch.cat((self.classes_in(labels)[:, None], self.codes_in(codes[:, :-1])), dim=1))

    def cache(self, batch: int) -> Cache:
        """An empty cache for ``batch`` sequences."""
        fields = self.fields
        return Cache(
            fields.layers,
            batch,
            fields.heads,
            self.latent.tokens,
            fields.width // fields.heads,
            self.head.weight,
        )

    def first(self, labels: Tensor, cache: Cache) -> Tensor:
        """Logits [B, K] of the first code; starts the cache."""
        return self._run(self.classes_in(labels)[:, None], cache)[:, 0]

    def following(self, codes: Tensor, position: int, cache: Cache) -> Tensor:
        """Logits [B, K] of the code at ``position`` (1 or later) given the one before it, int64 [B]."""
        return self._run(self.codes_in(codes)[:, None], cache, position)[:, 0]

    def nll(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of every code, nats [B, L]."""
        logits = self(codes, labels).float()
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Mean nats per code; a share ``class_dropout`` of the labels is replaced by the null class."""
        codes, labels = batch["codes"], batch["labels"]
        if self.draws:
            labels = torch.where(batch["drop"] < self.fields.class_dropout, self.classes, labels)
        logits = self(codes, labels).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), codes.flatten())}

    def sample(self, labels: Tensor, **options: Any) -> Tensor:
        """Codes int64 [B, L] of the given classes; options are those of ``models.sampling.sample``."""
        from models.sampling import sample

        return sample(self, labels, **options)
