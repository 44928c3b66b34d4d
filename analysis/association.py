"""Which property of an encoder predicts generation? Correlations over encoders with n, intervals and common subsets.

    python -m analysis.association FILE --x COL[,COL] --y COL[,COL] [--unit COL] [--cluster COL] [--by COL] [--common]

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
``--common`` adds each over the units that have all columns. Rows of several protocols (``--protocol``) are refused, and
rows that differ in anything else are one sample unless ``--by`` names it; the text says what a unit averages over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import table, tally
from analysis.correlation import Approach, Method, Sample
from analysis.interval import LEVEL
from analysis.laws import Array
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.table import TableError

SHOWN = 6  # columns in a note
LEAST = 4  # units, and one more per covariate: Fisher's variance is 1 / (n - k - 3)

EXAMPLES = """examples:
  linear probe and spatial structure against gFID, with the encoders that have both beside all of them:
    python -m analysis.association encoders.csv --x lp,lds --y gfid --common
  three seeds per encoder, encoders of one family not independent, ranks:
    python -m analysis.association runs.parquet --x lds --y gfid --unit encoder --cluster family --method spearman
  does spatial structure say more than the probe does, and does their mean predict better than either?
    python -m analysis.association encoders.csv --x lds --y gfid --given lp
    python -m analysis.association encoders.csv --x lp,lds,both --y gfid --composite both=lp,lds --common
  one correlation for each property of a long table, as a figure:
    python -m analysis.association points.csv --x value --y gfid --by property --protocol reference --figure r.png

