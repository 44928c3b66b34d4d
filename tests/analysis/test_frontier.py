"""Are envelopes, laws, crossings and best rates those that made the points, and as sure as the seeds allow?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy.optimize import brentq

from analysis import figures, frontier, load, report, scaling, study
from analysis.arms import (
    Arm,
    Envelope,
    arm,
    budgets,
    compute,
    envelope_table,
    identity,
    mean_curve,
    nearest,
    resampled,
    same_candidates,
)
from analysis.curves import curve, given_half, law, misfit
from analysis.fit import fit
from analysis.frontier import arms_of, best, crossing
from analysis.refusal import Refusal
from analysis.uncertainty import resample_units

FID = "fid_digits_supervised"


@pytest.fixture
def pair(rate):
    """Two rates that cross at 3.8e10 FLOPs."""
    return rate(4, 64, 9.0, 14.0, 0.75, 7.0), rate(16, 64, 3.5, 22.0, 0.55, 2.5)


def read(folder):
    held = study.read(folder)
    return held, arms_of(held, FID)[0]


def points(**changes):
    """Six budgets of one rate and size: the columns that an arm is made of."""
    budgets = [float(b) for b in np.geomspace(1e9, 1e11, 6)]
    columns = {"rate": "r", "generator_size": "5k", "generator": "g", "params_core": 5, "bits_nominal": 8.0}
    columns |= {"protocol_id": "p", "samples": 100, "extractors": "e=1", "references": "r=1", "generator_seed": 0}
    columns |= {"tokenizer_seed": 0, "evaluation_seed": 0, "past_minimum": False, **changes}
    frame = pl.DataFrame(
        {"flops_target": budgets, "flops_to_point": budgets, FID: [2 + 1e5 * b**-0.5 for b in budgets]}
    )
    known = [pl.lit(value).alias(name) for name, value in columns.items()]
    return frame.with_row_index("step").with_columns(pl.format("g@{}", "step").alias("checkpoint"), *known)


def test_an_arm_refuses_what_must_not_be_mixed():
    assert arm(points(), "r", FID).budgets[0] == 1e9
    for column, value in (("protocol_id", "q"), ("samples", 50), ("references", "r=2"), ("extractors", "e=2")):
        with pytest.raises(Refusal) as refusal:
            arm(pl.concat([points(), points(**{column: value, "tokenizer_seed": 1})]), "r", FID)
        assert refusal.value.code == "mixed_protocols"
        assert column in refusal.value.sentence
    with pytest.raises(Refusal) as refusal:
        arm(pl.concat([points(), points()]), "r", FID)
    assert refusal.value.code == "duplicate_run"
    with pytest.raises(Refusal) as refusal:
        arm(points().with_columns(pl.lit(0.0).alias(FID)), "r", FID)
    assert refusal.value.code == "non_positive"
    with pytest.raises(Refusal) as refusal:
        arm(points(), "another", FID)
    assert refusal.value.code == "too_few"


def test_the_envelope_is_the_lowest_size():
    small, large = points(), points(generator_size="25k", params_core=25)
    large = large.with_columns(pl.col(FID) * pl.Series([2.0, 2.0, 2.0, 0.5, 0.5, 0.5]), pl.col("checkpoint") + "x")
    table = envelope_table(arm(pl.concat([small, large]), "r", FID))
    assert table["size"].tolist() == ["5k"] * 3 + ["25k"] * 3
    assert table["y"].tolist() == pytest.approx(pl.concat([small[:3], large[3:]])[FID].to_list())
    assert table["edge"].all()


def test_a_size_is_chosen_on_one_evaluation_seed_and_reported_on_another():
    rng = np.random.default_rng(0)
    frames = []
    for size in range(20):
        for seed in (0, 1):
            noise = pl.Series(np.exp(0.3 * rng.standard_normal(6)))
            frame = points(generator_size=str(size), params_core=size, evaluation_seed=seed)
            frames.append(frame.with_columns(10.0 * noise.alias(FID), pl.col("checkpoint") + str(size)))
    both = pl.concat(frames)
    fresh = arm(both, "r", FID)
    assert fresh.fresh
    same = arm(both.filter(pl.col("evaluation_seed") == 0), "r", FID)
    assert not same.fresh
    # the best of twenty equal sizes looks better than it is on the sample that chose it, not on another
    assert np.log(envelope_table(same)["y"] / 10).mean() < -0.4
    assert abs(np.log(envelope_table(fresh)["y"] / 10).mean()) < 0.3


def test_candidates_are_the_same_in_both_arms():
    a = pl.concat([points(), points(generator_size="25k", params_core=25).with_columns(pl.col("checkpoint") + "x")])
    a = a.with_columns(pl.when(pl.col("params_core") == 25).then(pl.col(FID) / 2).otherwise(pl.col(FID)).alias(FID))
    b = a.with_columns(pl.lit("s").alias("rate"), pl.col("checkpoint") + "s")
    b = b.filter(~((pl.col("params_core") == 25) & (pl.col("flops_target") > 5e10)))
    first, second = same_candidates(arm(a, "r", FID), arm(b, "s", FID))
    assert envelope_table(first)["size"].tolist() == ["25k"] * 5 + ["5k"]
    assert envelope_table(first)["y"].tolist() == envelope_table(second)["y"].tolist()
    # a point that a fit leaves out was still tried: the other arm keeps its own
    b = a.with_columns(pl.lit("s").alias("rate"), (pl.col("flops_target") > 5e10).alias("past_minimum"))
    first, second = same_candidates(arm(a, "r", FID), arm(b, "s", FID))
    assert len(envelope_table(first)) == 6
    assert len(envelope_table(second)) == 5


def stepped(**changes):
    """Four points of one run planned by steps, from 2e9 to 9e10 FLOPs; gFID 1e6 C^-0.5."""
    flops = [2e9, 7e9, 2e10, 9e10]
    frame = points(**changes).head(4)
    known = [pl.Series("flops_target", [None] * 4, pl.Float64), pl.Series("flops_to_point", flops)]
    return frame.with_columns(*known, pl.Series(FID, [1e6 * c**-0.5 for c in flops]), pl.col("step").alias("point"))


def test_points_planned_by_steps_are_read_at_shared_compute():
    held = arm(stepped(), "r", FID)
    grid = [10 ** (k / 4) for k in range(38, 44)]  # 3.2e9 to 5.6e10
    assert held.budgets == tuple(grid) == tuple(budgets(stepped()))
    assert np.exp(held.x[0, 0, 0]) == pytest.approx(grid)
    assert np.exp(held.report[0, 0, 0]) == pytest.approx([1e6 * c**-0.5 for c in grid])  # linear in the logarithms
    # never beyond a run's own ends, and not beside a point that no curve passes through
    larger = stepped(generator_size="25k", params_core=25, generator="h")
    larger = larger.with_columns(pl.col("flops_to_point") * 4, pl.col("checkpoint") + "h", pl.col(FID) / 2)
    larger = larger.with_columns(pl.Series("past_minimum", [False, False, False, True]))
    both = arm(pl.concat([stepped(), larger]), "r", FID)
    assert both.sizes == ("5k", "25k")
    assert both.budgets == tuple(10 ** (k / 4) for k in range(38, 47))
    there = np.isfinite(both.report[0, :, 0])
    assert there.tolist() == [[True] * 6 + [False] * 3, [False] * 2 + [True] * 4 + [False] * 3]
    assert both.measured[0, :, 0].tolist() == [[True] * 6 + [False] * 3, [False] * 2 + [True] * 7]
    # another sum of compute is read at the same training FLOPs
    costly = stepped(flops_upstream=1e12, flops_encode=2e11, flops_sample=5e8, guidance_from=None)
    assert np.exp(arm(costly, "r", FID, "total", 4).x[0, 0, 0]) == pytest.approx([c + 3e11 for c in grid])
    assert np.exp(arm(costly, "r", FID, "inference").x[0, 0, 0]) == pytest.approx([5e6] * 6)
    # rates of other cost share the grid
    other = stepped(rate="s").with_columns(pl.col("flops_to_point") * 1.7)
    assert [each.budgets for each in same_candidates(held, arm(other, "s", FID))] == [tuple(grid[1:])] * 2


def test_points_planned_by_steps_are_refused_like_others():
    twice = pl.concat([stepped(), stepped(generator="h").with_columns(pl.col("checkpoint") + "h")])
    with pytest.raises(Refusal) as refusal:
        arm(twice, "r", FID)
    assert refusal.value.code == "mixed_designs"
    with pytest.raises(Refusal, match="either side of a compute of 10"):
        arm(stepped().head(1), "r", FID)
    assert budgets(stepped().clear()) == []
    assert nearest(3e9, 2.9e9) == (3e9,)
    assert nearest(None, 2e9) == pytest.approx((10**9.25, 10**9.5))
    assert nearest(None, 10**9.5) == (10**9.5,)


def test_compute_sums_are_named():
    frame = points(flops_upstream=1e12, flops_encode=2e11, flops_sample=5e8, guidance_from=None)
    assert compute(frame, "total", 4).to_list() == pytest.approx([f + 3e11 for f in frame["flops_to_point"]])
    assert compute(frame, "inference").to_list() == [5e6] * 6
    assert "shared by 4" in arm(frame, "r", FID, "total", 4).axis
    searched = frame.with_columns(pl.lit("search").alias("guidance_from"))
    with pytest.raises(Refusal, match="not known"):
        arm(searched, "r", FID, "inference")


def test_resampling_repeats_distinct_draws_only_once():
    frames = [
        points(tokenizer_seed=s).with_columns(pl.col(FID) * (1 + s), pl.col("checkpoint") + str(s)) for s in range(3)
    ]
    held = arm(pl.concat(frames), "r", FID)
    picked = resample_units(3, 200, np.random.default_rng(0))
    x, y, row = resampled(held, picked, np.random.default_rng(0))
    assert len(y) == 10
    direct = Envelope(held, np.sort(picked, axis=1)).flat()
    assert np.allclose(y[row], direct[1])
    assert np.allclose(x[row], direct[0])


def test_laws_recover_the_truth(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.02, generator_sd=0.0, noise_sd=0.002))
    for truth, each in zip(pair, arms, strict=True):
        found = law(each)
        assert found.fit.form == "saturating"
        assert found.intervals["a"].low < truth.exponent + 0.05
        assert found.intervals["a"].high > truth.exponent - 0.05
        assert found.fit.params["a"] == pytest.approx(truth.exponent, rel=0.1)
        assert found.intervals["E"].low < truth.asymptote * 1.1 < found.intervals["E"].high * 1.1
        assert found.identified
        assert found.drawn
        assert (found.low < found.mean).all()
        assert (found.mean < found.high).all()


def test_differing_tokenizers_widen_intervals_beyond_iid(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.25, generator_sd=0.0, noise_sd=0.005))
    found = law(arms[1])
    table = envelope_table(arms[1])
    independent = fit(table["x"], table["y"]).intervals()["E"]
    over = found.intervals["E"]
    middle = len(found.grid) // 2
    band = math.log(found.high[middle] / found.low[middle])
    iid = fit(table["x"], table["y"]).get_prediction([found.grid[middle]]).summary_frame().iloc[0]
    assert band > 2.5 * math.log(iid["mean_ci_upper"] / iid["mean_ci_lower"])
    assert "hierarchical" in over.method
    assert "independent" in independent.method


def test_two_seeds_are_not_enough_for_a_band(make_study, pair):
    _, arms = read(make_study(rates=pair, tokenizer_sd=0.15, seed=3))
    found = law(arms[0])
    assert found.fit.n_groups == 2
    assert found.intervals["E"].dof == 1
    assert not found.drawn


def test_one_run_has_no_interval_and_is_not_contrasted(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0,)))
    found = law(arms[0])
    assert found.units == "generator seeds given one tokenizer"
    for interval in (*found.intervals.values(), *found.given.values()):
        assert interval.low is interval.high is None
        assert "checkpoints of one run are not independent" in interval.reason
    assert not found.identified
    assert not found.drawn
    assert np.isnan(found.low).all()
    assert found.fit.reason is not None
    answer = crossing(*arms)
    assert answer.verdict == "refused"
    assert "two tokenizer seeds" in answer.sentence()


def test_generator_seeds_are_the_unit_within_one_tokenizer(make_study, pair):
    """More checkpoints of the same runs narrow nothing; runs that differ widen."""
    widths = {}
    for sd in (0.005, 0.2):
        design = {"seeds": (0,), "generator_seeds": (0, 1, 2, 3), "tokenizer_sd": 0.0, "noise_sd": 0.002}
        found = law(read(make_study(f"sd{sd}", rates=pair, sizes={"5k": 5000}, generator_sd=sd, **design))[1][0])
        amplitude = found.intervals["A"]
        assert amplitude.dof == 3
        assert amplitude.method.startswith("bootstrap over generator seeds given one tokenizer")
        assert found.given == found.intervals
        widths[sd] = math.log(found.high[80] / found.low[80])
    assert widths[0.2] > 3 * widths[0.005]
    assert widths[0.2] > 0.2


def test_generator_runs_are_resampled_within_each_tokenizer():
    """One tokenizer seed, two runs an e-fold apart: resamples hold either of them twice, or both."""
    log = np.log(np.geomspace(1e9, 1e11, 5))
    y = np.stack([-0.5 * log, -0.5 * log + 1.0])[None, None]  # [tokenizer seed, size, generator seed, budget]
    x = np.broadcast_to(log, y.shape)
    held = Arm("r", 8.0, FID, "", (0,), ("5k",), tuple(np.exp(log)), x, y, y, np.ones(y.shape, bool), False)
    _, drawn, row = resampled(held, np.zeros((400, 1), np.intp), np.random.default_rng(0))
    assert len(row) == 400
    shift = drawn - y[0, 0, 0]
    assert np.allclose(shift, shift[:, :1])  # a run is drawn with all of its checkpoints
    shares = [np.isclose(shift[:, 0], value).mean() for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.08)
    # both tokenizers agree, their runs do not: only the runs widen the interval of a contrast
    twice = {"x": np.repeat(x, 2, 0), "select": np.repeat(y, 2, 0), "report": np.repeat(y, 2, 0), "seeds": (0, 1)}
    other = replace(held, **twice, measured=np.ones((2, 1, 2, 5), bool))
    tilted = replace(other, rate="s", select=other.select + 0.4 * (log - log[2]))
    tilted = replace(tilted, report=tilted.select)
    assert crossing(other, tilted).reason == "smaller and larger compute is not resolved"


def two_rates(rng, noise, tilt, seeds=2, own=0.0):
    """Straight curves over six budgets that cross at 1e10: scatter of every point, and of each seed's own line."""
    log = np.log(np.geomspace(1e9, 1e11, 6))
    u = (log - math.log(1e10)) / math.log(10)
    found = []
    for rate, side in (("r", 0.5), ("s", -0.5)):
        level, slope, rest = (rng.standard_normal((seeds, n)) for n in (1, 1, 6))
        y = (3 - 0.5 * u + side * tilt * u + own * (level + slope * u) + noise * rest)[:, None, None]
        x, there = np.broadcast_to(log, y.shape), np.ones(y.shape, bool)
        found.append(Arm(rate, 8.0, FID, "", tuple(range(seeds)), ("5k",), tuple(np.exp(log)), x, y, y, there, False))
    return found


