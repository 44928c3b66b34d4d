"""Does the tokenizer quantise, pass gradients, count usage and revive dead codes as it says?"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.config import VQ, DeadLeaves, Digits, Recipe, Runtime
from models.tokenizers.vq import VQTokenizer, nearest, usage
from models.training import Loop

DATA = Digits()


def tokenizer(**fields: object) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQ(**({"tokens": 4, "codebook": 32, "width": 8, "code_dim": 4} | fields)), DATA)


def batch(count: int = 6, tokens: int = 4) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    return {
        "images": torch.rand(count, 1, 8, 8, generator=made) * 2 - 1,
        "reset": torch.rand(count, tokens, generator=made),
    }


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_shapes(tokens: int) -> None:
    net, images = tokenizer(tokens=tokens), batch()["images"]
    codes = net.encode(images)
    assert codes.shape == (6, tokens)
    assert codes.dtype == torch.int64
    assert net.decode(codes).shape == images.shape
    assert net.latents(images).shape == (6, tokens, 4)
    assert net.decode(codes).abs().max() <= 1


@pytest.mark.parametrize("normalize", [True, False])
def test_nearest_code_by_exhaustion(normalize: bool) -> None:
    net, images = tokenizer(normalize=normalize), batch()["images"]
    if not normalize:
        torch.nn.init.normal_(net.codebook, std=0.5)
    z, book = net.latents(images), net.book()
    if normalize:
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(6, 4))
        torch.testing.assert_close(book.norm(dim=-1), torch.ones(32))
    distance = (z[:, :, None] - book).square().sum(-1)
    assert torch.equal(net.encode(images), distance.argmin(-1))


def test_distances_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    z, book = torch.randn(100, 4), torch.randn(50, 4)
    whole = nearest(z, book)
    monkeypatch.setattr("models.tokenizers.vq.DISTANCES", 350)
    assert torch.equal(nearest(z, book), whole)


def test_reconstruction_is_the_decoded_code() -> None:
    net, images = tokenizer(), batch()["images"]
    torch.testing.assert_close(net.reconstruct(images), net.decode(net.encode(images)))


def test_straight_through_gradient_equals_that_of_the_code() -> None:
    """d mse / d latent is d mse / d (code vector): the decoder's gradient, passed on unchanged."""
    net, data = tokenizer(commitment=0.0), batch()
    seen: dict[str, Tensor] = {}
    latents, paint = net.latents, net.paint

    def keep_latents(images: Tensor) -> Tensor:
        seen["z"] = latents(images)
        seen["z"].retain_grad()
        return seen["z"]

    def keep_vectors(vectors: Tensor) -> Tensor:
        seen["vectors"] = vectors.detach().requires_grad_()
        seen["passed"] = vectors
        return paint(vectors)

    net.latents, net.paint = keep_latents, keep_vectors  # type: ignore[method-assign]
    losses = net.loss(data, 0)
    losses["mse"].backward(retain_graph=True)
    (expected,) = torch.autograd.grad(F.mse_loss(paint(seen["vectors"]), data["images"]), seen["vectors"])
    torch.testing.assert_close(seen["z"].grad, expected)
    assert expected.abs().max() > 0
    torch.testing.assert_close(seen["passed"], net.book()[net.codes(seen["z"], net.book())])
    assert net.codebook.grad is None  # the image loss does not move codes


