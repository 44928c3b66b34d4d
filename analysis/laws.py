"""Which functional forms can a metric follow? Values, derivatives, bounds and starts, batched; numpy only.

A form sees inputs divided by their pivots and a metric divided by its scale (geometric means both), so that units
change nothing. Shapes: ``theta [B, p]`` internal parameters, ``x [B, n, d]`` inputs (B may be 1: the same points for
every refit), values ``[B, n]``, Jacobians ``[B, p, n]``; B counts refits of a bootstrap.

Most laws are sums of products of powers above an optional asymptote (``Sum``): linear in their amplitudes once the
exponents are given, which is what starts use. The others are in ``analysis.shapes``, all of them in ``analysis.forms``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bounds = tuple[float, float]

EXPONENT: Bounds = (0.01, 5.0)  # of an exponent: flatter or steeper than any curve seen, reported when reached
AMPLITUDE: Bounds = (-27.0, 27.0)  # of ln(amplitude / scale)
SPREAD = {1: 40, 2: 16, 3: 8, 4: 5}  # exponents tried before the polish, by their number in the form
FEW = 4  # of them, where there are more
KEPT = 6  # starts whose own loss is looked at
ALIVE = 1e-3  # share of the metric that a term starts with at least: one without size has no gradient either
SINGULAR = 1e-14  # share of the diagonal below which a determinant is rounding


class Form(Protocol):
    """A functional form y(x; theta)."""

    @property
    def name(self) -> str: ...

    @property
    def formula(self) -> str: ...

    @property
    def parameters(self) -> tuple[str, ...]:
        """As reported, in the caller's units."""
        ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def lower(self) -> Array: ...

    @property
    def upper(self) -> Array: ...

    @property
    def positive(self) -> tuple[str, ...]:
        """Parameters that span decades: their intervals are symmetric in the logarithm."""
        ...

    @property
    def places(self) -> tuple[str, ...]:
        """Those of them that are a place or a width along an input."""
        ...

    @property
    def asymptote(self) -> str | None:
        """The parameter that the metric falls to, at least 0, and that intervals look past 0 for."""
        ...

    def value(self, theta: Array, x: Array) -> Array: ...

    def jacobian(self, theta: Array, x: Array) -> Array: ...

    def curvature(self, theta: Array, x: Array, weights: Array) -> Array:
        """Sum over points of weights [B, n] times the second derivatives of the value: [B, p, p]."""
        ...

    def starts(self, x: Array, y: Array, weights: Array, count: int = 1) -> Array:
        """``theta [B, count, p]`` close enough to the optimum for a local polish, best first.

        y [B, n] > 0, weights [B, n] >= 0.
        """
        ...

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        """Reported parameters [B, p] and their Jacobian with respect to theta [B, p, p]."""
        ...


class Power(NamedTuple):
    """A factor of a term: the product of ``inputs``, as logarithms, times sign x exponent, exponentiated."""

    exponent: str
    sign: int
    inputs: tuple[int, ...]  # one: x_i^(sign e). Two: exp(sign e ln x_i ln x_j), an exponent that moves with an input


class Term(NamedTuple):
    amplitude: str
    powers: tuple[Power, ...]


