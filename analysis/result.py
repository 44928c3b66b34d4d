"""What is a fitted law? Parameters, intervals, predictions, and everything needed to fit it again.

In the spirit of statsmodels' results: ``params``, ``bse``, ``conf_int()``, ``predict()``, ``get_prediction()``,
``summary()``, and JSON that reads back as the same result.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis import resampling
from analysis.checkup import checkup
from analysis.estimate import FREEDOM, SURE_LEVEL, Ends, Estimate, quantile
from analysis.forms import FORMS
from analysis.interval import LEVEL, Interval
from analysis.laws import Array
from analysis.profile import profile
from analysis.resampling import UNITS, Draws, Kind
from analysis.solver import Loss, Objective, Residuals

Method = Literal["delta", "profile", "rows", "groups", "residuals", "parametric-t"]
ALONE = "one group says nothing about another, and its points are not independent"
LOST = 0.1  # share of resamples that may not be fitted
EXACT = 1e-9  # residuals of this size are rounding


@dataclass(frozen=True)
class Prediction:
    """The fitted curve at given x: standard errors, intervals of the curve and of a new observation."""

    fit: Fit
    x: Array

    @cached_property
    def _ends(self) -> Ends:
        return self.fit.curve(self.x, LEVEL)

    @property
    def mean(self) -> Array:
        return self._ends.estimate

    @property
    def se_log(self) -> Array:
        """Standard error of ln y of the curve; NaN where there is none."""
        return self._ends.error / self._ends.estimate

    @property
    def identified(self) -> list[bool]:
        """Whether the interval of the curve can be quoted (``analysis.estimate``)."""
        return [bool(sure) for sure in self._ends.identified]

    def summary_frame(self, alpha: float = 0.05) -> pd.DataFrame:
        """Columns mean, mean_se, mean_ci_lower, mean_ci_upper, obs_ci_lower, obs_ci_upper, as in statsmodels.

        NaN where there is no interval. Index: x, or the row where there are several inputs.
        """
        ends = self.fit.curve(self.x, 1 - alpha)
        sigma = math.nan if self.fit.sigma is None else self.fit.sigma
        t = quantile(ends.dof, 1 - alpha)
        with np.errstate(invalid="ignore", over="ignore"):
            if self.fit.residuals == "raw":
                wide = t * np.hypot(ends.error, sigma)
                low, high = np.maximum(ends.estimate - wide, 0.0), ends.estimate + wide
            else:
                wide = t * np.hypot(ends.error / ends.estimate, sigma)
                low, high = ends.estimate * np.exp(-wide), ends.estimate * np.exp(wide)
        single = self.x.ndim == 1 or self.x.shape[1] == 1
        return pd.DataFrame(
            {
                "mean": ends.estimate,
                "mean_se": ends.error,
                "mean_ci_lower": ends.low,
                "mean_ci_upper": ends.high,
                "obs_ci_lower": np.minimum(low, ends.low),
                "obs_ci_upper": np.maximum(high, ends.high),
            },
            index=pd.Index(self.x.reshape(-1), name="x") if single else None,
        )


@dataclass(frozen=True)
class Fit:
    """A fitted law and everything needed to fit it again."""

    form: str
    formula: str
    residuals: Residuals
    loss: Loss
    delta: float | None  # Huber's, in units of the residuals
    estimator: str
    selection: str  # which points, in words
    conventions: dict[str, str]  # what the inputs and the output are, in words or as expressions
    inputs: tuple[str, ...]
    output: str
    x: tuple[tuple[float, ...], ...]
    y: tuple[float, ...]
    weights: tuple[float, ...]
    groups: tuple[str, ...] | None
    theta: tuple[float, ...]  # scaled parameters
    centre: tuple[float, ...]  # the same, the asymptote free to be negative
    pivots: tuple[float, ...]
    scale: float
    params: dict[str, float]
    interval: Method
    draws: int | None  # of a bootstrap
    seed: int | None
    n: int
    n_groups: int | None
    dof: int
    sigma: float | None  # residual standard deviation
    objective: float  # the loss, summed
    centre_objective: float
    aicc: float | None
    at_bound: dict[str, Literal["lower", "upper"]]
    converged: bool
    solver: dict[str, float | str]  # starts and tolerances
    versions: dict[str, str]

    @cached_property
    def estimate(self) -> Estimate:
        """The same fit as arrays in scaled units."""
        pivots, scale = np.asarray(self.pivots), self.scale
        codes = None if self.groups is None else np.unique(self.groups, return_inverse=True)[1]
        if codes is not None and len(np.unique(codes)) == len(codes):
            codes = None  # one row per group: rows are independent
        delta = self.delta if self.residuals == "log" or self.delta is None else self.delta / scale
        return Estimate(
            law=FORMS[self.form],
            x=(np.asarray(self.x) / pivots)[None],
            y=np.asarray(self.y)[None] / scale,
            weights=np.asarray(self.weights)[None],
            codes=codes,
            objective=Objective(self.residuals, self.loss, delta),
            pivots=pivots[None],
            scale=np.array([scale]),
            theta=np.asarray(self.theta)[None],
            centre=np.asarray(self.centre)[None],
            cost=np.array([self._scaled(self.objective)]),
            centre_cost=np.array([self._scaled(self.centre_objective)]),
            converged=np.array([self.converged]),
        )

    def _scaled(self, objective: float) -> float:
        """A loss in units of y as one of scaled y."""
        if self.residuals == "log":
            return objective
        return objective / (self.scale if self.loss == "absolute" else self.scale**2)

    @cached_property
    def drawn(self) -> Draws | None:
        """The refits behind the intervals, where they come from a bootstrap."""
        if self.interval in ("delta", "profile") or self.reason:
            return None
        kind: Kind = self.interval  # type: ignore[assignment]
        return resampling.draw(self.estimate, kind, self.draws or 0, self.seed or 0)

    @property
    def interval_method(self) -> str:
        """How intervals are made, in words."""
        if self.n_groups == 1:
            return "none, given one group"
        if self.interval == "delta":
            return self.estimate.method
        if self.interval == "profile":
            return f"profile, F(1, {self.dof}), points taken as independent"
        held = self.drawn
        if held is None:
            return "none"
        few = f"; fewer than {UNITS} units, where percentiles cover too little" if self.few else ""
        return f"percentiles, {held.method}{few}"

    @cached_property
    def reason(self) -> str | None:
        """Why there are no intervals at all, when there are none."""
        law = FORMS[self.form]
        if self.n_groups == 1:
            return ALONE
        if self.n <= len(law.parameters):
            return "no degree of freedom is left"
        if self.sigma is not None and self.sigma <= EXACT * (1.0 if self.residuals == "log" else self.scale):
            return "the points lie on the law to the last digit, which says nothing"
        if self.interval != "delta":
            return None
        if self.loss != "squares":
            return (
                f"an interval of this loss is a bootstrap's, which needs {UNITS} independent units to cover what it "
                "says; least squares has one at any number"
            )
        covariance = self.estimate.covariance
        assert covariance is not None
        diagonal = np.diag(covariance.matrix[0])
        if np.isnan(diagonal).any():
            apart = "the parameters cannot be told apart on these points"
            return apart if self.estimate.codes is None else f"{apart}, or not without one of the groups"
        if not (np.sqrt(np.abs(diagonal)) > EXACT).any():
            return "the groups agree to the last digit, so their spread says nothing"
        return None

    @cached_property
    def bse(self) -> dict[str, float | None]:
        """Standard errors by parameter; None where there is none."""
        names = list(self.params)
        if self.reason:
            return dict.fromkeys(names)
        held = self.drawn
        errors = self.estimate.parameters().error[0] if held is None else held.error
        if held is not None and held.lost > LOST:
            return dict.fromkeys(names)
        return {name: float(error) if math.isfinite(error) else None for name, error in zip(names, errors, strict=True)}

    def intervals(self, level: float = LEVEL) -> dict[str, Interval]:
        """By parameter; null with the reason where there is none."""
        return self._standard if level == LEVEL else self._intervals(level)

    @cached_property
    def _standard(self) -> dict[str, Interval]:
        return self._intervals(LEVEL)

    def _intervals(self, level: float) -> dict[str, Interval]:
        method = self.interval_method
        if self.reason:
            return {n: Interval(v, None, None, level, method, self.dof, self.reason) for n, v in self.params.items()}
        if self.interval == "profile":
            return profile(self.estimate, level)
        held = self.drawn
        if held is not None:
            return {
                name: _percentiles(value, held.values[:, i], level, method, self.dof)
                for i, (name, value) in enumerate(self.params.items())
            }
        ends, law = self.estimate.parameters(level), FORMS[self.form]
        made = {}
        for i, (name, value) in enumerate(self.params.items()):
            low, high, dof = (float(each[0, i]) for each in (ends.low, ends.high, ends.dof))
            if math.isfinite(low) and math.isfinite(high):
                made[name] = Interval(value, low, high, level, method, dof)
                continue
            falls = name == law.asymptote and math.isfinite(float(ends.error[0, i]))
            why = (
                "the points fall faster than an asymptote of 0 or more allows"
                if falls
                else "the points say nothing about it"
            )
            made[name] = Interval(value, None, None, level, method, dof if math.isfinite(dof) else None, why)
        return made

    @cached_property
    def identified(self) -> dict[str, bool]:
        """Which intervals can be quoted: an exponent within a third of itself, a level within half (linearised)."""
        held = self.drawn
        if held is None:
            sure = self.estimate.parameters().identified[0]
        else:
            law = FORMS[self.form]
            held_ends = [
                (math.nan, math.nan) if each.low is None or each.high is None else (each.low, each.high)
                for each in self.intervals().values()
            ]
            ends = np.array(held_ends)
            logs = np.array([name in law.positive for name in law.parameters])
            with np.errstate(all="ignore"):
                ends = np.where(logs[:, None], np.log(ends), ends)
            half = (ends[:, 1] - ends[:, 0])[None] / 2
            sure = self.estimate.quotable(self.estimate.params, half, np.ones(half.shape, bool))[0]
        known = not self.reason and not self.few
        return {name: bool(flag) and known for name, flag in zip(self.params, sure, strict=True)}

    @cached_property
    def doubts(self) -> dict[str, str]:
        """Why an interval cannot be quoted, by parameter."""
        law, ends, said = FORMS[self.form], self.intervals(), {}
        asymptote = law.asymptote
        rejected = asymptote is not None and ends[asymptote].low is None and self.reason is None
        for name, sure in self.identified.items():
            if sure:
                continue
            each, free = ends[name], self.estimate.clusters
            if each.low is None or each.high is None:
                said[name] = each.reason or "no interval"
            elif rejected:
                said[name] = f"the points would have {asymptote} below 0"
            elif name in self.at_bound and name != asymptote:
                said[name] = f"at its {self.at_bound[name]} bound"
            elif self.few:
                said[name] = f"percentiles of fewer than {UNITS} units"
            elif free is not None and each.dof is not None and each.dof < min(FREEDOM, free - 1) - 1e-6:
                said[name] = f"{each.dof:.2g} degrees of freedom of {free} groups that are not alike"
            elif name == asymptote:
                said[name] = "known to no better than half the lowest value, or hangs on an exponent that is not"
            elif name in law.positive:
                said[name] = "hangs on an exponent that is not"
            else:
                said[name] = "known to no better than a third of it"
        return said

    @property
    def few(self) -> bool:
        """Percentiles of resampled units of which there are fewer than hold what they say."""
        held = self.drawn
        return held is not None and held.units < UNITS and self.interval != "parametric-t"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What speaks against the law (``analysis.checkup``)."""
        return checkup(self.estimate, np.asarray(self.x), np.asarray(self.y))

    def curve(self, x: Array, level: float = LEVEL) -> Ends:
        """The law and its interval at x [m] or [m, d]."""
        at = self._places(x)
        ends = self.estimate.curve(at, level)
        nothing = np.full(len(at), np.nan)
        mean = ends.estimate[0]
        if self.reason or self.interval == "profile":
            return Ends(mean, nothing, nothing, nothing, nothing, np.zeros(len(at), bool))
        held = self.drawn
        if held is None:
            return Ends(*(each[0] for each in ends))
        if held.lost > LOST:
            return Ends(mean, nothing, nothing, nothing, nothing, np.zeros(len(at), bool))
        theta = held.theta[np.isfinite(held.theta).all(1)]
        values = self.scale * FORMS[self.form].value(theta, (at / np.asarray(self.pivots))[None])
        low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        exponents = [name for name, needed in zip(self.params, self.estimate.decaying, strict=True) if needed]
        sure = (high - low <= 2 * SURE_LEVEL * mean) & all(self.identified[name] for name in exponents)
        return Ends(mean, values.std(0), low, high, np.full(len(at), float(self.dof)), np.asarray(sure, np.bool_))

    def predict(self, x: ArrayLike) -> Array:
        """The fitted curve at x [m] (or [m, d])."""
        at = self._places(x) / np.asarray(self.pivots)
        return np.asarray(FORMS[self.form].value(np.asarray(self.theta)[None], at[None])[0] * self.scale)

    def _places(self, x: ArrayLike) -> Array:
        """x as [m, d]. ValueError for inputs of another number, or not positive."""
        at = np.asarray(x, np.float64)
        count = len(self.inputs)
        if not ((at.ndim == 2 and at.shape[1] == count) or (at.ndim == 1 and count == 1)) or not (at > 0).all():
            raise ValueError(f"x: got shape {at.shape}; positive numbers, [m, {count}]" + " or [m]" * (count == 1))
        return at.reshape(len(at), -1)

    def get_prediction(self, x: ArrayLike) -> Prediction:
        """The curve with intervals at x."""
        return Prediction(self, np.asarray(x, np.float64))

    def conf_int(self, alpha: float = 0.05) -> pd.DataFrame:
        """lower and upper per parameter; one-sided at a bound (that end is the bound); NaN where there is none."""
        rows = {
            name: (math.nan if each.low is None else each.low, math.nan if each.high is None else each.high)
            for name, each in self.intervals(1 - alpha).items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=["lower", "upper"])

    def summary(self) -> str:
        """A text block: the law, its parameters with intervals, and how it was fitted."""
        lines = [f"{self.output}: {self.formula}, {', '.join(self._named())}"]
        for name, each in self.intervals().items():
            mark = f"  at its {self.at_bound[name]} bound" if name in self.at_bound else ""
            if each.low is None or each.high is None:
                ends = "no interval" + (f": {each.reason}" if each.reason != self.reason else "")
            else:
                ends = f"[{each.low:.7g}, {each.high:.7g}]"
                doubt = self.doubts.get(name)
                mark = f"  not identified: {doubt}" if doubt else mark
            lines.append(f"  {name:<2} {each.estimate:< 15.7g} {ends}{mark}")
        clusters = f" in {self.n_groups} groups" if self.n_groups else ""
        aicc = "" if self.aicc is None else f", AICc {self.aicc:.3f}"
        sigma = "" if self.sigma is None else f", residual sd {self.sigma:.4g}"
        lines.append(f"  n = {self.n}{clusters}, dof = {self.dof}; {self.selection}")
        lines.append(f"  {self.estimator}: {self.objective:.10g}{sigma}{aicc}")
        lines += [f"  note: {note}" for note in self.notes]
        lines.append(f"  no intervals: {self.reason}" if self.reason else f"  95 % intervals: {self.interval_method}")
        return "\n".join(lines)

    def _named(self) -> list[str]:
        """Inputs of the form and the columns they are."""
        return [
            f"{own} = {given}" if own != given else own
            for own, given in zip(FORMS[self.form].inputs, self.inputs, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, also what follows from it (bse, conf_int, identified, interval_method, reason); no NaN."""
        ends = {name: [each.low, each.high] for name, each in self.intervals().items()}
        reasons = {name: each.reason for name, each in self.intervals().items() if each.reason}
        derived = {"bse": self.bse, "conf_int": ends, "conf_int_reasons": reasons, "identified": self.identified}
        derived |= {"doubts": self.doubts, "notes": list(self.notes), "level": LEVEL}
        return asdict(self) | derived | {"interval_method": self.interval_method, "reason": self.reason}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Fit:
        held = json.loads(text)
        held = {each.name: held[each.name] for each in fields(cls)}
        for name in ("inputs", "y", "weights", "theta", "centre", "pivots"):
            held[name] = tuple(held[name])
        held["x"] = tuple(tuple(row) for row in held["x"])
        held["groups"] = None if held["groups"] is None else tuple(held["groups"])
        return cls(**held)


def _percentiles(value: float, draws: Array, level: float, method: str, dof: int) -> Interval:
    held = draws[np.isfinite(draws)]
    if len(held) < (1 - LOST) * len(draws):
        return Interval(value, None, None, level, method, dof, "too many resamples could not be fitted")
    low, high = (float(end) for end in np.quantile(held, [0.5 - level / 2, 0.5 + level / 2]))
    if high - low <= EXACT * max(abs(value), abs(high)):
        return Interval(value, None, None, level, method, dof, "all resamples agree, which says nothing")
    return Interval(value, low, high, level, method, dof)
