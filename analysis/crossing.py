"""When does one training curve reach a threshold? Bracket, two interpolations, censoring, interval.

    from analysis.crossing import reach
    reach([20, 40, 60, 80, 240, 800], [3.75, 2.76, 2.47, 2.23, 1.85, 1.51], 2.0).linear  # 176.8 epochs

- The bracket is the last x above k before the first crossing, and the first x at or below k. A curve may rise again:
  the first crossing counts, and the note says where the curve is above k later.
- ``linear`` interpolates in x and y, ``log`` in ln x and ln y (a power law between the two points). Where both hold,
  their difference is what is not known. Across a bracket wider than ``max_ratio`` neither is given; the bracket stands.
- At or below k at its first point: left-censored. Never at or below k: right-censored. The bracket then has one end,
  and nothing is extrapolated.
- Several training runs (``seeds``): linear and log are geometric means over them; the interval is Student-t over ln x
  of the linear ones. Where a run is censored there is no mean; with five runs or more a one-sided bound of their
  median is given (order statistics, ``scipy.stats.quantile_test``).
- Several evaluations of one run at one x (``repeats``): their mean is the curve. With one run the interval is that of
  evaluation noise: curves drawn about the means, with the scatter of ln y pooled over all x (Student-t by degrees of
  freedom), are crossed anew. It says nothing about another run. The spread of several runs contains this noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis import tally
from analysis.interval import LEVEL, Interval, student
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.uncertainty import DRAWS

MAX_RATIO = 5.0  # x_after / x_before; RAE's own points lie that far apart at gFID 2 (80, 400): 199 or 140 epochs
SEED = 0  # of the draws
ALONE = "one seed without repeats"

Censored = Literal["none", "left", "right"]
Bracket = tuple[float | None, float | None]


def number(value: float) -> str:
    """Four digits for a note: 176.8, 2, 1.5e+20."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class Reached:
    """When a curve reached ``threshold``, in the unit of ``axis``; by the rules of this module."""

    threshold: float
    axis: str
    bracket: Bracket
    linear: float | None
    log: float | None
    censored: Censored | None  # None where the curve was refused
    interval: Interval  # about ``linear``, which is its estimate; of a median its estimate is None
    note: str = ""
    refused: dict[str, str] | None = None  # code and sentence
    runs: tuple[Reached, ...] = ()  # one per training seed
    points: tuple[tuple[float, float], ...] = ()  # of one training run: what was crossed, x rising


@dataclass(frozen=True)
class _Run:
    """One training run: means y [n] over ``count`` [n] repeats at x [n], rising; relative scatter of one repeat."""

    x: Array
    y: Array
    count: Array
    scatter: float | None  # standard deviation of ln y within an x; None: a metric that is not positive
    dof: int


def reach(
    x: ArrayLike,
    y: ArrayLike,
    threshold: float,
    *,
    axis: str = "epochs",
    metric: str = "metric",
    seeds: Sequence[Any] | None = None,
    repeats: Sequence[Any] | None = None,
    max_ratio: float = MAX_RATIO,
    isotonic: bool = False,
    draws: int = DRAWS,
) -> Reached:
    """When the curve y [n] over x [n], in any order, first is at or below ``threshold``.

    ``seeds`` and ``repeats`` [n] name the training run and the evaluation of each point. ``isotonic``: each run is
    first replaced by the falling curve nearest to it (least squares, weighted by repeats; scikit-learn). Points that
    are not finite are dropped and counted. Raises ``Refusal``: not_finite (none is left), duplicate_run (an x twice in
    one run, and not as two repeats). A wide bracket does not raise; ``refused`` says so.
    """
    at, value = np.asarray(x, np.float64), np.asarray(y, np.float64)
    run = np.asarray([""] * len(at) if seeds is None else [str(each) for each in seeds], np.str_)
    repeat = np.asarray([""] * len(at) if repeats is None else [str(each) for each in repeats], np.str_)
    assert at.shape == value.shape == run.shape == repeat.shape
    keep = np.isfinite(at) & np.isfinite(value)
    if not keep.any():
        raise Refusal("not_finite", f"none of {len(at)} points has a finite {metric} and a finite {axis}")
    missing = tally.dropped({axis: np.isnan(at), metric: np.isnan(value)})
    infinite = int((np.isinf(at) | np.isinf(value))[~(np.isnan(at) | np.isnan(value))].sum())
    lost = sorted(set(run.tolist()) - set(run[keep].tolist()))
    at, value, run, repeat = at[keep], value[keep], run[keep], repeat[keep]
    times = Counter(zip(run.tolist(), at.tolist(), repeat.tolist(), strict=True))
    if twice := min((point for point, count in times.items() if count > 1), default=None):
        whose = f" of seed {twice[0]}" if twice[0] else ""
        raise Refusal("duplicate_run", f"{axis} {number(twice[1])}{whose} stands twice in one curve")
    held = {name: _averaged(at[run == name], value[run == name]) for name in dict.fromkeys(run.tolist())}
    runs = {name: _cross(each, threshold, axis, max_ratio, isotonic) for name, each in held.items()}
    if len(runs) == 1:
        ((name, one),) = held.items()
        span = _noise(one, threshold, max_ratio, isotonic, draws)
        found = replace(runs[name], interval=replace(span, estimate=runs[name].linear), runs=(runs[name],))
    else:
        found = _over(runs)
    notes = [found.note] if found.note else []
    notes += ["smoothed to fall (isotonic)"] if isotonic else []
    notes += [missing] if missing else []
    notes += [f"{tally.counted(infinite, 'rows')} dropped: an infinite value"] if infinite else []
    notes += [f"left out, without a finite point: seed {', '.join(lost)}"] if lost else []
    return replace(found, note="; ".join(notes))


