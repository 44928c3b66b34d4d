"""Which codes is an image made of, and what image do codes make? A convolutional VQ tokenizer.

Structure of VQGAN as LlamaGen uses it (arXiv 2406.06525, sec. 3.1 and its public code): residual blocks of group
norm, swish and convolution, attention at the lowest resolution and in the middle. ``models.config.VQ`` counts the
same layers. Shapes: B images, C channels, L tokens in raster order, K codes of D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import VQ, DataFields

DISTANCES = 2**26  # latent x code distances in memory at a time


class Norm(nn.GroupNorm):
    """Group norm over groups of 4 channels and more, 32 groups at most."""

    def __init__(self, channels: int) -> None:
        groups = next(n for n in range(min(32, channels // 4), 0, -1) if channels % n == 0)
        super().__init__(groups, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = Norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class SelfAttention(nn.Module):
    """One head over all places of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(places)[:, None].chunk(3, dim=-1)
        y = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).view_as(x)


class Down(nn.Conv2d):
    """Half the resolution; padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Conv2d):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, attention: bool) -> Iterator[nn.Module]:
    yield Residual(channels, channels)
    if attention:
        yield SelfAttention(channels)
    yield Residual(channels, channels)


def encoder(fields: VQ, data: DataFields) -> nn.Sequential:
    """[B, C, S, S] -> [B, D, rows, cols]."""
    widths = fields.channels(data)
    cin, between = widths[0], 2 * fields.width
    layers: list[nn.Module] = [nn.Conv2d(data.channels, cin, 3, padding=1)]
    for level, cout in enumerate(widths):
        last = level == len(widths) - 1
        for _ in range(fields.res_blocks):
            layers.append(Residual(cin, cout))
            cin = cout
            if last and fields.attention:
                layers.append(SelfAttention(cout))
        if not last:
            layers.append(Down(cout))
    layers += [*_middle(cin, fields.attention), Norm(cin), nn.SiLU(), nn.Conv2d(cin, between, 3, padding=1)]
    return nn.Sequential(*layers, nn.Conv2d(between, fields.code_dim, 1))


def decoder(fields: VQ, data: DataFields) -> nn.Sequential:
    """[B, D, rows, cols] -> [B, C, S, S]."""
    widths = fields.channels(data)
    cin, between = widths[-1], 2 * fields.width
    layers: list[nn.Module] = [nn.Conv2d(fields.code_dim, between, 1), nn.Conv2d(between, cin, 3, padding=1)]
    layers += _middle(cin, fields.attention)
    for level, cout in reversed(list(enumerate(widths))):
        for _ in range(fields.res_blocks + 1):
            layers.append(Residual(cin, cout))
            cin = cout
            if level == len(widths) - 1 and fields.attention:
                layers.append(SelfAttention(cout))
        if level:
            layers.append(Up(cout))
    return nn.Sequential(*layers, Norm(cin), nn.SiLU(), nn.Conv2d(cin, data.channels, 3, padding=1))


def nearest(latents: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest code by Euclidean distance, int64 [N]; latents [N, D], book [K, D]; no gradient."""
    with torch.no_grad():
        half = book.square().sum(1) / 2
        parts = latents.split(max(1, DISTANCES // len(book)))
        return torch.cat([torch.addmm(half, part, book.T, beta=-1).argmax(1) for part in parts])


def usage(counts: Tensor, tokens: int) -> dict[str, float]:
    """How a set of images uses a codebook, from how often each code occurs in it, int64 [K].

    ``usage``: share of codes that occur; ``perplexity``: exp of the entropy; ``bits_used``: tokens x log2 of it.
    """
    share = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(share, share).sum().item()
    used = (counts > 0).double().mean().item()
    return {"usage": used, "perplexity": math.exp(entropy), "bits_used": tokens * entropy / math.log(2)}


class Seen(NamedTuple):
    """What a forward pass leaves for the reset of dead codes."""

    codes: Tensor  # int64 [B x L]
    latents: Tensor  # [B x L, D]
    order: Tensor  # [B x L] random


class VQTokenizer(nn.Module):
    """Images in [-1, 1] to code ids and back.

    A code that was chosen less than ``reset_below`` times its even share since the last reset is dead; every
    ``reset_every`` steps, but not in the decay before a point (``models.training.decays``), dead codes move to
    latents of the current batch, drawn without replacement with the help of ``draws`` (so that ranks and
    micro-batches do not matter).
    """

    window: Tensor

    def __init__(self, fields: VQ, data: DataFields) -> None:
        super().__init__()
        self.fields, self.latent, self.resolution = fields, fields.latent(data), data.resolution
        self.side = fields.side(data)
        self.encoder, self.decoder = encoder(fields, data), decoder(fields, data)
        book = torch.empty(fields.codebook, fields.code_dim).uniform_(-1 / fields.codebook, 1 / fields.codebook)
        self.codebook = nn.Parameter(F.normalize(book) if fields.normalize else book)
        self.draws = {"reset": ("uniform", (fields.tokens,))} if fields.reset_every else {}
        if fields.reset_every:
            self.register_buffer("window", torch.zeros(fields.codebook, dtype=torch.int64))
        self._seen: list[Seen] = []  # of the step in progress

    def book(self) -> Tensor:
        """The codes, float32 [K, D], of unit length if the fields say so."""
        book = self.codebook.float()
        return F.normalize(book) if self.fields.normalize else book

    def latents(self, images: Tensor) -> Tensor:
        """Continuous latents before quantisation, float32 [B, L, D], of unit length if the fields say so."""
        if self.side != self.resolution:
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        z = self.encoder(images).float().flatten(2).transpose(1, 2)
        return F.normalize(z, dim=-1) if self.fields.normalize else z

    def paint(self, vectors: Tensor) -> Tensor:
        """Images [B, C, S, S], not clamped, of code vectors [B, L, D]."""
        images = self.decoder(vectors.transpose(1, 2).unflatten(2, (self.latent.rows, self.latent.cols)))
        if self.side != self.resolution:
            images = F.interpolate(images.float(), (self.resolution, self.resolution), mode="bicubic", antialias=True)
        return images

    def codes(self, latents: Tensor, book: Tensor) -> Tensor:
        """Nearest codes, int64 [B, L]."""
        return nearest(latents.detach().flatten(0, 1), book.detach()).view(latents.shape[:2])

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """mse + codebook + commitment x weight; means over all numbers. Codes and gradients through them float32."""
        images = batch["images"]
        z = self.latents(images)
        with torch.autocast(images.device.type, enabled=False):
            book = self.book()
            codes = self.codes(z, book)
            quantised = F.embedding(codes, book)
            codebook = F.mse_loss(quantised, z.detach())
            commitment = F.mse_loss(z, quantised.detach())
            through = z + (quantised - z).detach()  # straight-through: the gradient passes as if unquantised
            counts = torch.zeros(len(book), dtype=torch.int64, device=codes.device)
            counts.scatter_add_(0, codes.flatten(), torch.ones_like(codes).flatten())
            share = counts / codes.numel()
            perplexity = torch.exp(-torch.special.xlogy(share, share).sum())
        mse = F.mse_loss(self.paint(through).float(), images)
        if self.training and self.fields.reset_every:
            self._seen.append(Seen(codes.flatten(), z.detach().flatten(0, 1), batch["reset"].flatten()))
        return {
            "loss": mse + codebook + self.fields.commitment * commitment,
            "mse": mse,
            "codebook": codebook,
            "commitment": commitment,
            "perplexity": perplexity,
        }

    @torch.no_grad()
    def after_step(self, step: int, decaying: bool) -> None:
        """Count codes; move dead ones at every ``reset_every``-th step. While decaying they would not settle in."""
        seen = [torch.cat(parts) for parts in zip(*self._seen, strict=True)]
        self._seen.clear()
        if not seen or decaying:
            return
        codes, latents, order = seen
        counts = torch.zeros_like(self.window).scatter_add_(0, codes, torch.ones_like(codes))
        together = dist.is_available() and dist.is_initialized()
        if together:
            dist.all_reduce(counts)
        self.window += counts
        if (step + 1) % self.fields.reset_every:
            return
        if together:
            latents, order = _gathered(latents), _gathered(order)
        dead = self.window < self.fields.reset_below * self.window.sum() / len(self.window)
        rank = dead.cumsum(0) - 1
        dead &= rank < len(latents)  # a batch smaller than the need serves the first
        chosen = latents[order.argsort(stable=True)[rank.clamp(0, len(latents) - 1)]]
        self.codebook.copy_(torch.where(dead[:, None], chosen, self.codebook))
        self.window.zero_()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes int64 [B, L]."""
        return self.codes(self.latents(images), self.book())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images [B, C, S, S] in [-1, 1] of codes int64 [B, L]."""
        return self.paint(F.embedding(codes, self.book())).float().clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images as training sees them: encoded, quantised, decoded, clamped to [-1, 1]."""
        z, book = self.latents(images), self.book()
        return self.paint(book[self.codes(z, book)]).float().clamp(-1, 1)


def _gathered(values: Tensor) -> Tensor:
    """The values of all ranks, one after the other."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
