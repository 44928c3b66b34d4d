"""Is an interval null with a reason where it cannot be had, and quoted only where it is narrow?"""

from __future__ import annotations

import pytest

from analysis.interval import Interval, short, student


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
    assert not Interval(None, low, high, 0.95, "m").identified(kind)


def test_an_interval_reads_as_a_sentence():
    assert str(Interval(3e9, 1e9, 9.5e9, 0.95, "m")) == "3e9 [1e9, 9.5e9]"
    assert str(Interval(None, None, None, 0.95, "m", reason="censored")) == "none (no interval: censored)"


@pytest.mark.parametrize(("value", "text"), [(3e9, "3e9"), (0.5412, "0.541"), (12.61, "12.6"), (1234.5, "1,234")])
def test_numbers_are_short(value, text):
    assert short(value) == text
