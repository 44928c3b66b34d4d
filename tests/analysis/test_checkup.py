"""Is what speaks against a law said, and nothing where nothing does?"""

from __future__ import annotations

import numpy as np
import pytest

from analysis.fit import fit

X = np.geomspace(1e9, 1e12, 24)


def noisy(x=X, sd=0.03, seed=0):
    return (2 + 10 * (x / 1e9) ** -0.5) * np.exp(sd * np.random.default_rng(seed).standard_normal(len(x)))


def test_a_law_that_holds_has_no_notes():
    told = [fit(X, noisy(seed=seed)).notes for seed in range(60)]
    assert sum(bool(notes) for notes in told) <= 3  # tests at 1 %
    seeds = [fit(np.repeat(X[::4], 3), noisy(np.repeat(X[::4], 3), seed=seed)).notes for seed in range(60)]
    assert sum(bool(notes) for notes in seeds) <= 3


def test_a_shape_that_points_do_not_have_is_said():
    """A power law through a curve that levels off: signs of residuals come in runs; with repeats, lack of fit."""
    assert any("another shape" in note for note in fit(X, noisy(), "power").notes)
    x = np.repeat(np.geomspace(1e9, 1e12, 6), 3)
    (note,) = fit(x, noisy(x), "power").notes
    assert "lack of fit" in note
    # seeds that lie apart as a whole are no lack of fit, and do not hide one
    level = np.exp(0.3 * np.tile([-1.0, 0.0, 1.0], 6))
    groups = np.tile(np.arange(3), 6)
    assert fit(x, noisy(x) * level, groups=groups).notes == ()
    assert "lack of fit" in fit(x, noisy(x) * level, "power", groups=groups).notes[0]


def test_points_far_off_and_metrics_that_rise_are_said():
    y = noisy()
    y[5] *= 2
    assert any("1 of 24 points lie further off" in note and f"{X[5]:.4g}" in note for note in fit(X, y).notes)
    rising = fit(X, 1 / noisy())
    assert rising.notes[0].startswith("y rises with x (rank correlation +")
    assert "  note: y rises with x" in rising.summary()
    assert rising.to_dict()["notes"] == list(rising.notes)


@pytest.mark.parametrize("form", ["power", "saturating"])
def test_few_points_say_nothing_about_shape(form):
    assert fit(X[:5], noisy()[:5], form).notes == ()
