"""Which rate wins at which compute? Lower envelopes, laws, crossings, best rates, predictions of the next budget.

    python -m analysis.frontier results/digits                      # laws and crossings, as sentences
    python -m analysis.frontier results/digits --predict-largest    # writes prediction.parquet before it has run

Curves are lower envelopes over generator sizes (``analysis.arms``). Tokenizer seeds are the unit of every interval:
they are resampled, the same ones in both arms of a contrast, generator runs within them, and the search over sizes is
repeated each time.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from analysis import prediction, study
from analysis.arms import (
    Arm,
    Envelope,
    Sum,
    arm,
    envelope_table,
    identity,
    mean_curve,
    resampled,
    same_candidates,
    words,
)
from analysis.fit import MISFIT, Fit, Refusal, fit, solve
from analysis.laws import FORMS, Array
from analysis.load import StudyError
from analysis.uncertainty import (
    DRAWS,
    LEVEL,
    WIDE_RATIO,
    Interval,
    delta,
    hierarchical,
    inflation,
    paired,
    resample_units,
    short,
    wider,
)

Verdict = Literal["crossing", "no crossing in range", "not identified", "refused"]
GRID = 160  # compute values at which curves are compared
MISFIT_P = 0.01  # lack of fit is told from scatter at this level


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
    """The law of one arm: pooled fit over its tokenizer seeds, intervals over tokenizers, band, curve per seed."""

    arm: Arm
    fit: Fit
    power: Fit | None  # without an asymptote, beside it
    intervals: dict[str, Interval]  # over tokenizers (given the one, where there is one)
    given: dict[str, Interval]  # given these tokenizers: their mean curve, budgets as points
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
    """Lack of fit of a law to an envelope (columns budget, x, y), by Fisher's split of the residual sum of squares."""
    missed = pd.Series(np.log(rows["y"].to_numpy()) - np.log(found.predict(rows["x"].to_numpy())))
    groups = missed.groupby(rows["budget"].to_numpy())
    mean, count = groups.mean(), groups.size()
    rms = math.sqrt(float((mean**2).mean()))
    lack, scatter = float((count * mean**2).sum()), float(groups.apply(lambda r: ((r - r.mean()) ** 2).sum()).sum())
    spare, within = len(mean) - len(found.params), len(missed) - len(mean)
    if spare < 1 or within < 1 or scatter == 0:
        return Misfit(rms, None)
    return Misfit(rms, float(stats.f.sf(lack / spare / (scatter / within), spare, within)))


def law(arm: Arm, form: str | None = None, *, draws: int = DRAWS, seed: int = 0) -> Law:
    """Fit one arm: all seeds together, log residuals; intervals by resampling tokenizer seeds. Raises ``Refusal``.

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
    own_mean, reason = _mean_fit(arm, form)
    if own_mean is None:
        given = {name: Interval(v, None, None, LEVEL, "delta", 0, reason) for name, v in main.params.items()}
    else:
        given = delta(own_mean)
    units = len(arm.seeds)
    if units == 1:
        limits = main.get_prediction(np.exp(grid)).summary_frame()
        low, high = limits["mean_ci_lower"].to_numpy(), limits["mean_ci_upper"].to_numpy()
        return Law(arm, main, power, delta(main), given, np.exp(grid), mean, low, high, by_seed, table, off)
    rng = np.random.default_rng(seed)
    x, y, row = resampled(arm, resample_units(units, draws, rng), rng)
    theta, pivots, scale = refit(form, x, y)
    theta = theta[row]
    values, _ = FORMS[form].natural(theta, pivots, scale)
    intervals = {}
    for i, name in enumerate(FORMS[form].parameters):
        if name == "A":  # positive, over decades: in the logarithm
            log = hierarchical(math.log(main.params[name]), np.log(values[:, i]), units)
            ends = [None if v is None else math.exp(min(v, 700.0)) for v in (log.low, log.high)]
            over = replace(log, estimate=main.params[name], low=ends[0], high=ends[1])
        else:
            over = hierarchical(main.params[name], values[:, i], units, floor=0.0)
        intervals[name] = wider(over, given[name])
    inputs = np.exp(grid - math.log(pivots[0]))[None, :, None]
    error = (np.log(FORMS[form].value(theta, inputs)) + math.log(scale)).std(0) * inflation(units)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, units - 1)) * error
    half = np.where(error > 0, np.maximum(half, _given_half([own_mean], grid)), np.nan)
    with np.errstate(over="ignore"):
        low, high = mean * np.exp(-half), mean * np.exp(half)
    return Law(arm, main, power, intervals, given, np.exp(grid), mean, low, high, by_seed, table, off)


def _saturates(arm: Arm) -> bool:
    """Whether the saturating law can be fitted to an arm and fits it."""
    table = envelope_table(arm)
    if table["budget"].nunique() <= len(FORMS["saturating"].parameters):
        return False
    try:
        return misfit(table, fit(table["x"], table["y"], "saturating", groups=table["seed"].tolist())).fits
    except Refusal:
        return False


def _mean_fit(arm: Arm, form: str) -> tuple[Fit | None, str | None]:
    """The fit of the mean curve of an arm's seeds, budgets as points, or why there is none."""
    try:
        return fit(*mean_curve(arm), form), None
    except Refusal as refusal:
        return None, refusal.sentence


