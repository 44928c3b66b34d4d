"""Which values of a parameter do the points still allow? Profile intervals: all others refitted, judged by F.

A value is allowed while the loss of the best fit that holds it exceeds the least loss by no more than F(1, n - p) times
the residual variance. Follows a curved valley where a linearisation does not; near a bound it covers more than it says.
For least squares and points taken as independent. An asymptote and exponents are profiled, in inputs around their
geometric means; an amplitude at x = 1 moves with the exponents along a ridge there and has none.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from analysis.estimate import Estimate
from analysis.interval import LEVEL, Interval
from analysis.laws import Array, Sum
from analysis.refusal import Refusal
from analysis.solver import Flags, solve

WIDEN = 40  # steps outwards, each twice as far, until a value is no longer allowed
HALVE = 30  # steps of the search between
TIE = 1e-9  # of a loss


def suits(found: Estimate) -> None:
    """Raises ``Refusal`` (grouped, unsuited) for a fit that cannot be profiled."""
    if found.codes is not None:
        raise Refusal("grouped", "a profile takes points as independent; these come in groups")
    if found.objective.loss != "squares":
        raise Refusal("unsuited", "a profile judged by F is one of least squares; other losses have bootstraps")
    law = found.law
    if not isinstance(law, Sum) or any(len(power.inputs) > 1 for term in law.terms for power in term.powers):
        raise Refusal("unsuited", f"the exponents of the {law.name} form are no coordinates of their own to profile")


def profile(found: Estimate, level: float = LEVEL) -> dict[str, Interval]:
    """Profile intervals of every parameter; an end without a limit within the bounds is null, with the reason.

    Raises ``Refusal`` as ``suits`` does.
    """
    suits(found)
    assert len(found.theta) == 1
    law, names = found.law, found.law.parameters
    dof = found.n - len(names)
    method, values = f"profile, F(1, {dof}), points taken as independent", found.params[0]
    why = "no degree of freedom is left" if dof < 1 else "an amplitude at x = 1 has no profile; its exponents do"
    made = {
        name: Interval(float(value), None, None, level, method, dof, why)
        for name, value in zip(names, values, strict=True)
    }
    if dof < 1:
        return made
    best, least = found.theta[0], float(found.cost[0])
    allowed = least * (1 + float(stats.f.ppf(level, 1, dof)) / dof)
    profiled = [i for i, name in enumerate(names) if name not in law.positive]
    index = np.repeat(profiled, 2)
    rows, sign = np.arange(len(index)), np.tile([-1.0, 1.0], len(profiled))
    scale = np.where(np.array([names[i] == law.asymptote for i in index]), float(found.scale[0]), 1.0)
    ends = found.parameters(level)
    spread = (ends.high[0] - ends.low[0])[index] / scale / 2
    step = np.where(np.isfinite(spread) & (spread > 0), spread, 0.1 * (1 + np.abs(best[index])))
    lower, upper = law.lower[index], law.upper[index]
    near, far = best[index].copy(), np.clip(best[index] + sign * step, lower, upper)
    theta = np.repeat(best[None], len(index), 0)  # of the last value that was allowed: the next start

    # amplitudes follow a held exponent as far as it takes them: their bounds are of starts, not of facts
    logs = np.array([name in law.positive for name in names])
    free = np.where(logs, -np.inf, law.lower), np.where(logs, np.inf, law.upper)

    def inside(at: Array) -> Flags:
        low, high = (np.repeat(limit[None], len(index), 0) for limit in free)
        low[rows, index] = high[rows, index] = at
        start = theta.copy()
        start[rows, index] = at
        weights = np.repeat(found.weights, len(index), 0)
        held = solve(law, found.x, found.y, weights, found.objective, start=start, limits=(low, high))
        fine = np.asarray(held.cost <= allowed * (1 + TIE), np.bool_)
        theta[fine] = held.theta[fine]
        return fine

    edge = np.where(sign < 0, lower, upper)
    open_end = np.zeros(len(index), bool)
    for _ in range(WIDEN):
        fine = inside(far)
        open_end = fine & (far == edge)
        if not (fine & ~open_end).any():
            break
        further = np.clip(far + 2 * (far - near), lower, upper)
        near, far = np.where(fine, far, near), np.where(fine, further, far)
    for _ in range(HALVE):
        middle = (near + far) / 2
        fine = inside(middle)
        near, far = np.where(fine, middle, near), np.where(fine, far, middle)
    zero = (sign < 0) & np.array([names[i] == law.asymptote for i in index])  # the one bound that is a fact
    limits = scale * np.where(open_end, np.where(zero, edge, np.nan), (near + far) / 2)
    for place, i in enumerate(profiled):
        both = [float(end) if np.isfinite(end) else None for end in limits[2 * place : 2 * place + 2]]
        missing = "the points allow any value up to the bound" if None in both else None
        made[names[i]] = Interval(float(values[i]), both[0], both[1], level, method, dof, missing)
    return made
