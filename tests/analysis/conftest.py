"""Studies with known laws: what a plan and the tables would hold if gFID followed E + A C^-a, seed by seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import figures, published
from sweep.schema import VERSION, schema

EXTRACTORS = ("digits-supervised", "digits-contrastive")
SIZES = {"5k": 5_000, "25k": 25_000, "120k": 120_000, "600k": 600_000}


@dataclass
class Rate:
    """One tokenizer design and the law of its generators: gFID = E + A (C / 1e10)^-a on the best size."""

    tokens: int
    codebook: int
    asymptote: float
    amplitude: float
    exponent: float
    rfid: float
    usage: float = 0.8  # perplexity / K
    change: float = 0.04  # share by which rFID still fell over the last half of training

    @property
    def bits(self) -> float:
        return self.tokens * math.log2(self.codebook)

    def fid(self, flops: float) -> float:
        return self.asymptote + self.amplitude * (flops / 1e10) ** -self.exponent


RATES = (
    Rate(4, 64, 9.0, 14.0, 0.75, 7.0),
    Rate(16, 64, 3.5, 22.0, 0.55, 2.5),
    Rate(16, 256, 2.0, 40.0, 0.50, 1.2),
)


@dataclass
class Design:
    """What a synthetic study holds."""

    rates: tuple[Rate, ...] = RATES
    seeds: tuple[int, ...] = (0, 1)
    generator_seeds: tuple[int, ...] = (0,)
    evaluation_seeds: tuple[int, ...] = (0,)
    budgets: tuple[float, ...] = tuple(float(f"{b:.2e}") for b in np.geomspace(3e9, 3e11, 5))
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))
    tokenizer_sd: float = 0.06  # of ln gFID between tokenizer seeds
    generator_sd: float = 0.02
    noise_sd: float = 0.01
    guided: bool = False
    images: bool = True
    memorised: bool = False  # the smallest rate's smallest size passes its held-out minimum at the last budget
    diverged: int = 0  # generator runs without their last point
    by_steps: bool = False  # no targets: a point's compute depends on its size and rate
    flops_upstream: float = 2e11
    compact: bool = True
    seed: int = 0


class Parts:
    """Collects rows of the tables of one study and writes one part per run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, dict[tuple[str, str], list[dict[str, Any]]]()

    def add(self, table: str, run_id: str, rows: Iterable[dict[str, Any]], attempt: int = 0) -> None:
        common = {"study": self.folder.name, "run_id": run_id, "attempt": attempt}
        self.rows.setdefault((table, run_id), []).extend({**common, **row} for row in rows)

    def write(self, compact: bool) -> None:
        """One part per run, or (quicker to write and read) one compact file per table."""
        if not compact:
            for (table, run_id), rows in self.rows.items():
                write_part(self.folder, table, run_id, rows)
            return
        (self.folder / "compact").mkdir()
        for table in {name for name, _ in self.rows}:
            rows = [row for (name, _), held in self.rows.items() if name == table for row in held]
            kind = schema(table).with_metadata({"version": str(VERSION)})
            pq.write_table(pa.Table.from_pylist(rows, kind), self.folder / "compact" / f"{table}.parquet")


def write_part(folder: Path, table: str, run_id: str, rows: list[dict[str, Any]], name: str = "0-0000") -> Path:
    path = folder / "tables" / table / f"study={folder.name}" / f"run={run_id}" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = schema(table).with_metadata({"version": str(VERSION), "run_id": run_id})
    pq.write_table(pa.Table.from_pylist(rows, kind), path)
    return path


def _id(letter: str, *parts: object) -> str:
    return letter + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _picture(rng: np.random.Generator, label: int, blur: float) -> bytes:
    """An 8 x 8 grey blob that depends on its label, more noise for a coarser tokenizer."""
    rows, cols = np.mgrid[:8, :8]
    angle = 2 * math.pi * label / 10
    stroke = np.exp(-((np.cos(angle) * (rows - 3.5) + np.sin(angle) * (cols - 3.5)) ** 2) / (1.5 + blur))
    picture = 230 * stroke + 25 * blur * rng.standard_normal((8, 8))
    return np.clip(picture, 0, 255).astype(np.uint8).tobytes()


