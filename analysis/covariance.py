"""How far would parameters move on other data? Covariances of least-squares fits by linearisation, in batches.

Points that are independent: the usual (J'J)^-1 s^2, Student-t with n - p degrees of freedom. Points in clusters
(checkpoints of a run, budgets of a tokenizer): cluster-robust, since points of one cluster say little more than one of
them. From eight clusters on CR3 (a delete-one-cluster jackknife) with clusters - 1 degrees of freedom; with fewer CR2,
whose degrees of freedom are those of each contrast (Bell and McCaffrey 2002; Pustejovsky and Tipton 2018): both cover
what they say there (``analysis.coverage``). Shapes: B fits, n points, p parameters, m contrasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.laws import Array

SINGULAR = 1e13  # condition number from which parameters cannot be told apart
NOTHING = 1e-18  # share of the largest information below which the points say nothing about a parameter
FEW = 8  # clusters from which on CR3 is used
ALONE = 0.01  # of one minus a leverage: less is left of a residual where one cluster alone decides a direction


@dataclass(frozen=True)
class Covariance:
    """Of theta [B, p, p]; NaN where there is none."""

    matrix: Array
    silent: NDArray[np.bool_]  # [B, p]: parameters that the points say nothing about
    freedom: Array  # [B]
    loadings: Array | None = None  # [B, G, G, p, p]: CR2's degrees of freedom depend on the contrast

    def error(self, contrast: Array) -> Array:
        """Standard errors [B, m] of contrasts [B, m, p]."""
        size = np.abs(contrast).max(-1)  # squares of 1e-200, a scale like any other, would be 0
        unit = contrast / np.where(size > 0, size, 1.0)[..., None]
        variance = np.einsum("bmp,bpq,bmq->bm", unit, self.matrix, unit)
        unknown = ((contrast != 0) & self.silent[:, None]).any(-1)
        return np.asarray(np.where(unknown, np.nan, size * np.sqrt(np.maximum(variance, 0.0))))  # NaN stays NaN

    def dof(self, contrast: Array) -> Array:
        """Degrees of freedom [B, m] of contrasts [B, m, p]."""
        if self.loadings is None:
            return np.broadcast_to(self.freedom[:, None], contrast.shape[:2])
        unit = contrast / np.maximum(np.abs(contrast).max(-1, keepdims=True), 1e-300)
        omega = np.einsum("bmp,bghpq,bmq->bmgh", unit, self.loadings, unit)
        trace = np.einsum("bmgg->bm", omega)
        found = trace**2 / np.maximum((omega * omega).sum((-2, -1)), 1e-300)
        return np.asarray(np.minimum(found, self.freedom[:, None]))


def classical(jacobian: Array, sigma: Array, dof: int) -> Covariance:
    """Of independent points: ``jacobian`` [B, n, p] of whitened residuals, ``sigma`` [B] their standard deviation."""
    inverse, silent = _inverse(jacobian)
    return Covariance(inverse * (sigma**2)[:, None, None], silent, np.full(len(jacobian), float(dof)))


def clustered(jacobian: Array, residual: Array, codes: NDArray[np.intp]) -> Covariance:
    """Of points in clusters ``codes`` [n] = 0 ... G - 1; whitened ``jacobian`` [B, n, p] and ``residual`` [B, n]."""
    inverse, silent = _inverse(jacobian)
    count = int(codes.max()) + 1
    few = count < FEW
    scores, sides = [], []
    for code in range(count):
        at = np.flatnonzero(codes == code)
        own = jacobian[:, at]
        left_over = np.eye(len(at)) - own @ inverse @ np.swapaxes(own, 1, 2)
        adjusted = _power(left_over, -0.5 if few else -1.0)
        side = np.swapaxes(own, 1, 2) @ adjusted  # [B, p, m]
        scores.append((side @ residual[:, at, None])[..., 0])
        if few:
            # the residuals of all points that this cluster's score is made of: (I - H)_g A_g J_g
            own_rows = np.zeros((*jacobian.shape[:2], jacobian.shape[2]))
            back = np.swapaxes(side, 1, 2)
            own_rows[:, at] = back
            sides.append(own_rows - jacobian @ (inverse @ (np.swapaxes(own, 1, 2) @ back)))
    each = np.stack(scores, axis=1)  # [B, G, p]
    meat = np.swapaxes(each, 1, 2) @ each
    if not few:
        matrix = (count - 1) / count * inverse @ meat @ inverse
        return Covariance(matrix, silent, np.full(len(matrix), count - 1.0))
    stacked = np.stack(sides, axis=1) @ inverse[:, None]  # [B, G, n, p]
    loadings = np.einsum("bgnp,bhnq->bghpq", stacked, stacked, optimize=True)
    return Covariance(inverse @ meat @ inverse, silent, np.full(len(meat), count - 1.0), loadings)


def _inverse(jacobian: Array) -> tuple[Array, NDArray[np.bool_]]:
    """(J'J)^-1 [B, p, p], NaN where it is singular; parameters [B, p] that the points say nothing about (rows of 0)."""
    information = np.swapaxes(jacobian, 1, 2) @ jacobian
    diagonal = np.einsum("bpp->bp", information)
    silent = np.asarray(np.logical_not(diagonal > NOTHING * diagonal.max(1, keepdims=True)), np.bool_)
    # scaled to a unit diagonal, a condition number speaks of the design and not of units
    root = np.where(silent, 1.0, np.sqrt(np.maximum(diagonal, 1e-300)))
    scale = root[:, :, None] * root[:, None, :]
    alone = silent[:, :, None] | silent[:, None, :]
    unit = np.where(alone, np.eye(jacobian.shape[2]), information / scale)
    fine = np.asarray(np.isfinite(unit).all((1, 2)), np.bool_)
    unit = np.where(fine[:, None, None], unit, np.eye(jacobian.shape[2]))
    fine &= np.linalg.cond(unit) < SINGULAR
    found = np.linalg.inv(np.where(fine[:, None, None], unit, np.eye(jacobian.shape[2]))) / scale
    found = np.where(alone, 0.0, found)
    return np.where(fine[:, None, None], found, np.nan), silent


def _power(matrix: Array, exponent: float) -> Array:
    """Positive semi-definite matrices [B, m, m] to a negative power.

    NaN where one cluster alone decides a direction: it leaves no residual there, and without that cluster the direction
    could not be fitted at all, so that nothing says how far another cluster would move it.
    """
    fine = np.isfinite(matrix).all((1, 2), keepdims=True)
    values, vectors = np.linalg.eigh(np.where(fine, matrix, np.eye(matrix.shape[1])))
    alone = values < ALONE
    powers = np.where(alone, np.nan, np.where(alone, 1.0, values) ** exponent)
    return np.asarray(np.where(fine, (vectors * powers[:, None]) @ np.swapaxes(vectors, 1, 2), np.nan))
