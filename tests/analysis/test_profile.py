"""Is a profile interval the set of values that the F test allows?"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import least_squares

from analysis.fit import fit

X = np.geomspace(1e9, 1e12, 9)


def noisy(seed, sd=0.05, x=X):
    return (2 + 10 * (x / x[0]) ** -0.5) * np.exp(sd * np.random.default_rng(seed).standard_normal(len(x)))


def test_a_straight_line_has_the_interval_of_students_t():
    """A power law is one in the logarithms, and F(1, dof) is t squared."""
    y = 5e4 * X**-0.3 * np.exp(0.05 * np.random.default_rng(0).standard_normal(9))
    plain, held = fit(X, y, "power"), fit(X, y, "power", interval="profile")
    for name in ("A", "a"):
        one, other = plain.intervals()[name], held.intervals()[name]
        assert [other.low, other.high] == pytest.approx([one.low, one.high], rel=1e-6)


@pytest.mark.parametrize(("name", "index"), [("E", 0), ("A", 1), ("a", 2)])
def test_the_ends_are_where_the_best_fit_that_holds_them_is_just_allowed(name, index):
    y = noisy(1)
    held = fit(X, y, interval="profile")
    allowed = held.objective * (1 + stats.f.ppf(0.95, 1, held.dof) / held.dof)
    best = [held.params["E"], np.log(held.params["A"]), held.params["a"]]
    interval = held.intervals()[name]
    for end in (interval.low, interval.high):
        fixed = np.log(end) if name == "A" else end

        def off(free, fixed=fixed):
            e, log, a = np.insert(free, index, fixed)
            return np.log(y) - np.log(max(e, 1e-12) + np.exp(log - a * np.log(X)))

        start = np.delete(best, index)
        cost = 2 * least_squares(off, start, x_scale=np.maximum(np.abs(start), 0.1), xtol=1e-14, ftol=1e-14).cost
        assert cost == pytest.approx(allowed, rel=1e-4)


def test_an_end_that_nothing_limits_is_missing_and_zero_is_a_limit():
    """Three decades of noise in the exponent: large ones are not ruled out."""
    y = np.array([9.0, 3.1, 3.0, 2.9, 3.05, 3.0])
    held = fit(np.geomspace(1, 1e5, 6), y, interval="profile").intervals()
    assert held["a"].high is None
    assert "any value up to the bound" in held["a"].reason
    falling = fit(X, 5e4 * X**-0.3 * np.exp(0.05 * np.random.default_rng(0).standard_normal(9)), interval="profile")
    assert falling.intervals()["E"].low == 0.0
