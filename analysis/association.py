"""Which property of an encoder predicts generation? Correlations over encoders with n, intervals and common subsets.

    python -m analysis.association FILE --x COL[,COL] --y COL[,COL] [--unit COL] [--cluster COL] [--common]

One unit (an encoder) is one point: its rows (seeds) are averaged first, column by column, and never count as n. Units
that are not independent (encoders of one family) come in clusters. The interval of r over n units, given k covariates:

- ``fisher`` (units are independent): z = atanh r with variance 1 / (n - k - 3); of ranks (1 + r^2 / 2) / (n - k - 3)
  (Bonett & Wright, Psychometrika 65, 2000).
- ``jackknife`` (the default with clusters): z with one cluster left out at a time, Student-t with clusters - 1.
- ``bootstrap``: BCa over resampled clusters or units (``scipy.stats.bootstrap``). In simulations with 5 to 27 clusters
  of three alike units it covered 87-93 % at a nominal 95 %, the jackknife 93-96 %, Fisher over the units 76-80 %.

Two correlations that share a variable are compared on the same units: r1 - r2 with an interval from those of both and
from the correlation between the two (Zou, Psychological Methods 12, 2007). Signs count: negate a column (``--derive``)
where one predictor is good when high and the other when low. Correlations over different units are not comparable;
``--common`` adds each over the units that have all columns.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from analysis import table
from analysis.interval import LEVEL
from analysis.laws import Array
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.table import TableError

LEAST = 4  # units, and one more per covariate: Fisher's variance is 1 / (n - k - 3)
LEAST_RESAMPLED = {"jackknife": 4, "bootstrap": 8}  # with fewer, resamples of two distinct clusters say r = +-1
DRAWS = 2000
PERFECT = 1 - 1e-12

Method = Literal["pearson", "spearman"]
Approach = Literal["fisher", "jackknife", "bootstrap"]
Limits = tuple[float | None, float | None, str | None]  # low, high, or why there is none

EXAMPLES = """examples:
  linear probe and spatial structure against gFID, with the encoders that have both beside all of them:
    python -m analysis.association encoders.csv --x lp,lds --y gfid --common
  three seeds per encoder, encoders of one family not independent, ranks:
    python -m analysis.association runs.parquet --x lds --y gfid --unit encoder --cluster family --method spearman
  does spatial structure say more than the probe does, and does their mean predict better than either?
    python -m analysis.association encoders.csv --x lds --y gfid --given lp
    python -m analysis.association encoders.csv --x lp,lds,both --y gfid --composite both=lp,lds --common

exit code: 0 where a correlation could be given, 2 for a wrong option or file, 3 where every one was refused"""


@dataclass(frozen=True)
class Units:
    """One value per unit and column [n], NaN where it is missing; ``clusters`` [n] holds each unit's cluster."""

    columns: Mapping[str, Array]
    clusters: NDArray[np.intp] | None = None
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def known(self, names: Sequence[str]) -> NDArray[np.bool_]:
        """Which units have all of these columns and composites, [n]."""
        bases = [base for name in names for base in self.composites.get(name, (name,))]
        missing = np.isnan(np.array([self.columns[base] for base in bases]))
        known: NDArray[np.bool_] = ~np.logical_or.reduce(missing)
        return known

    def values(self, name: str, kept: NDArray[np.bool_]) -> Array:
        """A column, or a composite scaled over the units that are kept. Raises ``Refusal`` for infinite ones."""
        bases = {base: self.columns[base][kept] for base in self.composites.get(name, (name,))}
        for base, values in bases.items():
            if infinite := int(np.isinf(values).sum()):
                raise Refusal("not_finite", f"{base} is infinite in {infinite} of {len(values)} units")
        return composite(list(bases.values())) if name in self.composites else bases[name]


