"""Are evaluation rows complete, right on models whose values are known, and a function of their protocol and seed?"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import evaluation, fidelity, references
from models.config import VQ, Digits, Latent, Llama, Protocol
from models.data import CodeCache, DigitImages, encode, quantise, reference
from models.evaluation import Measurement, evaluate_generator, evaluate_tokenizer
from models.fidelity import FeatureSet
from sweep.schema import CURVES, IMAGES

EXTRACTORS = ("digits-supervised", "digits-contrastive")
DATA = Digits(views=2, views_heldout=2)


class Pixels(torch.nn.Module):
    """A tokenizer brought along: every pixel is a code of 16 grey levels."""

    latent = Latent(8, 8, codebook=16)

    def encode(self, images: Tensor) -> Tensor:
        return ((images + 1) * 7.5).round().long().flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes / 7.5 - 1).view(-1, 1, 8, 8)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


class Replay(torch.nn.Module):
    """A generator brought along: cached training sequences of the label; a share of them spoiled by the scale."""

    def __init__(self, codes: CodeCache, best: float = 1.0) -> None:
        super().__init__()
        self.held, self.best, self.calls = codes.take("train", slice(None)), best, []
        self.dropout = torch.nn.Dropout(0.5)

    def nll(self, codes: Tensor, labels: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        return (codes % 2 + labels[:, None]).float()

    def sample(self, labels: Tensor, *, guidance: float, seed: int, **options: Any) -> Tensor:
        self.calls.append({"guidance": guidance, "seed": seed, "count": len(labels), **options})
        random = torch.Generator().manual_seed(seed)
        rows = [torch.nonzero(self.held["labels"] == label).flatten() for label in range(10)]
        turn = torch.randint(10**6, (len(labels),), generator=random)
        picked = torch.stack([rows[c][t % len(rows[c])] for c, t in zip(labels.tolist(), turn.tolist(), strict=True)])
        codes = self.held["codes"][picked].clone()
        spoiled = torch.rand(len(labels), generator=random) < abs(guidance - self.best) / 2
        codes[spoiled] = torch.randint(16, codes[spoiled].shape, generator=random)
        return codes


@pytest.fixture(scope="module")
def images() -> DigitImages:
    return DATA.build()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def codes(images: DigitImages, cache: Path) -> CodeCache:
    return encode(Pixels(), images, cache / "codes", seed=0)


def protocol(of: str = "generator", **fields: Any) -> Protocol:
    return Protocol(of=of, extractors=EXTRACTORS, **{"samples": 300, "search_samples": 100, **fields})


def named(made: Measurement, metric: str, **columns: Any) -> dict[str, Any]:
    """The one row of a metric with these columns."""
    found = [row for row in made.rows if row["metric"] == metric and all(row.get(k) == v for k, v in columns.items())]
    assert len(found) == 1, (metric, columns, found)
    return found[0]


# --- tokenizer ---


@pytest.fixture(scope="module")
def tokenizer_rows(images: DigitImages, cache: Path) -> Measurement:
    torch.manual_seed(0)
    tokenizer = VQ(tokens=16, codebook=32, width=8).build(DATA)
    return evaluate_tokenizer(tokenizer, images, protocol("tokenizer"), seed=7, cache=cache)


def test_tokenizer_rows_are_complete(tokenizer_rows: Measurement) -> None:
    made = tokenizer_rows
    assert {row["metric"] for row in made.rows} == {
        *("mse", "psnr", "ssim", "residual_bits", "usage", "perplexity", "bits_used", "fid", "fid_data", "fid_train")
    }
    for row in made.rows:
        assert row.keys() <= CURVES.keys()
        assert (row["value"] is None) == (row["reason"] is not None)
        assert row["seed"] == 7
        assert row["weights"] == "ema"
        assert row["split"] == ("train" if row["metric"] == "fid_train" else "heldout")
        if row["metric"].startswith("fid"):
            assert row["n"] == 300
            assert row["extractor_hash"] == fidelity.extractor_hash(row["extractor"])
            assert len(row["reference_hash"]) == 12
            assert row["error"] > 0
    for name in EXTRACTORS:
        kinds = {row["reference"]: row for row in made.rows if row["metric"] == "fid" and row["extractor"] == name}
        assert kinds.keys() == {"heldout", "train"}
        assert kinds["heldout"]["reference_hash"] != kinds["train"]["reference_hash"]
        floor = named(made, "fid_data", extractor=name)
        assert floor["reference_hash"] == kinds["train"]["reference_hash"]
        assert floor["value"] < kinds["train"]["value"] / 5  # an untrained tokenizer is far above the floor
    assert len(made.images) == 2 * evaluation.SHOWN
    assert {row["kind"] for row in made.images} == {"original", "reconstruction"}
    for row in made.images:
        assert row.keys() <= IMAGES.keys()
        assert len(row["pixels"]) == row["height"] * row["width"] * row["channels"] == 64


def test_codebook_use_is_that_of_all_heldout_views(images: DigitImages, tokenizer_rows: Measurement) -> None:
    torch.manual_seed(0)
    tokenizer = VQ(tokens=16, codebook=32, width=8).build(DATA)
    views = 2 * len(images.members["heldout"])
    drawn = images.draw("heldout", 0, views, evaluation.REFERENCE_SEED)["images"]
    share = torch.bincount(tokenizer.encode(drawn).flatten(), minlength=32).double()
    share /= share.sum()
    bits = -float(torch.special.xlogy(share, share).sum()) / math.log(2)
    assert named(tokenizer_rows, "perplexity")["value"] == pytest.approx(2**bits, rel=1e-3)
    assert named(tokenizer_rows, "bits_used")["value"] == pytest.approx(16 * bits, rel=1e-3)
    assert named(tokenizer_rows, "usage")["value"] == pytest.approx(float((share > 0).double().mean()))
    assert named(tokenizer_rows, "usage")["n"] == views > 300


class Identity(torch.nn.Module):
    """A continuous latent: the image itself."""

    latent = Latent(8, 8, channels=1)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def test_a_lossless_tokenizer_scores_the_floor(images: DigitImages, cache: Path) -> None:
    made = evaluate_tokenizer(Identity(), images, protocol("tokenizer"), seed=0, cache=cache)
    assert "perplexity" not in {row["metric"] for row in made.rows}
    assert named(made, "mse")["value"] == 0
    assert named(made, "ssim")["value"] == pytest.approx(1)
    assert named(made, "psnr")["value"] is None
    assert named(made, "psnr")["error"] is None
    assert named(made, "psnr")["reason"] == "not finite"
    for name in EXTRACTORS:
        assert named(made, "fid", extractor=name, reference="heldout")["value"] == pytest.approx(0, abs=1e-9)
        floor = named(made, "fid_data", extractor=name)
        assert named(made, "fid", extractor=name, reference="train")["value"] == pytest.approx(floor["value"])


def test_pixel_metrics_by_hand(images: DigitImages, cache: Path) -> None:
    made = evaluate_tokenizer(Pixels(), images, protocol("tokenizer"), seed=0, cache=cache)
    drawn = images.draw("heldout", 0, 300, evaluation.REFERENCE_SEED)["images"]
    error = (quantise(Pixels().reconstruct(drawn)) / 255 - quantise(drawn) / 255).square().mean(dim=(1, 2, 3))
    assert named(made, "mse")["value"] == pytest.approx(float(error.mean()), rel=1e-5)
    assert named(made, "psnr")["value"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-5)


def test_values_do_not_depend_on_the_batch(
    images: DigitImages, codes: CodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(batch: int) -> list[dict[str, Any]]:
        stage1 = evaluate_tokenizer(Pixels(), images, protocol("tokenizer"), seed=0, batch=batch)
        stage2 = evaluate_generator(Replay(codes), Pixels(), images, codes, protocol(), seed=0, batch=batch)
        assert [image["pixels"] for image in stage1.images if image["kind"] == "original"] == shown
        return stage1.rows + stage2.rows

    whole = evaluate_tokenizer(Pixels(), images, protocol("tokenizer"), seed=0)
    shown = [image["pixels"] for image in whole.images if image["kind"] == "original"]
    assert len(shown) == evaluation.SHOWN
    before = measure(250)
    monkeypatch.setattr(references, "BATCH", 77)
    for first, second in zip(before, measure(13), strict=True):
        assert first["metric"] == second["metric"]
        assert first.get("reference_hash") == second.get("reference_hash")
        assert first["value"] == pytest.approx(second["value"], rel=1e-4, abs=1e-7)


# --- references ---


def test_references_are_hashed_draws_and_kept(images: DigitImages, tmp_path: Path) -> None:
    options = {"cache": tmp_path, "device": "cpu"}
    made = references.references(images, "train", 50, 0, EXTRACTORS, **options)
    pixels, digest = reference(images, "train", 50, 0)
    expected = fidelity.features(pixels.permute(0, 3, 1, 2), EXTRACTORS[1])
    for name in EXTRACTORS:
        assert made[name].hash == digest[:12]
    torch.testing.assert_close(made[EXTRACTORS[1]].features.values, expected)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.json"))) == 2
    assert not list(tmp_path.rglob(".*"))  # no staging file stays

    class Unreadable:
        fields = images.fields

        def draw(self, *_: Any) -> Any:
            raise AssertionError("drawn again")

    again = references.references(Unreadable(), "train", 50, 0, EXTRACTORS, **options)
    assert torch.equal(again[EXTRACTORS[0]].features.values, made[EXTRACTORS[0]].features.values)
    assert again[EXTRACTORS[0]].hash == digest[:12]
    for other in (("heldout", 50, 0), ("train", 49, 0), ("train", 50, 1)):
        with pytest.raises(AssertionError, match="drawn again"):
            references.references(Unreadable(), *other, EXTRACTORS, **options)

    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    mended = references.references(images, "train", 50, 0, EXTRACTORS, **options)
    assert torch.equal(mended[EXTRACTORS[0]].features.values, made[EXTRACTORS[0]].features.values)


def test_references_may_be_made_at_once(images: DigitImages, tmp_path: Path) -> None:
    def make(_: int) -> str:
        return references.references(images, "train", 100, 0, EXTRACTORS, cache=tmp_path)[EXTRACTORS[0]].hash

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(make, range(8)))) == 1
    assert len(list(tmp_path.rglob("*.*"))) == 4


# --- generator ---


@pytest.fixture(scope="module")
def replayed(images: DigitImages, codes: CodeCache, cache: Path) -> Measurement:
    return evaluate_generator(Replay(codes), Pixels(), images, codes, protocol(samples=500), seed=3, cache=cache)


def test_generator_rows_are_complete(replayed: Measurement) -> None:
    spaces = ("fid", "kid", "precision", "recall", "density", "coverage", "nearest_train", "nearest_heldout")
    once = ("nll_bits", "unique_sequences", "copied", "cached_images", "cached_sequences")
    assert {row["metric"] for row in replayed.rows} == {*spaces, *once}
    for row in replayed.rows:
        assert row.keys() <= CURVES.keys()
        assert row["value"] is not None
        assert row["seed"] == 3
        if row["metric"] in ("nll_bits", "cached_images", "cached_sequences"):
            assert row["split"] in ("train", "heldout")
            continue
        assert row["n"] == 500
        assert "split" not in row
        expected = {"sampler": "ancestral", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "labels": "balanced"}
        assert expected.items() <= row.items()
        assert (row["guidance"], row["guidance_from"]) == (1.0, "fixed")
        if row["metric"] in spaces:
            assert row["extractor"] in EXTRACTORS
            assert len(row["extractor_hash"]) == len(row["reference_hash"]) == 12
            assert row["reference"] == ("heldout" if row["metric"] == "nearest_heldout" else row["reference"])
    for name in EXTRACTORS:
        for kind in ("train", "heldout"):
            assert named(replayed, "fid", extractor=name, reference=kind)["error"] > 0
        assert named(replayed, "kid", extractor=name)["error"] > 0
    assert len(replayed.images) == evaluation.SHOWN
    assert [row["label"] for row in replayed.images[:10]] == list(range(10))
    assert {row["kind"] for row in replayed.images} == {"sample"}


def test_copies_of_training_images_show(replayed: Measurement, codes: CodeCache) -> None:
    assert named(replayed, "copied")["value"] == 1.0
    total = len(codes.take("train", slice(None))["codes"].unique(dim=0))
    assert 0.8 < named(replayed, "unique_sequences")["value"] < 1.0
    assert total > 500
    for name in EXTRACTORS:
        near, far = (named(replayed, f"nearest_{kind}", extractor=name)["value"] for kind in ("train", "heldout"))
        assert near < far


def test_different_images_and_sequences_of_the_cache_are_counted(replayed: Measurement, codes: CodeCache) -> None:
    for split in ("train", "heldout"):
        held = codes.take(split, slice(None))
        sequences = named(replayed, "cached_sequences", split=split)
        assert sequences["value"] == len(held["codes"].unique(dim=0))
        assert named(replayed, "cached_images", split=split)["value"] == len(held["index"].unique())
        assert sequences["n"] == len(held["index"])


def test_no_run_trains_on_what_it_is_measured_with(images: DigitImages, codes: CodeCache) -> None:
    assert evaluation.REFERENCE_SEED != evaluation.FLOOR_SEED
    for seed in (evaluation.REFERENCE_SEED, evaluation.FLOOR_SEED):
        assert seed < 0  # a grid's seeds are not
        pixels, first = (images.draw("train", 0, 64, drawn)["images"] for drawn in (seed, 0))
        assert not (pixels.flatten(1)[:, None] == first.flatten(1)[None]).all(-1).any()
    order, trained = (codes.draw("train", 0, 64, drawn)["index"] for drawn in (evaluation.REFERENCE_SEED, 0))
    assert not torch.equal(order, trained)


def test_new_sequences_are_not_copies(images: DigitImages, codes: CodeCache, cache: Path) -> None:
    spoiled, generator = protocol(samples=64, guidance=(3.0,)), Replay(codes)  # every sample random
    made = evaluate_generator(generator, Pixels(), images, codes, spoiled, seed=0, cache=cache, batch=77)
    assert [call["batch"] for call in generator.calls] == [77]  # what the memory of the device was planned for
    assert named(made, "copied")["value"] == 0.0
    assert named(made, "unique_sequences")["value"] == 1.0
    assert named(made, "copied")["guidance_from"] == "fixed"


def test_fingerprints_tell_sequences_apart_and_chunks_do_not_matter(codes: CodeCache) -> None:
    held = codes.take("train", slice(None))["codes"]
    assert len(evaluation.prints(held).unique()) == len(held.unique(dim=0))
    some = torch.cat([held[::50], held[::50].flip(1)])
    marks = evaluation.prints(some)
    expected = (some[:, None] == held).all(-1).any(1).double().mean()
    assert evaluation.copied(marks, codes) == evaluation.copied(marks, codes, step=1000) == pytest.approx(expected)


def test_code_length_of_a_known_model(replayed: Measurement, codes: CodeCache) -> None:
    for split in ("train", "heldout"):
        held = codes.take(split, slice(None))
        bits = (held["codes"] % 2 + held["labels"][:, None]).sum(1) / math.log(2)
        row = named(replayed, "nll_bits", split=split)
        if split == "heldout":  # all of them
            assert row["n"] == len(bits)
            assert row["value"] == pytest.approx(float(bits.mean()), rel=1e-6)
        else:
            assert row["n"] == evaluation.SEQUENCES < len(bits)
            assert row["value"] == pytest.approx(float(bits.mean()), abs=4 * row["error"])


def test_error_of_a_mean_counts_source_images() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    alone = evaluation.mean(values, torch.arange(50))
    assert alone.value == pytest.approx(float(values.mean()))
    assert alone.error == pytest.approx(float(values.std()) / 50**0.5)
    tenfold = evaluation.mean(values.repeat_interleave(10), torch.arange(50).repeat_interleave(10))
    assert tenfold == pytest.approx(alone)
    assert evaluation.mean(values, torch.zeros(50).long()).error is None


def test_search_finds_the_best_scale_and_reports_on_other_samples(
    images: DigitImages, codes: CodeCache, cache: Path
) -> None:
    generator = Replay(codes, best=2.0)
    scales = (1.0, 1.5, 2.0, 3.0)
    made = evaluate_generator(
        generator, Pixels(), images, codes, protocol(guidance=scales, top_k=5), seed=1, cache=cache
    )
    searched = [row for row in made.rows if row["metric"] == "fid_search"]
    assert [row["guidance"] for row in searched] == list(scales)
    assert min(searched, key=lambda row: row["value"])["guidance"] == 2.0
    assert {row["n"] for row in searched} == {100}
    assert {row["extractor"] for row in searched} == {EXTRACTORS[0]}
    final = named(made, "fid", extractor=EXTRACTORS[1], reference="train")
    assert (final["guidance"], final["guidance_from"], final["n"]) == (2.0, "search", 300)
    assert named(made, "guidance_edge")["value"] == 0.0
    *tried, reported = generator.calls
    assert len({call["seed"] for call in tried}) == 1
    assert reported["seed"] != tried[0]["seed"]
    assert (reported["guidance"], reported["count"], reported["top_k"]) == (2.0, 300, 5)


@pytest.mark.parametrize(("best", "side"), [(1.0, "lowest"), (3.0, "highest")])
def test_an_optimum_at_the_edge_is_flagged(
    best: float, side: str, images: DigitImages, codes: CodeCache, cache: Path
) -> None:
    scales = protocol(guidance=(2.0, 1.0, 3.0))
    made = evaluate_generator(Replay(codes, best), Pixels(), images, codes, scales, seed=1, cache=cache)
    row = named(made, "guidance_edge")
    assert (row["value"], row["guidance"]) == (1.0, best)
    assert row["reason"] == f"{side} of the candidates 1, 2, 3"


def test_a_transformer_is_a_function_of_its_seed(images: DigitImages, cache: Path) -> None:
    torch.manual_seed(0)
    tokenizer = VQ(tokens=4, codebook=16, width=8).build(DATA)
    held = encode(tokenizer, images, cache / "vq", seed=0)
    generator = Llama(layers=1, width=16, heads=1).build(tokenizer.latent, 10)
    torch.nn.init.normal_(generator.head.weight)
    fields = protocol(samples=64)

    def measure(seed: int) -> Measurement:
        return evaluate_generator(generator, tokenizer, images, held, fields, seed=seed, cache=cache)

    first, again, other = measure(0), measure(0), measure(1)
    assert first.rows == again.rows
    assert first.images == again.images
    fids = [named(made, "fid", extractor=EXTRACTORS[0], reference="train") for made in (first, other)]
    assert fids[0]["value"] != fids[1]["value"]
    assert fids[0]["reference_hash"] == fids[1]["reference_hash"]
    assert named(first, "nll_bits", split="train") == {**named(other, "nll_bits", split="train"), "seed": 0}
    assert generator.training  # as it was

    # the distance is that of the images which sample and decode give
    seed = evaluation.key("report", 0)
    labels = evaluation.classes(64, 10, "balanced", seed)
    drawn = tokenizer.decode(generator.sample(labels, seed=seed))
    sample = FeatureSet(fidelity.features(quantise(drawn).permute(0, 3, 1, 2), EXTRACTORS[0]))
    compared = references.references(images, "train", 64, evaluation.REFERENCE_SEED, EXTRACTORS, cache=cache)
    assert fidelity.fid(sample, compared[EXTRACTORS[0]].features).value == pytest.approx(fids[0]["value"], rel=1e-4)


def test_few_images_are_said_to_be_few(images: DigitImages, codes: CodeCache, cache: Path) -> None:
    made = evaluate_generator(Replay(codes), Pixels(), images, codes, protocol(samples=40), seed=0, cache=cache)
    row = named(made, "fid", extractor=EXTRACTORS[0], reference="train")
    assert row["value"] > 0
    assert row["reason"] == "n < dimension"
    with pytest.raises(ValueError, match="neighbours: 16 has to be less than samples, 16"):
        evaluate_generator(
            Replay(codes), Pixels(), images, codes, protocol(samples=16, neighbours=16), seed=0, cache=cache
        )


def test_labels_are_balanced_or_random() -> None:
    balanced = evaluation.classes(100, 10, "balanced", 0)
    assert balanced.bincount().tolist() == [10] * 10
    assert not torch.equal(balanced, evaluation.classes(100, 10, "balanced", 1))
    assert balanced.tolist() != sorted(balanced.tolist())
    assert evaluation.classes(1000, 10, "random", 0).bincount().tolist() != [100] * 10
    assert evaluation.classes(5, 0, "balanced", 0).tolist() == [0] * 5
    labels = torch.tensor([2, 2, 0, 1, 0, 2])
    assert labels[evaluation.spread(labels)].tolist() == [0, 1, 2, 0, 2, 2]
