"""How much compute does one method save? C_baseline / C_method at equal quality, as a curve with a band and one number.

    python -m analysis.gain FILE --x flops --y gfid --by method --baseline vq [--at 2.5] [--group seed] [--figure OUT]

A gain of 1.7 says that the method needs 1 / 1.7 of the baseline's compute to be as good. Lower is better: the metric
falls with compute. The quality of the one number is the best that both curves reach, unless it is stated. Neither
curve is extrapolated unless that is asked for: outside the qualities that both reach there is no gain, and the reason
is said. Units of compute and of quality change nothing.

- ``form``: a law of ``FALLING``, or "monotone": isotonic regression, linear in logarithms between its points. Without
  one, the saturating law where both methods follow it (``analysis.curves.misfit``), else monotone. Points that rise
  with compute are said, whatever the form.
- Over groups (tokenizer seeds, runs) that both methods have, by their labels, gains are paired: both curves are
  refitted without the same group. Other groups, and all with ``pair`` "no" (seed 0 of one method is not that of the
  other), are left out one at a time in each method and the variances added (Welch and Satterthwaite).
  Student-t of ln gain, at each quality by itself. One group in a method is refused. In simulations 93-98 % are covered
  with two to five seeds and with six to twelve runs of one point each; 90 % by interpolation of twelve such runs.

Rates of a study, with the search over sizes, are compared in ``analysis.saving``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis import table
from analysis.curves import curve, misfit, refit
from analysis.fit import fit
from analysis.forms import FORMS
from analysis.interval import LEVEL, Interval, short
from analysis.laws import EXPONENT, Array
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.table import TableError
from analysis.valley import methods as intervals
from analysis.valley import told

GRID = 81  # qualities of a curve
FALLING = ("saturating", "power")  # laws whose inverse is known
TIE = 1e-9  # of a logarithm
FLAT = 1e-6  # of ln quality over a whole curve: no fall
WIDE = 1000.0  # a gain known to no better than this factor either way has no interval
UNKNOWN = f"it is known to no better than a factor of {WIDE:,.0f} either way"

Form = Literal["saturating", "power", "monotone"]
Pair = Literal["auto", "yes", "no"]

EXAMPLES = """examples:
  three seeds of each method, the gain at the best gFID that both reach, as a figure over gFID:
    python -m analysis.gain runs.csv --x train_flops --y gfid --by method --baseline vq --group seed --figure gain.png
  by another sum of compute, stage 1 shared by eight generators, at a stated gFID:
    python -m analysis.gain runs.parquet --derive "total=train_flops + tokenizer_flops/8" --x total --y gfid \\
      --by tokenizer --baseline baseline --group tokenizer_seed --at 2.5
  published points without seeds, by a power law: numbers without an interval
    python -m analysis.gain table.csv --x gflops --y loss --by method --baseline DiT --form power --json gain.json

