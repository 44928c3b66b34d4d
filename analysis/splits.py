"""Which rows of a table does a fit see, and which does it predict? Growing budgets, and values left out.

A split is data and nothing else: it is made from inputs and budgets, never from what was measured there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import table, tally
from analysis.forms import FORMS
from analysis.interval import short
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.resampling import SAME, steps_of
from analysis.table import TableError

MOST = 8  # cut-offs where none are named: fits that share nearly all rows are nearly one fit (``analysis.choice``)

Flags = NDArray[np.bool_]
Scheme = Literal["later budgets", "values left out"]
Place = Literal["interpolation", "extrapolation"]


@dataclass(frozen=True)
class Points:
    """Measured points. ``columns`` [n] each: inputs by the names laws give them, and what else rows are split by.

    ``rows`` [n]: where they stand in the table, from 0; ``dropped``: rows of the table that lack a value, ``note``:
    how that is said.
    """

    columns: Mapping[str, Array]
    y: Array
    rows: NDArray[np.intp]
    groups: tuple[str, ...] | None = None
    dropped: int = 0
    output: str = "y"
    note: str = ""

    def inputs(self, law: str) -> Array:
        """[n, d], in the order of the law."""
        return np.stack([self.columns[name] for name in FORMS[law].inputs], axis=-1)


@dataclass(frozen=True)
class Split:
    """``value``: the last budget that the fit sees, or the value that it does not; train and test [n]."""

    scheme: Scheme
    along: str
    value: float
    train: Flags
    test: Flags

    def __str__(self) -> str:
        sign = "<=" if self.scheme == "later budgets" else "other than"
        return f"{self.along} {sign} {short(self.value)}"


def inputs(laws: Sequence[str]) -> tuple[str, ...]:
    """The inputs of all laws. Raises ``TableError`` for a law that is not there."""
    for law in laws:
        if law not in FORMS:
            raise TableError(f"--law: got {law!r}; allowed: {', '.join(FORMS)}")
    return tuple(dict.fromkeys(name for law in laws for name in FORMS[law].inputs))


def _missing(laws: Sequence[str], x: Mapping[str, str]) -> None:
    """Raises ``TableError`` where an input of a law has no column, or a column is no input."""
    for law in laws:
        if lacking := [name for name in FORMS[law].inputs if name not in x]:
            ratio = lacking == ["M"] and {"N", "D"} <= set(x)
            made = " (M = D/N can be made with --derive)" if ratio else ""
            told = f"each input of each law needs its own --x{made}"
            raise TableError(
                f"--x: no {', '.join(lacking)}; the inputs of {law} are {', '.join(FORMS[law].inputs)}, and {told}"
            )
    wanted = inputs(laws)
    if extra := [name for name in x if name not in wanted]:
        raise TableError(f"--x: got {', '.join(extra)}; the inputs of {', '.join(laws)} are {', '.join(wanted)}")


def collect(
    frame: pl.DataFrame,
    laws: Sequence[str],
    x: Mapping[str, str],
    y: str,
    *,
    along: Sequence[str] = (),
    group: str | None = None,
    ids: Sequence[str] = (),
) -> Points:
    """The rows that have every value. ``x``: the column of each input; ``along``: inputs or columns to split by.

    ``ids``: columns that name a run together. Raises ``TableError``: a law, input or column that is not there, rows
    without a group. Raises ``Refusal`` (overflow, non_positive, too_few) for values that no law on log scales could
    take, and (duplicate_run) for a name twice or, without names, for rows that are equal in all that is fitted.
    """
    inputs(laws)
    _missing(laws, x)
    sources = {name: (column, "--x") for name, column in x.items()}
    for name in along:
        if name in x and name in frame.columns and x[name] != name:
            raise TableError(f"--by, --hold: {name!r} is an input and a column of its own; write {x[name]!r} or rename")
        sources.setdefault(name, (name, "--by, --hold"))
    if group is not None and (without := table.column(frame, group, "--group").null_count()):
        raise TableError(f"--group: {group!r} is missing in {without} of {len(frame)} rows")
    held = {name: table.numbers(frame, column, option) for name, (column, option) in sources.items()}
    out = table.numbers(frame, y, "--y")
    every = np.stack([out, *held.values()])
    rows = np.flatnonzero(~np.isnan(every).any(0))
    columns = [y, *(column for column, _ in sources.values())]
    note = tally.dropped({name: np.isnan(values) for name, values in zip(columns, every, strict=True)})
    if not len(rows):
        raise Refusal("too_few", f"none of {len(frame)} rows has {', '.join([y, *held])}")
    if infinite := int(np.isinf(every[:, rows]).any(0).sum()):
        raise Refusal("overflow", f"{infinite} of {len(rows)} rows hold an infinite value")
    if negative := int((every[:, rows] <= 0).any(0).sum()):
        told = f"{negative} of {len(rows)} rows hold a value that is not positive, which has no logarithm"
        raise Refusal("non_positive", told)
    _distinct(frame[rows.tolist()], ids, list(dict.fromkeys([*columns, *([group] if group else [])])))
    labels = None if group is None else table.labels(frame, [group], "--group")
    return Points(
        columns={name: values[rows] for name, values in held.items()},
        y=out[rows],
        rows=rows,
        groups=None if labels is None else tuple(labels[row] for row in rows),
        dropped=len(frame) - len(rows),
        output=y,
        note=note,
    )


def _distinct(frame: pl.DataFrame, ids: Sequence[str], fitted: Sequence[str]) -> None:
    """Raises ``Refusal`` (duplicate_run) for a run that stands twice, ``TableError`` for an id that is no column."""
    for name, count in Counter(table.labels(frame, ids, "--id") if ids else []).most_common(1):
        if count > 1:
            raise Refusal("duplicate_run", f"{name} stands {count} times among the rows (--id)")
    if not ids:
        table.distinct(frame, fitted)


def levels(values: Array) -> tuple[NDArray[np.intp], Array]:
    """Distinct values, those within SAME of the first of them in ln as one: the level of each [n], the largest [k]."""
    index = steps_of(np.log(values))
    return index, np.array([values[index == level].max() for level in range(int(index.max()) + 1)])


def later(points: Points, by: str, cutoffs: Sequence[float] | None = None) -> list[Split]:
    """A split per cut-off; by default every budget but the largest is one, or MOST of them, evenly spread in rank.

    Raises ``TableError`` for a cut-off with no row on either side, ``Refusal`` (too_few) for a single budget.
    """
    budget = points.columns[by]
    if cutoffs is None:
        _, tops = levels(budget)
        if len(tops) < 2:
            raise Refusal("too_few", f"all rows are of one {by} (neighbours within {SAME:.0%} count as one)")
        kept = np.arange(len(tops) - 1)
        if len(kept) > MOST:
            kept = np.linspace(0, len(kept), MOST + 2)[1:-1].round().astype(int)
        cutoffs = tops[kept].tolist()
    for cutoff in cutoffs:
        if not budget.min() <= cutoff < budget.max():
            allowed = f"from {budget.min():g} to below {budget.max():g}"
            raise TableError(f"--cutoffs: got {cutoff:g}; {by} allows {allowed}")
    return [Split("later budgets", by, each, budget <= each, budget > each) for each in sorted(set(cutoffs))]


def left_out(points: Points, hold: str) -> list[Split]:
    """A split per value. Raises ``Refusal`` (too_few) for a single one."""
    index, tops = levels(points.columns[hold])
    if len(tops) < 2:
        raise Refusal("too_few", f"all rows are of one {hold}; nothing is left to fit without it")
    return [Split("values left out", hold, float(top), index != i, index == i) for i, top in enumerate(tops)]


def outside(value: float, held: Array) -> float:
    """Decades beyond the range of ``held``; 0 within it."""
    return max(0.0, math.log10(value / float(held.max())), math.log10(float(held.min()) / value))


def place(distance: float) -> Place:
    return "extrapolation" if distance > 0 else "interpolation"
