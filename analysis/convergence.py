"""How long until training curves reach a threshold? EP_FID@k of any table, with refusals and a comparison of groups.

    python -m analysis.convergence FILE --threshold 2 --by method,backbone [--x epochs] [--metric gfid] [--protocol COL]

EP_FID@k is the number of epochs at which *unguided* gFID first is at or below k (RAEv2, arXiv 2605.18324). Its
published 177 (RAE) and 35 (RAEv2) are linear interpolations between evaluations; those in ln x and ln metric give 152
and 33. So both are given, with the bracket, by the rules of ``analysis.crossing``. Two reference sets that differ by
0.06-0.12 near gFID 2 move a slow curve by tens of epochs, so a curve of several protocols is refused.

- Within a curve the columns that say how the metric was measured have one value, and so they have in a comparison.
  Guided rows are refused. A guidance scale of null, 0 or 1 counts as unguided (1 is off where the scale multiplies
  conditional minus unconditional, 0 where it is what is added to 1).
- ``--compare``: Kaplan-Meier medians and the log-rank test (``analysis.survival``). A right-censored curve counts as
  not there at its last point. One that was not interpolated (left-censored, or a wide bracket) counts as there at the
  upper end of its bracket, which is at the latest. The units are curves, or training seeds where every group is one
  curve.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from analysis import survival, tally
from analysis.crossing import MAX_RATIO, Reached, number, reach
from analysis.interval import LEVEL, Interval
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.table import TableError, column, listed, numbers, positive, selected, writable, write_json
from analysis.table import parser as command

REPEAT = "evaluation_seed"  # tells repeats apart where --repeat is not given

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
UNSTATED = "protocol not stated"

EXAMPLES = """examples:
  published curves, each from one source, at two thresholds (guided rows are not EP_FID):
    python -m analysis.convergence published.csv --threshold 2,2.5 --by source,method,backbone --where "NOT guided" \\
      --figure curves.png
  a study's points in FLOPs, three tokenizer seeds, evaluations repeated (evaluation_seed):
    python -m analysis.convergence points.parquet --threshold 1 --by rate,generator_size --seed tokenizer_seed \\
      --x flops_to_point --metric fid_digits_supervised --where "protocol = 'unguided'"
  do encoders reach gFID 3 sooner by one method than by another, in GPU-hours, some not at all?
    python -m analysis.convergence runs.csv --threshold 3 --by method,encoder --x gpu_h \\
      --derive "gpu_h=epochs*hours_per_epoch" --protocol guided,sampler --compare method --json out.json