@pytest.mark.parametrize("form", ["monotone", "power"])
def test_a_crossing_of_two_seeds_is_covered(form):
    """Where two seeds agree by chance the error is zero: an interval cut off there misses one crossing in eight."""
    rng, trials, missed = np.random.default_rng(0), 250, 0
    for _ in range(trials):
        answer = crossing(*two_rates(rng, 0.1, 0.2), form, draws=100)
        if answer.flops is not None and answer.flops.low is not None:  # an open end covers
            missed += not answer.flops.low <= 1e10 <= answer.flops.high
    assert missed <= 0.05 * trials


@pytest.mark.parametrize("form", ["monotone", "power"])
@pytest.mark.parametrize("seeds", [2, 3])
def test_clear_data_give_a_crossing(form, seeds):
    for trial in range(10):
        answer = crossing(*two_rates(np.random.default_rng(trial), 0.003, 1.0, seeds, 0.003), form, draws=100)
        assert answer.verdict == "crossing", answer.sentence()
        assert answer.flops.low <= 1e10 <= answer.flops.high


def test_a_tie_apart_from_the_zero_counts():
    """Two seeds whose difference is the same at the zero's neighbours and differs beyond: tied there as well."""
    log = np.log(np.geomspace(1e9, 1e11, 9))
    u = np.linspace(-1, 1, 9)
    still = np.stack([0 * u, 0 * u])[:, None, None]
    apart = 0.2 * np.where(abs(u) > 0.6, 0, np.where(abs(u) > 0.3, 1.0, 0))  # the seeds part half-way, both sides
    tilted = np.stack([u + apart, u - apart])[:, None, None]
    arms = [
        Arm(rate, 8.0, FID, "", (0, 1), ("5k",), tuple(np.exp(log)), x, y, y, np.ones(y.shape, bool), False)
        for rate, y in (("r", -3 * log[None, None, None] + tilted), ("s", -3 * log[None, None, None] + still))
        for x in [np.broadcast_to(log, y.shape)]
    ]
    answer = crossing(*arms, "monotone")
    assert answer.flops.low < math.exp(log[3])
    assert answer.flops.high > math.exp(log[5])