@dataclass(frozen=True)
class Association:
    """r(x, y) over ``n`` units, or r(x, y) - r(minus, y) over the same; no limits for a ``reason``.

    ``n_groups``: clusters (None: none were named); ``dropped``: units without one of the values.
    """

    x: str
    y: str
    minus: str | None
    given: tuple[str, ...]
    method: Method
    estimate: float
    low: float | None
    high: float | None
    level: float
    n: int
    n_groups: int | None
    dropped: int
    interval_method: str
    reason: str | None


def collect(
    frame: pl.DataFrame,
    columns: Sequence[str],
    *,
    unit: str | None = None,
    cluster: str | None = None,
    composites: Mapping[str, tuple[str, ...]] | None = None,
) -> Units:
    """The mean of the known values of each column per unit (per row, without ``unit``).

    Raises ``TableError`` for columns that are not there, rows without a unit or cluster and a unit in two clusters.
    """
    for name, option in ((unit, "--unit"), (cluster, "--cluster")):
        if name is not None and (missing := table.column(frame, name, option).null_count()):
            raise TableError(f"{option}: {name!r} is missing in {missing} of {len(frame)} rows")
    rows = np.asarray(table.labels(frame, [unit], "--unit") if unit else range(len(frame)))
    names, index = np.unique(rows, return_inverse=True)
    held: dict[str, Array] = {}
    for name in dict.fromkeys(base for each in columns for base in (composites or {}).get(each, (each,))):
        values = table.numbers(frame, name, "column")
        there = ~np.isnan(values)
        counts = np.bincount(index[there], minlength=len(names))
        sums = np.bincount(index[there], values[there], minlength=len(names))
        held[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    if cluster is None:
        return Units(held, None, composites or {})
    labels = np.asarray(table.labels(frame, [cluster], "--cluster"))
    first = labels[np.unique(index, return_index=True)[1]]
    if (torn := labels != first[index]).any():
        row = int(np.argmax(torn))
        raise TableError(f"--cluster: {rows[row]!s} stands in {first[index[row]]!s} and in {labels[row]!s}")
    return Units(held, np.unique(first, return_inverse=True)[1], composites or {})


def composite(columns: Sequence[Array]) -> Array:
    """Mean of min-max-scaled columns, [n], as in the "mean of LP, LDS" of RAEv2 (arXiv 2605.18324).

    Its scale is that of the units given: over fewer units it is another composite. Intervals hold it fixed.
    """
    held = np.asarray(columns, np.float64)
    low, high = held.min(1, keepdims=True), held.max(1, keepdims=True)
    if (low == high).any():
        raise Refusal("constant", "a column that is the same in all units has no min-max scale")
    scaled: Array = ((held - low) / (high - low)).mean(0)
    return scaled


def associate(
    units: Units,
    x: str,
    y: str,
    *,
    minus: str | None = None,
    given: Sequence[str] = (),
    among: Sequence[str] = (),
    method: Method = "pearson",
    approach: Approach | None = None,
    level: float = LEVEL,
) -> Association:
    """r(x, y), with ``minus`` r(x, y) - r(minus, y); partial where covariates are ``given``.

    ``among``: columns that a unit must have as well. ``approach``: Fisher for independent units, jackknife for clusters
    and, in place of Fisher, for a difference of rank correlations, which has no formula. Raises ``Refusal``: fewer than
    four units (and one per covariate), infinite values, a column that is constant or fixed by the covariates, Fisher's
    interval for units in clusters.
    """
    names = [y, x] if minus is None else [y, x, minus]
    kept = units.known([*names, *given, *among])
    n, wanted = int(kept.sum()), ", ".join(dict.fromkeys([x, y, *names, *given, *among]))
    if n < LEAST + len(given):
        raise Refusal("too_few", f"{n} of {len(kept)} units have {wanted}; a correlation needs {LEAST + len(given)}")
    values = np.array([units.values(name, kept) for name in [*names, *given]])
    for name, column in zip([*names, *given], values, strict=True):
        if np.ptp(column) <= 1e-12 * np.abs(column).max():
            raise Refusal("constant", f"{name} is the same in all {n} units")
    clusters = np.arange(n) if units.clusters is None else units.clusters[kept]
    groups = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    if approach == "fisher" and len(groups) < n:
        raise Refusal("grouped", f"Fisher's interval takes units as independent; {n} units are {len(groups)} clusters")
    ranked = method == "spearman" and minus is not None
    if approach is None or (approach == "fisher" and ranked):
        approach = "jackknife" if ranked or units.clusters is not None else "fisher"
    sample = _Sample(values, len(names), groups, method, approach, level)
    found = sample.correlations(np.arange(n))
    if not np.isfinite(found).all():
        raise Refusal("collinear", f"the covariates ({', '.join(given)}) fix each other or a column of {wanted}")
    low, high, reason = sample.limits(1) if minus is None else sample.limits_of_difference()
    return Association(
        x,
        y,
        minus,
        tuple(given),
        method,
        float(found[0, 1] if minus is None else found[0, 1] - found[0, 2]),
        low,
        high,
        level,
        n,
        None if units.clusters is None else len(groups),
        len(kept) - n,
        sample.told("units" if units.clusters is None else "clusters", minus is not None),
        reason,
    )


@dataclass(frozen=True)
class _Sample:
    """Complete values [variables, then covariates; n]: y first, then its predictors; the units of each cluster."""

    values: Array
    variables: int
    groups: list[NDArray[np.intp]]
    method: Method
    approach: Approach
    level: float

    def told(self, what: str, difference: bool) -> str:
        if self.approach == "bootstrap":
            return f"BCa bootstrap over {what}, {DRAWS} draws"
        ends = f"jackknife of z over {what}, Student-t"
        if self.approach == "fisher":
            ends = "Fisher z" if self.method == "pearson" else "Fisher z, Bonett-Wright variance"
        return ends if not difference else f"Zou, from {ends}"

    def correlations(self, chosen: NDArray[np.intp]) -> Array:
        """[variables, variables] over these units, given the covariates; NaN for a column that is or becomes constant.

        Partial correlation: of the residuals of linear regressions on the covariates (of ranks on ranks).
        """
        held = self.values[:, chosen]
        if self.method == "spearman":
            held = stats.rankdata(held, axis=1)
        if (np.ptp(held, axis=1) == 0).any():
            return np.full((self.variables, self.variables), np.nan)
        if len(held) > self.variables:
            scaled = stats.zscore(held, axis=1)
            held, covariates = scaled[: self.variables], scaled[self.variables :]
            slopes, _, rank, _ = np.linalg.lstsq(covariates.T, held.T, rcond=1e-9)
            held = held - slopes.T @ covariates
            if rank < len(covariates) or (held.std(1) < 1e-9).any():
                return np.full((self.variables, self.variables), np.nan)
        found: Array = np.clip(np.corrcoef(held), -1, 1)
        return found

    def without_one(self) -> Array:
        """Fisher's z with one cluster left out, [clusters, variables, variables]; infinite at r = +-1."""
        every = np.arange(self.values.shape[1])
        left = np.array([self.correlations(np.delete(every, group)) for group in self.groups])
        with np.errstate(divide="ignore"):
            z: Array = np.arctanh(left)
        return z

    def limits(self, j: int) -> Limits:
        """Limits of r between y and predictor ``j``."""
        r = float(self.correlations(np.arange(self.values.shape[1]))[0, j])
        if abs(r) > PERFECT:
            return None, None, "perfect correlation"
        if self.approach == "bootstrap":
            return self.bootstrap(lambda found: float(found[0, j]))
        if self.approach == "fisher":
            shape = 1.0 if self.method == "pearson" else 1 + r * r / 2
            n, covariates = self.values.shape[1], len(self.values) - self.variables
            half = float(stats.norm.ppf(0.5 + self.level / 2)) * math.sqrt(shape / (n - covariates - 3))
        else:
            z = self.without_one()[:, 0, j]
            if reason := self.lacking(z):
                return None, None, reason
            error = math.sqrt((len(z) - 1) * float(z.var()))
            half = float(stats.t.ppf(0.5 + self.level / 2, len(z) - 1)) * error
        return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), None

    def lacking(self, z: Array | None = None) -> str | None:
        """Why these clusters, or correlations without one of them, give no interval."""
        if len(self.groups) < LEAST_RESAMPLED[self.approach]:
            return f"{len(self.groups)} clusters or units; a {self.approach} needs {LEAST_RESAMPLED[self.approach]}"
        if z is not None and not np.isfinite(z).all():
            return "without one of them r is perfect or a column constant"
        return "without any one of them r is the same" if z is not None and np.ptp(z) < 1e-12 else None

    def limits_of_difference(self) -> Limits:
        """Limits of r(y, first) - r(y, second): Zou's, from both limits and the correlation between both r.

        That is the large-sample one for ``fisher`` (Steiger, Psychological Bulletin 87, 1980), that of the values with
        one cluster left out for ``jackknife``.
        """
        if self.approach == "bootstrap":
            return self.bootstrap(lambda found: float(found[0, 1] - found[0, 2]))
        (low1, high1, reason1), (low2, high2, reason2) = self.limits(1), self.limits(2)
        if low1 is None or high1 is None or low2 is None or high2 is None:
            return None, None, reason1 or reason2
        whole = self.correlations(np.arange(self.values.shape[1]))
        one, other, between = (float(whole[i, j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        if abs(between) > PERFECT:
            return None, None, "the two are perfectly correlated"
        if self.approach == "fisher":
            covariance = (between - one * other / 2) * (1 - one**2 - other**2 - between**2) + between**3
            together = covariance / ((1 - one**2) * (1 - other**2))
        else:
            z = self.without_one()
            together = float(stats.pearsonr(z[:, 0, 1], z[:, 0, 2]).statistic)
        down, up = (
            math.sqrt(max(a * a + b * b - 2 * together * a * b, 0.0))
            for a, b in ((one - low1, high2 - other), (high1 - one, other - low2))
        )
        return one - other - down, one - other + up, None

    def bootstrap(self, pick: Callable[[Array], float]) -> Limits:
        if reason := self.lacking():
            return None, None, reason

        def statistic(drawn: NDArray[np.intp]) -> float:
            return pick(self.correlations(np.concatenate([self.groups[group] for group in drawn])))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # said in the reason
            held = stats.bootstrap(
                (np.arange(len(self.groups)),),
                statistic,
                n_resamples=DRAWS,
                vectorized=False,
                confidence_level=self.level,
                method="BCa",
                rng=np.random.default_rng(0),
            )
        low, high = float(held.confidence_interval.low), float(held.confidence_interval.high)
        if not low < high:
            return None, None, "resamples with a constant column, or all alike"
        return low, high, None


def rows(
    units: Units, xs: Sequence[str], ys: Sequence[str], common: bool, given: Sequence[str], **how: Any
) -> list[dict[str, Any]]:
    """Every pair as a row of the JSON; with ``common`` once more over the units that have all, and the differences."""
    pairs = [(x, y, None) for y in ys for x in xs]
    wanted: list[tuple[str, str, str, str | None]] = [("all", *pair) for pair in pairs]
    if common:
        wanted += [("common", *pair) for pair in pairs]
        wanted += [("common", one, y, other) for y in ys for one, other in combinations(xs, 2)]
        wanted += [("common", one, x, other) for x in xs for one, other in combinations(ys, 2)]
    made = []
    for subset, x, y, minus in wanted:
        among = [*xs, *ys] if subset == "common" else []
        row: dict[str, Any] = {"subset": subset, "x": x, "y": y, "minus": minus, "given": list(given)}
        row |= {"method": how["method"], "r": None, "low": None, "high": None, "level": LEVEL}
        row |= {"n": int(units.known([x, y, *given, *among]).sum()), "n_clusters": None, "dropped": None}
        row |= {"interval_method": None, "reason": None, "refused": None}
        try:
            found = asdict(associate(units, x, y, minus=minus, given=given, among=among, **how))
            row |= {"r": found["estimate"], "n_clusters": found["n_groups"]}
            row |= {name: found[name] for name in ("low", "high", "dropped", "interval_method", "reason")}
        except Refusal as refusal:
            row |= {"refused": refusal.code, "reason": refusal.sentence}
        made.append(row)
    return made


def text(made: Sequence[Mapping[str, Any]]) -> str:
    """The rows as an aligned table."""
    lines = [("units", "correlation", "r", "low", "high", "n", "clusters", "dropped", "interval")]
    for row in made:
        name = f"r({row['x']}, {row['y']})" + (f" - r({row['minus']}, {row['y']})" if row["minus"] else "")
        name += f" given {', '.join(row['given'])}" if row["given"] else ""
        numbers = ["-" if row[key] is None else f"{row[key]:+.3f}" for key in ("r", "low", "high")]
        counts = ["-" if row[key] is None else str(row[key]) for key in ("n", "n_clusters", "dropped")]
        note = f"refused ({row['refused']}): " if row["refused"] else "none: " if row["reason"] else ""
        lines.append((row["subset"], name, *numbers, *counts, note + (row["reason"] or row["interval_method"])))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    ends = [str.ljust, str.ljust, *[str.rjust] * 6, str.ljust]
    return "\n".join(
        "  ".join(end(cell, width) for end, cell, width in zip(ends, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _composites(assignments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = {}
    for assignment in assignments:
        name, _, columns = assignment.partition("=")
        bases = tuple(column.strip() for column in columns.split(","))
        if not name.strip() or len(bases) < 2 or not all(bases):
            raise TableError(f'--composite: got {assignment!r}; write "NAME=COL,COL", for example "both=lp,lds"')
        found[name.strip()] = bases
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = table.parser("analysis.association", (__doc__ or "").splitlines()[0], EXAMPLES, "a measured encoder")
    parser.add_argument("--x", type=table.listed, required=True, metavar="COL[,COL]", help="predictors")
    parser.add_argument("--y", type=table.listed, required=True, metavar="COL[,COL]", help="outcomes")
    parser.add_argument("--unit", metavar="COL", help="what counts as one point, for example encoder (default: a row)")
    parser.add_argument("--cluster", metavar="COL", help="units of one cluster are not independent, for example family")
    parser.add_argument("--given", type=table.listed, default=[], metavar="COL[,COL]", help="covariates")
    parser.add_argument("--method", choices=("pearson", "spearman"), default="pearson")
    parser.add_argument(
        "--interval", choices=("fisher", "jackknife", "bootstrap"), help="default: fisher, with clusters jackknife"
    )
    parser.add_argument("--common", action="store_true", help="also over the units that have all, with differences")
    parser.add_argument(
        "--composite", action="append", default=[], metavar="NAME=COL,COL", help="mean of min-max-scaled columns"
    )
    given = parser.parse_args(argv)
    try:
        composites = _composites(given.composite)
        named = [*given.x, *given.y, *given.given]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise TableError(f"--x, --y, --given: {', '.join(twice)} stands there twice; write each column once")
        frame = table.selected(given)
        units = collect(frame, named, unit=given.unit, cluster=given.cluster, composites=composites)
        made = rows(units, given.x, given.y, given.common, given.given, method=given.method, approach=given.interval)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    print(text(made))
    if given.json:
        table.write_json(given.json, {"file": given.file, "where": given.where, "derive": given.derive, "rows": made})
    return EXIT_REFUSED if all(row["refused"] for row in made) else 0


if __name__ == "__main__":
    sys.exit(main())
