"""Which law does the curve of one rate follow, and how well is it known? Fit, intervals, band, lack of fit.

Tokenizer seeds are the unit of every interval: they are resampled, generator runs within them, and the search over
sizes is repeated each time. With one tokenizer seed the unit is the generator seed, and intervals are given that
tokenizer; with one generator seed as well there are none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from analysis.arms import Arm, Envelope, envelope_table, identity, mean_curve, resampled
from analysis.checkup import lack_of_fit
from analysis.fit import MISFIT, fit
from analysis.forms import FORMS
from analysis.interval import LEVEL, WIDE_RATIO, Interval
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.result import Fit
from analysis.solver import solve
from analysis.uncertainty import DRAWS, Units, hierarchical, inflation, resample_units, wider

GRID = 160  # compute values at which curves are compared
MISFIT_P = 0.01  # lack of fit is told from scatter at this level
REFITTED = 0.9  # share of resamples that have to give a curve


def refit(form: str, x: Array, y: Array) -> tuple[Array, Array, float]:
    """Laws through ln x, ln y [D, n] (NaN left out): theta [D, p], pivots [1], scale."""
    there = np.isfinite(x) & np.isfinite(y)
    pivot, scale = float(np.mean(x[there])), float(np.mean(y[there]))
    inputs = np.exp(np.where(there, x - pivot, 0.0))[..., None]
    theta, _, _ = solve(FORMS[form], inputs, np.exp(np.where(there, y - scale, 0.0)), there.astype(np.float64))
    return theta, np.array([math.exp(pivot)]), math.exp(scale)


def curve(form: str, x: Array, y: Array, grid: Array) -> Array:
    """ln y [D, m] at ln x = grid [m] of laws refitted to ln x, ln y [D, n]; "monotone" interpolates instead.

    "monotone": isotonic regression (never rising), linear in the logarithms between the points.
    """
    if form == "monotone":
        from sklearn.isotonic import IsotonicRegression

        found = []
        for a, b in zip(x, y, strict=True):
            there = np.isfinite(a) & np.isfinite(b)
            model = IsotonicRegression(increasing=False, out_of_bounds="clip")
            found.append(model.fit(a[there], b[there]).predict(grid) if there.any() else np.full(len(grid), np.nan))
        return np.array(found)
    theta, pivots, scale = refit(form, x, y)
    inputs = np.exp(grid - math.log(pivots[0]))[None, :, None]
    return np.asarray(np.log(FORMS[form].value(theta, inputs)) + math.log(scale))


@dataclass(frozen=True)
class Law:
    """The law of one arm: pooled fit over its tokenizer seeds, intervals and band over ``units``, curve per seed."""

    arm: Arm
    fit: Fit
    power: Fit | None  # without an asymptote, beside it
    units: Units  # what intervals and band are over; where there is one unit they are null, with the reason
    intervals: dict[str, Interval]
    given: dict[str, Interval]  # given these tokenizers: their mean curve, budgets as points; of one, ``intervals``
    grid: Array  # compute
    mean: Array
    low: Array  # NaN where there is no interval
    high: Array
    by_seed: Array  # [seeds, grid]
    rows: pd.DataFrame  # the envelope: seed, budget, x, y, size, edge
    misfit: Misfit

    @property
    def identified(self) -> bool:
        """The law fits, and the exponent's interval is narrower than 30 % of it."""
        return self.misfit.fits and self.intervals["a"].identified("share") and "a" not in self.fit.at_bound

    @property
    def drawn(self) -> bool:
        """The law fits, and its band is narrower than a factor of 3 throughout."""
        return self.misfit.fits and bool(np.all(self.high <= WIDE_RATIO * self.low))

    def line(self) -> tuple[Array, Array]:
        """Compute and metric of the law's mean, or where no law fits of the seeds' mean at each budget, joined."""
        return (self.grid, self.mean) if self.misfit.fits else mean_curve(self.arm)

    def at(self, flops: float) -> float:
        """The height of ``line`` at a compute."""
        if self.misfit.fits:
            return float(self.fit.predict([flops])[0])
        x, y = mean_curve(self.arm)
        return math.exp(float(np.interp(math.log(flops), np.log(x), np.log(y))))


class Misfit(NamedTuple):
    """How far budget means lie off a law, and whether scatter explains it."""

    rms: float  # of ln y, over budgets
    p: float | None  # lack-of-fit F test against the scatter of seeds; null with one seed or no budget to spare

    @property
    def fits(self) -> bool:
        return self.rms <= MISFIT or (self.p is not None and self.p >= MISFIT_P)


def misfit(rows: pd.DataFrame, found: Fit) -> Misfit:
    """Lack of fit of a law to an envelope (columns seed, budget, x, y): seeds are groups, budgets the design points."""
    missed = np.log(rows["y"].to_numpy()) - np.log(found.predict(rows["x"].to_numpy()))
    place, codes = (np.unique(rows[name].to_numpy(), return_inverse=True)[1] for name in ("budget", "seed"))
    mean = np.bincount(place, missed) / np.bincount(place)
    return Misfit(math.sqrt(float((mean**2).mean())), lack_of_fit(missed, place, codes, len(found.params)))