def _given_half(fits: Sequence[Fit | None], grid: Array) -> Array:
    """Half-width of ln y (of a difference of several) at ln x = grid, given these tokenizers; 0 where unknown."""
    known = [each for each in fits if each is not None and each.covariance is not None]
    if len(known) < len(fits):
        return np.zeros(len(grid))
    t = float(stats.t.ppf(0.5 + LEVEL / 2, min(each.dof for each in known)))
    return np.asarray(t * np.sqrt(sum(each.get_prediction(np.exp(grid)).se_log ** 2 for each in known)))


@dataclass(frozen=True)
class Crossing:
    """Where two arms' curves meet in compute. ``flops`` is null when they do not, or when it cannot be said."""

    first: str
    second: str
    metric: str
    axis: str
    form: str
    verdict: Verdict
    flops: Interval | None
    below: str | None  # the rate that is lower at the low end of the range
    above: str | None  # and at the high end
    low_end: float
    high_end: float
    resolved: bool  # somewhere (everywhere, without a crossing) the interval of the difference leaves out zero
    seeds: int
    method: str
    reason: str | None = None

    def sentence(self) -> str:
        """The answer in words."""
        who, seeds = f"{self.first} and {self.second}, {words(self.metric)}", f"{self.seeds} tokenizer seeds"
        if self.verdict == "refused":
            return f"{who}: refused, {self.reason}."
        if self.flops is None:
            sure = "resolved" if self.resolved else "not resolved everywhere"
            return (
                f"{who}: no crossing in range ({short(self.low_end)} to {short(self.high_end)} {self.axis}); "
                f"{self.below} is lower throughout, {sure} by {seeds}."
            )
        bounded = self.flops.low is not None
        at = f"{self.flops if bounded else short(self.flops.estimate)} {self.axis}"
        turn = f"{self.below} is lower below, {self.above} above"
        if self.verdict == "crossing":
            return f"{who}: crossing at {at}; {turn} ({seeds})."
        return f"{who}: not identified; the curves meet near {at} ({turn}), but {self.reason} ({seeds})."


