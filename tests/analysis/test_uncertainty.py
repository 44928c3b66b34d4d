"""Do intervals cover what they say, and are there none where nothing is known?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.fit import fit
from analysis.refusal import Refusal
from analysis.uncertainty import (
    Interval,
    delta,
    hierarchical,
    inflation,
    paired,
    parametric_t,
    resample_units,
    short,
    spearman,
    spread,
    student,
    wider,
)

X = np.geomspace(1e9, 1e11, 6)


def curve(seed, n=6, sd=0.03):
    rng = np.random.default_rng(seed)
    x = np.geomspace(1, 100, n)
    return x, (2 + 10 * x**-0.5) * np.exp(sd * rng.standard_normal(n))


def test_student_says_why_there_is_no_interval():
    assert student(1.0, 0.1, 2, "m").low == pytest.approx(1 - 0.4303, abs=1e-3)
    assert student(1.0, 0.1, 0, "m").reason == "no degree of freedom is left"
    assert student(1.0, 0.0, 3, "m").low is None
    assert student(1.0, None, 3, "m").reason == "no standard error"
    assert student(0.1, 0.1, 2, "m", floor=0.0).low == 0.0


@pytest.mark.parametrize(
    ("low", "high", "kind", "told"),
    [(1.0, 2.9, "ratio", True), (1.0, 3.1, "ratio", False), (0.9, 1.15, "share", True), (0.9, 1.25, "share", False)],
)
def test_wide_estimates_are_not_identified(low, high, kind, told):
    assert Interval(1.0, low, high, 0.95, "m").identified(kind) is told
    assert not Interval(1.0, None, None, 0.95, "m", reason="none").identified(kind)


def test_parametric_t_agrees_with_delta_where_both_hold():
    found = fit(*curve(0, 12))
    one, other = parametric_t(found, 2000)["a"], delta(found)["a"]
    assert one.low == pytest.approx(other.low, abs=0.25 * (other.high - other.low))
    assert one.high == pytest.approx(other.high, abs=0.25 * (other.high - other.low))
    grouped = fit(np.tile(X, 2), np.concatenate([curve(1)[1], curve(2)[1]]), groups=[0] * 6 + [1] * 6)
    for held in (grouped, fit(X, curve(1)[1], groups=[0] * 6)):
        with pytest.raises(Refusal, match="groups"):
            parametric_t(held)


@pytest.mark.parametrize("units", [2, 3, 8])
def test_hierarchical_is_student_for_a_mean(units):
    values = np.random.default_rng(0).normal(5, 1, units)
    picked = resample_units(units, 40_000, np.random.default_rng(1))
    found = hierarchical(float(values.mean()), values[picked].mean(1), units)
    expected = student(float(values.mean()), float(values.std(ddof=1) / np.sqrt(units)), units - 1, "")
    assert found.low == pytest.approx(expected.low, abs=0.03 * (expected.high - expected.low))
    assert found.dof == units - 1
    assert inflation(2) == pytest.approx(np.sqrt(2))


def test_one_seed_says_nothing_about_another():
    assert hierarchical(1.0, np.ones(10), 1).reason == "one tokenizer seed says nothing about another"
    within = hierarchical(1.0, np.ones(10), 1, over="generator seeds given one tokenizer")
    assert within.low is None
    assert "one generator seed" in within.reason
    with pytest.raises(Refusal) as refusal:
        paired([0.1])
    assert refusal.value.code == "one_upstream_seed"


def test_the_wider_interval_is_the_hull():
    over, given = Interval(1.0, 0.9, 1.1, 0.95, "over"), Interval(1.0, 0.8, 1.05, 0.95, "given")
    assert (wider(over, given).low, wider(over, given).high) == (0.8, 1.1)
    nothing = Interval(1.0, None, None, 0.95, "given", reason="no")
    assert wider(over, nothing) is over
    assert wider(nothing, over) is nothing


def test_the_spread_of_tokenizer_seeds_is_found():
    rng = np.random.default_rng(0)
    rows = []
    for rate in range(30):
        for seed in range(3):
            shift = 0.2 * rng.standard_normal()
            for cell in range(8):
                noise = 0.03 * rng.standard_normal()
                rows.append((str(rate), str(cell), seed, np.exp(rate / 9 - cell / 4 + shift + noise)))
    found = spread(pd.DataFrame(rows, columns=["rate", "cell", "seed", "value"]))
    assert found["dof"] == 60
    assert found["low"] < 0.2 < found["high"]
    assert found["sd_rest"] == pytest.approx(0.03, rel=0.1)
    with pytest.raises(Refusal, match="two seeds"):
        spread(pd.DataFrame(rows[:8], columns=["rate", "cell", "seed", "value"]))


def test_rank_agreement_counts_tokenizers_not_points():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(60)
    b = a + 0.5 * rng.standard_normal(60)
    units = [str(i // 10) for i in range(60)]
    found, n = spearman(a, b, units)
    assert n == 60
    assert found.dof == 5
    assert found.low < found.estimate < found.high < 1
    perfect, _ = spearman(a, 2 * a, units)
    assert perfect.estimate == pytest.approx(1)
    assert perfect.low is None
    with pytest.raises(Refusal):
        spearman([1, 2], [1, 2], ["a", "b"])


@pytest.mark.parametrize(("value", "text"), [(3e9, "3e9"), (0.5412, "0.541"), (12.61, "12.6"), (1234.5, "1,234")])
def test_numbers_are_short(value, text):
    assert short(value) == text


@pytest.mark.slow
def test_delta_t_covers_at_six_points():
    covered = {"E": 0, "a": 0, "ahead": 0}
    trials = 2000
    for seed in range(trials):
        found = fit(*curve(seed))
        limits = found.conf_int()
        covered["E"] += limits.loc["E", "lower"] <= 2 <= limits.loc["E", "upper"]
        covered["a"] += limits.loc["a", "lower"] <= 0.5 <= limits.loc["a", "upper"]
        ahead = found.get_prediction([1000.0]).summary_frame().iloc[0]
        covered["ahead"] += ahead["mean_ci_lower"] <= 2 + 10 * 1000**-0.5 <= ahead["mean_ci_upper"]
    shares = {name: count / trials for name, count in covered.items()}
    assert all(0.92 <= share <= 0.985 for share in shares.values()), shares
