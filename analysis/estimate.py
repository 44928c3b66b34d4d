"""What do points say about the parameters of a law? Batches of fits with the intervals of their linearisation.

An asymptote is fitted at 0 or above, but its interval and that of everything that hangs on it are those of a fit that
may go below: at a bound, neither the linearised nor the profile likelihood has the distribution that intervals need.
What lies below 0 is then cut off, and an interval always holds the estimate. Shapes: B fits of n points each, d inputs,
p parameters, m places of a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from analysis.covariance import FEW, Covariance, classical, clustered
from analysis.interval import LEVEL
from analysis.laws import Array, Form
from analysis.solver import Flags, Objective, residual, solve

BOUND = 1e-9  # distance to a bound, relative to order one, that counts as at the bound
FREEDOM = 2.5  # degrees of freedom of a cluster-robust interval below which it covers more than it says
SURE = 1 / 3  # an exponent is identified where its interval is within this share of it on either side ...
SURE_LEVEL = 1 / 2  # ... an asymptote or a prediction within this share of the level
PLACE = np.log(2.0)  # ... and a place along x within this factor either way
SQUARES = Objective()


class Ends(NamedTuple):
    """Intervals [B, k] of k quantities; NaN where there is none."""

    estimate: Array
    error: Array  # standard error, in the unit of the quantity
    low: Array
    high: Array
    dof: Array
    identified: Flags


@dataclass(frozen=True)
class Estimate:
    """B fits of one law: inputs divided by ``pivots`` [B, d], metrics by ``scale`` [B]."""

    law: Form
    x: Array  # [1 or B, n, d], scaled
    y: Array  # [B, n], scaled
    weights: Array  # [B, n]
    codes: NDArray[np.intp] | None  # [n]: the cluster of each point, 0 ... G - 1
    objective: Objective
    pivots: Array
    scale: Array
    theta: Array  # [B, p]
    centre: Array  # [B, p], the asymptote free to be negative: what intervals are around
    cost: Array  # [B]
    centre_cost: Array  # [B]
    converged: Flags  # [B]

    def take(self, row: int) -> Estimate:
        """One of the fits, as a batch of one."""
        at = slice(row, row + 1)
        arrays = ("y", "weights", "pivots", "scale", "theta", "centre", "cost", "centre_cost", "converged")
        cut = {name: getattr(self, name)[at] for name in arrays}
        return replace(self, x=self.x if len(self.x) == 1 else self.x[at], **cut)

    @property
    def n(self) -> int:
        return int((self.weights[0] > 0).sum())

    @property
    def clusters(self) -> int | None:
        """Of points; None where each is its own."""
        return None if self.codes is None else int(self.codes.max()) + 1

    @property
    def dof(self) -> int:
        count = self.clusters
        return self.n - len(self.law.parameters) if count is None else count - 1

    @cached_property
    def sigma(self) -> Array:
        """Residual standard deviation [B] about the fit; NaN without a degree of freedom."""
        spare = self.n - len(self.law.parameters)
        return np.sqrt(self.cost / spare) if spare > 0 else np.full(len(self.cost), np.nan)

    @cached_property
    def at_bound(self) -> tuple[Flags, Flags]:
        """Which parameters [B, p] sit at their lower and upper bounds."""
        near = BOUND * (1.0 + np.abs(self.theta))
        below, above = self.theta - self.law.lower <= near, self.law.upper - self.theta <= near
        return np.asarray(below, np.bool_), np.asarray(above, np.bool_)

    @cached_property
    def covariance(self) -> Covariance | None:
        """By linearisation about ``centre``; None where the loss is not least squares or nothing is to spare."""
        spare = self.n - len(self.law.parameters)
        if self.objective.loss != "squares" or spare < 1 or self.clusters == 1:
            return None
        value = self.law.value(self.centre, self.x)
        gradient = np.swapaxes(self.law.jacobian(self.centre, self.x), 1, 2)
        if self.objective.residuals == "log":
            gradient = gradient / value[..., None]
        root = np.sqrt(self.weights)
        gradient = gradient * root[..., None]
        if self.codes is None:
            return classical(gradient, np.sqrt(self.centre_cost / spare), spare)
        return clustered(gradient, residual(self.objective, value, self.y) * root, self.codes)

    @property
    def method(self) -> str:
        """How intervals are made."""
        if self.clusters is None:
            return "delta, Student-t, points taken as independent"
        kind = "CR2, Bell-McCaffrey degrees of freedom" if self.clusters < FEW else "CR3, Student-t"
        return f"delta, cluster-robust over {self.clusters} groups ({kind})"

    def natural(self, theta: Array) -> tuple[Array, Array]:
        """Reported parameters [B, p] and their Jacobians [B, p, p] at theta."""
        made = [self.law.natural(theta[i : i + 1], self.pivots[i], float(self.scale[i])) for i in range(len(theta))]
        return np.concatenate([each[0] for each in made]), np.concatenate([each[1] for each in made])

    @cached_property
    def params(self) -> Array:
        """In the caller's units, [B, p]."""
        return self.natural(self.theta)[0]

    def parameters(self, level: float = LEVEL) -> Ends:
        """Intervals of the reported parameters; symmetric in the logarithm for those that span decades."""
        return self._standard if level == LEVEL else self._parameters(level)

    @cached_property
    def _standard(self) -> Ends:
        return self._parameters(LEVEL)

    def _parameters(self, level: float) -> Ends:
        names, count = self.law.parameters, len(self.theta)
        if self.covariance is None:
            nothing = np.full((count, len(names)), np.nan)
            return Ends(self.params, nothing, nothing, nothing, nothing, np.zeros(nothing.shape, bool))
        values, change = self.natural(self.centre)
        logs = np.array([name in self.law.positive for name in names])
        with np.errstate(all="ignore"):
            contrast = np.where(logs[:, None], change / values[..., None], change)
            around = np.where(logs, np.log(values), values)
        error, dof = self.covariance.error(contrast), self.covariance.dof(contrast)
        half = quantile(dof, level) * error
        with np.errstate(over="ignore", invalid="ignore"):
            low = np.where(logs, np.exp(around - half), around - half)
            high = np.where(logs, np.exp(around + half), around + half)
        low, high = np.minimum(low, self.params), np.maximum(high, self.params)  # NaN stays NaN
        identified = self.quotable(around, half, self._settled(dof))
        for i, name in enumerate(names):
            below, above = (flags[:, i] for flags in self.at_bound)
            if name == self.law.asymptote:
                # the data would have it below what a metric can be: it has no interval, and the law is in doubt
                wrong = around[:, i] + half[:, i] <= 0
                top = self.scale * self.y.max(1)
                low[:, i] = np.where(wrong, np.nan, np.maximum(low[:, i], 0.0))
                high[:, i] = np.where(wrong, np.nan, np.minimum(high[:, i], np.maximum(top, self.params[:, i])))
                identified &= ~wrong[:, None]
            else:
                low[:, i] = np.where(below & np.isfinite(half[:, i]), self.params[:, i], low[:, i])
                high[:, i] = np.where(above & np.isfinite(half[:, i]), self.params[:, i], high[:, i])
        with np.errstate(over="ignore"):
            error = np.where(logs, error * self.params, error)
        return Ends(self.params, error, low, high, dof, identified)

    def quotable(self, around: Array, half: Array, settled: Flags) -> Flags:
        """Which parameters [B, p] are known well enough to be quoted, from centres and half-widths of their intervals.

        Exponents: within a share of themselves, and off their bounds. An amplitude hangs on the exponents, an asymptote
        has to be known within a share of the lowest fitted value as well, a place within a factor (half-widths of its
        logarithm). ``settled``: degrees of freedom are enough. Nothing is that has not converged.
        """
        names = self.law.parameters
        below, above = self.at_bound
        inside = np.asarray(~below & ~above & settled & self.converged[:, None] & np.isfinite(half), np.bool_)
        sure = np.asarray((half <= SURE * np.abs(around)) & inside, np.bool_)
        known = sure[:, self.decaying].all(1)
        for i, name in enumerate(names):
            if name in self.law.places:
                sure[:, i] = known & inside[:, i] & (half[:, i] <= PLACE)
            elif name in self.law.positive:
                sure[:, i] = known & np.isfinite(half[:, i]) & settled[:, i]
            elif name == self.law.asymptote:
                lowest = self.scale * self.law.value(self.theta, self.x).min(1)
                sure[:, i] = known & settled[:, i] & (half[:, i] <= SURE_LEVEL * lowest)
        return sure

    def curve(self, x: Array, level: float = LEVEL) -> Ends:
        """The law at x [m, d] (or [B, m, d]), in the caller's units: of the mean, not of a new observation."""
        at = x / self.pivots[:, None]
        mean = self.law.value(self.theta, at)
        scale = self.scale[:, None]
        if self.covariance is None:
            nothing = np.full(mean.shape, np.nan)
            return Ends(scale * mean, nothing, nothing, nothing, nothing, np.zeros(mean.shape, bool))
        contrast = np.swapaxes(self.law.jacobian(self.centre, at), 1, 2)
        around = self.law.value(self.centre, at)
        error, dof = self.covariance.error(contrast), self.covariance.dof(contrast)
        half = quantile(dof, level) * error
        low = np.maximum(np.minimum(around - half, mean), 0.0)
        high = np.maximum(around + half, mean)
        identified = self._known[:, None] & (half <= SURE_LEVEL * mean) & self._settled(dof)
        return Ends(scale * mean, scale * error, scale * low, scale * high, dof, identified)

    def _settled(self, dof: Array) -> Flags:
        """Whether degrees of freedom [B, m] of few clusters are enough, or those of clusters that are alike (exact)."""
        if self.covariance is None or self.covariance.loadings is None or self.clusters is None:
            return np.ones(dof.shape, bool)
        return np.asarray(dof >= min(FREEDOM, self.clusters - 1) - 1e-6, np.bool_)

    @cached_property
    def _known(self) -> Flags:
        """Whether all exponents [B] are identified."""
        return np.asarray(self.parameters().identified[:, self.decaying].all(1), np.bool_)

    @cached_property
    def decaying(self) -> Flags:
        """Which parameters are exponents that a law cannot do without: those whose bounds leave out 0."""
        law = self.law
        named = np.array([name not in law.positive and name != law.asymptote for name in law.parameters])
        return np.asarray(named & (law.lower > 0))


