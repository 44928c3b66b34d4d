"""Are the counted parameters and FLOPs those of the modules?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import SIZES, VQ, DataFields, DeadLeaves, Digits, ImageFolder, Latent, Llama

IMAGENET = ImageFolder(name="imagenet", root="", size=256, classes=1000, count=1281167, count_heldout=50000)


def total(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        return build()


def counted(loss: Any) -> tuple[float, float]:
    """Forward and backward FLOPs of ``loss()`` as torch's dispatcher sees them."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            value = loss()
        with FlopCounterMode(display=False) as backward:
            value.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("name", "million"), [("B", 110.9), ("L", 342.9), ("XL", 774.7), ("XXL", 1411), ("3B", 3097)])
def test_published_totals_of_llamagen(name: str, million: float) -> None:
    size = SIZES[name]
    fields = Llama(layers=size.layers, width=size.width, heads=size.heads)
    latent = Latent(16, 16, 16384)
    params = fields.params(latent, 1000)
    assert total(meta(lambda: fields.build(latent, 1000))) == params.total
    assert params.total / 1e6 == pytest.approx(million, rel=5e-4)


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("qk_norm", [False, True])
def test_llama_parameters_of_the_ladder(name: str, qk_norm: bool) -> None:
    size, latent = SIZES[name], Latent(4, 8, 100)
    fields = Llama(layers=size.layers, width=size.width, heads=size.heads, qk_norm=qk_norm)
    net = meta(lambda: fields.build(latent, 7))
    assert total(net) == fields.params(latent, 7).total
    outside = sum(total(getattr(net, part)) for part in ("classes_in", "codes_in", "head"))
    assert total(net) - outside == fields.params(latent, 7).core


def test_vqgan_f16_has_72_million() -> None:
    fields = VQ(tokens=256, codebook=16384, width=128, res_blocks=2)
    params = fields.params(IMAGENET)
    assert total(meta(lambda: fields.build(IMAGENET))) == params.total
    assert params.total / 1e6 == pytest.approx(71.88, abs=0.01)


TOKENIZERS: list[tuple[DataFields, dict[str, Any]]] = [
    (Digits(), {"tokens": 4, "codebook": 256, "width": 16}),
    (Digits(), {"tokens": 16, "codebook": 64, "width": 12, "attention": False}),
    (Digits(), {"tokens": 64, "codebook": 16, "width": 8, "res_blocks": 2, "normalize": False}),
    (DeadLeaves(size=32), {"tokens": 64, "codebook": 512, "width": 16, "code_dim": 4}),
    (DeadLeaves(size=32), {"tokens": 4, "codebook": 64, "width": 8, "multipliers": (1, 2, 3, 3, 5)}),
    (DeadLeaves(size=32), {"tokens": 36, "codebook": 64, "width": 8, "input_size": 48}),
]


@pytest.mark.parametrize(("data", "options"), TOKENIZERS)
def test_vq_counts(data: DataFields, options: dict[str, Any]) -> None:
    fields = VQ(**options)
    net = fields.build(data)
    params = fields.params(data)
    assert total(net) == params.total
    assert total(net) - net.codebook.numel() == params.core
    images = torch.rand(3, data.channels, data.resolution, data.resolution)
    forward, backward = counted(lambda: net.loss({"images": images, "reset": torch.rand(3, fields.tokens)}, 0)["loss"])
    flops = fields.flops(data)
    assert forward / 3 == pytest.approx(flops.forward, rel=0.02)
    assert backward / 3 == pytest.approx(flops.backward, rel=0.02)
    for run, expected in (
        (lambda: net.encode(images), fields.flops_encode(data)),
        (lambda: net.decode(torch.zeros(3, fields.tokens, dtype=torch.int64)), fields.flops_decode(data)),
    ):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() / 3 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["5k", "25k", "120k", "600k"])
@pytest.mark.parametrize(("tokens", "codebook"), [(4, 256), (16, 32)])
def test_llama_flops(name: str, tokens: int, codebook: int) -> None:
    size, side = SIZES[name], round(tokens**0.5)
    fields = Llama(layers=size.layers, width=size.width, heads=size.heads, qk_norm=True)
    latent = Latent(side, side, codebook)
    net = fields.build(latent, 10)
    data = {"codes": torch.randint(codebook, (3, tokens)), "labels": torch.arange(3), "drop": torch.rand(3)}
    forward, backward = counted(lambda: net.loss(data, 0)["loss"])
    flops = fields.flops(latent, 10)
    assert forward / 3 == pytest.approx(flops.forward, rel=0.02)
    assert backward / 3 == pytest.approx(flops.backward, rel=0.02)
    for guided in (False, True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net.sample(torch.arange(3), guidance=1.5 if guided else 1.0)
        expected = fields.flops_sample(latent, 10, guided)
        assert counter.get_total_flops() / 3 == pytest.approx(expected, rel=0.02)