exit code: 0 where a gain could be given, 2 for a wrong option or file, 3 where every one was refused"""


@dataclass(frozen=True)
class Gain:
    """C_baseline / C_method. ``gain`` at quality ``at``; over ``quality`` (worst first) ``curve``, ``low``, ``high``.

    ``crosses``: qualities at which the gain is 1; ``meeting``: the compute of the first of them, None where the curves
    do not cross; ``resolved``: somewhere (without a crossing: everywhere) the interval of the gain leaves out 1;
    ``units``: groups or tokenizer seeds behind the intervals; ``pairing``: whether and by what they are paired, in
    words, empty without groups.
    """

    method: str
    baseline: str
    metric: str
    axis: str
    form: str
    at: float
    gain: Interval
    extrapolated: bool
    quality: tuple[float, ...]
    curve: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    crosses: tuple[float, ...]
    meeting: Interval | None
    resolved: bool
    units: int | None
    pairing: str
    notes: tuple[str, ...]

    @property
    def refusal(self) -> Refusal | None:
        """Why there is no gain at ``at``; None where there is one."""
        if self.gain.estimate is not None:
            return None
        about = f"{self.method} against {self.baseline}: no gain at {self.metric} {self.at:.5g}"
        return Refusal("different_points", f"{about}, {self.gain.reason}")

    def sentence(self) -> str:
        """The answer in words."""
        head = f"{self.method} against {self.baseline}, {self.metric}"
        if self.gain.estimate is None:
            answer = f"no gain at {self.at:.5g}, {self.gain.reason}"
        else:
            sure = ""
            if self.gain.low is not None and self.gain.high is not None:
                sure = "" if not self.gain.low <= 1 <= self.gain.high else ", not told from 1"
            beyond = ", extrapolated" if self.extrapolated else ""
            answer = f"{_known(self.gain, 'gain', 'gain')} in {self.axis} at {self.at:.5g}{beyond}{sure}"
        lines = [f"{head}: {answer}", *([self.pairing] if self.pairing else [])]
        if self.meeting is not None:
            at = _known(self.meeting, "the curves cross at", "the curves cross at a compute")
            lines.append(f"{at} {self.axis} ({self.metric} {', '.join(short(each) for each in self.crosses)})")
        elif self.gain.estimate is not None:
            ahead = self.method if self.curve[-1] > 1 else self.baseline
            sure = "" if self.resolved else ", not resolved everywhere"
            lines.append(f"no crossing in range, {ahead} needs less throughout{sure}")
        lines += self.notes
        return "; ".join(lines)


def _known(found: Interval, name: str, unknown: str) -> str:
    """A number after its name; one that is not known says so first."""
    if found.reason != UNKNOWN or found.estimate is None:
        return f"{name} {told(found)}"
    return f"{unknown} not known to within a factor of {WIDE:,.0f} (estimate {short(found.estimate)})"


@dataclass(frozen=True)
class Side:
    """One method's points: ln x, ln y [n] and, where there are groups, theirs [n]."""

    name: str
    x: Array
    y: Array
    groups: tuple[str, ...] | None = None

    def only(self, names: set[str]) -> Side:
        assert self.groups is not None
        keep = np.array([group in names for group in self.groups])
        return Side(self.name, self.x[keep], self.y[keep], tuple(group for group in self.groups if group in names))

    def without_one(self) -> tuple[Array, Array]:
        """ln x, ln y [G, n] with one group left out (NaN) each, in the order of their names."""
        labels = np.asarray(self.groups)
        out = labels == np.unique(labels)[:, None]
        return np.where(out, np.nan, self.x), np.where(out, np.nan, self.y)


class Half(NamedTuple):
    """Half-widths [m] of ln gain, NaN where there is none, and why [m]."""

    width: Array
    dof: Array
    method: str
    reason: tuple[str | None, ...]


Spread = Callable[[str, Array], Half]  # by form and ln qualities [m]


def reach(form: str, x: Array, y: Array, levels: Array) -> Array:
    """ln x [D, m] at which curves through ln x, ln y [D, n] (NaN left out) are first at or below ln y = levels [m].

    A law is inverted: infinite where it never gets there. A monotone curve is continued along its first and last
    falling pieces, so that a resample which ends short of a quality counts as later than its end; NaN if it never
    falls.
    """
    if form == "monotone":
        return np.array([_reach_monotone(a, b, levels) for a, b in zip(x, y, strict=True)])
    theta, pivots, scale = refit(form, x, y)
    names = FORMS[form].parameters
    asymptote = theta[:, names.index("E"), None] if "E" in names else 0.0
    gap = np.exp(levels - math.log(scale)) - asymptote
    log = np.log(np.where(gap > 0, gap, 1.0))
    place = math.log(pivots[0]) + (theta[:, names.index("A"), None] - log) / theta[:, names.index("a"), None]
    return np.where(gap > 0, place, np.inf)


def _reach_monotone(x: Array, y: Array, levels: Array) -> Array:
    from sklearn.isotonic import IsotonicRegression  # a second to import

    there = np.isfinite(x) & np.isfinite(y)
    model = IsotonicRegression(increasing=False).fit(x[there], y[there])
    at, height = model.X_thresholds_, model.y_thresholds_
    falls = np.flatnonzero(np.diff(height) < 0)
    if not len(falls):
        return np.full(len(levels), np.nan)
    first = np.searchsorted(-height, -levels - TIE)
    piece = np.clip(first - 1, falls[0], falls[-1])
    slope = (at[piece + 1] - at[piece]) / (height[piece + 1] - height[piece])
    start = np.where(first == len(at), len(at) - 1, np.where(first == 0, 0, piece))
    return np.asarray(at[start] + (levels - height[start]) * slope)


