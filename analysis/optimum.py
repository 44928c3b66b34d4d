"""Where is a fitted surface best? Compute-optimal size and data N*(C), D*(C), best rate R*, with intervals.

    python -m analysis.optimum FILE --law chinchilla --x N=params --x D=tokens --y loss --at C=1e21

What is not given is chosen; with C given, C = k N D (k = 6 unless said) fixes D by N (``analysis.lowest``). The search
is repeated in draws of the parameters: refits of a bootstrap where the fit has one (``--bootstrap``), otherwise
multivariate normal by the fit's covariance. An interval is the estimate +- Student-t, with the degrees of freedom of
that quantity, times the standard error that the middle 95 % of the draws say: percentiles themselves lean the wrong way
where the law is curved (92-94 % covered in simulations in which these cover 93-96 %).

A rate is refused with fewer than five rates in the fit, and where the optimum lies at or beyond the lowest or highest
one: a law is not trusted there. An end of its interval that does is left open, and ``edge_share`` says how many draws
do. N and D may be extrapolated; ``beyond`` names what lies outside the points.

``rates`` finds R* among curves that were measured separately, without a law over the rate (``analysis.valley``).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from analysis import question as asked
from analysis import table
from analysis.arms import Arm, Envelope, candidates, identity, words
from analysis.covariance import Covariance
from analysis.interval import LEVEL, Interval, short
from analysis.isoflop import PER_TOKEN
from analysis.laws import Array
from analysis.lowest import SURFACES, Question, check, question
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.resampling import steps_of
from analysis.result import Fit
from analysis.table import TableError
from analysis.valley import FLAGS, LEAST, Valley, exponential, methods, told, valley

DRAWS = 4000
STEP = 1e-3  # of ln C, for exponents; of a scaled parameter, for degrees of freedom
TIE = 1e-9  # of a logarithm: at an edge
DIGITS = 9  # of an exponent by differences

EXAMPLES = """examples:
  compute-optimal size and data at two budgets by Chinchilla's form, Huber's loss and 4,000 refits:
    python -m analysis.optimum runs.csv --law chinchilla --x N=params --x D=tokens --y loss --loss huber --delta 1e-3 \\
      --bootstrap 4000 --at C=1e21 --at C=1e24
  the best rate at a budget, tokenizer seeds taken together:
    python -m analysis.optimum points.parquet --law tradeoff --x R=bits --x C=flops --y gfid --group tokenizer_seed \\
      --at C=1e18
  the best rate and size at a budget, and the best size at a rate of 96 bits:
    python -m analysis.optimum points.parquet --law tradeoff_nd --x R=bits --x N=params --x D=tokens --y gfid \\
      --group run --at C=1e18 --at R=96,C=1e18

