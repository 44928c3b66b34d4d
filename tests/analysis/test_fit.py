"""Does the solver find the law that made the points, in any units, and refuse what it cannot fit?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, least_squares

from analysis.fit import compare, fit
from analysis.forms import FORMS
from analysis.refusal import Refusal
from analysis.result import Fit
from analysis.solver import solve

X = np.geomspace(1e9, 1e11, 6)


def noisy(seed, sd=0.05, asymptote=2.0, exponent=0.5, x=X):
    rng = np.random.default_rng(seed)
    return (asymptote + 10 * (x / x[0]) ** -exponent) * np.exp(sd * rng.standard_normal(len(x)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    asymptote=st.floats(0.05, 50),
    amplitude=st.floats(1, 100),
    exponent=st.floats(0.1, 1.5),
    decades=st.floats(1.5, 4),
    start=st.floats(-2, 20),
)
def test_noise_free_laws_are_recovered(asymptote, amplitude, exponent, decades, start):
    x = 10**start * np.geomspace(1, 10**decades, 8)
    found = fit(x, asymptote + amplitude * (x / x[0]) ** -exponent)
    assert found.converged
    assert found.params["E"] == pytest.approx(asymptote, rel=1e-6)
    assert found.params["A"] == pytest.approx(amplitude * x[0] ** exponent, rel=1e-6)
    assert found.params["a"] == pytest.approx(exponent, rel=1e-6)


def test_a_pure_power_law_has_no_asymptote():
    found = fit(X, 1e4 * X**-0.3)
    assert found.params["E"] == pytest.approx(0, abs=1e-6 * found.y[-1])
    power = fit(X, 1e4 * X**-0.3, "power")
    assert power.params == pytest.approx({"A": 1e4, "a": 0.3}, rel=1e-9)


@pytest.mark.parametrize("residuals", ["log", "raw"])
def test_units_change_nothing(residuals):
    y = noisy(0)
    one, other = fit(X, y, residuals=residuals), fit(X / 1e6, y * 1e3, residuals=residuals)
    assert other.params["a"] == pytest.approx(one.params["a"], rel=1e-9)
    assert other.params["E"] == pytest.approx(1e3 * one.params["E"], rel=1e-9)
    assert other.bse["a"] == pytest.approx(one.bse["a"], rel=1e-6)
    assert other.predict([1e5])[0] == pytest.approx(1e3 * one.predict([1e11])[0], rel=1e-9)


@pytest.mark.parametrize("form", ["power", "saturating"])
def test_jacobians_are_derivatives(form):
    law = FORMS[form]
    theta = np.array([0.3, -0.2, 0.7])[-len(law.parameters) :]
    at = np.array([[[2.0]]])

    def value(t):
        return float(law.value(t[None], at)[0, 0])

    def slope(t):
        return law.jacobian(t[None], at)[0, :, 0]

    assert check_grad(value, slope, theta) < 1e-6

    def natural(t, i):
        return float(law.natural(t[None], np.array([3.0]), 2.0)[0][0, i])

    for i in range(len(theta)):
        jacobian = law.natural(theta[None], np.array([3.0]), 2.0)[1][0]
        assert check_grad(natural, lambda t, i, j=jacobian: j[i], theta, i) < 1e-6


def test_the_batch_finds_the_global_optimum():
    law, count = FORMS["saturating"], 60
    rng = np.random.default_rng(1)
    x = np.repeat(np.geomspace(0.1, 10, 6)[None, :, None], count, 0)
    y = (0.2 + 0.8 * x[..., 0] ** -0.4) * np.exp(0.15 * rng.standard_normal((count, 6)))
    _, cost, converged = solve(law, x, y, np.ones_like(y))
    assert converged.all()
    for i in range(count):

        def residual(t, i=i):
            return np.log(y[i]) - np.log(t[0] + np.exp(t[1] - t[2] * np.log(x[i, :, 0])))

        starts = [(0.1, -0.5, 0.5), (0.5, -1, 1), (0.01, 0, 0.2), (0.7, -3, 3)]
        best = min(2 * least_squares(residual, s, bounds=(law.lower, law.upper), gtol=1e-12).cost for s in starts)
        assert cost[i] <= best * (1 + 1e-6)


def test_a_weight_of_zero_leaves_a_point_out():
    y = noisy(2)
    spoiled = np.append(y, 1e6)
    weights = np.append(np.ones(6), 0.0)
    held = solve(FORMS["saturating"], np.append(X, 2e11)[None, :, None] / 1e10, spoiled[None] / 5, weights[None])[0]
    alone = solve(FORMS["saturating"], X[None, :, None] / 1e10, y[None] / 5, np.ones((1, 6)))[0]
    assert held == pytest.approx(alone, rel=1e-9)


def test_bounds_are_reported_and_one_sided():
    found = fit(X, 1e4 * X**-0.3 * np.exp(0.02 * np.array([1, -1, 0, 0, 1, -1.5])))
    assert found.at_bound == {"E": "lower"}
    limits = found.conf_int()
    assert limits.loc["E", "lower"] == 0.0
    assert limits.loc["E", "upper"] > 0


def test_the_result_is_round_tripped_and_complete():
    found = fit(X, noisy(3), groups=["s0", "s1"] * 3, output="gFID", inputs=("FLOPs",), selection="all")
    again = Fit.from_json(found.to_json())
    assert again == found
    assert again.predict(X) == pytest.approx(found.predict(X))
    refitted = fit(found.x, found.y, found.form, groups=found.groups)
    assert refitted.params == pytest.approx(found.params)
    assert "gFID" in found.summary()
    assert "in 2 groups" in found.summary()


def test_intervals_are_named_and_never_of_zero_width():
    independent = fit(X, noisy(4))
    assert "independent" in independent.interval_method
    assert independent.dof == 3
    exact = fit(X[:4], noisy(4)[:4], groups=[0, 0, 0, 0])
    assert "given one group" in exact.interval_method
    assert exact.bse == {"E": None, "A": None, "a": None}
    assert "not independent" in (exact.reason or "")
    assert fit(X, noisy(4), groups=[0] * 6).conf_int().isna().all(axis=None)
    y = noisy(5)
    same = fit(np.tile(X, 2), np.tile(y, 2), groups=[0] * 6 + [1] * 6)
    assert same.bse == {"E": None, "A": None, "a": None}
    assert "agree" in (same.reason or "")
    assert same.conf_int().isna().all(axis=None)
    assert same.get_prediction(X).summary_frame()["mean_ci_lower"].isna().all()


def test_more_checkpoints_of_the_same_runs_do_not_narrow():
    rng = np.random.default_rng(6)
    runs = np.repeat(np.arange(6), 6)
    y = np.concatenate([noisy(s, 0.01) * np.exp(0.1 * rng.standard_normal()) for s in range(6)])
    once = fit(np.tile(X, 6), y, groups=runs)
    thrice = fit(np.tile(X, 18), np.tile(y, 3), groups=np.tile(runs, 3))
    errors = [each.get_prediction([1e10]).se_log[0] for each in (once, thrice, fit(np.tile(X, 18), np.tile(y, 3)))]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert errors[2] < 0.5 * errors[0]  # what taking checkpoints as independent would claim


def test_forms_are_compared_on_the_same_points():
    x = np.geomspace(1e9, 1e12, 12)
    y = noisy(7, 0.02, x=x)
    table = compare([fit(x, y), fit(x, y, "power")])
    assert table["form"].tolist() == ["saturating", "power"]
    assert table["delta"].tolist()[0] == 0
    assert fit(X[:4], noisy(7)[:4]).aicc is None
    with pytest.raises(Refusal, match="same points"):
        compare([fit(x, y), fit(X, noisy(7), "power")])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"x": [], "y": []}, "too_few"),
        ({"x": X[:3], "y": [3.0, 2.0, 1.0]}, "too_few"),
        ({"x": np.repeat(X[:3], 4), "y": np.ones(12)}, "too_few"),
        ({"y": [3.0, 2.0, 1.0, 0.0, 1.0, 1.0]}, "non_positive"),
        ({"y": [3.0, 2.0, 1.0, math.nan, 1.0, 1.0]}, "not_finite"),
        ({"protocols": ["a"] * 5 + ["b"]}, "mixed_protocols"),
        ({"ids": list("abcdea")}, "duplicate_run"),
    ],
)
def test_refusals_are_typed(change, code):
    with pytest.raises(Refusal) as refusal:
        fit(**{"x": X, "y": noisy(8), **change})
    assert refusal.value.code == code
    assert refusal.value.sentence
