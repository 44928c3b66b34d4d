"""Where is the bottom of one curve, by a parabola in ln x, and is it one? Vertex, interval, checks.

    valley(sizes, losses).best  # N* at one budget (``analysis.isoflop``); of rates R* (``analysis.optimum``)

The vertex is a ratio of two coefficients, so its interval is Fieller's: every x at which the slope cannot be told from
zero, by Student-t. An end beyond what was tried is left open, and there is none where the curvature cannot be told from
zero: counted as covering, intervals then hold the vertex in 95 % of cases at any noise. Among those that have two ends
it is less where the noise hides most curvatures (87 % where it hides 60 % of them, five points). Points of several
seeds or runs come in groups; the covariance is then that of a delete-one-group jackknife of the coefficients.

A parabola is biased off the centre and on a wide grid even without noise (arXiv 2603.22339): see ``FLAGS``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from analysis.interval import LEVEL, Interval, short, student
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.resampling import steps_of

LEAST = 5  # distinct x
CENTRE = 2.0  # factor by which the vertex may lie off the middle of what was tried
WIDE = 4.0  # factor that may be tried on either side of the middle
ROUNDING = 1e-10  # of ln x

FLAGS = {
    "flat": "the curvature cannot be told from zero",
    "off_centre": f"the optimum lies more than a factor of {CENTRE:g} off the middle of what was tried",
    "wide": f"what was tried reaches further than a factor of {WIDE:g} either side of its middle",
}

Residuals = Literal["raw", "log"]


@dataclass(frozen=True)
class Valley:
    """A parabola that opens upwards. ``best`` is its vertex, in the unit of x, and ``value`` the metric there.

    ``curvature`` is half of d^2 y / d (ln x)^2, of ln y with log residuals; ``low`` and ``high`` are the ends of what
    was tried, ``flags`` keys of ``FLAGS``.
    """

    best: Interval
    value: Interval
    curvature: Interval
    low: float
    high: float
    n: int
    n_distinct: int
    n_groups: int | None
    flags: tuple[str, ...]


class _Known(NamedTuple):
    """Covariance of (bend, slope, level) [3, 3], or why there is none."""

    covariance: Array | None
    dof: int
    method: str
    reason: str | None = None


def told(found: Interval) -> str:
    """An interval in words, with the digits that show how wide it is: 3.0124 [3.0119, 3.0129]."""
    if found.estimate is None or found.low is None or found.high is None or not found.low < found.high:
        return str(found)
    last = math.floor(math.log10(found.high - found.low)) - 1  # place of the second digit of its width

    def written(value: float) -> str:
        digits = 0 if value == 0 else math.floor(math.log10(abs(value))) - last + 1
        if digits <= 3 or digits > 15:
            return short(value)
        if 1000 <= abs(value) < 1e6:
            return f"{value:,.{max(-last, 0)}f}"
        return f"{value:.{digits}g}".replace("e+0", "e").replace("e+", "e")

    return f"{written(found.estimate)} [{written(found.low)}, {written(found.high)}]"


def methods(found: Sequence[Interval]) -> list[str]:
    """The line that says level and method of the intervals of a text, or none where there is no interval."""
    made = dict.fromkeys(each.method for each in found if each.low is not None or each.high is not None)
    return [f"{LEVEL:.0%} intervals: {'; '.join(made)}".replace("%", " %")] if made else []


def exponential(found: Interval) -> Interval:
    """An interval of a logarithm as one of the quantity."""
    estimate, low, high = (None if end is None else math.exp(end) for end in (found.estimate, found.low, found.high))
    return replace(found, estimate=estimate, low=low, high=high)


def vertex(u: Array, y: Array) -> float:
    """ln x at the bottom of the parabola of y [n] in u = ln x [n]; NaN where it opens downwards or three x are left."""
    if len(np.unique(steps_of(u))) <= 3:
        return math.nan
    bend, slope, _ = np.polyfit(u - u.mean(), y, 2)
    return float(u.mean() - slope / (2 * bend)) if bend > 0 else math.nan


def valley(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    residuals: Residuals = "raw",
    where: str = "",
    what: str = "sizes",
) -> Valley:
    """The parabola of y [n] in ln x [n].

    ``groups`` [n] names what is independent (a seed with all of its sizes, a run); where each point is its own group,
    points are. ``residuals`` "log" is a parabola of ln y: relative errors. ``where`` and ``what`` are words for
    sentences. Raises ``Refusal``: not_finite, non_positive, too_few (distinct x), no_interior_minimum (the lowest mean
    is that of the first or last x, the vertex lies beyond them, the parabola opens downwards).
    """
    size, metric = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert size.shape == metric.shape == (len(size),)
    where = f"{where}: " if where else ""
    if not (np.isfinite(size).all() and np.isfinite(metric).all()):
        raise Refusal("not_finite", f"{where}a point is missing or infinite; leave it out by name")
    if (size <= 0).any() or (residuals == "log" and (metric <= 0).any()):
        raise Refusal("non_positive", f"{where}a logarithm needs positive values")
    u, level = np.log(size), np.log(metric) if residuals == "log" else metric
    place = steps_of(u)
    count = len(np.unique(place))
    if count < LEAST:
        raise Refusal("too_few", f"{where}{count} {what.removesuffix('s') if count == 1 else what}; {LEAST} are needed")
    lowest = int((np.bincount(place, level) / np.bincount(place)).argmin())
    low, high, middle = float(u.min()), float(u.max()), float(u.mean())
    tried = f"{what} tried ({short(math.exp(low))} to {short(math.exp(high))})"
    if lowest in (0, count - 1):
        side = "smallest" if lowest == 0 else "largest"
        raise Refusal("no_interior_minimum", f"{where}the lowest value is that of the {side} of the {tried}")
    bend, slope, base = (float(c) for c in np.polyfit(u - middle, level, 2))
    if bend <= 0:
        raise Refusal("no_interior_minimum", f"{where}the parabola opens downwards")
    off = -slope / (2 * bend)
    if not low <= middle + off <= high:
        raise Refusal("no_interior_minimum", f"{where}the vertex lies beyond the {tried}")
    labels = None if groups is None else [str(group) for group in groups]
    known = _known(u - middle, level, labels)
    best, flat = _vertex_interval(bend, slope, middle, known, (low, high), tried)
    gradient = np.array([off**2, off, 1.0])  # of the value at the vertex, whose place it does not depend on
    bent = _linear(bend, np.array([1.0, 0.0, 0.0]), known)
    bottom = _linear(base - slope**2 / (4 * bend), gradient, known)
    centre = 0.5 * (low + high)
    flags = {
        "flat": flat,
        "off_centre": abs(middle + off - centre) > math.log(CENTRE) + ROUNDING,
        "wide": high - low > 2 * math.log(WIDE) + ROUNDING,
    }
    return Valley(
        best=best,
        value=exponential(bottom) if residuals == "log" else bottom,
        curvature=bent,
        low=math.exp(low),
        high=math.exp(high),
        n=len(u),
        n_distinct=count,
        n_groups=None if labels is None else len(set(labels)),
        flags=tuple(name for name, raised in flags.items() if raised),
    )


def _known(d: Array, y: Array, groups: Sequence[str] | None) -> _Known:
    """How well the coefficients of y = level + slope d + bend d^2 are known."""
    if groups is None or len(set(groups)) == len(y):
        covariance = np.polyfit(d, y, 2, cov=True)[1]
        return _Known(covariance, len(y) - 3, "Student-t, points taken as independent")
    names, labels = sorted(set(groups)), np.asarray(groups)
    count = len(names)
    method = f"delete-one-group jackknife over {count} groups, Student-t"
    if count == 1:
        return _Known(None, 0, "none, given one group", "one group says nothing about another")
    kept = [labels != name for name in names]
    for name, keep in zip(names, kept, strict=True):
        if len(np.unique(steps_of(d[keep]))) <= 3:
            return _Known(None, count - 1, method, f"without group {name} too few points are left for a parabola")
    left = np.array([np.polyfit(d[keep], y[keep], 2) for keep in kept])
    centred = left - left.mean(0)
    return _Known((count - 1) / count * centred.T @ centred, count - 1, method)


def _vertex_interval(
    bend: float, slope: float, middle: float, known: _Known, range_: tuple[float, float], tried: str
) -> tuple[Interval, bool]:
    """The vertex with its interval, and whether the curvature cannot be told from zero."""
    found = Interval(math.exp(middle - slope / (2 * bend)), None, None, LEVEL, known.method, known.dof, known.reason)
    if known.covariance is None:
        return found, False
    found = replace(found, method=f"Fieller, {known.method}")
    ends = _fieller(bend, slope, known.covariance, float(stats.t.ppf(0.5 + LEVEL / 2, known.dof)))
    if ends is None:
        return replace(found, reason=FLAGS["flat"]), True
    if ends[1] - ends[0] <= ROUNDING:
        return replace(found, reason="the points lie on the parabola to the last digit, which says nothing"), False
    inside = [range_[0] <= middle + end <= range_[1] for end in ends]
    low, high = (math.exp(middle + end) if kept else None for end, kept in zip(ends, inside, strict=True))
    return replace(found, low=low, high=high, reason=None if all(inside) else f"an end lies beyond the {tried}"), False


def _fieller(bend: float, slope: float, covariance: Array, t: float) -> tuple[float, float] | None:
    """The ends of {d: |slope + 2 bend d| <= t x its error}; None where the set is not an interval."""
    a = 4 * (bend**2 - t * t * covariance[0, 0])
    b = 4 * (bend * slope - t * t * covariance[0, 1])
    c = slope**2 - t * t * covariance[1, 1]
    if a <= 0:
        return None
    # the root that does not cancel, and the other from their product
    far = -0.5 * (b + math.copysign(math.sqrt(max(b * b - 4 * a * c, 0.0)), b))
    ends = sorted((far / a, c / far if far else 0.0))
    return ends[0], ends[1]


def _linear(estimate: float, gradient: Array, known: _Known) -> Interval:
    """A quantity of the coefficients with the interval of its linearisation."""
    if known.covariance is None:
        return Interval(estimate, None, None, LEVEL, known.method, known.dof, known.reason)
    error = math.sqrt(max(float(gradient @ known.covariance @ gradient), 0.0))
    return student(estimate, error, known.dof, f"delta, {known.method}")
