"""What is one rate's curve: tokenizer seeds x sizes x generator seeds x budgets, and its lower envelope?

An arm holds the points of one rate under one named sum of compute. Its curve is, per tokenizer seed, the lowest value
over generator sizes at each budget. Tokenizer seeds are the unit of every interval, so envelopes are taken of resampled
arms, and the search over sizes is repeated in each.

Budgets are the FLOP targets of the plan. Where it was made by steps instead, no two sizes or rates share a compute, so
each run's curve is interpolated onto a geometric grid that all of them share (``budgets``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import polars as pl
from numpy.typing import NDArray

from analysis.laws import Array
from analysis.load import differing
from analysis.refusal import Refusal

Sum = Literal["generator", "total", "inference"]
A_DECADE = 4  # budgets per decade of compute where points were planned by their steps
ROUNDING = 1e-9  # of ln FLOPs: a grid value this close to the end of a curve is its end
RUN = ("tokenizer_seed", "size", "generator_seed", "evaluation_seed")  # what a curve over compute belongs to
ARRAYS = ("x", "select", "report", "measured")


def budgets(frame: pl.DataFrame) -> list[float]:
    """FLOPs at which curves of these points are compared: their targets, or a grid where a point has none.

    The grid is 10^(k/4) within the range of ``flops_to_point``: absolute, so that all rates and sizes share it.
    """
    if frame.is_empty():
        return []
    if not frame["flops_target"].null_count():
        return frame["flops_target"].unique().sort().to_list()
    low, high = (A_DECADE * math.log10(end) for end in (frame["flops_to_point"].min(), frame["flops_to_point"].max()))  # type: ignore[arg-type]
    return [10.0 ** (k / A_DECADE) for k in range(math.ceil(low - ROUNDING), math.floor(high + ROUNDING) + 1)]


def nearest(target: float | None, flops: float) -> tuple[float, ...]:
    """The budgets for which a measured point speaks: its target, or the grid's values on either side of its compute."""
    if target is not None:
        return (target,)
    k = A_DECADE * math.log10(flops)
    return tuple(10.0 ** (i / A_DECADE) for i in sorted({math.floor(k + ROUNDING), math.ceil(k - ROUNDING)}))


def compute(frame: pl.DataFrame, total: Sum = "generator", models: int = 1) -> pl.Series:
    """FLOPs of each point under a named sum.

    generator: training FLOPs of the path to the point. total: that plus stage 1 (training the tokenizer and encoding
    the data), shared by ``models`` generators. inference: sampling FLOPs per image; null where a guidance search is in
    the bill.
    """
    if total == "generator":
        return frame["flops_to_point"]
    if total == "total":
        upstream = pl.col("flops_upstream") + pl.col("flops_encode").fill_null(0.0)
        return frame.select((pl.col("flops_to_point") + upstream / models).alias("flops"))["flops"]
    single = pl.col("guidance_from").fill_null("fixed") != "search"
    return frame.select(pl.when(single).then(pl.col("flops_sample") / pl.col("samples")).alias("flops"))["flops"]


def describe(total: Sum, models: int = 1) -> str:
    """What a compute axis sums, in words."""
    shared = f"stage 1 shared by {models} generators" if models > 1 else "stage 1 for this generator alone"
    return {
        "generator": "generator training FLOPs",
        "total": f"training FLOPs, {shared}",
        "inference": "sampling FLOPs per image",
    }[total]


def named(extractor: str) -> str:
    """An extractor as people write it, from its column: digits_supervised gives digits-supervised."""
    return extractor.replace("_", "-")


def words(metric: str) -> str:
    """A metric's column in words: "gFID (digits-supervised)", "held-out bits per image"."""
    if metric == "nll_bits":
        return "held-out bits per image"
    if metric == "two_part_bits":
        return "two-part code (bits per image)"
    return f"gFID ({named(metric.removeprefix('fid_'))})" if metric.startswith("fid_") else metric


