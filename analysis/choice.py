"""Which law foretold best, and can it be told apart from the others? Paired errors of a back-test, and AICc beside it.

Laws are compared on the predictions that all of them made. The unit is the fit (a cut-off, a value left out): its
predictions share whatever it got wrong. Each unit counts once, laws are paired within it, and the interval of their
difference is Student-t over units. In simulations of two laws that are equally good (800 trials or more a cell, 5 to
90 budgets, at most 8 cut-offs) that separates them in 0-11 % of trials at a nominal 5 %. With every one of 20 to 90
budgets as a cut-off it does so in 4-21 %, with the predicted budgets as units in 24-75 %, with groups in 10-79 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import polars as pl

from analysis.fit import compare
from analysis.interval import LEVEL, Interval, short, student
from analysis.refusal import Refusal
from analysis.result import Fit
from analysis.tally import counted

ALIKE = 1e-6  # of ln y: laws that differ by less everywhere have predicted the same


@dataclass(frozen=True)
class Score:
    """How well one law foretold: means over units of |ln(predicted / observed)| and of its signed value."""

    law: str
    parameters: int
    log_mae: float
    signed: float
    interpolation: float | None  # log_mae of the units inside the range of what was fitted
    extrapolation: float | None  # of those outside
    behind: Interval | None  # log_mae minus that of the best law; None for the best itself


@dataclass(frozen=True)
class Choice:
    """The best law, or None where another cannot be told apart from it; ``among``: the best and all such others."""

    scheme: str
    law: str | None
    among: tuple[str, ...]
    scores: tuple[Score, ...]  # best first
    silent: tuple[str, ...]  # laws of which every fit was refused
    n: int  # predictions that all laws made
    n_units: int
    sentence: str


def choose(errors: pl.DataFrame, laws: Mapping[str, int], scheme: str, unit: str) -> Choice:
    """The law with the smallest errors. ``laws``: number of parameters by name; ``scheme`` and ``unit``: in words.

    ``errors`` holds one prediction a row: law, unit, row, place ("interpolation", "extrapolation") and log_error.
    """
    speaking = [law for law in laws if law in errors["law"]]
    silent = tuple(law for law in laws if law not in speaking)
    added = f" Refused everywhere: {', '.join(silent)}." if silent else ""
    wide = errors.pivot("law", index=["unit", "row", "place"], values="log_error").drop_nulls()
    if not speaking or wide.is_empty():
        told = f"Of {scheme} no prediction was made by {'all laws' if speaking else 'any law'}: nothing to compare."
        return Choice(scheme, None, tuple(speaking), (), silent, 0, 0, told + added)
    units = wide.group_by("unit", "place", maintain_order=True)
    size, signed = units.agg(pl.col(speaking).abs().mean()), units.agg(pl.col(speaking).mean())
    order = sorted(speaking, key=lambda law: _mean(size[law]))
    scores = tuple(
        Score(
            law=law,
            parameters=laws[law],
            log_mae=_mean(size[law]),
            signed=_mean(signed[law]),
            interpolation=_within(size, law, "interpolation"),
            extrapolation=_within(size, law, "extrapolation"),
            behind=None if law == order[0] else _behind(size[law] - size[order[0]], unit),
        )
        for law in order
    )
    among = tuple(each.law for each in scores if each.behind is None or not _separated(each.behind))
    law = order[0] if len(among) == 1 < len(order) else None
    told = _sentence(scores, among, scheme, f"{counted(len(size), unit)}, {counted(len(wide), 'predictions')}")
    return Choice(scheme, law, among, scores, silent, len(wide), len(size), told + added)


def _mean(values: pl.Series) -> float:
    return math.fsum(values) / len(values)


def _within(size: pl.DataFrame, law: str, place: str) -> float | None:
    held = size.filter(pl.col("place") == place)[law]
    return _mean(held) if len(held) else None


def _behind(differences: pl.Series, unit: str) -> Interval:
    values, count = differences.to_numpy(), len(differences)
    method = f"paired over {counted(count, unit)}, Student-t"
    if abs(values).max() < ALIKE:
        return Interval(_mean(differences), None, None, LEVEL, method, count - 1, "they predict the same")
    if count < 2:
        return Interval(
            _mean(differences), None, None, LEVEL, method, 0, f"{counted(1, unit)}: all errors share one fit"
        )
    return student(_mean(differences), float(values.std(ddof=1)) / math.sqrt(count), count - 1, method)


def _separated(behind: Interval) -> bool:
    return behind.low is not None and behind.low > 0


def _sentence(scores: Sequence[Score], among: Sequence[str], scheme: str, basis: str) -> str:
    best = scores[0]
    told = f"{best.law} foretells {scheme} with a mean |ln error| of {short(best.log_mae)} ({basis})"
    if len(scores) == 1:
        return f"{told}; there is no other law to compare it with."
    others = {each.law: f"{each.law} {short(each.log_mae)}, more by {each.behind}" for each in scores[1:]}
    near, far = ("; ".join(each for law, each in others.items() if (law in among) == close) for close in (True, False))
    if not near:
        return f"{told}, less than every other law: {far}."
    return f"Not separated: {told}, but cannot be told apart from {near}." + (f" Worse: {far}." if far else "")


def information(fits: Mapping[str, Fit | Refusal]) -> list[dict[str, Any]]:
    """AICc of laws on the same points, best first, then those that were refused: rows of the JSON."""
    empty = dict.fromkeys(("n", "parameters", "objective", "aicc", "delta", "refused"))
    made = [each for each in fits.values() if isinstance(each, Fit)]
    rows: list[dict[str, Any]] = []
    for row in compare(made).to_dict("records") if made else []:
        known = {name: None if pd.isna(row[name]) else row[name] for name in empty if name in row}
        rows.append({"law": row["form"], **empty, **known})
    for law, refusal in fits.items():
        if isinstance(refusal, Refusal):
            rows.append({"law": law, **empty, "refused": refusal.told})
    return rows


def verdict(choices: Sequence[Choice], rows: Sequence[Mapping[str, Any]]) -> str:
    """What AICc says, and whether the back-tests say the same."""
    ranked = [row for row in rows if row["aicc"] is not None]
    if len(ranked) < 2:
        return "AICc compares nothing: fewer than two laws were fitted by least squares to enough rows."
    first, second = ranked[:2]
    told = f"AICc on all {first['n']} rows, taken as independent, is lowest for {first['law']}"
    told += f" ({second['law']} is {short(second['delta'])} higher)"
    against = [each for each in choices if each.among and first["law"] not in each.among]
    if not against:
        return f"{told}; the back-test does not contradict it."
    schemes = " and ".join(f"{each.among[0]} foretells {each.scheme} better" for each in against)
    return (
        f"{told}, but {schemes}: they disagree. AICc asks which law describes the rows that are there, a back-test "
        "which one foretells others; for a projection the second counts."
    )