exit code: 0 where an optimum could be given, 2 for a wrong option or file, 3 where every one was refused"""


@dataclass(frozen=True)
class Optimum:
    """The lowest metric ``value`` of a law where ``given`` is fixed, and what was chosen for it.

    ``exponents``: d ln best / d ln C (a_opt for N), empty where C is not given. ``edge_share``: of draws whose best
    rate is not between the rates of the fit; None: no rate was chosen, or nothing drawn.
    """

    form: str
    given: dict[str, float]
    per_token: float
    best: dict[str, Interval]
    value: Interval
    exponents: dict[str, Interval]
    edge_share: float | None
    beyond: tuple[str, ...]


class _Drawn(NamedTuple):
    """Parameters [B, p], or why there are none, and how they were made; ``covariance`` where they are normal draws."""

    theta: Array | None
    method: str
    dof: float
    covariance: Covariance | None = None
    centre: Array | None = None  # [p]
    reason: str | None = None

    def freedom(self, of: Callable[[Array], dict[str, Array]]) -> dict[str, float]:
        """Degrees of freedom of each quantity of the parameters: of few groups they differ."""
        if self.covariance is None or self.centre is None:
            return {}
        steps = STEP * np.eye(len(self.centre))
        found = {}
        for name, moved in of(np.concatenate([steps, -steps]) + self.centre).items():
            with np.errstate(invalid="ignore"):  # a rate that is nowhere best
                gradient = moved[: len(steps)] - moved[len(steps) :]
                dof = float(self.covariance.dof(gradient[None, None])[0, 0])
            if math.isfinite(dof) and dof > 0:
                found[name] = dof
        return found


def optimum(
    found: Fit,
    given: Mapping[str, float],
    *,
    per_token: float = PER_TOKEN,
    replicates: Array | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Optimum:
    """The best values of those inputs of a law (N, D, M, R, T, k) that are not ``given``.

    ``given``: C (and N, for the best rate of one size), or N and D (or M); of several rates all but one.
    ``replicates``: parameters [B, p] of refits, in the scaled units of ``found.theta``, instead of the fit's own.
    Raises ``TableError`` for a law or values that make no question, ``Refusal``: too_few (rates), no_interior_minimum.
    """
    problem = question(found, given, per_token)
    theta, rate = np.asarray(found.theta)[None], problem.rate
    edges = None if rate is None else _edges(found, rate)
    drawn = _drawn(found, draws, seed)
    if replicates is not None:
        drawn = _Drawn(np.asarray(replicates, np.float64), f"{len(replicates)} refits given, Student-t", found.dof)
    dofs = drawn.freedom(problem.best)
    at = problem.best(theta, edges)
    others = None if drawn.theta is None else problem.best(drawn.theta, edges)
    share = None
    if rate is not None and edges is not None:
        place = float(problem.log_rate(theta)[0])
        if others is not None and drawn.theta is not None:
            others[rate] = problem.log_rate(drawn.theta)
            wide = np.random.default_rng(seed).standard_t(max(dofs.get(rate, drawn.dof), 1.0), len(drawn.theta))
            share = _share(place, others[rate], wide, edges)
        _refuse_edge(rate, place, edges, given, share)
    every = {
        name: _interval(float(each[0]), None if others is None else others[name], drawn, dofs.get(name, drawn.dof))
        for name, each in at.items()
    }
    value = every.pop("y")
    best = {name: exponential(each) for name, each in every.items()}
    if rate is not None and edges is not None:
        best[rate] = _open(best[rate], rate, edges)
    return Optimum(
        form=found.form,
        given={name: float(each) for name, each in given.items()},
        per_token=per_token,
        best=best,
        value=value if value.low is None else replace(value, low=max(value.low, 0.0)),
        exponents=_exponents(problem, theta, drawn) if "C" in given else {},
        edge_share=share,
        beyond=_beyond(found, dict(given) | {name: math.exp(float(at[name][0])) for name in best}, per_token),
    )


def _edges(found: Fit, rate: str) -> tuple[float, float]:
    """ln of the lowest and highest rate in a fit. Raises ``Refusal`` (too_few)."""
    logs = np.log(np.asarray(found.x)[:, found.estimate.law.inputs.index(rate)])
    count = len(np.unique(steps_of(logs)))
    if count < LEAST:
        raise Refusal("too_few", f"{count} values of {rate} in the fit; the best one needs {LEAST}")
    return float(logs.min()), float(logs.max())


def _drawn(found: Fit, draws: int, seed: int) -> _Drawn:
    """The fit's own refits, or draws by its covariance; an asymptote may be negative in these, as in its intervals."""
    if found.reason:
        return _Drawn(None, found.interval_method, found.dof, reason=found.reason)
    if found.drawn is not None:
        held = found.drawn.theta
        return _Drawn(held[np.isfinite(held).all(1)], f"{found.drawn.method}, Student-t", found.dof)
    covariance, centre, law = found.estimate.covariance, np.asarray(found.centre), found.estimate.law
    assert covariance is not None
    rng = np.random.default_rng(seed)
    # singular where groups are fewer than parameters
    theta = rng.multivariate_normal(centre, covariance.matrix[0], draws, check_valid="ignore", method="eigh")
    lower = np.where([name == law.asymptote for name in law.parameters], -np.inf, law.lower)
    method = f"{draws} multivariate normal draws, Student-t; {found.interval_method}"
    return _Drawn(np.clip(theta, lower, law.upper), method, found.dof, covariance, centre)


def _interval(estimate: float, replicates: Array | None, drawn: _Drawn, dof: float) -> Interval:
    """Of a quantity from its value in every draw [B]."""
    found = Interval(estimate, None, None, LEVEL, drawn.method, dof, drawn.reason)
    if replicates is None:
        return found
    tails = [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]
    low, high = (float(end) for end in np.quantile(replicates, tails, method="inverted_cdf"))
    if not math.isfinite(high - low):
        return replace(found, reason="too many draws have no optimum")
    if high - low <= TIE * max(abs(estimate), 1.0):
        return replace(found, reason="the form of the law fixes it")
    half = (high - low) / 2 * float(stats.t.ppf(tails[1], dof) / stats.norm.ppf(tails[1]))
    return replace(found, low=estimate - half, high=estimate + half)


