"""Does cached, batched, guided sampling draw from exactly the stated distribution?"""

from __future__ import annotations

import pytest
import torch

from models.config import Latent, Llama
from models.data import key, uniforms
from models.generators.autoregressive import Transformer
from models.sampling import choose, sample

LATENT = Latent(2, 3, codebook=11)


@pytest.fixture(scope="module")
def net() -> Transformer:
    torch.manual_seed(0)
    built = Transformer(Llama(layers=2, width=16, heads=2), LATENT, 5)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built.double().eval()


LABELS = torch.arange(23) % 5


def naive(net: Transformer, guidance: float, temperature: float, top_k: int, top_p: float, seed: int) -> torch.Tensor:
    """One image, one position, one code at a time, no cache, plain Python."""
    rows = []
    for i, label in enumerate(LABELS.tolist()):
        u = uniforms(key("sample", seed), torch.tensor([i]), 6)[0].double()
        codes: list[int] = []
        for t in range(6):
            padded = torch.tensor([codes + [0] * (6 - t)])
            logits = net(padded, torch.tensor([label]))[0, t]
            null = net(padded, torch.tensor([5]))[0, t]
            logits = (null + guidance * (logits - null)) if guidance != 1 else logits
            p = torch.softmax(logits / temperature, 0).tolist()
            order = sorted(range(11), key=lambda c: (-p[c], c)) if top_k or top_p < 1 else list(range(11))
            order = order[:top_k] if top_k else order
            total, kept, mass = sum(p[c] for c in order), [], 0.0
            for c in order:
                if mass >= top_p * total and top_p < 1:
                    break
                kept.append(c)
                mass += p[c]
            target, chosen, mass = u[t].item() * mass, kept[-1], 0.0
            for c in kept:
                mass += p[c]
                if mass > target:
                    chosen = c
                    break
            codes.append(chosen)
        rows.append(codes)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("guidance", "temperature", "top_k", "top_p"),
    [(1.0, 1.0, 0, 1.0), (1.0, 0.7, 3, 1.0), (1.0, 1.3, 0, 0.6), (2.5, 1.0, 4, 0.8), (0.0, 1.0, 0, 1.0)],
)
def test_equals_a_naive_loop(net: Transformer, guidance: float, temperature: float, top_k: int, top_p: float) -> None:
    options = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 3}
    with torch.no_grad():
        expected = naive(net, **options)  # type: ignore[arg-type]
    assert torch.equal(sample(net, LABELS, **options), expected)  # type: ignore[arg-type]
    assert len(set(map(tuple, expected.tolist()))) > 5


def test_sample_does_not_depend_on_the_batch(net: Transformer) -> None:
    whole = sample(net, LABELS, guidance=1.5, seed=1)
    assert torch.equal(sample(net, LABELS, guidance=1.5, seed=1, batch=4), whole)
    assert torch.equal(sample(net, LABELS[:7], guidance=1.5, seed=1), whole[:7])
    assert not torch.equal(sample(net, LABELS, guidance=1.5, seed=2), whole)


def test_scale_one_runs_no_second_branch(net: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    first = net.first
    monkeypatch.setattr(net, "first", lambda labels, cache: (sizes.append(len(labels)), first(labels, cache))[1])
    plain = sample(net, LABELS, guidance=1.0, seed=0)
    guided = sample(net, LABELS, guidance=1.0 + 1e-9, seed=0)
    assert sizes == [23, 46]
    assert torch.equal(plain, guided)


def test_frequencies_are_the_models(net: Transformer) -> None:
    labels = torch.full((20_000,), 2)
    drawn = sample(net, labels, seed=5, batch=20_000)
    with torch.no_grad():
        p = net(torch.zeros(1, 6, dtype=torch.int64), labels[:1])[0, 0].softmax(0)
    share = torch.bincount(drawn[:, 0], minlength=11) / 20_000
    assert (share - p).abs().max() < 4 * (p * (1 - p) / 20_000).sqrt().max()


def test_top_k_and_top_p_restrict_the_support_exactly() -> None:
    p = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    u = torch.linspace(0, 1 - 1e-7, 2001)
    logits = p.log().expand(2001, -1)
    support = lambda **options: set(choose(logits, u, **options).tolist())  # noqa: E731
    assert support() == {0, 1, 2, 3, 4}
    assert support(top_k=2) == {1, 3}
    assert support(top_k=1) == {1}
    assert support(top_p=0.6) == {1, 3}  # 0.4, then 0.65
    assert support(top_p=0.66) == {1, 3, 4}
    assert support(top_p=1e-6) == {1}
    assert support(top_k=3, top_p=0.5) == {1, 3}  # of the renormalised 0.47, 0.29, 0.24
    share = (choose(logits, u, top_k=2) == 1).double().mean().item()
    assert share == pytest.approx(0.4 / 0.65, abs=2e-3)


def test_equal_logits_keep_exactly_k_and_impossible_codes_are_never_drawn() -> None:
    u = torch.linspace(0, 1 - 2**-24, 500)
    assert set(choose(torch.zeros(500, 6), u, top_k=2).tolist()) == {0, 1}
    logits = torch.zeros(500, 4)
    logits[:, [0, 3]] = -torch.inf
    assert set(choose(logits, u).tolist()) == {1, 2}


def test_temperature_scales_logits() -> None:
    logits, u = torch.randn(400, 7), torch.rand(400)
    assert torch.equal(choose(logits, u, temperature=0.5), choose(logits * 2, u))


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    noisy = Transformer(Llama(layers=1, width=16, heads=2, dropout=0.5), LATENT, 5)
    torch.nn.init.normal_(noisy.head.weight)
    noisy.train()
    assert torch.equal(noisy.sample(LABELS, seed=0), noisy.sample(LABELS, seed=0))
    assert noisy.training


def test_guiding_a_model_without_classes_is_refused() -> None:
    free = Transformer(Llama(layers=1, width=16, heads=2), LATENT, 0)
    with pytest.raises(ValueError, match=r"^guidance: 2.0 asked of a model without classes; allowed: 1$"):
        sample(free, torch.zeros(3, dtype=torch.int64), guidance=2.0)
    assert sample(free, torch.zeros(3, dtype=torch.int64)).shape == (3, 6)
