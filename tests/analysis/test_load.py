"""Does the only reader give back what was written, whatever state the folder is in?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import load, report, study
from sweep.schema import VERSION, schema


def curve(run_id, step=1, value=1.0, **more):
    return {"study": "s", "run_id": run_id, "attempt": 0, "step": step, "metric": "loss", "value": value, **more}


def test_ids_stay_strings(tmp_path, part):
    for run_id in ("r5e1000000000", "r00000000000", "g123456789012"):
        part(tmp_path, "curves", run_id, [curve(run_id)])
    frame = load.table(tmp_path, "curves")
    assert frame.schema == load.schema("curves")
    assert sorted(frame["run_id"]) == ["g123456789012", "r00000000000", "r5e1000000000"]
    assert all(isinstance(name, str) for name in load.table(tmp_path, "curves", pandas=True)["run_id"])


def test_columns_come_and_go(tmp_path, part):
    whole = part(tmp_path, "curves", "raaaaaaaaaaaa", [curve("raaaaaaaaaaaa")])
    folder = whole.parent.parent / "run=rbbbbbbbbbbbb"
    folder.mkdir()
    # an older writer: no `reason`, an unknown column, an integer where a float is wanted, a column of nulls only
    older = pa.table({"run_id": ["rbbbbbbbbbbbb"], "metric": ["loss"], "value": [3], "odd": [1], "split": pa.nulls(1)})
    pq.write_table(older, folder / "0-0000.parquet")
    frame = load.table(tmp_path, "curves").sort("run_id")
    assert frame.schema == load.schema("curves")
    assert frame["value"].to_list() == [1.0, 3.0]
    assert frame["reason"].to_list() == [None, None]


def test_a_damaged_part_is_named(tmp_path, part):
    part(tmp_path, "curves", "raaaaaaaaaaaa", [curve("raaaaaaaaaaaa")])
    broken = part(tmp_path, "curves", "rbbbbbbbbbbbb", [curve("rbbbbbbbbbbbb")])
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.warns(load.DamagedPart, match="run=rbbbbbbbbbbbb/0-0000.parquet"):
        frame = load.table(tmp_path, "curves")
    assert frame["run_id"].to_list() == ["raaaaaaaaaaaa"]
    with pytest.raises(load.StudyError, match="run=rbbbbbbbbbbbb"):
        load.table(tmp_path, "curves", strict=True)


@pytest.fixture
def both(make_study):
    """A study that holds its tables twice: compact, and as parts of which one is the compact file's content."""
    folder = make_study(budgets=(1e10, 1e11), sizes={"5k": 5000}, seeds=(0,))
    parts = folder / "tables" / "curves" / "study=digits" / "run=raaaaaaaaaaaa"
    parts.mkdir(parents=True)
    content = (folder / "compact" / "curves.parquet").read_bytes()
    (parts / "0-0000.parquet").write_bytes(content)
    os.utime(parts / "0-0000.parquet", (1, 1))
    return folder


def damage(path):
    path.write_bytes(path.read_bytes()[:50])
    os.utime(path, (2, 2))


def test_parts_stand_in_for_a_damaged_compact_file(both):
    whole = load.table(both, "curves")
    damage(both / "compact" / "curves.parquet")
    with pytest.warns(load.DamagedPart, match="compact/curves.parquet: damaged, left out"):
        again = load.table(both, "curves")
    assert again.equals(whole)
    held = study.read(both)
    assert len(held.points) == held.planned == 6
    assert len(held.damaged) == 1
    assert "compact/curves.parquet" in held.damaged[0]
    # without parts nothing is left, and the reason is not that nothing has been measured
    shutil.rmtree(both / "tables")
    with pytest.raises(
        load.StudyError, match=r"0 of 12 planned evaluations; .*compact/curves.parquet: damaged"
    ) as error:
        study.read(both)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::analysis.load.DamagedPart")
