"""Which parameters fit best? Least squares, Huber and least absolute deviations, thousands of refits in one batch.

Every refit starts from variable projection (``Form.starts``) or from a neighbour's optimum, and is polished by Newton
steps with exact second derivatives, damped towards reweighted least squares where those are not downhill. The loss is a
sum (a mean under an optimiser's default tolerances stops 9 % above the optimum of a loss of 1e-3), stopping rules are
relative, and nothing depends on the units of a loss or an input. float64 throughout.

Huber's loss with a small delta is nearly flat between its kinks; it is reached through larger deltas, each from the
optimum of the one before. Least absolute deviations are the end of that road.
"""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.laws import ALIVE, Array, Form

Residuals = Literal["log", "raw"]
Loss = Literal["squares", "huber", "absolute"]
Flags = NDArray[np.bool_]

ITERATIONS = 200
STEP = 1e-11  # relative step at which a refit has converged
GAIN = 1e-15  # predicted share of the loss that a step would gain, likewise
WIDE = 2.0  # typical residuals: the first delta
NARROW = 0.1  # from one delta to the next
SETTLE = 40  # steps at each delta on the way, at most
TINY = 1e-10  # of a typical residual: the delta that stands for none
RETRIED = 4  # starts, where the first ends at a bound
BLOCK = 80_000  # elements of a batch's Jacobians that are worked on at a time: they stay in the cache
NEAR = 1e-8  # of order one: distance to a bound at which a step outwards is one into it
DAMPED = (1e-12, 1e10)


@dataclass(frozen=True)
class Objective:
    """What is summed over points: w r^2, w Huber_delta(r) or w |r|, of r = ln y - ln f or y - f."""

    residuals: Residuals = "log"
    loss: Loss = "squares"
    delta: float | None = None  # in units of r (of y for raw ones); Huber's only

    def __str__(self) -> str:
        name = {"squares": "least squares", "huber": f"Huber (delta {self.delta:g})" if self.delta else ""}
        return f"{name.get(self.loss, 'least absolute deviations')} on {self.residuals} residuals"

    def total(self, residual: Array, weights: Array) -> Array:
        """The loss of each refit [B], of residuals and weights [B, n]."""
        size = np.abs(residual)
        if self.loss == "squares":
            return np.asarray((weights * residual * residual).sum(-1))
        if self.loss == "absolute":
            return np.asarray((weights * size).sum(-1))
        assert self.delta is not None
        return _huber(size, weights, self.delta)


class Solution(NamedTuple):
    theta: Array  # [B, p]
    cost: Array  # [B], of the objective
    converged: Flags  # [B]


def residual(objective: Objective, value: Array, y: Array) -> Array:
    return np.asarray(y - value if objective.residuals == "raw" else np.log(y / value))


