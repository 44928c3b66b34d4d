"""Which rate wins at which compute? Lower envelopes, laws, crossings, best rates, predictions of the next budget.

    python -m analysis.frontier results/digits                      # laws and crossings, as sentences (and --json OUT)
    python -m analysis.frontier results/digits --predict-largest    # writes prediction.parquet before it has run
    python -m analysis.frontier results/digits --propose            # writes the next grid (analysis.proposal)

Curves are lower envelopes over generator sizes (``analysis.arms``), laws are those of ``analysis.curves``. A contrast
resamples the same tokenizer seeds in both arms, generator runs within them, and repeats the search over sizes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from analysis import prediction, study, table
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
from analysis.table import TableError
from analysis.uncertainty import DRAWS, paired, resample_units

LOWER = ("nll", "two_part", "fid", "kid", "mse", "floor")  # how the names of metrics begin of which lower is better
LAWS = "the default mode"  # laws and crossings
ANY = (LAWS, "--gain", "--best-rate", "--propose")
MODES: Mapping[str, tuple[str, ...]] = {  # the modes that an option belongs to
    "--metric": ANY,
    "--sum": ANY,
    "--models": ANY[:3],
    "--json": ANY[:3],
    "--at": ("--gain",),
    "--narrow": ("--propose",),
    "--hours": ("--propose",),
    "--out": ("--propose",),
}

EXAMPLES = """examples:
  laws of all rates and where they cross, also as JSON:
    python -m analysis.frontier results/digits --json frontier.json
  the compute that other rates save over 16x64, stage 1 shared by eight generators, at a gFID of 2.5:
    python -m analysis.frontier results/digits --gain 16x64 --at 2.5 --sum total --models 8
  the best rate at each budget by held-out bits:
    python -m analysis.frontier results/digits --best-rate --metric nll_bits
  the next grid, for two device-hours at most:
    python -m analysis.frontier results/digits --propose --narrow crossing --hours 2

exit code: 0 where there is an answer, 2 for a wrong option or folder, 3 where everything was refused"""

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


class Answer(NamedTuple):
    """What a mode says: lines, their JSON, and why there is no answer at all."""

    lines: list[str]
    held: dict[str, Any]
    refused: Refusal | None


def _laws(arms: Sequence[Arm], given: argparse.Namespace) -> Answer:
    """The law of every rate, where they cross, the best rate at each budget (``best``; in the JSON alone)."""
    lines: list[str] = []
    made: list[dict[str, Any]] = []
    reasons: list[Refusal] = []
    for each in arms:
        about = {"rate": each.rate, "bits": each.bits}
        try:
            found = law(each)
        except Refusal as refusal:
            lines.append(f"{each.rate}: no law, {refusal.sentence}")
            made.append({**about, "refused": refusal.told})
            reasons.append(refusal)
            continue
        lines.append(f"{each.rate}: {found.fit.summary()}")
        intervals = {name: asdict(ends) for name, ends in found.intervals.items()}
        shown = {"form": found.fit.form, "params": found.fit.params, "intervals": intervals, "units": found.units}
        made.append({**about, **shown, "fits": found.misfit.fits, "fit": found.fit.to_dict(), "refused": None})
    crossed = crossings(arms)
    lines += [each.sentence() for each in crossed]
    rates = best(arms)
    held = {
        "laws": made,
        "crossings": [{name: _known(value) for name, value in asdict(each).items()} for each in crossed],
        "best_rates": [{str(k): _known(v) for k, v in row.items()} for row in rates.to_dict("records")],
    }
    answered = len(reasons) < len(arms) or any(each.verdict != "refused" for each in crossed)
    return Answer(lines, held, None if answered else next(iter(reasons), None))


def _gains(arms: Sequence[Arm], given: argparse.Namespace) -> Answer:
    from analysis import gain, saving  # they build on curves of this module's arms

    found = saving.savings(arms, given.gain, given.at)
    held = {"baseline": given.gain, "at": given.at, "gains": gain.rows(found, given.gain)}
    return Answer(gain.sentences(found, given.gain), held, gain.unanswered(found))


def _best_rates(arms: Sequence[Arm], given: argparse.Namespace) -> Answer:
    from analysis import optimum

    found = optimum.rates(arms)
    rows = [
        {"budget": budget, "refused": each.told}
        if isinstance(each, Refusal)
        else {"budget": budget, **asdict(each), "refused": None}
        for budget, each in found.items()
    ]
    reasons = [each for each in found.values() if isinstance(each, Refusal)]
    refused = reasons[0] if len(reasons) == len(found) else None
    return Answer(optimum.sentences(found, arms), {"best_rates": rows}, refused)


ANSWERS: Mapping[str, Callable[[Sequence[Arm], argparse.Namespace], Answer]] = {
    LAWS: _laws,
    "--gain": _gains,
    "--best-rate": _best_rates,
}


def _known(value: Any) -> Any:
    """A value of a table as JSON has it: no number is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = table.Command(
        prog="python -m analysis.frontier",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="results folder, for example results/digits")
    parser.add_argument("--metric", help="column of analysis.load.points (default: gFID by the first extractor)")
    sums = ("generator", "total", "inference")
    parser.add_argument("--sum", choices=sums, help="which compute (default: generator)")
    parser.add_argument("--models", type=int, metavar="N", help="generators that share stage 1 (of --sum total)")
    parser.add_argument("--json", type=table.writable, metavar="OUT", help="write the answers as JSON")
    modes = parser.add_argument_group("modes, one at most (default: laws and crossings)").add_mutually_exclusive_group()
    modes.add_argument("--gain", metavar="RATE", help="the compute that each other rate saves over this one")
    modes.add_argument("--best-rate", action="store_true", help="R* at each budget, with an interval")
    modes.add_argument("--propose", action="store_true", help="the next grid: what narrows an interval most per hour")
    modes.add_argument("--predict-largest", action="store_true", help="predict the largest budget from the others")
    parser.add_argument("--at", metavar="QUALITY", help="of --gain (default: the best that both reach)")
    narrow = ("exponent", "asymptote", "crossing", "rate")
    parser.add_argument("--narrow", choices=narrow, help="of --propose (default: exponent)")
    parser.add_argument("--hours", type=float, metavar="H", help="of --propose: what it may cost, in device-hours")
    parser.add_argument("--out", metavar="FILE", help="of --propose (default: proposal.yaml in the study)")
    return parser


