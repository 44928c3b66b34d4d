"""Which law do these points follow, and how well is it known? Estimator, solver and typed result.

    fit(flops, fid, "saturating", groups=tokenizer_seed)

Least squares on log residuals by default (relative errors: natural for positive metrics over decades), sum-reduced,
float64, analytic Jacobians. Points that share a trunk or a tokenizer are not independent: pass ``groups`` and the
covariance is that of the groups (delete-one-group jackknife, Student-t with groups - 1 degrees of freedom). One group
has none: what its points scatter by says nothing about another group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from analysis.forms import FORMS
from analysis.laws import Array, Form
from analysis.refusal import Refusal
from analysis.solver import Objective, Residuals, solve

MISFIT = math.log(1.2)  # means that lie further off a law (root mean square of ln y) do not follow it
SAME = 0.02  # values of ln x this close are one design point
COLLINEAR = 1e13  # condition number from which parameters cannot be told apart
BOUND = 1e-9  # distance to a bound, relative to order one, that counts as at the bound


@dataclass(frozen=True)
class Prediction:
    """The fitted curve at given x: standard errors of ln y, Student-t intervals; NaN where there is no interval."""

    x: Array
    mean: Array
    se_log: Array  # of the curve
    sigma: Array  # residual standard deviation of ln y
    dof: int

    def summary_frame(self, alpha: float = 0.05) -> pd.DataFrame:
        """Columns mean, mean_se, mean_ci_lower, mean_ci_upper, obs_ci_lower, obs_ci_upper, as in statsmodels."""
        t = float(stats.t.ppf(1 - alpha / 2, self.dof)) if self.dof > 0 else math.nan
        curve, observation = t * self.se_log, t * np.hypot(self.se_log, self.sigma)
        return pd.DataFrame(
            {
                "mean": self.mean,
                "mean_se": self.mean * self.se_log,
                "mean_ci_lower": self.mean * np.exp(-curve),
                "mean_ci_upper": self.mean * np.exp(curve),
                "obs_ci_lower": self.mean * np.exp(-observation),
                "obs_ci_upper": self.mean * np.exp(observation),
            },
            index=pd.Index(self.x, name="x"),
        )


@dataclass(frozen=True)
class Fit:
    """A fitted law and everything needed to fit it again."""

    form: str
    formula: str
    residuals: Residuals
    estimator: str
    selection: str  # which points, in words
    inputs: tuple[str, ...]
    output: str
    x: tuple[tuple[float, ...], ...]
    y: tuple[float, ...]
    weights: tuple[float, ...]
    groups: tuple[str, ...] | None
    theta: tuple[float, ...]
    pivots: tuple[float, ...]
    scale: float
    params: dict[str, float]
    bse: dict[str, float | None]
    covariance: tuple[tuple[float, ...], ...] | None  # of theta
    interval_method: str
    reason: str | None  # why there are no standard errors, when there are none
    n: int
    n_groups: int | None
    dof: int
    sigma: float | None  # residual standard deviation
    objective: float  # weighted sum of squared residuals
    aicc: float | None
    at_bound: dict[str, Literal["lower", "upper"]]
    converged: bool
    versions: dict[str, str]

    def _evaluate(self, x: ArrayLike) -> tuple[Array, Array, Array]:
        law = FORMS[self.form]
        flat = np.asarray(x, np.float64)
        inputs = flat.reshape(len(flat), -1) / np.asarray(self.pivots)
        theta = np.asarray(self.theta)[None]
        value = law.value(theta, inputs[None])[0]
        return flat, value * self.scale, law.jacobian(theta, inputs[None])[0].T / value[:, None]

    def predict(self, x: ArrayLike) -> Array:
        """The fitted curve at x [m] (or [m, d])."""
        return self._evaluate(x)[1]

    def get_prediction(self, x: ArrayLike) -> Prediction:
        """The curve with standard errors of ln y at x."""
        flat, mean, gradient = self._evaluate(x)
        if self.covariance is None:
            se = np.full(len(mean), np.nan)
        else:
            variance = np.einsum("np,pq,nq->n", gradient, np.asarray(self.covariance), gradient)
            se = np.sqrt(np.maximum(variance, 0.0))
        sigma = np.full(len(mean), math.nan if self.sigma is None else self.sigma)
        if self.residuals == "raw":
            sigma = sigma * self.scale / mean  # an error of y, as one of ln y to first order
        return Prediction(flat, mean, se, sigma, self.dof)

    def conf_int(self, alpha: float = 0.05) -> pd.DataFrame:
        """lower and upper per parameter; one-sided at a bound; NaN where there is no standard error.

        An amplitude is positive and spans decades, so its interval is symmetric in ln A.
        """
        rows = {}
        for name, value in self.params.items():
            error = self.bse[name]
            if error is None or self.dof < 1:
                rows[name] = (math.nan, math.nan)
            elif name in self.at_bound:
                t = float(stats.t.ppf(1 - alpha, self.dof))
                lower = self.at_bound[name] == "lower"
                rows[name] = (value, value + t * error) if lower else (value - t * error, value)
            else:
                t = float(stats.t.ppf(1 - alpha / 2, self.dof))
                if name == "A":
                    ratio = math.exp(min(t * error / value, 700.0))
                    rows[name] = (value / ratio, value * ratio)
                else:
                    low = value - t * error
                    rows[name] = (max(low, 0.0) if name == "E" else low, value + t * error)
        return pd.DataFrame.from_dict(rows, orient="index", columns=["lower", "upper"])

    def summary(self) -> str:
        """A text block: the law, its parameters with intervals, and how it was fitted."""
        limits = self.conf_int()
        lines = [f"{self.output}: {self.formula}, x = {', '.join(self.inputs)}"]
        for name, value in self.params.items():
            low, high = limits.loc[[name]].to_numpy()[0]
            mark = f"  at its {self.at_bound[name]} bound" if name in self.at_bound else ""
            lines.append(f"  {name:<2} {value:< 14.6g} [{low:.6g}, {high:.6g}]{mark}")
        clusters = f" in {self.n_groups} groups" if self.n_groups else ""
        lines.append(f"  n = {self.n}{clusters}, dof = {self.dof}; {self.estimator}; {self.interval_method}")
        aicc = "undefined at this n" if self.aicc is None else f"{self.aicc:.3f}"
        lines.append(
            f"  residual sd {self.sigma if self.sigma is not None else math.nan:.4g}, AICc {aicc}; {self.selection}"
        )
        return "\n".join(lines + ([f"  no standard errors: {self.reason}"] if self.reason else []))

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Fit:
        held = json.loads(text)
        for name in ("inputs", "y", "weights", "theta", "pivots"):
            held[name] = tuple(held[name])
        held["x"] = tuple(tuple(row) for row in held["x"])
        held["groups"] = None if held["groups"] is None else tuple(held["groups"])
        if held["covariance"] is not None:
            held["covariance"] = tuple(tuple(row) for row in held["covariance"])
        return cls(**held)


def check(
    form: Form, x: Array, y: Array, *, ids: Sequence[str] | None = None, protocols: Sequence[str] | None = None
) -> None:
    """Refuses points that no estimator could save: mixed protocols, duplicates, non-positive or too few values."""
    if not len(y):
        raise Refusal("too_few", f"no points for the {len(form.parameters)} parameters of the {form.name} form")
    if protocols is not None and len(set(protocols)) > 1:
        raise Refusal("mixed_protocols", f"points of {len(set(protocols))} protocols cannot share a fit")
    if ids is not None and len(set(ids)) < len(ids):
        twice = sorted(name for name in set(ids) if list(ids).count(name) > 1)
        raise Refusal("duplicate_run", f"{twice[0]} stands {list(ids).count(twice[0])} times among the points")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise Refusal("not_finite", "a point is missing or infinite; leave it out by name")
    if (x <= 0).any() or (y <= 0).any():
        raise Refusal("non_positive", "a power law and log residuals need positive values")
    p, distinct = len(form.parameters), max(_distinct(column) for column in np.log(x).T)
    if distinct < p + 1:
        raise Refusal(
            "too_few", f"{distinct} distinct x for {p} parameters of the {form.name} form; {p + 1} are needed"
        )


def _distinct(log_x: Array) -> int:
    """Values that differ by more than the rounding of a budget to whole steps."""
    return 1 + int((np.diff(np.sort(log_x)) > SAME).sum())


def _delta(gradient: Array, weights: Array, sigma: float | None) -> tuple[Array | None, str | None]:
    """Covariance of theta from the Jacobian [n, p] of the residuals, or the reason why there is none."""
    if sigma is None:
        return None, "no degree of freedom is left"
    information = np.einsum("np,n,nq->pq", gradient, weights, gradient)
    # scaled to a unit diagonal, a condition number speaks of collinearity and not of units
    root = np.sqrt(np.maximum(np.diag(information), 1e-300))
    correlation = information / root[:, None] / root[None]
    if np.linalg.cond(correlation) > COLLINEAR:
        return None, "the parameters cannot be told apart on these points"
    return sigma**2 * np.linalg.inv(correlation) / root[:, None] / root[None], None


def _jackknife(
    form: Form, x: Array, y: Array, weights: Array, labels: Sequence[str], residuals: Residuals
) -> tuple[Array | None, str | None]:
    """Covariance of theta from refits that leave out one group each, or the reason why there is none."""
    names = sorted(set(labels))
    kept = np.array([[label != name for label in labels] for name in names], np.float64) * weights
    count = len(names)
    theta, _, _ = solve(form, x[None], y[None], kept, Objective(residuals))
    centered = theta - theta.mean(0)
    if not (np.abs(centered) > BOUND).any():
        return None, "the groups agree to the last digit, so their spread says nothing"
    return np.asarray((count - 1) / count * centered.T @ centered), None


def fit(
    x: ArrayLike,
    y: ArrayLike,
    form: str = "saturating",
    *,
    groups: Sequence[Any] | None = None,
    weights: ArrayLike | None = None,
    residuals: Residuals = "log",
    ids: Sequence[str] | None = None,
    protocols: Sequence[str] | None = None,
    inputs: Sequence[str] = ("x",),
    output: str = "y",
    selection: str = "all points given",
) -> Fit:
    """Fit one law to points x [n] (or [n, d]) and y [n]; raises ``Refusal`` instead of answering badly.

    ``groups`` names the independent unit of each point (a tokenizer seed, a training run); without it the points
    are taken as independent, and the result says so. ``ids`` and ``protocols`` are checked for duplicates and
    mixtures.
    """
    law = FORMS[form]
    out = np.asarray(y, np.float64)
    at = np.asarray(x, np.float64)
    at = at.reshape(len(out), -1) if len(out) else at
    check(law, at, out, ids=ids, protocols=protocols)
    weight = np.ones(len(out)) if weights is None else np.asarray(weights, np.float64)
    pivots = np.exp(np.log(at).mean(0))
    scale = float(np.exp(np.log(out).mean()))
    scaled_x, scaled_y = at / pivots, out / scale
    objective = Objective(residuals)
    theta, cost, converged = solve(law, scaled_x[None], scaled_y[None], weight[None], objective)
    n, p = len(out), len(law.parameters)
    value = law.value(theta, scaled_x[None])[0]
    gradient = law.jacobian(theta, scaled_x[None])[0].T
    if residuals == "log":
        gradient = gradient / value[:, None]
    natural, change = law.natural(theta, pivots, scale)
    at_bound: dict[str, Literal["lower", "upper"]] = {}
    for index, name in enumerate(law.parameters):
        near = BOUND * (1.0 + abs(theta[0, index]))
        if theta[0, index] - law.lower[index] <= near:
            at_bound[name] = "lower"
        elif law.upper[index] - theta[0, index] <= near:
            at_bound[name] = "upper"
    rss, dof = float(cost[0]), n - p
    sigma = math.sqrt(rss / dof) if dof > 0 else None
    labels = None if groups is None else [str(group) for group in groups]
    n_groups = None if labels is None else len(set(labels))
    reason: str | None
    if labels is not None and n_groups is not None and n_groups > 1:
        method, dof = f"delete-one-group jackknife over {n_groups} groups, Student-t", n_groups - 1
        covariance, reason = _jackknife(law, scaled_x, scaled_y, weight, labels, residuals)
    elif n_groups == 1:
        method, covariance = "none, given one group", None
        reason = "one group says nothing about another, and its points are not independent"
    else:
        method = "delta, Student-t, points taken as independent"
        covariance, reason = _delta(gradient, weight, sigma)
    if covariance is None:
        bse: dict[str, float | None] = dict.fromkeys(law.parameters)
    else:
        errors = np.sqrt(np.maximum(np.diag(change[0] @ covariance @ change[0].T), 0.0))
        bse = {name: float(error) for name, error in zip(law.parameters, errors, strict=True)}
    k = p + 1  # the residual variance is estimated too
    aicc = n * math.log(max(rss, 1e-300) / n) + 2 * k * n / (n - k - 1) if n - k - 1 > 0 else None
    return Fit(
        form=form,
        formula=law.formula,
        residuals=residuals,
        estimator=f"{objective}, variable projection and damped Newton steps",
        selection=selection,
        inputs=tuple(inputs),
        output=output,
        x=tuple(tuple(float(v) for v in row) for row in at),
        y=tuple(float(v) for v in out),
        weights=tuple(float(v) for v in weight),
        groups=None if labels is None else tuple(labels),
        theta=tuple(float(v) for v in theta[0]),
        pivots=tuple(float(v) for v in pivots),
        scale=scale,
        params={name: float(v) for name, v in zip(law.parameters, natural[0], strict=True)},
        bse=bse,
        covariance=None if covariance is None else tuple(tuple(float(v) for v in row) for row in covariance),
        interval_method=method,
        reason=reason,
        n=n,
        n_groups=n_groups,
        dof=dof,
        sigma=sigma,
        objective=rss,
        aicc=aicc,
        at_bound=at_bound,
        converged=bool(converged[0]),
        versions=_versions(),
    )


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "scipy", "pandas")}


def compare(fits: Sequence[Fit]) -> pd.DataFrame:
    """Forms fitted to the same points, best AICc first: form, n, parameters, objective, aicc, delta."""
    frame = pd.DataFrame(
        {
            "form": [each.form for each in fits],
            "n": [each.n for each in fits],
            "parameters": [len(each.params) for each in fits],
            "objective": [each.objective for each in fits],
            "aicc": pd.array([each.aicc for each in fits], dtype="Float64"),
        }
    )
    if frame["n"].nunique() > 1:
        raise Refusal("different_points", "AICc compares forms on the same points only")
    frame["delta"] = frame["aicc"] - frame["aicc"].min()
    return frame.sort_values("aicc", ignore_index=True)