def solve(
    form: Form,
    x: Array,
    y: Array,
    weights: Array,
    objective: Objective = Objective(),
    *,
    start: Array | None = None,
    limits: tuple[Array, Array] | None = None,
) -> Solution:
    """Refits of one form. ``x [1 or B, n, d]``, ``y [1 or B, n]`` > 0 of order one, ``weights [B, n]`` >= 0.

    A weight of 0 leaves a point out. ``start`` [B, p] or [p] replaces the form's own, ``limits`` its bounds
    (each [p] or [B, p]; a parameter whose two bounds agree is held there).
    """
    bounds = (form.lower, form.upper) if limits is None else limits
    count = len(weights)
    blocks = max(1, min(count, math.ceil(count * x.shape[1] * len(form.parameters) / BLOCK)))
    edges = np.linspace(0, count, blocks + 1).astype(int)

    def part(low: int, high: int) -> Solution:
        def cut(array: Array) -> Array:
            return array if len(array) == 1 else array[low:high]

        w = weights[low:high]
        inside = bounds if bounds[0].ndim == 1 else (bounds[0][low:high], bounds[1][low:high])
        at = cut(x), np.broadcast_to(cut(y), w.shape), w
        if start is None:
            return _anew(form, *at, objective, inside)
        theta = np.broadcast_to(start if start.ndim == 1 else start[low:high], (high - low, start.shape[-1]))
        return _descend(form, *at, objective, np.array(theta), inside)

    ranges = [(int(low), int(high)) for low, high in itertools.pairwise(edges) if high > low]
    if len(ranges) == 1:
        return part(*ranges[0])
    with ThreadPoolExecutor(min(len(ranges), os.cpu_count() or 1)) as pool:
        parts = list(pool.map(lambda each: part(*each), ranges))
    return Solution(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _anew(
    form: Form, x: Array, y: Array, weights: Array, objective: Objective, limits: tuple[Array, Array]
) -> Solution:
    """From the form's own start; where an exponent ends at a bound or a term dies out, also from others."""
    found = _descend(form, x, y, weights, objective, form.starts(x, y, weights)[:, 0], limits)
    free = np.array([name != form.asymptote for name in form.parameters])
    lowest = np.where([name in form.positive for name in form.parameters], np.log(ALIVE), limits[0])
    stuck = np.flatnonzero((((found.theta <= lowest) | (found.theta >= limits[1])) & free).any(1))
    if not len(stuck):
        return found
    at = (x if len(x) == 1 else x[stuck], y[stuck], weights[stuck])
    others = form.starts(*at, RETRIED)
    inside = limits if limits[0].ndim == 1 else (limits[0][stuck], limits[1][stuck])
    for i in range(1, others.shape[1]):
        again = _descend(form, *at, objective, others[:, i], inside)
        better = again.cost < found.cost[stuck]
        rows = stuck[better]
        for held, new in zip(found, again, strict=True):
            held[rows] = new[better]
    return found


def _descend(
    form: Form, x: Array, y: Array, weights: Array, objective: Objective, theta: Array, limits: tuple[Array, Array]
) -> Solution:
    """Through decreasing deltas to the objective's own."""
    theta = np.clip(theta, *limits)
    if objective.loss == "squares":
        return _newton(form, x, y, weights, objective, theta, limits, math.inf, ITERATIONS)
    with np.errstate(all="ignore"):
        size = np.abs(residual(objective, form.value(theta, x), y))
    typical = float(np.median(size)) or 1.0
    last = objective.delta if objective.loss == "huber" and objective.delta is not None else TINY * typical
    delta = max(WIDE * typical, last)
    found = Solution(theta, np.zeros(len(theta)), np.zeros(len(theta), bool))
    while delta > last:
        found = _newton(form, x, y, weights, objective, found.theta, limits, delta, SETTLE)
        delta *= NARROW
    found = _newton(form, x, y, weights, objective, found.theta, limits, last, ITERATIONS)
    return found._replace(cost=objective.total(residual(objective, form.value(found.theta, x), y), weights))


def _huber(size: Array, weights: Array, delta: float) -> Array:
    if math.isinf(delta):
        return np.asarray((weights * size * size).sum(-1))
    inner = np.minimum(size, delta)
    return np.asarray((weights * inner * (size - 0.5 * inner)).sum(-1))


def _newton(
    form: Form,
    x: Array,
    y: Array,
    weights: Array,
    objective: Objective,
    theta: Array,
    limits: tuple[Array, Array],
    delta: float,
    iterations: int,
) -> Solution:
    """Damped Newton descent of Huber's loss at one delta (infinite: squares, without the half)."""
    log, own = objective.residuals == "log", limits[0].ndim > 1
    theta = theta.copy()
    count, p = theta.shape
    half = 2.0 if math.isinf(delta) else 1.0  # the loss over that of the derivatives below

    def evaluate(at: Array, rows: NDArray[np.intp] | slice) -> tuple[Array, Array]:
        value = form.value(at, x if len(x) == 1 else x[rows])
        with np.errstate(all="ignore"):
            return value, residual(objective, value, y[rows])

    def loss(r: Array, w: Array) -> Array:
        found = _huber(np.abs(r), w, delta)
        return np.where(np.isfinite(found), found, np.inf)

    value, r = evaluate(theta, slice(None))
    cost = loss(r, weights)
    damping = np.full(count, 0.1)
    converged = np.zeros(count, bool)
    eye = np.eye(p)
    for _ in range(iterations):
        rows = np.flatnonzero(~converged)
        if not len(rows):
            break
        whole = len(rows) == count
        at = x if len(x) == 1 or whole else x[rows]
        current, w = (theta, weights) if whole else (theta[rows], weights[rows])
        f, res = (value, r) if whole else (value[rows], r[rows])
        lower, upper = (limits[0][rows], limits[1][rows]) if own else limits
        jacobian = form.jacobian(current, at)
        size = np.abs(res)
        if log:
            jacobian = jacobian / f[:, None]
        pull = w * np.clip(res, -delta, delta)  # weights times the derivative of the loss
        gradient = (jacobian * pull[:, None]).sum(-1)
        majorant = w if math.isinf(delta) else w * np.minimum(1.0, delta / np.maximum(size, 1e-300))
        surrogate = (jacobian * majorant[:, None]) @ np.swapaxes(jacobian, 1, 2)
        inner = w if math.isinf(delta) else w * (size <= delta)
        bend = inner + pull if log else inner
        hessian = (jacobian * bend[:, None]) @ np.swapaxes(jacobian, 1, 2)
        hessian -= form.curvature(current, at, pull / f if log else pull)
        # also next to a bound: a step that is cut off there is no longer downhill, and damping would end it
        low, high = (current <= lower + NEAR) & (gradient < 0), (current >= upper - NEAR) & (gradient > 0)
        held = low | high
        gradient = np.where(held, 0.0, gradient)
        diagonal = np.einsum("bpp->bp", surrogate)
        root = np.sqrt(np.maximum(diagonal, 1e-300 + 1e-26 * diagonal.max(1, keepdims=True)))
        root = np.where(held, 1.0, root)
        scale = root[:, :, None] * root[:, None, :]
        moving = ~(held[:, :, None] | held[:, None, :])
        mu = damping[rows, None, None]
        # unit diagonal, so that a condition number speaks of the design and not of units
        matrix = (
            np.where(moving, (hessian + mu * surrogate) / scale, 0.0)
            + np.where(held[:, :, None], 1.0, 1e-13 + 1e-3 * mu) * eye
        )
        step = np.linalg.solve(matrix, (gradient / root)[..., None])[..., 0] / root
        downhill = (step * gradient).sum(1)
        step = np.where(np.isfinite(step).all(1, keepdims=True) & (downhill >= 0)[:, None], step, 0.0)
        trial = np.clip(current + step, lower, upper)
        trial = np.where(low, lower, np.where(high, upper, trial))
        tried_value, tried_r = evaluate(trial, rows)
        tried = loss(tried_r, w)
        before, moved = cost[rows], (np.abs(trial - current) / (1.0 + np.abs(current))).max(1)
        # near the optimum a step changes the sum by less than its rounding; it still improves theta
        better = (tried <= before * (1 + 1e-14) + 1e-300) & (downhill >= 0)
        chosen = rows[better]
        theta[chosen], cost[chosen] = trial[better], tried[better]
        value[chosen], r[chosen] = tried_value[better], tried_r[better]
        damping[rows] = np.clip(np.where(better, mu[:, 0, 0] / 10, mu[:, 0, 0] * 10), *DAMPED)
        arrived = better & (mu[:, 0, 0] < 1e-3) & ((moved < STEP) | (downhill * half < GAIN * before))
        # a step that small and no gain: what is left is rounding
        stuck = ~better & ((moved < math.sqrt(STEP)) & (mu[:, 0, 0] < 1e-3) | (damping[rows] >= DAMPED[1]))
        converged[rows] = arrived | stuck
    return Solution(theta, cost, converged)
