"""What would other draws of the data have given? Bootstraps of a fit: rows, groups, residuals, parametric-t.

Percentiles of pairs, residual and wild bootstraps undercover below some twelve independent units (77-88 % at a nominal
95 % with five to eight), and resampling the checkpoints of a run as if they were runs makes errors many times too
small: rows of groups are resampled one by one only when that is asked for by name. Every draw is a refit to its own
optimum, started from the fit of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.estimate import Estimate
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.solver import solve

Kind = Literal["rows", "groups", "residuals", "parametric-t"]
UNITS = 12  # from which percentiles of resampled units hold what they say
SAME = 0.02  # values of ln x this close are one design point


@dataclass(frozen=True)
class Draws:
    """Refits of one law, in scaled (``theta``) and reported parameters, [D, p]; NaN where a draw cannot be fitted."""

    theta: Array
    values: Array
    units: int
    method: str

    @property
    def error(self) -> Array:
        """Standard errors [p]."""
        return np.asarray(np.nanstd(self.values, axis=0, ddof=1))

    @property
    def lost(self) -> float:
        """Share of draws that could not be fitted."""
        return float(np.isnan(self.theta).any(1).mean())

    @property
    def noise(self) -> Array:
        """Monte-Carlo error [p] of the standard errors, as a share of them: other seeds differ by that much."""
        held = self.values[np.isfinite(self.values).all(1)]
        off = (held - held.mean(0)) / np.maximum(held.std(0), 1e-300)
        return np.asarray(np.sqrt(np.maximum((off**4).mean(0) - 1.0, 0.0) / (4 * len(held))))


def points(x: Array) -> NDArray[np.intp]:
    """The design point [n] of each row of x [n, d]: rounding of a budget to whole steps makes no new one."""
    steps = np.stack([steps_of(column) for column in np.log(x).T], axis=-1)
    return np.asarray(np.unique(steps, axis=0, return_inverse=True)[1]).reshape(-1)


def steps_of(logs: Array) -> NDArray[np.intp]:
    """Numbers 0, 1, ... of the values of ln x [n] that are told apart: within SAME of the first of them are one.

    Of the first, and not of the neighbour: a thousand budgets over four decades are not one.
    """
    values, place = np.unique(logs, return_inverse=True)
    step, first, found = 0, values[0] if len(values) else 0.0, np.empty(len(values), np.intp)
    for i, value in enumerate(values.tolist()):
        if value - first > SAME:
            step, first = step + 1, value
        found[i] = step
    return found[place.reshape(-1)]


def counted(indices: NDArray[np.intp], n: int) -> Array:
    """How often each of n units stands in each row of ``indices`` [D, k]: [D, n]."""
    shifted = indices + n * np.arange(len(indices))[:, None]
    times = np.bincount(shifted.ravel(), minlength=len(indices) * n).astype(np.float64)
    return np.asarray(times.reshape(len(indices), n))


def rows(found: Estimate, indices: NDArray[np.intp], how: str) -> Draws:
    """Refits to rows drawn with replacement, ``indices`` [D, k]."""
    return _refit(found, found.y, counted(indices, found.y.shape[1]) * found.weights, indices.shape[1], how)


def draw(found: Estimate, kind: Kind, draws: int, seed: int) -> Draws:
    """A bootstrap by name. Raises ``Refusal``: grouped (a kind that takes points as independent), too_few."""
    assert len(found.theta) == 1
    rng, n = np.random.default_rng(seed), found.y.shape[1]
    told = f"{draws} draws, seed {seed}"
    if kind == "rows":
        return rows(found, rng.integers(0, n, (draws, n)), f"bootstrap of rows, taken as independent, {told}")
    if kind == "groups":
        if found.codes is None:
            raise Refusal(
                "too_few", "a bootstrap of groups needs groups of several rows; without them, it is one of rows"
            )
        count = int(found.codes.max()) + 1
        if count < 2:
            raise Refusal("too_few", "one group says nothing about another, and its points are not independent")
        times = counted(rng.integers(0, count, (draws, count)), count)[:, found.codes]
        return _refit(found, found.y, times * found.weights, count, f"bootstrap of {count} groups, {told}")
    if found.codes is not None:
        raise Refusal("grouped", f"a {kind} bootstrap takes points as independent; these come in groups")
    return {"residuals": _residuals, "parametric-t": _parametric}[kind](found, draws, rng, told)


def _residuals(found: Estimate, draws: int, rng: np.random.Generator, told: str) -> Draws:
    """Residuals over sqrt(1 - leverage), centred, put back on the law in another order."""
    n = found.y.shape[1]
    center = found.law.value(found.theta, found.x)[0]
    gradient = found.law.jacobian(found.theta, found.x)[0].T
    log = found.objective.residuals == "log"
    off = np.log(found.y[0] / center) if log else found.y[0] - center
    root = np.sqrt(found.weights[0])
    basis = np.linalg.qr((gradient / center[:, None] if log else gradient) * root[:, None])[0]
    leverage = np.minimum((basis**2).sum(1), 1 - 1e-6)
    left = off * root / np.sqrt(1 - leverage)
    noise = (left - left.mean())[rng.integers(0, n, (draws, n))] / np.maximum(root, 1e-300)
    return _refit(found, _put(center, noise, log), None, n, f"bootstrap of residuals, {told}")


def _parametric(found: Estimate, draws: int, rng: np.random.Generator, told: str) -> Draws:
    """Noise of each draw with its own scale, sigma sqrt(dof / chi2(dof)): what is known of sigma at this n."""
    n, dof = found.y.shape[1], found.n - len(found.law.parameters)
    if dof < 1:
        raise Refusal("too_few", f"{found.n} points leave no degree of freedom")
    scale = float(found.sigma[0]) * np.sqrt(dof / rng.chisquare(dof, (draws, 1)))
    noise = scale * rng.standard_normal((draws, n)) / np.sqrt(np.maximum(found.weights[0], 1e-300))
    center = found.law.value(found.theta, found.x)[0]
    y = _put(center, noise, found.objective.residuals == "log")
    return _refit(found, y, None, n, f"parametric-t bootstrap, {told}")


def _put(center: Array, noise: Array, log: bool) -> Array:
    return np.asarray(center * np.exp(noise) if log else np.maximum(center + noise, 1e-12))


def _refit(found: Estimate, y: Array, weights: Array | None, units: int, method: str) -> Draws:
    count = len(y) if weights is None else len(weights)
    held = np.broadcast_to(found.weights, (count, found.weights.shape[1])) if weights is None else weights
    theta = solve(found.law, found.x, y, np.array(held), found.objective, start=found.theta[0]).theta
    place = points(found.x[0])
    there = np.zeros((count, int(place.max()) + 1), bool)
    for point in range(there.shape[1]):
        there[:, point] = (held[:, place == point] > 0).any(1)
    theta[there.sum(1) < len(found.law.parameters)] = np.nan
    values = np.full(theta.shape, np.nan)
    fine = np.isfinite(theta).all(1)
    values[fine] = found.law.natural(theta[fine], found.pivots[0], float(found.scale[0]))[0]
    return Draws(theta, values, units, method)