exit code: 0 where a correlation could be given, 2 for a wrong option or file, 3 where every one was refused"""


@dataclass(frozen=True)
class Units:
    """One value per unit and column [n], NaN where it is missing; ``clusters`` [n] holds each unit's cluster.

    ``notes``: what its values are means of, and rows that have none, in words.
    """

    columns: Mapping[str, Array]
    clusters: NDArray[np.intp] | None = None
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
    taken = [*columns, *(name for name in (unit, cluster) if name)]
    notes = _pooled(frame, taken) if unit is None else _averaged(frame, unit, index, taken)
    for name in dict.fromkeys(base for each in columns for base in (composites or {}).get(each, (each,))):
        values = table.numbers(frame, name, "column")
        there = ~np.isnan(values)
        notes += [] if there.all() else [tally.dropped({name: ~there})]
        counts = np.bincount(index[there], minlength=len(names))
        sums = np.bincount(index[there], values[there], minlength=len(names))
        held[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    if cluster is None:
        return Units(held, None, composites or {}, tuple(notes))
    labels = np.asarray(table.labels(frame, [cluster], "--cluster"))
    first = labels[np.unique(index, return_index=True)[1]]
    if (torn := labels != first[index]).any():
        row = int(np.argmax(torn))
        raise TableError(f"--cluster: {rows[row]!s} stands in {first[index[row]]!s} and in {labels[row]!s}")
    return Units(held, np.unique(first, return_inverse=True)[1], composites or {}, tuple(notes))


def _pooled(frame: pl.DataFrame, taken: Sequence[str]) -> list[str]:
    """Columns of text that part the rows into groups, each large enough for a correlation of its own."""
    sizes = {name: frame[name].value_counts() for name in frame.select(pl.col(pl.String, pl.Boolean)).columns}
    names = [
        f"{name} ({len(held)} values)"
        for name, held in sizes.items()
        if name not in taken and len(held) > 1 and held["count"].min() >= LEAST  # type: ignore[operator]
    ]
    return [f"pooled over {', '.join(names)}: --by gives a correlation for each"] if names else []


def _averaged(frame: pl.DataFrame, unit: str, index: NDArray[np.intp], taken: Sequence[str]) -> list[str]:
    """How many rows a unit is the mean of, and in which columns they differ."""
    counts = np.bincount(index)
    if counts.max() == 1:
        return []
    others = [name for name in frame.columns if name not in taken]
    varied = frame.group_by(pl.Series("unit", index)).agg(pl.col(others).n_unique()) if others else frame.clear()
    names = [name for name in others if varied[name].max() != 1]
    told = str(counts.max()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    also = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    apart = f", which differ in {', '.join(names[:SHOWN])}{also}" if names else ""
    return [f"each of {tally.counted(len(counts), 'units')} ({unit}) is the mean of {told} rows{apart}"]


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
    sample = Sample(values, len(names), groups, method, approach, level)
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


def _wanted(xs: Sequence[str], ys: Sequence[str], common: bool) -> Iterator[tuple[str, str, str, str | None]]:
    """Subset of the units, x, y, minus: every pair; with ``common`` once more, and the differences."""
    for subset in ("all", *(["common"] if common else [])):
        yield from ((subset, x, y, None) for y in ys for x in xs)
    if common:
        yield from (("common", one, y, other) for y in ys for one, other in combinations(xs, 2))
        yield from (("common", one, x, other) for x in xs for one, other in combinations(ys, 2))


def rows(
    units: Units | Refusal, xs: Sequence[str], ys: Sequence[str], common: bool, given: Sequence[str], **how: Any
) -> list[dict[str, Any]]:
    """Every pair as a row of the JSON; with ``common`` once more over the units that have all, and the differences."""
    made = []
    for subset, x, y, minus in _wanted(xs, ys, common):
        among = [*xs, *ys] if subset == "common" else []
        row: dict[str, Any] = {"subset": subset, "x": x, "y": y, "minus": minus, "given": list(given)}
        row |= {"method": how["method"], "r": None, "low": None, "high": None, "level": LEVEL}
        row |= dict.fromkeys(("n", "n_clusters", "dropped", "interval_method", "reason", "refused"))
        try:
            if isinstance(units, Refusal):
                raise units
            row["n"] = int(units.known([x, y, *given, *among]).sum())
            found = asdict(associate(units, x, y, minus=minus, given=given, among=among, **how))
            row |= {"r": found["estimate"], "n_clusters": found["n_groups"]}
            row |= {name: found[name] for name in ("low", "high", "dropped", "interval_method", "reason")}
        except Refusal as refusal:
            row |= {"refused": refusal.code, "reason": refusal.sentence}
        made.append(row)
    return made


@dataclass(frozen=True)
class Group:
    """What is said of the rows of one ``--by`` label (None: of all), which were measured in one way."""

    name: str | None
    protocol: dict[str, str]
    units: Units | Refusal
    rows: list[dict[str, Any]]

    @property
    def notes(self) -> tuple[str, ...]:
        return () if isinstance(self.units, Refusal) else self.units.notes


def grouped(frame: pl.DataFrame, given: argparse.Namespace, composites: Mapping[str, tuple[str, ...]]) -> list[Group]:
    """The answers of a command line, by group in order of appearance. Raises ``TableError``."""
    named = [*given.x, *given.y, *given.given]
    parts = {"--x": given.x, "--y": given.y, "--given": given.given}
    parts |= {"--composite": [base for bases in composites.values() for base in bases]}
    for option, names in parts.items():
        for name in (name for name in names if option == "--composite" or name not in composites):
            table.numbers(frame, name, option)
    labels = np.asarray(table.labels(frame, given.by, "--by") if given.by else [""] * len(frame))
    used = [*named, *parts["--composite"], *given.by, *(name for name in (given.unit, given.cluster) if name)]
    made = []
    for label in dict.fromkeys(labels.tolist()):
        part, held = frame.filter(labels == label), {}
        units: Units | Refusal
        try:
            held = tally.protocol(part, given.protocol, used)
            units = collect(part, named, unit=given.unit, cluster=given.cluster, composites=composites)
        except Refusal as refusal:
            units = refusal
        said = rows(units, given.x, given.y, given.common, given.given, method=given.method, approach=given.interval)
        made.append(Group(label if given.by else None, held, units, said))
    return made


def text(made: Sequence[Mapping[str, Any]]) -> str:
    """The rows as an aligned table."""
    lines = [("units", "correlation", "r", "low", "high", "n", "clusters", "dropped", f"interval ({LEVEL:.0%})")]
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
    parser.add_argument("--by", type=table.listed, default=[], metavar="COL[,COL]", help="an answer for each value")
    parser.add_argument(
        "--protocol", type=table.listed, default=[], metavar="COL[,COL]", help="must not differ; none: pool them"
    )
    parser.add_argument("--figure", type=table.writable, metavar="OUT", help="a panel per pair, as PNG, SVG or PDF")
    given = parser.parse_args(argv)
    try:
        composites = _composites(given.composite)
        named = [*given.x, *given.y, *given.given]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise TableError(f"--x, --y, --given: {', '.join(twice)} stands there twice; write each column once")
        groups = grouped(table.selected(given), given, composites)
        made = [
            {"group": each.name, "protocol": each.protocol, "notes": each.notes} | row
            for each in groups
            for row in each.rows
        ]
        told = [None if row["refused"] is None else {"code": row["refused"], "sentence": row["reason"]} for row in made]
        refused = tally.refused(told)
        if given.figure and refused is None:
            from analysis import scatter  # matplotlib is slow to import

            scatter.write(groups, given.figure)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    for each in groups:
        print("\n".join([*([] if each.name is None else [f"{each.name}:"]), text(each.rows), *each.notes]))
    if given.json:
        held = {"file": given.file, "where": given.where, "derive": given.derive, "refused": refused}
        table.write_json(given.json, held | {"rows": made})
    return 0 if refused is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
