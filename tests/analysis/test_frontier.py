"""Are envelopes, laws, crossings and best rates those that made the points, and as sure as the seeds allow?"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy.optimize import brentq

from analysis import frontier, load, study
from analysis.arms import Envelope, arm, compute, envelope_table, identity, mean_curve, resampled, same_candidates
from analysis.fit import Refusal, fit
from analysis.frontier import arms_of, best, crossing, law
from analysis.uncertainty import delta, resample_units

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
    independent = delta(fit(table["x"], table["y"]))["E"]
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


def test_one_seed_is_given_and_not_contrasted(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0,)))
    assert "given one group" in law(arms[0]).intervals["a"].method
    answer = crossing(*arms)
    assert answer.verdict == "refused"
    assert "two tokenizer seeds" in answer.sentence()


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
    rising = frontier.curve("monotone", np.array([[0.0, 1, 2]]), np.array([[1.0, 0, 0.5]]), np.array([0, 1, 1.5, 2]))
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


def test_lack_of_fit_is_told_from_scatter(make_study, pair):
    _, arms = read(make_study(rates=pair, seeds=(0, 1, 2), tokenizer_sd=0.6, generator_sd=0.3, noise_sd=0.3))
    assert all(law(each).misfit.fits for each in arms)
