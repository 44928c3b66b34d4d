"""How long until a training curve reaches a threshold? EP_FID@k with brackets, censoring, intervals and refusals.

    python -m analysis.convergence FILE --threshold 2 --by method,backbone [--x epochs] [--metric gfid] [--protocol COL]

EP_FID@k is the number of epochs at which *unguided* gFID first is at or below k (RAEv2, arXiv 2605.18324). Its published
177 (RAE) and 35 (RAEv2) are linear interpolations between evaluations; interpolation in ln x gives 152 and 33. So both
are given, with the bracket: the last x above k before the first crossing, and the first x at or below k. Across a
bracket wider than ``--max-bracket-ratio`` neither is: they can then differ by more than a third.

- A curve may rise again: the first crossing counts, and the note says where the curve is above k later.
- Already at or below k at its first point: left-censored. Never at or below k: right-censored. The bracket then has one
  end. Nothing is extrapolated.
- ``--seed``: a curve is measured in several training runs. linear and log are geometric means over them; the interval
  is Student-t over ln x of the linear ones. Where a run is censored there is no mean; with five runs or more a one-sided
  bound for their median is given (order statistics).
- ``--repeat``: one run is evaluated several times at one x. Their mean is the curve. With one training run the interval
  is that of evaluation noise: draws about the means, with the scatter of ln metric pooled over all x (Student-t by
  degrees of freedom), crossed anew. It says nothing about another run. With several runs their spread contains it.
- Within a curve the columns that say how the metric was measured have one value, and so they have in a comparison.
  A guidance scale of null, 0 or 1 counts as unguided (1 is off where s multiplies the difference, 0 where it is added).
- ``--compare``: a curve that was not interpolated (left-censored, or a wide bracket) counts as having reached k at the
  upper end of its bracket, which is at the latest; a right-censored one as not having reached it at its last point.
  The units are curves, or the training runs where each group is one curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from analysis import survival, table
from analysis.refusal import Refusal
from analysis.table import TableError
from analysis.uncertainty import DRAWS, LEVEL, student

MAX_RATIO = 5.0  # x_after / x_before; at 5 the two interpolations differ by up to 37 %, at 3 by up to 20 %
SEED = 0  # of the draws
UNSEEDED = "all"

PROTOCOL = (  # columns that say how a metric was measured, looked for where --protocol is not given
    *("protocol", "protocol_id", "guided", "guidance", "guidance_scale", "cfg", "cfg_scale", "samples", "source"),
    *("reference", "references", "extractor", "extractors", "sampler", "sampler_steps", "nfe", "weights", "labels"),
    *("temperature", "top_k", "top_p"),
)
OFF = frozenset({"", "false", "no", "none", "off", "unguided", "0", "0.0"})
SCALE_OFF = OFF | {"1", "1.0"}
GUIDANCE = {  # columns that say whether a sample was guided, and their values that say it was not
    "guided": OFF,
    **dict.fromkeys(("guidance", "guidance_scale", "cfg", "cfg_scale"), SCALE_OFF),
}

Array = NDArray[np.float64]
Censored = Literal["none", "left", "right"]
Bracket = tuple[float | None, float | None]

EXAMPLES = """examples:
  published curves, each from one source, at two thresholds (guided rows are not EP_FID):
    python -m analysis.convergence published.csv --threshold 2,2.5 --by source,method,backbone --where "NOT guided"
  a study's points in FLOPs, three tokenizer seeds, evaluations repeated (evaluation_seed):
    python -m analysis.convergence points.parquet --threshold 1 --by rate,generator_size --seed tokenizer_seed \\
      --x flops_to_point --metric fid_digits_supervised --where "protocol = 'unguided'"
  do encoders reach gFID 3 sooner by one method than by another, in GPU-hours, some not at all?
    python -m analysis.convergence runs.csv --threshold 3 --by method,encoder --x gpu_h \\
      --derive "gpu_h=epochs*hours_per_epoch" --protocol guided,sampler --compare method --json out.json