@dataclass(frozen=True)
class Arm:
    """One rate: logarithms by [tokenizer seed, size, generator seed, budget]; NaN where there is no point.

    ``select`` chooses the size, ``report`` is what is reported: other evaluation seeds where there are several
    (``fresh``), the same where there is one.
    """

    rate: str
    bits: float | None
    metric: str
    axis: str
    seeds: tuple[int, ...]
    sizes: tuple[str, ...]  # by parameters
    budgets: tuple[float, ...]
    x: Array
    select: Array
    report: Array
    measured: NDArray[np.bool_]  # [tokenizer seed, size, generator seed, budget]; also where a fit leaves the point out
    fresh: bool

    def take(self, seeds: Sequence[int] | None = None, below: float | None = None) -> Arm:
        """The same arm with these seeds, or with budgets below a value."""
        rows = [self.seeds.index(seed) for seed in (self.seeds if seeds is None else seeds)]
        cols = [i for i, budget in enumerate(self.budgets) if below is None or budget < below]
        cut = {name: getattr(self, name)[rows][..., cols] for name in ARRAYS}
        budgets = tuple(self.budgets[i] for i in cols)
        return replace(self, seeds=tuple(self.seeds[i] for i in rows), budgets=budgets, **cut)

    def valued(self) -> list[int]:
        """Seeds with a value somewhere: of one size and budget, chosen and reported."""
        there = np.isfinite(_mean(self.select, 2)) & np.isfinite(_mean(self.report, 2))
        return [seed for seed, values in zip(self.seeds, there, strict=True) if values.any()]

    def only(self, size: str) -> Arm:
        """The same arm with one generator size."""
        at = [self.sizes.index(size)]
        cut = {name: getattr(self, name)[:, at] for name in ARRAYS}
        return replace(self, sizes=(size,), **cut)


def _one(frame: pl.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        if column in frame.columns and frame[column].n_unique() > 1:
            raise Refusal("mixed_protocols", f"{column}: {frame[column].n_unique()} values among points of one curve")


def arm(frame: pl.DataFrame, rate: str, metric: str, total: Sum = "generator", models: int = 1) -> Arm:
    """The points of one rate as an arm; ``Refusal`` for mixed protocols, duplicates and non-positive values.

    Points that ``frame`` marks as ``past_minimum`` count as measured but have no value: no curve passes through them.
    Tokenizer seeds without any value are left out.

    Points without a FLOP target (a plan by steps) lie at another compute for each size and rate. The curve of each run
    (tokenizer seed x size x generator seed x evaluation seed) is then read at the budgets of ``budgets``, ln y linear
    in ln training FLOPs between neighbouring points of that run and never beyond its ends. Neighbouring values share
    measured points, so they are not independent of each other.
    """
    rows = frame.filter(pl.col("rate") == rate, pl.col(metric).is_not_null())
    if rows.is_empty():
        raise Refusal("too_few", f"{rate}: {metric} has not been measured")
    _one(rows, ["protocol_id", "samples", "extractors", "references"])
    if rows.select("checkpoint", "evaluation_seed").is_duplicated().any():
        raise Refusal("duplicate_run", f"{rate}: a checkpoint stands twice under one protocol and evaluation seed")
    if (rows[metric] <= 0).any():
        raise Refusal("non_positive", f"{rate}: {metric} has to be positive for a power law")
    flops = compute(rows, total, models)
    if flops.null_count():
        raise Refusal("no_compute", f"{rate}: {describe(total, models)} are not known for every point")
    rows = rows.with_columns(
        flops.alias("x"),
        pl.col(metric).log().alias("y"),
        pl.coalesce("generator_size", pl.col("params_core").cast(pl.String)).alias("size"),
        pl.col("tokenizer_seed").fill_null(0),
        pl.col("generator_seed").fill_null(0),
        pl.col("evaluation_seed").fill_null(0),
    )
    if "past_minimum" in rows.columns:
        rows = rows.with_columns(pl.when("past_minimum").then(math.nan).otherwise("y").alias("y"))
    sizes = rows.sort("params_core", nulls_last=True)["size"].unique(maintain_order=True).to_list()
    by_steps = rows["flops_target"].null_count() > 0
    twice = rows.filter(rows.select(*RUN, "point" if by_steps else "flops_target").is_duplicated())
    if len(twice):
        raise Refusal("mixed_designs", f"{rate}: generators of several designs at one size and budget, {_apart(twice)}")
    shared = budgets(rows)
    bits = rows["bits_nominal"][0]
    rows = _interpolated(rows, shared) if by_steps else rows.with_columns(pl.col("flops_target").alias("budget"))
    if rows.is_empty():
        raise Refusal("too_few", f"{rate}: no run planned by steps has points on either side of a compute of 10^(k/4)")
    seeds, generators, evaluations = (
        rows[column].unique().sort().to_list() for column in ("tokenizer_seed", "generator_seed", "evaluation_seed")
    )
    shape = (len(seeds), len(sizes), len(generators), len(shared), len(evaluations))
    x, y, measured = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, bool)
    for row in rows.iter_rows(named=True):
        at = (
            *(seeds.index(row["tokenizer_seed"]), sizes.index(row["size"]), generators.index(row["generator_seed"])),
            *(shared.index(row["budget"]), evaluations.index(row["evaluation_seed"])),
        )
        measured[at] = True
        if not math.isnan(row["y"]):
            x[at], y[at] = math.log(row["x"]), row["y"]
    fresh = len(evaluations) > 1
    found = Arm(
        rate=rate,
        bits=bits,
        metric=metric,
        axis=describe(total, models),
        seeds=tuple(seeds),
        sizes=tuple(sizes),
        budgets=tuple(shared),
        x=_mean(x, -1),
        select=y[..., 0] if fresh else _mean(y, -1),
        report=_mean(y[..., 1:] if fresh else y, -1),
        measured=np.asarray(measured.any(-1)),
        fresh=fresh,
    )
    held = found.valued()
    if not held:
        raise Refusal("too_few", f"{rate}: no tokenizer seed has a value of {metric} that a curve may pass through")
    return found.take(held)


