"""Does the committed table say what the engine does, and does the engine do what it promises?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import polars as pl
import pytest

from analysis.coverage import BAND, SAID, WRONG, Design, Truth, cell, cells, main, summary, table

FILE = Path("results/coverage/coverage.parquet")
KEYS = ["design", "exponent", "share", "decades", "noise", "spread", "wrong", "quantity"]


@pytest.fixture(scope="module")
def held():
    return pl.read_parquet(FILE)


def promises(frame):
    """Where the law is right: in its band wherever the engine calls a cell identified, and elsewhere it says "not"."""
    right = frame.filter(pl.col("wrong") == "none")
    sure = right.filter(pl.col("identified") > SAID)
    assert sure.filter(~pl.col("covered").is_between(*BAND)).is_empty()
    assert len(sure) > 0.5 * len(right)
    assert right.filter(pl.col("identified") <= SAID).select((1 - pl.col("identified")).min()).item() >= 0.9
    for design in ("5", "6", "8", "12", "24", "6 x 3 seeds", "8 runs x 4 checkpoints", "3 tokenizers x 5 budgets"):
        assert set(sure.filter(pl.col("design") == design)["quantity"]) == {
            *("exponent", "asymptote", "ten times beyond")
        }


def test_the_committed_table_keeps_what_is_promised(held):
    assert held["trials"].min() >= 2000
    assert len(held) == 3 * len(list(cells()))
    assert held["covered_error"].max() < 0.012
    promises(held)


def test_the_committed_table_is_of_this_engine(held):
    """A few of its cells again, with their own seeds."""
    places = dict(enumerate(cells()))
    for place in (3, 200, 777, 1100, 1300, 1500, len(places) - 1):
        design, truth = places[place]
        for row in cell(design, truth, 2000, place):
            same = [pl.col(name) == (row[name]) for name in KEYS]
            (known,) = held.filter(pl.col("seed") == place, *same).to_dicts()
            for name in ("covered", "identified", "none"):
                assert row[name] == pytest.approx(known[name], abs=0.002), (design, truth, name)
            assert row["width"] == pytest.approx(known["width"], rel=0.01)
            assert row["method"] == known["method"]


def test_a_wrong_law_is_reported_and_not_promised(held):
    """An exponent of a law that lacks a term is not that of the truth; the table shows it."""
    wrong = held.filter(pl.col("wrong") == "a further term x^-2a", pl.col("quantity") == "exponent")
    assert wrong["covered"].max() < 0.9
    assert set(held["wrong"]) == set(WRONG)


def test_designs_end_at_the_same_largest_x():
    for design in (
        Design("independent", 5),
        Design("seeds", 6),
        Design("checkpoints", 4, 6),
        Design("tokenizers", 5, 3),
    ):
        x, codes = design.points(3)
        assert x.max() == pytest.approx(1e3)
        assert (codes is None) == (design.clusters is None)
        if codes is not None:
            assert codes.max() + 1 == design.clusters


def test_the_command_writes_the_table(tmp_path, capsys, monkeypatch):
    few = [(Design("independent", 6), Truth(0.5, 0.5, 3, 0.03)), (Design("tokenizers", 5, 3), Truth(0.5, 0.5, 3, 0.03))]
    monkeypatch.setattr("analysis.coverage.cells", lambda: iter(few))
    assert main([str(tmp_path), "--trials", "50"]) == 0
    held = pl.read_parquet(tmp_path / "coverage.parquet")
    assert held["design"].unique(maintain_order=True).to_list() == ["6", "3 tokenizers x 5 budgets"]
    assert held["exponent"].unique().to_list() == [asdict(few[0][1])["exponent"]]
    text = capsys.readouterr().out
    assert "3 tokenizers x 5 budgets" in text
    assert len(summary(held)) == 6
    assert main([str(tmp_path), "--trials", "0"]) == 2
    assert "--trials: got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_intervals_cover_what_they_say_in_every_cell(held):
    """The whole table again, ten minutes on two cores."""
    again = table()
    promises(again)
    assert again.drop("method").schema == held.drop("method").schema


def test_every_column_is_documented(held):
    text = Path("results/README.md").read_text().split("## `coverage/coverage.parquet`")[1]
    assert [name for name in held.columns if f"`{name}`" not in text] == []