@dataclass(frozen=True)
class Sum:
    """y = E + sum_k A_k prod_m x^(sign e_m): asymptote E >= 0 (optional), amplitudes A_k > 0, bounded exponents.

    ``theta`` = (E, ln A_1, ..., e_1, ...) in scaled units, in the order of ``parameters``.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    terms: tuple[Term, ...]
    offset: str | None = None
    bounds: tuple[tuple[str, Bounds], ...] = ()  # of exponents, where they are not those of EXPONENT
    tied: tuple[tuple[str, ...], ...] = ()  # exponents that are equal in the starts

    @cached_property
    def exponents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(power.exponent for term in self.terms for power in term.powers))

    @cached_property
    def positive(self) -> tuple[str, ...]:
        return tuple(term.amplitude for term in self.terms)

    @property
    def places(self) -> tuple[str, ...]:
        return ()

    @property
    def asymptote(self) -> str | None:
        return self.offset

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return (*([self.offset] if self.offset else []), *self.positive, *self.exponents)

    @cached_property
    def lower(self) -> Array:
        return np.array([low for low, _ in self._limits])

    @cached_property
    def upper(self) -> Array:
        return np.array([high for _, high in self._limits])

    @cached_property
    def _limits(self) -> list[Bounds]:
        own = dict(self.bounds)
        first: list[Bounds] = [(0.0, np.inf)] if self.offset else []
        return [*first, *[AMPLITUDE] * len(self.terms), *[own.get(name, EXPONENT) for name in self.exponents]]

    @cached_property
    def _places(self) -> list[tuple[int, list[int]]]:
        """Per term: where its amplitude and its exponents stand in theta."""
        names = self.parameters
        return [
            (names.index(term.amplitude), [names.index(e) for e in dict.fromkeys(p.exponent for p in term.powers)])
            for term in self.terms
        ]

    def _features(self, log_x: Array) -> list[Array]:
        """Per term [B, q, n]: what each of its exponents multiplies in the logarithm of the term."""
        made = []
        for term in self.terms:
            rows: dict[str, Array] = {}
            for power in term.powers:
                feature = power.sign * np.prod([log_x[..., i] for i in power.inputs], axis=0)
                rows[power.exponent] = rows.get(power.exponent, 0.0) + feature
            made.append(np.stack(list(rows.values()), axis=-2))
        return made

    def _terms(self, theta: Array, features: Sequence[Array]) -> list[Array]:
        found = []
        for (amplitude, exponents), feature in zip(self._places, features, strict=True):
            log = theta[:, amplitude, None] + sum(
                theta[:, place, None] * feature[:, i] for i, place in enumerate(exponents)
            )
            found.append(np.exp(log))
        return found

    def value(self, theta: Array, x: Array) -> Array:
        terms = self._terms(theta, self._features(np.log(x)))
        return np.asarray(sum(terms) + (theta[:, :1] if self.offset else 0.0))

    def jacobian(self, theta: Array, x: Array) -> Array:
        features = self._features(np.log(x))
        made = np.zeros((len(theta), theta.shape[1], x.shape[1]))
        if self.offset:
            made[:, 0] = 1.0
        terms = self._terms(theta, features)
        for (amplitude, exponents), feature, term in zip(self._places, features, terms, strict=True):
            made[:, amplitude] = term
            for i, place in enumerate(exponents):
                made[:, place] += term * feature[:, i]
        return made

    def curvature(self, theta: Array, x: Array, weights: Array) -> Array:
        features = self._features(np.log(x))
        made = np.zeros((len(theta), theta.shape[1], theta.shape[1]))
        terms = self._terms(theta, features)
        for (amplitude, exponents), feature, term in zip(self._places, features, terms, strict=True):
            gradient = np.concatenate([np.ones_like(feature[:, :1]), feature], axis=1)
            block = (gradient * (weights * term)[:, None]) @ np.swapaxes(gradient, 1, 2)
            at = [amplitude, *exponents]
            made[:, np.array(at)[:, None], np.array(at)] += block
        return made

    def _scan(self) -> Array:
        """Exponents to try, [grid, exponents]."""
        own, among = dict(self.bounds), {name: group[0] for group in self.tied for name in group}
        free = list(dict.fromkeys(among.get(name, name) for name in self.exponents))
        axes = []
        for name in free:
            low, high = own.get(name, EXPONENT)
            if low < 0 < high:  # an exponent of either sign
                axes.append(np.array([0.2 * low, 0.0, 0.2 * high]))
            else:
                axes.append(np.geomspace(max(2 * low, 0.02), 0.8 * high, SPREAD.get(len(free), FEW)))
        grid = np.array(list(itertools.product(*axes)))
        return grid[:, [free.index(among.get(name, name)) for name in self.exponents]]

    def starts(self, x: Array, y: Array, weights: Array, count: int = 1) -> Array:
        """Variable projection: for given exponents, amplitudes and asymptote by non-negative least squares.

        Weights 1/y^2 make raw residuals those of ln y to first order; the best by that loss are ranked by the log
        residuals themselves.
        """
        scan, p = self._scan(), len(self.parameters)
        linear = len(self.terms) + bool(self.offset)
        features = self._features(np.log(x))
        basis = []  # [B, grid, n] each
        if self.offset:
            basis.append(np.ones((len(x), len(scan), x.shape[1])))
        for (_, exponents), feature in zip(self._places, features, strict=True):
            chosen = scan[:, [place - linear for place in exponents]]
            basis.append(np.exp(np.clip(np.einsum("gq,bqn->bgn", chosen, feature), -600.0, 600.0)))
        w = weights / (y * y)
        cross = np.empty((len(y), len(scan), linear, linear))
        target = np.empty((len(y), len(scan), linear))
        for i, j in itertools.combinations_with_replacement(range(linear), 2):
            cross[:, :, i, j] = cross[:, :, j, i] = _weighted(basis[i] * basis[j], w)
        for i in range(linear):
            target[:, :, i] = _weighted(basis[i], w * y)
        amplitudes, loss = non_negative(cross, target)
        kept = np.argsort(loss, axis=1)[:, :KEPT]
        if count > 1:  # further ones in which every term has a size: a term without one may be stuck there
            whole = (amplitudes[:, :, int(bool(self.offset)) :] > 0).all(-1)
            others = np.argsort(np.where(whole, loss, np.inf), axis=1)[:, : 2 * count]
            kept = np.concatenate([kept, others], axis=1)
        rows = np.arange(len(y))[:, None]
        picked = amplitudes[rows, kept]
        fitted = sum(
            picked[:, :, i, None] * np.broadcast_to(basis[i], (len(y), *basis[i].shape[1:]))[rows, kept]
            for i in range(linear)
        )
        own = (weights[:, None] * np.log(np.maximum(fitted, 1e-300) / y[:, None]) ** 2).sum(-1)
        if count > 1:
            first = np.argmin(own[:, :KEPT], axis=1)[:, None]
            order = np.concatenate([first, KEPT + np.argsort(own[:, KEPT:], axis=1)[:, : count - 1]], axis=1)
        else:
            order = np.argmin(own, axis=1)[:, None]
        kept, picked = kept[rows, order], picked[rows, order]
        theta = np.empty((len(y), kept.shape[1], p))
        if self.offset:
            theta[:, :, 0] = picked[:, :, 0]
        first = int(bool(self.offset))
        theta[:, :, first:linear] = np.log(np.maximum(picked[:, :, first:], ALIVE))
        theta[:, :, linear:] = scan[kept]
        return np.clip(theta, self.lower, self.upper)

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        change, shift = self._unscale(np.log(pivots), float(np.log(scale)))
        flat = theta @ change.T + shift
        jacobian = np.repeat(change[None], len(theta), 0)
        for i, name in enumerate(self.parameters):
            if name == self.offset:
                flat[:, i], jacobian[:, i] = scale * theta[:, i], scale * change[i]
            elif name in self.positive:
                with np.errstate(over="ignore"):
                    flat[:, i] = np.exp(flat[:, i])
                jacobian[:, i] = jacobian[:, i] * flat[:, i, None]
        return flat, jacobian

    def _unscale(self, pivots: Array, log_scale: float) -> tuple[Array, Array]:
        """Logarithms of amplitudes, and exponents, of x and y as given: change [p, p] @ theta + shift [p]."""
        change, shift = np.eye(len(self.parameters)), np.zeros(len(self.parameters))
        names = self.parameters
        for (amplitude, _), term in zip(self._places, self.terms, strict=True):
            shift[amplitude] = log_scale
            alone = {power.inputs[0]: power for power in term.powers if len(power.inputs) == 1}
            for power in term.powers:
                place = names.index(power.exponent)
                if len(power.inputs) == 1:
                    change[amplitude, place] -= power.sign * pivots[power.inputs[0]]
                    continue
                # (u - p)(v - q) = uv - qu - pv + pq: the exponents of u and v alone move, and so does the amplitude
                (i, j), sign = power.inputs, power.sign
                change[amplitude, place] += sign * pivots[i] * pivots[j]
                for mine, other in ((i, j), (j, i)):
                    change[names.index(alone[mine].exponent), place] -= sign * alone[mine].sign * pivots[other]
        return change, shift


def _weighted(basis: Array, weights: Array) -> Array:
    """Sums over points of basis [1 or B, grid, n] times weights [B, n]: [B, grid]."""
    if len(basis) == 1:
        return np.asarray(weights @ basis[0].T)
    return np.asarray((basis @ weights[:, :, None])[..., 0])


def non_negative(cross: Array, target: Array) -> tuple[Array, Array]:
    """Non-negative least squares from normal equations, all supports tried: c [..., k] and c'Sc - 2 c't [...].

    ``cross [..., k, k]``, ``target [..., k]``; with k <= 4 there are at most 15 supports, and the best feasible one is
    the optimum.
    """
    size = target.shape[-1]
    best = np.zeros_like(target)
    loss = np.zeros(target.shape[:-1])
    for count in range(1, size + 1):
        for support in itertools.combinations(range(size), count):
            at = np.array(support)
            block, right = cross[..., at[:, None], at], target[..., at]
            root = np.sqrt(np.maximum(np.einsum("...ii->...i", block), 1e-300))
            unit = block / root[..., :, None] / root[..., None, :]
            fine = np.linalg.det(unit) > SINGULAR
            unit = np.where(fine[..., None, None], unit, np.eye(count))
            found = np.linalg.solve(unit, (right / root)[..., None])[..., 0] / root
            gain = -(found * right).sum(-1)
            better = fine & (found >= 0).all(-1) & (gain < loss)
            loss = np.where(better, gain, loss)
            chosen = np.zeros_like(target)
            chosen[..., at] = found
            best = np.where(better[..., None], chosen, best)
    return best, loss
