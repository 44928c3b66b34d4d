"""How good is a checkpoint under a named protocol? Reconstruction, held-out code length, sample metrics, memorisation.

Every value is a row of the ``curves`` table with the columns of its protocol; what a run knows about itself (ids,
steps, compute) is added by the caller. References (``models.references``) are the same for every evaluation: their
seed is ``REFERENCE_SEED``, never the evaluation's. ``error`` is a standard error: over
images for means, by jackknife for Frechet distances (the reference held fixed), by subsets for KID; where several
rows come from one source image, whole images are resampled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from models import fidelity
from models.config import SEQUENCES
from models.config import Protocol as Evaluation
from models.data import Batch, Images, Split, key, quantise
from models.fidelity import FeatureSet, Value
from models.references import BATCH, Features, Reference, references
from models.tokenizers.vq import usage

Row = dict[str, Any]
REFERENCE_SEED, FLOOR_SEED = -1, -2  # of streams that no run trains on: seeds of runs are not negative
SHOWN = 40  # images kept for figures


class Tokenizer(Protocol):
    """What is measured of a tokenizer."""

    latent: Any  # models.config.Latent

    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...


class Generator(Protocol):
    """What is measured of a generator: nats per position [B, L], and codes [B, L] of given classes [B]."""

    def nll(self, codes: Tensor, labels: Tensor) -> Tensor: ...

    def sample(
        self, labels: Tensor, *, guidance: float, temperature: float, top_k: int, top_p: float, seed: int, batch: int
    ) -> Tensor: ...


class Codes(Protocol):
    """Cached codes of both splits (``models.data.CodeCache``); the manifest counts the different ones of each."""

    manifest: dict[str, Any]

    def rows(self, split: Split) -> int: ...
    def take(self, split: Split, rows: slice) -> Batch: ...
    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch: ...


class Stopped(Exception):
    """Asked to stop; what was measured so far is of no use."""


@dataclass
class Measurement:
    """Rows for ``curves`` and ``images``, and the seconds that each part took. Each part asks first whether to stop."""

    shared: Row
    should_stop: Callable[[], bool]
    rows: list[Row] = field(default_factory=list)
    images: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, metric: str, value: float, *, reason: str | None = None, **columns: Any) -> None:
        """One row; a value that is not finite is stored as null with a reason."""
        row = {**self.shared, "metric": metric, "value": value, "reason": reason, **columns}
        if not math.isfinite(value):
            row |= {"value": None, "reason": f"not finite; {reason}" if reason else "not finite", "error": None}
        self.rows.append(row)

    def show(self, kind: str, pixels: Tensor, index: Tensor, labels: Tensor, guidance: float | None = None) -> None:
        """Images uint8 [B, H, W, C] for figures."""
        for picture, number, label in zip(pixels, index.tolist(), labels.tolist(), strict=True):
            height, width, channels = picture.shape
            size = {"height": height, "width": width, "channels": channels}
            row = {"kind": kind, "index": number, "label": label, "guidance": guidance, **size}
            self.images.append({**row, "pixels": picture.numpy().tobytes()})

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        if self.should_stop():
            raise Stopped(part)
        began = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began


@contextmanager
def _measuring(*modules: Any) -> Iterator[None]:
    """Without gradients and dropout; the modules' mode is put back."""
    modes = [(m, m.training) for m in modules if isinstance(m, torch.nn.Module)]
    try:
        for module, _ in modes:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.train(mode)


