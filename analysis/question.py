"""What is asked of someone's table? Columns, law, loss and intervals of a command line as one fit with its predictions.

The command itself is ``python -m analysis.fit``.
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import polars as pl

from analysis import table
from analysis.fit import DRAWS, fit
from analysis.forms import FORMS, LAWS, WITHOUT
from analysis.interval import LEVEL
from analysis.laws import Array, Form
from analysis.refusal import Refusal
from analysis.result import Fit, Method
from analysis.solver import Loss, Residuals
from analysis.table import TableError

EXAMPLES = """\
examples:
  # a saturating law through the best FID at each compute, runs of one tokenizer seed taken together
  python -m analysis.fit results.csv --law saturating --x x=flops --y fid --group tokenizer_seed --figure law.png

  # Chinchilla's law with Huber's loss, tokens from FLOPs, 4,000 refits; a name with spaces in double quotes in SQL
  python -m analysis.fit runs.parquet --law chinchilla --derive 'D="Training FLOP"/(6*"Model Size")' \\
      --x "N=Model Size" --x D=D --y loss --where "loss < 3.45" --loss huber --delta 1e-3 --bootstrap 4000 --seed 42

  # how much compression: a floor that falls with the bits of a code, an amplitude that rises with them; what it says
  # of a run that has not been made
  python -m analysis.fit runs.parquet --law tradeoff --x R=bits --x C=flops --y fid --group run \\
      --protocol protocol,samples --predict "R=256,C=1e20" --json law.json