def between(
    base: Side,
    method: Side,
    form: str,
    spread: Spread,
    *,
    at: float | None = None,
    extrapolate: bool = False,
    metric: str = "y",
    axis: str = "x",
    units: int | None = None,
    pairing: str = "",
    notes: Sequence[str] = (),
) -> Gain:
    """The gain of one method over another. Raises ``Refusal``: constant (a curve that does not fall),
    different_points (no quality that both reach)."""
    ends = []
    for side in (base, method):
        span = np.array([side.x.min(), side.x.max()])
        high, low = curve(form, side.x[None], side.y[None], span)[0]
        # a power law through points that rise has the least exponent that there is
        least = EXPONENT[0] * (span[1] - span[0]) if form == "power" else 0.0
        if not high - low > least + FLAT:
            raise Refusal("constant", f"{side.name}: {metric} does not fall with {axis}; a gain needs one that does")
        ends.append((float(high), float(low)))
    worst, best = min(high for high, _ in ends), max(low for _, low in ends)
    if not best < worst:
        spans = " and ".join(
            f"{side.name} {short(math.exp(high))} to {short(math.exp(low))}"
            for side, (high, low) in zip((base, method), ends, strict=True)
        )
        raise Refusal("different_points", f"the curves reach no {metric} that both have: {spans}")
    place = best if at is None else math.log(at)
    levels = np.append(np.linspace(worst, best, GRID), place)
    reached = [reach(form, side.x[None], side.y[None], levels)[0] for side in (base, method)]
    with np.errstate(invalid="ignore"):
        log = np.asarray(reached[0] - reached[1])
    half = spread(form, levels)
    inside = best - TIE <= place <= worst + TIE
    if inside or (extrapolate and form != "monotone"):
        found = _interval(float(log[-1]), half)
    else:
        reason = f"outside the qualities that both curves reach, {math.exp(worst):.5g} to {math.exp(best):.5g}"
        found = Interval(None, None, None, LEVEL, half.method, None, reason)
    levels, log, width = levels[:-1], log[:-1], half.width[:-1]
    first, second = (each[:-1] for each in reached)
    turns = np.flatnonzero(np.sign(log[:-1]) * np.sign(log[1:]) < 0)
    zeros = levels[turns] + (levels[turns + 1] - levels[turns]) * log[turns] / (log[turns] - log[turns + 1])
    return Gain(
        method=method.name,
        baseline=base.name,
        metric=metric,
        axis=axis,
        form=form,
        at=math.exp(place) if at is None else at,
        gain=found,
        extrapolated=not inside and found.estimate is not None,
        quality=tuple(np.exp(levels).tolist()),
        curve=tuple(np.exp(log).tolist()),
        low=tuple(_listed(np.exp(log - width))),
        high=tuple(_listed(np.exp(log + width))),
        crosses=tuple(np.exp(zeros).tolist()),
        meeting=_meeting(first, second, turns, half),
        resolved=bool((np.abs(log) > width).any() if len(turns) else (np.abs(log) > width).all()),
        units=units,
        pairing=pairing,
        notes=tuple(notes),
    )


def _meeting(first: Array, second: Array, turns: NDArray[np.intp], half: Half) -> Interval | None:
    """Compute at which the curves, ln x [m] of both at each quality, first meet.

    The interval is the hull of every compute at which the interval of the gain holds 1: what is not told from a tie.
    """
    if not len(turns):
        return None
    log, width, i = first - second, half.width[:-1], int(turns[0])
    place = first[i] + (first[i + 1] - first[i]) * log[i] / (log[i] - log[i + 1])
    dof = float(half.dof[0]) if math.isfinite(half.dof[0]) else None
    nothing = Interval(math.exp(place), None, None, LEVEL, half.method, dof)
    if np.isnan(width).any():
        why = next((each for each in half.reason if each), None)
        return replace(nothing, reason=why)
    ties = np.flatnonzero(np.abs(log) <= width)
    left, right = int(min([turns[0], *ties[:1] - 1])), int(max([turns[-1] + 1, *ties[-1:] + 1]))
    if left < 0 or right >= len(log):
        sides = [name for name, out in (("worst", left < 0), ("best", right >= len(log))) if out]
        return replace(nothing, reason=f"the two are not told apart at the {' and the '.join(sides)} quality")
    ends = [at for each in (first, second) for at in (each[left], each[right])]
    return replace(nothing, low=math.exp(min(ends)), high=math.exp(max(ends)))


