"""Is the transformer causal, class-conditional, initialised as stated, and equal with and without a cache?"""

from __future__ import annotations

import math

import pytest
import torch

from models.config import Latent, Llama
from models.generators.autoregressive import Transformer

LATENT = Latent(2, 3, codebook=11)


def model(**fields: object) -> Transformer:
    torch.manual_seed(0)
    built = Transformer(Llama(**({"layers": 2, "width": 16, "heads": 2} | fields)), LATENT, 5)
    torch.nn.init.normal_(built.head.weight)  # zero at the start of training, which would hide everything
    return built


def batch(count: int = 4) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return {
        "codes": torch.randint(11, (count, 6), generator=made),
        "labels": torch.randint(5, (count,), generator=made),
        "drop": torch.rand(count, generator=made),
    }


def test_untrained_model_is_uniform() -> None:
    fresh = Transformer(Llama(layers=1, width=16, heads=2), LATENT, 5)
    assert fresh.loss(batch(), 0)["loss"].item() == pytest.approx(math.log(11), rel=1e-6)
    assert fresh.codes_in.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert fresh.blocks[0].ffn.up.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_path_from_later_codes(qk_norm: bool) -> None:
    net = model(qk_norm=qk_norm)
    data = batch(1)
    embedded: list[torch.Tensor] = []

    def keep(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    net.codes_in.register_forward_hook(keep)
    logits = net(data["codes"], data["labels"])
    for position in range(6):
        (grad,) = torch.autograd.grad(logits[0, position].logsumexp(0), embedded[-1], retain_graph=True)
        assert grad[0, position:].eq(0).all()
        assert grad[0, :position].ne(0).any(-1).all()


def test_every_position_sees_the_class() -> None:
    net, data = model(), batch(1)
    other = (data["labels"] + 1) % 5
    change = (net(data["codes"], data["labels"]) - net(data["codes"], other)).abs().amax((0, 2))
    assert (change > 1e-6).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_logits_equal_uncached(qk_norm: bool) -> None:
    net, data = model(qk_norm=qk_norm), batch()
    cache = net.cache(4)
    parts = [net.first(data["labels"], cache)]
    for position in range(1, 6):
        parts.append(net.following(data["codes"][:, position - 1], position, cache))
    uncached = net(data["codes"], data["labels"])
    torch.testing.assert_close(torch.stack(parts, 1), uncached, atol=1e-5, rtol=1e-5)


def test_nll_is_the_loss_per_code_and_normalised() -> None:
    net, data = model(class_dropout=0.0), batch()
    nll = net.nll(data["codes"], data["labels"])
    assert nll.shape == (4, 6)
    torch.testing.assert_close(nll.mean(), net.loss(data, 0)["loss"])
    small = Transformer(Llama(layers=1, width=16, heads=2), Latent(1, 2, codebook=3), 2)
    torch.nn.init.normal_(small.head.weight)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    total = (-small.nll(every, torch.ones(9, dtype=torch.int64)).sum(1)).exp().sum()
    assert total.item() == pytest.approx(1.0, rel=1e-5)


def test_class_dropout_follows_the_draws() -> None:
    net, data = model(class_dropout=0.25), batch()
    data["drop"] = torch.tensor([0.0, 0.2499, 0.25, 0.9])
    null = torch.tensor([5, 5, *data["labels"][2:].tolist()])
    expected = net.nll(data["codes"], null).mean()
    torch.testing.assert_close(net.loss(data, 0)["loss"], expected)
    assert net.draws == {"drop": ("uniform", ())}
    assert model(class_dropout=0.0).draws == {}


def test_without_classes_the_null_class_is_the_only_one() -> None:
    net = Transformer(Llama(layers=1, width=16, heads=2), LATENT, 0)
    data = batch()
    data["labels"] = torch.zeros(4, dtype=torch.int64)
    assert net.draws == {}
    assert net.loss(data, 0)["loss"].isfinite()


def test_learns_a_rule_that_needs_class_and_neighbour() -> None:
    torch.manual_seed(0)
    net = Transformer(Llama(layers=2, width=32, heads=2), LATENT, 5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(150):
        made = torch.Generator().manual_seed(step)
        labels = torch.randint(5, (32,), generator=made)
        start = torch.randint(11, (32, 1), generator=made)
        codes = (start + (labels[:, None] + 1) * torch.arange(6)) % 11  # an arithmetic series; the class is its step
        loss = net.loss({"codes": codes, "labels": labels, "drop": torch.ones(32)}, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.3 * math.log(11) / 6  # only the first code is unpredictable


def test_dropout_acts_in_training_only() -> None:
    net, data = model(dropout=0.5, class_dropout=0.0), batch()
    assert net.loss(data, 0)["loss"] != net.loss(data, 0)["loss"]
    net.eval()
    assert net.loss(data, 0)["loss"] == net.loss(data, 0)["loss"]
