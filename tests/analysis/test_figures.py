"""Does every figure come out of a finished, unfinished, damaged or empty study, or one clear sentence?"""

from __future__ import annotations

import json
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import polars as pl
import pytest

from analysis import figures, frontier, report, study
from analysis.theme import log_axis, plain, spaced

NAMES = [
    *("fig1_generation", "fig1_generation_digits_contrastive", "fig2_rate_distortion"),
    *("fig2_rate_distortion_digits_contrastive", "fig3_best_rate", "fig3_best_rate_digits_contrastive"),
    *("fig4_samples", "fig5_reconstructions", "fig6_gate", "fig7_extractors", "fig8_prediction"),
]


@pytest.fixture(autouse=True)
def agg(monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setattr(figures, "DPI", 50)
    yield
    assert not plt.get_fignums()


def drawn(out):
    return sorted(path.stem for path in out.glob("*.png"))


def test_every_figure_is_drawn(make_study, rate, capsys):
    rates = rate(4, 64, 9, 14, 0.75, 7), rate(16, 64, 3.5, 22, 0.55, 2.5, usage=0.4), rate(16, 256, 2, 40, 0.5, 1.2)
    folder = make_study(rates=rates, images=True, guided=True, memorised=True, diverged=1)
    assert frontier.main([str(folder), "--predict-largest"]) == 0
    assert figures.main([str(folder)]) == 0
    out = folder / "figures"
    assert drawn(out) == NAMES
    for name in NAMES:
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
        caption = json.loads((out / f"{name}.json").read_text())
        text = (out / f"{name}.txt").read_text()
        assert caption["n"] > 0
        # what every caption has to name
        for fact in ("16x64 s0 (collapsed); 16x64 s1 (collapsed)", "1 diverged generator run", "2 tokenizer seeds"):
            assert fact in text, name
        assert "protocol unguided, 1,000 samples" in text
    assert "Extractor: digits-contrastive" in (out / "fig1_generation_digits_contrastive.txt").read_text()
    laws = pd.read_parquet(out / "laws.parquet")
    assert set(laws["metric"]) == {"fid_digits_supervised", "fid_digits_contrastive", "nll_bits"}
    assert len(laws) == 9
    assert {"a_low", "a_high", "identified", "aicc_power", "floor", "interval_method"} <= set(laws.columns)
    crossings = pd.read_parquet(out / "crossings.parquet")
    assert len(crossings) == 9
    assert set(crossings["verdict"]) <= {"crossing", "not identified", "no crossing in range"}
    written = (out / "report.md").read_text()
    for words in ("is best at", "tokenizer seeds of one rate differ by", "Spearman", "guided at", "predicted"):
        assert words in written, words
    assert "not drawn" not in capsys.readouterr().out


def test_figures_are_the_same_twice(digits, tmp_path):
    for name in ("a", "b"):
        assert figures.main([str(digits), "--out", str(tmp_path / name), "--only", "fig6_gate"]) == 0
    one, other = ((tmp_path / name / "fig6_gate.svg").read_bytes() for name in ("a", "b"))
    assert one == other
    assert drawn(tmp_path / "a") == ["fig6_gate"]


def test_a_study_under_way_gives_what_there_is(make_study, capsys, tmp_path):
    folder = make_study(budgets=(1e10, 3e10), sizes={"5k": 5000, "25k": 25000})
    path = folder / "compact" / "curves.parquet"
    whole = pl.read_parquet(path)
    whole.filter(~pl.col("checkpoint").str.starts_with("g")).write_parquet(path)
    assert figures.main([str(folder), "--out", str(tmp_path / "one")]) == 2
    said = capsys.readouterr()
    assert "fig1_generation: not drawn, no generator has gFID (digits-supervised) yet (0 of" in said.err
    assert len(said.err.splitlines()) == 1
    assert drawn(tmp_path / "one") == ["fig2_rate_distortion", "fig2_rate_distortion_digits_contrastive", "fig6_gate"]
    # a few generators of one rate: points without laws or contrasts
    first = whole["checkpoint"].str.starts_with("g")
    some = whole.filter(~first | pl.col("checkpoint").is_in(whole.filter(first)["checkpoint"].unique().sort()[:2]))
    some.write_parquet(path)
    assert figures.main([str(folder), "--out", str(tmp_path / "two"), "--only", "fig1_generation"]) == 0
    assert "planned but not measured" in (tmp_path / "two" / "fig1_generation.txt").read_text()
    assert "No answer yet" in report.text(report.Results(study.read(folder)))
    assert figures.main([str(folder), "--out", str(tmp_path / "two"), "--only", "fig3_best_rate"]) == 2


def test_a_damaged_part_is_named_and_survived(make_study, tmp_path, capsys):
    folder = make_study(compact=False, budgets=(1e10, 3e10), sizes={"5k": 5000, "25k": 25000}, seeds=(0,))
    part = sorted((folder / "tables" / "curves").rglob("*.parquet"))[0]
    part.write_bytes(part.read_bytes()[:50])
    assert figures.main([str(folder), "--out", str(tmp_path), "--only", "fig6_gate"]) == 0
    assert f"{part}: damaged, left out" in capsys.readouterr().err
    assert "Damaged files left out: 1." in (tmp_path / "fig6_gate.txt").read_text()


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "no such results folder"),
        (lambda folder: folder.mkdir(), "no plan.parquet; plan the study first"),
        (lambda folder: (folder.mkdir(), (folder / "plan.lock.json").write_text('{"version": 7}')), "version: got 7"),
        (lambda folder: (folder.mkdir(), (folder / "plan.parquet").write_bytes(b"PAR1")), "no plan.parquet"),
    ],
)
@pytest.mark.filterwarnings("ignore::analysis.load.DamagedPart")
def test_bad_input_is_one_sentence(prepare, sentence, tmp_path, capsys):
    prepare(tmp_path / "digits")
    assert figures.main([str(tmp_path / "digits")]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert len(said.err.splitlines()) == 1
    assert not said.out


def test_an_unmeasured_study_and_an_unknown_figure_are_said(make_study, digits, tmp_path, capsys):
    folder = make_study(budgets=(1e10,), sizes={"5k": 5000})
    (folder / "compact" / "curves.parquet").unlink()
    assert figures.main([str(folder)]) == 2
    assert "nothing measured yet (0 of 18 planned evaluations)" in capsys.readouterr().err
    assert figures.main([str(digits), "--out", str(tmp_path), "--only", "fig9"]) == 2
    assert "--only: got 'fig9'; allowed: fig1_generation" in capsys.readouterr().err


def test_the_module_runs(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "analysis.figures", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("no such results folder")


@pytest.mark.parametrize(
    ("value", "text"), [(0.05, "0.05"), (3000, "3,000"), (1e10, "$10^{10}$"), (3e10, r"$3\!\times\!10^{10}$")]
)
def test_ticks_are_readable(value, text):
    assert plain(value) == text


@pytest.mark.parametrize("span", [1.1, 1.5, 3, 12, 80, 1e3, 1e5])
def test_every_axis_has_some_ticks_but_not_many(span):
    figure, axes = plt.subplots()
    log_axis(axes, "y", 3.3, 3.3 * span)
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 9
    plt.close(figure)


def test_labels_are_moved_apart_in_their_order():
    placed = spaced([0.5, 0.5, 0.51, 0.9], 0.1)
    assert np.diff(sorted(placed)) == pytest.approx([0.1, 0.1, 0.29], abs=0.02)
    assert placed[3] == 0.9
    assert spaced([0.1, 0.9], 0.1) == [0.1, 0.9]
