"""Which rate wins at which compute? Lower envelopes, laws, crossings, best rates, predictions of the next budget.

    python -m analysis.frontier results/digits                      # laws and crossings, as sentences
    python -m analysis.frontier results/digits --predict-largest    # writes prediction.parquet before it has run
    python -m analysis.frontier results/digits --propose            # writes the next grid (analysis.proposal)

Curves are lower envelopes over generator sizes (``analysis.arms``), laws are those of ``analysis.curves``. A contrast
resamples the same tokenizer seeds in both arms, generator runs within them, and repeats the search over sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from analysis import prediction, study
from analysis.arms import (
    Arm,
    Envelope,
    Sum,
    arm,
    candidates,
    identity,
    resampled,
    words,
)
from analysis.curves import GRID, curve, given_half, law, mean_fit, saturates, standard_error
from analysis.forms import FORMS
from analysis.interval import LEVEL, WIDE_RATIO, Interval, short
from analysis.load import StudyError
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.uncertainty import DRAWS, paired, resample_units

Verdict = Literal["crossing", "no crossing in range", "not identified", "refused"]


def _scatter_half(a: Arm, b: Arm) -> float:
    """Half-width of a difference of interpolated curves, given these tokenizers; 0 where nothing is to spare.

    The difference of the envelopes at each budget has a value per seed; what remains of it beyond a level per seed and
    one per budget scatters by chance, pooled over budgets. Two seeds that agree at one compute hide it there.
    """
    difference = Envelope(a, identity(a)).y[0] - Envelope(b, identity(b)).y[0]
    difference = difference[:, np.isfinite(difference).all(0)]
    seeds, count = difference.shape
    dof = (seeds - 1) * (count - 1)
    if dof < 1:
        return 0.0
    rest = difference - difference.mean(0) - difference.mean(1, keepdims=True) + difference.mean()
    error = math.sqrt(float((rest**2).sum()) / dof / seeds)
    return float(stats.t.ppf(0.5 + LEVEL / 2, dof)) * error


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
        if self.flops is None or self.flops.estimate is None:
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
    arms, envelope and fit repeated. The interval is the hull of the zero of D and of every compute at which
    |D| <= t x error (Student-t, seeds - 1 degrees of freedom; not narrower than the scatter about the curves allows):
    the values that the data do not tell from a tie. All of them, not only those next to the zero: where the curves of
    two seeds happen to meet, the error is zero and cuts the stretch in two. It is open at an end of the range that is
    tied.
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
    fair = candidates((a, b))
    if not fair:
        return replace(answer, reason="the two rates share no generator size and budget")
    a, b = fair
    seeds = a.seeds
    answer = replace(answer, seeds=len(seeds))
    if len(seeds) < 2:
        return replace(answer, reason="fewer than two tokenizer seeds have values in both")
    envelopes = [Envelope(each, identity(each)) for each in (a, b)]
    counts = [int(np.isfinite(each.y[0]).any(0).sum()) for each in envelopes]
    own = [each.flat() for each in envelopes]
    if min(counts) < 2:
        return replace(answer, reason="fewer than two budgets that both rates have measured")
    form = form or ("saturating" if all(saturates(each) for each in (a, b)) else "monotone")
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
    error = standard_error(replicates[0] - replicates[1], len(seeds))
    if not np.isfinite(error).all():
        return replace(answer, reason="too many resamples could not be fitted")
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(seeds) - 1)) * error
    if form in FORMS:
        half = np.maximum(half, given_half([mean_fit(each, form)[0] for each in (a, b)], grid))
    else:
        half = np.maximum(half, _scatter_half(a, b))
    tied = np.abs(difference) <= half
    lower = [a.rate if d < 0 else b.rate for d in (difference[0], difference[-1])]
    answer = replace(answer, form=form, below=lower[0], above=lower[1], low_end=math.exp(low), high_end=math.exp(high))
    turns = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    if not len(turns):
        return replace(answer, verdict="no crossing in range", resolved=not tied.any())
    i = int(turns[0])
    zero = float(grid[i] + (grid[i + 1] - grid[i]) * difference[i] / (difference[i] - difference[i + 1]))
    # from the last compute that is told from a tie to the first one
    ties = np.flatnonzero(tied)
    left = int(min([turns[0], *ties[:1] - 1]))
    right = int(max([turns[-1] + 1, *ties[-1:] + 1]))
    open_ends = [side for side, out in (("smaller", left < 0), ("larger", right >= GRID)) if out]
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
    arms = candidates(arms, size) if len(arms) > 1 else []
    if not arms:
        return pd.DataFrame()
    seeds, budgets = arms[0].seeds, arms[0].budgets
    values = [Envelope(each, identity(each)).y[0] for each in arms]  # per rate [seeds, budgets]
    picked = resample_units(len(seeds), draws, np.random.default_rng(seed))
    found = []
    for i, budget in enumerate(budgets):
        each = np.stack([value[:, i] for value in values])
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
    parser.add_argument("--propose", action="store_true", help="the next grid: what narrows an interval most per hour")
    parser.add_argument("--narrow", choices=("exponent", "asymptote", "crossing", "rate"), default="exponent")
    parser.add_argument("--hours", type=float, metavar="H", help="what a proposal may cost, in device-hours")
    parser.add_argument("--out", metavar="FILE", help="where it goes (default: proposal.yaml in the study)")
    parser.add_argument("--gain", metavar="RATE", help="the compute that each other rate saves over this one")
    parser.add_argument("--at", type=float, metavar="QUALITY", help="of --gain (default: the best that both reach)")
    parser.add_argument("--best-rate", action="store_true", help="R* at each budget, with an interval")
    arguments = parser.parse_args(argv)
    try:
        held = study.read(arguments.study)
        if arguments.predict_largest:
            print(prediction.write(held))
            return 0
        for line in held.damaged:
            print(line, file=sys.stderr)
        if held.points.is_empty():
            raise StudyError(f"{held.folder}: no generator to fit yet ({held.progress})")
        metric = arguments.metric or (held.main if held.extractors else "nll_bits")
        if metric not in held.metrics:
            allowed = ", ".join(held.metrics) or "none yet"
            raise StudyError(f"{held.folder}: metric: got {metric!r}; measured: {allowed}")
        if not held.unguided:
            print(f"{held.folder}: no unguided evaluation; these are guided, protocol {held.points['protocol'][0]}")
        arms, refused = arms_of(held, metric, arguments.total, arguments.models)
        if arguments.propose:
            from analysis import proposal  # it builds on this module

            if arguments.total != "generator":
                raise StudyError(
                    f"--sum: got {arguments.total}; allowed with --propose: generator, as a grid's budgets"
                )
            proposal.propose(held, metric, arms, arguments.narrow, arguments.hours, arguments.out)
            return 0
        if arguments.gain or arguments.best_rate:
            from analysis import optimum, saving  # they build on this module

            lines = saving.sentences(arms, arguments.gain, arguments.at) if arguments.gain else []
            print("\n".join(lines + (optimum.sentences(arms) if arguments.best_rate else [])))
            return 0
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
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