exit code: 0 where a curve could be read, 2 for a wrong option or file, 3 where every curve, or every comparison that
was asked for, was refused"""


@dataclass(frozen=True)
class Span:
    """An interval of x; an end is None, with a reason, where there is none."""

    low: float | None
    high: float | None
    level: float
    method: str
    dof: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Reached:
    """When a curve reached ``threshold``, in the unit of ``axis``; see the module for each rule."""

    threshold: float
    axis: str
    bracket: Bracket
    linear: float | None
    log: float | None
    censored: Censored | None  # None where the curve was refused
    interval: Span
    note: str = ""
    refused: dict[str, str] | None = None  # code and sentence
    runs: tuple[Reached, ...] = ()  # one per training seed


@dataclass(frozen=True)
class Curve:
    """A curve of a table by its ``--by`` values, how it was measured (None: not stated), and when it got there."""

    curve: dict[str, Any]
    protocol: dict[str, Any] | None
    reached: Reached

    def row(self) -> dict[str, Any]:
        """What the JSON holds of it."""
        at = self.reached
        return {
            "curve": self.curve,
            "threshold": at.threshold,
            "axis": at.axis,
            "bracket": list(at.bracket),
            "linear": at.linear,
            "log": at.log,
            "censored": at.censored,
            "protocol": self.protocol,
            "interval": asdict(at.interval),
            "note": at.note,
            "refused": at.refused,
        }


@dataclass(frozen=True)
class _Run:
    """One training run: means y [n] over ``count`` [n] repeats at x [n], rising; relative scatter of one repeat."""

    x: Array
    y: Array
    count: Array
    scatter: float | None  # standard deviation of ln y within an x; None: a metric that is not positive
    dof: int


def reach(
    x: ArrayLike,
    y: ArrayLike,
    threshold: float,
    *,
    axis: str = "epochs",
    seeds: Sequence[Any] | None = None,
    repeats: Sequence[Any] | None = None,
    max_ratio: float = MAX_RATIO,
    isotonic: bool = False,
    draws: int = DRAWS,
) -> Reached:
    """When the curve y [n] over x [n], in any order, first is at or below ``threshold``.

    ``seeds`` and ``repeats`` [n] name the training run and the evaluation of each point. ``isotonic``: each run is first
    replaced by the falling curve nearest to it (least squares, weighted by repeats). Points that are not finite are
    dropped and counted. Raises ``Refusal``: not_finite (none is left), duplicate_run (an x twice in one run that are
    not two repeats). A wide bracket does not raise; ``refused`` says so.
    """
    at, value = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert at.shape == value.shape and at.ndim == 1
    run = np.asarray([UNSEEDED] * len(at) if seeds is None else [str(seed) for seed in seeds], np.str_)
    repeat = np.asarray([""] * len(at) if repeats is None else [str(each) for each in repeats], np.str_)
    assert len(run) == len(repeat) == len(at)
    keep = np.isfinite(at) & np.isfinite(value)
    if not keep.any():
        raise Refusal("not_finite", f"none of {len(at)} points has a finite metric and a finite {axis}")
    dropped = int((~keep).sum())
    at, value, run, repeat = at[keep], value[keep], run[keep], repeat[keep]
    points = [(str(each), float(x), str(r)) for each, x, r in zip(run, at, repeat, strict=True)]
    if twice := sorted(
        {point for point in points if points.count(point) > 1} if len(set(points)) < len(points) else ()
    ):
        name = "" if twice[0][0] == UNSEEDED else f" of seed {twice[0][0]}"
        raise Refusal("duplicate_run", f"{axis} {_number(twice[0][1])}{name} stands twice in one curve")
    held = {str(name): _averaged(at[run == name], value[run == name]) for name in dict.fromkeys(run.tolist())}
    runs = {name: _cross(each, threshold, axis, max_ratio, isotonic) for name, each in held.items()}
    if len(runs) == 1:
        (name, found), one = next(iter(runs.items())), next(iter(held.values()))
        found = replace(found, interval=_noise(one, threshold, max_ratio, isotonic, draws), runs=(found,))
    else:
        found = _over(runs)
    notes = [found.note] if found.note else []
    notes += ["smoothed to fall (isotonic)"] if isotonic else []
    notes += [f"{dropped} of {len(keep)} points dropped: not finite"] if dropped else []
    return replace(found, note="; ".join(notes))


def _averaged(x: Array, y: Array) -> _Run:
    at, which, count = np.unique(x, return_inverse=True, return_counts=True)
    mean = np.bincount(which, y) / count
    dof = len(x) - len(at)
    if (y <= 0).any():
        return _Run(at, mean, count.astype(np.float64), None, dof)
    logs = np.log(y)
    residual = logs - (np.bincount(which, logs) / count)[which]
    return _Run(at, mean, count.astype(np.float64), math.sqrt(float(residual @ residual) / max(dof, 1)), dof)


def _falling(y: Array, count: Array) -> Array:
    from sklearn.isotonic import isotonic_regression  # a second to import, and only --isotonic needs it

    return np.asarray(isotonic_regression(y, sample_weight=count, increasing=False), np.float64)


def _first(y: Array, threshold: float) -> NDArray[np.intp]:
    """Index of the first value of y [..., n] at or below the threshold; n where there is none."""
    below = y <= threshold
    return np.where(below.any(-1), below.argmax(-1), y.shape[-1])


def _wide(before: Any, after: Any, max_ratio: float) -> Any:
    """Too wide to interpolate. From zero or less there is no ratio; rounding of other units does not decide."""
    return (before > 0) & (after > max_ratio * (1 + 1e-9) * before)


def _cross(run: _Run, threshold: float, axis: str, max_ratio: float, isotonic: bool) -> Reached:
    x, k = run.x, _number(threshold)
    y = _falling(run.y, run.count) if isotonic else run.y
    first, n = int(_first(y, threshold)), len(x)
    span = Span(None, None, LEVEL, "none", reason="one training run without repeats")
    found = Reached(threshold, axis, (None, None), None, None, "none", span)
    if first == n:
        best = int(y.argmin())
        note = f"not reached: lowest {_number(float(y[best]))} at {_number(float(x[best]))}"
        return replace(found, bracket=(float(x[-1]), None), censored="right", note=note)
    notes = []
    if len(again := x[first:][y[first:] > threshold]):
        notes.append(f"first crossing; above {k} again at {', '.join(_number(float(each)) for each in again)}")
    after = float(x[first])
    if first == 0:
        notes.insert(0, f"at or below {k} from the first point on")
        return replace(found, bracket=(None, after), censored="left", note="; ".join(notes))
    before, above, below = float(x[first - 1]), float(y[first - 1]), float(y[first])
    refused, linear, log = None, None, None
    if below == threshold:  # nothing to interpolate
        linear = log = after
    elif _wide(before, after, max_ratio):
        ratio = f"{_number(after / before)} apart, more than {_number(max_ratio)}"
        sentence = f"not interpolated: {k} is passed between {_number(before)} and {_number(after)} {axis}, {ratio}"
        refused = {"code": "wide_bracket", "sentence": sentence}
        notes.insert(0, sentence)
    else:
        share = (above - threshold) / (above - below)
        linear = (1 - share) * before + share * after
        log = before * (after / before) ** share if before > 0 else None
        if log is None:
            notes.append(f"no logarithm of {axis} {_number(before)}")
    note = "; ".join(notes)
    return replace(found, bracket=(before, after), linear=linear, log=log, note=note, refused=refused)


def _noise(run: _Run, threshold: float, max_ratio: float, isotonic: bool, draws: int) -> Span:
    """Interval of evaluation noise alone: percentiles of the crossings of drawn curves.

    Where a draw is censored or its bracket wide, its crossing lies somewhere between two ends: the lower percentile is
    that of the lower ends, the upper one that of the upper ends.
    """
    method = f"evaluation noise of one training run, {draws} parametric-t draws, seed {SEED}"
    nothing = Span(None, None, LEVEL, method, run.dof)
    if run.dof == 0:
        return replace(nothing, method="none", dof=None, reason="one training run without repeats")
    if run.scatter is None:
        return replace(nothing, reason="relative noise of a metric that is not positive")
    if run.scatter <= 1e-12:
        return replace(nothing, reason="the repeats agree to the last digit, which says nothing")
    rng, x, n = np.random.default_rng(SEED), run.x, len(run.x)
    scale = run.scatter * np.sqrt(run.dof / rng.chisquare(run.dof, (draws, 1)))
    y = run.y * np.exp(scale * rng.standard_normal((draws, n)) / np.sqrt(run.count))
    if isotonic:
        y = np.stack([_falling(each, run.count) for each in y])
    first, each = _first(y, threshold), np.arange(draws)
    low, high = x[np.clip(first - 1, 0, n - 1)], x[np.clip(first, 0, n - 1)]
    above, below = y[each, np.clip(first - 1, 0, n - 1)], y[each, np.clip(first, 0, n - 1)]
    inside = (first > 0) & (first < n)
    share = np.divide(above - threshold, above - below, out=np.zeros(draws), where=inside)
    crossing = (1 - share) * low + share * high
    known = inside & ~_wide(low, high, max_ratio)
    lower = np.where(known, crossing, np.where(first == 0, -np.inf, low))
    upper = np.where(known, crossing, np.where(first == n, np.inf, high))
    ends = [
        float(np.quantile(limits, tail, method="inverted_cdf"))
        for limits, tail in ((lower, 0.5 - LEVEL / 2), (upper, 0.5 + LEVEL / 2))
    ]
    low_end, high_end = (end if math.isfinite(end) else None for end in ends)
    reason = None if low_end is not None and high_end is not None else "an end lies outside what was measured"
    return replace(nothing, low=low_end, high=high_end, reason=reason)


def _over(runs: dict[str, Reached]) -> Reached:
    """One curve from several training runs."""
    found, n = list(runs.values()), len(runs)
    lows, highs = [each.bracket[0] for each in found], [each.bracket[1] for each in found]
    low = None if None in lows else min(end for end in lows if end is not None)
    high = None if None in highs else max(end for end in highs if end is not None)
    count = {kind: sum(each.censored == kind for each in found) for kind in ("left", "right")}
    censored: Censored = "right" if count["right"] else "left" if count["left"] else "none"
    notes = [f"{n} seeds"]
    notes += [f"{count['right']} of {n} seeds do not reach it"] if count["right"] else []
    notes += [f"{count['left']} of {n} seeds are there at their first point"] if count["left"] else []
    notes += [f"seed {name}: {each.note}" for name, each in runs.items() if each.note]
    mean = {}
    for kind in ("linear", "log"):
        values = [value for each in found if (value := getattr(each, kind)) is not None and value > 0]
        mean[kind] = math.exp(float(np.log(values).mean())) if len(values) == n else None
    refused = next((each.refused for each in found if each.refused), None)
    span = _between(found, censored, count)
    first = found[0]
    return Reached(
        *(first.threshold, first.axis, (low, high), mean["linear"], mean["log"], censored, span),
        *("; ".join(notes), refused, tuple(found)),
    )


def _between(found: Sequence[Reached], censored: Censored, count: dict[str, int]) -> Span:
    """Interval from the spread of training runs."""
    n, method = len(found), f"Student-t over ln of the linear crossings of {len(found)} seeds"
    linear = [each.linear for each in found if each.linear is not None and each.linear > 0]
    if len(linear) == n:
        logs = np.log(linear)
        around = student(float(logs.mean()), float(logs.std(ddof=1)) / math.sqrt(n), n - 1, method)
        if around.low is None or around.high is None:
            return Span(None, None, LEVEL, method, n - 1, around.reason)
        return Span(math.exp(around.low), math.exp(around.high), LEVEL, method, n - 1)
    told = f"{count[censored]} of {n} seeds are {censored}-censored" if censored != "none" else "a seed has no crossing"
    if censored == "none" or (count["left"] and count["right"]):
        return Span(None, None, LEVEL, "none", reason=told)
    # the known side of each run: an end at or before (right-censored) or at or after (left-censored) its crossing
    side = 0 if censored == "right" else 1
    ends = [each.linear if each.linear is not None else each.bracket[side] for each in found]
    test = stats.quantile_test(ends, p=0.5, alternative="greater" if censored == "right" else "less")
    bound = float(test.confidence_interval(LEVEL)[side])
    if not math.isfinite(bound):
        reason = f"{told}, and a one-sided {LEVEL:.0%} bound of the median needs five"
        return Span(None, None, LEVEL, "none", reason=reason)
    sides = (bound, None) if censored == "right" else (None, bound)
    return Span(*sides, LEVEL, f"one-sided, median of {n} seeds, order statistics", reason=told)


def metric_of(frame: pl.DataFrame) -> str:
    """The column of gFID where --metric is not given. Raises ``TableError`` for none or several."""
    found = [name for name in ("gfid", "fid") if name in frame.columns]
    found = found or [name for name in frame.columns if name.startswith("fid_") and not name.endswith("_error")]
    if len(found) != 1:
        told = f"several could be meant: {', '.join(found)}" if found else f"columns: {', '.join(frame.columns)}"
        raise TableError(f"--metric: not given, and {told}")
    return found[0]


def protocol_of(frame: pl.DataFrame) -> tuple[str, ...]:
    """The well-known columns that say how a metric was measured. Raises ``Refusal`` (no_protocol) for none."""
    found = tuple(name for name in PROTOCOL if name in frame.columns and frame[name].null_count() < len(frame))
    if not found:
        how = "name the columns with --protocol, or --protocol none"
        raise Refusal("no_protocol", f"no column says how the metric was measured ({', '.join(PROTOCOL)}): {how}")
    return found


def curves(
    frame: pl.DataFrame,
    thresholds: Sequence[float],
    *,
    by: Sequence[str] = (),
    x: str = "epochs",
    metric: str | None = None,
    protocol: Sequence[str] | None = None,
    seed: str | None = None,
    repeat: str | None = None,
    max_ratio: float = MAX_RATIO,
    isotonic: bool = False,
) -> list[Curve]:
    """Every curve of a table at every threshold, in order of appearance; without ``by`` all rows are one curve.

    ``protocol``: the columns that say how the metric was measured (None: well-known ones, empty: not stated). ``repeat``
    defaults to evaluation_seed where there is one. Raises ``TableError`` for a column that is not there, ``Refusal``
    (no_protocol); what is wrong with one curve is in its ``refused``.
    """
    if not max_ratio > 1:
        raise TableError(f"--max-bracket-ratio: got {max_ratio}; allowed: more than 1")
    metric = metric_of(frame) if metric is None else metric
    if repeat is None and "evaluation_seed" in frame.columns and "evaluation_seed" not in (*by, seed):
        repeat = "evaluation_seed"
    options = {"--x": (x,), "--metric": (metric,), "--by": by, "--protocol": protocol or ()}
    options |= {"--seed": (seed,) if seed else (), "--repeat": (repeat,) if repeat else ()}
    for option, names in options.items():
        for name in names:
            table.column(frame, name, option)
    measured = protocol_of(frame) if protocol is None else tuple(protocol)
    numbered = frame.with_columns(
        *(pl.Series(name, table.numbers(frame, name, option)) for name, option in ((x, "--x"), (metric, "--metric")))
    )
    found = []
    parts = numbered.group_by(by, maintain_order=True) if by else [((), numbered)]
    for key, rows in parts:
        name = {column: _plain(value) for column, value in zip(by, key, strict=True)}
        names = {column: table.labels(rows, [column], "") if column else None for column in (seed, repeat)}
        for threshold in thresholds:
            held = None
            try:
                held = _measured(rows, measured)
                reached = reach(
                    *(rows[x].to_numpy(), rows[metric].to_numpy(), threshold),
                    axis=x,
                    seeds=names[seed],
                    repeats=names[repeat],
                    max_ratio=max_ratio,
                    isotonic=isotonic,
                )
            except Refusal as refusal:
                told = (
                    _apart(rows, [c for c in (x, seed, repeat) if c], metric) if refusal.code == "duplicate_run" else ""
                )
                refused = {"code": refusal.code, "sentence": refusal.sentence + told}
                span = Span(None, None, LEVEL, "none", reason="refused")
                reached = Reached(threshold, x, (None, None), None, None, None, span, refused["sentence"], refused)
            if not measured:
                reached = replace(
                    reached, note="; ".join(part for part in (reached.note, "protocol not stated") if part)
                )
            found.append(Curve(name, held if measured else None, reached))
    return found


def _measured(rows: pl.DataFrame, columns: Sequence[str]) -> dict[str, Any]:
    """The protocol of one curve. Raises ``Refusal`` for guided rows and for several protocols."""
    for name in set(GUIDANCE) & set(rows.columns):
        guided = rows.filter(~pl.col(name).cast(pl.String).str.to_lowercase().is_in(sorted(GUIDANCE[name])))
        if len(guided):
            why = f"{len(guided)} of {len(rows)} rows are guided ({name} = {_plain(guided[name][0])})"
            raise Refusal(
                "mixed_protocols", f"EP_FID is unguided by definition, and {why}: leave them out with --where"
            )
    held = {}
    for name in columns:
        values = rows[name].unique(maintain_order=True).to_list()
        if len(values) > 1:
            told = ", ".join(str(_plain(value)) for value in values)
            raise Refusal("mixed_protocols", f"{name} has several values in one curve: {told}")
        held[name] = _plain(values[0])
    return held


def _apart(rows: pl.DataFrame, keys: Sequence[str], metric: str) -> str:
    """Which columns tell rows apart that stand for the same point."""
    rows = rows.filter(pl.col(metric).is_finite())
    pairs = rows.filter(pl.struct(keys).is_duplicated())
    others = [name for name in rows.columns if name not in (*keys, metric)]
    varied = pairs.group_by(keys).agg(pl.col(others).n_unique()).select(pl.col(others).max())
    names = [name for name in others if varied[name][0] > 1]
    return f"; rows differ in {', '.join(names)}: a --by, --seed or --repeat column?" if names else ""


def compare(found: Sequence[Curve], column: str) -> dict[str, Any]:
    """Curves at one threshold, grouped by one of their ``--by`` columns: medians by group and a log-rank test.

    Curves that were refused (other than for a wide bracket) are left out and counted. Keys: compare, threshold, axis,
    unit ("curves" or "seeds"), left_out, at_upper_end (how many entered at the upper end of their bracket), groups,
    chi2, dof, p, refused. Raises ``TableError`` for a column that curves are not named by.
    """
    if unnamed := [each for each in found if column not in each.curve]:
        raise TableError(
            f"--compare: got {column!r}; allowed, columns of --by: {', '.join(unnamed[0].curve) or 'none'}"
        )
    kept = [each for each in found if each.reached.censored is not None]
    at = found[0].reached
    row: dict[str, Any] = {"compare": column, "threshold": at.threshold, "axis": at.axis, "unit": "curves"}
    row |= {"left_out": len(found) - len(kept), "at_upper_end": 0, "groups": [], "chi2": None, "dof": None, "p": None}
    row["refused"] = None
    names = [str(each.curve[column]) for each in kept]
    units = [(name, each.reached) for name, each in zip(names, kept, strict=True)]
    if len(set(names)) == len(names) and any(len(each.reached.runs) > 1 for each in kept):
        row["unit"] = "seeds"
        units = [(name, run) for name, each in zip(names, kept, strict=True) for run in each.reached.runs]
    try:
        if not units:
            raise Refusal("too_few", "no curve is left to compare")
        for name in kept[0].protocol or {}:
            values = list(dict.fromkeys(str((each.protocol or {})[name]) for each in kept))
            if len(values) > 1:
                how = "name with --protocol the columns that have to agree"
                raise Refusal("mixed_protocols", f"{name} differs between the curves: {', '.join(values)}; {how}")
        ends = [each.bracket[0 if each.censored == "right" else 1] for _, each in units]
        time = [end if each.linear is None else each.linear for end, (_, each) in zip(ends, units, strict=True)]
        event = [int(each.censored != "right") for _, each in units]
        group = [name for name, _ in units]
        row["at_upper_end"] = sum(each.linear is None and each.censored != "right" for _, each in units)
        row["groups"] = [asdict(each) for each in survival.medians(time, event, group)]
        row |= asdict(survival.logrank(time, event, group))
    except Refusal as refusal:
        row["refused"] = {"code": refusal.code, "sentence": refusal.sentence}
    return row