exit code: 0 where a curve could be read, 2 for a wrong option or file, 3 where every curve, or every comparison that
was asked for, was refused"""


@dataclass(frozen=True)
class Curve:
    """A curve of a table by its ``--by`` values, how it was measured (None: not stated), and when it got there."""

    curve: dict[str, Any]
    protocol: dict[str, Any] | None
    reached: Reached

    @property
    def name(self) -> str:
        return " / ".join("none" if value is None else str(value) for value in self.curve.values()) or "all rows"

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


def metric_of(frame: pl.DataFrame) -> str:
    """The column of gFID where --metric is not given. Raises ``TableError`` for none or several."""
    found = [name for name in frame.columns if name in ("gfid", "fid")]
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


def table(
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

    ``protocol``: the columns that say how the metric was measured (None: the well-known ones; empty: not stated).
    ``repeat`` defaults to evaluation_seed where there is one. Raises ``TableError`` for a column that is not there,
    ``Refusal`` (no_protocol); what is wrong with one curve is in its ``refused``.
    """
    if not max_ratio > 1:
        raise TableError(f"--max-bracket-ratio: got {max_ratio}; allowed: more than 1")
    metric = metric_of(frame) if metric is None else metric
    if repeat is None and REPEAT in frame.columns and REPEAT not in (*by, seed):
        repeat = REPEAT
    for option, names in (("--by", by), ("--protocol", protocol or ()), ("--seed", (seed,)), ("--repeat", (repeat,))):
        for name in names:
            if name is not None:
                column(frame, name, option)
    values = {name: numbers(frame, name, option) for name, option in ((x, "--x"), (metric, "--metric"))}
    measured = protocol_of(frame) if protocol is None else tuple(protocol)
    frame = frame.with_columns(pl.Series(name, held) for name, held in values.items())
    found = []
    for key, rows in frame.group_by(by, maintain_order=True) if by else [((), frame)]:
        about = {name: _plain(value) for name, value in zip(by, key, strict=True)}
        runs = {name: [str(_plain(value)) for value in rows[name]] if name else None for name in (seed, repeat)}
        for threshold in thresholds:
            held: dict[str, Any] = {}
            try:
                held = _measured(rows, measured)
                reached = reach(
                    rows[x].to_numpy(),
                    rows[metric].to_numpy(),
                    threshold,
                    axis=x,
                    metric=metric,
                    seeds=runs[seed],
                    repeats=runs[repeat],
                    max_ratio=max_ratio,
                    isotonic=isotonic,
                )
            except Refusal as refusal:
                keys = [name for name in (x, seed, repeat) if name]
                told = refusal.sentence + (_apart(rows, keys, metric) if refusal.code == "duplicate_run" else "")
                span = Interval(None, None, None, LEVEL, "none", reason="refused")
                refused = {"code": refusal.code, "sentence": told}
                reached = Reached(threshold, x, (None, None), None, None, None, span, told, refused)
            stated = any(value is not None for value in held.values())
            if not stated and reached.censored is not None:
                reached = replace(reached, note="; ".join(part for part in (reached.note, UNSTATED) if part))
            found.append(Curve(about, held if stated else None, reached))
    return found