def build(folder: Path, design: Design | None = None, **changes: Any) -> Path:
    """Write a synthetic study into ``folder`` and return it."""
    design = design or Design(**changes)
    rng = np.random.default_rng(design.seed)
    folder.mkdir(parents=True, exist_ok=True)
    plan: list[dict[str, Any]] = []
    parts = Parts(folder)
    tokenizer_protocol, protocol, guided = "p-tokenizer", "p-unguided", "p-guided"
    diverged = design.diverged
    for rate in design.rates:
        for seed in design.seeds:
            run = _id("t", rate.tokens, rate.codebook, seed)
            about = {"tokenizer_family": "vq", "tokenizer_seed": seed, "tokens": rate.tokens, "codebook": rate.codebook}
            about |= {"bits_nominal": rate.bits, "data": "digits"}
            shift = math.exp(design.tokenizer_sd * rng.standard_normal())
            plan.append(
                {**about, "run_id": run, "stage": "tokenizer", "family": "vq", "seed": seed, "points": [1000, 2000]}
                | {"encode": [2000], "fields": json.dumps({"tokens": rate.tokens, "codebook": rate.codebook})}
                | {"flops_to_point": design.flops_upstream, "flops_encode": 1e9, "params_core": 100_000, "steps": 2000}
            )
            parts.add("runs", run, [{"stage": "tokenizer", "status": "done", "seed": seed}])
            for step in (1000, 2000):
                evaluation, checkpoint = _id("v", run, step), f"{run}@{step}"
                plan.append(
                    {**about, "run_id": evaluation, "stage": "evaluation", "checkpoint": checkpoint, "point": step}
                    | {"tokenizer": checkpoint, "tokenizer_steps": step, "protocol": "tokenizer", "evaluation_seed": 0}
                    | {"protocol_id": tokenizer_protocol}
                )
                late = 1.0 if step == 2000 else 1.0 + rate.change
                rows = _reconstruction(rate, late * shift, checkpoint, step, rng)
                parts.add("curves", evaluation, [{**row, "protocol_id": tokenizer_protocol} for row in rows])
                if design.images and step == 2000:
                    kinds = (("original", 0.0), ("reconstruction", 12 / rate.bits))
                    parts.add("images", evaluation, _images(kinds, checkpoint, step, rng, 10))
            for size, params in design.sizes.items():
                for generator_seed in design.generator_seeds:
                    generator = _id("g", run, size, generator_seed)
                    own = math.exp(design.generator_sd * rng.standard_normal())
                    built = {**about, "tokenizer": f"{run}@2000", "tokenizer_steps": 2000, "generator": generator}
                    built |= {"generator_family": "llama", "generator_size": size, "generator_seed": generator_seed}
                    points = [round(budget / params / 600) for budget in design.budgets]
                    plan.append(
                        {**built, "run_id": generator, "stage": "generator", "family": "llama", "points": points}
                        | {"params_core": params, "params_total": params + 5_000, "batch": 64, "lr": 1e-3}
                        | {"flops_upstream": design.flops_upstream, "flops_encode": 0.0, "fields": "{}"}
                    )
                    broken = diverged > 0 and size == "600k"
                    diverged -= broken
                    parts.add("runs", generator, [{"stage": "generator", "status": "diverged" if broken else "done"}])
                    for j, (budget, step) in enumerate(zip(design.budgets, points, strict=True)):
                        flops = budget * (1 + 0.004 * rng.uniform(-1, 1))
                        if design.by_steps:
                            flops = budget * (params / 25_000) ** 0.3 * rate.tokens**0.2
                        best = math.log(20_000) + 0.5 * math.log(flops / 3e9)  # the size that this compute suits
                        penalty = 1 + 0.06 * (math.log(params) - best) ** 2
                        last = j == len(design.budgets) - 1
                        memorised = design.memorised and last and size == "5k" and rate is design.rates[0]
                        for k in design.evaluation_seeds:
                            modes = ["unguided"] + (["guided"] if design.guided and last and k == 0 else [])
                            for mode in modes:
                                evaluation = _id("v", generator, step, mode, k)
                                name = guided if mode == "guided" else protocol
                                checkpoint = f"{generator}@{step}"
                                plan.append(
                                    {**built, "run_id": evaluation, "stage": "evaluation", "point": step}
                                    | {"checkpoint": checkpoint, "protocol": mode, "protocol_id": name}
                                    | {"flops_target": None if design.by_steps else budget}
                                    | {"flops_to_point": flops, "evaluation_seed": k}
                                    | {"flops_sample": 2.0 * params * rate.tokens * 1000, "flops_upstream": 9e99}
                                )
                                if broken and last:
                                    continue
                                noise = math.exp(design.noise_sd * rng.standard_normal())
                                law = rate.fid(flops) * penalty * shift * own * noise
                                bits = (0.55 + 0.5 * (flops / 1e9) ** -0.35) * rate.bits * (1 + 0.1 * (penalty - 1))
                                if memorised:
                                    bits *= 1.4
                                if mode == "guided":
                                    law *= 0.7
                                rows = _samples(law, bits * own * shift**0.1, mode, checkpoint, step, flops, k, rng)
                                rows = [{**row, "protocol_id": name, "protocol": mode} for row in rows]
                                parts.add("curves", evaluation, rows)
                                if design.images and mode == "unguided" and last and k == design.evaluation_seeds[0]:
                                    kinds = (("sample", 12 / rate.bits + 2e5 / (params + 1e5) * 0.4),)
                                    parts.add("images", evaluation, _images(kinds, checkpoint, step, rng, 16))
    for row in plan:
        row["study"] = folder.name
    kind = schema("plan").with_metadata({"version": str(VERSION)})
    pq.write_table(pa.Table.from_pylist(plan, kind), folder / "plan.parquet")
    (folder / "plan.lock.json").write_text(json.dumps({"version": VERSION}))
    parts.write(design.compact)
    return folder