exit code: 0 fitted, 2 bad input, 3 refused (the JSON then has refused: code and sentence)
"""


FEWEST = 100  # refits of which percentiles mean anything


@dataclass(frozen=True)
class Answer:
    """A fit, the form without asymptote beside it, and what the law says at the places asked for."""

    fit: Fit
    without: Fit | Refusal | None
    at: Array  # [m, d]
    predictions: list[dict[str, Any]]


def _epilog() -> str:
    bare = sorted(set(WITHOUT.values()) - {law.name for law in LAWS} - {"power"})
    rows = [f"  {name:<19} {FORMS[name].formula}" for name in ("power", *(law.name for law in LAWS))]
    less = textwrap.fill(
        f"without asymptote or floor: {', '.join(bare)}", 100, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join(["laws:", *rows, less, "", EXAMPLES])


def parser() -> argparse.ArgumentParser:
    made = table.parser(
        "analysis.fit", "Which law do these points follow, and how well is it known?", _epilog(), "a run"
    )
    made.add_argument(
        "--law", default="saturating", choices=tuple(FORMS), metavar="LAW", help="of those below (default: saturating)"
    )
    made.add_argument(
        "--x",
        action="append",
        required=True,
        metavar="INPUT=COL",
        help="a column per input of the law, such as N=params",
    )
    made.add_argument("--y", required=True, metavar="COL", help="the metric; positive, lower is better")
    made.add_argument(
        "--group", type=table.listed, metavar="COL[,COL]", help="rows that are not independent: checkpoints of one run"
    )
    made.add_argument("--loss", default="squares", choices=get_args(Loss), help="what is summed (default: squares)")
    made.add_argument("--delta", type=float, help="Huber's, in units of the residuals; part of the result")
    made.add_argument(
        "--residuals", default="log", choices=get_args(Residuals), help="ln y - ln law (default), or y - law"
    )
    known = made.add_mutually_exclusive_group()
    known.add_argument("--error", metavar="COL", help="known standard error of each y: weights 1/error^2")
    known.add_argument("--weight", metavar="COL", help="relative weight of each row")
    made.add_argument(
        "--interval", choices=get_args(Method), help="default: linearised, of groups where given; rows: one by one"
    )
    made.add_argument("--bootstrap", type=int, metavar="N", help=f"refits, of groups or else rows (default: {DRAWS})")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    made.add_argument(
        "--predict",
        action="append",
        default=[],
        metavar="INPUT=V,...",
        help="what the law says there, such as N=1e9,D=2e10",
    )
    made.add_argument(
        "--protocol", type=table.listed, metavar="COL[,COL]", help="must not differ within a fit; none: pool them"
    )
    made.add_argument("--id", type=table.listed, metavar="COL[,COL]", help="must not repeat: the run, its checkpoint")
    made.add_argument("--figure", type=table.writable, metavar="OUT", help="points, law and bands as PNG, SVG or PDF")
    return made


def pairs(law: Form, given: Sequence[str]) -> dict[str, str]:
    """The column of each input of a law from ``INPUT=COL``; a law of one input takes ``COL`` alone."""
    found: dict[str, str] = {}
    for text in given:
        name, mark, column = text.partition("=")
        if not mark and len(law.inputs) == 1:
            name, column = law.inputs[0], text
        if name.strip() not in law.inputs or not column.strip() or name.strip() in found:
            inputs = " ".join(f"--x {each}=COL" for each in law.inputs)
            raise TableError(f"--x: got {text!r}; {law.name} ({law.formula}) takes {inputs}")
        found[name.strip()] = column.strip()
    if missing := [name for name in law.inputs if name not in found]:
        raise TableError(f"--x: {law.name} ({law.formula}) needs {', '.join(missing)} too")
    return {name: found[name] for name in law.inputs}


def places(law: Form, given: Sequence[str]) -> Array:
    """Where to predict, [m, d], from ``INPUT=V,INPUT=V``."""
    made = []
    for text in given:
        named = [part.partition("=")[::2] for part in re.split(r",\s*", text.strip())]
        parts = dict(named)
        try:
            row = [float(parts[name]) for name in law.inputs]
            wrong = len(named) != len(row) or not all(0 < value < math.inf for value in row)
        except (KeyError, ValueError):
            wrong = True
        if wrong:
            like = ",".join(f"{name}=1e9" for name in law.inputs)
            raise TableError(f"--predict: got {text!r}; write a positive number per input, {like}")
        made.append(row)
    return np.array(made).reshape(-1, len(law.inputs))


def answer(given: argparse.Namespace) -> Answer:
    """Raises ``TableError`` for what cannot be read, ``Refusal`` for what cannot be answered."""
    law = FORMS[given.law]
    at, columns = places(law, given.predict), pairs(law, given.x)
    if (given.loss == "huber") != (given.delta is not None):
        raise TableError(f"--delta: got {given.delta}; --loss huber needs one, {given.loss} has none")
    if given.delta is not None and not 0 < given.delta < math.inf:
        raise TableError(f"--delta: got {given.delta}; a positive number")
    if given.bootstrap is not None and given.bootstrap < FEWEST:
        raise TableError(f"--bootstrap: got {given.bootstrap}; {FEWEST} refits at least, a thousand as a rule")
    if given.bootstrap is not None and given.interval in ("delta", "profile"):
        raise TableError(f"--bootstrap: got {given.bootstrap}; --interval {given.interval} draws nothing")
    whole = table.derive(table.read(given.file), given.derive)
    frame = table.where(whole, given.where)
    y = table.numbers(frame, given.y, "--y")
    x = np.stack([table.numbers(frame, column, "--x") for column in columns.values()], axis=-1)
    groups = table.labels(frame, given.group, "--group") if given.group else None
    taken = [given.y, *columns.values(), *(given.group or []), *(given.id or [])]
    table.alike(frame, given.protocol or [], taken)
    _complete(frame, [given.y, *columns.values()])
    if not given.id:
        table.distinct(frame, [given.y, *columns.values(), *(given.group or [])])
    chosen = "; ".join([f"{len(frame)} of {len(whole)} rows of {given.file}", *(f"where {sql}" for sql in given.where)])
    interval: Method | None = given.interval
    if given.bootstrap is not None and interval is None:
        interval = "rows" if groups is None else "groups"
    options: dict[str, Any] = {
        "groups": groups,
        "weights": _weights(frame, given, y),
        "residuals": given.residuals,
        "loss": given.loss,
        "delta": given.delta,
        "ids": table.labels(frame, given.id, "--id") if given.id else None,
        "inputs": tuple(columns.values()),
        "output": given.y,
        "selection": chosen,
        "conventions": dict(_split(text) for text in given.derive),
    }
    found = fit(x, y, given.law, interval=interval, draws=given.bootstrap or DRAWS, seed=given.seed, **options)
    without: Fit | Refusal | None = None
    if given.law in WITHOUT:
        try:
            without = fit(x, y, WITHOUT[given.law], interval="delta", **options)
        except Refusal as refusal:
            without = refusal
    return Answer(found, without, at, _predictions(found, at))


def _complete(frame: pl.DataFrame, names: Sequence[str]) -> None:
    """Raises ``Refusal`` (not_finite) for rows without a value, and says how to leave them out."""
    for name in names:
        if count := frame[name].null_count():
            first = frame.with_row_index("row").filter(pl.col(name).is_null())["row"][0] + 1
            told = name if re.fullmatch(r"[a-z_][a-z0-9_]*", name) else f'"{name}"'
            raise Refusal(
                "not_finite",
                f"{count} of {len(frame)} rows have no {name} (the first is row {first}); "
                f"--where '{told} IS NOT NULL' leaves them out",
            )


def _split(text: str) -> tuple[str, str]:
    name, _, expression = text.partition("=")
    return name.strip(), expression.strip()


def _weights(frame: pl.DataFrame, given: argparse.Namespace, y: Array) -> Array | None:
    if given.weight:
        return table.numbers(frame, given.weight, "--weight")
    if not given.error:
        return None
    error = table.numbers(frame, given.error, "--error")
    if not (error > 0).all():
        raise Refusal("non_positive", f"a standard error ({given.error}) is missing, zero or negative")
    return np.asarray((error / y if given.residuals == "log" else error) ** -2.0)


def _predictions(found: Fit, at: Array) -> list[dict[str, Any]]:
    """What the law says at each place: mean, intervals, and how far outside the points it lies, in decades."""
    if not len(at):
        return []
    held = found.get_prediction(at)
    frame, points = held.summary_frame(), np.asarray(found.x)
    low, high = points.min(0), points.max(0)
    outside = np.log10(np.maximum(np.maximum(low / at, at / high), 1.0))
    names = FORMS[found.form].inputs
    rows = []
    for i, row in enumerate(frame.to_dict("records")):
        ends = {str(key): value if math.isfinite(value) else None for key, value in row.items()}
        far = {name: float(value) for name, value in zip(names, outside[i], strict=True)}
        rows.append(
            {
                "at": dict(zip(names, at[i].tolist(), strict=True)),
                **ends,
                "level": LEVEL,
                "identified": held.identified[i],
                "outside_decades": far,
                "kind": "extrapolation" if max(far.values()) > 0 else "interpolation",
                "reason": found.reason or ("a profile is of parameters alone" if found.interval == "profile" else None),
                "obs_reason": None if found.sigma is not None else "this loss says nothing about a new observation",
            }
        )
    return rows


def text(held: Answer) -> str:
    """The answer for people: the law, how it compares without asymptote, what it says where asked."""
    found = held.fit
    lines = [found.summary()]
    drawn = found.drawn
    if drawn is not None:
        errors = zip(found.params, drawn.error, drawn.noise, strict=True)
        told = ", ".join(f"{name} {error:.5g} (+-{share:.1%})" for name, error, share in errors)
        lines.append(f"  standard errors (and their Monte-Carlo errors): {told}")
    if isinstance(held.without, Refusal):
        lines.append(f"without {_more(found)}: refused, {held.without.sentence}")
    elif held.without is not None:
        lines.append(_compared(found, held.without))
    for row in held.predictions:
        where = ", ".join(f"{name} = {value:.6g}" for name, value in row["at"].items())
        ends = (
            "no interval"
            if row["mean_ci_lower"] is None
            else f"[{row['mean_ci_lower']:.6g}, {row['mean_ci_upper']:.6g}]"
        )
        far = ", ".join(f"{d:.2g} decades beyond {n}" for n, d in row["outside_decades"].items() if d > 0)
        sure = "" if row["identified"] else "; not identified"
        lines.append(f"at {where}: {row['mean']:.6g} {ends} ({far or 'within the points'}{sure})")
    return "\n".join(lines)


def _more(found: Fit) -> str:
    law, less = FORMS[found.form], FORMS[WITHOUT[found.form]]
    return ", ".join(name for name in law.parameters if name not in less.parameters)


def _compared(found: Fit, less: Fit) -> str:
    told = f"without {_more(found)} ({less.formula})"
    if found.aicc is None or less.aicc is None:
        return f"{told}: objective {less.objective:.10g}; no AICc at this n or loss"
    gap = less.aicc - found.aicc
    better = (
        "the points do not ask for more" if gap <= 0 else "the points ask for the fuller form" if gap > 2 else "a tie"
    )
    return f"{told}: AICc {gap:+.2f}, {better}"


def record(given: argparse.Namespace, held: Answer | None, refusal: Refusal | None = None) -> dict[str, Any]:
    """The answer for programs; a refusal has the same keys, null, and ``refused``."""
    keys = (
        "params",
        "bse",
        "conf_int",
        "interval_method",
        "objective",
        "n",
        "n_groups",
        "dof",
        "at_bound",
        "selection",
    )
    told = None if refusal is None else refusal.told
    asked = ("file", "law", "where", "derive", "group", "id", "protocol", "error", "weight")
    head = {name: getattr(given, name) for name in asked} | {"refused": told}
    if held is None:
        return head | dict.fromkeys(keys) | {"without": None, "predictions": []}
    less = held.without
    beside: dict[str, Any] | None = None
    if isinstance(less, Refusal):
        beside = {"form": WITHOUT[given.law], "refused": less.told}
    elif less is not None:
        beside = {key: getattr(less, key) for key in ("form", "formula", "params", "objective", "aicc")}
        beside |= {"refused": None}
    return head | held.fit.to_dict() | {"without": beside, "predictions": held.predictions}
