"""Do the intervals of a fit cover what they say where the engine quotes them, and does it say so where they cannot?"""

from __future__ import annotations

import numpy as np
import pytest

from analysis.coverage import Design, Truth, cell
from analysis.estimate import estimate
from analysis.forms import FORMS

LAW = FORMS["saturating"]
PLAIN = Truth(exponent=0.5, share=0.5, decades=3, noise=0.03)
TRIALS = 600


def told(design, truth, trials=TRIALS):
    return {row["quantity"]: row for row in cell(design, truth, trials, seed=1)}


def batch(y, x, **given):
    return estimate(LAW, x[None, :, None], y, np.ones_like(y), **given)


@pytest.mark.parametrize("n", [5, 6, 8, 12, 24])
def test_intervals_cover_what_they_say(n):
    for row in told(Design("independent", n), PLAIN).values():
        assert 0.92 <= row["covered"] <= 0.98, row
        assert row["identified"] > 0.1


@pytest.mark.parametrize(
    "design", [Design("seeds", 6), Design("tokenizers", 8, 3), Design("tokenizers", 6, 5), Design("checkpoints", 3, 12)]
)
def test_intervals_of_groups_cover_what_they_say(design):
    for row in told(design, Truth(0.5, 0.5, 3, 0.03, 0.05)).values():
        assert 0.915 <= row["covered"] <= 0.985, row


def test_what_cannot_be_known_is_not_called_identified():
    """A small exponent with 20 % noise at five points."""
    for row in told(Design("independent", 5), Truth(0.1, 0.5, 2, 0.2)).values():
        assert row["identified"] < 0.1, row


def test_checkpoints_taken_as_independent_would_cover_far_too_little():
    """Why groups are asked for: the same points, and whose they are not told."""
    x, codes = Design("checkpoints", 4, 8).points(3)
    rng, trials = np.random.default_rng(0), 400
    off = 0.1 * rng.standard_normal((trials, 8))[:, codes] + 0.01 * rng.standard_normal((trials, len(x)))
    y = (x[-1] ** -0.5 + x**-0.5) * np.exp(off)
    shares = {}
    for name, given in (("runs", codes), ("checkpoints", None)):
        held = batch(y, x, codes=given).parameters()
        shares[name] = ((held.low[:, 2] <= 0.5) & (held.high[:, 2] >= 0.5)).mean()
    assert shares["runs"] > 0.92
    assert shares["checkpoints"] < 0.85


@pytest.mark.parametrize("runs", [6, 8, 12, 24])
def test_more_checkpoints_of_the_same_runs_narrow_nothing(runs):
    """The duplicate-checkpoint trap: four correlated checkpoints for one, and no interval more than 5 % narrower."""
    rng, trials = np.random.default_rng(runs), 400
    x = np.geomspace(1, 1000, runs)
    level = (x[-1] ** -0.5 + x**-0.5) * np.exp(0.05 * rng.standard_normal((trials, runs)))
    one = batch(level, x)
    four = batch(
        np.repeat(level, 4, axis=1) * np.exp(0.002 * rng.standard_normal((trials, 4 * runs))),
        np.repeat(x, 4),
        codes=np.repeat(np.arange(runs), 4),
    )
    ahead = np.array([[10_000.0]])
    for ends in (lambda held: held.parameters(), lambda held: held.curve(ahead)):
        before, after = (np.nanmedian(each.high - each.low, axis=0) for each in (ends(one), ends(four)))
        ratio = after / before
        wanted = [0, 2] if len(ratio) > 1 else [0]  # asymptote and exponent; the law ten times beyond
        assert (ratio[wanted] > 0.95).all(), ratio


def test_an_asymptote_at_its_bound_has_an_interval_from_zero_or_a_reason():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 8)
    held = batch(x**-0.3 * np.exp(0.05 * rng.standard_normal((200, 8))), x)
    ends, stopped = held.parameters(), held.theta[:, 0] == 0
    assert 0.3 < stopped.mean() < 0.7
    some = stopped & np.isfinite(ends.low[:, 0])
    assert (ends.low[some, 0] == 0).all()
    assert (ends.high[some, 0] > 0).all()
    none = np.isnan(ends.low[:, 0])
    assert 0 < none.mean() < 0.06  # the data alone would have had it negative
    assert (held.centre[none, 0] < 0).all()
    assert np.isfinite(ends.low[:, 1:]).all()


def test_a_batch_is_its_fits_one_by_one():
    rng = np.random.default_rng(3)
    x = np.geomspace(1, 1000, 7)
    y = (0.02 + x**-0.4) * np.exp(0.05 * rng.standard_normal((5, 7))) * np.geomspace(1e-3, 1e3, 5)[:, None]
    many, ahead = batch(y, x), np.array([[2e3], [1e4]])
    for i in range(5):
        alone = batch(y[i : i + 1], x)
        for one, all_ in zip(alone.parameters(), many.parameters(), strict=True):
            assert one[0] == pytest.approx(all_[i], rel=1e-6, nan_ok=True)
        for one, all_ in zip(alone.curve(ahead), many.take(i).curve(ahead), strict=True):
            assert one[0] == pytest.approx(all_[0], rel=1e-6, nan_ok=True)
