"""Which interval is to be narrowed, and how wide would it be if other points were measured?

Errors are those of the linearised fit at the law that this study follows, with what its points and tokenizer seeds
scatter by; intervals are those of ``analysis.curves``: Student-t over tokenizer seeds (over generator seeds of a single
tokenizer), not narrower than given these tokenizers. Widths are medians over studies, an error being itself estimated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from scipy import optimize, stats

from analysis import frontier
from analysis.arms import Arm, candidates, envelope_table
from analysis.curves import Law, mean_fit
from analysis.fit import fit
from analysis.forms import FORMS
from analysis.interval import LEVEL, short
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.result import Fit
from analysis.uncertainty import spread

Narrow = Literal["exponent", "asymptote", "crossing", "rate"]
NARROW: tuple[Narrow, ...] = get_args(Narrow)
Kind = Literal["tokenizer seed", "generator seed", "budget", "rate", "rate beyond the edge", "optimum"]
ALONE: tuple[Kind, str] = ("tokenizer seed", "one tokenizer seed says nothing about another")
RATES = 5  # that the best of them needs, as in sweep.advice
STEP = 1.01  # a factor of compute, for a slope


class Design(NamedTuple):
    """What a plan measures of one rate."""

    bits: float | None
    budgets: tuple[float, ...]
    seeds: int  # tokenizers
    runs: int  # generator seeds of every size


class Scatter(NamedTuple):
    """Standard deviations of ln y: of a point about its curve, and of the common shift of a tokenizer's points."""

    point: float
    seed: float | None  # with one tokenizer seed it is not known

    def given(self, design: Design) -> Array:
        """Covariance [budgets, budgets] of the seeds' mean curve, given these tokenizers."""
        return np.asarray(self.point**2 / design.runs / design.seeds * np.eye(len(design.budgets)))

    def over(self, design: Design) -> Array:
        """The same, over tokenizers."""
        return np.asarray(self.given(design) + (self.seed or 0.0) ** 2 / design.seeds)


# --- how wide --------------------------------------------------------------------------------------------------


def widest(errors: Sequence[tuple[float, float]]) -> float:
    """Median of the widest of independent half-widths t(dof) x error, from (true error, dof) of each."""
    held = [(float(stats.t.ppf(0.5 + LEVEL / 2, dof)) * error, dof) for error, dof in errors if error > 0]

    def quantile(share: float) -> float:
        return max(scale * math.sqrt(float(stats.chi2.ppf(share, dof)) / dof) for scale, dof in held)

    # as wide as the median of each at least, as this quantile of each at most
    low, high = quantile(0.5), quantile(0.5 ** (1 / len(held)))
    if len(held) == 1:
        return low

    def below(width: float) -> float:
        return math.prod(float(stats.chi2.cdf(dof * (width / scale) ** 2, dof)) for scale, dof in held) - 0.5

    return float(optimize.brentq(below, low / 2, 2 * high))  # with equal errors an end is the root


def _solved(found: Fit, budgets: Sequence[float]) -> tuple[Array, Array]:
    """What errors [budgets] of ln y do to theta [p, budgets], parameters at a bound held; and the rows of theta."""
    form = FORMS[found.form]
    x = np.asarray(budgets)[None, :, None] / np.asarray(found.pivots)
    theta = np.asarray(found.theta)[None]
    gradient = form.jacobian(theta, x)[0].T / form.value(theta, x)[0][:, None]
    free = [i for i, name in enumerate(form.parameters) if name not in found.at_bound]
    solved = np.zeros((len(form.parameters), len(budgets)))
    solved[free] = np.linalg.pinv(gradient[:, free])
    return solved, np.asarray(free)


def _half(contrasts: Sequence[tuple[Array, Design]], scatter: Scatter, spare: Sequence[int]) -> float | None:
    """Half-width of a sum of independent linear functions [budgets] of mean curves, each of its own tokenizers.

    ``spare`` holds budgets - parameters of each. None where a report would have no interval either.
    """
    seeds = min(design.seeds for _, design in contrasts)
    alone = seeds == 1 and len(contrasts) == 1
    units = contrasts[0][1].runs if alone else seeds
    if units < 2 or min(spare) < 1:
        return None
    given = [float(g @ scatter.given(design) @ g) for g, design in contrasts]
    over = [float(g @ scatter.over(design) @ g) for g, design in contrasts] if seeds > 1 else given
    dof = sum(given) ** 2 / sum(v * v / n for v, n in zip(given, spare, strict=True))  # after Satterthwaite
    return widest([(math.sqrt(sum(over)), units - 1), (math.sqrt(sum(given)), dof)])


