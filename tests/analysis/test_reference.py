"""Can what is committed be read, and do its tables still give the laws and figures that lie beside them?"""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

from analysis import figures, load, study
from analysis.report import Results

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
STUDIES = sorted(path.parent.name for path in REFERENCE.glob("*/plan.parquet"))


@pytest.mark.parametrize("name", STUDIES)
def test_laws_are_those_of_the_tables(name):
    folder = REFERENCE / name
    held = study.read(folder)
    assert not held.damaged
    assert len(held.points) == held.planned
    runs = load.table(folder, "runs")
    assert set(runs["status"]) == {"done"}
    assert not runs["dirty"].any()  # made by a commit, and by that alone
    committed = pl.read_parquet(folder / "figures" / "laws.parquet")
    again = pl.from_pandas(Results(held).laws)
    assert again["rate"].to_list() == committed["rate"].to_list()
    assert again["identified"].to_list() == committed["identified"].to_list()
    for column in ("a", "E"):
        assert again[column].to_list() == pytest.approx(committed[column].to_list(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", STUDIES)
def test_every_figure_is_drawn_again(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(REFERENCE / name, folder, ignore=shutil.ignore_patterns("figures"))
    assert figures.main([str(folder)]) == 0
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert {path.name for path in (REFERENCE / name / "figures").iterdir()} == drawn