def law(arm: Arm, form: str | None = None, *, draws: int = DRAWS, seed: int = 0) -> Law:
    """Fit one arm: all seeds together, log residuals; intervals by resampling tokenizer seeds. Raises ``Refusal``.

    Of one tokenizer seed the generator seeds are resampled: checkpoints of one run are never taken as independent.
    ``form`` None is the saturating law, or the pure power law where there are too few budgets for it.
    """
    table = envelope_table(arm)
    if form is None:
        form = "saturating" if table["budget"].nunique() > len(FORMS["saturating"].parameters) else "power"
    labels = table["seed"].tolist()
    words = f"lower envelope over sizes {', '.join(arm.sizes)} per tokenizer seed"
    about = {"inputs": (arm.axis,), "output": arm.metric, "selection": f"{arm.rate}: {words}"}
    main = fit(table["x"], table["y"], form, groups=labels, **about)  # type: ignore[arg-type]
    power = fit(table["x"], table["y"], "power", groups=labels, **about) if form != "power" else None  # type: ignore[arg-type]
    grid = np.linspace(math.log(table["x"].min()), math.log(table["x"].max()), GRID)
    own = Envelope(arm, identity(arm))
    by_seed = np.full((len(arm.seeds), GRID), np.nan)
    needed = len(FORMS[form].parameters) + 1
    enough = np.isfinite(own.y[0]).sum(1) >= needed
    if enough.any():
        by_seed[enough] = np.exp(curve(form, own.x[0][enough], own.y[0][enough], grid))
    mean, off = main.predict(np.exp(grid)), misfit(table, main)
    own_mean, reason = mean_fit(arm, form)
    if own_mean is None:
        given = {name: Interval(v, None, None, LEVEL, "delta", 0, reason) for name, v in main.params.items()}
    else:
        given = own_mean.intervals()
    alone = len(arm.seeds) == 1
    over: Units = "generator seeds given one tokenizer" if alone else "tokenizer seeds"
    units = int(np.isfinite(arm.report).any((0, 1, 3)).sum()) if alone else len(arm.seeds)
    if units == 1:
        none = {name: hierarchical(value, np.empty(0), units, over=over) for name, value in main.params.items()}
        low = high = np.full(GRID, np.nan)
        return Law(arm, main, power, over, none, none, np.exp(grid), mean, low, high, by_seed, table, off)
    rng = np.random.default_rng(seed)
    x, y, row = resampled(arm, np.zeros((draws, 1), np.intp) if alone else resample_units(units, draws, rng), rng)
    theta, pivots, scale = refit(form, x, y)
    theta = theta[row]
    values, _ = FORMS[form].natural(theta, pivots, scale)
    intervals = {}
    for i, name in enumerate(FORMS[form].parameters):
        if name == "A":  # positive, over decades: in the logarithm
            log = hierarchical(math.log(main.params[name]), np.log(values[:, i]), units, over=over)
            ends = [None if v is None else math.exp(min(v, 700.0)) for v in (log.low, log.high)]
            found = replace(log, estimate=main.params[name], low=ends[0], high=ends[1])
        else:
            found = hierarchical(main.params[name], values[:, i], units, floor=0.0, over=over)
        intervals[name] = wider(found, given[name])
    inputs = np.exp(grid - math.log(pivots[0]))[None, :, None]
    error = standard_error(np.log(FORMS[form].value(theta, inputs)) + math.log(scale), units)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, units - 1)) * error
    half = np.where(error > 0, np.maximum(half, given_half([own_mean], grid)), np.nan)
    half = np.where(np.isfinite(half), half, np.nan)  # no band
    with np.errstate(over="ignore"):
        low, high = mean * np.exp(-half), mean * np.exp(half)
    given = intervals if alone else given
    return Law(arm, main, power, over, intervals, given, np.exp(grid), mean, low, high, by_seed, table, off)


def standard_error(replicates: Array, units: int) -> Array:
    """Standard error [m] of curves [D, m] over resamples; NaN where too many of them could not be fitted."""
    held = replicates[np.isfinite(replicates).all(1)]
    if len(held) < REFITTED * len(replicates):
        return np.full(replicates.shape[1], np.nan)
    return np.asarray(held.std(0) * inflation(units))


def saturates(arm: Arm) -> bool:
    """Whether the saturating law can be fitted to an arm and fits it."""
    table = envelope_table(arm)
    if table["budget"].nunique() <= len(FORMS["saturating"].parameters):
        return False
    try:
        return misfit(table, fit(table["x"], table["y"], "saturating", groups=table["seed"].tolist())).fits
    except Refusal:
        return False


def mean_fit(arm: Arm, form: str) -> tuple[Fit | None, str | None]:
    """The fit of the mean curve of an arm's seeds, budgets as points, or why there is none."""
    try:
        return fit(*mean_curve(arm), form), None
    except Refusal as refusal:
        return None, refusal.sentence


def given_half(fits: Sequence[Fit | None], grid: Array) -> Array:
    """Half-width of ln y (of a difference of several) at ln x = grid, given these tokenizers.

    0 where a curve cannot be fitted to their means; infinite where it can and has no interval: its falling term has
    died out, say, and what it might be is not known.
    """
    known = [each for each in fits if each is not None and each.reason is None]
    if len(known) < len(fits):
        return np.zeros(len(grid))
    variances = np.array([each.get_prediction(np.exp(grid)).se_log ** 2 for each in known])
    total = variances.sum(0)
    # degrees of freedom of a sum of variances, after Satterthwaite
    dof = total**2 / (variances**2 / np.array([each.dof for each in known])[:, None]).sum(0)
    return np.asarray(np.where(np.isnan(total), np.inf, stats.t.ppf(0.5 + LEVEL / 2, dof) * np.sqrt(total)))
