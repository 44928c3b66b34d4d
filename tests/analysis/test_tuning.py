"""Is the best of a sweep found, flagged at its edge, and alone in the curves?"""

from __future__ import annotations

import json

import polars as pl
import pytest

from analysis import load, report, study, tuning
from analysis.arms import arm
from analysis.refusal import Refusal

FID = "fid_digits_supervised"


@pytest.fixture
def swept(make_study, rate):
    """Rewrites a study of two sizes: both are called 5k, and told apart by an axis of the grid."""
    sizes = {"5k": 5_000, "25k": 25_000}
    folder = make_study(rates=(rate(4, 64, 9.0, 14.0, 0.75, 7.0),), sizes=sizes, seeds=(0, 1))

    def rewritten(name, *values):
        path = folder / "plan.parquet"
        first, second = (json.dumps({"generator.size": "5k", name: value, "tokenizer.tokens": 4}) for value in values)
        size = pl.col("generator_size")
        axes = pl.when(size == "25k").then(pl.lit(second)).otherwise(pl.lit(first)).alias("axes")
        plan = pl.read_parquet(path)
        plan.with_columns(axes, pl.when(size.is_not_null()).then(pl.lit("5k")).alias("generator_size")).write_parquet(
            path
        )
        return folder

    return rewritten


def test_settings_name_what_was_swept():
    axes = [json.dumps({"generator.train.lr": lr, "generator.train.batch": 8, "generator.size": s}) for s, lr in
            (("5k", 0.001), ("25k", 0.01))]  # fmt: skip
    assert load._settings(pl.Series(axes)).to_list() == ["lr=0.001", "lr=0.01"]
    assert load._settings(pl.Series(axes[:1] * 2)).to_list() == ["", ""]
    assert load._settings(pl.Series([None], dtype=pl.String)).to_list() == [""]


def points(values, seeds=(0, 1), **more):
    rows = [
        {"rate": "r", "generator_size": "5k", "flops_target": 1e10, "flops_to_point": 1e10, "setting": setting}
        | {"tokenizer_seed": seed, FID: value, **more}
        for setting, value in values.items()
        for seed in seeds
    ]
    return pl.DataFrame(rows)


def test_the_best_is_lowest_over_seeds_and_flagged_at_an_edge():
    table = tuning.sweeps(points({"lr=0.001": 3.0, "lr=0.003": 2.0, "lr=0.01": 2.5}), FID)
    assert table["setting"].to_list() == ["lr=0.003", "lr=0.01", "lr=0.001"]
    assert table["best"].to_list() == [True, False, False]
    assert table["edge"].to_list() == [[], [], []]
    table = tuning.sweeps(points({"lr=0.001": 3.0, "lr=0.003": 2.0, "lr=0.01": 1.5}), FID)
    assert table["edge"].to_list()[0] == ["lr"]
    assert "**lr at the edge of the sweep**" in tuning.sentences(table, "gFID")[0]
    two = {"lr=0.1 schedule=wsd": 1.0, "lr=0.2 schedule=cosine": 2.0, "lr=0.3 schedule=wsd": 3.0}
    assert tuning.sweeps(points(two), FID)["edge"].to_list()[0] == ["lr"]


def test_a_setting_without_all_seeds_never_wins():
    both = pl.concat([points({"lr=0.001": 3.0, "lr=0.003": 2.0}), points({"lr=0.01": 1.0}, seeds=(0,))])
    table = tuning.sweeps(both, FID)
    assert table["setting"].to_list() == ["lr=0.003", "lr=0.001", "lr=0.01"]
    kept = tuning.tuned(both, table)
    assert kept["setting"].unique().to_list() == ["lr=0.003"]
    assert kept.columns == both.columns


def test_nothing_swept_leaves_everything():
    frame = points({"": 2.0})
    assert tuning.sweeps(frame, FID).is_empty()
    assert tuning.tuned(frame, tuning.sweeps(frame, FID)).equals(frame)
    assert tuning.sweeps(frame.drop(FID), FID).is_empty()


def test_curves_hold_the_best_setting_only(swept):
    held = study.read(swept("generator.train.lr", 0.001, 0.01))
    cells = held.points.group_by("flops_target", "tokenizer_seed").len()
    assert set(cells["len"]) == {1}
    assert held.left_out["not the best of its sweep"] == len(held.points)
    assert arm(held.points, "4x64", FID).sizes == ("5k",)
    best = held.sweeps.filter("best")
    assert dict(best.select("budget", "setting").iter_rows()) == dict(
        held.points.select("flops_target", "setting").iter_rows()
    )
    assert "## Training settings" in report.text(report.Results(held))


def test_designs_that_differ_are_not_mixed(swept):
    held = study.read(swept("generator.qk_norm", False, True))
    with pytest.raises(Refusal) as refusal:
        arm(held.points, "4x64", FID)
    assert refusal.value.code == "mixed_designs"
    assert "generator.qk_norm" in refusal.value.sentence