def _interpolated(rows: pl.DataFrame, at: Sequence[float]) -> pl.DataFrame:
    """Every run's curve (columns RUN, budget, x, y) at the budgets between its ends; NaN beside a point without y."""
    found = [rows.select(*RUN, pl.col("flops_target").alias("budget"), "x", "y").clear()]
    for run, points in rows.sort("flops_to_point").group_by(*RUN, maintain_order=True):
        flops = points["flops_to_point"].to_numpy()
        low, high = flops[0] * (1 - ROUNDING), flops[-1] * (1 + ROUNDING)
        inside = [budget for budget in at if low <= budget <= high]
        # every sum of compute is linear in training FLOPs along one run
        x = np.interp(inside, flops, points["x"].to_numpy())
        y = np.interp(np.log(inside), np.log(flops), points["y"].to_numpy())
        columns = dict(zip(RUN, run, strict=True)) | {"budget": inside, "x": x, "y": y}
        found.append(pl.DataFrame(columns, schema=found[0].schema))
    return pl.concat(found)


def _apart(rows: pl.DataFrame) -> str:
    """What sets runs in one cell apart: the grid's axes where they are known, else their number."""
    texts = rows["axes"].drop_nulls().unique().to_list() if "axes" in rows.columns else []
    differ = differing([json.loads(text) for text in texts])
    return f"told apart by {', '.join(differ)}" if differ else f"{len(rows)} points"


