"""What does a run cost? FLOPs by part, memory, disk, and device-hours: arithmetic, no torch.

FLOPs are counted by the families (``models.config``); everything is float64. Hours come from a band of model FLOP
utilisation at a stated peak, or from runs of about the same size that are done. Memory and disk are estimates: they
leave out workspaces of convolutions and fragmentation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

import pyarrow.parquet as pq

from models import config
from models.config import DataFields, Latent, Protocol, Recipe, Runtime
from sweep import rundir
from sweep.sections import Price

GIB = 2.0**30
PROCESS_GIB = 0.6  # interpreter, torch, allocator
FEATURES = 2048  # numbers per image and extractor that stay in memory (Inception's; ours are smaller)
WEIGHTS, GRADIENTS, MOMENTS = 4, 4, 8  # bytes per parameter: float32 weights and gradients, AdamW's two moments
CASTS = 2  # bytes per parameter: its bfloat16 copy, which autograd keeps from forward to backward
NEAR = 1.2  # a measured throughput serves models whose parameters differ by less than this factor


class Counts(NamedTuple):
    """What one module counts; ``training`` is FLOPs of one image in one step, forward and backward."""

    params_core: int
    params_total: int
    forward: float
    training: float
    activations: float


def counts(fields: config.Family, data: DataFields, latent: Latent) -> Counts:
    """Counts of a module that sees ``data``, or, if it is a generator, ``latent``."""
    if isinstance(fields, config.GeneratorFields):
        params, flops = fields.params(latent, data.labels), fields.flops(latent, data.labels)
        activations = fields.activations(latent, data.labels)
    else:
        plain = cast(config.TokenizerFields, fields)
        params, flops, activations = plain.params(data), plain.flops(data), plain.activations(data)
    return Counts(params.core, params.total, flops.forward, flops.train, float(activations))


def images_unique(data: DataFields, cached: bool) -> int | None:
    """Different training images before augmentation; None where they never repeat.

    ``cached`` says that codes are read from a cache, which is finite whatever the source.
    """
    unique = data.images("train")
    return data.images_cached("train") if unique is None and cached else unique


def encoding(tokenizer: config.TokenizerFields, data: DataFields) -> float:
    """FLOPs to encode the code cache of one tokenizer checkpoint, making the images included."""
    images = data.images_cached("train") + data.images_cached("heldout")
    return images * (tokenizer.flops_encode(data) + data.flops_image)


class Measuring(NamedTuple):
    """FLOPs of one evaluation."""

    sample: float  # latents from the generator, guidance search included
    measure: float  # losses, decoding, metric features


def measuring(
    protocol: Protocol,
    measured: config.Family,
    tokenizer: config.TokenizerFields | None,
    counted: Counts,
    data: DataFields,
    latent: Latent,
) -> Measuring:
    """FLOPs of measuring one checkpoint once, references left out.

    A tokenizer encodes as many held-out images as are cached, or as samples where these are more, and decodes the
    samples. Losses of a generator are taken over ``SEQUENCES`` cached images of each split; a search samples every
    scale.
    """
    heldout = data.images_cached("heldout")
    images = float(protocol.samples)
    if isinstance(measured, config.TokenizerFields):
        coded = max(heldout, images) * measured.flops_encode(data) + images * measured.flops_decode(data)
        return Measuring(0.0, coded + images * features(protocol))
    if not isinstance(measured, config.GeneratorFields):
        return Measuring(0.0, (heldout + images) * counted.forward + images * features(protocol))
    # what a search will choose is not known; above 1 is the costly and the likely case
    final = protocol.guidance[0] if len(protocol.guidance) == 1 else 2.0
    draws = [(images, final)]
    if len(protocol.guidance) > 1:
        draws += [(float(protocol.search_samples), scale) for scale in protocol.guidance]
    sample = sum(count * measured.flops_sample(latent, data.labels, scale != 1) for count, scale in draws)
    decode = tokenizer.flops_decode(data) if tokenizer else 0.0
    drawn = sum(count for count, _ in draws)
    scored = min(config.SEQUENCES, heldout) + min(config.SEQUENCES, data.images_cached("train"))
    return Measuring(sample, scored * counted.forward + drawn * (decode + features(protocol)))


def references(protocol: Protocol, data: DataFields) -> float:
    """FLOPs of the real images of a protocol, once per study: two references and a draw for the floor."""
    return 3.0 * protocol.samples * (features(protocol) + data.flops_image)


def features(protocol: Protocol) -> float:
    """FLOPs of all metric features of one image."""
    return sum(known.flops_image if (known := extractor(name)) else 0.0 for name in protocol.extractors)


def extractor(name: str) -> config.Extractor | None:
    """The embedded or known extractor behind a name (``inception-v3-compat:/path`` included); None for others."""
    return config.EXTRACTORS.get(name) or config.EXTRACTORS.get(name.partition(":")[0])


def memory_training(counted: Counts, recipe: Recipe, runtime: Runtime) -> float:
    """GiB per device while training: weights, gradients, moments, weight average, activations of a micro-batch.

    With P parameters on n devices, each holds P (4 + 4 + 8 + 4) bytes of these, of a sharded run one n-th: stage 3 of
    ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, sec. 5.3), the average included. What a sharded run gathers for a
    block at a time is left out. Casts to bfloat16, 2 P bytes, are made from gathered weights and whole on each device.
    """
    images = runtime.micro_batch or recipe.batch / runtime.devices
    half = recipe.precision == "bfloat16"
    state = WEIGHTS + GRADIENTS + MOMENTS + (WEIGHTS if recipe.ema else 0)
    held = state / (runtime.devices if runtime.shard else 1) + (CASTS if half else 0)
    activations = counted.activations * images * (2 if half else 4)
    return PROCESS_GIB + (counted.params_total * held + activations) / GIB


def sharding(counted: Counts, recipe: Recipe, runtime: Runtime, mem_gib: float | None) -> Runtime:
    """The runtime with ``shard`` decided: where the grid leaves it open, whether whole state is too much for a device.

    ``mem_gib`` is what a device has, None if the grid does not say.
    """
    if runtime.shard is not None:
        return runtime
    whole = runtime.model_copy(update={"shard": False})
    if runtime.devices == 1 or mem_gib is None or memory_training(counted, recipe, whole) <= mem_gib:
        return whole
    return runtime.model_copy(update={"shard": True})


PACKED_H = 1.0  # longest run that shares a device unasked: a long one is large enough to fill it
PACKED = 8  # runs at the most that do
FILLED = 0.9  # of a device's memory


def packing(runtime: Runtime, mem_gib: float, hours: float, device_gib: float | None) -> Runtime:
    """The runtime with ``pack`` decided: where the grid leaves it open, as many short runs as a GPU's memory holds.

    ``mem_gib`` and ``hours`` are what one run takes, ``device_gib`` what a device has, None if the grid does not say.
    Powers of 2, so that not every size asks for a kind of job of its own.
    """
    if runtime.pack is not None:
        return runtime
    alone = runtime.devices > 1 or runtime.device == "cpu" or device_gib is None or hours > PACKED_H
    fits = 1 if alone else int(FILLED * (device_gib or 0.0) / mem_gib)
    return runtime.model_copy(update={"pack": 2 ** int(math.log2(max(1, min(fits, PACKED))))})


def memory_measuring(
    protocol: Protocol,
    measured: config.Family,
    modules: Iterable[Counts],
    data: DataFields,
    latent: Latent,
    runtime: Runtime,
) -> float:
    """GiB while measuring: weights, one batch's activations or keys and values, features of samples and reference."""
    modules = list(modules)
    weights = sum(float(module.params_total) * WEIGHTS for module in modules)
    # without a backward pass about a tenth of the stored activations lives at once
    activations = max(module.activations for module in modules) * runtime.measure_batch * 4 / 10
    state = 0.0
    if isinstance(measured, config.GeneratorFields):
        state = measured.state_sample(latent, max(protocol.guidance) > 1) * runtime.measure_batch * 4
    pixels = data.channels * data.resolution**2 + 4.0 * FEATURES * len(protocol.extractors)
    return PROCESS_GIB + (weights + max(activations, state) + 3.0 * protocol.samples * pixels) / GIB


