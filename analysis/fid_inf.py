"""What would FID be with infinitely many samples? A line in 1/n through FIDs of subsets, with an interval.

    python -m analysis.fid_inf FILE --n COL --fid COL [--by COL[,COL]] [--draw COL] [--protocol COL[,COL]]

FID_n = FID_inf + k / n to first order, with a k of its own for each model (Chong & Forsyth, arXiv 1911.07023): at equal
n two models still differ by (k1 - k2) / n. The sizes lie evenly in 1/n at best (``subset_sizes``).

Weights: 1 / error^2 where errors are known, else n. The variance of a subset's FID falls as 1/n where the true distance
is not zero; at zero it falls as 1/n^2 and weights n make the interval too wide, not too narrow.

Subsets of one pool of samples share its error, and no scatter about the line shows that. So there are two intervals:

- without draws every row is taken as a subset of its own, disjoint from all others: Student-t, rows - 2;
- with draws (evaluation seeds: sample sets that share nothing) subsets may overlap within a draw; a line each, and
  Student-t over draws.

An interval is about sampling. Terms beyond 1/n are another matter: the curvature test says whether a 1/n^2 term shows,
and by how much it would move FID_inf.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from scipy import stats

from analysis import table, tally
from analysis.interval import LEVEL
from analysis.laws import Array
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.table import TableError

LEAST = 4  # distinct sizes: a line and a curvature leave one degree of freedom
CURVED = 0.05  # p-value below which the line is said not to fit
FAR = 1.0  # extrapolations further than the fitted range of 1/n are said to be far

EXAMPLES = """examples:
  disjoint subsets of each model's samples:
    python -m analysis.fid_inf subsets.csv --n samples --fid fid --by model
  overlapping subsets of several evaluation seeds, one extractor, protocols checked:
    python -m analysis.fid_inf subsets.csv --n samples --fid fid --by model --draw seed --protocol protocol
  one model, with the standard error of each FID, as a figure:
    python -m analysis.fid_inf subsets.csv --n samples --fid fid --error se --where "model = 'a'" --figure fid_inf.png