# --- of what ---------------------------------------------------------------------------------------------------


class Target:
    """The interval to be narrowed."""

    words: str
    now: str  # as measured
    first: tuple[Kind, str] | None = None  # the kind of addition without which there is no interval, and why

    def width(self, designs: dict[str, Design], scatter: Scatter) -> float | None:
        """Its expected half-width; None where there will be no interval."""
        raise NotImplementedError

    def say(self, width: float) -> str:
        return f"within {math.exp(min(width, 99.0)):.3g}x"


class Missing(Target):
    """An interval that this study cannot have yet."""

    def __init__(self, words: str, first: tuple[Kind, str]) -> None:
        self.words, self.first, self.now = words, first, "not to be had"

    def width(self, designs: dict[str, Design], scatter: Scatter) -> float | None:
        return None


class Parameter(Target):
    """The exponent or the asymptote of one rate's law."""

    def __init__(self, held: Law, name: str) -> None:
        self.law, self.name, self.value = held, name, held.fit.params[name]
        self.words = f"{ {'a': 'exponent', 'E': 'asymptote'}[name] } of {held.arm.rate}"
        self.now = str(held.intervals[name])
        self.first = ALONE if len(held.arm.seeds) == 1 else None

    def width(self, designs: dict[str, Design], scatter: Scatter) -> float | None:
        design, found = designs[self.law.arm.rate], self.law.fit
        solved, free = _solved(found, design.budgets)
        _, change = FORMS[found.form].natural(np.asarray(found.theta)[None], np.asarray(found.pivots), found.scale)
        gradient = change[0][list(found.params).index(self.name)] @ solved
        return _half([(gradient, design)], scatter, [len(design.budgets) - len(free)])

    def say(self, width: float) -> str:
        return f"±{100 * width / self.value:.3g} %"


class Meeting(Target):
    """The compute at which the laws of two rates cross; widths are of its logarithm."""

    def __init__(self, first: Law, second: Law, crossing: frontier.Crossing) -> None:
        self.laws, self.flops = (first, second), _flops(crossing)
        self.words = f"crossing of {crossing.first} and {crossing.second}"
        self.now = f"{crossing.flops} FLOPs"

    def width(self, designs: dict[str, Design], scatter: Scatter) -> float | None:
        contrasts, spare, slopes = [], [], []
        for each in self.laws:
            form, found, design = FORMS[each.fit.form], each.fit, designs[each.arm.rate]
            solved, free = _solved(found, design.budgets)
            x = np.array([[[self.flops]]]) / np.asarray(found.pivots)
            theta = np.asarray(found.theta)[None]
            contrasts.append((form.jacobian(theta, x)[0, :, 0] / form.value(theta, x)[0, 0] @ solved, design))
            spare.append(len(design.budgets) - len(free))
            ends = np.log(found.predict([self.flops * step for step in (1 / STEP, STEP)]))
            slopes.append((ends[1] - ends[0]) / (2 * math.log(STEP)))
        half = _half(contrasts, scatter, spare)
        return None if half is None else half / abs(slopes[0] - slopes[1])


class Best(Target):
    """The rate, in bits, at the bottom of a parabola through all rates at one budget; widths are of its logarithm."""

    def __init__(self, words: str, budget: float, found: Fit) -> None:
        self.budget, self.found, self.words = budget, found, words
        self.now = f"{short(found.params['x*'])} bits"

    def width(self, designs: dict[str, Design], scatter: Scatter) -> float | None:
        held = [each for each in designs.values() if self.budget in each.budgets and each.bits]
        seeds, runs = min(each.seeds for each in held), min(each.runs for each in held)
        solved, free = _solved(self.found, [float(each.bits or 0) for each in held])
        point = math.sqrt((scatter.point**2 / runs + (scatter.seed or 0.0) ** 2) / seeds)
        error = point * float(np.linalg.norm(solved[list(self.found.params).index("x*")]))
        return widest([(error, seeds - 1), (error, len(held) - len(free))])


def _at(arm: Arm, budget: float) -> float:
    """The mean over seeds of an arm's envelope at a budget."""
    table = envelope_table(arm)
    return math.exp(float(np.log(table.loc[table["budget"] == budget, "y"]).mean()))


