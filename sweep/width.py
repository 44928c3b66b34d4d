"""How wide will the intervals of this plan be? Expected from its design and stated assumptions, nothing being spent.

    python -m sweep.plan grid.yaml --assume exponent=0.5,noise=0.05

The points of one rate are taken to follow y = E + A C^-a (a power law where there are too few budgets), each tokenizer
seed shifted as a whole, each point scattered. The intervals are those that a report gives: of the pooled fit over
tokenizer seeds (Student-t, seeds - 1 degrees of freedom), not narrower than that of the seeds' mean curve (budgets -
parameters). Errors are those of the linearised least-squares fit (the delta method). An error is itself estimated, so
widths differ from study to study: what is given is their median.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sweep import arrow
from sweep.document import GridError, choose

LEVEL = 0.95
A_DECADE = 4  # computes per decade at which curves of a plan by steps are compared
CONTRASTS = 2  # tokenizer seeds that a contrast between rates needs
GIVEN = "budgets given one tokenizer"  # of one run per size, which says nothing about another
FAR = 700.0  # half a chi-squared with less than 1e-14 beyond it up to 1,000 degrees of freedom; e^FAR is a float still
PARAMETERS = {"saturating": 3, "power": 2}
SOURCE = "as gFID in results/reference/compression_digits"


@dataclass(frozen=True)
class Assumed:
    """What the points are taken to be like. The defaults are what the reference study on digits measured.

    By its main extractor: medians over the rates that a law fits, and an analysis of variance of ln gFID on the lower
    envelopes over sizes (budgets and tokenizer seeds within each rate).
    """

    exponent: float = 1.5
    floor: float = 0.18  # asymptote over the value at the smallest budget of a rate
    noise: float = 0.17  # standard deviation of ln y of a point: generator run and evaluation
    seed: float = 0.10  # that of the common shift of a tokenizer's points
    given: tuple[str, ...] = ()  # which of them were

    @classmethod
    def read(cls, text: str) -> Assumed:
        """The defaults with what ``NAME=VALUE,NAME=VALUE`` says; GridError."""
        found: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in RANGES:
                raise GridError.got("--assume", part, f"NAME=VALUE with NAME one of {choose(name, RANGES)}")
            low, high, words = RANGES[name]
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = math.nan
            if not low < found[name] < high:
                raise GridError.got("--assume", part.strip(), f"{name}={words}")
        return cls(**found, given=tuple(found))

    @property
    def numbers(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in RANGES}

    @property
    def source(self) -> str:
        """Where the numbers come from."""
        if len(self.given) == len(RANGES):
            return "as given"
        return f"{' and '.join(self.given)} as given, else {SOURCE}" if self.given else SOURCE


RANGES = {  # limits, not included
    "exponent": (0.0, 5.0, "a number above 0 and below 5"),
    "floor": (0.0, 1.0, "a share above 0 and below 1"),
    "noise": (0.0, 3.0, "a standard deviation of ln y above 0 and below 3"),
    "seed": (0.0, 3.0, "a standard deviation of ln y above 0 and below 3"),
}


@dataclass(frozen=True)
class Curve:
    """The points of one rate, and the intervals that its law will have; shares of the parameter, None with a reason."""

    rate: str
    bits: float | None
    tokenizers: tuple[str, ...]  # checkpoints
    tokenizer_seeds: tuple[int, ...]
    generator_seeds: int  # of every size
    budgets: tuple[float, ...]  # FLOPs
    form: str | None = None
    unit: str | None = None
    dof: int | None = None
    exponent: float | None = None  # half of the interval over the exponent
    asymptote: float | None = None
    reason: str | None = None


class Contrast(NamedTuple):
    """The factor between two rates, at one budget they share, from which their paired interval leaves out 1."""

    ratio: float | None
    seeds: int
    reason: str | None


@dataclass(frozen=True)
class Expected:
    """Every curve of a plan, and the contrast between two of them."""

    assumed: Assumed
    curves: tuple[Curve, ...]
    contrast: Contrast

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        held = {"assumed": self.assumed.numbers, "source": self.assumed.source, "level": LEVEL}
        return held | {"curves": [asdict(each) for each in self.curves], "contrast": self.contrast._asdict()}


def expected(table: pa.Table, assumed: Assumed) -> Expected | None:
    """What to expect of a plan's rows (``sweep.schema.PLAN``); None where no generator is measured."""
    found = curves(table)
    if not found:
        return None
    seeds = set.intersection(*(set(each.tokenizer_seeds) for each in found))
    if len(found) < 2:
        contrast = Contrast(None, len(seeds), "there is one rate")
    elif len(seeds) < CONTRASTS:
        contrast = Contrast(None, len(seeds), "it needs two tokenizer seeds that all rates have")
    else:
        point = max(assumed.noise**2 / each.generator_seeds for each in found)
        error = math.sqrt(2 * (assumed.seed**2 + point) / len(seeds))
        contrast = Contrast(math.exp(half_width([(error, len(seeds) - 1)])), len(seeds), None)
    return Expected(assumed, tuple(intervals(each, assumed) for each in found), contrast)


