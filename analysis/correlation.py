"""What interval has a correlation? Fisher's z, a jackknife or a bootstrap over clusters, and Zou's for a difference.

The command is ``python -m analysis.association``, which says when each is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.laws import Array

LEAST_RESAMPLED = {"jackknife": 4, "bootstrap": 8}  # with fewer, resamples of two distinct clusters say r = +-1
DRAWS = 2000
PERFECT = 1 - 1e-12

Method = Literal["pearson", "spearman"]
Approach = Literal["fisher", "jackknife", "bootstrap"]
Limits = tuple[float | None, float | None, str | None]  # low, high, or why there is none


@dataclass(frozen=True)
class Sample:
    """Complete values [variables, then covariates; n]: y first, then its predictors; the units of each cluster."""

    values: Array
    variables: int
    groups: list[NDArray[np.intp]]
    method: Method
    approach: Approach
    level: float

    def told(self, what: str, difference: bool) -> str:
        if self.approach == "bootstrap":
            return f"BCa bootstrap over {what}, {DRAWS} draws"
        ends = f"jackknife of z over {what}, Student-t"
        if self.approach == "fisher":
            ends = "Fisher z" if self.method == "pearson" else "Fisher z, Bonett-Wright variance"
        return ends if not difference else f"Zou, from {ends}"

    def correlations(self, chosen: NDArray[np.intp]) -> Array:
        """[variables, variables] over these units, given the covariates; NaN for a column that is or becomes constant.

        Partial correlation: of the residuals of linear regressions on the covariates (of ranks on ranks).
        """
        held = self.values[:, chosen]
        if self.method == "spearman":
            held = stats.rankdata(held, axis=1)
        if (np.ptp(held, axis=1) == 0).any():
            return np.full((self.variables, self.variables), np.nan)
        if len(held) > self.variables:
            scaled = stats.zscore(held, axis=1)
            held, covariates = scaled[: self.variables], scaled[self.variables :]
            slopes, _, rank, _ = np.linalg.lstsq(covariates.T, held.T, rcond=1e-9)
            held = held - slopes.T @ covariates
            if rank < len(covariates) or (held.std(1) < 1e-9).any():
                return np.full((self.variables, self.variables), np.nan)
        found: Array = np.clip(np.corrcoef(held), -1, 1)
        return found

    def without_one(self) -> Array:
        """Fisher's z with one cluster left out, [clusters, variables, variables]; infinite at r = +-1."""
        every = np.arange(self.values.shape[1])
        left = np.array([self.correlations(np.delete(every, group)) for group in self.groups])
        with np.errstate(divide="ignore"):
            z: Array = np.arctanh(left)
        return z

    def limits(self, j: int) -> Limits:
        """Limits of r between y and predictor ``j``."""
        r = float(self.correlations(np.arange(self.values.shape[1]))[0, j])
        if abs(r) > PERFECT:
            return None, None, "perfect correlation"
        if self.approach == "bootstrap":
            return self.bootstrap(lambda found: float(found[0, j]))
        if self.approach == "fisher":
            shape = 1.0 if self.method == "pearson" else 1 + r * r / 2
            n, covariates = self.values.shape[1], len(self.values) - self.variables
            half = float(stats.norm.ppf(0.5 + self.level / 2)) * math.sqrt(shape / (n - covariates - 3))
        else:
            z = self.without_one()[:, 0, j]
            if reason := self.lacking(z):
                return None, None, reason
            error = math.sqrt((len(z) - 1) * float(z.var()))
            half = float(stats.t.ppf(0.5 + self.level / 2, len(z) - 1)) * error
        return math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half), None

    def lacking(self, z: Array | None = None) -> str | None:
        """Why these clusters, or correlations without one of them, give no interval."""
        if len(self.groups) < LEAST_RESAMPLED[self.approach]:
            return f"{len(self.groups)} clusters or units; a {self.approach} needs {LEAST_RESAMPLED[self.approach]}"
        if z is not None and not np.isfinite(z).all():
            return "without one of them r is perfect or a column constant"
        return "without any one of them r is the same" if z is not None and np.ptp(z) < 1e-12 else None

    def limits_of_difference(self) -> Limits:
        """Limits of r(y, first) - r(y, second): Zou's, from both limits and the correlation between both r.

        That is the large-sample one for ``fisher`` (Steiger, Psychological Bulletin 87, 1980), that of the values with
        one cluster left out for ``jackknife``.
        """
        if self.approach == "bootstrap":
            return self.bootstrap(lambda found: float(found[0, 1] - found[0, 2]))
        (low1, high1, reason1), (low2, high2, reason2) = self.limits(1), self.limits(2)
        if low1 is None or high1 is None or low2 is None or high2 is None:
            return None, None, reason1 or reason2
        whole = self.correlations(np.arange(self.values.shape[1]))
        one, other, between = (float(whole[i, j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        if abs(between) > PERFECT:
            return None, None, "the two are perfectly correlated"
        if self.approach == "fisher":
            covariance = (between - one * other / 2) * (1 - one**2 - other**2 - between**2) + between**3
            together = covariance / ((1 - one**2) * (1 - other**2))
        else:
            z = self.without_one()
            together = float(stats.pearsonr(z[:, 0, 1], z[:, 0, 2]).statistic)
        down, up = (
            math.sqrt(max(a * a + b * b - 2 * together * a * b, 0.0))
            for a, b in ((one - low1, high2 - other), (high1 - one, other - low2))
        )
        return one - other - down, one - other + up, None

    def bootstrap(self, pick: Callable[[Array], float]) -> Limits:
        if reason := self.lacking():
            return None, None, reason

        def statistic(drawn: NDArray[np.intp]) -> float:
            return pick(self.correlations(np.concatenate([self.groups[group] for group in drawn])))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # said in the reason
            held = stats.bootstrap(
                (np.arange(len(self.groups)),),
                statistic,
                n_resamples=DRAWS,
                vectorized=False,
                confidence_level=self.level,
                method="BCa",
                rng=np.random.default_rng(0),
            )
        low, high = float(held.confidence_interval.low), float(held.confidence_interval.high)
        if not low < high:
            return None, None, "resamples with a constant column, or all alike"
        return low, high, None