def _reconstruction(rate: Rate, factor: float, checkpoint: str, step: int, rng: Any) -> list[dict[str, Any]]:
    common = {"checkpoint": checkpoint, "step": step, "split": "heldout", "n": 1000, "protocol": "tokenizer"}
    mse = 0.9 * 2 ** (-rate.bits / 30) * 0.1
    plain = {"mse": mse, "psnr": -10 * math.log10(mse / 4), "ssim": 1 - mse, "usage": 1.0, "residual_bits": 4e3 * mse}
    plain |= {
        "perplexity": rate.usage * rate.codebook,
        "bits_used": rate.tokens * math.log2(rate.usage * rate.codebook),
    }
    rows = [{**common, "metric": metric, "value": value} for metric, value in plain.items()]
    for scale, extractor in zip((1.0, 3.0), EXTRACTORS, strict=True):
        known = {**common, "extractor": extractor, "extractor_hash": "x" * 12, "reference_hash": "r" * 12}
        value = rate.rfid * factor * scale * math.exp(0.01 * rng.standard_normal())
        rows.append({**known, "metric": "fid", "value": value, "reference": "heldout"})
        rows.append({**known, "metric": "fid", "value": value + 0.4 * scale, "reference": "train"})
        rows.append({**known, "metric": "fid_data", "value": 0.5 * scale, "reference": "train"})
        rows.append({**known, "metric": "fid_train", "value": 0.4 * scale, "reference": "train", "split": "train"})
    return rows


def _samples(
    fid: float, bits: float, mode: str, checkpoint: str, step: int, flops: float, seed: int, rng: Any
) -> list[dict[str, Any]]:
    common = {"checkpoint": checkpoint, "step": step, "flops": flops, "seed": seed, "weights": "ema"}
    guidance = {"guidance": 1.5, "guidance_from": "search"} if mode == "guided" else {"guidance": 1.0}
    rows: list[dict[str, Any]] = [
        {**common, "metric": "nll_bits", "value": bits, "split": "heldout", "n": 2000},
        {**common, "metric": "nll_bits", "value": 0.97 * bits, "split": "train", "n": 2000},
    ]
    for scale, power, extractor in zip((1.0, 3.0), (1.0, 0.9), EXTRACTORS, strict=True):
        value = scale * fid**power * math.exp(0.02 * rng.standard_normal() * (scale - 1) / 2)
        known = {**common, **guidance, "extractor": extractor, "extractor_hash": "x" * 12, "reference_hash": "r" * 12}
        rows.append({**known, "metric": "fid", "value": value, "reference": "train", "n": 1000, "error": 0.01 * value})
        rows.append({**known, "metric": "kid", "value": value / 100, "reference": "train", "n": 1000})
    if mode == "guided":
        tried = {**common, "guidance_from": "search", "extractor": EXTRACTORS[0], "reference": "train", "n": 500}
        rows += [{**tried, "metric": "fid_search", "value": fid * (1 + g), "guidance": g} for g in (1.0, 1.5, 2.0)]
        rows.append({**tried, "metric": "guidance_edge", "value": 0.0, "guidance": 1.5, "reference": None})
    rows.append({**common, "metric": "precision", "value": None, "reason": "not asked for", "n": 1000})
    return rows


def _images(
    kinds: tuple[tuple[str, float], ...], checkpoint: str, step: int, rng: Any, count: int
) -> list[dict[str, Any]]:
    size = {"height": 8, "width": 8, "channels": 1, "checkpoint": checkpoint, "step": step}
    return [
        {**size, "kind": kind, "index": i, "label": i % 10, "guidance": 1.0, "pixels": _picture(rng, i % 10, blur)}
        for kind, blur in kinds
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three rates, two tokenizer seeds, four sizes, five budgets; read it, do not change it."""
    return build(tmp_path_factory.mktemp("results") / "digits", guided=True, memorised=True, diverged=1)


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """Builds studies of other designs: ``make_study(seeds=(0, 1, 2), tokenizer_sd=0.0)``."""
    return lambda name="digits", **changes: build(tmp_path / name, **{"images": False, **changes})


@pytest.fixture(scope="session")
def rate() -> type[Rate]:
    return Rate


@pytest.fixture(scope="session")
def part() -> Callable[..., Path]:
    """Writes one part of a table."""
    return write_part


@pytest.fixture
def agg(monkeypatch):
    """Figures are drawn without a screen, small, and all closed in the end."""
    matplotlib.use("Agg")
    monkeypatch.setattr(figures, "DPI", 50)
    yield
    assert not plt.get_fignums()


@pytest.fixture(scope="session")
def replication():
    """The 240 points of the Chinchilla replication (Besiroglu et al., arXiv 2404.10102): [N, D] and loss."""
    held = published.table("chinchilla").filter(pl.col("loss") < 3.446995430227908)
    n, flops = held["model_size"].to_numpy(), held["flops"].to_numpy()
    return np.stack([n, flops / (6 * n)], axis=-1), held["loss"].to_numpy()
