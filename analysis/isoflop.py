"""Which size is best at one budget, and how does it move with the budget? N*(C) and D*(C) by parabolas in ln N.

    python -m analysis.isoflop FILE --size N --budget C --y loss [--data D] [--group COL] [--json OUT]

Approach 2 of Hoffmann et al. (arXiv 2203.15556). Runs of one budget, which the table names (budgets are never made by
rounding: that merges 1.5e19 and 2.4e19), give a parabola in ln N; its vertex is N*, with the interval and the checks of
``analysis.valley``. Refused: fewer than five sizes, a lowest value at either end of the sizes, a curve that opens
downwards. Flagged: an optimum off the centre and sizes over a wide range, where a parabola is biased even without noise
(arXiv 2603.22339: D* of the Chinchilla surface is 1.3 % low with sizes within a factor of 4 of N*, 5.1 % within 16). A
fitted surface (``analysis.optimum``) is the cross-check.

N*(C) and D*(C) are lines in logarithms through the budgets, four at least, Student-t over budgets. Budgets whose
curvature cannot be told from zero are left out of them. Where groups span budgets, budgets are not independent: the way
from points to line is then repeated without each group.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis import table
from analysis.interval import Interval, short, student
from analysis.laws import Array
from analysis.refusal import CODES, EXIT_REFUSED, Refusal
from analysis.table import TableError
from analysis.valley import FLAGS, LEAST, Residuals, Valley, exponential, methods, told, valley, vertex

LEAST_BUDGETS = 4  # for a law over budgets
MISSED = 0.01  # share by which a run's compute may miss its budget
PER_TOKEN = 6.0  # training FLOPs per parameter and token: C = 6 N D
NAMED = 5  # refused budgets that a text names, others are counted
WHY = CODES | {"too_few": f"fewer than {LEAST} sizes"}

EXAMPLES = """examples:
  loss of runs planned at five budgets; tokens are taken to be C / (6 N):
    python -m analysis.isoflop runs.csv --size params --budget target_flops --y loss --figure isoflop.png
  tokens and compute as they came out, three seeds each, and the sizes to expect at two larger budgets:
    python -m analysis.isoflop runs.parquet --size params_core --budget flops_target --y nll_bits --data tokens_seen \\
      --spent flops_to_point --group generator_seed --at 1e21,1e22
  gFID, whose error is relative, of one tokenizer:
    python -m analysis.isoflop points.csv --size params --budget flops --y gfid --residuals log --where "tokens = 256"

exit code: 0 where a budget has an optimum, 2 for a wrong option or file, 3 where every budget was refused"""


@dataclass(frozen=True)
class Budget:
    """One budget C: the parabola over sizes, whose ``best`` is N*, and D* by the same vertex.

    ``missed``: the largest share by which a run's compute missed the budget; None: not known.
    """

    budget: float
    sizes: Valley
    data: Interval
    missed: float | None

    def notes(self) -> list[str]:
        """What to bear in mind, in words; of a flat curve its interval says so."""
        off = self.missed is not None and self.missed > MISSED
        found = [FLAGS[flag] for flag in self.sizes.flags if flag != "flat"]
        return found + ([f"a run's compute misses the budget by {self.missed:.2g} of it"] if off else [])


@dataclass(frozen=True)
class Trend:
    """best = level (C / pivot)^exponent over budgets; ``scatter``: root mean square of ln best about it."""

    quantity: str
    exponent: Interval
    pivot: float  # geometric mean of the budgets
    level: Interval
    budgets: tuple[float, ...]
    scatter: float
    covariance: tuple[tuple[float, float], tuple[float, float]] | None  # of exponent and ln level

    def at(self, budget: float) -> Interval:
        """N* or D* to be expected at a budget: of the line, not of a new vertex."""
        off = math.log(budget / self.pivot)
        assert self.level.estimate is not None
        assert self.exponent.estimate is not None
        place = math.log(self.level.estimate) + self.exponent.estimate * off
        if self.covariance is None:
            return replace(self.level, estimate=math.exp(place))
        (a, b), (_, c) = self.covariance
        error = math.sqrt(max(a * off * off + 2 * b * off + c, 0.0))
        return exponential(student(place, error, self.exponent.dof or 0, self.exponent.method))

    def extrapolated(self, budget: float) -> bool:
        return not min(self.budgets) <= budget <= max(self.budgets)


@dataclass(frozen=True)
class Isoflop:
    """Every budget's optimum or why it has none, and the laws over budgets or why there are none."""

    budgets: tuple[Budget, ...]
    refused: Mapping[float, Refusal]
    size: Trend | Refusal
    data: Trend | Refusal

    @property
    def refusal(self) -> Refusal | None:
        """Why there is nothing at all, in one sentence; None where a budget has an optimum."""
        if self.budgets:
            return None
        if len(self.refused) == 1:
            return next(iter(self.refused.values()))
        codes = Counter(why.code for why in self.refused.values())
        if set(codes) == {"too_few"}:
            sentence = f"{len(self.refused)} budgets, none with {LEAST} sizes"
            return Refusal("too_few", f"{sentence}; --budget must be the planned budget, the same for all its runs")
        return Refusal(
            codes.most_common(1)[0][0], f"none of {len(self.refused)} budgets has an optimum: {self.counted}"
        )

    @property
    def counted(self) -> str:
        """Refused budgets by reason."""
        codes = Counter(why.code for why in self.refused.values())
        return "; ".join(f"{count} x {WHY[code]} ({code})" for code, count in codes.most_common())


