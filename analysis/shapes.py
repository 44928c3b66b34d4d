"""Which laws are no plain sum of powers? N and D that interact, the parabola of one budget, a power that breaks."""

from __future__ import annotations

import itertools

import numpy as np

from analysis.laws import AMPLITUDE, EXPONENT, Array, Bounds, Power, Sum, Term

STEP = 1e-5  # of theta, for second derivatives from first ones
CHINCHILLA = Sum(
    "chinchilla",
    "y = E + A N^-a + B D^-b",
    ("N", "D"),
    (Term("A", (Power("a", -1, (0,)),)), Term("B", (Power("b", -1, (1,)),))),
    "E",
)
SATURATING = Sum("saturating", "y = E + A x^-a", ("x",), (Term("A", (Power("a", -1, (0,)),)),), "E")


class Shape:
    """What the forms of this file share: bounds from a table, second derivatives by central differences."""

    name: str
    formula: str
    inputs: tuple[str, ...]
    limits: dict[str, Bounds]
    positive: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    asymptote: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.limits)

    @property
    def lower(self) -> Array:
        return np.array([low for low, _ in self.limits.values()])

    @property
    def upper(self) -> Array:
        return np.array([high for _, high in self.limits.values()])

    def jacobian(self, theta: Array, x: Array) -> Array:
        raise NotImplementedError

    def curvature(self, theta: Array, x: Array, weights: Array) -> Array:
        rows = []
        for i in range(theta.shape[1]):
            step = np.zeros(theta.shape[1])
            step[i] = STEP
            change = self.jacobian(theta + step, x) - self.jacobian(theta - step, x)
            rows.append((change * weights[:, None]).sum(-1) / (2 * STEP))
        found = np.stack(rows, axis=1)
        return np.asarray((found + np.swapaxes(found, 1, 2)) / 2)


class Interaction(Shape):
    """y = E + (A N^-a + B D^-b)^g: g = 1 is Chinchilla, other g let one resource make up for the other.

    The exponent on the sum is that of Kaplan et al. (arXiv 2001.08361, eq. 1.5) above an asymptote.
    """

    name = "interaction"
    formula = "y = E + (A N^-a + B D^-b)^g"
    inputs = ("N", "D")
    positive = ("A", "B")
    asymptote = "E"
    limits: dict[str, Bounds] = {  # noqa: RUF012
        "E": (0.0, np.inf),
        "A": AMPLITUDE,
        "B": AMPLITUDE,
        "a": EXPONENT,
        "b": EXPONENT,
        "g": (0.05, 20.0),
    }

    def _parts(self, theta: Array, x: Array) -> tuple[Array, Array, Array, Array]:
        u, v = np.log(x[..., 0]), np.log(x[..., 1])
        first = np.exp(theta[:, 1:2] - theta[:, 3:4] * u)
        second = np.exp(theta[:, 2:3] - theta[:, 4:5] * v)
        return u, v, first, second

    def value(self, theta: Array, x: Array) -> Array:
        _, _, first, second = self._parts(theta, x)
        return np.asarray(theta[:, :1] + (first + second) ** theta[:, 5:6])

    def jacobian(self, theta: Array, x: Array) -> Array:
        u, v, first, second = self._parts(theta, x)
        g, total = theta[:, 5:6], first + second
        outer = g * total ** (g - 1)
        rows = [
            np.ones_like(total),
            outer * first,
            outer * second,
            -outer * first * u,
            -outer * second * v,
            total**g * np.log(total),
        ]
        return np.stack(rows, axis=1)

    def starts(self, x: Array, y: Array, weights: Array, count: int = 1) -> Array:
        plain = CHINCHILLA.starts(x, y, weights, count)
        return np.concatenate([plain, np.ones_like(plain[..., :1])], axis=-1)

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        e, b1, b2, a, b, g = theta.T
        p, q, s = *np.log(pivots), np.log(scale)
        with np.errstate(over="ignore"):
            first, second = np.exp(b1 + a * p + s / g), np.exp(b2 + b * q + s / g)
        jacobian = np.zeros((len(theta), 6, 6))
        jacobian[:, 0, 0] = scale
        jacobian[:, 1, 1], jacobian[:, 1, 3], jacobian[:, 1, 5] = first, first * p, -first * s / g**2
        jacobian[:, 2, 2], jacobian[:, 2, 4], jacobian[:, 2, 5] = second, second * q, -second * s / g**2
        jacobian[:, [3, 4, 5], [3, 4, 5]] = 1.0
        return np.stack([scale * e, first, second, a, b, g], axis=-1), jacobian


