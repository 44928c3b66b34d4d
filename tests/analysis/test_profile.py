"""Is a profile interval the set of values that the F test allows?"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import least_squares

from analysis.fit import fit
from analysis.forms import FORMS
from analysis.refusal import Refusal
from analysis.solver import solve

X = np.geomspace(1e9, 1e12, 9)


def noisy(seed, sd=0.05, x=X):
    return (2 + 10 * (x / x[0]) ** -0.5) * np.exp(sd * np.random.default_rng(seed).standard_normal(len(x)))


def test_a_straight_line_has_the_interval_of_students_t():
    """A power law is one in the logarithms, and F(1, dof) is t squared."""
    y = 5e4 * X**-0.3 * np.exp(0.05 * np.random.default_rng(0).standard_normal(9))
    plain, held = fit(X, y, "power"), fit(X, y, "power", interval="profile")
    one, other = plain.intervals()["a"], held.intervals()["a"]
    assert [other.low, other.high] == pytest.approx([one.low, one.high], rel=1e-6)
    assert "no profile" in held.intervals()["A"].reason


@pytest.mark.parametrize(("name", "index"), [("E", 0), ("a", 2)])
def test_the_ends_are_where_the_best_fit_that_holds_them_is_just_allowed(name, index):
    y = noisy(1)
    held = fit(X, y, interval="profile")
    allowed = held.objective * (1 + stats.f.ppf(0.95, 1, held.dof) / held.dof)
    best = [held.params["E"], np.log(held.params["A"]), held.params["a"]]
    interval = held.intervals()[name]
    for end in (interval.low, interval.high):

        def off(free, fixed=end):
            e, log, a = np.insert(free, index, fixed)
            return np.log(y) - np.log(max(e, 1e-12) + np.exp(log - a * np.log(X)))

        start = np.delete(best, index)
        cost = 2 * least_squares(off, start, x_scale=np.maximum(np.abs(start), 0.1), xtol=1e-14, ftol=1e-14).cost
        assert cost == pytest.approx(allowed, rel=1e-4)


def test_an_end_that_nothing_limits_is_missing_and_zero_is_a_limit():
    """Three decades of noise in the exponent: large ones are not ruled out."""
    y = np.array([9.0, 3.3, 2.7, 3.2, 2.8, 3.1])
    held = fit(np.geomspace(1, 1e5, 6), y, interval="profile").intervals()
    assert held["a"].high is None
    assert "any value up to the bound" in held["a"].reason
    falling = fit(X, 5e4 * X**-0.3 * np.exp(0.05 * np.random.default_rng(0).standard_normal(9)), interval="profile")
    assert falling.intervals()["E"].low == 0.0


@pytest.mark.parametrize("unit", [1e-12, 1e6, 1e18])
def test_units_change_nothing(unit):
    x = np.geomspace(1, 1e3, 10)
    y = (0.3 + x**-0.4) * np.exp(0.1 * np.random.default_rng(0).standard_normal(10))
    one, other = (fit(x * scale, y, interval="profile").intervals() for scale in (1.0, unit))
    for name in ("E", "a"):
        for end in ("low", "high"):
            assert getattr(other[name], end) == pytest.approx(getattr(one[name], end), rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_surface_has_the_profile_that_a_stepped_search_finds(seed):
    """Chinchilla's form: just inside the ends a refit is allowed, just outside it is not."""
    rng = np.random.default_rng(seed)
    x = np.exp(rng.uniform(np.log([1e7, 1e9]), np.log([1e10, 1e12]), (40, 2)))
    y = (1.7 + 400 * x[:, 0] ** -0.34 + 410 * x[:, 1] ** -0.28) * np.exp(0.03 * rng.standard_normal(40))
    found = fit(x, y, "chinchilla", interval="profile")
    held, law = found.estimate, found.estimate.law
    allowed = float(held.cost[0]) * (1 + stats.f.ppf(0.95, 1, found.dof) / found.dof)
    for name in ("a", "b"):
        place, each = law.parameters.index(name), found.intervals()[name]
        for end, out in ((each.low, -1), (each.high, 1)):
            if end is None:
                continue
            assert (end - each.estimate) * out > 0
            for shift, inside in ((-0.02, True), (0.02, False)):
                at = end + out * shift * abs(end - each.estimate)
                lower, upper = law.lower.copy(), law.upper.copy()
                lower[place] = upper[place] = at
                starts = law.starts(held.x, held.y, held.weights, 4)[0]
                costs = [
                    solve(law, held.x, held.y, held.weights, held.objective, start=start, limits=(lower, upper)).cost[0]
                    for start in [*starts, held.theta[0]]
                ]
                assert bool(min(costs) <= allowed) == inside


@pytest.mark.parametrize("form", ["interaction", "broken", "parabola", "tradeoff_slope"])
def test_forms_whose_parameters_are_no_coordinates_are_refused(form):
    inputs = len(FORMS[form].inputs)
    x = np.exp(np.random.default_rng(0).uniform(2, 6, (30, inputs)))
    with pytest.raises(Refusal, match="no coordinates") as refusal:
        fit(x, 1 + x.prod(1) ** -0.3, form, interval="profile")
    assert refusal.value.code == "unsuited"
