"""What speaks against a fitted law? A shape that the points do not have, points far off, a metric that rises.

Fisher's lack-of-fit test where inputs repeat, the runs test of residuals in the order of one input elsewhere. None of
them can say that a law is right.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from analysis.estimate import Estimate
from analysis.laws import Array
from analysis.resampling import points
from analysis.solver import residual

LEVEL = 0.01  # of a test below which its answer is told
FAR = 6.0  # robust standard deviations of an outlier
LEAST = 8  # points from which residuals have a shape
ROUNDING = 1e-20  # share of a sum of squares that is rounding
MOST = 4000  # cells of the lack-of-fit design: beyond that it is not worth its time


def checkup(found: Estimate, x: Array, y: Array) -> tuple[str, ...]:
    """Notes, one sentence each, on one fit (B = 1) to x [n, d] and y [n] as given."""
    off = residual(found.objective, found.law.value(found.theta, found.x), found.y)[0] * np.sqrt(found.weights[0])
    notes = [] if found.converged[0] else ["the solver did not converge"]
    if x.shape[1] == 1 and len(y) >= 4 and found.law.name in ("power", "saturating"):
        rank = float(stats.spearmanr(x[:, 0], y).statistic)
        if rank > 0:
            notes.append(f"y rises with x (rank correlation {rank:+.2f}), which no law of this form does")
    shape = _lack(found, x, off) or _runs(x, off)
    notes += [shape] if shape else []
    spread = float(stats.median_abs_deviation(off, scale="normal"))
    beyond = np.abs(off - np.median(off)) > FAR * spread
    far = np.flatnonzero(beyond & (len(off) >= LEAST and spread > 0))
    if len(far):
        worst = int(far[np.argmax(np.abs(off[far]))])
        where = ", ".join(f"{value:.4g}" for value in x[worst])
        notes.append(f"{len(far)} of {len(off)} points lie further off than {FAR:g} robust sd, worst at ({where})")
    return tuple(notes)


def lack_of_fit(
    off: Array, place: NDArray[np.intp], codes: NDArray[np.intp], parameters: int, root: Array | float = 1.0
) -> float | None:
    """Probability of residuals ``off`` [n] of a law with so many parameters by scatter alone, by Fisher's F test.

    Groups ``codes`` [n] that lie apart as a whole say nothing about the shape, so each has its own level: the squares
    are split into those about a free value per design point ``place`` [n] (scatter, n - points - groups + 1 degrees of
    freedom) and the rest (lack of fit, points - parameters). ``root``: square roots of weights that are in ``off``.
    None without a degree of freedom for either, and where repeats agree to the last digit.
    """
    count, groups = int(place.max()) + 1, int(codes.max()) + 1
    spare, within = count - parameters, len(off) - count - (groups - 1)
    if spare < 1 or within < 1:
        return None
    scaled = np.broadcast_to(np.asarray(root, np.float64), off.shape)[:, None]
    levels = np.eye(groups)[codes] * scaled
    design = np.column_stack([np.eye(count)[place] * scaled, levels[:, 1:]])
    free = off - design @ np.linalg.lstsq(design, off, rcond=None)[0]
    shifted = off - levels @ np.linalg.lstsq(levels, off, rcond=None)[0] if groups > 1 else off
    scatter = float(free @ free)
    lack = float(shifted @ shifted) - scatter
    if scatter <= ROUNDING * lack:
        return None
    return float(stats.f.sf(max(lack, 0.0) / spare / (scatter / within), spare, within))


def _lack(found: Estimate, x: Array, off: Array) -> str | None:
    place = points(x)
    codes = np.zeros(len(off), np.intp) if found.codes is None else found.codes
    count, groups = int(place.max()) + 1, int(codes.max()) + 1
    if len(off) - count - (groups - 1) < 2 or len(off) * (count + groups) > MOST * 100:
        return None
    p = lack_of_fit(off, place, codes, len(found.law.parameters), np.sqrt(found.weights[0]))
    if p is None or p >= LEVEL:
        return None
    return f"the law misses the means of repeated points by more than their scatter (lack of fit, p = {p:.2g})"


def _runs(x: Array, off: Array) -> str | None:
    """Wald and Wolfowitz: too few changes of sign along the one input."""
    if x.shape[1] > 1 or len(off) < LEAST:
        return None
    signs = off[np.argsort(x[:, 0], kind="stable")] > 0
    above, below = int(signs.sum()), int((~signs).sum())
    if not above or not below:
        return None
    n = above + below
    mean = 2 * above * below / n + 1
    sd = math.sqrt((mean - 1) * (mean - 2) / (n - 1))
    runs = 1 + int((signs[1:] != signs[:-1]).sum())
    p = float(stats.norm.cdf((runs + 0.5 - mean) / sd)) if sd > 0 else 1.0
    return (
        f"residuals keep their sign along x ({runs} runs of {n} points, p = {p:.2g}): another shape"
        if p < LEVEL
        else None
    )