class Parabola(Shape):
    """y = L + k (ln x - ln x*)^2: one compute budget, sizes on either side of the best (Hoffmann et al., approach 2).

    Biased off the centre and on wide grids even without noise (arXiv 2603.22339); a surface is the cross-check.
    """

    name = "parabola"
    formula = "y = L + k (ln x - ln x*)^2"
    inputs = ("x",)
    positive = ("x*",)
    places = ("x*",)
    limits: dict[str, Bounds] = {"L": (0.0, np.inf), "k": (-np.inf, np.inf), "x*": AMPLITUDE}  # noqa: RUF012

    def value(self, theta: Array, x: Array) -> Array:
        off = np.log(x[..., 0]) - theta[:, 2:3]
        return np.asarray(np.maximum(theta[:, :1] + theta[:, 1:2] * off**2, 1e-12))

    def jacobian(self, theta: Array, x: Array) -> Array:
        off = np.log(x[..., 0]) - theta[:, 2:3]
        return np.stack([np.ones_like(off), off**2, -2 * theta[:, 1:2] * off], axis=1)

    def starts(self, x: Array, y: Array, weights: Array, count: int = 1) -> Array:
        u = np.broadcast_to(np.log(x[..., 0]), y.shape)
        basis = np.stack([np.ones_like(u), u, u * u], axis=1)
        w = weights[:, None]
        ridge = 1e-12 * np.eye(3)
        c = np.linalg.solve((basis * w) @ np.swapaxes(basis, 1, 2) + ridge, (basis * w * y[:, None]).sum(-1)[..., None])
        level, slope, bend = np.moveaxis(c[..., 0], -1, 0)
        bend = np.where(np.abs(bend) < 1e-9, 1e-9, bend)
        place = np.clip(-slope / (2 * bend), *AMPLITUDE)
        bottom = np.maximum(level + slope * place + bend * place**2, 1e-9)
        return np.stack([bottom, bend, place], axis=-1)[:, None]

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        place = np.exp(theta[:, 2] + np.log(pivots[0]))
        jacobian = np.zeros((len(theta), 3, 3))
        jacobian[:, 0, 0] = jacobian[:, 1, 1] = scale
        jacobian[:, 2, 2] = place
        return np.stack([scale * theta[:, 0], scale * theta[:, 1], place], axis=-1), jacobian


class Broken(Shape):
    """y = E + A x^-a (1 + (x/d)^(1/f))^(-c f): the exponent turns from a to a + c around x = d.

    One break of Caballero et al. (arXiv 2210.14891). Six parameters that tens of points can hardly carry: to find out
    whether one power law will do, never to extrapolate.
    """

    name = "broken"
    formula = "y = E + A x^-a (1 + (x/d)^(1/f))^(-c f)"
    inputs = ("x",)
    positive = ("A", "d", "f")
    places = ("d", "f")
    asymptote = "E"
    limits: dict[str, Bounds] = {  # noqa: RUF012
        "E": (0.0, np.inf),
        "A": AMPLITUDE,
        "a": EXPONENT,
        "c": (-5.0, 5.0),
        "d": AMPLITUDE,
        "f": (-5.0, 3.0),
    }

    def _parts(self, theta: Array, x: Array) -> tuple[Array, Array, Array, Array]:
        u = np.log(x[..., 0])
        width = np.exp(theta[:, 5:6])
        turn = (u - theta[:, 4:5]) / width
        soft = np.logaddexp(0.0, turn)
        power = np.exp(theta[:, 1:2] - theta[:, 2:3] * u - theta[:, 3:4] * width * soft)
        return u, turn, soft, power

    def value(self, theta: Array, x: Array) -> Array:
        return np.asarray(theta[:, :1] + self._parts(theta, x)[3])

    def jacobian(self, theta: Array, x: Array) -> Array:
        u, turn, soft, power = self._parts(theta, x)
        width, c = np.exp(theta[:, 5:6]), theta[:, 3:4]
        past = np.exp(turn - soft)  # how far past the break: the logistic function of turn
        rows = [
            np.ones_like(power),
            power,
            -power * u,
            -power * width * soft,
            power * c * past,
            -power * c * width * (soft - past * turn),
        ]
        return np.stack(rows, axis=1)

    def starts(self, x: Array, y: Array, weights: Array, count: int = 1) -> Array:
        """A break at each inner third of the range, towards either side of the saturating law's exponent."""
        plain = SATURATING.starts(x, y, weights)[:, 0]
        u = np.log(x[..., 0])
        low, high = u.min(1), u.max(1)
        made = []
        for share, turn in itertools.product((0.35, 0.5, 0.65), (0.5, -0.5)):
            place = np.broadcast_to(low + share * (high - low), (len(plain),))
            exponent = np.maximum(plain[:, 2] * (1 - 0.5 * turn), EXPONENT[0])
            change = turn * plain[:, 2]
            level = plain[:, 1] + (exponent - plain[:, 2]) * place
            made.append(np.stack([plain[:, 0], level, exponent, change, place, np.full(len(plain), -1.0)], axis=-1))
        theta = np.clip(np.stack(made, axis=1), self.lower, self.upper)
        flat = theta.reshape(-1, theta.shape[-1])
        many = theta.shape[1]
        fitted = np.log(self.value(flat, x if len(x) == 1 else np.repeat(x, many, 0))).reshape(len(y), many, -1)
        loss = (weights[:, None] * (np.log(y)[:, None] - fitted) ** 2).sum(-1)
        order = np.argsort(loss, axis=1)[:, :count]
        return np.take_along_axis(theta, order[..., None], axis=1)

    def natural(self, theta: Array, pivots: Array, scale: float) -> tuple[Array, Array]:
        e, level, a, c, place, width = theta.T
        p = float(np.log(pivots[0]))
        amplitude, d, f = scale * np.exp(level + a * p), np.exp(place + p), np.exp(width)
        jacobian = np.zeros((len(theta), 6, 6))
        jacobian[:, 0, 0] = scale
        jacobian[:, 1, 1], jacobian[:, 1, 2] = amplitude, amplitude * p
        jacobian[:, [2, 3], [2, 3]] = 1.0
        jacobian[:, 4, 4], jacobian[:, 5, 5] = d, f
        return np.stack([scale * e, amplitude, a, c, d, f], axis=-1), jacobian