def estimate(
    law: Form,
    x: Array,
    y: Array,
    weights: Array,
    objective: Objective = SQUARES,
    codes: NDArray[np.intp] | None = None,
) -> Estimate:
    """Fits of ``law`` to x [1 or B, n, d], y [B, n] > 0 with weights [B, n], in the caller's units."""
    count = len(y)
    pivots = np.broadcast_to(np.exp(np.log(x).mean(1)), (count, x.shape[2]))
    scale = np.exp(np.log(y).mean(1))
    inputs, metric = x / pivots[: len(x), None], y / scale[:, None]
    if objective.delta is not None and objective.residuals == "raw":
        assert count == 1, "one delta in units of y for metrics of several scales"
        objective = Objective("raw", objective.loss, objective.delta / float(scale[0]))
    found = solve(law, inputs, metric, weights, objective)
    centre, centre_cost = found.theta, found.cost
    if law.asymptote is not None and objective.loss == "squares":
        place = law.parameters.index(law.asymptote)
        stopped = np.flatnonzero(found.theta[:, place] <= law.lower[place] + BOUND)
        if len(stopped):
            lower = law.lower.copy()
            lower[place] = -np.inf
            own = inputs if len(inputs) == 1 else inputs[stopped]
            at = (own, metric[stopped], weights[stopped], objective)
            free = solve(law, *at, start=found.theta[stopped], limits=(lower, law.upper))
            centre, centre_cost = centre.copy(), centre_cost.copy()
            centre[stopped], centre_cost[stopped] = free.theta, free.cost
    return Estimate(
        *(law, inputs, metric, weights, codes, objective, pivots, scale),
        *(found.theta, centre, found.cost, centre_cost, found.converged),
    )


def quantile(dof: Array, level: float) -> Array:
    """Student's t for two-sided intervals; NaN without a degree of freedom. A ufunc: a thousand bands ask for it."""
    return np.asarray(special.stdtrit(np.where(dof > 0, dof, np.nan), 0.5 + level / 2))