def _interval(log: float, half: Half) -> Interval:
    """The gain at the last level from its logarithm."""
    dof, width = float(half.dof[-1]) if math.isfinite(half.dof[-1]) else None, float(half.width[-1])
    if not math.isfinite(log):
        return Interval(None, None, None, LEVEL, half.method, dof, "a law never gets there")
    if not math.isfinite(width):
        return Interval(math.exp(log), None, None, LEVEL, half.method, dof, half.reason[-1])
    return Interval(math.exp(log), math.exp(log - width), math.exp(log + width), LEVEL, half.method, dof)


def _listed(values: Array) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def half_width(variance: Array, dof: Array, method: str, lost: str, floor: Array | float = 0.0) -> Half:
    """Half-widths, ``floor`` at least, from variances [m] of ln gain; ``lost`` says why a variance is missing."""
    with np.errstate(invalid="ignore"):
        width = np.maximum(stats.t.ppf(0.5 + LEVEL / 2, dof) * np.sqrt(variance), floor)
        agree, wide = variance <= TIE**2, width > math.log(WIDE)
    why = {
        "the groups agree to the last digit, which says nothing": agree,
        UNKNOWN: wide,
        lost: ~np.isfinite(width),
    }
    reason = tuple(next((words for words, holds in why.items() if holds[i]), None) for i in range(len(width)))
    return Half(np.where([each is None for each in reason], width, np.nan), dof, method, reason)


def _ungrouped(form: str, levels: Array) -> Half:
    nothing = np.full(len(levels), np.nan)
    why = "no groups are named, and points of one curve are not independent"
    return Half(nothing, nothing, "none", (why,) * len(levels))


def _left_out(base: Side, method: Side, paired: bool) -> Spread:
    """Delete-one-group jackknife of ln gain."""

    def spread(form: str, levels: Array) -> Half:
        replicates = [reach(form, *side.without_one(), levels) for side in (base, method)]
        reason = "without one of the groups a curve never gets there"
        if paired:
            with np.errstate(invalid="ignore"):
                difference = replicates[0] - replicates[1]
            count = len(difference)
            how = f"paired delete-one-group jackknife over {count} groups, Student-t"
            return half_width(_jackknife(difference), np.full(len(levels), count - 1.0), how, reason)
        counts = [len(each) for each in replicates]
        each = np.array([_jackknife(values) for values in replicates])
        with np.errstate(invalid="ignore", divide="ignore"):
            dof = each.sum(0) ** 2 / (each**2 / (np.array(counts)[:, None] - 1)).sum(0)
        how = f"delete-one-group jackknife over {counts[0]} and {counts[1]} groups, Welch"
        return half_width(each.sum(0), dof, how, reason)

    return spread


def _jackknife(values: Array) -> Array:
    """Variance [m] from values [G, m] with one group left out each; NaN where one is not finite."""
    held = np.where(np.isfinite(values), values, np.nan)
    return np.asarray((len(held) - 1) * held.var(0))