def trend(quantity: str, budgets: Sequence[float], best: Sequence[float], without: Array | None = None) -> Trend:
    """The power law through ``best`` [b] over ``budgets`` [b].

    ``without`` [G, b]: ln best with one group left out each, where groups span budgets. Raises ``Refusal`` (too_few).
    """
    if len(budgets) < LEAST_BUDGETS:
        found = f"{len(budgets)} budget{'s' * (len(budgets) != 1)} with an optimum"
        raise Refusal("too_few", f"{quantity}(C): {found}; {LEAST_BUDGETS} are needed")
    log, place = np.log(budgets), np.log(best)
    pivot = float(log.mean())
    (exponent, level), scaled = np.polyfit(log - pivot, place, 1, cov=True)
    scatter = float(np.sqrt(np.mean((place - level - exponent * (log - pivot)) ** 2)))
    covariance: Array | None = scaled
    dof, method, reason = len(log) - 2, "Student-t over budgets", None
    if without is not None:
        dof, method = len(without) - 1, f"delete-one-group jackknife over {len(without)} groups, Student-t"
        covariance = None
        if dof == 0:
            reason = "one group says nothing about another"
        elif not np.isfinite(without).all():
            reason = "without one of the groups a budget has no optimum"
        else:
            lines = np.polyfit(log - pivot, without.T, 1)
            centred = lines - lines.mean(1, keepdims=True)
            covariance = dof / len(without) * centred @ centred.T
    errors = [None, None] if covariance is None else [math.sqrt(max(covariance[i, i], 0.0)) for i in (0, 1)]
    slope, height = (student(float(v), e, dof, method) for v, e in zip((exponent, level), errors, strict=True))
    if reason:
        slope, height = replace(slope, reason=reason), replace(height, reason=reason)
    held = None
    if covariance is not None:
        held = ((float(covariance[0, 0]), float(covariance[0, 1])), (float(covariance[1, 0]), float(covariance[1, 1])))
    return Trend(
        quantity=quantity,
        exponent=slope,
        pivot=math.exp(pivot),
        level=exponential(height),
        budgets=tuple(float(budget) for budget in budgets),
        scatter=scatter,
        covariance=held,
    )