def test_a_damaged_plan_is_named(both):
    shutil.copy(both / "plan.parquet", both / "compact" / "plan.parquet")
    whole = load.plan(both)
    damage(both / "plan.parquet")
    assert load.plan(both).equals(whole)
    assert "plan.parquet: damaged, left out" in study.read(both).damaged[0]
    (both / "compact" / "plan.parquet").unlink()
    with pytest.raises(load.StudyError, match=r"digits/plan.parquet: damaged \("):
        load.plan(both)


def test_a_damaged_prediction_is_named(both):
    assert load.prediction(both) is None
    (both / load.PREDICTION).write_bytes(b"PAR1")
    with pytest.warns(load.DamagedPart, match=r"prediction.parquet: damaged, left out"):
        assert load.prediction(both) is None
    held = study.read(both)
    assert held.prediction is None
    assert "prediction.parquet" in held.damaged[0]
    assert f"- {held.damaged[0]}." in report.text(report.Results(held))


def test_the_highest_attempt_counts(tmp_path, part):
    run = "raaaaaaaaaaaa"
    part(tmp_path, "runs", run, [{"run_id": run, "attempt": 0, "status": "failed"}])
    part(tmp_path, "runs", run, [{"run_id": run, "attempt": 1, "status": "done"}], "1-0000")
    # interrupted at step 2, gone on from step 1: the step before stays, the one after is superseded
    part(tmp_path, "curves", run, [curve(run, 1, 5.0), curve(run, 2, 4.0)])
    part(tmp_path, "curves", run, [curve(run, 2, 3.0, attempt=1)], "1-0000")
    assert load.table(tmp_path, "runs")["status"].to_list() == ["done"]
    assert load.table(tmp_path, "curves").sort("step")["value"].to_list() == [5.0, 3.0]


def test_compact_and_newer_parts_are_joined(tmp_path, part):
    old = part(tmp_path, "curves", "raaaaaaaaaaaa", [curve("raaaaaaaaaaaa")])
    (tmp_path / "compact").mkdir()
    kind = schema("curves").with_metadata({"version": str(VERSION)})
    pq.write_table(pa.Table.from_pylist([curve("raaaaaaaaaaaa")], kind), tmp_path / "compact" / "curves.parquet")
    os.utime(old, (1, 1))
    assert len(load.table(tmp_path, "curves")) == 1
    new = part(tmp_path, "curves", "rbbbbbbbbbbbb", [curve("rbbbbbbbbbbbb")])
    os.utime(new, (4e9, 4e9))
    assert sorted(load.table(tmp_path, "curves")["run_id"]) == ["raaaaaaaaaaaa", "rbbbbbbbbbbbb"]


@pytest.mark.parametrize("where", ["lock", "part"])
def test_another_version_is_refused(tmp_path, part, where):
    if where == "lock":
        (tmp_path / "plan.lock.json").write_text(json.dumps({"version": VERSION + 1}))
    else:
        path = part(tmp_path, "curves", "raaaaaaaaaaaa", [])
        table = pa.Table.from_pylist([curve("raaaaaaaaaaaa")], schema("curves").with_metadata({"version": "99"}))
        pq.write_table(table, path)
    with pytest.raises(load.StudyError, match="this code reads version 1") as error:
        load.table(tmp_path, "curves")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "what"), [("nowhere", "no such results folder"), ("", "no plan.parquet")])
def test_what_is_not_a_study_is_said(tmp_path, name, what):
    with pytest.raises(load.StudyError, match=what):
        load.points(tmp_path / name)


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(load.StudyError, match="allowed: plan, runs, curves, images"):
        load.table(tmp_path, "metrics")


def test_points_hold_plan_protocol_and_metrics(digits):
    frame = load.points(digits)
    keys = ["checkpoint", "protocol_id", "evaluation_seed", "guidance"]
    assert not frame.select(keys).is_duplicated().any()
    assert set(frame["rate"]) == {"4x64", "16x64", "16x256"}
    row = frame.filter(pl.col("protocol") == "unguided").row(0, named=True)
    assert row["samples"] == 1000
    assert row["weights"] == "ema"
    assert row["nll_bits_train"] < row["nll_bits"]
    assert row["fid_digits_supervised"] > 0
    assert row["fid_digits_supervised_error"] == pytest.approx(0.01 * row["fid_digits_supervised"])
    assert row["precision"] is None
    assert "precision: not asked for" in row["missing"]
    # of the generator's own row, not of the evaluation's
    assert row["flops_upstream"] == 2e11
    assert row["params_core"] in {5_000, 25_000, 120_000, 600_000}
    assert row["flops_encode"] == 1e9
    # a search leaves a row per candidate; the evaluation is one row, at the scale it reports
    searched = frame.filter(pl.col("guidance_from") == "search")
    assert not searched["run_id"].is_duplicated().any()
    assert set(searched["guidance"]) == {1.5}
    assert searched["nll_bits"].null_count() == 0