def _share(place: float, places: Array, wide: Array, edges: tuple[float, float]) -> float:
    """Of Student-t draws [B] of ln rate those at or beyond the edges; ``places`` [B] are normal draws."""
    ends = np.quantile(places, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], method="inverted_cdf")
    if not np.isfinite(ends).all():
        return 1 - float(((places > edges[0]) & (places < edges[1])).mean())
    drawn = place + wide * float(ends[1] - ends[0]) / 2 / float(stats.norm.ppf(0.5 + LEVEL / 2))
    return 1 - float(((drawn > edges[0]) & (drawn < edges[1])).mean())


def _open(found: Interval, rate: str, edges: tuple[float, float]) -> Interval:
    """The interval of a rate, without an end that is not between the rates of the fit."""
    low = found.low if found.low is not None and math.log(found.low) > edges[0] + TIE else None
    high = found.high if found.high is not None and math.log(found.high) < edges[1] - TIE else None
    if (low, high) == (found.low, found.high):
        return found
    sides = [side for side, end in (("lowest", low), ("highest", high)) if end is None]
    return replace(found, low=low, high=high, reason=f"it reaches the {' and the '.join(sides)} {rate} of the fit")


def _refuse_edge(
    rate: str, place: float, edges: tuple[float, float], given: Mapping[str, float], share: float | None
) -> None:
    """Raises ``Refusal`` (no_interior_minimum) for a best rate that is not between the rates of the fit."""
    if edges[0] < place < edges[1]:
        return
    side, end = ("below", edges[0]) if place <= edges[0] else ("above", edges[1])
    where = ", ".join(f"{name} = {short(value)}" for name, value in given.items())
    draws = "" if share is None else f"; so it does in {share:.0%} of draws"
    what = "lowest" if side == "below" else "highest"
    sentence = f"at an edge: the best {rate} at {where} lies at or {side} the {what} of the fit, {short(math.exp(end))}"
    raise Refusal("no_interior_minimum", sentence + draws)


def _exponents(problem: Question, theta: Array, drawn: _Drawn) -> dict[str, Interval]:
    """d ln best / d ln C, exact where the best values are powers of C."""
    budget = problem.given["C"]
    below, above = (replace(problem, given={**problem.given, "C": budget * math.exp(shift)}) for shift in (-STEP, STEP))

    def slopes(at: Array) -> dict[str, Array]:
        low, high = below.best(at), above.best(at)
        with np.errstate(invalid="ignore"):  # infinite in both
            return {name: (high[name] - low[name]) / (2 * STEP) for name in low if name != "y"}

    dofs, others = drawn.freedom(slopes), None if drawn.theta is None else slopes(drawn.theta)
    return {
        name: _interval(
            round(float(each[0]), DIGITS), None if others is None else others[name], drawn, dofs.get(name, drawn.dof)
        )
        for name, each in slopes(theta).items()
    }


def _beyond(found: Fit, placed: Mapping[str, float], per_token: float) -> tuple[str, ...]:
    """Which of what was given or chosen lies outside the points of the fit."""
    columns = dict(zip(found.estimate.law.inputs, np.asarray(found.x).T, strict=True))
    if "M" in columns:
        columns["D"] = columns["N"] * columns["M"]
    if "D" in columns:
        columns["C"] = per_token * columns["N"] * columns["D"]
    return tuple(
        name
        for name, value in placed.items()
        if not columns[name].min() * (1 - TIE) <= value <= columns[name].max() * (1 + TIE)
    )


def rates(arms: Sequence[Arm]) -> dict[float, Valley | Refusal]:
    """R* at each budget among rates that were measured separately: a parabola of ln metric in ln bits.

    Every arm (``analysis.arms``) is a rate, its value at a budget that of the best size of each tokenizer seed, over
    budgets, sizes and seeds that all arms have. Tokenizer seeds are the groups: the jackknife repeats the search over
    sizes. Raises ``Refusal``: too_few (rates with bits, or nothing shared).
    """
    known = [(each.bits, each) for each in arms if each.bits is not None]
    count = len({bits for bits, _ in known})
    if count < LEAST:
        raise Refusal("too_few", f"{count} rates; the best one needs {LEAST}")
    cut = candidates([each for _, each in known])
    if not cut:
        raise Refusal("too_few", "the rates share no tokenizer seed, generator size and budget")
    values = np.stack([Envelope(each, identity(each)).y[0] for each in cut])  # [rates, seeds, budgets]
    bits, seeds = np.repeat([bits for bits, _ in known], len(cut[0].seeds)), list(cut[0].seeds) * len(cut)
    found: dict[float, Valley | Refusal] = {}
    for budget, level in zip(cut[0].budgets, np.moveaxis(values, -1, 0), strict=True):
        if np.isfinite(level).all():
            where = f"at budget {short(budget)}"
            try:
                metric = np.exp(level).ravel()
                found[budget] = valley(bits, metric, groups=seeds, residuals="log", where=where, what="rates")
            except Refusal as refusal:
                found[budget] = refusal
    if not found:
        raise Refusal("too_few", "the rates share no budget at which all of them were measured")
    return found