def _measured(rows: pl.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """The protocol of one curve. Raises ``Refusal`` (guided, mixed_protocols: several protocols)."""
    for name, off in GUIDANCE.items():
        if name not in rows.columns:
            continue
        guided = rows.filter(~pl.col(name).cast(pl.String).str.to_lowercase().is_in(sorted(off)))
        if len(guided):
            why = f"{len(guided)} of {len(rows)} rows are guided ({name} = {_plain(guided[name][0])})"
            told = f"EP_FID is unguided by definition, and {why}: leave them out with --where"
            raise Refusal("guided", told)
    held = {}
    for name in names:
        values = [_plain(value) for value in rows[name].unique(maintain_order=True)]
        if len(values) > 1:
            told = ", ".join("not stated" if value is None else str(value) for value in values)
            raise Refusal("mixed_protocols", f"{name} has several values in one curve: {told}")
        held[name] = values[0]
    return held


def _apart(rows: pl.DataFrame, keys: Sequence[str], metric: str) -> str:
    """Which columns tell rows apart that stand for the same point."""
    pairs = rows.filter(pl.col(metric).is_finite()).filter(pl.struct(keys).is_duplicated())
    others = [name for name in rows.columns if name not in (*keys, metric)]
    varied = pairs.group_by(keys).agg(pl.col(others).n_unique()).select(pl.col(others).max())
    names = [name for name in others if varied[name][0] > 1]
    return f"; rows differ in {', '.join(names)}: a column of --by, --seed or --repeat?" if names else ""


def _plain(value: Any) -> Any:
    """A value of a column as JSON holds it: whole numbers without a point, null for NaN."""
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@dataclass(frozen=True)
class Comparison:
    """Groups of curves at one threshold; chi2, dof (groups - 1) and p of a log-rank test, None where it is refused."""

    compare: str
    threshold: float
    axis: str
    unit: str = "curves"  # or "seeds"
    left_out: int = 0  # curves that were refused
    at_upper_end: int = 0  # units that count as there at the upper end of their bracket
    groups: tuple[survival.Group, ...] = ()
    chi2: float | None = None
    dof: int | None = None
    p: float | None = None
    refused: dict[str, str] | None = None  # code and sentence


def compare(curves: Sequence[Curve], name: str) -> Comparison:
    """Curves of one threshold, grouped by one of their ``--by`` columns; by the rules of this module.

    Raises ``TableError`` for a column that the curves are not named by; what the test refuses is in ``refused``.
    """
    if name not in curves[0].curve:
        raise TableError(f"--compare: got {name!r}; allowed, columns of --by: {', '.join(curves[0].curve) or 'none'}")
    kept = [each for each in curves if _ordered(each.reached) is not None]
    found = Comparison(name, curves[0].reached.threshold, curves[0].reached.axis, left_out=len(curves) - len(kept))
    units = [(str(each.curve[name]), each.reached) for each in kept]
    if len({group for group, _ in units}) == len(units) and any(len(each.runs) > 1 for _, each in units):
        found = replace(found, unit="seeds")
        units = [(group, run) for group, each in units for run in each.runs]
    try:
        _agree(kept)
        timed = [(group, *at) for group, each in units if (at := _ordered(each)) is not None]
        groups, time, event = zip(*timed, strict=True)
        upper = sum(each.linear is None and each.censored != "right" for _, each in units)
        found = replace(found, at_upper_end=upper, groups=survival.medians(time, event, groups))
        test = survival.logrank(time, event, groups)
    except Refusal as refusal:
        return replace(found, refused=refusal.told)
    return replace(found, chi2=test.chi2, dof=test.dof, p=test.p)


def _ordered(reached: Reached) -> tuple[float, int] | None:
    """Time and event (1: got there, 0: not yet) of a curve; None where it has none."""
    if reached.linear is not None:
        return reached.linear, 1
    low, high = reached.bracket
    if reached.censored == "right":
        return None if low is None else (low, 0)
    return None if high is None else (high, 1)


def _agree(curves: Sequence[Curve]) -> None:
    """Raises ``Refusal`` where curves were measured in several ways, or there is none."""
    if not curves:
        raise Refusal("too_few", "no curve is left to compare")
    for name in dict.fromkeys(name for each in curves for name in each.protocol or {}):
        values = list(dict.fromkeys(str((each.protocol or {}).get(name)) for each in curves))
        if len(values) > 1:
            how = "name with --protocol the columns that have to agree"
            raise Refusal("mixed_protocols", f"{name} differs between the curves: {', '.join(values)}; {how}")


def text(curves: Sequence[Curve]) -> str:
    """One line per curve and threshold: name, k, bracket, linear, log, interval, note."""
    axis = curves[0].reached.axis
    lines = [["curve", "k", f"bracket ({axis})", "linear", "log", f"{LEVEL:.0%} interval", "note"]]
    for each in curves:
        at = each.reached
        low, high = ("" if end is None else number(end) for end in at.bracket)
        bracket = {"none": f"{low}-{high}", "left": f"<={high}", "right": f">{low}", None: "refused"}[at.censored]
        note = f"({at.refused['code']}) {at.note}" if at.refused else at.note
        interval, reason = _interval(at.interval)
        note = "; ".join(part for part in (note, reason) if part)
        lines.append([each.name, number(at.threshold), bracket, _value(at.linear), _value(at.log), interval, note])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in lines
    )


def _value(value: float | None) -> str:
    return "-" if value is None else number(value)


def _interval(span: Interval) -> tuple[str, str]:
    """An interval, and why an end of it is missing."""
    if span.low is None and span.high is None:
        return "-", "" if span.reason == "refused" else f"no interval: {span.reason}"
    ends = ("" if span.low is None else number(span.low), "" if span.high is None else number(span.high))
    return f"[{ends[0]}, {ends[1]}]", "" if span.reason is None else f"interval: {span.reason}"