def isoflop(
    size: ArrayLike,
    budget: ArrayLike,
    y: ArrayLike,
    *,
    data: ArrayLike | None = None,
    spent: ArrayLike | None = None,
    groups: Sequence[Any] | None = None,
    residuals: Residuals = "raw",
    per_token: float = PER_TOKEN,
) -> Isoflop:
    """N*, D* and their laws from runs of sizes N [n] at budgets C [n].

    ``data`` [n]: tokens seen; D* is where the line of ln D over ln N at one budget has N*. Without it D* = C / (k N*),
    k = ``per_token``. ``spent`` [n]: compute as it came out, held against the budget. Raises ``Refusal`` for budgets
    that are missing or not positive; what is wrong with one budget, or with a law, is in the result.
    """
    sizes, planned, metric = (np.asarray(each, np.float64) for each in (size, budget, y))
    tokens, paid = (None if each is None else np.asarray(each, np.float64) for each in (data, spent))
    labels = None if groups is None else np.asarray([str(group) for group in groups])
    if not np.isfinite(planned).all():
        raise Refusal("not_finite", "a run has no budget; leave it out by name")
    if (planned <= 0).any():
        raise Refusal("non_positive", "a budget has to be positive")
    found: list[Budget] = []
    refused: dict[float, Refusal] = {}
    lines: dict[float, Array] = {}  # slope and height of ln D over ln N
    for each in (float(budget) for budget in np.unique(planned)):
        at, where = planned == each, f"at budget {short(each)}"
        own = None if labels is None else labels[at].tolist()
        try:
            made = valley(sizes[at], metric[at], groups=own, residuals=residuals, where=where)
            lines[each] = _tokens(sizes[at], None if tokens is None else tokens[at], each / per_token, where)
        except Refusal as refusal:
            refused[each] = refusal
            continue
        missed = None if paid is None else float(np.abs(paid[at] / each - 1).max())
        found.append(Budget(each, made, _along(lines[each], made.best), missed))
    firm = [each for each in found if "flat" not in each.sizes.flags]
    kept = [each.budget for each in firm]
    without: Array | None = None
    if labels is not None and any(len(set(planned[labels == name])) > 1 for name in set(labels.tolist())):
        names = sorted(set(labels[np.isin(planned, kept)].tolist()))
        held = [[(planned == budget) & (labels != name) for budget in kept] for name in names]
        level = np.log if residuals == "log" else np.asarray
        rows = [[vertex(np.log(sizes[at]), level(metric[at])) for at in row] for row in held]
        without = np.array(rows).reshape(len(names), len(kept))
    slope, height = np.array([lines[budget] for budget in kept]).reshape(-1, 2).T
    return Isoflop(
        budgets=tuple(found),
        refused=refused,
        size=_law("N*", kept, [each.sizes.best for each in firm], without),
        data=_law("D*", kept, [each.data for each in firm], None if without is None else slope * without + height),
    )


def _law(quantity: str, budgets: Sequence[float], best: Sequence[Interval], without: Array | None) -> Trend | Refusal:
    try:
        return trend(quantity, budgets, [each.estimate for each in best if each.estimate is not None], without)
    except Refusal as refusal:
        return refusal


def _tokens(size: Array, data: Array | None, iso: float, where: str) -> Array:
    """Slope and height of ln D over ln N at one budget, D = ``iso`` / N where it is not known. Raises ``Refusal``."""
    if data is None:
        return np.array([-1.0, math.log(iso)])
    if not np.isfinite(data).all():
        raise Refusal("not_finite", f"{where}: the tokens of a run are missing")
    if (data <= 0).any():
        raise Refusal("non_positive", f"{where}: a logarithm needs positive tokens")
    return np.polyfit(np.log(size), np.log(data), 1)


def _along(line: Array, best: Interval) -> Interval:
    """D* with the ends of N*: D falls as N rises."""
    estimate, *ends = (
        None if v is None else math.exp(line[0] * math.log(v) + line[1]) for v in (best.estimate, best.low, best.high)
    )
    low, high = reversed(ends) if line[0] < 0 else ends
    return replace(best, estimate=estimate, low=low, high=high)


def text(found: Isoflop, at: Sequence[float] = ()) -> str:
    """One line per budget, then the laws, and what they say of the budgets ``at``; of many refused the first few."""
    some = sorted(found.refused)[:NAMED]
    lines = {budget: f"refused ({(why := found.refused[budget]).code}): {why.sentence}" for budget in some}
    for each in found.budgets:
        sizes = each.sizes
        groups = "" if sizes.n_groups is None else f" in {sizes.n_groups} groups"
        best = f"N* = {told(sizes.best)}, D* = {told(each.data)}, value {told(sizes.value)}, n = {sizes.n}"
        lines[each.budget] = "; ".join([f"C = {short(each.budget)}: {best}{groups}", *each.notes()])
    said = [lines[budget] for budget in sorted(lines)]
    if not found.budgets:
        return "\n".join(said)
    if len(found.refused) > NAMED:
        total = len(found.refused) + len(found.budgets)
        said.append(f"refused {len(found.refused)} of {total} budgets: {found.counted}; the first {NAMED} are above")
    for law in (found.size, found.data):
        if isinstance(law, Refusal):
            said.append(f"refused ({law.code}): {law.sentence}")
            continue
        line = f"{law.quantity} = {told(law.level)} x (C / {short(law.pivot)})^{told(law.exponent)}"
        said.append(f"{line}; {len(law.budgets)} budgets, {law.exponent.method}")
        for budget in at:
            beyond = " (extrapolated)" if law.extrapolated(budget) else ""
            said.append(f"  {law.quantity} at {short(budget)}: {told(law.at(budget))}{beyond}")
    return "\n".join(said + methods([each.sizes.best for each in found.budgets]))