def disk_training(counted: Counts, recipe: Recipe, points: int) -> float:
    """GiB of checkpoints: the last two resumable ones (and the trunk's before a branch), weights at each point."""
    average = WEIGHTS if recipe.ema else 0
    resumable = (3 if recipe.schedule == "wsd" else 2) * (WEIGHTS + MOMENTS + average)
    return counted.params_total * float(resumable + points * (WEIGHTS + average)) / GIB


def disk_codes(data: DataFields, latent: Latent) -> float:
    """GiB of one code cache: ids (2 bytes up to 65,536 codes), label and index."""
    size = 4 * (latent.channels or 1) if latent.codebook is None else 2 if latent.codebook <= 2**16 else 4
    rows = float(data.images_cached("train") + data.images_cached("heldout"))
    return rows * (latent.tokens * size + 12) / GIB


# --- hours -----------------------------------------------------------------------------------------------------


class Hours(NamedTuple):
    low: float
    high: float
    source: str  # "band" or "measured"


class Throughput(NamedTuple):
    """FLOP/s of one device in a run that is done."""

    stage: str
    family: str
    params_total: int
    flops_per_s: float


class Rates:
    """FLOPs to device-hours: by the band, or by what runs of the same stage, family and about the same size gave."""

    def __init__(self, price: Price, measured: Iterable[Throughput] = ()) -> None:
        self.price = price
        self.measured: dict[tuple[str, str], list[Throughput]] = {}
        for one in measured:
            self.measured.setdefault((one.stage, one.family), []).append(one)
        self._found: dict[tuple[str, str, int], tuple[float, float, str]] = {}

    def _rates(self, stage: str, family: str, params_total: int) -> tuple[float, float, str]:
        key = stage, family, params_total
        if key not in self._found:
            near = [
                one.flops_per_s
                for one in self.measured.get((stage, family), ())
                if 1 / NEAR < one.params_total / max(params_total, 1) < NEAR
            ]
            peak = self.price.peak_tflops * 1e12
            band = (peak * self.price.mfu[0], peak * self.price.mfu[1], "band")
            self._found[key] = (min(near), max(near), "measured") if near else band
        return self._found[key]

    def hours(self, stage: str, family: str, params_total: int, flops: float, devices: int = 1) -> Hours:
        """Device-hours of a run on ``devices`` devices, its start-up included."""
        slow, fast, source = self._rates(stage, family, params_total)
        waste = devices * self.price.overhead_s
        if source == "measured":  # the rate of all its devices together
            slow, fast = slow / devices, fast / devices
        return Hours((flops / fast + waste) / 3600, (flops / slow + waste) / 3600, source)


def measured(study: Path) -> tuple[list[Throughput], list[str]]:
    """Throughputs of the runs that are done, and the files that could not be read.

    The compact table is preferred; parts are read where there is none.
    """
    compact = rundir.compact_file(study, "runs")
    parts = (
        [compact] if compact.exists() else sorted(rundir.table_folder(study, "runs").glob("study=*/run=*/*.parquet"))
    )
    found: list[Throughput] = []
    unread: list[str] = []
    names = ["stage", "family", "status", "params_total", "flops_per_s", "flops_paid", "wall_s"]
    for part in parts:
        try:
            rows = pq.ParquetFile(part).read(columns=names).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            unread.append(f"{part}: {' '.join(str(error).split())[:120]}")
            continue
        for row in rows:
            rate = row["flops_per_s"]
            if rate is None and row["flops_paid"] and row["wall_s"]:  # evaluations take no steps
                rate = row["flops_paid"] / row["wall_s"]
            if row["status"] == "done" and rate and row["params_total"]:
                found.append(Throughput(row["stage"], row["family"], row["params_total"], rate))
    return found, unread