def test_a_seed_without_values_is_left_out():
    """One tokenizer has not been measured on the second evaluation seed, on which values are reported."""
    frames = []
    for rate, factor in (("r", 1.0), ("s", 1.2)):
        for seed in range(3):
            for sample in (0, 1):
                if (rate, seed, sample) != ("s", 2, 1):
                    frame = points(rate=rate, tokenizer_seed=seed, evaluation_seed=sample)
                    name = pl.col("checkpoint") + f"{rate}{seed}"
                    value = pl.col(FID) ** factor * (1 + 0.02 * seed * (factor - 0.9))
                    frames.append(frame.with_columns(name, value))
    whole, part = (arm(pl.concat(frames), rate, FID) for rate in ("r", "s"))
    assert whole.seeds == (0, 1, 2)
    assert part.seeds == (0, 1)
    answer = crossing(whole, part)
    assert answer.seeds == 2
    assert answer.verdict != "refused"
    assert set(best([whole, part])["seeds"]) == {2}
    assert law(part).intervals["a"].dof == 1
    # what the arms still share after the search was made fair counts
    late = replace(part, **{name: np.where(np.arange(6) < 5, getattr(part, name), np.nan) for name in ("x", "select")})
    blank = np.array([False, True])[:, None, None, None] & (np.arange(6) < 5)
    late = replace(part, report=np.where(blank, np.nan, part.report))
    early = replace(whole, measured=whole.measured & (np.arange(6) < 5))
    refused = crossing(early, late)
    assert refused.verdict == "refused"
    assert "fewer than two tokenizer seeds have values in both" in refused.sentence()
    # a rate none of whose points may be used is no arm
    with pytest.raises(Refusal, match="no tokenizer seed has a value"):
        arm(points(past_minimum=True), "r", FID)