def _averaged(x: Array, y: Array) -> _Run:
    at, which, count = np.unique(x, return_inverse=True, return_counts=True)
    mean = np.bincount(which, y) / count
    dof = len(x) - len(at)
    if (y <= 0).any():
        return _Run(at, mean, count.astype(np.float64), None, dof)
    logs = np.log(y)
    residual = logs - (np.bincount(which, logs) / count)[which]
    return _Run(at, mean, count.astype(np.float64), math.sqrt(float(residual @ residual) / max(dof, 1)), dof)


def _falling(y: Array, count: Array) -> Array:
    from sklearn.isotonic import isotonic_regression  # a second to import, and only --isotonic needs it

    return np.asarray(isotonic_regression(y, sample_weight=count, increasing=False), np.float64)


def _first(y: Array, threshold: float) -> NDArray[np.intp]:
    """Index of the first value of y [..., n] at or below the threshold; n where there is none."""
    below = y <= threshold
    return np.asarray(np.where(below.any(-1), below.argmax(-1), y.shape[-1]), np.intp)


def _wide(before: Any, after: Any, max_ratio: float) -> Any:
    """Too wide to interpolate. From zero or less there is no ratio; rounding of other units does not decide."""
    return (before > 0) & (after > max_ratio * (1 + 1e-9) * before)


def _cross(run: _Run, threshold: float, axis: str, max_ratio: float, isotonic: bool) -> Reached:
    x, k = run.x, number(threshold)
    y = _falling(run.y, run.count) if isotonic else run.y
    first, n = int(_first(y, threshold)), len(x)
    span = Interval(None, None, None, LEVEL, "none", reason=ALONE)
    points = tuple(zip(x.tolist(), y.tolist(), strict=True))
    found = Reached(threshold, axis, (None, None), None, None, "none", span, points=points)
    if first == n:
        best = int(y.argmin())
        note = f"not reached: lowest {number(float(y[best]))} at {number(float(x[best]))}"
        return replace(found, bracket=(float(x[-1]), None), censored="right", note=note)
    notes = []
    if len(again := x[first:][y[first:] > threshold]):
        notes.append(f"first crossing; above {k} again at {', '.join(number(float(each)) for each in again)}")
    after = float(x[first])
    if first == 0:
        notes.insert(0, f"at or below {k} from the first point on")
        return replace(found, bracket=(None, after), censored="left", note="; ".join(notes))
    before, above, below = float(x[first - 1]), float(y[first - 1]), float(y[first])
    refused, linear, log = None, None, None
    if below == threshold:  # nothing to interpolate
        linear = log = after
    elif _wide(before, after, max_ratio):
        ratio = f"{number(after / before)} apart, more than {number(max_ratio)}"
        sentence = f"not interpolated: {k} is passed between {number(before)} and {number(after)} {axis}, {ratio}"
        refused = {"code": "wide_bracket", "sentence": sentence}
        notes.insert(0, sentence)
    else:
        share = (above - threshold) / (above - below)
        linear = (1 - share) * before + share * after
        if lost := [number(value) for value in (before, threshold, below) if value <= 0]:
            notes.append(f"no logarithm of {lost[0]}")
        else:
            log = before * (after / before) ** (math.log(above / threshold) / math.log(above / below))
    span = replace(span, estimate=linear)
    found = replace(found, bracket=(before, after), linear=linear, log=log, interval=span, refused=refused)
    return replace(found, note="; ".join(notes))