def curves(table: pa.Table) -> list[Curve]:
    """The design of every rate by bits: what is measured of generators under the protocol with most rows.

    Points planned by steps lie at a compute of their own each; they count for the nearest of four per decade.
    """
    columns = ["stage", "protocol_id", "generator", *Point._fields]
    measured = table.select(columns).filter(pc.and_(_is(table, "stage", "evaluation"), pc.is_valid(table["generator"])))
    if not measured.num_rows:
        return []
    protocols = Counter(measured["protocol_id"].to_pylist())
    measured = measured.filter(_is(measured, "protocol_id", max(protocols, key=lambda name: protocols[name])))
    # group_by of pyarrow would load pandas
    points = set(zip(*(measured[name].to_pylist() for name in Point._fields), strict=True))
    designs: dict[Any, list[Point]] = {}
    tokenizers = _tokenizers(table)
    for point in map(Point._make, points):
        designs.setdefault(tokenizers.get(point.tokenizer or "", _NONE).design, []).append(point)
    found = []
    for group in designs.values():
        ids = sorted({point.tokenizer for point in group if point.tokenizer is not None})
        known = [tokenizers.get(name, _NONE) for name in ids] or [_NONE]
        sized: dict[str | None, set[int]] = {}
        for point in group:
            sized.setdefault(point.generator_size, set()).add(point.generator_seed)
        budgets = {point.flops_target or _nearest(point.flops_to_point) for point in group}
        found.append(
            Curve(
                rate=known[0].label,
                bits=known[0].bits,
                tokenizers=tuple(ids),
                tokenizer_seeds=tuple(sorted({each.seed for each in known})),
                generator_seeds=min(len(seeds) for seeds in sized.values()),
                budgets=tuple(sorted(budgets)),
            )
        )
    return sorted(found, key=lambda each: (each.bits is None, each.bits, each.rate))


class Point(NamedTuple):
    """What is measured, by columns of the plan."""

    tokenizer: str | None
    generator_seed: int
    generator_size: str | None
    flops_target: float | None
    flops_to_point: float


class _Tokenizer(NamedTuple):
    design: Any  # what its seeds share
    label: str
    bits: float | None
    seed: int


_NONE = _Tokenizer(None, "all generators", None, 0)


def _tokenizers(table: pa.Table) -> dict[str, _Tokenizer]:
    """Tokenizers by checkpoint."""
    names = ["run_id", "label", "family", "fields", "seed", "bits_nominal", "points", "encode"]
    rows = table.select(names).filter(_is(table, "stage", "tokenizer")).to_pylist()
    found: dict[str, _Tokenizer] = {}
    for row in rows:
        label, several = row["label"].rpartition(" s")[0].rpartition(" > ")[2], len(row["encode"]) > 1
        for step in row["points"]:
            named = f"{label} {step} steps" if several else label
            design = row["family"], row["fields"], step
            found[f"{row['run_id']}@{step}"] = _Tokenizer(design, named, row["bits_nominal"], row["seed"])
    return found


def _is(table: pa.Table, name: str, value: str) -> pa.ChunkedArray:
    return pc.is_in(table[name], arrow.column([value], pa.string()))  # a Python value here would load pandas


def _nearest(flops: float) -> float:
    return float(10.0 ** (round(A_DECADE * math.log10(flops)) / A_DECADE))


def intervals(curve: Curve, assumed: Assumed) -> Curve:
    """The curve with its expected intervals."""
    count, seeds = len(curve.budgets), len(curve.tokenizer_seeds)
    form = "saturating" if count > PARAMETERS["saturating"] else "power"
    spare = count - PARAMETERS[form]
    if spare < 1:
        some = f"{count} budget{'s' if count > 1 else ''}"
        return replace(curve, reason=f"{some} where a law needs {PARAMETERS['power'] + 1}")
    gradient = _gradient(form, np.log(np.array(curve.budgets) / curve.budgets[0]), assumed)
    solved = np.linalg.pinv(gradient)
    point = assumed.noise**2 / curve.generator_seeds
    given = np.sqrt(point / seeds * (solved**2).sum(1))
    over = np.hypot(given, assumed.seed / math.sqrt(seeds) * solved.sum(1))  # a shift of all points at once
    if seeds > 1:
        unit, dof = "tokenizer seeds", seeds - 1
    elif curve.generator_seeds > 1:
        unit, dof, over = "generator seeds given one tokenizer", curve.generator_seeds - 1, given
    else:
        unit, dof = GIVEN, spare
    known = [[(float(error), spare)] for error in given]
    if unit != GIVEN:
        known = [[(float(error), dof), *held] for error, held in zip(over, known, strict=True)]
    exponent = half_width(known[-1]) / assumed.exponent
    asymptote = half_width(known[0]) if form == "saturating" else None
    return replace(curve, form=form, unit=unit, dof=dof, exponent=exponent, asymptote=asymptote)