def test_a_crossing_is_found_within_its_interval(make_study, pair):
    truth = brentq(lambda c: pair[0].fid(c) - pair[1].fid(c), 5e9, 1e12)
    inside = 0
    for seed in range(5):
        folder = make_study(f"s{seed}", rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.02, noise_sd=0.005, seed=seed)
        answer = crossing(*read(folder)[1])
        assert answer.below == "4x64"
        assert answer.above == "16x64"
        assert answer.flops.estimate == pytest.approx(truth, rel=0.5)
        if answer.flops.low is None:
            assert answer.verdict == "not identified"
            inside += 1
        else:
            inside += answer.flops.low <= truth <= answer.flops.high
            assert (answer.verdict == "crossing") == (answer.flops.high <= 3 * answer.flops.low)
    assert inside >= 4


def test_seeds_are_paired(make_study, pair):
    """A shift that both rates share by seed cancels in their contrast."""
    folder = make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.0, generator_sd=0.0, noise_sd=0.005)
    held, arms = read(folder)
    shift = pl.col("tokenizer_seed").replace_strict({0: 1.0, 1: 1.5, 2: 0.6}, return_dtype=pl.Float64)
    shifted = held.points.with_columns(pl.col(FID) * shift)
    apart = crossing(*(arm(shifted, each.rate, FID) for each in arms))
    alike = crossing(*arms)
    assert apart.flops.high / apart.flops.low == pytest.approx(alike.flops.high / alike.flops.low, rel=0.15)