def contents(found: Isoflop, at: Sequence[float] = ()) -> dict[str, Any]:
    """What the JSON holds: a row per budget, the two laws."""
    rows: list[dict[str, Any]] = [{"budget": c, "refused": why.told} for c, why in found.refused.items()]
    rows += [{**asdict(each), "notes": each.notes(), "refused": None} for each in found.budgets]
    made: dict[str, Any] = {"budgets": sorted(rows, key=lambda row: row["budget"])}
    for name, law in (("size", found.size), ("data", found.data)):
        if isinstance(law, Refusal):
            made[name] = {"refused": law.told}
            continue
        foretold = [{"budget": c, "extrapolated": law.extrapolated(c), **asdict(law.at(c))} for c in at]
        made[name] = {**asdict(law), "at": foretold, "refused": None}
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = table.parser("analysis.isoflop", (__doc__ or "").splitlines()[0], EXAMPLES, "a run of one size and budget")
    parser.add_argument("--size", required=True, metavar="COL", help="parameters N")
    parser.add_argument("--budget", required=True, metavar="COL", help="planned compute C, the same for all its runs")
    parser.add_argument("--y", required=True, metavar="COL", help="metric, lower is better")
    parser.add_argument("--data", metavar="COL", help="tokens D (default: C / (k N))")
    parser.add_argument("--spent", metavar="COL", help="compute as it came out, held against the budget")
    parser.add_argument("--group", metavar="COL", help="what is independent: a seed, a run")
    parser.add_argument("--residuals", choices=("raw", "log"), default="raw", help="default: %(default)s")
    parser.add_argument("--per-token", default=PER_TOKEN, metavar="K", help="k of C = k N D (default: 6)")
    parser.add_argument("--protocol", type=table.listed, default=[], metavar="COL[,COL]", help="must not differ")
    parser.add_argument("--at", type=table.listed, default=[], metavar="C[,C]", help="budgets to say N* and D* for")
    parser.add_argument("--figure", type=table.writable, metavar="OUT", help="parabolas and N*(C) as PNG, SVG or PDF")
    given = parser.parse_args(argv)
    about = {name: getattr(given, name) for name in ("file", "where", "derive", "residuals")}
    try:
        at = [table.positive("--at", each) for each in given.at]
        per_token = table.positive("--per-token", given.per_token)
        frame = table.selected(given)
        table.alike(frame, given.protocol)
        columns = {
            name: table.numbers(frame, column, f"--{name}")
            for name in ("size", "budget", "y", "data", "spent")
            if (column := getattr(given, name)) is not None
        }
        groups = None if given.group is None else table.labels(frame, [given.group], "--group")
        found = isoflop(**columns, groups=groups, residuals=given.residuals, per_token=per_token)
        if given.figure and found.budgets:
            from analysis import parabola  # matplotlib is slow to import

            points = parabola.Points(*(columns[name] for name in ("size", "budget", "y")))
            parabola.write(found, points, given.figure, size=given.size, metric=given.y, residuals=given.residuals)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as refusal:
        return table.refuse(refusal, given.json, about)
    why = found.refusal
    if why is None or why.code != "too_few":
        print(text(found, at))
    if why is not None:
        print(why, file=sys.stderr)
    if given.json:
        told_why = None if why is None else why.told
        table.write_json(given.json, {**about, "per_token": per_token, **contents(found, at), "refused": told_why})
    return 0 if why is None else EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