def _noise(run: _Run, threshold: float, max_ratio: float, isotonic: bool, draws: int) -> Interval:
    """Interval of evaluation noise alone: percentiles of the crossings of drawn curves.

    Where a draw is censored or its bracket wide, its crossing lies somewhere between two ends: the lower percentile is
    that of the lower ends, the upper one that of the upper ends.
    """
    method = f"evaluation noise of one training run, {draws} parametric-t draws, seed {SEED}"
    nothing = Interval(None, None, None, LEVEL, method, run.dof)
    if run.dof == 0:
        return replace(nothing, method="none", dof=None, reason=ALONE)
    if run.scatter is None:
        return replace(nothing, reason="relative noise of a metric that is not positive")
    if run.scatter <= 1e-12:
        return replace(nothing, reason="the repeats agree to the last digit, which says nothing")
    rng, x, n = np.random.default_rng(SEED), run.x, len(run.x)
    scale = run.scatter * np.sqrt(run.dof / rng.chisquare(run.dof, (draws, 1)))
    y = run.y * np.exp(scale * rng.standard_normal((draws, n)) / np.sqrt(run.count))
    if isotonic:
        y = np.stack([_falling(each, run.count) for each in y])
    first, each = _first(y, threshold), np.arange(draws)
    low, high = x[np.clip(first - 1, 0, n - 1)], x[np.clip(first, 0, n - 1)]
    above, below = y[each, np.clip(first - 1, 0, n - 1)], y[each, np.clip(first, 0, n - 1)]
    inside = (first > 0) & (first < n)
    share = np.divide(above - threshold, above - below, out=np.zeros(draws), where=inside)
    crossing = (1 - share) * low + share * high
    known = inside & ~_wide(low, high, max_ratio)
    lower = np.where(known, crossing, np.where(first == 0, -np.inf, low))
    upper = np.where(known, crossing, np.where(first == n, np.inf, high))
    ends = [
        float(np.quantile(limits, tail, method="inverted_cdf"))
        for limits, tail in ((lower, 0.5 - LEVEL / 2), (upper, 0.5 + LEVEL / 2))
    ]
    low_end, high_end = (end if math.isfinite(end) else None for end in ends)
    reason = None if low_end is not None and high_end is not None else "an end lies outside what was measured"
    return replace(nothing, low=low_end, high=high_end, reason=reason)


def _over(runs: dict[str, Reached]) -> Reached:
    """One curve from several training runs."""
    found, n = list(runs.values()), len(runs)
    lows, highs = [each.bracket[0] for each in found], [each.bracket[1] for each in found]
    low = None if None in lows else min(end for end in lows if end is not None)
    high = None if None in highs else max(end for end in highs if end is not None)
    count = {kind: sum(each.censored == kind for each in found) for kind in ("left", "right")}
    censored: Censored = "right" if count["right"] else "left" if count["left"] else "none"
    notes = [f"{n} seeds"]
    notes += [f"{count['right']} of {n} seeds do not reach it"] if count["right"] else []
    notes += [f"{count['left']} of {n} seeds are there at their first point"] if count["left"] else []
    notes += [f"seed {name}: {each.note}" for name, each in runs.items() if each.note and each.censored == "none"]
    mean = {}
    for kind in ("linear", "log"):
        values = [value for each in found if (value := getattr(each, kind)) is not None and value > 0]
        mean[kind] = math.exp(float(np.log(values).mean())) if len(values) == n else None
    refused = next((each.refused for each in found if each.refused), None)
    span = replace(_between(found, censored, count), estimate=mean["linear"])
    first = found[0]
    return Reached(
        *(first.threshold, first.axis, (low, high), mean["linear"], mean["log"], censored, span),
        *("; ".join(notes), refused, tuple(found)),
    )


def _between(found: Sequence[Reached], censored: Censored, count: dict[str, int]) -> Interval:
    """Interval from the spread of training runs."""
    n, method = len(found), f"Student-t over ln of the linear crossings of {len(found)} seeds"
    linear = [each.linear for each in found if each.linear is not None and each.linear > 0]
    if len(linear) == n:
        logs = np.log(linear)
        around = student(float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(n), n - 1, method)
        if around.low is None or around.high is None:
            return Interval(None, None, None, LEVEL, method, n - 1, around.reason)
        return Interval(None, math.exp(around.low), math.exp(around.high), LEVEL, method, n - 1)
    told = f"{count[censored]} of {n} seeds are {censored}-censored" if censored != "none" else "a seed has no crossing"
    if censored == "none" or (count["left"] and count["right"]):
        return Interval(None, None, None, LEVEL, "none", reason=told)
    # the known side of each run: an end at or before (right-censored) or at or after (left-censored) its crossing
    right = censored == "right"
    ends = np.array([each.bracket[0 if right else 1] if each.linear is None else each.linear for each in found])
    test = stats.quantile_test(ends.astype(np.float64), p=0.5, alternative="greater" if right else "less")
    limits: Any = test.confidence_interval(LEVEL)  # a pair of ends, which its type stubs miss
    bound = float(limits.low if right else limits.high)
    if not math.isfinite(bound):
        reason = f"{told}, and a one-sided {LEVEL:.0%} bound of the median needs five"
        return Interval(None, None, None, LEVEL, "none", reason=reason)
    method = f"one-sided, median of {n} seeds, order statistics"
    return Interval(None, bound if right else None, None if right else bound, LEVEL, method, reason=told)