def test_no_crossing_in_range_is_an_answer(make_study, rate):
    rates = rate(4, 64, 9.0, 14.0, 0.6, 7.0), rate(16, 64, 3.0, 5.0, 0.6, 2.5)
    answer = crossing(*read(make_study(rates=rates, seeds=(0, 1, 2), tokenizer_sd=0.01))[1])
    assert answer.verdict == "no crossing in range"
    assert answer.flops is None
    assert answer.below == answer.above == "16x64"
    assert answer.resolved
    assert "no crossing in range" in answer.sentence()


def test_few_budgets_are_interpolated(make_study, pair):
    budgets = (1e10, 4e10, 1.6e11)
    _, arms = read(make_study(rates=pair, seeds=(0, 1, 2), budgets=budgets, tokenizer_sd=0.01, noise_sd=0.003))
    answer = crossing(*arms)
    assert answer.form == "monotone"
    assert answer.below == "4x64"
    assert answer.above == "16x64"
    assert law(arms[0]).fit.form == "power"
    rising = curve("monotone", np.array([[0.0, 1, 2]]), np.array([[1.0, 0, 0.5]]), np.array([0, 1, 1.5, 2]))
    assert rising[0].tolist() == pytest.approx([1, 0.25, 0.25, 0.25])


def test_the_best_rate_moves_with_compute(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.01, noise_sd=0.003))
    for size in (None, "120k"):
        table = best(arms, size)
        assert table["rate"].tolist()[0] == "4x64"
        assert table["rate"].tolist()[-1] == "16x64"
        assert table["separated"].iloc[-1]
        assert (table["ratio"] >= 1).all()
        assert (table["share"].iloc[[0, -1]] == 1).all()
    assert best(arms[:1]).empty
    assert best(arms, "3B").empty


def test_rates_of_different_budgets_are_compared_where_they_share_them():
    low = points()
    frames = [points(rate="s", bits_nominal=16.0, tokenizer_seed=seed) for seed in (0, 1)]
    high = pl.concat(frames).with_columns(pl.col(FID) / 2, pl.col("checkpoint") + pl.col("tokenizer_seed").cast(str))
    low = pl.concat([low, low.with_columns(pl.lit(1).alias("tokenizer_seed"), pl.col("checkpoint") + "r")])
    shared = high.filter(pl.col("flops_target") > 5e9)  # the last four of six
    arms = [arm(low, "r", FID), arm(shared, "s", FID)]
    for size in (None, "5k"):
        table = best(arms, size)
        assert tuple(table["budget"]) == arms[1].budgets
        assert set(table["rate"]) == {"s"}
        assert table["ratio"].tolist() == pytest.approx([2.0] * 4)
    assert crossing(*arms).verdict == "no crossing in range"
    apart = high.with_columns(pl.col("flops_target") * 1e3, pl.col("flops_to_point") * 1e3)
    arms = [arm(low, "r", FID), arm(apart, "s", FID)]
    assert best(arms).empty
    assert "refused, the two rates share no generator size and budget" in crossing(*arms).sentence()


def test_memorising_points_are_left_out_and_counted(digits):
    held = study.read(digits)
    past = held.points.filter("past_minimum")
    assert set(past["rate"]) == {"4x64"}
    assert set(past["generator_size"]) == {"5k"}
    assert held.left_out["past the held-out minimum"] == len(past) == 2
    assert held.left_out["diverged generator run"] == 1
    assert held.left_out["planned but not measured"] == 1
    assert held.left_out["points of diverged or failed runs"] == 4
    # that run is listed, and no point of it is fitted, those before it diverged included
    ((run, how),) = held.lost.items()
    assert how == "diverged generator run"
    assert run not in held.points["generator"].to_list()
    assert len(held.points) == held.planned - 5
    assert f"- {run}: diverged generator run." in report.text(report.Results(held))
    table = envelope_table(arm(held.points, "4x64", "nll_bits"))
    assert not ((table["size"] == "5k") & (table["budget"] == table["budget"].max())).any()


def test_the_mean_curve_needs_all_seeds():
    frames = [points(), points(tokenizer_seed=1)[:4].with_columns(pl.col("checkpoint") + "s")]
    x, _ = mean_curve(arm(pl.concat(frames), "r", FID))
    assert len(x) == 4
    assert identity(arm(pl.concat(frames), "r", FID)).tolist() == [[0, 1]]