def gains(
    x: ArrayLike,
    y: ArrayLike,
    methods: Sequence[str],
    baseline: str,
    *,
    groups: Sequence[str] | None = None,
    form: Form | None = None,
    at: float | None = None,
    extrapolate: bool = False,
    metric: str = "y",
    axis: str = "x",
    group: str = "group",
    pair: Pair = "auto",
) -> dict[str, Gain | Refusal]:
    """The gain of every other method over ``baseline``, from compute x [n] and a metric y [n] that falls with it.

    ``groups`` [n]: what is independent, ``group`` its name. ``pair``: by equal labels where two are shared ("auto"), or
    else refused ("yes"), or never ("no"). ``at``: the stated quality. Raises ``TableError`` for a baseline that is not
    there, ``Refusal`` (not_finite, non_positive) for values that no curve can have.
    """
    flops, level, labels = np.asarray(x, np.float64), np.asarray(y, np.float64), np.asarray(methods)
    names = list(dict.fromkeys(labels.tolist()))
    if baseline not in names:
        raise TableError(f"--baseline: got {baseline!r}; methods: {', '.join(names)}")
    if len(names) < 2:
        raise TableError(f"--by: got {baseline!r} alone; a gain needs another method")
    if extrapolate and form == "monotone":
        raise TableError("--extrapolate: got --form monotone; allowed: saturating, power")
    if not (np.isfinite(flops).all() and np.isfinite(level).all()):
        raise Refusal("not_finite", f"a row has no {axis} or {metric}; leave it out by name")
    if (flops <= 0).any() or (level <= 0).any():
        raise Refusal("non_positive", f"a gain compares logarithms: {axis} and {metric} have to be positive")
    named = None if groups is None else np.asarray(groups)
    sides = {}
    for name in names:
        rows = labels == name
        own = None if named is None else tuple(named[rows].tolist())
        sides[name] = Side(name, np.log(flops[rows]), np.log(level[rows]), own)
    found: dict[str, Gain | Refusal] = {}
    for name in names:
        if name == baseline:
            continue
        try:
            asked = _Asked(form, at, extrapolate, metric, axis, group, pair)
            found[name] = _pair(sides[baseline], sides[name], asked)
        except Refusal as refusal:
            found[name] = refusal
    return found


class _Asked(NamedTuple):
    form: Form | None
    at: float | None
    extrapolate: bool
    metric: str
    axis: str
    group: str
    pair: Pair


def _pair(base: Side, method: Side, asked: _Asked) -> Gain:
    notes: list[str] = []
    pairing = ""
    units: int | None = None
    spread: Spread = _ungrouped
    if base.groups is not None and method.groups is not None:
        first, second = set(base.groups), set(method.groups)
        for side, own in ((base, first), (method, second)):
            if len(own) < 2:
                raise Refusal("one_upstream_seed", f"{side.name} has one group ({own.pop()}); an interval needs two")
        shared = first & second
        paired = asked.pair != "no" and len(shared) > 1
        if asked.pair == "yes" and not paired:
            raise Refusal("different_points", f"{base.name} and {method.name} share no two groups of {asked.group}")
        pairing = f"paired by {asked.group}" if paired else f"not paired by {asked.group}"
        if paired and (lost := sorted(first ^ second)):
            base, method = base.only(shared), method.only(shared)
            notes.append(f"groups that one of the two lacks left out: {', '.join(lost)}")
        spread, units = _left_out(base, method, paired), min(len(set(s.groups or ())) for s in (base, method))
    chosen = asked.form or ("saturating" if all(_saturates(side) for side in (base, method)) else "monotone")
    for side in (base, method):
        if len(np.unique(side.x)) < 2:
            raise Refusal("too_few", f"{side.name}: one {asked.axis}; a curve needs two")
        if chosen in FALLING:
            fit(np.exp(side.x), np.exp(side.y), chosen)  # refuses what no law can be fitted to
        notes += rises(side.name, side.x, side.y, side.groups, chosen)
    about: dict[str, Any] = {name: getattr(asked, name) for name in ("at", "extrapolate", "metric", "axis")}
    return between(base, method, chosen, spread, units=units, pairing=pairing, notes=notes, **about)


def _saturates(side: Side) -> bool:
    """Whether the saturating law can be fitted to a method's points and fits them."""
    rows = pd.DataFrame({"x": np.exp(side.x), "y": np.exp(side.y), "budget": side.x, "seed": side.groups or 0})
    try:
        return misfit(rows, fit(rows["x"], rows["y"], "saturating")).fits
    except Refusal:
        return False


def rises(name: str, x: Array, y: Array, groups: Sequence[str] | None, form: str) -> list[str]:
    """A note where a method's points rise with compute: means at each x, or each group's own where no x is shared."""
    frame = pd.DataFrame({"x": x, "y": y, "group": groups or 0})
    apart = groups is not None and frame["x"].is_unique and frame["group"].nunique() < len(frame)
    curves = [rows for _, rows in frame.groupby("group")] if apart else [frame]
    steps = np.concatenate([np.diff(rows.groupby("x")["y"].mean().to_numpy()) for rows in curves])
    if not (steps > 0).any():
        return []
    how = "made to fall by isotonic regression" if form == "monotone" else "a law passes through them"
    return [f"{name} is not monotone: it rises at {int((steps > 0).sum())} of {len(steps)} steps, {how}"]


