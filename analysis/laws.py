"""Which functional forms can a metric follow? Values, Jacobians, bounds and starts, batched; numpy only.

A form sees inputs divided by their pivots and a metric divided by its scale (geometric means both), so that units
change nothing. Shapes: ``theta [B, p]`` internal parameters, ``x [B, n, d]`` inputs, values ``[B, n]``, Jacobians
``[B, n, p]``; B counts refits of a bootstrap.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EXPONENT = (0.01, 5.0)  # bounds of an exponent: flatter or steeper than any curve seen, reported when reached
AMPLITUDE = (-27.0, 27.0)  # bounds of ln(amplitude / scale)
SCAN = np.geomspace(0.02, 4.0, 40)  # exponents tried before the polish


class Form(Protocol):
    """A functional form y(x; theta)."""

    name: ClassVar[str]
    formula: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]  # as reported, in the caller's units
    inputs: ClassVar[int]

    @property
    def lower(self) -> Array: ...

    @property
    def upper(self) -> Array: ...

    def value(self, theta: Array, x: Array) -> Array: ...

    def jacobian(self, theta: Array, x: Array) -> Array: ...

    def start(self, x: Array, y: Array, weights: Array) -> Array:
        """theta [B, p] close enough to the optimum for a local polish. y [B, n] > 0, weights [B, n] >= 0."""
        ...

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        """Reported parameters [B, p] and their Jacobian with respect to theta [B, p, p]."""
        ...


class Power:
    """y = A x^-a: no asymptote. Always fitted beside forms that have one."""

    name: ClassVar[str] = "power"
    formula: ClassVar[str] = "y = A x^-a"
    parameters: ClassVar[tuple[str, ...]] = ("A", "a")
    inputs: ClassVar[int] = 1
    lower = np.array([AMPLITUDE[0], EXPONENT[0]])
    upper = np.array([AMPLITUDE[1], EXPONENT[1]])

    def value(self, theta: Array, x: Array) -> Array:
        return np.asarray(np.exp(theta[:, :1] - theta[:, 1:2] * np.log(x[..., 0])))

    def jacobian(self, theta: Array, x: Array) -> Array:
        y = self.value(theta, x)
        return np.stack([y, -y * np.log(x[..., 0])], axis=-1)

    def start(self, x: Array, y: Array, weights: Array) -> Array:
        u, v = np.log(x[..., 0]), np.log(y)
        total = weights.sum(1, keepdims=True)
        du = u - (weights * u).sum(1, keepdims=True) / total
        mean = (weights * v).sum(1, keepdims=True) / total
        spread = np.maximum((weights * du * du).sum(1), 1e-300)
        slope = -(weights * du * (v - mean)).sum(1) / spread
        slope = np.clip(slope, self.lower[1], self.upper[1])
        center = mean[:, 0] + slope * ((weights * u).sum(1) / total[:, 0])
        return np.stack([np.clip(center, *AMPLITUDE), slope], axis=-1)

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        b, a = theta.T
        log_pivot = float(np.log(pivots[0]))
        amplitude = scale * np.exp(b + a * log_pivot)
        jacobian = np.zeros((len(theta), 2, 2))
        jacobian[:, 0, 0], jacobian[:, 0, 1], jacobian[:, 1, 1] = amplitude, amplitude * log_pivot, 1.0
        return np.stack([amplitude, a], axis=-1), jacobian


class Saturating:
    """y = E + A x^-a with E >= 0: a power law above an asymptote (as gFID(C) in CRT, arXiv 2412.16326).

    theta = (E, ln A, a) in scaled units. For a given exponent the form is linear in (E, A): the start scans the
    exponent, solves for the other two with non-negativity and weights 1/y^2, which are log residuals to first
    order, and keeps the best by the log residuals themselves (variable projection).
    """

    name: ClassVar[str] = "saturating"
    formula: ClassVar[str] = "y = E + A x^-a"
    parameters: ClassVar[tuple[str, ...]] = ("E", "A", "a")
    inputs: ClassVar[int] = 1
    lower = np.array([0.0, AMPLITUDE[0], EXPONENT[0]])
    upper = np.array([np.inf, AMPLITUDE[1], EXPONENT[1]])

    def value(self, theta: Array, x: Array) -> Array:
        return np.asarray(theta[:, :1] + np.exp(theta[:, 1:2] - theta[:, 2:3] * np.log(x[..., 0])))

    def jacobian(self, theta: Array, x: Array) -> Array:
        u = np.log(x[..., 0])
        power = np.exp(theta[:, 1:2] - theta[:, 2:3] * u)
        return np.stack([np.ones_like(power), power, -power * u], axis=-1)

    def start(self, x: Array, y: Array, weights: Array) -> Array:
        u = np.log(x[..., 0])
        basis = np.exp(-SCAN[:, None] * u[:, None, :])  # [B, scan, n]
        w = (weights / (y * y))[:, None, :]
        target = y[:, None, :]
        s11, s12, s22 = w.sum(-1), (w * basis).sum(-1), (w * basis * basis).sum(-1)
        t1, t2 = (w * target).sum(-1), (w * basis * target).sum(-1)
        determinant = s11 * s22 - s12 * s12
        safe = np.where(determinant > 1e-14 * s11 * s22, determinant, np.inf)
        asymptote, amplitude = (s22 * t1 - s12 * t2) / safe, (s11 * t2 - s12 * t1) / safe
        alone = t2 / s22  # amplitude without an asymptote
        free = (asymptote > 0) & (amplitude > 0)
        asymptote = np.where(free, asymptote, 0.0)
        amplitude = np.where(free, amplitude, alone)
        fitted = asymptote[..., None] + amplitude[..., None] * basis
        loss = (weights[:, None, :] * (np.log(target) - np.log(fitted)) ** 2).sum(-1)
        best = np.argmin(loss, axis=1)
        rows = np.arange(len(y))
        log_amplitude = np.clip(np.log(amplitude[rows, best]), *AMPLITUDE)
        return np.stack([asymptote[rows, best], log_amplitude, SCAN[best]], axis=-1)

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        e, b, a = theta.T
        log_pivot = float(np.log(pivots[0]))
        amplitude = scale * np.exp(b + a * log_pivot)
        jacobian = np.zeros((len(theta), 3, 3))
        jacobian[:, 0, 0] = scale
        jacobian[:, 1, 1], jacobian[:, 1, 2] = amplitude, amplitude * log_pivot
        jacobian[:, 2, 2] = 1.0
        return np.stack([scale * e, amplitude, a], axis=-1), jacobian


FORMS: dict[str, Form] = {form.name: form for form in (Power(), Saturating())}