def test_the_command_answers_in_sentences(digits, tmp_path, capsys):
    assert frontier.main([str(digits), "--sum", "total", "--models", "5"]) == 0
    out = capsys.readouterr().out
    assert "stage 1 shared by 5 generators" in out
    assert "4x64 and 16x64" in out
    assert frontier.main([str(tmp_path)]) == 2
    assert "no plan.parquet" in capsys.readouterr().err


REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "digits"


def test_laws_come_with_their_rates_and_as_json(digits, tmp_path, capsys):
    out = tmp_path / "frontier.json"
    assert frontier.main([str(digits), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    for rate in ("4x64", "16x64", "16x256"):
        assert f"\n{rate}: fid_digits_supervised: y = E + A x^-a" in f"\n{said}"
    held = json.loads(out.read_text())
    assert held["refused"] is None
    assert held["metric"] == FID
    assert [row["rate"] for row in held["laws"]] == ["4x64", "16x64", "16x256"]
    found = law(read(digits)[1][0])
    assert held["laws"][0]["params"] == found.fit.params
    assert held["laws"][0]["intervals"]["a"]["low"] == found.intervals["a"].low
    assert {(row["first"], row["second"]) for row in held["crossings"]} == {
        ("4x64", "16x64"),
        ("16x64", "16x256"),
        ("4x64", "16x256"),
    }
    assert len(held["best_rates"]) == 5
    assert held["best_rates"][0]["rate"] == "4x64"


def test_nothing_fitted_is_a_refusal(make_study, tmp_path, capsys):
    out = tmp_path / "frontier.json"
    assert frontier.main([str(make_study(budgets=(1e10,), seeds=(0,))), "--json", str(out)]) == 3
    assert "no law" in capsys.readouterr().out
    held = json.loads(out.read_text())
    assert held["refused"] == held["laws"][0]["refused"]
    assert held["crossings"][0]["verdict"] == "refused"
    assert held["crossings"][0]["low_end"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--at 3", "--at: got 3 with the default mode; it belongs to --gain"),
        ("--best-rate --at 3", "--at: got 3 with --best-rate; it belongs to --gain"),
        ("--narrow rate", "--narrow: got rate with the default mode; it belongs to --propose"),
        ("--gain 16x64 --hours 2", "--hours: got 2.0 with --gain; it belongs to --propose"),
        ("--predict-largest --out x", "--out: got x with --predict-largest; it belongs to --propose"),
        ("--predict-largest --metric nll_bits", "it belongs to the default mode, --gain, --best-rate, --propose"),
        ("--propose --json x", "--json: got x with --propose; it belongs to the default mode, --gain, --best-rate"),
        ("--models 8", "--models: got 8; allowed: 1 or more, with --sum total"),
        ("--sum total --models 0", "--models: got 0; allowed: 1 or more"),
        ("--gain 16x64 --at -1", "--at: got '-1'; allowed: a number above 0"),
        (
            "--best-rate --metric precision_digits_supervised",
            "it is not known to be better when lower; allowed: nll_bits",
        ),
    ],
    ids=lambda value: value if value.startswith("--") and ":" not in value else "",
)
def test_an_option_without_its_mode_is_one_line(capsys, options, said):
    assert frontier.main([str(REFERENCE), *options.split()]) == 2
    written = capsys.readouterr()
    assert said in written.err
    assert len(written.err.splitlines()) == 1
    assert written.out == ""


@pytest.mark.parametrize("other", ["--propose", "--best-rate", "--gain=16x64"])
def test_two_modes_are_one_line(capsys, other):
    with pytest.raises(SystemExit) as stop:
        frontier.main([str(REFERENCE), "--predict-largest", other])
    assert stop.value.code == 2
    assert f"argument {other.split('=')[0]}: not allowed with argument --predict-largest" in capsys.readouterr().err


def test_help_has_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        frontier.main(["--help"])
    assert frontier.EXAMPLES in capsys.readouterr().out


def test_arms_of_a_study_report_refusals(digits):
    held = study.read(digits)
    assert held.extractors == ("digits_supervised", "digits_contrastive")
    arms, refused = arms_of(held, "kid_digits_supervised")
    assert [each.rate for each in arms] == ["4x64", "16x64", "16x256"]
    assert not refused
    assert load.slug("digits-supervised") == held.extractors[0]
    # a collapsed codebook: its codes cost nothing to model, and no law goes through zero
    collapsed = pl.when(pl.col("rate") == "4x64").then(0.0).otherwise(pl.col("nll_bits")).alias("nll_bits")
    arms, refused = arms_of(replace(held, points=held.points.with_columns(collapsed)), "nll_bits")
    assert [each.rate for each in arms] == ["16x64", "16x256"]
    assert refused["4x64"].code == "non_positive"


def rewrite(folder, *changes, table="curves"):
    path = folder / "compact" / f"{table}.parquet"
    pl.read_parquet(path).with_columns(*changes).write_parquet(path)
    return folder


def test_an_unknown_metric_is_one_line(digits, capsys):
    assert frontier.main([str(digits), "--metric", "gfid"]) == 2
    said = capsys.readouterr().err
    assert "--metric: got 'gfid'; allowed: nll_bits, nll_bits_train, fid_digits_supervised" in said
    assert len(said.splitlines()) == 1
    assert "guidance," not in said


def test_a_study_with_guided_samples_only_is_compared(make_study, pair, capsys):
    folder = make_study(rates=pair, tokenizer_sd=0.02)
    rewrite(folder, pl.when(pl.col("guidance") == 1.0).then(1.5).otherwise("guidance").alias("guidance"))
    held = study.read(folder)
    assert not held.unguided
    assert held.guided.is_empty()
    assert len(held.points) == held.planned
    assert frontier.main([str(folder)]) == 0
    assert "no unguided evaluation; these are guided, protocol unguided" in capsys.readouterr().out
    assert "No unguided evaluation: every curve is of the guided protocol" in report.text(report.Results(held))


def test_a_study_without_a_run_that_ended_well_says_so(make_study, capsys):
    folder = make_study(budgets=(1e10, 3e10), sizes={"5k": 5000}, seeds=(0,))
    broken = pl.when(pl.col("stage") == "generator").then(pl.lit("diverged")).otherwise("status").alias("status")
    rewrite(folder, broken, pl.lit("loss of nan at step 7").alias("reason"), table="runs")
    assert frontier.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert "no generator to fit yet (0 of 6 points measured; 3 diverged generator runs" in said
    assert set(study.read(folder).lost.values()) == {"diverged generator run, loss of nan at step 7"}
    assert figures.main([str(folder), "--only", "fig1_generation"]) == 2
    assert "3 diverged generator runs" in capsys.readouterr().err
    (folder / "compact" / "curves.parquet").unlink()
    with pytest.raises(
        load.StudyError, match=r"nothing measured yet .0 of 12 planned evaluations; 3 diverged generator"
    ):
        study.read(folder)


def test_guided_and_unguided_are_compared_on_the_same_candidates(make_study, pair):
    """Guided samples: one evaluation seed, one size; unguided: two, of which the other size is lower."""
    sizes = {"5k": 5000, "25k": 25000}
    folder = make_study(rates=pair, guided=True, evaluation_seeds=(0, 1), sizes=sizes, budgets=(1e10, 1e11))
    plan = pl.read_parquet(folder / "plan.parquet")
    small = plan.filter(pl.col("protocol") == "guided", pl.col("generator_size") == "5k")["run_id"].to_list()
    path = folder / "compact" / "curves.parquet"
    pl.read_parquet(path).filter(~pl.col("run_id").is_in(small)).write_parquet(path)
    held = study.read(folder)
    lines = [line for line in report.text(report.Results(held)).splitlines() if "measured both ways" in line]
    assert [line.split(" at ")[0] for line in lines] == ["- guided", "- unguided"]
    assert all("(chosen by the evaluation seed that is reported)" in line for line in lines)
    for line, rows in zip(lines, (held.guided, held.points.filter(pl.col("evaluation_seed") == 0)), strict=True):
        for rate in ("4x64", "16x64"):
            cell = rows.filter(rate=rate, generator_size="25k", flops_target=1e11)[FID].log().mean()
            assert f"{rate} {math.exp(cell):.3g}" in line


def test_a_checkpoint_past_its_minimum_is_so_for_every_protocol(make_study):
    held = study.read(make_study(guided=True, memorised=True))
    past = held.points.filter("past_minimum")["checkpoint"].to_list()
    assert past
    assert set(held.guided.filter("past_minimum")["checkpoint"]) == set(past)


def test_both_panels_of_the_best_rate_hold_the_same_values(make_study, pair):
    """One rate lacks the larger sizes, of which the other's best is one: that is compared, and drawn, without them."""
    folder = make_study(rates=pair, tokenizer_sd=0.01)
    plan = pl.read_parquet(folder / "plan.parquet")
    lacking = plan.filter(pl.col("tokens") == 4, pl.col("generator_size").is_in(["120k", "600k"]))["run_id"]
    lacking = lacking.to_list()
    path = folder / "compact" / "curves.parquet"
    pl.read_parquet(path).filter(~pl.col("run_id").is_in(lacking)).write_parquet(path)
    results = report.Results(study.read(folder))
    figure, _ = scaling.best_rate(results, "digits_supervised")
    stars = [line.get_ydata()[0] for line in figure.axes[1].lines if line.get_marker() == "*"]
    plt.close(figure)
    table = results.best_rates[lambda each: (each["metric"] == FID) & each["size"].isna()]
    assert len(table) == 5
    assert set(table["value"].round(9)) == set(np.round(stars, 9))
    whole = arm(results.held.points, "16x64", FID)
    assert envelope_table(whole).query("budget == budget.max()")["size"].tolist() == ["120k"] * 2


def test_code_length_alone_is_left_out_of_best_rates(make_study, pair):
    folder = make_study(rates=pair)
    path = folder / "compact" / "curves.parquet"
    for without, metrics in (("nll_bits", {FID, "fid_digits_contrastive"}), ("fid", set())):
        whole = pl.read_parquet(path)
        whole.filter(pl.col("metric") != without).write_parquet(path)
        table = report.Results(study.read(folder)).best_rates
        assert set(table["metric"] if len(table) else ()) == metrics
        whole.write_parquet(path)


def test_a_study_planned_by_steps_is_drawn_and_reported(make_study, pair, capsys):
    folder = make_study(
        rates=pair, seeds=(0, 1, 2), by_steps=True, tokenizer_sd=0.005, noise_sd=0.002, generator_sd=0.0, guided=True
    )
    held = study.read(folder)
    assert held.by_steps
    assert held.budgets == [10 ** (k / 4) for k in range(38, 49)]
    arms, refused = arms_of(held, FID)
    assert not refused
    truth = brentq(lambda c: pair[0].fid(c) - pair[1].fid(c), 5e9, 1e12)
    answer = crossing(*arms)
    assert answer.verdict == "crossing", answer.sentence()
    assert answer.flops.low <= truth <= answer.flops.high
    assert figures.main([str(folder)]) == 0
    assert "fig3_best_rate: not drawn" not in capsys.readouterr().out
    written = (folder / "figures" / "report.md").read_text()
    assert "gFID (digits-supervised): tokenizer seeds of one rate differ by" in written
    assert "4x64 and 16x64, gFID (digits-supervised): crossing at" in written
    # guided samples of the last point alone give no curve that could be read at a shared compute
    assert "either side of a compute" in written
    # the points between which an envelope runs are strong, the others pale
    figure, _ = scaling.generation(report.Results(held), "digits_supervised")
    strong = [len(line.get_xdata()) for line in figure.axes[0].lines if line.get_alpha() == 0.95]
    plt.close(figure)
    assert len(held.points) / 4 < sum(strong) < 0.8 * len(held.points)


def bent(folder):
    """The largest rate's gFID stands still up to 3e10 FLOPs and then falls: no power law."""
    path = folder / "compact" / "curves.parquet"
    curves = pl.read_parquet(path)
    plan = pl.read_parquet(folder / "plan.parquet").filter(pl.col("stage") == "evaluation", pl.col("tokens") == 16)
    early = pl.col("run_id").is_in(plan["run_id"].to_list()) & (pl.col("metric") == "fid") & (pl.col("flops") < 5e10)
    still = pl.when(early).then(pl.col("value") ** 0.05 * 40).otherwise(pl.col("value"))
    curves.with_columns(still.alias("value")).write_parquet(path)
    return folder


def test_a_law_that_misses_the_points_is_said_so_and_not_drawn(make_study, pair):
    _, arms = read(bent(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.02, noise_sd=0.005)))
    straight, knee = law(arms[0]), law(arms[1])
    assert straight.misfit.fits
    assert straight.line()[0] is straight.grid
    assert knee.misfit.rms > math.log(1.2)
    assert knee.misfit.p < 0.01
    assert not knee.identified
    assert not knee.drawn
    x, y = knee.line()
    assert len(x) == len(arms[1].budgets)
    assert knee.at(x[2]) == pytest.approx(y[2])
    # a contrast does not lean on a law that one side does not follow
    assert crossing(*arms).form == "monotone"
    assert crossing(arms[0], arms[0]).form == "saturating"


