"""Are covariances those of the textbooks, and do clusters count for what they are worth?"""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm

from analysis.covariance import FEW, clustered
from analysis.coverage import Design
from analysis.estimate import estimate
from analysis.fit import fit
from analysis.forms import FORMS

X = np.geomspace(1, 1000, 12)


def linear(codes=None, seed=0, x=X, spread=0.05):
    """A power law is a straight line in the logarithms: an estimate and the same in statsmodels."""
    y = 3 * x**-0.4 * np.exp(spread * np.random.default_rng(seed).standard_normal(len(x)))
    found = estimate(FORMS["power"], x[None, :, None], y[None], np.ones((1, len(x))), codes=codes)
    design = sm.add_constant(np.log(x / found.pivots[0, 0]))
    return found, sm.OLS(np.log(y / found.scale[0]), design).fit()


def test_independent_points_have_the_covariance_of_ordinary_least_squares():
    found, ols = linear()
    assert found.covariance.matrix[0] * np.outer([1, -1], [1, -1]) == pytest.approx(ols.cov_params(), rel=1e-6)
    assert found.dof == ols.df_resid
    limits = found.parameters()
    assert [limits.low[0, 1], limits.high[0, 1]] == pytest.approx(sorted(-ols.conf_int()[1]), rel=1e-6)


@pytest.mark.parametrize(("count", "name"), [(6, "HC2"), (12, "HC3")])
def test_clusters_of_one_point_are_the_known_corrections(count, name):
    """CR2 of singletons is HC2, CR3 is HC3 but for the jackknife's factor."""
    assert (count < FEW) == (name == "HC2")
    found, ols = linear(x=np.geomspace(1, 1000, count))
    value = found.law.value(found.theta, found.x)
    gradient = np.swapaxes(found.law.jacobian(found.theta, found.x), 1, 2) / value[..., None]
    held = clustered(gradient, np.log(found.y / value), np.arange(count))
    factor = 1.0 if name == "HC2" else (count - 1) / count
    expected = factor * getattr(ols, f"cov_{name}")
    assert held.matrix[0] * np.outer([1, -1], [1, -1]) == pytest.approx(expected, rel=1e-5)


def test_clusters_that_are_alike_count_as_one_point_each():
    """Tokenizers with the same budgets: the standard error of the mean of their own slopes, seeds - 1 dof."""
    x, codes = np.tile(X[::3], 3), np.repeat(np.arange(3), 4)
    found, _ = linear(codes, x=x, spread=0.2)
    own = [np.polyfit(np.log(x[codes == k]), np.log(found.y[0, codes == k]), 1)[0] for k in range(3)]
    slope = np.array([[[0.0, 1.0]]])
    assert found.covariance.error(slope)[0, 0] == pytest.approx(np.std(own, ddof=1) / np.sqrt(3), rel=1e-6)
    assert found.covariance.dof(slope)[0, 0] == pytest.approx(2)


@pytest.mark.parametrize(
    ("form", "x", "groups"),
    [
        ("power", [1, 1.1, 1.2, 100, 110, 120], [0, 0, 0, 1, 1, 1]),  # the slope rests on two runs
        ("power", [1, 1.01, 1.02, *np.geomspace(500, 1000, 15)], [0] * 3 + [k // 3 for k in range(3, 18)]),
        ("saturating", *Design("checkpoints", 8, 3).points(3)),  # three parameters, three runs
    ],
)
def test_what_one_cluster_alone_decides_has_no_error(form, x, groups):
    """The fit passes through that cluster, whose shift no residual shows: CR2 covered 35 % there."""
    y = 3 * np.asarray(x) ** -0.8 * np.exp(0.1 * np.random.default_rng(0).standard_normal(4)[np.array(groups) % 4])
    found = fit(x, y * np.exp(0.02 * np.random.default_rng(1).standard_normal(len(x))), form, groups=groups)
    assert "or not without one of the groups" in found.reason
    assert found.conf_int().isna().all(axis=None)
    assert not any(found.identified.values())


def test_parameters_that_points_say_nothing_about_have_no_error():
    gradient = np.zeros((1, 6, 3))
    gradient[0, :, 0] = 1.0
    gradient[0, :, 1] = np.arange(6)
    residual = np.random.default_rng(0).standard_normal((1, 6))
    held = clustered(gradient, residual, np.array([0, 0, 1, 1, 2, 2]))
    errors = held.error(np.eye(3)[None])[0]
    assert np.isfinite(errors[:2]).all()
    assert np.isnan(errors[2])
    gradient[0, :, 2] = 2 * gradient[0, :, 1]  # and two that cannot be told apart leave none at all
    assert np.isnan(clustered(gradient, residual, np.arange(6)).matrix).all()
