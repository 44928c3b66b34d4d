"""Is the largest budget predicted from the smaller ones alone, and set beside what came out?"""

from __future__ import annotations

import polars as pl
import pytest

from analysis import frontier, load, prediction, study


def without_largest(folder):
    """The study before its largest budget ran."""
    largest = pl.read_parquet(folder / "plan.parquet").filter(pl.col("flops_target") == 3e11)["run_id"].to_list()
    path = folder / "compact" / "curves.parquet"
    whole = pl.read_parquet(path)
    whole.filter(~pl.col("run_id").is_in(largest)).write_parquet(path)
    return whole


def test_the_outcome_is_not_used(make_study, capsys):
    folder = make_study(seeds=(0, 1, 2), tokenizer_sd=0.02)
    known = prediction.predict(study.read(folder))
    whole = without_largest(folder)
    assert frontier.main([str(folder), "--predict-largest"]) == 0
    assert "9 of 9 predictions at 3e+11 FLOPs" in capsys.readouterr().out
    frame = pl.read_parquet(folder / "prediction.parquet")
    assert frame["predicted"].to_list() == pytest.approx(known["predicted"].to_list())
    assert frame["low"].to_list() == pytest.approx(known["low"].to_list())
    assert known["outcome_known"].all()
    assert not frame["outcome_known"].any()
    assert (frame["largest_used"] < frame["flops"]).all()
    assert frame["written"].null_count() == 0
    before = prediction.outcome(study.read(folder), frame)
    assert before["outcome"].null_count() == len(frame)
    whole.write_parquet(folder / "compact" / "curves.parquet")
    after = prediction.outcome(study.read(folder), frame)
    assert (after["by_seed"].list.len() == 3).all()
    assert after["inside"].mean() >= 0.7
    assert ((after["outcome"] / after["predicted"] - 1).abs() < 0.2).all()
    # what was written before is not written over afterwards
    assert frontier.main([str(folder), "--predict-largest"]) == 2
    assert "before its outcome was known" in capsys.readouterr().err


def test_a_curve_that_no_law_fits_is_extrapolated_from_its_end(make_study):
    folder = make_study(seeds=(0, 1, 2), tokenizer_sd=0.01, noise_sd=0.002, generator_sd=0.0)
    path = folder / "compact" / "curves.parquet"
    curves = pl.read_parquet(path)
    knee = (pl.col("metric") == "fid") & pl.col("flops").is_between(1, 8e9)  # as bad as at ten times the compute
    curves.with_columns(pl.when(knee).then(pl.col("value") / 3).otherwise(pl.col("value"))).write_parquet(path)
    frame = prediction.predict(study.read(folder)).filter(pl.col("metric") != "nll_bits")
    assert set(frame["form"]) == {"power"}
    assert set(frame["budgets"]) == {3}
    assert frame["method"].str.contains("the 3 budgets before it").all()


def test_an_outcome_of_some_seeds_is_none(make_study):
    folder = make_study(seeds=(0, 1, 2), tokenizer_sd=0.3, sizes={"5k": 5000})
    frame = prediction.predict(study.read(folder))
    plan = pl.read_parquet(folder / "plan.parquet")
    last = plan.filter(pl.col("flops_target") == 3e11, pl.col("tokenizer_seed") == 2)["run_id"].to_list()
    path = folder / "compact" / "curves.parquet"
    pl.read_parquet(path).filter(~pl.col("run_id").is_in(last)).write_parquet(path)
    out = prediction.outcome(study.read(folder), frame)
    assert out["by_seed"].list.len().to_list() == [2] * len(out)
    assert out["outcome"].null_count() == out["inside"].null_count() == len(out)


def test_a_damaged_prediction_is_not_written_over(make_study, capsys):
    folder = make_study(seeds=(0,), sizes={"5k": 5000})
    (folder / "prediction.parquet").write_bytes(b"PAR1")
    assert frontier.main([str(folder), "--predict-largest"]) == 2
    said = capsys.readouterr().err
    assert "prediction.parquet: damaged; delete it" in said
    assert len(said.splitlines()) == 1


def test_a_plan_by_steps_has_no_largest_budget(make_study):
    with pytest.raises(load.StudyError, match="this one is by steps"):
        prediction.predict(study.read(make_study(by_steps=True, sizes={"5k": 5000}, seeds=(0,))))


def test_three_budgets_are_needed(make_study):
    folder = make_study(budgets=(1e10, 3e10, 1e11), sizes={"5k": 5000})
    with pytest.raises(load.StudyError, match="three budgets"):
        prediction.predict(study.read(folder))


def test_three_budgets_take_a_pure_power_law(make_study):
    folder = make_study(budgets=(3e9, 1e10, 3e10, 1e11), sizes={"5k": 5000, "120k": 120000})
    frame = prediction.predict(study.read(folder))
    assert set(frame["form"]) == {"power"}
    assert set(frame["budgets"]) == {3}
    assert "3 degrees of freedom" in frame["method"][0]