def target(arms: Sequence[Arm], laws: dict[str, Law], narrow: Narrow) -> Target:
    """The interval that ``narrow`` names, of the rate that is best at the largest budget; ``Refusal`` without one."""
    if narrow == "rate":
        return _best_rate(arms)
    fitting = [each for each in laws.values() if each.misfit.fits]
    if not fitting:
        raise Refusal(
            "misfit",
            "no rate's points follow its law, and seeds do not narrow what a law gets wrong; budgets that show the "
            f"shape of the curve come first ({'; '.join(misses(laws))})",
        )
    largest = max(float(each.grid[-1]) for each in fitting)
    order = sorted(fitting, key=lambda each: each.at(largest))
    if narrow == "crossing":
        if len(order[0].arm.seeds) == 1:
            return Missing("crossing of two rates", ALONE)
        rates = {each.arm.rate: each for each in order}
        found = [each for each in frontier.crossings([each.arm for each in fitting]) if each.flops is not None]
        # those of the best rate first, at the largest compute
        found.sort(key=lambda each: (order[0].arm.rate not in (each.first, each.second), -_flops(each)))
        if not found:
            raise Refusal("too_few", "no two rates whose laws fit cross within the budgets; there is nothing to narrow")
        return Meeting(rates[found[0].first], rates[found[0].second], found[0])
    name = {"exponent": "a", "asymptote": "E"}[narrow]
    known = [each for each in order if name in each.fit.params and name not in each.fit.at_bound]
    if not known:
        raise Refusal("too_few", f"no law of this study has an {narrow} that is not at its bound")
    return Parameter(known[0], name)


def _flops(crossing: frontier.Crossing) -> float:
    return crossing.flops.estimate or 0.0 if crossing.flops else 0.0


def leader(arms: Sequence[Arm]) -> tuple[list[Arm], float, int]:
    """Rates by bits, the largest budget they share, and the place of the one that is best there; ``Refusal``.

    Of what all of them tried alone, as far as they share any.
    """
    shared = [each for each in candidates(arms) if each.bits] if len(arms) > 1 else []
    if len(shared) < 2:
        raise Refusal("too_few", "a best rate needs two rates with a budget, a size and a tokenizer seed in common")
    budget = shared[0].budgets[-1]
    return shared, budget, int(np.argmin([_at(each, budget) for each in shared]))


def _best_rate(arms: Sequence[Arm]) -> Target:
    rated, budget, place = leader(arms)
    words = f"best rate at {short(budget)} FLOPs"
    if len(rated[0].seeds) == 1:
        return Missing(words, ALONE)
    if place in (0, len(rated) - 1):
        return Missing(words, ("rate beyond the edge", f"{rated[place].rate} is best, the edge of what was tried"))
    if len(rated) < RATES:
        return Missing(words, ("rate", f"{len(rated)} rates where {RATES} are needed"))
    bits = [float(each.bits or 0) for each in rated]
    found = fit(bits, [_at(each, budget) for each in rated], "parabola")
    if not (found.params["k"] > 0 and bits[0] < found.params["x*"] < bits[-1]):
        return Missing(words, ("rate", "the parabola through the rates has no bottom between them"))
    return Best(words, budget, found)


def misses(laws: dict[str, Law]) -> list[str]:
    """The laws that do not fit, in words."""
    return [
        f"{rate}: the means of its budgets lie {math.exp(each.misfit.rms):.2g}x off its law"
        for rate, each in laws.items()
        if not each.misfit.fits
    ]


def scatter(arms: Sequence[Arm], laws: dict[str, Law]) -> Scatter:
    """What points and tokenizer seeds of a study scatter by, pooled over rates; of the lower envelopes over sizes."""
    tables = [envelope_table(each).assign(rate=each.rate) for each in arms]
    frame = pd.concat(tables).rename(columns={"budget": "cell", "y": "value"})
    try:
        found = spread(frame)
    except Refusal:  # one tokenizer seed: what points miss their law by
        fits = [mean_fit(each.arm, each.fit.form)[0] for each in laws.values() if each.misfit.fits]
        known = [each for each in fits if each is not None and each.sigma is not None]
        if not known:
            raise
        squares = sum(each.dof * float(each.sigma or 0) ** 2 for each in known)
        return Scatter(math.sqrt(squares / sum(each.dof for each in known)), None)
    cells = float(np.mean([table["budget"].nunique() for table in tables]))
    # the mean of a tokenizer's points holds a share of what they scatter by
    seed = found["sd_seed"] ** 2 - found["sd_rest"] ** 2 / cells
    return Scatter(found["sd_rest"], math.sqrt(max(seed, 0.0)))