def test_a_two_part_code_is_that_of_the_codes_and_of_what_they_leave(make_study):
    """Bits of the image given its reconstruction: those of the very checkpoint whose codes the generator models."""
    study = make_study()
    held = load.points(study)
    left = {row["tokenizer"]: row["residual_bits"] for row in load.tokenizers(study).iter_rows(named=True)}
    assert len(set(left.values())) > 1
    for row in held.iter_rows(named=True):
        assert row["two_part_bits"] == pytest.approx(row["nll_bits"] + left[row["tokenizer"]])


def test_tokenizers_hold_their_gate(make_study, rate):
    rates = (
        rate(4, 256, 6, 17, 0.6, 4, usage=0.4),
        rate(16, 8, 5, 20, 0.6, 3, change=0.2),
        rate(16, 64, 3, 25, 0.5, 2),
    )
    frame = load.tokenizers(make_study(rates=rates, seeds=(0,), budgets=(1e10,), sizes={"5k": 5000}))
    assert frame["codes"].to_list() == [False, True] * 3
    codes = frame.filter("codes")
    assert dict(codes.select("rate", "gate").iter_rows()) == {
        "4x256": "collapsed",
        "16x8": "unconverged",
        "16x64": "ok",
    }
    row = codes.filter(pl.col("rate") == "16x8").row(0, named=True)
    rfid, half = row["rfid_digits_supervised"], row["rfid_digits_supervised_half"]
    assert half / rfid == pytest.approx(1.2, abs=0.05)
    changes = [
        abs(row[f"rfid_{e}_half"] - row[f"rfid_{e}"]) / row[f"floor_{e}"]
        for e in ("digits_supervised", "digits_contrastive")
    ]
    assert row["rfid_change"] == pytest.approx(max(changes))
    assert row["floor_digits_supervised"] > row["rfid_digits_supervised"]
    assert frame.filter(~pl.col("codes"))["unconverged"].is_null().all()


def test_labels_are_longer_where_designs_share_a_rate():
    common = {"stage": "tokenizer", "family": "vq", "tokens": 16, "codebook": 64, "steps": None}
    rows = [
        {**common, "run_id": "ta", "fields": '{"causal": false}', "points": [1, 2], "encode": [2]},
        {**common, "run_id": "tb", "fields": '{"causal": true}', "points": [1, 2], "encode": [2]},
        {**common, "run_id": "tc", "fields": "{}", "points": [2], "encode": [2], "tokens": 4},
    ]
    labels = load._labels(pl.DataFrame(rows))
    assert labels["ta@2"] == labels["ta@1"] == "16x64 causal=False"
    assert labels["tb@2"] == "16x64 causal=True"
    assert labels["tc@2"] == "4x64"
    rows[1] |= {"fields": '{"causal": false}', "points": [2, 4], "encode": [4]}
    assert load._labels(pl.DataFrame(rows))["tb@4"] == "16x64 4 steps"


def test_a_study_under_way_is_read(make_study):
    folder = make_study(budgets=(1e10, 1e11), sizes={"5k": 5000})
    curves = pl.read_parquet(folder / "compact" / "curves.parquet")
    kept = curves.filter(~pl.col("checkpoint").str.starts_with("g"))
    kept.write_parquet(folder / "compact" / "curves.parquet")
    assert load.points(folder).is_empty()
    assert len(load.tokenizers(folder)) == 12


def test_reading_loads_no_matplotlib():
    code = "import sys, analysis.load; assert not {'matplotlib', 'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