def told(found: Comparison) -> str:
    """A comparison in lines: a group each, then the test."""
    lines = [f"{found.compare} at {number(found.threshold)}, {found.unit}, times in {found.axis}:"]
    for each in found.groups:
        median = f"median {number(each.median)}" if each.median is not None else f"no median: {each.reason}"
        lines.append(f"  {each.name}: {each.events} of {each.n} get there, {median}")
    if found.refused:
        lines.append(f"  refused ({found.refused['code']}): {found.refused['sentence']}")
    else:
        lines.append(f"  log-rank chi2({found.dof}) = {number(found.chi2 or 0.0)}, p = {number(found.p or 0.0)}")
    if found.at_upper_end or found.left_out:
        lines.append(
            f"  at the upper end of their bracket: {found.at_upper_end}; refused and left out: {found.left_out}"
        )
    return "\n".join(lines)


def _thresholds(given: Sequence[str]) -> list[float]:
    """Raises ``TableError``."""
    parts = [part for each in given for part in each.split(",")]
    return list(dict.fromkeys(positive("--threshold", part) for part in parts))


def main(argv: Sequence[str] | None = None) -> int:
    parser = command("analysis.convergence", (__doc__ or "").splitlines()[0], EXAMPLES, "a metric at one x")
    parser.add_argument("--threshold", action="append", required=True, metavar="K[,K]", help="may be repeated")
    parser.add_argument(
        "--by", type=listed, default=[], metavar="COL[,COL]", help="what tells curves apart (default: all rows are one)"
    )
    parser.add_argument(
        "--x", default="epochs", metavar="COL", help="axis, for example images, flops (default: epochs)"
    )
    parser.add_argument("--metric", metavar="COL", help="default: gfid, fid or the only fid_... column")
    parser.add_argument("--protocol", type=listed, metavar="COL[,COL]", help="how it was measured; none: not stated")
    parser.add_argument("--seed", metavar="COL", help="training seeds of one curve")
    parser.add_argument("--repeat", metavar="COL", help=f"evaluations of one point (default: {REPEAT}, where it is)")
    parser.add_argument("--max-bracket-ratio", type=float, default=MAX_RATIO, metavar="R", help="default: %(default)s")
    parser.add_argument("--isotonic", action="store_true", help="smooth each curve to one that falls")
    parser.add_argument("--compare", metavar="COL", help="groups of curves, by a column of --by")
    parser.add_argument("--figure", type=writable, metavar="OUT", help="curves and crossings, as PNG, SVG or PDF")
    given = parser.parse_args(argv)
    refused: dict[str, str] | None = None
    curves: list[Curve] = []
    compared: list[Comparison] = []
    try:
        thresholds = _thresholds(given.threshold)
        frame = selected(given)
        metric = given.metric or metric_of(frame)
        curves = table(
            frame,
            thresholds,
            by=given.by,
            x=given.x,
            metric=metric,
            protocol=[] if given.protocol == ["none"] else given.protocol,
            seed=given.seed,
            repeat=given.repeat,
            max_ratio=given.max_bracket_ratio,
            isotonic=given.isotonic,
        )
        if given.compare:
            parts = [[each for each in curves if each.reached.threshold == threshold] for threshold in thresholds]
            compared = [compare(part, given.compare) for part in parts]
        refused = tally.refused([each.reached.refused for each in curves])
        refused = refused or tally.refused([each.refused for each in compared])
        if given.figure and refused is None:
            from analysis import descent  # matplotlib is slow to import

            descent.write(curves, given.figure, metric=metric)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        refused = refusal.told
    else:
        print("\n\n".join([text(curves), *(told(each) for each in compared)]))
    if given.json:
        held = {"file": given.file, "where": given.where, "derive": given.derive, "refused": refused}
        held |= {"curves": [each.row() for each in curves], "comparisons": [asdict(each) for each in compared]}
        write_json(given.json, held)
    return 0 if refused is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
