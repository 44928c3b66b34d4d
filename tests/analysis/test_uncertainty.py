"""Do intervals cover what they say, and are there none where nothing is known?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.interval import Interval, student
from analysis.refusal import Refusal
from analysis.uncertainty import (
    hierarchical,
    inflation,
    paired,
    resample_units,
    spearman,
    spread,
    wider,
)

X = np.geomspace(1e9, 1e11, 6)


def curve(seed, n=6, sd=0.03):
    rng = np.random.default_rng(seed)
    x = np.geomspace(1, 100, n)
    return x, (2 + 10 * x**-0.5) * np.exp(sd * rng.standard_normal(n))


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