def _gradient(form: str, log_x: NDArray[np.float64], assumed: Assumed) -> NDArray[np.float64]:
    """Derivatives [budgets, parameters] of ln y by ln E (where there is one), ln A and a; log_x from the pivot of A."""
    if form == "power":
        return np.stack([np.ones_like(log_x), -log_x], axis=1)
    falling = (1 - assumed.floor) * np.exp(-assumed.exponent * log_x)
    share = falling / (assumed.floor + falling)
    return np.stack([1 - share, share, -share * log_x], axis=1)


def half_width(errors: Sequence[tuple[float, int]]) -> float:
    """Median of the widest of independent half-widths t(dof) x error, from (true error, dof) of each.

    An estimated error is the true one times sqrt(chi2(dof) / dof).
    """
    held = [(student(dof) * error, dof) for error, dof in errors if error > 0]

    def below(width: float) -> float:
        return math.prod(chi2(dof * (width / scale) ** 2, dof) for scale, dof in held)

    return _root(below, 0.5, max(scale for scale, _ in held))


# Distribution functions at whole degrees of freedom, in closed form: scipy takes as long to load as a plan to make.


def student(dof: int) -> float:
    """The half-width of Student's t at LEVEL in units of the error (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(dof))
        term, total = (1.0, 0.0) if dof % 2 == 0 else (math.cos(angle), 0.0)
        for k in range(1 + dof % 2, dof, 2):
            total += term
            term *= k / (k + 1) * math.cos(angle) ** 2
        share = math.sin(angle) * total
        return share if dof % 2 == 0 else 2 / math.pi * (angle + share)

    return _root(within, LEVEL, 2.0)


def chi2(value: float, dof: int) -> float:
    """Share of chi-squared below a value (Abramowitz and Stegun, 26.4.4 and 26.4.5)."""
    odd, half = dof % 2, value / 2
    if half > FAR:
        return 1.0
    term = math.sqrt(2 * value / math.pi) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, dof + 1, 2):
        total += term
        term *= value / k
    return 1 - math.exp(-half) * total - (math.erfc(math.sqrt(half)) if odd else 0.0)


def _root(rising: Callable[[float], float], level: float, near: float) -> float:
    """Where a function that rises from 0 to 1 passes a level."""
    low, high = 0.0, near
    while rising(high) < level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2


# --- in words --------------------------------------------------------------------------------------------------


def sentences(found: Expected) -> list[str]:
    """What to expect, and at which assumptions."""
    groups: dict[Any, list[Curve]] = {}
    for each in found.curves:
        groups.setdefault((each.form, each.unit, each.reason), []).append(each)
    lines = []
    for (form, unit, reason), group in groups.items():
        who = group[0].rate + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        if reason is not None:
            lines.append(f"No law of {who}: {reason}.")
            continue
        alone, degrees = unit == GIVEN, [each.dof or 0 for each in group]
        points = _span([len(each.budgets) for each in group], "{:d}")
        points += f" {unit}" if alone else f" budgets, {_span([dof + 1 for dof in degrees], '{:d}')} {unit}"
        what = f"exponent {_percent([each.exponent for each in group])}"
        if form == "saturating":
            what += f", asymptote {_percent([each.asymptote for each in group])}"
        t = f"t({_span(degrees, '{:d}')}) = {_span([student(dof) for dof in degrees], '{:.3g}')}"
        note = "; a report gives none, as it says nothing about another tokenizer" if alone else ""
        lines.append(f"Expected {LEVEL:.0%} intervals, {form} law of {who} ({points}, {t}):")
        lines.append(f"  {what}{note}")
    contrast = found.contrast
    if contrast.ratio is not None:
        lines.append(
            f"Two rates at one budget are told apart from a difference of {contrast.ratio:.3g}x on "
            f"({contrast.seeds} paired tokenizer seeds)."
        )
    elif len(found.curves) > 1:
        lines.append(f"A contrast between rates cannot be had: {contrast.reason}; there is {contrast.seeds or 'none'}.")
    said = ", ".join(f"{name} {value:g}" for name, value in found.assumed.numbers.items())
    return [*lines, f"Medians at {said}, {found.assumed.source}; --assume takes others."]


def _span(values: Sequence[float], form: str) -> str:
    low, high = (form.format(value) for value in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _percent(shares: Sequence[float | None]) -> str:
    """Half-widths in words; beyond 100 % a linearised error says no more than that."""
    values = [100 * share for share in shares if share is not None]
    within = [value for value in values if value < 100]
    if not within:
        return "more than ±100 %"
    told = f"±{_span(within, '{:.0f}' if min(within) >= 10 else '{:.2g}')} %"
    return told if len(within) == len(values) else f"{told} to more than ±100 %"
