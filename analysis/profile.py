"""Which values of a parameter do the points still allow? Profile intervals: all others refitted, judged by F.

A value is allowed while the loss of the best fit that holds it exceeds the least loss by no more than F(1, n - p) times
the residual variance. Follows a curved valley where a linearisation does not; near a bound it covers more than it says.
For least squares and points taken as independent.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from analysis.estimate import Estimate
from analysis.interval import LEVEL, Interval
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.solver import solve

WIDEN = 40  # steps outwards, each twice as far, until a value is no longer allowed
HALVE = 30  # steps of the search between


def suits(found: Estimate) -> None:
    """Raises ``Refusal`` (grouped, unsuited) for a fit that cannot be profiled."""
    if found.codes is not None:
        raise Refusal("grouped", "a profile takes points as independent; these come in groups")
    if found.objective.loss != "squares":
        raise Refusal("unsuited", "a profile judged by F is one of least squares; other losses have bootstraps")


def profile(found: Estimate, level: float = LEVEL) -> dict[str, Interval]:
    """Profile intervals of every parameter; an end without a limit within the bounds is null, with the reason.

    Raises ``Refusal`` as ``suits`` does.
    """
    suits(found)
    assert len(found.theta) == 1
    law, names = found.law, found.law.parameters
    dof = found.n - len(names)
    method = f"profile, F(1, {dof}), points taken as independent"
    values = found.params[0]
    if dof < 1:
        reason = "no degree of freedom is left"
        return {
            name: Interval(float(value), None, None, level, method, dof, reason)
            for name, value in zip(names, values, strict=True)
        }
    # with inputs as given, every reported parameter is a coordinate (or the exponential of one)
    x = found.x * found.pivots[:, None]
    scale = float(found.scale[0])
    logs = np.array([name in law.positive for name in names])
    unit = np.ones_like(found.pivots[0])
    base = np.zeros((1, len(names)))
    at_zero = law.natural(base, unit, scale)[0][0]
    shift = np.where(logs, np.log(np.maximum(at_zero, 1e-300)), 0.0)
    factor = np.where(logs, 1.0, np.diag(law.natural(base, unit, scale)[1][0]))
    best = np.where(logs, np.log(np.where(logs, values, 1.0)) - shift, values / factor)
    lower, upper = np.where(logs, -np.inf, law.lower), np.where(logs, np.inf, law.upper)
    start = solve(law, x, found.y, found.weights, found.objective, start=best, limits=(lower, upper))
    best, least = start.theta[0], float(start.cost[0])
    allowed = least * (1 + float(stats.f.ppf(level, 1, dof)) / dof)
    ends = found.parameters(level)
    sides = [(i, sign) for i in range(len(names)) for sign in (-1.0, 1.0)]
    index = np.array([i for i, _ in sides])
    sign = np.array([s for _, s in sides])
    with np.errstate(all="ignore"):  # of parameters that are not logarithms, which the other branch is for
        spread = np.where(logs, np.log(ends.high[0] / ends.low[0]), (ends.high[0] - ends.low[0]) / factor) / 2
    step = np.where(np.isfinite(spread) & (spread > 0), spread, 0.1 * (1 + np.abs(best)))[index]
    near, far = best[index].copy(), best[index] + sign * step
    theta = np.repeat(best[None], len(sides), 0)

    def loss(at: Array) -> Array:
        nonlocal theta
        low, high = (np.repeat(limit[None], len(sides), 0) for limit in (lower, upper))
        low[np.arange(len(sides)), index] = high[np.arange(len(sides)), index] = at
        weights = np.repeat(found.weights, len(sides), 0)
        held = solve(law, x, found.y, weights, found.objective, start=theta, limits=(low, high))
        theta = held.theta
        return held.cost

    edge = np.where(sign < 0, lower[index], upper[index])
    far = np.clip(far, lower[index], upper[index])
    open_end = np.zeros(len(sides), bool)
    for _ in range(WIDEN):
        inside = loss(far) <= allowed
        open_end = inside & (far == edge)
        if not (inside & ~open_end).any():
            break
        further = np.clip(far + 2 * (far - near), lower[index], upper[index])
        near, far = np.where(inside, far, near), np.where(inside, further, far)
    for _ in range(HALVE):
        middle = (near + far) / 2
        inside = loss(middle) <= allowed
        near, far = np.where(inside, middle, near), np.where(inside, far, middle)
    zero = (sign < 0) & np.array([names[i] == law.asymptote for i in index])  # the one bound that is a fact
    found_ends = np.where(open_end, np.where(zero, edge, np.nan), (near + far) / 2)
    limits = found_ends * factor[index]
    limits = np.where(logs[index], np.exp(np.minimum(found_ends + shift[index], 700.0)), limits)
    made = {}
    for i, name in enumerate(names):
        low, high = float(limits[2 * i]), float(limits[2 * i + 1])
        missing = None if np.isfinite([low, high]).all() else "the points allow any value up to the bound"
        both = (low if np.isfinite(low) else None, high if np.isfinite(high) else None)
        made[name] = Interval(float(values[i]), *both, level, method, dof, missing)
    return made