def sentences(found: Mapping[float, Valley | Refusal], arms: Sequence[Arm]) -> list[str]:
    """The answers of ``rates`` in words."""
    made, known = [], []
    for budget, each in found.items():
        if isinstance(each, Refusal):
            made.append(f"R*: refused ({each.code}), {each.sentence}")
            continue
        known.append(each.best)
        what = (
            f"R* at {short(budget)} {arms[0].axis}: {told(each.best)} bits, {words(arms[0].metric)} {told(each.value)}"
        )
        made.append("; ".join([what, *(FLAGS[flag] for flag in each.flags if flag != "flat")]))
    return made + methods(known)


def text(found: Optimum) -> str:
    """What was chosen, in lines."""
    where = ", ".join(f"{name} = {short(value)}" for name, value in found.given.items())
    lines = [f"best at {where}: metric {told(found.value)}"]
    for name, each in found.best.items():
        one = each.low if each.high is None else each.high if each.low is None else None
        side = "" if one is None else f" [{'above' if each.high is None else 'below'} {short(one)}]"
        power = f", as C^{told(found.exponents[name])}" if name in found.exponents else ""
        lines.append(f"  {name}* = {told(each)}{side}{power}")
    lines += [f"  {line}" for line in methods([found.value, *found.best.values()])]
    if found.edge_share is not None:
        share = "under 1%" if 0 < found.edge_share < 0.005 else f"{found.edge_share:.0%}"
        lines.append(f"  in {share} of draws the best rate is at an edge of the fit")
    if found.beyond:
        lines.append(f"  extrapolated: {', '.join(found.beyond)} outside the points")
    return "\n".join(lines)


def _given(text: str) -> dict[str, float]:
    """``"C=1e21,R=96"``. Raises ``TableError``."""
    parts = [part.partition("=") for part in text.split(",")]
    try:
        found = {name.strip(): float(value) for name, _, value in parts}
    except ValueError:
        raise TableError(f'--at: got {text!r}; write "NAME=VALUE[,NAME=VALUE]", for example C=1e21,R=96') from None
    if len(found) < len(parts):
        raise TableError(f"--at: got {text!r}; every name once")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = table.Command(
        prog="python -m analysis.optimum",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[asked.parser()],
        conflict_handler="resolve",  # a surface has to be named, and its figure is that of analysis.fit
    )
    parser.add_argument("--law", required=True, choices=SURFACES, metavar="LAW", help=f"one of {', '.join(SURFACES)}")
    parser.add_argument("--figure", help=argparse.SUPPRESS)
    parser.add_argument("--at", action="append", required=True, metavar="NAME=V[,...]", help="what is given, as C=1e21")
    parser.add_argument("--per-token", type=float, default=PER_TOKEN, metavar="K", help="k of C = k N D (default: 6)")
    given = parser.parse_args(argv)
    held: asked.Answer | None = None
    refused: Refusal | None = None
    rows: list[dict[str, Any]] = []
    try:
        if given.figure:
            raise TableError(f"--figure: got {given.figure!r}; python -m analysis.fit draws the law")
        places = [_given(each) for each in given.at]
        for place in places:
            with contextlib.suppress(Refusal):  # of one place: said beside the answers of others
                check(given.law, place, given.per_token)
        held = asked.answer(given)
        print(asked.text(held))
        for place in places:
            try:
                found = optimum(held.fit, place, per_token=given.per_token)
                print(text(found))
                rows.append({**asdict(found), "refused": None})
            except Refusal as refusal:
                print(refusal, file=sys.stderr)
                rows.append({"given": place, "refused": refusal.told})
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        refused = refusal
    answered = any(row["refused"] is None for row in rows)
    if given.json:
        said = asked.record(given, held, refused) | {"optima": rows}
        if rows and not answered:
            said["refused"] = rows[0]["refused"]
        table.write_json(given.json, said)
    return 0 if answered else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