# --- tokenizer ---------------------------------------------------------------------------------------------------


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    images: Images,
    protocol: Evaluation,
    *,
    seed: int,
    cache: Path | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    should_stop: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Reconstruction of held-out images, use of the codebook, Frechet distances to both references, and data floors.

    Pixel metrics and distances are of the held-out reference draw (``protocol.samples`` images), the use of the
    codebook of as many held-out views as a code cache holds. ``fid_data`` and ``fid_train`` compare real images with
    the training reference: held-out ones, and a training draw of another seed. A deterministic tokenizer has nothing
    to sample, so ``seed`` is recorded and changes nothing. ``batch`` images are encoded at a time. ValueError as
    ``models.fidelity.features`` raises it, ``Stopped`` when ``should_stop`` says so between two batches.
    """
    made = Measurement({"weights": protocol.weights, "seed": seed}, should_stop)
    count, views = protocol.samples, images.fields.images_cached("heldout")
    rebuilt, index = Features(protocol.extractors, device), []
    pixel: dict[str, list[Tensor]] = {"mse": [], "psnr": [], "ssim": []}
    differences: list[Tensor] = []
    codebook = tokenizer.latent.codebook
    counts = torch.zeros(codebook or 0, dtype=torch.int64)
    with _measuring(tokenizer):
        for start in range(0, max(count, views if codebook else 0), batch):
            drawn = images.draw("heldout", start, batch, REFERENCE_SEED, device)
            with made.timed("encode"):
                codes = tokenizer.encode(drawn["images"])
            if codebook:
                counts += torch.bincount(codes[: max(0, views - start)].flatten().cpu(), minlength=codebook)
            if (kept := min(batch, count - start)) <= 0:
                continue
            with made.timed("decode"):
                shown = quantise(tokenizer.decode(codes[:kept]))
            with made.timed("pixels"):
                truth = quantise(drawn["images"][:kept])
                a, b = (x.permute(0, 3, 1, 2) / 255 for x in (shown, truth))
                pixel["mse"].append(fidelity.mse(a, b).cpu())
                pixel["psnr"].append(fidelity.psnr(a, b).cpu())
                pixel["ssim"].append(fidelity.ssim(a, b).cpu())
                differences.append(fidelity.differences(truth, shown))
            with made.timed("features"):
                rebuilt.add(shown.cpu())
            index.append(drawn["index"][:kept].cpu())
            if (left := SHOWN - start) > 0:
                for kind, pixels in (("original", truth), ("reconstruction", shown)):
                    made.show(kind, pixels[:left].cpu(), index[-1][:left], drawn["labels"][:kept][:left])
    groups = torch.cat(index)
    pixel["residual_bits"] = [fidelity.residual_bits(torch.cat(differences))]
    for metric, parts in pixel.items():
        value, error = mean(torch.cat(parts), groups)
        made.add(metric, value, error=error, split="heldout", n=count)
    if codebook:
        for metric, number in usage(counts, tokenizer.latent.tokens).items():
            made.add(metric, number, split="heldout", n=views)
    with made.timed("references"):
        names, options = protocol.extractors, {"cache": cache, "device": device}
        train = references(images, "train", count, REFERENCE_SEED, names, **options)
        heldout = references(images, "heldout", count, REFERENCE_SEED, names, **options)
        again = references(images, "train", count, FLOOR_SEED, names, **options)
    with made.timed("distances"):
        for name, sample in rebuilt.sets(groups).items():
            measured = [
                ("fid", sample, "heldout", "heldout", heldout[name]),
                ("fid", sample, "heldout", "train", train[name]),
                ("fid_data", heldout[name].features, "heldout", "train", train[name]),
                ("fid_train", again[name].features, "train", "train", train[name]),
            ]
            for metric, features, split, kind, reference in measured:
                _fid(made, metric, features, name, reference, kind, split=split)
    return made


def mean(values: Tensor, groups: Tensor) -> Value:
    """Mean of values [N] and its standard error, groups [N] (source images) taken as the independent units."""
    values = values.double()
    centre = values.mean()
    _, member = groups.unique(return_inverse=True)
    count = int(member.max()) + 1
    if count < 2:
        return Value(float(centre), None)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, member, values - centre)
    return Value(float(centre), math.sqrt(count / (count - 1) * float(sums.square().sum())) / len(values))


def _fid(
    made: Measurement,
    metric: str,
    sample: FeatureSet,
    name: str,
    reference: Reference,
    kind: str,
    **more: Any,
) -> float:
    value, error = fidelity.fid(sample, reference.features)
    scarce = sample.deficient or reference.features.deficient
    named = {"extractor": name, "extractor_hash": fidelity.extractor_hash(name)}
    compared = {"reference": kind, "reference_hash": reference.hash}
    reason = "n < dimension" if scarce else None
    made.add(metric, value, error=error, n=sample.count, reason=reason, **named, **compared, **more)
    return value


# --- generator ---------------------------------------------------------------------------------------------------


def evaluate_generator(
    generator: Generator,
    tokenizer: Tokenizer,
    images: Images,
    codes: Codes,
    protocol: Evaluation,
    *,
    seed: int,
    cache: Path | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    should_stop: Callable[[], bool] = lambda: False,
) -> Measurement:
    """Code lengths of both splits, sample metrics in every space, and how much of the training set comes back.

    Several scales in ``protocol.guidance`` are compared on ``search_samples`` samples of one random stream by the
    Frechet distance in the first space (rows ``fid_search``); the best is measured on ``samples`` of another.
    ``guidance_edge`` is 1 when it is the lowest or the highest candidate. Both streams are derived from ``seed``.
    ``batch`` images are drawn and decoded at a time. ``Stopped`` when ``should_stop`` says so between two batches.
    """
    if protocol.neighbours >= protocol.samples:
        raise ValueError(f"neighbours: {protocol.neighbours} has to be less than samples, {protocol.samples}")
    made = Measurement({"weights": protocol.weights, "seed": seed}, should_stop)
    with _measuring(generator, tokenizer):
        with made.timed("nll"):
            for split in ("heldout", "train"):
                value, error, count = code_length(generator, codes, split, device, batch)
                made.add("nll_bits", value, error=error, split=split, n=count)
                different = codes.manifest["splits"][split]
                for what in ("images", "sequences"):
                    made.add(f"cached_{what}", different[what], split=split, n=different["rows"])
        with made.timed("references"):
            names, options = protocol.extractors, {"cache": cache, "device": device}
            train = references(images, "train", protocol.samples, REFERENCE_SEED, names, **options)
            heldout = references(images, "heldout", protocol.samples, REFERENCE_SEED, names, **options)
        made.shared |= {
            "sampler": "ancestral",
            "temperature": protocol.temperature,
            "top_k": protocol.top_k,
            "top_p": protocol.top_p,
            "labels": protocol.labels,
        }
        sampling = _Sampling(generator, tokenizer, images.fields.labels, protocol, made, device, batch)
        scale, chosen_by = protocol.guidance[0], "fixed"
        if len(protocol.guidance) > 1:
            scale, chosen_by = search(sampling, train[protocol.extractors[0]]), "search"
        drawn = sampling.draw(protocol.samples, scale, key("report", seed), protocol.extractors)
    made.shared |= {"guidance": scale, "guidance_from": chosen_by}
    order = spread(drawn.labels)[:SHOWN]
    made.show("sample", drawn.pixels[order], order, drawn.labels[order], scale)
    with made.timed("memorisation"):
        held = prints(drawn.codes)
        made.add("unique_sequences", len(held.unique()) / len(held), n=len(held))
        made.add("copied", copied(held, codes), n=len(held), reference="train")
    with made.timed("distances"):
        for name, sample in drawn.features.items():
            _fid(made, "fid", sample, name, train[name], "train")
            _fid(made, "fid", sample, name, heldout[name], "heldout")
            _compare(made, sample, name, train[name], heldout[name], protocol.neighbours)
    return made


def code_length(
    generator: Generator, codes: Codes, split: Split, device: str, batch: int = BATCH
) -> tuple[float, float | None, int]:
    """Bits per image, summed over positions: mean, standard error, and over how many cached sequences."""
    count = min(SEQUENCES, codes.rows(split))
    bits, index = [], []
    for start in range(0, count, batch):
        drawn = codes.draw(split, start, min(batch, count - start), REFERENCE_SEED, device)
        nats = generator.nll(drawn["codes"], drawn["labels"])
        bits.append(nats.double().sum(1).cpu() / math.log(2))
        index.append(drawn["index"].cpu())
    return *mean(torch.cat(bits), torch.cat(index)), count


class Drawn(NamedTuple):
    """Samples: codes [N, L], labels [N], the first pixels of each class uint8, and features of all."""

    codes: Tensor
    labels: Tensor
    pixels: Tensor
    features: dict[str, FeatureSet]


@dataclass(frozen=True)
class _Sampling:
    generator: Generator
    tokenizer: Tokenizer
    classes: int
    protocol: Evaluation
    made: Measurement
    device: str
    batch: int

    def draw(self, count: int, scale: float, seed: int, extractors: tuple[str, ...]) -> Drawn:
        """``count`` samples at a guidance scale: a function of (generator, tokenizer, protocol, count, seed)."""
        protocol = self.protocol
        labels = classes(count, self.classes, protocol.labels, seed)
        with self.made.timed("sample"):
            drawn = self.generator.sample(
                labels.to(self.device),
                guidance=scale,
                temperature=protocol.temperature,
                top_k=protocol.top_k,
                top_p=protocol.top_p,
                seed=seed,
                batch=self.batch,
            )
        features, pixels = Features(extractors, self.device), []
        for part in drawn.split(self.batch):
            with self.made.timed("decode"):
                pixels.append(quantise(self.tokenizer.decode(part)).cpu())
            with self.made.timed("features"):
                features.add(pixels[-1])
        return Drawn(drawn.cpu(), labels, torch.cat(pixels), features.sets())


def classes(count: int, total: int, rule: str, seed: int) -> Tensor:
    """Labels int64 [count]: equally many of each class in random order, or drawn at random."""
    random = torch.Generator().manual_seed(key("labels", seed))
    if not total:
        return torch.zeros(count, dtype=torch.int64)
    if rule == "random":
        return torch.randint(total, (count,), generator=random)
    return torch.arange(count)[torch.randperm(count, generator=random)] % total


def spread(labels: Tensor) -> Tensor:
    """An order of the samples that takes one of each class in turn, int64 [N]."""
    by_class = torch.argsort(labels, stable=True)
    starts = torch.searchsorted(labels[by_class], labels[by_class])
    turn = torch.arange(len(labels)) - starts
    return by_class[torch.argsort(turn, stable=True)]


def search(sampling: _Sampling, reference: Reference) -> float:
    """The candidate scale of least Frechet distance in the first space; every candidate leaves a row."""
    protocol, made = sampling.protocol, sampling.made
    name, found = protocol.extractors[0], {}
    for scale in protocol.guidance:
        seed = key("search", made.shared["seed"])  # equal for all candidates
        sample = sampling.draw(protocol.search_samples, scale, seed, (name,)).features[name]
        columns = {"guidance": scale, "guidance_from": "search"}
        found[scale] = _fid(made, "fid_search", sample, name, reference, "train", **columns)
    best = min(found, key=found.__getitem__)
    side = {min(found): "lowest", max(found): "highest"}.get(best)
    reason = side and f"{side} of the candidates {', '.join(f'{scale:g}' for scale in sorted(found))}"
    columns = {"guidance": best, "guidance_from": "search", "extractor": name}
    columns |= {"extractor_hash": fidelity.extractor_hash(name), "n": protocol.search_samples}
    made.add("guidance_edge", float(side is not None), reason=reason, **columns)
    return best


def prints(codes: Tensor) -> Tensor:
    """A 64-bit fingerprint of each sequence, int64 [N] of codes int64 [N, L]: a random linear form modulo 2^64."""
    random = torch.Generator().manual_seed(1)
    weights = torch.randint(-(2**63), 2**63 - 1, (codes.shape[1],), generator=random)
    return (codes * weights).sum(1)


def copied(held: Tensor, codes: Codes, step: int = 2**16) -> float:
    """Share of fingerprints that occur among the cached training sequences."""
    known = torch.zeros(len(held), dtype=torch.bool)
    for start in range(0, codes.rows("train"), step):
        known |= torch.isin(held, prints(codes.take("train", slice(start, start + step))["codes"]))
    return float(known.double().mean())


def _compare(
    made: Measurement, sample: FeatureSet, name: str, train: Reference, heldout: Reference, neighbours: int
) -> None:
    """Every distance but the Frechet one, in one space."""
    shared = {"extractor": name, "extractor_hash": fidelity.extractor_hash(name), "n": sample.count}
    against = {"reference": "train", "reference_hash": train.hash}
    value, error = fidelity.kid(sample, train.features)
    made.add("kid", value, error=error, **shared, **against)
    precision, recall = fidelity.precision_recall(sample, train.features, neighbours)
    density, coverage = fidelity.density_coverage(sample, train.features, neighbours)
    four = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    for metric, number in four.items():
        made.add(metric, number, **shared, **against)
    for kind, reference in (("train", train), ("heldout", heldout)):
        number = fidelity.nearest(sample, reference.features)
        made.add(f"nearest_{kind}", number, **shared, reference=kind, reference_hash=reference.hash)