def test_a_common_shift_of_seeds_is_no_scatter():
    """Seeds that lie a factor of 1.5 apart and zigzag alike: no law goes through them, however far they lie apart."""
    log = np.log(np.geomspace(1e9, 1e11, 5))
    rng = np.random.default_rng(0)
    for noise in (0.0, 0.03):
        rows = [
            (seed, math.exp(at), math.exp(at), math.exp(2 - 0.3 * (at - log[0]) + shift + zigzag + e))
            for seed, shift in enumerate((-0.4, 0.0, 0.4))
            for at, zigzag, e in zip(log, (0.3, -0.3, 0.3, -0.3, 0.3), noise * rng.standard_normal(5), strict=True)
        ]
        rows = pd.DataFrame(rows, columns=["seed", "budget", "x", "y"])
        for held in (rows, rows.drop(index=4)):  # one seed without the last budget
            found = misfit(held, fit(held["x"], held["y"], groups=held["seed"]))
            assert found.rms > 0.2
            assert found.p is None or found.p < 0.01
            assert not found.fits


def test_lack_of_fit_is_told_from_scatter(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.6, generator_sd=0.3, noise_sd=0.3))
    assert all(law(each).misfit.fits for each in arms)


def test_a_law_whose_fall_has_died_out_is_no_certainty():
    """Points that do not fall fit a constant, whose linearised error knows nothing of the falls they allow."""
    x = np.geomspace(1e10, 1e12, 6)
    flat = fit(x, [0.68, 0.69, 0.67, 0.7, 0.68, 0.69])
    assert np.isinf(given_half([flat], np.log(x))).all()
    falling = fit(x, 0.5 + 3 * (x / 1e10) ** -0.5 * np.array([1.01, 0.99, 1.01, 1.0, 0.99, 1.0]))
    assert (given_half([falling], np.log(x)) < 0.1).all()
