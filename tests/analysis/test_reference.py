"""Can what is committed be read, and do its tables still give the laws and figures that lie beside them?"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from analysis import figures, load, study
from analysis.report import Results

REFERENCE = Path(__file__).parents[2] / "results" / "reference"
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*(e[+-]?\d+)?(?![\w.]*x)")  # but not those of a rate, 16x64
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
    committed = REFERENCE / name / "figures"
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert {path.name for path in committed.iterdir()} == drawn
    for path in sorted(committed.glob("*.json")):
        again = json.loads((folder / "figures" / path.name).read_text())
        # captions, and what every panel shows: points, curves, bands, labels, pictures
        assert difference(json.loads(path.read_text()), again) is None, path.name


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place at which two JSON texts differ by more than another machine's rounding, and what stands there."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(one[key], other[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, float) and isinstance(other, float):
        return None if one == pytest.approx(other, rel=0.01) else f"{where}: {one} and {other}"
    elif isinstance(one, str) and isinstance(other, str):
        words = [NUMBER.sub("#", text) for text in (one, other)]
        return None if words[0] == words[1] else f"{where}: {one!r} and {other!r}"
    else:
        return None if one == other else f"{where}: {one!r} and {other!r}"
    return next((found for found in (difference(*pair) for pair in pairs) if found), None)


def test_a_figure_that_differs_is_noticed():
    figure = {"text": "4x16: 0.541 [0.5, 0.6]", "panels": [{"lines": [{"fill": "full", "y": [1.0, 2.0]}]}]}
    assert difference(figure, json.loads(json.dumps(figure).replace("2.0", "2.001").replace("541", "542"))) is None
    assert (
        difference(figure, json.loads(json.dumps(figure).replace("2.0", "2.1")))
        == ".panels[0].lines[0].y[1]: 2.0 and 2.1"
    )
    assert difference(figure, json.loads(json.dumps(figure).replace("full", "none"))) is not None
    assert difference(figure, json.loads(json.dumps(figure).replace("4x16", "4x64 or 4x16"))) is not None
    assert difference(figure, {"text": figure["text"]}) is not None
