"""Where is a law lowest in the inputs that are open, for thousands of parameter draws at once?

Open are the size N, with the data along C = k N D, and one rate. Of every surface here a term is then an exponential of
ln N and of the logarithm of the rate. In N there are two, one falling and one rising. They are lowest together where
each has the share of their sum that balances the exponents (closed form), and that minimum is one exponential of the
rate. So the metric is a convex function of the rate: closed form for two terms, a search between brackets for three
(Chandrupatla's method, ``scipy.optimize.elementwise``). Shapes: B draws of p parameters, d inputs, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import elementwise

from analysis.forms import FORMS
from analysis.laws import Array, Form, Sum
from analysis.refusal import Refusal
from analysis.result import Fit
from analysis.shapes import CHINCHILLA, Interaction
from analysis.table import TableError

RATES = ("R", "T", "k")
SURFACES = tuple(name for name, law in FORMS.items() if len(law.inputs) > 1 and isinstance(law, Sum | Interaction))
REACH = 60.0  # e-folds on either side of a fit's middle within which a best rate is looked for


@dataclass(frozen=True)
class Question:
    """Inputs of a law that are ``given``; the others are open. ``pivots`` [d] and ``scale`` are those of the fit."""

    law: Form
    pivots: Array
    scale: float
    given: Mapping[str, float]
    per_token: float  # k of C = k N D

    @cached_property
    def rate(self) -> str | None:
        """The rate that is open."""
        return next((name for name in self.law.inputs if name in RATES and name not in self.given), None)

    @cached_property
    def sized(self) -> bool:
        """N is open, and the data with it."""
        return "N" in self.law.inputs and "C" in self.given and "N" not in self.given

    def _line(self) -> tuple[Array, Array, Array]:
        """Scaled ln inputs as base + n size + rho rate, each [d]."""
        names, pivots = self.law.inputs, np.log(self.pivots)
        base = np.array(
            [math.log(self.given[name]) if name in self.given else pivots[i] for i, name in enumerate(names)]
        )
        size, rate = np.zeros(len(names)), np.array([float(name == self.rate) for name in names])
        if "N" in names and "C" in self.given:
            at = names.index("N")
            size[at] = float(self.sized)
            for name, power in (("D", 1.0), ("M", 2.0)):  # C = k N D = k N^2 M
                if name in names:
                    base[names.index(name)] = math.log(self.given["C"] / self.per_token) - power * base[at]
                    size[names.index(name)] = -power * size[at]
        return base - pivots, size, rate

    def _terms(self, theta: Array, at: Array) -> Array:
        """Logarithms [B, K] of the terms above the asymptote at scaled ln inputs [d].

        Of an interaction those of the sum that is raised to a power: both are lowest together.
        """
        law = CHINCHILLA if isinstance(self.law, Interaction) else self.law
        assert isinstance(law, Sum)
        rows = []
        for term in law.terms:
            log = theta[:, law.parameters.index(term.amplitude)]
            for power in term.powers:
                exponent = theta[:, law.parameters.index(power.exponent)]
                log = log + power.sign * exponent * math.prod(at[i] for i in power.inputs)
            rows.append(log)
        return np.stack(rows, axis=1)

    def _over_rate(self, theta: Array) -> tuple[Array, Array, Array, Array]:
        """Terms with N at its best: logarithms and exponents of the rate [B, K'], and n = start + rho slope.

        Two terms u and v with exponents -p and q in N are lowest together where u has the share q / (p + q); their sum
        is then (u / share_u)^share_u (v / share_v)^share_v.
        """
        base, size, rate = self._line()
        log = self._terms(theta, base)
        by_rate = self._terms(theta, base + rate) - log
        if not self.sized:
            return log, by_rate, np.zeros(len(theta)), np.zeros(len(theta))
        by_size = self._terms(theta, base + size) - log
        u, v = np.flatnonzero((by_size != 0).any(0))  # the size's term stands before that of the data
        span = by_size[:, v] - by_size[:, u]
        share_u, share_v = by_size[:, v] / span, -by_size[:, u] / span
        level_u, level_v = log[:, u] - np.log(share_u), log[:, v] - np.log(share_v)
        merged = share_u * level_u + share_v * level_v
        slope = share_u * by_rate[:, u] + share_v * by_rate[:, v]
        rest = [i for i in range(log.shape[1]) if i not in (u, v)]
        return (
            np.column_stack([log[:, rest], merged]),
            np.column_stack([by_rate[:, rest], slope]),
            (level_u - level_v) / span,
            (by_rate[:, u] - by_rate[:, v]) / span,
        )

    def log_rate(self, theta: Array) -> Array:
        """ln of the best rate [B], wherever it lies; infinite where the metric falls or rises without end."""
        assert self.rate is not None
        log, exponent, _, _ = self._over_rate(theta)
        return bottom(log, exponent) + math.log(self.pivots[self.law.inputs.index(self.rate)])

    def best(self, theta: Array, edges: tuple[float, float] | None = None) -> dict[str, Array]:
        """ln of every open input by name, and the metric there as "y", [B] each.

        ``edges``: of ln rate. Where the best rate lies beyond one, that edge is the best there is (convexity).
        """
        base, size, rate = self._line()
        log, exponent, start, slope = self._over_rate(theta)
        rho = np.zeros(len(theta))
        if self.rate is not None:
            rho = bottom(log, exponent)
            if edges is not None:
                rho = np.clip(rho, *(np.array(edges) - rate @ np.log(self.pivots)))
        at = np.repeat(base[None], len(theta), 0)
        moved = (size != 0) | (rate != 0)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # draws in which a rate is nowhere best
            at[:, rate != 0] += rho[:, None]
            at[:, size != 0] += (start + rho * slope)[:, None] * size[size != 0]
            metric = self.law.value(theta, np.exp(at)[:, None])[:, 0] * self.scale
        columns = zip(self.law.inputs, (at + np.log(self.pivots)).T, moved, strict=True)
        made = {name: logs for name, logs, open_ in columns if open_}
        if "M" in made:
            made["D"] = made["N"] + made["M"]
        return made | {"y": metric}


def question(found: Fit, given: Mapping[str, float], per_token: float) -> Question:
    """What is asked of a fitted surface. Raises as ``check``."""
    check(found.form, given, per_token)
    return Question(FORMS[found.form], np.asarray(found.pivots), found.scale, given, per_token)


def check(form: str, given: Mapping[str, float], per_token: float) -> None:
    """Raises ``TableError`` where the law or what is given makes no question, ``Refusal`` (no_interior_minimum) for one
    that has no answer in this law; needs no fit."""
    if form not in SURFACES:
        raise TableError(f"--law: got {form!r}; laws with an optimum: {', '.join(SURFACES)}")
    if not (math.isfinite(per_token) and per_token > 0):
        raise TableError(f"--per-token: got {per_token:g}; allowed: a number above 0")
    names = FORMS[form].inputs
    allowed = [*names, *(["C"] if "C" not in names else [])]
    told = ", ".join(f"{name}={value:g}" for name, value in given.items()) or "nothing"
    for name, value in given.items():
        if name not in allowed:
            raise TableError(f"--at: got {name!r}; inputs of {form}: {', '.join(allowed)}")
        if not (math.isfinite(value) and value > 0):
            raise TableError(f"--at: got {name}={value:g}; allowed: a number above 0")
    data = next((name for name in ("D", "M") if name in names), None)
    if "C" not in given and (data is None or not {"N", data} <= set(given)):
        raise TableError(f"--at: got {told}; {form} needs C{'' if data is None else f', or N and {data}'}")
    if data is not None and {"C", data} <= set(given):
        raise TableError(f"--at: got {told}; {data} follows from C and N")
    rates = [name for name in names if name in RATES and name not in given]
    if len(rates) > 1:
        raise Refusal(
            "no_interior_minimum", f"a law in powers of {' and '.join(rates)} has no optimum in both: give one"
        )
    asked = Question(FORMS[form], np.ones(len(names)), 1.0, given, per_token)
    if asked.rate is None and not asked.sized:
        raise TableError(f"--at: got {told}; nothing is left to choose")


def bottom(log: Array, exponent: Array) -> Array:
    """Where sum_k exp(log + exponent rho) is lowest [B]; infinite where it only falls, only rises or is flat."""
    rising, falling = (exponent > 0).any(1), (exponent < 0).any(1)
    place = np.where(falling & ~rising, np.inf, -np.inf)
    rows = np.flatnonzero(rising & falling)
    if not len(rows):
        return place
    c, e = log[rows], exponent[rows]
    count = c.shape[1]
    if count == 2:
        pull = c + np.log(np.abs(e))
        place[rows] = (pull[:, 0] - pull[:, 1]) / (e[:, 1] - e[:, 0])
        return place

    def slope(rho: Array, *each: Array) -> Array:
        powers = [height + power * rho for height, power in zip(each[:count], each[count:], strict=True)]
        top = np.max(powers, axis=0)
        terms = (power * np.exp(log - top) for power, log in zip(each[count:], powers, strict=True))
        return np.asarray(sum(terms))

    arguments = (*c.T, *e.T)
    left, right = (slope(np.full(len(rows), end), *arguments) for end in (-REACH, REACH))
    between = (left < 0) & (right > 0)
    place[rows] = np.where(left >= 0, -np.inf, np.inf)
    inner = tuple(each[between] for each in arguments)
    place[rows[between]] = elementwise.find_root(slope, (-REACH, REACH), args=inner).x
    return place
