"""Do intervals cover what they say? Simulated studies with known truths, each interval the one ``analysis.fit`` gives.

    python -m analysis.coverage results/coverage        # a quarter of an hour on two cores

A cell is a design and a truth y = E + x^-a, fitted in many trials by the saturating law. Per cell and quantity (the
exponent, the asymptote, the law ten times beyond the largest x): the share of all trials whose 95 % interval covers the
truth (none counts as a miss), the share in which the engine calls the interval identified, coverage among those, and
the median width. A cell is identified where the engine says so in more than a tenth of its trials; in the others it has
said "not identified" in nine of ten at least. What coverage is among identified trials alone shows what that choice
costs: where few trials of a cell are identified, they are those whose residuals happen to be small.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.estimate import estimate
from analysis.forms import FORMS
from analysis.interval import LEVEL
from analysis.laws import Array

TRIALS = 2000
SAID = 0.1  # share of trials that has to be called identified for the cell to count as such
BAND = (0.92, 0.98)  # coverage that a nominal 95 % interval should have
EXPONENTS, SHARES, DECADES, NOISES = (0.1, 0.2, 0.35, 0.5, 0.8), (0.0, 0.1, 0.5, 0.8), (2, 3, 4), (0.03, 0.1, 0.2)
STEP = 1 / 3  # decades between the checkpoints of a run

EXPLAINED = """
cells       truths of a design; identified: those where the engine quotes its interval in more than a tenth of trials
least, most coverage of nominal 95 % intervals in these cells, all trials (Monte-Carlo error up to {error:.3f})
outside     how many of these lie outside {low:.0%} to {high:.0%}
given       coverage among identified trials alone, over all cells
said        least share of trials called "not identified" in the other cells
width       median, as a share of the exponent, of the metric at the largest x, or of the metric ten times beyond"""

Noise = Callable[[np.random.Generator, tuple[int, int], Array], Array]


@dataclass(frozen=True)
class Design:
    """Where points lie: ``n`` values of x over the decades; ``clusters`` of ``size`` points each."""

    kind: str  # independent, seeds (runs of their own at each x), checkpoints (of runs), tokenizers (each with a curve)
    n: int
    clusters: int | None = None

    @property
    def name(self) -> str:
        return {
            "independent": f"{self.n}",
            "seeds": f"{self.n} x 3 seeds",
            "checkpoints": f"{self.clusters} runs x {self.n} checkpoints",
            "tokenizers": f"{self.clusters} tokenizers x {self.n} budgets",
        }[self.kind]

    def points(self, decades: float) -> tuple[Array, NDArray[np.intp] | None]:
        """x [n], the cluster of each point or None; the largest x is 10^decades, whatever the design."""
        along = np.geomspace(1.0, 10.0**decades, self.n)
        if self.kind == "independent":
            return along, None
        if self.kind == "seeds":
            return np.repeat(along, 3), None
        assert self.clusters is not None
        if self.kind == "tokenizers":
            return np.tile(along, self.clusters), np.repeat(np.arange(self.clusters), self.n)
        ends = np.geomspace(1.0, 10.0**decades, self.clusters)
        back = 10.0 ** (-STEP * np.arange(self.n)[::-1])
        return (ends[:, None] * back).ravel(), np.repeat(np.arange(self.clusters), self.n)


@dataclass(frozen=True)
class Truth:
    """y = E + x^-a with ``share`` of E in y at the largest x; relative noise of points and of clusters."""

    exponent: float
    share: float
    decades: float
    noise: float
    spread: float = 0.0  # of clusters, on top
    wrong: str = "none"  # what the fitted law does not know about


def _normal(rng: np.random.Generator, shape: tuple[int, int], x: Array) -> Array:
    return np.asarray(rng.standard_normal(shape))


def _heavy(rng: np.random.Generator, shape: tuple[int, int], x: Array) -> Array:
    return np.asarray(rng.standard_t(4, shape) / math.sqrt(2.0))


def _growing(rng: np.random.Generator, shape: tuple[int, int], x: Array) -> Array:
    """Three times as much noise at the smallest x as at the largest."""
    return np.asarray(rng.standard_normal(shape) * 3.0 ** (1.0 - np.log(x) / np.log(x).max()))


WRONG: dict[str, tuple[Noise, float]] = {  # noise, and the share of a further term x^-2a at the smallest x
    "none": (_normal, 0.0),
    "heavy tails (t, 4 dof)": (_heavy, 0.0),
    "noise grows towards small x": (_growing, 0.0),
    "a further term x^-2a": (_normal, 0.3),
}


def cells() -> Iterator[tuple[Design, Truth]]:
    """All designs and truths of the table."""
    truths = [Truth(*each) for each in itertools.product(EXPONENTS, SHARES, DECADES, NOISES)]
    for design in [*(Design("independent", n) for n in (5, 6, 8, 12, 24)), Design("seeds", 6)]:
        yield from ((design, truth) for truth in truths)
    grouped = [
        Truth(a, share, 3, noise, spread)
        for a, share, (spread, noise) in itertools.product(
            EXPONENTS[1:], SHARES, ((0.02, 0.03), (0.05, 0.03), (0.1, 0.05), (0.2, 0.1))
        )
    ]
    runs = [Design("checkpoints", m, g) for g, m in ((4, 5), (5, 4), (6, 4), (7, 4), (8, 4), (12, 3), (24, 3))]
    for design in runs + [Design("tokenizers", n, s) for s, n in ((2, 6), (3, 5), (3, 8), (5, 6))]:
        yield from ((design, truth) for truth in grouped)
    for wrong in list(WRONG)[1:]:
        for n, a, share in itertools.product((6, 12), (0.35, 0.5), (0.1, 0.5)):
            yield Design("independent", n), Truth(a, share, 3, 0.05, wrong=wrong)


def cell(design: Design, truth: Truth, trials: int, seed: int) -> list[dict[str, Any]]:
    """One row per quantity."""
    law, rng = FORMS["saturating"], np.random.default_rng(seed)
    x, codes = design.points(truth.decades)
    noise, further = WRONG[truth.wrong]
    top = 10.0**truth.decades
    asymptote = top**-truth.exponent * truth.share / (1 - truth.share)

    def exact(at: Array) -> Array:
        return np.asarray(asymptote + at**-truth.exponent + further * at ** (-2 * truth.exponent))

    off = truth.noise * noise(rng, (trials, len(x)), x)
    if codes is not None:
        off = off + truth.spread * rng.standard_normal((trials, int(codes.max()) + 1))[:, codes]
    y = exact(x) * np.exp(off)
    found = estimate(law, x[None, :, None], y, np.ones_like(y), codes=codes)
    ends, beyond = found.parameters(), np.array([[10.0 * top]])
    ahead = found.curve(beyond)
    rows = []
    for quantity, held, i, value, unit in (
        ("exponent", ends, law.parameters.index("a"), truth.exponent, truth.exponent),
        ("asymptote", ends, law.parameters.index("E"), asymptote, exact(np.array([top]))[0]),
        ("ten times beyond", ahead, 0, exact(beyond[0])[0], exact(beyond[0])[0]),
    ):
        low, high, sure = held.low[:, i], held.high[:, i], held.identified[:, i]
        covers = (low <= value) & (value <= high)  # a missing end compares as False
        covered, count = float(covers.mean()), int(sure.sum())
        rows.append(
            {
                "design": design.name,
                "kind": design.kind,
                "n": len(x),
                "clusters": design.clusters,
                **asdict(truth),
                "quantity": quantity,
                "truth": float(value),
                "method": found.method,
                "level": LEVEL,
                "trials": trials,
                "seed": seed,
                "covered": covered,
                "covered_error": math.sqrt(max(covered * (1 - covered), 0.25 / trials) / trials),
                "identified": count / trials,
                "covered_identified": float(covers[sure].mean()) if count else None,
                "none": float(np.isnan(low).mean()),
                "width": float(np.nanmedian(high - low) / unit) if np.isfinite(low).any() else None,
                "unit": float(unit),
            }
        )
    return rows


def _task(given: tuple[Design, Truth, int, int]) -> list[dict[str, Any]]:
    return cell(*given)


def table(trials: int = TRIALS) -> pl.DataFrame:
    """Every cell of ``cells``, in their order; the seed of a cell is its place."""
    given = [(*each, trials, place) for place, each in enumerate(cells())]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        made = list(pool.map(_task, given, chunksize=8))
    return pl.DataFrame([row for rows in made for row in rows], infer_schema_length=None)


def summary(held: pl.DataFrame) -> pl.DataFrame:
    """Per design and quantity: cells, those called identified and their coverage, and the least share of "not"."""
    sure = pl.col("identified") > SAID
    wrong = pl.when(pl.col("wrong") != "none").then(pl.col("design") + ", " + pl.col("wrong"))
    named = held.with_columns(wrong.otherwise("design").alias("points"))
    return named.group_by("points", "quantity", maintain_order=True).agg(
        pl.len().alias("cells"),
        sure.sum().alias("identified"),
        pl.col("covered").filter(sure).min().alias("least"),
        pl.col("covered").filter(sure).max().alias("most"),
        (~pl.col("covered").filter(sure).is_between(*BAND)).sum().alias("outside"),
        # of all identified trials of the design, wherever they fall
        ((pl.col("covered_identified") * pl.col("identified")).sum() / pl.col("identified").sum()).alias("given"),
        (1 - pl.col("identified")).filter(~sure).min().alias("said"),
        pl.col("width").filter(sure).median().alias("width"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="where coverage.parquet is written, for example results/coverage")
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"per cell (default: {TRIALS})")
    given = parser.parse_args(argv)
    if given.trials < 1:
        print(f"--trials: got {given.trials}; one at least", file=sys.stderr)
        return 2
    held = table(given.trials)
    folder = Path(given.folder)
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / ".coverage.parquet.tmp"
    held.write_parquet(staged)
    staged.replace(folder / "coverage.parquet")
    options: dict[str, Any] = {"tbl_rows": -1, "tbl_cols": -1, "tbl_width_chars": 200, "fmt_str_lengths": 60}
    hidden: dict[str, Any] = {"tbl_hide_dataframe_shape": True, "tbl_hide_column_data_types": True}
    with pl.Config(**options, **hidden, tbl_formatting="NOTHING"):
        numbers = pl.selectors.float().fill_nan(None).round(3).cast(pl.String).fill_null("-")
        print(summary(held).with_columns(numbers))
    print(EXPLAINED.format(error=held["covered_error"].max(), low=BAND[0], high=BAND[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
