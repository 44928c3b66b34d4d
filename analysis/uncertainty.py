"""How sure is an estimate? Student-t intervals, parametric-t bootstrap, resampling by tokenizer seed > generator run.

Percentiles of a bootstrap undercover badly at the sizes of such studies (77-88 % at a nominal 95 % with five to
eight runs); the delta method with Student-t and the parametric-t bootstrap hold theirs. Where tokenizers differ,
their seed is the unit: its number, not that of the points, gives the degrees of freedom. An interval that cannot
be had is null with a reason, never of zero width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.fit import Fit
from analysis.forms import FORMS
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.solver import Objective, solve

LEVEL = 0.95
DRAWS = 1000
Units = Literal["tokenizer seeds", "generator seeds given one tokenizer"]  # what an interval speaks about
WIDE_RATIO = 3.0  # an interval of compute whose ends are further apart than this is "not identified"
WIDE_SHARE = 0.30  # so is one of an exponent that is wider than this share of it


def short(value: float) -> str:
    """Three digits for a sentence: 0.541, 12.6, 3e9, 1.27e11."""
    text = f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else text.replace("e+0", "e").replace("e+", "e")


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; ``low`` and ``high`` are None, with a reason, where there is none."""

    estimate: float
    low: float | None
    high: float | None
    level: float
    method: str
    dof: int | None = None
    reason: str | None = None

    def identified(self, kind: Literal["ratio", "share"]) -> bool:
        """Narrow enough to be drawn: within a factor (compute), or within a share of the estimate (exponents)."""
        if self.low is None or self.high is None:
            return False
        if kind == "ratio":
            return self.low > 0 and self.high / self.low <= WIDE_RATIO
        return self.high - self.low <= WIDE_SHARE * abs(self.estimate)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{short(self.estimate)} (no interval: {self.reason})"
        return f"{short(self.estimate)} [{short(self.low)}, {short(self.high)}]"


def student(
    estimate: float, error: float | None, dof: int, method: str, *, level: float = LEVEL, floor: float | None = None
) -> Interval:
    """estimate +- t(dof) x error; ``floor`` is the least value that makes sense."""
    if error is None or not math.isfinite(error):
        return Interval(estimate, None, None, level, method, dof, "no standard error")
    if dof < 1:
        return Interval(estimate, None, None, level, method, dof, "no degree of freedom is left")
    if error <= 1e-12 * max(abs(estimate), 1e-300):
        return Interval(estimate, None, None, level, method, dof, "all replicates agree, which says nothing")
    half = float(stats.t.ppf(0.5 + level / 2, dof)) * error
    low = estimate - half
    return Interval(estimate, low if floor is None else max(low, floor), estimate + half, level, method, dof)


def delta(fit: Fit, level: float = LEVEL) -> dict[str, Interval]:
    """The intervals of a fit's own covariance, by parameter."""
    limits = fit.conf_int(1 - level)
    found = {}
    for name, value in fit.params.items():
        low, high = (float(limit) for limit in limits.loc[[name]].to_numpy()[0])
        if math.isfinite(low) and math.isfinite(high):
            found[name] = Interval(value, low, high, level, fit.interval_method, fit.dof)
        else:
            reason = fit.reason or "no degree of freedom is left"
            found[name] = Interval(value, None, None, level, fit.interval_method, fit.dof, reason)
    return found


def parametric_t(fit: Fit, draws: int = 2 * DRAWS, seed: int = 0, level: float = LEVEL) -> dict[str, Interval]:
    """Percentiles of refits to curves drawn from the fitted one, by parameter.

    The noise of each draw has its own scale, sigma sqrt(dof / chi2(dof)): what is known of sigma at this n, so that
    the draws are Student-t and not normal. For points that are independent; ``Refusal`` for grouped ones.
    """
    method = f"parametric-t bootstrap, {draws} draws"
    if fit.n_groups is not None:
        raise Refusal("grouped", "a parametric bootstrap takes points as independent; these come in groups")
    if fit.sigma is None:
        return {n: Interval(v, None, None, level, method, 0, "no degree of freedom") for n, v in fit.params.items()}
    law, rng = FORMS[fit.form], np.random.default_rng(seed)
    x = np.repeat((np.asarray(fit.x) / np.asarray(fit.pivots))[None], draws, 0)
    weights = np.repeat(np.asarray(fit.weights)[None], draws, 0)
    center = law.value(np.asarray(fit.theta)[None], x[:1])
    scale = fit.sigma * np.sqrt(fit.dof / rng.chisquare(fit.dof, (draws, 1)))
    noise = scale * rng.standard_normal((draws, fit.n)) / np.sqrt(np.maximum(weights, 1e-300))
    y = center * np.exp(noise) if fit.residuals == "log" else np.maximum(center + noise, 1e-12)
    theta, _, _ = solve(law, x, y, weights, Objective(fit.residuals))
    values, _ = law.natural(theta, np.asarray(fit.pivots), fit.scale)
    tails = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return {
        name: Interval(value, float(tails[0, i]), float(tails[1, i]), level, method, fit.dof)
        for i, (name, value) in enumerate(fit.params.items())
    }


def inflation(units: int) -> float:
    """What a bootstrap's standard deviation over ``units`` resampled units is multiplied by.

    Resampling S units with replacement gives a variance that is (S - 1) / S of the unbiased one: half, at S = 2.
    """
    return math.sqrt(units / (units - 1))