def unanswered(found: Mapping[str, Gain | Refusal]) -> Refusal | None:
    """Why there is no gain at all: the first reason; None where one could be given."""
    reasons = [each if isinstance(each, Refusal) else each.refusal for each in found.values()]
    return reasons[0] if all(reasons) else None


def sentences(found: Mapping[str, Gain | Refusal], baseline: str) -> list[str]:
    """Every gain in words, then the level and the method of their intervals."""
    made = [
        f"{name} against {baseline}: refused ({each.code}), {each.sentence}"
        if isinstance(each, Refusal)
        else each.sentence()
        for name, each in found.items()
    ]
    return made + intervals([each.gain for each in found.values() if isinstance(each, Gain)])


def rows(found: Mapping[str, Gain | Refusal], baseline: str) -> list[dict[str, Any]]:
    """Every gain as JSON holds it; ``refused`` says why there is none."""
    made: list[dict[str, Any]] = []
    for name, each in found.items():
        if isinstance(each, Refusal):
            made.append({"method": name, "baseline": baseline, "refused": each.told})
        else:
            made.append({**asdict(each), "refused": None if each.refusal is None else each.refusal.told})
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = table.parser("analysis.gain", (__doc__ or "").splitlines()[0], EXAMPLES, "a metric at one compute")
    parser.add_argument("--x", required=True, metavar="COL", help="compute, by the sum that is meant")
    parser.add_argument("--y", required=True, metavar="COL", help="metric, positive, lower is better")
    parser.add_argument("--by", type=table.listed, required=True, metavar="COL[,COL]", help="what tells methods apart")
    parser.add_argument("--baseline", required=True, metavar="NAME", help="the method that the others are held against")
    parser.add_argument("--at", type=float, metavar="QUALITY", help="default: the best that both curves reach")
    parser.add_argument("--group", metavar="COL", help="what is independent: a tokenizer seed, a run")
    parser.add_argument(
        "--pair",
        choices=get_args(Pair),
        help="groups of one label in both methods are one (default: auto, where shared)",
    )
    parser.add_argument(
        "--form", choices=(*FALLING, "monotone"), help="default: saturating where it fits, else monotone"
    )
    parser.add_argument("--extrapolate", action="store_true", help="follow the laws to an --at beyond the points")
    parser.add_argument("--protocol", type=table.listed, default=[], metavar="COL[,COL]", help="must not differ")
    parser.add_argument(
        "--figure", type=table.writable, metavar="OUT", help="gains over quality with bands, as PNG, SVG or PDF"
    )
    given = parser.parse_args(argv)
    about = {name: getattr(given, name) for name in ("file", "where", "derive", "x", "y", "by", "baseline", "group")}
    try:
        if given.at is not None and not 0 < given.at < math.inf:
            raise TableError(f"--at: got {given.at:g}; allowed: a number above 0")
        if given.pair and given.group is None:
            raise TableError(f"--pair: got {given.pair}; it needs --group COL")
        frame = table.selected(given)
        table.alike(frame, given.protocol)
        found = gains(
            table.numbers(frame, given.x, "--x"),
            table.numbers(frame, given.y, "--y"),
            table.labels(frame, given.by, "--by"),
            given.baseline,
            groups=None if given.group is None else table.labels(frame, [given.group], "--group"),
            form=given.form,
            at=given.at,
            extrapolate=given.extrapolate,
            metric=given.y,
            axis=given.x,
            group=given.group or "",
            pair=given.pair or "auto",
        )
        refused = unanswered(found)
        if given.figure and refused is None:
            from analysis import ratio  # matplotlib is slow to import

            ratio.write([each for each in found.values() if isinstance(each, Gain)], given.figure)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as refusal:
        return table.refuse(refusal, given.json, {**about, "gains": []})
    print("\n".join(sentences(found, given.baseline)))
    if given.json:
        why = None if refused is None else refused.told
        table.write_json(
            given.json, {**about, "pair": given.pair, "refused": why, "gains": rows(found, given.baseline)}
        )
    return 0 if refused is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
