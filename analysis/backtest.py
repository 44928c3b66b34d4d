"""How well did a law foretell what was then measured? Fits to the smaller budgets, or without one rate, and the rest.

    python -m analysis.backtest FILE --law chinchilla --x N=COL --x D=COL --y COL --by COL [--hold COL] [--project ...]

- ``--by``, later budgets: for each cut-off the rows up to it are fitted and every later row is predicted (an expanding
  window). Budgets closer than ``analysis.fit.SAME`` in ln are one; of many, ``analysis.splits.MOST`` are cut-offs.
- ``--hold``, values left out: each value of a column (a rate) is predicted from the rows of all others. The least and
  the largest are extrapolations.
- ``--project``: what all rows together say about a point where there is no run. A prediction has a run to be compared
  with, a projection has none.

An error is ln(predicted / observed): positive where the law said more than was measured. The distance of a point is in
decades beyond what was fitted. Each law is tested beside the forms that it is without its extra terms, down to the one
without an asymptote; ``analysis.choice`` says which foretold best. A fit that is refused stands as a row with the
reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import choice, table, tally
from analysis.forms import FORMS, WITHOUT
from analysis.interval import LEVEL, short
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.result import Fit
from analysis.solver import Objective
from analysis.splits import MOST, Points, Scheme, collect, inputs, later, left_out
from analysis.table import TableError
from analysis.tally import counted
from analysis.window import SQUARES, Row, Window, evaluate, fitted, project

UNITS: dict[Scheme, str] = {"later budgets": "cut-offs", "values left out": "values"}

EXAMPLES = """examples:
  the Chinchilla points (Huber's loss), four cut-offs in place of every budget:
    python -m analysis.backtest chinchilla.csv --law chinchilla --x N=params --x D=tokens --y loss --by flops \\
      --derive "tokens=flops/(6*params)" --cutoffs 1e20,3e20,6e20,1e21 --loss huber --delta 1e-3
  one curve with three tokenizer seeds, and what it says about a budget where there is no run:
    python -m analysis.backtest points.parquet --law saturating --x x=flops --y gfid --by x --group tokenizer_seed \\
      --project "x=1e20" --json out.json --figure errors.png
  which compression-generation law foretells rates and budgets that it has not seen?
    python -m analysis.backtest points.parquet --law tradeoff,tradeoff_offset,tradeoff_slope --x R=bits --x C=flops \\
      --y gfid --by C --hold R

exit code: 0 where a fit could predict, 2 for a wrong option or file, 3 where every fit was refused"""


@dataclass(frozen=True)
class Report:
    laws: tuple[str, ...]
    windows: tuple[Window, ...]
    rows: tuple[Row, ...]
    choices: tuple[choice.Choice, ...]  # by scheme
    aicc: tuple[dict[str, Any], ...]
    verdict: str  # does AICc agree?


def beside(laws: Sequence[str]) -> tuple[str, ...]:
    """The laws, each followed by the forms that it is without its extra terms, down to the no-asymptote one."""
    found: list[str] = []
    for law in laws:
        name: str | None = law
        while name is not None:
            found.append(name)
            name = WITHOUT.get(name)
    return tuple(dict.fromkeys(found))


def backtest(
    points: Points,
    laws: Sequence[str],
    *,
    by: str | None = None,
    hold: str | None = None,
    cutoffs: Sequence[float] | None = None,
    objective: Objective = SQUARES,
    min_train: int = 0,
    projections: Sequence[Mapping[str, float]] = (),
) -> Report:
    """Every law, and those beside it, on every split; ``by`` and ``hold`` are columns of the points.

    Raises ``TableError`` for cut-offs without rows on either side, ``Refusal`` (too_few) where there is no split.
    """
    laws = beside(laws)
    splits = ([] if by is None else later(points, by, cutoffs)) + ([] if hold is None else left_out(points, hold))
    windows, rows = [], []
    for split in splits:
        for law in laws:
            window, predicted = evaluate(points, law, split, objective, min_train)
            windows.append(window)
            rows += predicted
    whole: dict[str, Fit | Refusal] = {}
    for law in laws:
        try:
            whole[law] = fitted(points, law, np.ones(len(points.y), bool), objective, "all rows")
        except Refusal as refusal:
            whole[law] = refusal
    sizes = {law: len(FORMS[law].parameters) for law in laws}
    choices = [
        choice.choose(_errors(rows, scheme), sizes, scheme, UNITS[scheme])
        for scheme in dict.fromkeys(split.scheme for split in splits)
    ]
    rows += [project(points, law, whole[law], at) for at in projections for law in laws]
    aicc = choice.information(whole)
    return Report(laws, tuple(windows), tuple(rows), tuple(choices), tuple(aicc), choice.verdict(choices, aicc))


def _errors(rows: Sequence[Row], scheme: Scheme) -> pl.DataFrame:
    schema = {"law": pl.String, "unit": pl.Float64, "row": pl.Int64, "place": pl.String, "log_error": pl.Float64}
    kept = [(row.law, row.value, row.row, row.place, row.log_error) for row in rows if row.scheme == scheme]
    return pl.DataFrame(kept, schema, orient="row")


def text(report: Report, points: Points, objective: Objective) -> str:
    """A table of windows for each scheme, then sentences."""
    held = [f"{points.output}, {counted(len(points.y), 'rows')}", *([points.note] if points.note else []), objective]
    parts = ["; ".join([*map(str, held), f"e = ln(predicted / observed), inside: of a new observation's {LEVEL:.0%}"])]
    for found in report.choices:
        windows = [
            each for law in report.laws for each in report.windows if (each.law, each.scheme) == (law, found.scheme)
        ]
        parts.append(f"prediction of {found.scheme} of {windows[0].along} (there is a run for each)\n{_table(windows)}")
        if why := _unknown([row for row in report.rows if row.scheme == found.scheme]):
            parts[-1] += f"\n{why}"
        parts.append(found.sentence)
    parts.append(report.verdict)
    if projected := [_projected(row) for row in report.rows if row.kind != "prediction"]:
        parts.append("\n".join(projected))
    return "\n\n".join(parts)


def _table(windows: Sequence[Window]) -> str:
    first = "cut-off" if windows[0].scheme == "later budgets" else "left out"
    lines = [["law", first, "fitted", "predicted", "mean |e|", "mean e", "max |e|", "inside", "parameters"]]
    for each in windows:
        if each.errors is None:
            refused = each.refused or {}
            numbers, note = ["-"] * 4, f"refused ({refused['code']}): {refused['sentence']}"
        else:
            e = each.errors
            share = f"{e.inside}/{e.intervals}" if e.intervals else "-"
            numbers = [f"{e.log_mae:.5f}", f"{e.signed:+.5f}", f"{e.largest:.4f}", share]
            note = ", ".join(
                f"{name} {'-' if value is None else f'{value:.5g}'}" for name, value in each.params.items()
            )
            note += f" (at a bound: {', '.join(each.at_bound)})" if each.at_bound else ""
        mark = "*" if each.scheme == "values left out" and each.place == "extrapolation" else ""
        lines.append([each.law, f"{each.value:.4g}{mark}", str(each.n_train), str(each.n_test), *numbers, note])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    ends = [str.ljust, *[str.rjust] * 7, str.ljust]
    made = [
        "  ".join(end(cell, width) for end, cell, width in zip(ends, line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(made + (["* extrapolation: the least or the largest"] if first == "left out" else []))


def _unknown(rows: Sequence[Row]) -> str:
    """Why predictions have no interval that their outcome could lie inside."""
    why = dict.fromkeys(row.reason for row in rows if row.reason)
    count = sum(row.reason is not None for row in rows)
    return f"{counted(count, 'predictions')} without an interval: {'; '.join(map(str, why))}" if why else ""


def _projected(row: Row) -> str:
    kind = {"projection": "projection (no run there)", "fitted": "fitted (a run there, and in the fit)"}[row.kind]
    at = ", ".join(f"{name} = {short(value)}" for name, value in row.inputs.items())
    if row.refused or row.predicted is None:
        refused = row.refused or {}
        return f"{kind} of {row.law} at {at}: refused ({refused['code']}): {refused['sentence']}"
    ends = f"(no interval: {row.reason})" if row.low is None else f"[{row.low:.4g}, {row.high:.4g}]"
    ends += ", not identified" if row.identified is False else ""
    decades = f"{row.distance:.2g} decade{'' if f'{row.distance:.2g}' == '1' else 's'}"
    reach = f"{decades} beyond the rows in {row.along}" if row.distance else "within the range of rows"
    return f"{kind} of {row.law} at {at}: {row.predicted:.4g} {ends}, {reach}"


def _named(assignments: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The column of each input; where the laws have one input, ``COL`` alone is its."""
    found: dict[str, str] = {}
    for assignment in assignments:
        name, mark, column = (part.strip() for part in assignment.partition("="))
        if not mark and len(wanted) == 1:
            name, mark, column = wanted[0], "=", name
        if not (name and mark and column) or name in found:
            raise TableError(f"--x: got {assignment!r}; write NAME=COL once for each input, for example N=params")
        found[name] = column
    return found


def _point(text: str, points: Points, laws: Sequence[str]) -> dict[str, float]:
    """A point of --project. Raises ``TableError``."""
    pairs = [[side.strip() for side in part.partition("=")[::2]] for part in text.split(",")]
    named = all(name and value for name, value in pairs)
    found = {name: table.positive(f"--project {name}", value) for name, value in pairs} if named else {}
    needed = dict.fromkeys(name for law in laws for name in FORMS[law].inputs)
    if not (named and set(needed) <= set(found) <= set(points.columns) and len(found) == len(pairs)):
        others = [name for name in points.columns if name not in needed]
        also = f", and may have {', '.join(others)}" if others else ""
        raise TableError(f'--project: got {text!r}; a point has {", ".join(needed)} (write "NAME=number,..."){also}')
    return found


def _objective(given: argparse.Namespace) -> Objective:
    if (given.delta is not None) != (given.loss == "huber"):
        raise TableError(
            f"--loss, --delta: got {given.loss}, {given.delta}; huber needs a delta and no other loss has one"
        )
    delta = None if given.delta is None else table.positive("--delta", given.delta)
    return Objective(given.residuals, given.loss, delta)


def main(argv: Sequence[str] | None = None) -> int:
    parser = table.parser("analysis.backtest", (__doc__ or "").splitlines()[0], EXAMPLES, "a measured point")
    parser.add_argument("--law", type=table.listed, required=True, metavar="LAW[,LAW]", help=", ".join(FORMS))
    parser.add_argument("--x", action="append", required=True, metavar="NAME=COL", help="the column of an input")
    parser.add_argument("--y", required=True, metavar="COL", help="what is predicted")
    parser.add_argument("--by", metavar="COL", help="budget, an input or a column: later ones are predicted")
    parser.add_argument("--hold", metavar="COL", help="an input or a column: each value is predicted from the others")
    parser.add_argument("--group", metavar="COL", help="independent units (runs, tokenizer seeds), for the intervals")
    parser.add_argument(
        "--cutoffs", type=table.listed, metavar="C[,C]", help=f"last budgets fitted (default: all, at most {MOST})"
    )
    parser.add_argument("--min-train", type=int, default=0, metavar="N", help="fewer rows are not fitted")
    parser.add_argument("--loss", choices=("squares", "huber", "absolute"), default="squares")
    parser.add_argument("--delta", metavar="D", help="of Huber's loss, in units of the residuals")
    parser.add_argument("--residuals", choices=("log", "raw"), default="log")
    parser.add_argument(
        "--protocol", type=table.listed, default=[], metavar="COL[,COL]", help="must not differ; none: pool them"
    )
    parser.add_argument("--id", type=table.listed, default=[], metavar="COL[,COL]", help="must not repeat: the run")
    parser.add_argument("--project", action="append", default=[], metavar="NAME=V[,..]", help="a point without a run")
    parser.add_argument("--figure", type=table.writable, metavar="OUT", help="errors by law, as PNG, SVG or PDF")
    given = parser.parse_args(argv)
    held: dict[str, Any] = {name: value for name, value in vars(given).items() if name != "json"}
    held |= {"refused": None, "n": None, "dropped": None}
    try:
        objective = _objective(given)
        if given.by is None and given.hold is None:
            raise TableError("--by, --hold: neither given; name a budget, a column to leave values out of, or both")
        if given.cutoffs and given.by is None:
            raise TableError("--cutoffs: they are of the budget that --by names, which is not given")
        cutoffs = None if given.cutoffs is None else [table.positive("--cutoffs", each) for each in given.cutoffs]
        columns = _named(given.x, inputs(given.law))
        held |= {"delta": objective.delta, "cutoffs": cutoffs}
        frame = table.selected(given)
        along = [name for name in (given.by, given.hold) if name is not None]
        used = [given.y, *columns.values(), *along, *given.id, *([given.group] if given.group else [])]
        table.alike(frame, given.protocol, used)
        points = collect(frame, given.law, columns, given.y, along=along, group=given.group, ids=given.id)
        report = backtest(
            points,
            given.law,
            by=given.by,
            hold=given.hold,
            cutoffs=cutoffs,
            objective=objective,
            min_train=given.min_train,
            projections=[_point(each, points, given.law) for each in given.project],
        )
        held["refused"] = tally.refused([each.refused for each in report.windows])
        if given.figure and held["refused"] is None:
            from analysis import foresight  # matplotlib is slow to import

            foresight.write(report.rows, report.laws, given.figure, output=points.output)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        held["refused"] = refusal.told
    else:
        print(text(report, points, objective))
        held |= {"n": len(points.y), "dropped": points.dropped, "estimator": str(objective)} | asdict(report)
    if given.json:
        table.write_json(given.json, held)
    return 0 if held["refused"] is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