def resample_units(units: int, draws: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices [draws, units] of units drawn with replacement. One matrix for two arms pairs their units."""
    return rng.integers(0, units, (draws, units))


RESAMPLED: dict[Units, tuple[str, str]] = {  # how, and why not with one
    "tokenizer seeds": (
        "hierarchical bootstrap (tokenizer seed > generator run)",
        "one tokenizer seed says nothing about another",
    ),
    "generator seeds given one tokenizer": (
        "bootstrap over generator seeds given one tokenizer",
        "one tokenizer seed with one generator seed: checkpoints of one run are not independent",
    ),
}


def hierarchical(
    estimate: float,
    replicates: Array,
    units: int,
    *,
    floor: float | None = None,
    over: Units = "tokenizer seeds",
) -> Interval:
    """Interval from replicates of a bootstrap over tokenizer seeds (and generator runs within them).

    Student-t with seeds - 1 degrees of freedom around the estimate, at the bootstrap's standard error corrected for
    the small number of seeds. With two seeds t is 12.7: that is what two seeds are worth. ``over``: within one
    tokenizer the units are its generator seeds, each a training run of every size.
    """
    how, alone = RESAMPLED[over]
    method = f"{how}, {len(replicates)} draws, Student-t"
    if units < 2:
        return Interval(estimate, None, None, LEVEL, how, 0, alone)
    held = replicates[np.isfinite(replicates)]
    if len(held) < 0.9 * len(replicates):
        return Interval(estimate, None, None, LEVEL, method, units - 1, "too many resamples could not be fitted")
    return student(estimate, float(held.std()) * inflation(units), units - 1, method, floor=floor)


def wider(over: Interval, given: Interval) -> Interval:
    """The hull of an interval over tokenizers and one given these tokenizers.

    Two seeds that agree by chance make the first one narrow; it cannot then be narrower than the scatter of the points
    about the curve allows.
    """
    if over.low is None or over.high is None or given.low is None or given.high is None:
        return over
    ends = min(over.low, given.low), max(over.high, given.high)
    method = f"{over.method}; not narrower than given these tokenizers ({given.method})"
    return replace(over, low=ends[0], high=ends[1], method=method)


def paired(differences: Sequence[float]) -> Interval:
    """Mean of paired differences, one per tokenizer seed, with Student-t."""
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        raise Refusal("one_upstream_seed", "a contrast between tokenizers needs at least two tokenizer seeds")
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return student(float(values.mean()), error, len(values) - 1, "paired by tokenizer seed, Student-t")


def spread(frame: pd.DataFrame) -> dict[str, float]:
    """How far tokenizer seeds lie apart. Columns rate, cell, seed, value (> 0); cells are (size, compute).

    Analysis of variance of ln value, cells and seeds within each rate: ``sd_seed`` is the standard deviation of a
    tokenizer's mean over its cells (their common shift), ``sd_rest`` what remains within cells, ``dof`` that of
    sd_seed, ``low`` and ``high`` its 95 % interval (chi-squared).
    """
    import statsmodels.formula.api as smf  # seconds to import, and only a report needs it
    from statsmodels.stats.anova import anova_lm

    held = frame.assign(log=np.log(frame["value"].astype(float)))
    squares, rest, dof, dof_rest = 0.0, 0.0, 0, 0
    for _, rows in held.groupby("rate"):
        cells = rows.groupby("cell")["seed"].nunique()
        seeds = rows["seed"].nunique()
        rows = rows[rows["cell"].isin(cells.index[cells == seeds])]
        count = rows["cell"].nunique()
        if seeds < 2 or count < 2:
            continue
        model = smf.ols("log ~ C(cell) + C(seed)", data=rows).fit()
        variances = anova_lm(model)
        squares += float(variances.loc["C(seed)", "sum_sq"]) / count
        dof += seeds - 1
        rest += float(variances.loc["Residual", "sum_sq"])
        dof_rest += int(variances.loc["Residual", "df"])
    if not dof:
        raise Refusal("one_upstream_seed", "the spread between tokenizer seeds needs two seeds and two cells")
    sd = math.sqrt(squares / dof)
    low, high = (math.sqrt(squares / float(stats.chi2.ppf(q, dof))) for q in (0.975, 0.025))
    return {"sd_seed": sd, "low": low, "high": high, "dof": dof, "sd_rest": math.sqrt(rest / max(dof_rest, 1))}


def spearman(a: Sequence[float], b: Sequence[float], units: Sequence[str]) -> tuple[Interval, int]:
    """Rank correlation of paired values, and their number; the interval leaves out one unit (tokenizer) at a time.

    Jackknife of Fisher's z over units with Student-t; a perfect agreement has no interval.
    """
    x, y, labels = np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(units)
    n, names = len(x), sorted(set(units))
    if n < 3:
        raise Refusal("too_few", f"a rank correlation of {n} points says nothing")
    rho = float(stats.spearmanr(x, y).statistic)
    method = f"delete-one-tokenizer jackknife of Fisher's z over {len(names)} tokenizers, Student-t"
    kept = [labels != name for name in names]
    if len(names) < 3 or min(int(keep.sum()) for keep in kept) < 3 or abs(rho) > 1 - 1e-9:
        reason = "perfect agreement" if abs(rho) > 1 - 1e-9 else "too few tokenizers"
        return Interval(rho, None, None, LEVEL, method, len(names) - 1, reason), n
    z = np.array([np.arctanh(np.clip(stats.spearmanr(x[k], y[k]).statistic, -1 + 1e-9, 1 - 1e-9)) for k in kept])
    error = math.sqrt((len(z) - 1) / len(z) * float(((z - z.mean()) ** 2).sum()))
    around = student(math.atanh(rho), error, len(z) - 1, method)
    if around.low is None or around.high is None:
        return replace(around, estimate=rho), n
    return replace(around, estimate=rho, low=math.tanh(around.low), high=math.tanh(around.high)), n