def _mean(values: Array, axis: int) -> Array:
    """Mean over what is there; NaN where nothing is."""
    there = np.isfinite(values)
    count = there.sum(axis)
    return np.asarray(np.where(count > 0, np.where(there, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan))


class Envelope:
    """Lower envelopes of resampled arms: ln x, ln y and the chosen size, each [D, seeds, budgets]; NaN where empty."""

    def __init__(self, arm: Arm, seeds: NDArray[np.intp], rng: np.random.Generator | None = None) -> None:
        """``seeds [D, S]`` indexes the arm's seeds; with ``rng`` generator runs are resampled within each cell."""
        x, select, report = arm.x[seeds], arm.select[seeds], arm.report[seeds]
        count = arm.x.shape[2]
        if rng is not None and count > 1:
            picked = rng.integers(0, count, (*x.shape[:3], count))[..., None]
            x, select, report = (np.take_along_axis(v, picked, axis=3) for v in (x, select, report))
        x, select, report = (_mean(v, 3) for v in (x, select, report))  # [D, S, sizes, budgets]
        there = np.isfinite(select) & np.isfinite(report)
        best = np.argmin(np.where(there, select, np.inf), axis=2)[:, :, None]
        found = there.any(axis=2)
        self.x, self.y = (np.where(found, np.take_along_axis(v, best, axis=2)[:, :, 0], np.nan) for v in (x, report))
        self.size = np.where(found, best[:, :, 0], -1)
        first, last = np.argmax(there, axis=2), there.shape[2] - 1 - np.argmax(there[:, :, ::-1], axis=2)
        # the best size is the smallest or the largest one that was tried: the optimum may lie outside
        self.edge = found & ((self.size == first) | (self.size == last))

    def flat(self) -> tuple[Array, Array]:
        """ln x and ln y as [D, seeds x budgets]."""
        return self.x.reshape(len(self.x), -1), self.y.reshape(len(self.y), -1)


def same_candidates(*arms: Arm) -> list[Arm]:
    """Arms cut to the budgets they share and, at each, to the sizes measured for all their seeds: a fair search."""
    budgets = sorted(set.intersection(*(set(each.budgets) for each in arms)))
    sizes = [size for size in arms[0].sizes if all(size in each.sizes for each in arms)]
    cut = []
    for each in arms:
        grid = np.ix_(
            range(len(each.seeds)),
            [each.sizes.index(size) for size in sizes],
            range(each.x.shape[2]),
            [each.budgets.index(budget) for budget in budgets],
        )
        cut.append(
            replace(
                each,
                sizes=tuple(sizes),
                budgets=tuple(budgets),
                x=each.x[grid],
                select=each.select[grid],
                report=each.report[grid],
                measured=each.measured[grid],
            )
        )
    shared = np.logical_and.reduce([each.measured.any(2).all(0) for each in cut])[None, :, None, :]
    blank = [[np.where(shared, log, np.nan) for log in (each.x, each.select, each.report)] for each in cut]
    return [replace(each, x=x, select=select, report=y) for each, (x, select, y) in zip(cut, blank, strict=True)]


def candidates(arms: Sequence[Arm], size: str | None = None) -> list[Arm]:
    """Arms that may be compared, of one size or all: the same candidates, and seeds with a value in every arm.

    Empty where they share no seed, size and budget.
    """
    if size is not None:
        if any(size not in each.sizes for each in arms):
            return []
        arms = [each.only(size) for each in arms]
    seeds = sorted(set.intersection(*(set(each.seeds) for each in arms)))
    while seeds:
        cut = same_candidates(*(each.take(seeds) for each in arms))
        kept = sorted(set.intersection(*(set(each.valued()) for each in cut)))
        if kept == seeds:
            return cut
        seeds = kept  # fewer seeds may share more candidates
    return []


def identity(arm: Arm) -> NDArray[np.intp]:
    return np.arange(len(arm.seeds))[None]


def resampled(arm: Arm, picked: NDArray[np.intp], rng: np.random.Generator) -> tuple[Array, Array, NDArray[np.intp]]:
    """ln x, ln y of resampled envelopes, distinct ones once, and the row of each draw in ``picked [D, S]``.

    With one generator run per cell there is nothing to resample below the seeds, and few draws differ.
    """
    if arm.x.shape[2] > 1:
        return *Envelope(arm, picked, rng).flat(), np.arange(len(picked))
    distinct, row = np.unique(np.sort(picked, axis=1), axis=0, return_inverse=True)
    return *Envelope(arm, distinct).flat(), np.asarray(row).reshape(-1)


def envelope_table(arm: Arm) -> pd.DataFrame:
    """The envelope of each tokenizer seed, one row per budget."""
    envelope = Envelope(arm, identity(arm))
    held = []
    for i, seed in enumerate(arm.seeds):
        for j, budget in enumerate(arm.budgets):
            if not np.isfinite(envelope.y[0, i, j]):
                continue
            x, y = math.exp(envelope.x[0, i, j]), math.exp(envelope.y[0, i, j])
            held.append((seed, budget, x, y, arm.sizes[int(envelope.size[0, i, j])], bool(envelope.edge[0, i, j])))
    return pd.DataFrame(held, columns=["seed", "budget", "x", "y", "size", "edge"])


def mean_curve(arm: Arm) -> tuple[Array, Array]:
    """x and y of the geometric mean over seeds, at the budgets that all seeds have."""
    envelope = Envelope(arm, identity(arm))
    full = np.isfinite(envelope.y[0]).all(0)
    return np.exp(envelope.x[0].mean(0)[full]), np.exp(envelope.y[0].mean(0)[full])
