"""How sure is an estimate over tokenizer seeds? Hierarchical resampling (tokenizer > generator run), paired contrasts.

Where tokenizers differ, their seed is the unit: its number, not that of the points, gives the degrees of freedom of a
Student-t interval. Intervals of one fit are in ``analysis.estimate``, bootstraps of it in ``analysis.resampling``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from analysis.interval import LEVEL, Interval, student
from analysis.laws import Array
from analysis.refusal import Refusal

DRAWS = 1000
Units = Literal["tokenizer seeds", "generator seeds given one tokenizer"]  # what an interval speaks about


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
