"""Does the solver find the law that made the points, in any units, and refuse what it cannot fit?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, least_squares

from analysis.fit import compare, fit, fit_each
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


def surface(form, truth, at):
    """Noise-free points of a law with parameters in the units of x."""
    law = FORMS[form]
    theta = np.array([[math.log(truth[name]) if name in law.positive else truth[name] for name in law.parameters]])
    return law.value(theta, at[None])[0]


SIZES, DATA = np.geomspace(1e6, 1e9, 5), np.geomspace(1e8, 1e11, 5)
GRID_ND = np.stack(np.meshgrid(SIZES, DATA), axis=-1).reshape(-1, 2)
BITS, FLOPS = np.array([16.0, 32.0, 64.0, 128.0, 256.0]), np.geomspace(1e15, 1e19, 6)
GRID_RC = np.stack(np.meshgrid(BITS, FLOPS), axis=-1).reshape(-1, 2)
EXPONENTS = st.floats(0.15, 0.8)


@settings(max_examples=40)
@given(e=st.floats(0.5, 5), a=EXPONENTS, b=EXPONENTS, first=st.floats(0.3, 3), second=st.floats(0.3, 3))
def test_noise_free_surfaces_over_size_and_data_are_recovered(e, a, b, first, second):
    truth = {"E": e, "A": first * 1e7**a, "B": second * 1e9**b, "a": a, "b": b}
    found = fit(GRID_ND, surface("chinchilla", truth, GRID_ND), "chinchilla")
    assert found.params == pytest.approx(truth, rel=1e-6)
    over = truth | {"B": second * 20**a}
    del over["b"]
    at = np.stack([GRID_ND[:, 0], GRID_ND[:, 1] / GRID_ND[:, 0]], axis=-1)
    assert fit(at, surface("overtraining", over, at), "overtraining").params == pytest.approx(over, rel=1e-6)


@settings(max_examples=40)
@given(f=EXPONENTS, r=st.floats(0.1, 0.8), a=st.floats(0.1, 0.5), first=st.floats(1, 10), second=st.floats(0.5, 5))
def test_noise_free_tradeoffs_are_recovered(f, r, a, first, second):
    truth = {"F": first * 64**f, "A": second * 64**-r * 1e17**a, "f": f, "r": r, "a": a}
    found = fit(GRID_RC, surface("tradeoff", truth, GRID_RC), "tradeoff")
    assert found.params == pytest.approx(truth, rel=1e-6)
    level = {"E": first, "A": truth["A"], "r": r, "a": a}
    found = fit(GRID_RC, surface("tradeoff_offset", level, GRID_RC), "tradeoff_offset")
    assert found.params == pytest.approx(level, rel=1e-6)


def test_many_curves_at_once_are_fits_one_by_one():
    lengths = [6, 8, 6, 3, 12]
    curves = [
        (np.geomspace(1e9, 1e12, n) * (i + 1), noisy(i, x=np.geomspace(1e9, 1e12, n))) for i, n in enumerate(lengths)
    ]
    for (x, y), found in zip(curves, fit_each(curves), strict=True):
        if len(x) == 3:
            assert isinstance(found, Refusal)
            assert found.code == "too_few"
            continue
        alone = fit(x, y)
        assert found.params == pytest.approx(alone.params, rel=1e-7)
        assert found.conf_int().to_numpy() == pytest.approx(alone.conf_int().to_numpy(), rel=1e-5)
        assert found.aicc == pytest.approx(alone.aicc, nan_ok=True) if alone.aicc else found.aicc is None


def test_other_losses_have_a_bootstrap_or_a_reason():
    x = np.geomspace(1e9, 1e12, 14)
    held = fit(x, noisy(1, x=x), loss="huber", delta=0.01)
    assert "bootstrap of rows, taken as independent, 1000 draws, seed 0" in held.interval_method
    assert held.identified["a"]
    assert held.get_prediction([1e13]).identified == [True]
    few = fit(X, noisy(1), loss="absolute")
    assert few.conf_int().isna().all(axis=None)
    assert "needs 12 independent units" in few.reason
    assert few.bse == {"E": None, "A": None, "a": None}
    runs = fit(np.tile(x, 2), np.tile(noisy(1, x=x), 2), loss="huber", delta=0.01, groups=np.tile(np.arange(14), 2))
    assert "bootstrap of 14 groups" in runs.interval_method
    with pytest.raises(ValueError, match="Huber's loss has a delta"):
        fit(X, noisy(0), loss="huber")
    again = Fit.from_json(held.to_json())
    assert again == held
    assert again.intervals() == held.intervals()


def test_a_dense_table_has_as_many_points_as_it_has():
    """A thousand budgets over four decades lie within 1 % of their neighbours, and are not one."""
    x = np.geomspace(1e16, 1e20, 3000)
    found = fit(x, noisy(0, x=x))
    assert found.n == 3000
    assert found.params["a"] == pytest.approx(0.5, abs=0.05)


def test_rows_of_no_weight_are_no_points_and_no_groups():
    x, runs = np.tile(X, 3), np.repeat([0, 1, 2], 6)
    y = np.concatenate([noisy(seed) for seed in range(3)])
    held = fit(x, y, weights=(runs > 0) * 1.0, groups=runs)
    alone = fit(x[6:], y[6:], groups=runs[6:])
    assert held == alone
    assert (held.n, held.n_groups, held.dof) == (12, 2, 1)


@pytest.mark.parametrize("unit", [1e-250, 1e-100, 1e100, 1e250])
@pytest.mark.parametrize("groups", [None, np.tile([0, 1], 6)], ids=["independent", "grouped"])
def test_extreme_units_change_nothing(unit, groups):
    x = np.geomspace(1e9, 1e12, 12)
    one, other = (fit(x, noisy(1, x=x) * scale, groups=groups) for scale in (1.0, unit))
    for name, times in (("E", unit), ("a", 1.0)):
        assert np.array(other.conf_int().loc[name]) == pytest.approx(
            np.array(one.conf_int().loc[name]) * times, rel=1e-6
        )
    assert other.identified == one.identified
    if not 1e-140 < unit < 1e140:
        with pytest.raises(Refusal, match="leave the floats"):
            fit(x, noisy(1, x=x) * unit, residuals="raw")


def test_a_doubt_says_why():
    """Points that fall faster than E >= 0 allows: no interval of E, and nothing of that law is quoted."""
    x = np.geomspace(1e9, 1e12, 12)
    steep = 100 * (x / 1e9) ** -0.3 - 11
    found = fit(x, steep * np.exp(0.002 * np.random.default_rng(0).standard_normal(12)))
    assert found.at_bound["E"] == "lower"
    assert "fall faster" in found.doubts["E"]
    assert found.doubts["a"] == "the points would have E below 0"
    assert not any(found.identified.values())
    assert found.get_prediction([1e13]).identified == [False]
    assert "not identified: the points would have E below 0" in found.summary()
    wide = fit(X, noisy(0, 0.15))
    assert wide.doubts["a"] == "known to no better than a third of it"
    assert fit(x, noisy(0, 0.01, x=x)).doubts == {}
    few = fit(X, noisy(4), interval="rows")
    assert few.doubts["a"] == "percentiles of fewer than 12 units"
    runs = np.repeat(np.arange(4), 5)
    checkpoints = (X[:4, None] * np.array([0.2, 0.4, 0.6, 0.8, 1.0])).ravel()
    assert "groups that are not alike" in fit(checkpoints, noisy(5, 0.005, x=checkpoints), groups=runs).doubts["E"]


def test_known_errors_are_weights():
    """Points ten times as uncertain count a hundredth; the common scale of the errors changes nothing."""
    x = np.geomspace(1e9, 1e12, 8)
    error = np.array([0.01, 0.3, 0.01, 0.01, 0.3, 0.01, 0.01, 0.01])
    y = noisy(0, 0.001, x=x) * np.exp(np.where(error > 0.1, 0.4, 0))
    held = fit(x, y, weights=error**-2)
    assert held.params["a"] == pytest.approx(0.5, abs=0.02)
    assert fit(x, y).params["a"] != pytest.approx(0.5, abs=0.05)
    same = fit(x, y, weights=(10 * error) ** -2)
    assert same.params == pytest.approx(held.params, rel=1e-9)
    assert same.bse == pytest.approx(held.bse, rel=1e-6)
    assert same.sigma == pytest.approx(held.sigma)
    one, other = (each.get_prediction([1e13]).summary_frame() for each in (held, same))
    assert one.to_numpy() == pytest.approx(other.to_numpy(), rel=1e-6)


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
        ({"y": [3.0, 2.0, 1.0, math.inf, 1.0, 1.0]}, "overflow"),
        ({"x": np.full(6, 1e9)}, "constant"),
        ({"x": np.stack([X, 20 * X], axis=-1), "form": "chinchilla"}, "collinear"),
        ({"x": np.array([4, 5, 6, 7, 8, 9]) * 10**18 * 6}, "non_positive"),
        ({"weights": [1, 1, 1, -1, 1, 1]}, "non_positive"),
        ({"interval": "groups"}, "too_few"),
    ],
)
def test_refusals_are_typed(change, code):
    with pytest.raises(Refusal) as refusal:
        fit(**{"x": X, "y": noisy(8), **change})
    assert refusal.value.code == code
    assert refusal.value.sentence