def _mode(given: argparse.Namespace) -> str:
    """The mode asked for. Raises ``TableError`` for an option that it does not have."""
    asked = {name: getattr(given, name[2:].replace("-", "_")) for name in (*ANY[1:], "--predict-largest")}
    mode = next((name for name, value in asked.items() if value), LAWS)
    for name, modes in MODES.items():
        value = getattr(given, name[2:])
        if value is not None and mode not in modes:
            raise TableError(f"{name}: got {value} with {mode}; it belongs to {', '.join(modes)}")
    if given.models is not None and (given.sum != "total" or given.models < 1):
        raise TableError(f"--models: got {given.models}; allowed: 1 or more, with --sum total")
    if mode == "--propose" and given.sum not in (None, "generator"):
        raise TableError(f"--sum: got {given.sum}; allowed with --propose: generator, as a grid's budgets")
    if given.at is not None:
        given.at = table.positive("--at", given.at)
    return mode


def _metric(held: study.Study, given: str | None) -> str:
    """The metric asked for. Raises ``StudyError`` for one that is not there or of which lower is not better."""
    lower = [name for name in held.metrics if name.startswith(LOWER)]
    metric = given or (held.main if held.extractors else "nll_bits")
    if metric not in lower:
        why = "it is not known to be better when lower; " if metric in held.metrics else ""
        raise StudyError(f"{held.folder}: --metric: got {metric!r}; {why}allowed: {', '.join(lower) or 'none yet'}")
    return metric


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    refused: dict[str, Refusal] = {}
    about: dict[str, Any] = {"study": given.study}
    try:
        mode = _mode(given)
        held = study.read(given.study)
        if given.predict_largest:
            print(prediction.write(held))
            return 0
        for line in held.damaged:
            print(line, file=sys.stderr)
        if held.points.is_empty():
            raise StudyError(f"{held.folder}: no generator to fit yet ({held.progress})")
        metric = _metric(held, given.metric)
        if not held.unguided:
            print(f"{held.folder}: no unguided evaluation; these are guided, protocol {held.points['protocol'][0]}")
        arms, refused = arms_of(held, metric, given.sum or "generator", given.models or 1)
        about |= {"metric": metric, "sum": given.sum or "generator", "models": given.models}
        about["left_out"] = [{"rate": rate, "refused": each.told} for rate, each in refused.items()]
        if mode == "--propose":
            from analysis import proposal  # it builds on this module

            proposal.propose(held, metric, arms, given.narrow or "exponent", given.hours, given.out)
            return 0
        if not arms:
            raise next(iter(refused.values()))
        about["axis"] = arms[0].axis
        answer = ANSWERS[mode](arms, given)
    except (StudyError, TableError) as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as refusal:
        answer = Answer([], {}, refusal)
    lines = [*answer.lines, *(f"{rate}: left out, {each}" for rate, each in refused.items())]
    if lines:
        print("\n".join(lines))
    if answer.refused is not None and not answer.lines:
        print(answer.refused, file=sys.stderr)
    if given.json:
        why = None if answer.refused is None else answer.refused.told
        table.write_json(given.json, {**about, **answer.held, "refused": why})
    return 0 if answer.refused is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