def test_codebook_and_commitment_move_one_side_each() -> None:
    net, data = tokenizer(), batch()
    losses = net.loss(data, 0)
    torch.testing.assert_close(losses["codebook"], losses["commitment"])
    codebook, encoder = net.codebook, net.encoder[0].weight
    assert torch.autograd.grad(losses["codebook"], encoder, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(losses["commitment"], codebook, retain_graph=True, allow_unused=True) == (None,)
    (moved,) = torch.autograd.grad(losses["codebook"], codebook, retain_graph=True)
    used = net.encode(data["images"]).unique()
    assert set(moved.ne(0).any(1).nonzero().flatten().tolist()) == set(used.tolist())
    expected = losses["mse"] + losses["codebook"] + 0.25 * losses["commitment"]
    torch.testing.assert_close(losses["loss"], expected)


def test_quantiser_stays_float32_under_autocast() -> None:
    net, data = tokenizer(), batch()
    seen: dict[str, Tensor] = {}
    paint = net.paint
    net.paint = lambda v: (seen.__setitem__("v", v), paint(v))[1]  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        losses = net.loss(data, 0)
        codes = net.encode(data["images"])
    assert seen["v"].dtype == torch.float32
    assert all(losses[name].dtype == torch.float32 for name in losses)
    with torch.autocast("cpu", torch.bfloat16):
        z = net.latents(data["images"])
    assert z.dtype == torch.float32
    torch.testing.assert_close(seen["v"], net.book()[codes], atol=1e-6, rtol=0)  # code vectors not rounded to bf16
    assert torch.equal(codes, net.codes(z, net.book()))


def test_dead_codes_move_to_latents_of_the_batch() -> None:
    net, data = tokenizer(reset_every=3, reset_below=0.1), batch()
    used = net.encode(data["images"]).unique()
    dead = [code for code in range(32) if code not in used]
    assert len(dead) > 4
    before = net.codebook.clone()
    for step in range(3):
        net.loss(data, step)
        net.after_step(step, False)
        if step < 2:
            assert torch.equal(net.codebook, before)
            assert net.window.sum() == (step + 1) * 24
    z = net.latents(data["images"]).flatten(0, 1)
    order = data["reset"].flatten().argsort()
    assert torch.equal(net.codebook[used], before[used])
    first = min(len(dead), 24)
    torch.testing.assert_close(net.codebook[dead[:first]], z[order[:first]])
    assert torch.equal(net.codebook[dead[first:]], before[dead[first:]])  # not more than there are latents
    assert net.window.eq(0).all()
    assert len(net.encode(data["images"]).unique()) > len(used)  # alive


def test_no_reset_while_decaying_or_in_evaluation() -> None:
    net, data = tokenizer(reset_every=1, reset_below=0.5), batch()
    before = net.codebook.clone()
    net.loss(data, 0)
    net.after_step(0, True)
    net.eval()
    net.loss({"images": data["images"]}, 1)
    net.after_step(1, False)
    assert torch.equal(net.codebook, before)
    assert net.window.eq(0).all()
    never = tokenizer(reset_every=0)
    never.loss({"images": data["images"]}, 0)
    never.after_step(0, False)
    assert never.draws == {}
    assert "window" not in never.state_dict()


@pytest.mark.parametrize(
    ("schedule", "windows"),
    [("wsd", [1, 2, 0] * 3 + [0] * 3), ("cosine", [1, 2, 0] * 3 + [0] * 3), ("constant", [1, 2, 0] * 4)],
)
def test_codes_are_reset_until_a_schedule_decays(schedule: str, windows: list[int]) -> None:
    """12 steps with a reset after every third: batches counted since the last one."""
    net = tokenizer(reset_every=3)
    recipe = Recipe(batch=8, lr=1e-3, schedule=schedule, decay=0.25, warmup=1)
    loop = Loop(net, DATA.build(), recipe, seed=0, runtime=Runtime(device="cpu"))
    found = []
    for step in range(12):
        loop.step(step, 9, 12 if schedule == "cosine" or (schedule == "wsd" and step >= 9) else None)
        found.append(int(net.window.sum()) // 32)
    assert found == windows


def test_reset_does_not_depend_on_micro_batches() -> None:
    whole, parts, data = tokenizer(reset_every=1), tokenizer(reset_every=1), batch(8)
    whole.loss(data, 0)
    for start in (0, 4):
        parts.loss({name: value[start : start + 4] for name, value in data.items()}, 0)
    for net in (whole, parts):
        net.after_step(0, False)
    torch.testing.assert_close(whole.codebook, parts.codebook)


def resets(rank: int, size: int, folder: str) -> None:
    """Three steps on this rank's share of the images, a reset after the second."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    net = tokenizer(reset_every=2)
    made = torch.Generator().manual_seed(3)
    for step in range(3):
        images, order = torch.rand(8, 1, 8, 8, generator=made) * 2 - 1, torch.rand(8, 4, generator=made)
        mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
        net.loss({"images": images[mine], "reset": order[mine]}, step)
        net.after_step(step, False)
    torch.save(net.state_dict(), f"{folder}/{size}-{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


def test_reset_on_two_ranks_equals_one_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['resets'](1, 2, sys.argv[2])"
    other = subprocess.Popen(
        [sys.executable, "-c", code, __file__, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    resets(0, 1, str(tmp_path))
    resets(0, 2, str(tmp_path))
    assert other.wait(120) == 0
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert one["window"].sum() == 32
    assert not torch.equal(one["codebook"], tokenizer().codebook)
    for held in two:
        torch.testing.assert_close(held["codebook"], one["codebook"])
        assert torch.equal(held["window"], one["window"])


def test_usage_of_known_counts() -> None:
    found = usage(torch.tensor([10, 10, 0, 10, 10, 0, 0, 0]), tokens=16)
    assert found == pytest.approx({"usage": 0.5, "perplexity": 4.0, "bits_used": 32.0})
    skewed = usage(torch.tensor([3, 1]), tokens=1)
    entropy = 2 - 0.75 * math.log2(3)
    assert skewed["bits_used"] == pytest.approx(entropy)
    assert skewed["perplexity"] == pytest.approx(2**entropy)
    big = torch.zeros(131_072, dtype=torch.int64)
    big[:100_000] = 1
    assert usage(big, 1)["usage"] > 0.5  # a large book can read above one half


def test_other_input_size_keeps_the_size_of_the_data() -> None:
    data = DeadLeaves(size=16)
    fields = VQ(tokens=9, codebook=32, width=8, input_size=12, multipliers=(1, 1, 1))
    net = VQTokenizer(fields, data)
    images = data.build().draw("train", 0, 3, 0)["images"]
    assert net.encode(images).shape == (3, 9)
    assert net.reconstruct(images).shape == images.shape
    losses = net.loss({"images": images, "reset": torch.rand(3, 9)}, 0)
    assert losses["loss"].isfinite()


def test_learns_digits_with_most_of_its_codes() -> None:
    net = tokenizer(codebook=16, reset_every=30, attention=False)
    loop = Loop(net, DATA.build(), Recipe(batch=32, lr=3e-3), seed=0, runtime=Runtime(device="cpu"))
    for step in range(120):
        loop.step(step, 10**6, None)
    net.eval()
    images = loop.stream.draw("heldout", 0, 359, 0, "cpu")["images"]
    mse = (net.reconstruct(images) - images).square().mean()
    assert mse < 0.9 * images.var(0).mean()  # the mean image scores 1
    assert usage(torch.bincount(net.encode(images).flatten(), minlength=16), 4)["usage"] > 0.6