def crossing(a: Arm, b: Arm, form: str | None = None, *, draws: int = DRAWS, seed: int = 0) -> Crossing:
    """The compute at which two rates swap, with an interval over tokenizer seeds.

    D(C) = ln y_a - ln y_b of the two fitted curves, its standard error from resampling the same tokenizer seeds in both
    arms, envelope and fit repeated. The interval is the stretch around the zero of D in which |D| <= t x error
    (Student-t, seeds - 1 degrees of freedom; not narrower than the scatter about the curves allows): the compute values
    that the data do not tell from a tie.
    ``form`` None takes the saturating law where both arms have enough budgets and it fits both (``Misfit``), monotone
    interpolation elsewhere.
    """
    seeds = tuple(sorted(set(a.seeds) & set(b.seeds)))
    method = f"tie region of the paired difference, hierarchical bootstrap, {draws} draws, Student-t"
    answer = Crossing(
        first=a.rate,
        second=b.rate,
        metric=a.metric,
        axis=a.axis,
        form=form or "",
        verdict="refused",
        flops=None,
        below=None,
        above=None,
        low_end=math.nan,
        high_end=math.nan,
        resolved=False,
        seeds=len(seeds),
        method=method,
    )
    if len(seeds) < 2:
        return replace(answer, reason="a contrast between tokenizers needs two tokenizer seeds in both")
    a, b = same_candidates(a.take(seeds), b.take(seeds))
    if not (a.sizes and a.budgets):
        return replace(answer, reason="the two rates share no generator size and budget")
    envelopes = [Envelope(each, identity(each)) for each in (a, b)]
    counts = [int(np.isfinite(each.y[0]).any(0).sum()) for each in envelopes]
    own = [each.flat() for each in envelopes]
    if min(counts) < 2:
        return replace(answer, reason="fewer than two budgets that both rates have measured")
    form = form or ("saturating" if all(_saturates(each) for each in (a, b)) else "monotone")
    low, high = (f(g(x[np.isfinite(x)]) for x, _ in own) for f, g in ((max, np.min), (min, np.max)))
    if not low < high:
        return replace(answer, reason="the two rates share no range of compute")
    grid = np.linspace(low, high, GRID)
    difference = curve(form, *own[0], grid)[0] - curve(form, *own[1], grid)[0]
    rng = np.random.default_rng(seed)
    picked = resample_units(len(seeds), draws, rng)
    replicates = []
    for each in (a, b):
        x, y, row = resampled(each, picked, rng)
        replicates.append(curve(form, x, y, grid)[row])
    error = (replicates[0] - replicates[1]).std(0) * inflation(len(seeds))
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(seeds) - 1)) * error
    if form in FORMS:
        half = np.maximum(half, _given_half([_mean_fit(each, form)[0] for each in (a, b)], grid))
    tied = np.abs(difference) <= half
    lower = [a.rate if d < 0 else b.rate for d in (difference[0], difference[-1])]
    answer = replace(answer, form=form, below=lower[0], above=lower[1], low_end=math.exp(low), high_end=math.exp(high))
    turns = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    if not len(turns):
        return replace(answer, verdict="no crossing in range", resolved=not tied.any())
    i = int(turns[0])
    zero = float(grid[i] + (grid[i + 1] - grid[i]) * difference[i] / (difference[i] - difference[i + 1]))
    left, right = i, i + 1
    while left > 0 and tied[left]:
        left -= 1
    while right < GRID - 1 and tied[right]:
        right += 1
    open_ends = [side for side, at in (("smaller", left), ("larger", right)) if tied[at]]
    dof = len(seeds) - 1
    if not error.any():
        flops = Interval(math.exp(zero), None, None, LEVEL, method, dof, "the tokenizer seeds agree to the last digit")
    elif open_ends:
        flops = Interval(
            math.exp(zero), None, None, LEVEL, method, dof, f"{' and '.join(open_ends)} compute is not resolved"
        )
    else:
        flops = Interval(math.exp(zero), math.exp(grid[left]), math.exp(grid[right]), LEVEL, method, dof)
    reason = flops.reason
    if len(turns) > 1:
        reason = f"the curves meet {len(turns)} times"
    elif not reason and not flops.identified("ratio"):
        reason = f"the interval is wider than {WIDE_RATIO:g}x"
    verdict: Verdict = "not identified" if reason else "crossing"
    return replace(answer, verdict=verdict, flops=flops, resolved=not tied.all(), reason=reason)


