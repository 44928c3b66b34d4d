"""Does EP_FID@k give the published numbers, and no number where a curve has none?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import load
from analysis.convergence import compare, main, table, text
from analysis.crossing import reach
from analysis.descent import draw, write
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.table import TableError, read, where

DATA = Path(__file__).parents[2].parent / "shared" / "data"
PUBLISHED = DATA / "published_convergence.csv"
REFERENCE = Path(__file__).parents[2] / "results" / "reference"
LITERATURE = pytest.mark.skipif(not PUBLISHED.exists(), reason="shared/data/published_convergence.csv is not here")

# unguided gFID by epoch: RAE and RAEv2 project pages and figures (arXiv 2510.11690, 2605.18324)
CURVES = {
    "RAE, rerun": ([20, 40, 60, 80, 240, 800], [3.75, 2.76, 2.47, 2.23, 1.85, 1.51]),
    "RAE, own points": ([10, 20, 40, 80, 400, 800], [6.05, 3.71, 2.79, 2.16, 1.73, 1.51]),
    "RAE, EUPE-B": ([20, 40, 60, 80], [3.70, 2.42, 2.09, 1.97]),
    "RAE, DiT-XL": ([20, 30, 40, 50, 80, 180, 240, 400, 720], [29.98, 8.01, 6.81, 5.86, 4.28, 3.12, 2.71, 2.55, 2.39]),
    "RAEv2": ([20, 40, 60, 80], [2.56, 1.82, 1.56, 1.51]),
    "RAEv2, DINOv2-B": ([20, 40, 60, 80], [2.59, 1.84, 1.66, 1.63]),
    "RAEv2, DINOv3-B": ([20, 40, 60, 80], [2.46, 1.80, 1.52, 1.50]),
    "RAEv2, DINOv3-L": ([20, 40, 60, 80], [2.60, 1.81, 1.53, 1.54]),
}
# curve, k, linear, ln-ln ("" where it was not tabulated); "<20" and ">720" are censored
NUMBERS = """RAE, rerun|3|35.2|33.1; RAE, rerun|2.5|57.9|57.4; RAE, rerun|2|176.8|151.7
RAE, own points|5|14.5|13.1; RAE, own points|4|18.8|18.0; RAE, own points|3|35.4|33.5; RAE, own points|2.5|58.4|53.8
RAE, own points|2|199|140; RAE, EUPE-B|3|30.9|28.2; RAE, EUPE-B|2.5|38.8|37.9; RAE, EUPE-B|2|75.0|74.3
RAE, DiT-XL|5|66|63; RAE, DiT-XL|4|104|95; RAE, DiT-XL|3|198|195; RAE, DiT-XL|2.5|500|479; RAE, DiT-XL|2|>720|
RAEv2|3|<20|; RAEv2|2.5|21.6|21.0; RAEv2|2|35.1|33.0; RAEv2, DINOv2-B|3|<20|; RAEv2, DINOv2-B|2.5|22.4|
RAEv2, DINOv2-B|2|35.7|; RAEv2, DINOv3-B|2.5|<20|; RAEv2, DINOv3-B|2|33.9|; RAEv2, DINOv3-L|2.5|22.5|
RAEv2, DINOv3-L|2|35.2|"""
EXPECTED = [tuple(each.strip().split("|")) for each in NUMBERS.replace("\n", ";").split(";")]

# the same curves in the file: where they stand
FOUND = {
    "RAE, rerun": "method LIKE 'RAE (RAEv2 rerun%'",
    "RAE, own points": "method = 'RAE' AND backbone = 'DiTDH-XL (DINOv2-B)' AND NOT guided "
    "AND NOT (source LIKE '%teaser%' AND epochs IN (80, 800))",  # in both of its sources
    "RAE, EUPE-B": "method = 'RAE (EUPE-B)' AND source LIKE '%eupeb-fixed%'",
    "RAE, DiT-XL": "source LIKE '%convergence_compare%' AND method = 'RAE'",
    "RAEv2": "method = 'RAEv2 (headline curve)'",
    "RAEv2, DINOv2-B": "method = 'RAEv2 K=1 (DINOv2-B)' AND source LIKE '%dinov2b-fixed%'",
    "RAEv2, DINOv3-B": "method = 'RAEv2 K=1 (DINOv3-B)' AND source LIKE '%dinov3b-fixed%'",
    "RAEv2, DINOv3-L": "method = 'RAEv2 K=1 (DINOv3-L)' AND source LIKE '%dinov3l-fixed%'",
}


def agrees(found, linear, log):
    """As rounded in print: half a unit of the last digit."""
    if linear[0] in "<>":
        side = ("left", 1) if linear[0] == "<" else ("right", 0)
        assert (found.censored, found.bracket[side[1]]) == (side[0], float(linear[1:]))
        assert found.bracket[1 - side[1]] is None
        assert found.linear is found.log is None
        return
    assert found.censored == "none"
    for text_, value in ((linear, found.linear), (log, found.log)):
        if text_:
            digits = len(text_.partition(".")[2])
            assert value == pytest.approx(float(text_), abs=0.5 * 10**-digits + 1e-9)


@pytest.mark.parametrize(("name", "k", "linear", "log"), EXPECTED, ids=[f"{e[0]}@{e[1]}" for e in EXPECTED])
def test_published_numbers(name, k, linear, log):
    agrees(reach(*CURVES[name], float(k)), linear, log)


@LITERATURE
@pytest.mark.parametrize("name", FOUND)
def test_published_numbers_from_the_file(name):
    rows = where(read(PUBLISHED), [FOUND[name]])
    expected = [each[1:] for each in EXPECTED if each[0] == name]
    assert expected
    found = table(rows, [float(k) for k, _, _ in expected], by=["backbone"], protocol=["guided"])
    for curve, (k, linear, log) in zip(found, expected, strict=True):
        assert curve.protocol == {"guided": False}
        assert curve.reached.threshold == float(k)
        agrees(curve.reached, linear, log)


@LITERATURE
def test_a_curve_of_several_sources_is_refused():
    rows = where(read(PUBLISHED), [FOUND["RAE, own points"]])
    (found,) = table(rows, [2.0], by=["method", "backbone"])
    assert found.reached.refused["code"] == "mixed_protocols"
    assert found.reached.refused["sentence"].startswith("source has several values in one curve: rae-dit.github.io")


def test_points_of_a_study():
    """Three tokenizer seeds, two evaluations of each point; guided points lie in the same table."""
    points = load.points(REFERENCE / "compression_digits")
    options = {"by": ["rate", "generator_size"], "seed": "tokenizer_seed", "x": "flops_to_point"}
    options["metric"] = "fid_digits_supervised"
    unguided = table(where(points, ["protocol = 'unguided'"]), [1.0], **options)
    by = {tuple(each.curve.values()): each for each in unguided}
    found = by["16x8", "25k"].reached
    assert found.axis == "flops_to_point"
    assert len(found.runs) == 3
    assert found.bracket[0] < found.interval.low < found.linear < found.interval.high < found.bracket[1]
    assert by["16x8", "600k"].reached.censored == "right"
    assert by["16x8", "25k"].protocol.keys() >= {"protocol_id", "guidance", "samples", "extractors", "references"}
    refused = [each for each in table(points, [1.0], **options) if each.reached.refused]
    assert {each.reached.refused["code"] for each in refused} == {"guided", "mixed_protocols"}


def test_brackets():
    assert reach(*CURVES["RAE, own points"], 2.0).bracket == (80, 400)
    assert reach(*CURVES["RAE, rerun"], 2.0).bracket == (80, 240)
    assert 0.45 > 3 * 0.15  # in floating point
    assert reach([0.15, 0.45], [3, 1], 2, max_ratio=3).linear == pytest.approx(0.3)
    found = reach(*CURVES["RAE, own points"], 2.0, max_ratio=4.9)
    assert found.bracket == (80, 400)
    assert (found.linear, found.log, found.censored) == (None, None, "none")
    assert found.refused["code"] == "wide_bracket"
    assert "between 80 and 400 epochs, 5 apart, more than 4.9" in found.note


def test_the_first_crossing_counts_and_is_said():
    found = reach([60, 20, 40, 80], [3.94, 4.97, 3.80, 3.69], 3.9)  # SpatialPE-B rises again (RAEv2)
    assert found.bracket == (20, 40)
    assert found.note == "first crossing; above 3.9 again at 60"
    assert reach([20, 40, 60], [1.9, 2.1, 1.8], 2.0).note.endswith("first crossing; above 2 again at 40")


def test_an_exact_hit_needs_no_interpolation():
    for max_ratio in (5.0, 1.5):
        found = reach([20, 40, 60], [3.0, 2.0, 1.5], 2.0, max_ratio=max_ratio)
        assert (found.linear, found.log, found.bracket) == (40, 40, (20, 40))
    assert reach([20, 40], [2.0, 1.5], 2.0).censored == "left"


def test_no_logarithm_of_what_is_not_positive():
    for x, y, k, linear in (([0, 10], [3, 1], 2, 5), ([5, 10], [1, -1], 0, 7.5), ([5, 10], [3, 0], 1.5, 7.5)):
        found = reach(x, y, k)
        assert (found.linear, found.log) == (linear, None)
        assert found.note.startswith("no logarithm of ")


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.floats(1e-6, 1e21),
    st.floats(1.2, 30),
    st.randoms(use_true_random=False),
)
def test_units_of_x_and_the_order_of_rows_do_not_matter(values, unit, k, random):
    x, y = np.cumsum(np.arange(1, len(values) + 1)) * 10.0, np.array(values) / 1.3
    order = random.sample(range(len(y)), len(y))
    one, other = reach(x, y, k), reach(x[order] * unit, y[order], k)
    assert one.censored == other.censored
    assert (one.refused is None) == (other.refused is None)
    ends = zip((*one.bracket, one.linear, one.log), (*other.bracket, other.linear, other.log), strict=True)
    for a, b in ends:
        assert (a is None) == (b is None)
        assert a is None or b == pytest.approx(a * unit, rel=1e-9)
    if one.linear is not None:
        assert one.bracket[0] < one.log <= one.linear * (1 + 1e-12)
        assert one.linear <= one.bracket[1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_smoothing_crosses_between_the_first_and_the_lasting_crossing(values):
    """Means of values above k lie above k, so no pooling puts a crossing before the first or after the lasting one."""
    x, k = np.arange(1.0, len(values) + 1), 4.5
    low = [value <= k for value in values]
    first = next((x[i] for i in range(len(x)) if low[i]), math.inf)
    lasting = next((x[i] for i in range(len(x)) if all(low[i:])), math.inf)
    found = reach(x, values, k, isotonic=True)
    after = math.inf if found.censored == "right" else found.bracket[1]
    assert first <= after <= lasting
    assert "again" not in found.note
    if values == sorted(values, reverse=True):
        assert found.linear == reach(x, values, k).linear


def test_points_that_are_not_finite_are_counted():
    found = reach([20, 40, 50, 60, math.nan], [3, math.nan, math.inf, 1, 2], 2)
    assert found.bracket == (20, 60)
    assert found.note == "2 rows dropped: no value of epochs, metric; 1 row dropped: an infinite value"
    named = reach([20, 40, 60], [3, math.nan, 1], 2, axis="images", metric="gfid")
    assert named.note == "1 row dropped: no value of gfid"
    with pytest.raises(Refusal) as refusal:
        reach([20, 40], [math.nan, math.inf], 2)
    assert refusal.value.code == "not_finite"
    lost = reach([1, 2, 1, 2], [3, 1, math.nan, math.nan], 2, seeds=["a", "a", "b", "b"])
    assert lost.note.endswith("left out, without a finite point: seed b")


def test_a_point_stands_once():
    for arguments in ({}, {"seeds": [0, 0, 0]}, {"repeats": [0, 1, 1]}):
        with pytest.raises(Refusal) as refusal:
            reach([20, 40, 40], [3, 1, 1], 2, **arguments)
        assert refusal.value.code == "duplicate_run"
        assert "epochs 40" in refusal.value.sentence


def test_one_seed_without_repeats_has_no_interval():
    found = reach(*CURVES["RAE, rerun"], 2.0)
    span = found.interval
    assert (span.low, span.high, span.reason) == (None, None, "one seed without repeats")
    assert span.estimate == found.linear
    assert reach(*CURVES["RAE, rerun"], 1.0).interval.estimate is None


def seeded(crossings, x=(1, 10, 100, 1000)):
    """Power laws through 2 at each crossing, a seed each."""
    x = np.array(x, float)
    rows = [(value, 2 * (value / at) ** -0.5, i) for i, at in enumerate(crossings) for value in x]
    at, y, seeds = (np.array(column) for column in zip(*rows, strict=True))
    return {"x": at, "y": y, "seeds": seeds}


def test_seeds_are_averaged_in_the_logarithm():
    found = reach(**seeded([20, 40, 80]), threshold=2, max_ratio=20)
    assert found.log == pytest.approx(40)  # a power law is straight in logarithms
    linear = np.log([run.linear for run in found.runs])
    half = stats.t.ppf(0.975, 2) * linear.std(ddof=1) / math.sqrt(3)
    assert found.linear == pytest.approx(math.exp(linear.mean()))
    assert (found.interval.low, found.interval.high) == pytest.approx(np.exp(linear.mean() + half * np.array([-1, 1])))
    assert found.interval.dof == 2
    assert found.interval.estimate == found.linear
    same = reach([1, 2] * 2, [3, 1] * 2, 2, seeds=[0, 0, 1, 1])
    assert (same.linear, same.interval.low) == (pytest.approx(1.5), None)
    assert "agree" in same.interval.reason


def test_censored_seeds_give_a_bound_or_nothing():
    x, y = [10, 20, 40], {"slow": [4, 3, 2.5], "fast": [1.5, 1.4, 1.3], "a": [3, 1, 1], "b": [4, 2.5, 1.5]}

    def over(*names):
        values = [value for name in names for value in y[name]]
        return reach(x * len(names), values, 2, seeds=[i for i in range(len(names)) for _ in x])

    few = over("a", "b", "slow")
    assert (few.censored, few.linear, few.log, few.bracket) == ("right", None, None, (10, None))
    assert (few.interval.low, few.interval.high) == (None, None)
    assert "1 of 3 seeds are right-censored" in few.interval.reason
    many = over("a", "b", "b", "b", "slow")  # P(all five above their median) = 1 / 32 < 5 %
    assert (many.interval.low, many.interval.high) == (pytest.approx(15), None)
    assert many.interval.estimate is None
    left = over("a", "a", "a", "b", "fast")
    assert (left.censored, left.bracket) == ("left", (None, 40))
    assert (left.interval.low, left.interval.high) == (None, pytest.approx(30))
    both = over("fast", "slow", "a", "a", "a")
    assert (both.bracket, both.interval.low, both.interval.high) == ((None, None), None, None)


def test_intervals_over_seeds_cover():
    rng, x, n, trials = np.random.default_rng(0), np.geomspace(10, 1000, 24), 5, 2000
    inside = 0
    for _ in range(trials):
        own = 100 * np.exp(0.2 * rng.standard_normal((n, 1)))
        y = 2 * (x / own) ** -0.5 * np.exp(0.002 * rng.standard_normal((n, len(x))))
        span = reach(np.tile(x, n), y.ravel(), 2.0, seeds=np.repeat(np.arange(n), len(x))).interval
        inside += span.low < 100 < span.high
    assert inside / trials == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_intervals_of_evaluation_noise_cover():
    rng, x = np.random.default_rng(0), np.array([20.0, 40, 60, 80, 240, 800])
    truth = np.array(CURVES["RAE, rerun"][1])
    at, trials, repeats = reach(x, truth, 2.3).linear, 1000, 3
    inside = 0
    for _ in range(trials):
        y = truth * np.exp(0.02 * rng.standard_normal((repeats, len(x))))
        span = reach(np.tile(x, repeats), y.ravel(), 2.3, repeats=np.repeat(np.arange(repeats), len(x))).interval
        assert span.low < span.high
        inside += span.low < at < span.high
    assert inside / trials == pytest.approx(0.95, abs=0.021)


def test_evaluation_noise_says_which_end_it_does_not_know():
    def repeated(y, spread, k, **more):
        values = [value * factor for value in y for factor in (1 - spread, 1 + spread)]
        x = np.repeat(10.0 * 2 ** np.arange(len(y)), 2)
        return reach(x, values, k, repeats=[0, 1] * len(y), **more)

    found = repeated([4, 3, 1], 0.01, 2)
    assert found.linear == pytest.approx(30)
    assert found.interval.low < 30 < found.interval.high
    assert found.interval == repeated([4, 3, 1], 0.01, 2).interval  # draws are seeded
    smooth = repeated([4, 3, 1], 0.01, 2, isotonic=True)
    assert (smooth.interval.low, smooth.interval.high) == pytest.approx((found.interval.low, found.interval.high))
    late = repeated([4, 3, 2.01], 0.02, 2)
    assert (late.censored, late.interval.high) == ("right", None)
    assert 20 < late.interval.low < 40
    early = repeated([1.99, 1, 0.5], 0.02, 2)
    assert (early.censored, early.interval.low) == ("left", None)
    assert 10 < early.interval.high < 20
    wide = repeated([4, 3, 1], 0.01, 2, max_ratio=1.5)
    assert (wide.linear, wide.interval.low, wide.interval.high) == (None, 20, 40)
    assert "agree" in repeated([4, 3, 1], 0.0, 2).interval.reason
    assert "not positive" in repeated([4, 1, -1], 0.01, 2).interval.reason


FRAME = pl.DataFrame(
    {
        "method": ["a"] * 3 + ["b"] * 3,
        "epochs": [10.0, 20, 40] * 2,
        "images": [1e6, 2e6, 4e6] * 2,
        "gfid": [3.0, 1.0, 0.9, 4.0, 3.0, 2.5],
        "guided": [False] * 6,
        "sampler": ["euler"] * 6,
    }
)


def test_the_axis_is_named():
    (found,) = table(FRAME.filter(method="a"), [2.0], by=["method"], x="images")
    assert (found.reached.axis, found.reached.linear, found.reached.bracket) == ("images", 1.5e6, (1e6, 2e6))
    assert "bracket (images)" in text([found])


def test_one_curve_has_one_protocol():
    mixed = FRAME.with_columns(pl.Series("sampler", ["euler", "heun", "euler"] + ["euler"] * 3))
    a, b = table(mixed, [2.0], by=["method"])
    assert a.reached.refused["code"] == "mixed_protocols"
    assert a.reached.refused["sentence"] == "sampler has several values in one curve: euler, heun"
    assert (a.reached.censored, a.reached.interval.low) == (None, None)
    assert (b.reached.censored, b.protocol) == ("right", {"guided": False, "sampler": "euler"})
    assert table(mixed, [2.0], by=["method"], protocol=["guided"])[0].reached.refused is None
    bare = FRAME.drop("guided", "sampler")
    with pytest.raises(Refusal) as refusal:
        table(bare, [2.0], by=["method"])
    assert refusal.value.code == "no_protocol"
    stated = table(bare, [2.0], by=["method"], protocol=[])[0]
    assert (stated.protocol, stated.reached.note) == (None, "protocol not stated")


@pytest.mark.parametrize(
    ("column", "values", "refused"),
    [
        ("guided", [False, True, False], True),
        ("guided", ["no", "yes", "no"], True),
        ("guided", [0.0, 1.0, 0.0], True),
        ("guided", [False] * 3, False),
        ("guidance", [1.0, 1.5, 1.0], True),
        ("guidance", [1.0] * 3, False),
        ("guidance_scale", [0.0] * 3, False),
        ("cfg", [None] * 3, False),
        ("cfg", [1.5] * 3, True),
    ],
)
def test_guided_rows_are_refused(column, values, refused):
    frame = FRAME.filter(method="a").drop("guided").with_columns(pl.Series(column, values))
    (found,) = table(frame, [2.0], by=["method"])
    assert (found.reached.refused is not None) == refused
    assert not refused or "unguided by definition" in found.reached.note


def test_what_tells_duplicates_apart_is_named():
    twice = pl.concat(
        [FRAME.with_columns(run=pl.lit(1.0)), FRAME.with_columns(run=pl.lit(2.0), gfid=pl.col("gfid") + 0.1)]
    )
    refused = table(twice, [2.0], by=["method"])[0].reached.refused
    assert refused["code"] == "duplicate_run"
    assert refused["sentence"].endswith("rows differ in run: a column of --by, --seed or --repeat?")
    seeds = table(twice, [2.0], by=["method"], seed="run")[0].reached
    assert seeds.interval.dof == 1
    repeats = table(twice.rename({"run": "evaluation_seed"}), [2.0], by=["method"])[0].reached
    assert repeats.interval.method.startswith("evaluation noise")


def test_a_metric_is_named_or_the_only_one():
    one = FRAME.rename({"gfid": "fid_digits"}).with_columns(fid_digits_error=pl.lit(0.1))
    assert table(one, [2.0], by=["method"])[0].reached.linear == 15
    for frame in (one.with_columns(fid_other=pl.lit(1.0)), FRAME.drop("gfid"), FRAME.with_columns(fid=pl.lit(1.0))):
        with pytest.raises(TableError, match="--metric: not given"):
            table(frame, [2.0], by=["method"])


def timed(times):
    """Curves that cross 2 at a time, or (negative) are last seen above it then, as rows of a table."""
    rows = []
    for i, (group, time) in enumerate(times):
        y = (3.0, 2.0) if time > 0 else (4.0, 3.0)
        rows += [(group, str(i), abs(time) / (2 - j), y[j], "p") for j in (0, 1)]
    return pl.DataFrame(rows, schema=["group", "run", "epochs", "gfid", "protocol"], orient="row")


TIMES = [("A", 2), ("A", 4), ("A", -6), ("B", 3), ("B", -5), ("B", 8)]


def test_log_rank_by_hand():
    """Observed in A 2; expected 3/6 + 2/5 + 2/4 + 0/1 = 1.4; variance 1/4 + 6/25 + 1/4 + 0 = 0.74."""
    found = compare(table(timed(TIMES), [2.0], by=["group", "run"]), "group")
    assert found.chi2 == pytest.approx(0.6**2 / 0.74)
    assert found.p == pytest.approx(stats.chi2.sf(0.6**2 / 0.74, 1))
    assert (found.unit, found.dof, found.at_upper_end, found.left_out) == ("curves", 1, 0, 0)
    a, b = found.groups
    assert (a.n, a.events, a.median) == (3, 2, 4)  # 2/3 are left after 2, 1/3 after 4
    assert (b.n, b.events, b.median) == (3, 2, 8)
    seeds = compare(table(timed(TIMES), [2.0], by=["group"], seed="run"), "group")
    assert (seeds.unit, seeds.chi2) == ("seeds", found.chi2)


def test_no_median_where_most_are_censored():
    times = [("A", 2), ("A", -6), ("A", -6), ("B", 3), ("B", 4), ("B", 5)]
    a, b = compare(table(timed(times), [2.0], by=["group", "run"]), "group").groups
    assert (a.median, b.median) == (None, 4)
    assert a.reason == "2 of 3 are not seen to reach it, so half is not passed"


def test_what_was_not_interpolated_is_there_at_the_upper_end():
    early = timed(TIMES).filter(~((pl.col("run") == "0") & (pl.col("gfid") > 2)))  # A's first: left-censored at 2
    found = compare(table(early, [2.0], by=["group", "run"]), "group")
    assert (found.at_upper_end, found.chi2) == (1, pytest.approx(0.6**2 / 0.74))


def test_groups_are_compared_at_each_threshold(tmp_path, capsys):
    timed(TIMES).write_csv(tmp_path / "runs.csv")
    out = tmp_path / "out.json"
    options = ["--threshold", "2,2.5", "--by", "group,run", "--compare", "group", "--json", str(out)]
    assert main([str(tmp_path / "runs.csv"), *options]) == 0
    assert "  log-rank chi2(1) = 0.4865, p = 0.4855" in capsys.readouterr().out
    two, later = json.loads(out.read_text())["comparisons"]
    assert (two["threshold"], two["chi2"]) == (2, pytest.approx(0.6**2 / 0.74))
    assert [group["median"] for group in later["groups"]] == [3, 6]  # halfway from 3 to 2, over the second half


def test_groups_that_cannot_be_compared():
    def code(times, **more):
        return compare(table(timed(times), [2.0], by=["group", "run"], **more), "group").refused["code"]

    assert code(TIMES[:3]) == code([*TIMES[:3], TIMES[3]]) == "too_few"
    assert code([(group, -abs(time)) for group, time in TIMES]) == "too_few"
    curves = table(timed(TIMES).with_columns(protocol=pl.col("group")), [2.0], by=["group", "run"])
    assert compare(curves, "group").refused["code"] == "mixed_protocols"
    unstated = timed(TIMES).with_columns(pl.when(pl.col("run") != "0").then("protocol").alias("protocol"))
    assert compare(table(unstated, [2.0], by=["group", "run"]), "group").refused["code"] == "mixed_protocols"
    with pytest.raises(TableError, match="allowed, columns of --by: group, run"):
        compare(curves, "size")


@pytest.fixture
def file(tmp_path):
    FRAME.write_csv(tmp_path / "runs.csv")
    return tmp_path / "runs.csv"


def test_command_line(file, tmp_path, capsys):
    out = tmp_path / "out.json"
    more = ["--threshold", "2,2.8", "--threshold", "0.95", "--json", str(out), "--derive", "k_epochs=epochs/1000"]
    assert main([str(file), "--by", "method", "--x", "k_epochs", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[1].split()[:5] == ["a", "2", "0.01-0.02", "0.015", "0.01292"]
    held = json.loads(out.read_text())
    keys = "curve threshold axis bracket linear log censored protocol interval note refused"
    assert [list(each) for each in held["curves"]] == [keys.split()] * 6
    assert held["curves"][3]["bracket"] == [0.04, None]
    assert held["curves"][3]["curve"] == {"method": "b"}
    assert held["refused"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--threshold", "two"], "--threshold: got 'two'"),
        (["--threshold", "-2"], "--threshold: got '-2'; allowed: a number above 0"),
        (["--threshold", "2,0"], "--threshold: got '0'; allowed: a number above 0"),
        (["--threshold", "2", "--figure", "out.tif"], "--figure: got 'out.tif'; a figure ends in .png"),
        (["--threshold", "2", "--x", "steps"], "--x: got 'steps'; columns: method"),
        (["--threshold", "2", "--seed", "seed"], "--seed: got 'seed'"),
        (["--threshold", "2", "--protocol", "ema"], "--protocol: got 'ema'"),
        (["--threshold", "2", "--metric", "sampler"], "not numbers"),
        (["--threshold", "2", "--max-bracket-ratio", "1"], "--max-bracket-ratio: got 1.0; allowed: more than 1"),
        (["--threshold", "2", "--where", "epochs > 99"], "leaves none"),
        (["--threshold", "2", "--compare", "sampler"], "--compare: got 'sampler'"),
    ],
)
def test_wrong_options_are_one_line(file, tmp_path, capsys, more, said):
    assert main([str(file), "--by", "method", *more, "--json", str(tmp_path / "out.json")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


def test_refusals_have_their_exit_code(file, tmp_path, capsys):
    common = [str(file), "--by", "method", "--threshold", "2"]
    assert main([*common, "--compare", "method"]) == EXIT_REFUSED  # one curve a group
    assert "refused (too_few)" in capsys.readouterr().out
    mixed = tmp_path / "mixed.csv"
    FRAME.with_columns(sampler=pl.Series([*"abcaaa"])).write_csv(mixed)
    assert main([str(mixed), *common[1:]]) == 0  # the other curve is answered
    assert main([str(mixed), *common[1:], "--where", "method = 'a'"]) == EXIT_REFUSED
    FRAME.drop("guided", "sampler").write_csv(file)
    out = tmp_path / "out.json"
    assert main([*common, "--json", str(out)]) == EXIT_REFUSED
    assert json.loads(out.read_text())["refused"]["code"] == "no_protocol"
    assert main([*common, "--compare", "method", "--protocol", "none", "--json", str(out)]) == EXIT_REFUSED
    assert json.loads(out.read_text())["refused"]["code"] == "too_few"
    assert main([*common, "--protocol", "none"]) == 0
    assert "protocol not stated" in capsys.readouterr().out


def test_help_has_three_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.count("    python -m analysis.convergence ") == 3


# Figure


def test_the_figure_shows_curves_brackets_and_crossings(tmp_path):
    three = pl.concat([FRAME.with_columns(run=pl.lit(i), gfid=pl.col("gfid") + 0.05 * i) for i in range(3)])
    curves = table(three, [2.0, 2.8], by=["method"], seed="run")
    top, bottom = draw(curves, "gfid").axes
    assert len([line for line in top.lines if line.get_marker() == "o"]) == 6
    assert top.lines[0].get_xydata().tolist() == [[10, 3], [20, 1], [40, 0.9]]
    rows = {i: [line for line in bottom.lines if set(line.get_ydata()) == {i}] for i in range(4)}
    for i, each in enumerate(curves):
        at = each.reached
        dots = [line.get_xdata()[0] for line in rows[i] if line.get_marker() == "o"]
        if at.censored == "right":
            assert dots == []
            assert [line.get_marker() for line in rows[i]] == [">"]
            continue
        assert dots == [at.log, at.linear]
        bracket, interval = (line.get_xdata() for line in rows[i] if line.get_marker() == "None")
        assert bracket == pytest.approx(at.bracket)
        assert interval == pytest.approx((at.interval.low, at.interval.high))
        assert bottom.get_xlim()[0] < min(interval)
    assert sum(each.reached.censored == "right" for each in curves) == 1
    with pytest.raises(TableError, match="44 crossings; a figure holds 40"):
        write(curves * 11, tmp_path / "many.png", metric="gfid")


def test_the_caption_names_what_is_not_drawn(file, tmp_path):
    FRAME.with_columns(sampler=pl.Series([*"abcaaa"])).write_csv(file)
    more = ["--by", "method", "--threshold", "2", "--figure", str(tmp_path / "c.png")]
    assert main([str(file), *more]) == 0
    assert "Refused and not drawn: a." in (tmp_path / "c.txt").read_text()
    (tmp_path / "c.png").unlink()
    assert main([str(file), *more, "--where", "method = 'a'"]) == EXIT_REFUSED
    assert not (tmp_path / "c.png").exists()