exit code: 0 where a group could be extrapolated, 2 for a wrong option or file, 3 where every one was refused"""


@dataclass(frozen=True)
class Extrapolation:
    """FID_inf with its interval (None for a ``reason``); ``slope``: k; ``bias``: k / n at the largest n.

    ``n``: rows, ``n_groups``: draws (None: every row is its own), ``dropped``: rows without a value. ``curvature``:
    p-value of a 1/n^2 term, which would move FID_inf by ``shift``. ``reach``: 1 / largest n, in units of the fitted
    range of 1/n.
    """

    estimate: float
    low: float | None
    high: float | None
    level: float
    slope: float
    bias: float
    sizes: tuple[int, ...]
    n: int
    n_groups: int | None
    dropped: int
    dof: int
    curvature: float | None
    shift: float
    reach: float
    method: str
    reason: str | None
    warnings: tuple[str, ...]


def subset_sizes(total: int, smallest: int, count: int = 5, *, disjoint: bool = False) -> list[int]:
    """Sizes evenly spaced in 1/n, smallest first; the largest is ``total``, or as large as lets all fit side by side.

    Raises ``Refusal``: fewer than four sizes, or too few samples for that many distinct ones.
    """
    if count < LEAST:
        raise Refusal("too_few", f"{count} subset sizes; a 1/n line with a check of its fit needs {LEAST}")

    def laid(largest: int) -> list[int]:
        return [int(size) for size in np.rint(1 / np.linspace(1 / smallest, 1 / largest, count))]

    largest = total
    if disjoint:
        # sums grow with the largest size
        fits, fails = smallest, total + 1
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if sum(laid(middle)) <= total else (fits, middle)
        largest = fits
    sizes = laid(largest)
    if len(set(sizes)) < count or sizes[0] >= sizes[-1]:
        how = "disjoint subsets" if disjoint else "subsets"
        raise Refusal("too_few", f"{total} samples hold no {count} {how} of different sizes from {smallest} on")
    return sizes


def line(sizes: ArrayLike, fids: ArrayLike, errors: ArrayLike | None = None) -> tuple[float, float]:
    """FID_inf and k of the weighted line through FIDs [m] at sizes [m]; two points are enough, nothing is checked."""
    n = np.asarray(sizes, np.float64)
    weights = n if errors is None else 1 / np.square(np.asarray(errors, np.float64))
    found = _fit(n, np.asarray(fids, np.float64), weights, 1).params
    return float(found[0]), float(found[1] * n.min())


def extrapolate(
    sizes: ArrayLike,
    fids: ArrayLike,
    *,
    errors: ArrayLike | None = None,
    draws: Sequence[str] | None = None,
    level: float = LEVEL,
) -> Extrapolation:
    """FID_inf from FIDs [m] of subsets of ``sizes`` [m] samples, all under one protocol.

    ``errors`` [m]: their standard errors, of which only the ratios count. ``draws`` [m]: names of the sample sets that
    the subsets were taken from. Rows without a value are dropped and counted. Raises ``Refusal``: infinite values,
    sizes or errors that are not positive, fewer than four distinct sizes (in any draw).
    """
    held = np.array([sizes, fids, np.ones(np.shape(fids)) if errors is None else errors], np.float64)
    there = ~np.isnan(held).any(0)
    n, fid, error = held[:, there]
    if np.isinf(held[:, there]).any():
        raise Refusal("not_finite", "a size, FID or error is infinite")
    if (n < 2).any() or (error <= 0).any():
        raise Refusal("non_positive", "subset sizes have to be 2 or more, and errors positive")
    names = np.full(len(n), "") if draws is None else np.asarray(draws)[there]
    parts = [names == name for name in np.unique(names)]
    for part in parts or [np.zeros(0, bool)]:
        if (count := len(np.unique(n[part]))) < LEAST:
            where = "" if draws is None or not count else f" in draw {names[part][0]}"
            raise Refusal("too_few", f"{count} distinct subset sizes{where}; a 1/n line with a check needs {LEAST}")
    weights = n if errors is None else 1 / error**2
    lines = [_fit(n[part], fid[part], weights[part], 1) for part in parts]
    curves = [_fit(n[part], fid[part], weights[part], 2) for part in parts]
    smallest = np.array([n[part].min() for part in parts])
    estimates = np.array([found.params[0] for found in lines])
    bends = np.array([found.params[2] for found in curves]) * smallest**2
    estimate = float(estimates.mean())
    slope = float((np.array([found.params[1] for found in lines]) * smallest).mean())
    shift = float(np.mean([found.params[0] for found in curves])) - estimate
    with np.errstate(all="ignore"):  # no scatter: no error, and no test
        if draws is None:
            spread, dof, curvature = float(lines[0].bse[0]), int(lines[0].df_resid), float(curves[0].pvalues[2])
            reason = "no scatter about the line, which says nothing"
        elif len(parts) > 1:
            spread, dof = float(stats.sem(estimates)), len(parts) - 1
            curvature = 2 * float(stats.t.sf(abs(bends.mean() / stats.sem(bends)), dof))
            reason = "all draws agree, which says nothing"
        else:
            spread, dof, curvature = 0.0, 0, math.nan
            reason = "one draw: its subsets share their samples"
    known = spread > 1e-10 * float(np.abs(fid).max())
    half = float(stats.t.ppf(0.5 + level / 2, dof)) * spread if known else math.nan
    distinct = tuple(int(size) for size in np.unique(n))
    reach = 1 / (distinct[-1] / distinct[0] - 1)
    warnings = []
    if estimate < 0:  # no distance is: either scatter about a small one, or no 1/n line
        warnings.append("below 0, within its error" if known and estimate + half >= 0 else "below 0: not extrapolable")
    if known and curvature < CURVED:
        warnings.append(f"no 1/n line (p = {curvature:.2g}): FID_inf moves by {shift:+.3g} with a 1/n^2 term")
    if reach > FAR:
        warnings.append(f"far: {reach:.2g} times the fitted range of 1/n")
    taken = "every row a disjoint subset" if draws is None else "a line per draw"
    return Extrapolation(
        estimate=estimate,
        low=estimate - half if known else None,
        high=estimate + half if known else None,
        level=level,
        slope=slope,
        bias=slope / distinct[-1],
        sizes=distinct,
        n=len(n),
        n_groups=None if draws is None else len(parts),
        dropped=int((~there).sum()),
        dof=dof,
        curvature=curvature if known else None,
        shift=shift,
        reach=reach,
        method=f"1/n line, weights {'n' if errors is None else '1/error^2'}, Student-t; {taken}",
        reason=None if known else reason,
        warnings=tuple(warnings),
    )


def _fit(n: Array, fid: Array, weights: Array, order: int) -> Any:
    """Weighted least squares on powers of smallest n / n, the constant first."""
    from statsmodels.regression.linear_model import WLS  # seconds to import

    return WLS(fid, np.vander(n.min() / n, order + 1, increasing=True), weights=weights / weights.mean()).fit()


@dataclass(frozen=True)
class Group:
    """FIDs [m] at sizes [m] of one ``--by`` label, as they stand in the table, and their row of the JSON."""

    sizes: Array
    fids: Array
    row: dict[str, Any]


def groups(
    frame: pl.DataFrame,
    n: str,
    fid: str,
    *,
    by: Sequence[str] = (),
    error: str | None = None,
    draw: str | None = None,
    protocol: Sequence[str] = (),
) -> list[Group]:
    """An extrapolation per group in order of appearance, refusals included. Raises ``TableError``."""
    columns = {"--n": n, "--fid": fid} | ({} if error is None else {"--error": error})
    held = {option: table.numbers(frame, name, option) for option, name in columns.items()}
    if len(broken := held["--n"][np.isfinite(held["--n"]) & (held["--n"] % 1 != 0)]):
        raise TableError(f"--n: {n!r} holds {broken[0]:g}; allowed: whole numbers of samples")
    names = np.asarray(table.labels(frame, by, "--by") if by else ["all"] * len(frame))
    if draw is not None and (missing := table.column(frame, draw, "--draw").null_count()):
        raise TableError(f"--draw: {draw!r} is missing in {missing} of {len(frame)} rows")
    draws = None if draw is None else np.asarray(table.labels(frame, [draw], "--draw"))
    used = [*columns.values(), *by, *([draw] if draw else [])]
    made = []
    for name in dict.fromkeys(names.tolist()):
        kept = names == name
        part = {option: values[kept] for option, values in held.items()}
        lost = tally.dropped({columns[option]: np.isnan(values) for option, values in part.items()})
        row: dict[str, Any] = {"group": name, "protocol": {}, "refused": None, "reason": None, "note": lost}
        try:
            row["protocol"] = tally.protocol(frame.filter(kept), protocol, used)
            row |= asdict(
                extrapolate(
                    part["--n"],
                    part["--fid"],
                    errors=part.get("--error"),
                    draws=None if draws is None else draws[kept].tolist(),
                )
            )
        except Refusal as refusal:
            row |= {"refused": refusal.code, "reason": refusal.sentence}
        made.append(Group(part["--n"], part["--fid"], row))
    return made


def text(row: dict[str, Any]) -> str:
    """A line for a group."""
    if row["refused"]:
        return f"{row['group']}: refused ({row['refused']}): {row['reason']}"
    interval = f"(no interval: {row['reason']})" if row["low"] is None else f"[{row['low']:.4g}, {row['high']:.4g}]"
    draws = "" if row["n_groups"] is None else f" in {tally.counted(row['n_groups'], 'draws')}"
    parts = [
        f"FID_inf {row['estimate']:.4g} {interval}",
        *row["warnings"],
        f"k {row['slope']:.4g}",
        f"bias {row['bias']:.3g} at n = {row['sizes'][-1]}",
        f"{row['n']} FIDs{draws} at {len(row['sizes'])} sizes from {row['sizes'][0]}",
        f"extrapolated over {row['reach']:.2g} of the fitted range of 1/n",
        *([row["note"]] if row["note"] else []),
    ]
    return f"{row['group']}: {', '.join(parts)}"


def methods(rows: Sequence[dict[str, Any]]) -> str:
    """How the intervals were made, for all groups that have an answer."""
    return f"{LEVEL:.0%} intervals: {', '.join(dict.fromkeys(row['method'] for row in rows if not row['refused']))}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = table.parser("analysis.fid_inf", (__doc__ or "").splitlines()[0], EXAMPLES, "the FID of a subset")
    parser.add_argument("--n", required=True, metavar="COL", help="samples of the subset")
    parser.add_argument("--fid", required=True, metavar="COL", help="its FID")
    parser.add_argument("--error", metavar="COL", help="standard error of the FID (default: variance as 1/n)")
    parser.add_argument(
        "--by", type=table.listed, default=[], metavar="COL[,COL]", help="an extrapolation for each, for example model"
    )
    parser.add_argument("--draw", metavar="COL", help="sample set of the subset (default: subsets are disjoint)")
    parser.add_argument(
        "--protocol",
        type=table.listed,
        default=[],
        metavar="COL[,COL]",
        help="must not differ within a group; none: pool them",
    )
    parser.add_argument("--figure", type=table.writable, metavar="OUT", help="a panel per group, as PNG, SVG or PDF")
    given = parser.parse_args(argv)
    try:
        frame = table.selected(given)
        made = groups(
            frame, given.n, given.fid, by=given.by, error=given.error, draw=given.draw, protocol=given.protocol
        )
        rows = [each.row for each in made]
        told = [None if row["refused"] is None else {"code": row["refused"], "sentence": row["reason"]} for row in rows]
        refused = tally.refused(told)
        if given.figure and refused is None:
            from analysis import intercept  # matplotlib is slow to import

            intercept.write(made, given.figure, n=given.n, fid=given.fid)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([*(text(row) for row in rows), *([methods(rows)] if refused is None else [])]))
    if given.json:
        held = {"file": given.file, "where": given.where, "derive": given.derive, "refused": refused}
        table.write_json(given.json, held | {"groups": rows})
    return 0 if refused is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