def best(arms: Sequence[Arm], size: str | None = None, *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """The best rate at each budget, of one generator size or (None) of the envelope over sizes.

    Columns: budget, rate, bits, value, runner_up, ratio (runner-up / best), ratio_low, separated (that interval leaves
    out 1, paired by tokenizer seed), share (of resamples of tokenizer seeds that choose this rate), edge (the lowest or
    highest rate won), seeds. Budgets and seeds that all rates have.
    """
    seeds = sorted(set.intersection(*(set(each.seeds) for each in arms)))
    budgets = sorted(set.intersection(*(set(each.budgets) for each in arms)))
    if not seeds or len(arms) < 2 or (size is not None and any(size not in each.sizes for each in arms)):
        return pd.DataFrame()
    if size is None:
        arms = same_candidates(*(each.take(seeds) for each in arms))
    else:
        arms = [each.take(seeds).only(size) for each in arms]
    if not (arms[0].sizes and arms[0].budgets):
        return pd.DataFrame()
    values = [Envelope(each, identity(each)).y[0] for each in arms]  # per rate [seeds, budgets of that rate]
    picked = resample_units(len(seeds), draws, np.random.default_rng(seed))
    found = []
    for budget in budgets:
        each = np.stack([value[:, arm.budgets.index(budget)] for arm, value in zip(arms, values, strict=True)])
        if not np.isfinite(each).all():
            continue
        order = np.argsort(each.mean(1))
        first, second = int(order[0]), int(order[1])
        chosen = np.argmin(each[:, picked].mean(2), axis=0)
        gap = paired(each[second] - each[first]) if len(seeds) > 1 else None
        low = None if gap is None or gap.low is None else math.exp(gap.low)
        found.append(
            {
                "budget": budget,
                "rate": arms[first].rate,
                "bits": arms[first].bits,
                "value": math.exp(each[first].mean()),
                "runner_up": arms[second].rate,
                "ratio": math.exp(float((each[second] - each[first]).mean())),
                "ratio_low": low,
                "separated": low is not None and low > 1,
                "share": float((chosen == first).mean()),
                "edge": first in (0, len(arms) - 1),
                "seeds": len(seeds),
            }
        )
    return pd.DataFrame(found)


def arms_of(
    held: study.Study, metric: str, total: Sum = "generator", models: int = 1
) -> tuple[list[Arm], dict[str, Refusal]]:
    """Every rate of a study as an arm, by bits, and why the others cannot be one."""
    found: list[Arm] = []
    refused: dict[str, Refusal] = {}
    for rate in study.arms(held.points):
        try:
            found.append(arm(held.points, rate, metric, total, models))
        except Refusal as refusal:
            refused[rate] = refusal
    return found, refused


def crossings(arms: Sequence[Arm], *, draws: int = DRAWS) -> list[Crossing]:
    """Every pair of rates, neighbours in bits first."""
    pairs = [(i, j) for j in range(len(arms)) for i in range(j)]
    return [crossing(arms[i], arms[j], draws=draws) for i, j in sorted(pairs, key=lambda ij: (ij[1] - ij[0], ij))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.frontier", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", help="results folder, for example results/digits")
    parser.add_argument("--metric", help="column of analysis.load.points (default: gFID by the first extractor)")
    parser.add_argument("--sum", dest="total", choices=("generator", "total", "inference"), default="generator")
    parser.add_argument("--models", type=int, default=1, help="generators that share stage 1 (--sum total)")
    parser.add_argument("--predict-largest", action="store_true", help="predict the largest budget from the others")
    arguments = parser.parse_args(argv)
    try:
        held = study.read(arguments.study)
        if arguments.predict_largest:
            print(prediction.write(held))
            return 0
        if held.points.is_empty():
            raise StudyError(f"{held.folder}: no generator measured yet (0 of {held.planned} planned evaluations)")
        arms, refused = arms_of(held, arguments.metric or held.main, arguments.total, arguments.models)
        for each in arms:
            try:
                print(law(each).fit.summary())
            except Refusal as refusal:
                print(f"{each.rate}: no law, {refusal.sentence}")
        for line in [found.sentence() for found in crossings(arms)] + [str(refusal) for refusal in refused.values()]:
            print(line)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
