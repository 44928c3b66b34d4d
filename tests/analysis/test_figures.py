"""Does every figure come out of a finished, unfinished, damaged or empty study, or one clear sentence?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import polars as pl
import pytest

from analysis import figures, frontier, load, report, study
from analysis.theme import log_axis, plain, spaced, verdict

pytestmark = pytest.mark.usefixtures("agg")

README = Path(__file__).parents[2] / "results" / "README.md"
SMALL = {"budgets": (1e10, 3e10, 1e11), "sizes": {"5k": 5_000, "25k": 25_000}}

NAMES = [
    *("fig1_generation", "fig1_generation_digits_contrastive", "fig2_rate_distortion"),
    *("fig2_rate_distortion_digits_contrastive", "fig3_best_rate", "fig3_best_rate_digits_contrastive"),
    *("fig4_samples", "fig5_reconstructions", "fig6_gate", "fig7_extractors", "fig8_prediction"),
]


def drawn(out):
    return sorted(path.stem for path in out.glob("*.png"))


def shown(out, name):
    """What a figure's caption says, and what its panels show."""
    held = json.loads((out / f"{name}.json").read_text())
    return held["text"], held["panels"]


def draw(folder, name):
    assert figures.main([str(folder), "--only", name]) == 0
    return shown(folder / "figures", name)


def change(folder, table, **columns):
    """Give columns of a compact table (or of the plan) other values."""
    path = folder / "plan.parquet" if table == "plan" else folder / "compact" / f"{table}.parquet"
    pl.read_parquet(path).with_columns(**columns).write_parquet(path)


def documented(table):
    """Columns that results/README.md describes."""
    section = README.read_text().split(f"### `{table}`")[1].split("\n##")[0]
    first = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in first for name in re.findall(r"`(\w+)`", cell)]


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
        of_tokenizers = name.startswith(("fig2", "fig5", "fig6"))
        assert ("6 tokenizers: 3 rates; 2 tokenizer seeds" in text) == of_tokenizers
        assert ("protocol tokenizer, 1,000 held-out images" in text) == of_tokenizers
        assert ("protocol unguided, 1,000 samples" in text) == (not name.startswith(("fig5", "fig6")))
        assert ("Flagged tokenizers (*)" in text) == name.startswith(("fig4", "fig5"))
        nothing_is_drawn_outside(name, caption["panels"])
    assert "Extractor: digits-contrastive" in (out / "fig1_generation_digits_contrastive.txt").read_text()
    assert "code length of 2,000 held-out images (b)" in (out / "fig1_generation.txt").read_text()
    predicted = (out / "fig8_prediction.txt").read_text()
    assert "Extractors: digits-supervised and digits-contrastive." in predicted
    for method in pd.read_parquet(folder / "prediction.parquet")["method"].unique():
        assert method in predicted
    for table in ("laws", "crossings", "best_rates", "../prediction"):
        columns = pd.read_parquet(out / f"{table}.parquet").columns
        assert sorted(columns) == sorted(documented(f"{Path(table).name}.parquet"))
    laws = pd.read_parquet(out / "laws.parquet")
    assert set(laws["metric"]) == {"fid_digits_supervised", "fid_digits_contrastive", "nll_bits", "two_part_bits"}
    assert len(laws) == 12
    assert {"a_low", "a_high", "identified", "aicc_power", "floor", "interval_method"} <= set(laws.columns)
    crossings = pd.read_parquet(out / "crossings.parquet")
    assert len(crossings) == 12
    assert set(crossings["verdict"]) <= {"crossing", "not identified", "no crossing in range"}
    written = (out / "report.md").read_text()
    for words in ("is best at", "tokenizer seeds of one rate differ by", "Spearman", "guided at", "predicted"):
        assert words in written, words
    assert "not drawn" not in capsys.readouterr().out


def nothing_is_drawn_outside(name, panels):
    """Curves, bands and markers lie between the ends of the y axis, and a log axis has three labelled ticks."""
    for panel in panels:
        low, high = panel["y"]["limits"]
        heights = [y for line in panel.get("lines", []) for y in line["y"] if y is not None]
        assert all(low * 0.999 <= y <= high * 1.001 for y in heights), (name, panel["title"])


def test_a_grid_without_sizes_is_drawn(make_study):
    folder = make_study(images=True, **SMALL)
    change(folder, "plan", generator_size=pl.lit(None, pl.String))
    _, panels = draw(folder, "fig3_best_rate")
    assert panels[0]["rectangles"]
    _, panels = draw(folder, "fig4_samples")
    assert [panel["title"] for panel in panels[:2]] == ["5000", "25000"]
    assert all(panel["pictures"] for panel in panels)


def test_a_gate_that_was_not_measured_is_not_passed(make_study):
    folder = make_study(images=True, **SMALL)
    path = folder / "compact" / "curves.parquet"
    whole = pl.read_parquet(path)
    # no tokenizer at half its training; one that nobody evaluated at all
    late = whole.filter(~pl.col("checkpoint").str.starts_with("t") | pl.col("checkpoint").str.ends_with("@2000"))
    lost = study.read(folder).codes.filter(rate="4x64", tokenizer_seed=1)["tokenizer"][0]
    late.filter(pl.col("checkpoint") != lost).write_parquet(path)
    assert set(load.tokenizers(folder)["gate"]) == {"convergence not measured"}
    text, panels = draw(folder, "fig1_generation")
    assert (
        "Convergence not measured for 4x64 s0; 16x64 s0; 16x64 s1; 16x256 s0; 16x256 s1 (half-filled markers)" in text
    )
    assert "Gate not measured for 4x64 s1 (half-filled markers)." in text
    assert "No tokenizer flagged" not in text
    assert {line["fill"] for line in panels[0]["lines"] if line["marker"] in "os"} == {"left"}
    text, panels = draw(folder, "fig6_gate")
    assert {line["fill"] for line in panels[0]["lines"] if line["marker"] == "o"} == {"left"}
    assert panels[1]["texts"] == ["not measured"]
    text, panels = draw(folder, "fig4_samples")
    assert "(?)" in text
    assert panels[0]["y"]["label"] == "4x64 ?"
    assert "Convergence not measured for 4x64 s0;" in report.text(report.Results(study.read(folder)))


@pytest.mark.parametrize(
    ("gates", "word"),
    [
        (["ok"], "passes"),
        ([None], "not measured"),
        (["ok", "convergence not measured"], "not measured"),
        (["collapsed, convergence not measured"], "flagged"),
        ([None, "ok", "unconverged"], "flagged"),
    ],
)
def test_the_worst_of_gates_counts(gates, word):
    assert verdict(gates) == word


def test_one_flagged_seed_is_not_all_of_them(make_study):
    folder = make_study(tokenizer_sd=0.0, **SMALL)
    wrong = study.read(folder).codes.filter(rate="16x64", tokenizer_seed=1)["tokenizer"][0]
    less = (pl.col("checkpoint") == wrong) & (pl.col("metric") == "perplexity")
    change(folder, "curves", value=pl.when(less).then(1.0).otherwise(pl.col("value")))
    text, (cells, curves) = draw(folder, "fig3_best_rate")
    assert "Flagged tokenizers (open markers): 16x64 s1 (collapsed)." in text
    dots = [(line["x"][0], line["fill"]) for line in curves["lines"] if line["marker"] == "o"]
    assert set(dots) == {(24.0, "full"), (96.0, "full"), (96.0, "none"), (128.0, "full")}
    assert sum(fill == "none" for _, fill in dots) == len(SMALL["budgets"])
    # a mean over seeds of which one is flagged says so
    stars = {(line["x"][0], line["fill"]) for line in curves["lines"] if line["marker"] == "*"}
    assert stars == {(24.0, "full"), (96.0, "full"), (96.0, "none")}  # the white one below a star is full
    names = {name for name in cells["texts"] if not name.endswith("x") or "*" in name}
    assert names == {"4x64", "16x64 *"}


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ({"seeds": (0, 1)}, "Bands: 95 % over 2 tokenizer seeds (hierarchical bootstrap (tokenizer seed > "),
        ({"seeds": (0,)}, "No bands: one tokenizer seed with one generator seed"),
        ({"seeds": (0,), "generator_seeds": (0, 1, 2)}, "Bands: 95 % over generator seeds given one tokenizer (boot"),
    ],
)
def test_bands_are_named_by_what_they_are_over(make_study, seeds, sentence):
    folder = make_study(**seeds)
    text, _ = draw(folder, "fig1_generation")
    assert sentence in text
    written = report.text(report.Results(study.read(folder)))
    assert ("95 % (hierarchical" in written) == (len(seeds["seeds"]) > 1)
    assert ("paired by tokenizer seed" in written) == (len(seeds["seeds"]) > 1)
    text, _ = draw(folder, "fig3_best_rate")
    assert ("none can be resolved with one tokenizer seed" in text) == (len(seeds["seeds"]) == 1)


def test_an_outcome_off_the_axis_is_an_arrow_with_its_number(make_study):
    folder = make_study(tokenizer_sd=0.0, generator_sd=0.0)
    assert frontier.main([str(folder), "--predict-largest"]) == 0
    path = folder / "prediction.parquet"
    held = pl.read_parquet(path)
    for column in ("predicted", "low", "high"):
        held = held.with_columns(pl.when(rate="4x64").then(pl.col(column) / 9).otherwise(column).alias(column))
    held.write_parquet(path)
    text, panels = draw(folder, "fig8_prediction")
    assert "6 of 9 outcomes lie inside." in text
    for panel in panels:
        top = panel["y"]["limits"][1]
        assert [line for line in panel["lines"] if line["marker"] == "^" and line["y"] == [top]]
        assert [number for number in panel["texts"] if 8 < float(number.removesuffix("x")) < 10]


def test_an_outcome_that_lacks_a_seed_is_said_to(make_study):
    folder = make_study(images=False)
    assert frontier.main([str(folder), "--predict-largest"]) == 0
    points = study.read(folder).points
    lost = points.filter(rate="4x64", tokenizer_seed=1, flops_target=points["flops_target"].max())["run_id"].to_list()
    path = folder / "compact" / "curves.parquet"
    pl.read_parquet(path).filter(~pl.col("run_id").is_in(lost)).write_parquet(path)
    text, panels = draw(folder, "fig8_prediction")
    assert "3 outcomes are incomplete." in text  # of three metrics
    assert "of 6 outcomes lie inside" in text
    for panel in panels:
        means = [line["x"] for line in panel["lines"] if line["marker"] == "_"]
        assert means == [[1.0], [2.0]]  # none at 4x64, whose other seed is drawn
        assert [line["x"] for line in panel["lines"] if line["marker"] == "o"].count([0.0]) == 1
    written = report.text(report.Results(study.read(folder)))
    assert len(re.findall(r"4x64 at 3e11 FLOPs: predicted .*; outcome incomplete\.", written)) == 3


def test_a_damaged_prediction_is_said_and_survived(make_study, capsys):
    folder = make_study(**SMALL)
    (folder / "prediction.parquet").write_bytes(b"PAR1")
    assert figures.main([str(folder), "--only", "fig8_prediction"]) == 2
    said = capsys.readouterr()
    assert "prediction.parquet: damaged" in said.err
    assert "prediction.parquet is damaged" in said.err
    assert "## Prediction" not in report.text(report.Results(study.read(folder)))


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
    for name in drawn(tmp_path / "one"):
        text, _ = shown(tmp_path / "one", name)
        assert "6 tokenizers: 3 rates; 2 tokenizer seeds and 1 evaluation seed; protocol tokenizer, 1,000 held" in text
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
        (lambda folder: (folder.mkdir(), (folder / "plan.parquet").write_bytes(b"PAR1")), "plan.parquet: damaged"),
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


@pytest.mark.parametrize(
    ("low", "high"), [*((3.3, 3.3 * span) for span in (1.1, 1.5, 3, 12, 80, 1e3, 1e5, 1e12)), (12, 90), (4.4, 8)]
)
def test_every_axis_has_some_ticks_but_not_many(low, high):
    figure, axes = plt.subplots()
    log_axis(axes, "y", low, high)
    bottom, top = axes.get_ylim()
    ticks = [
        label for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True) if bottom <= tick <= top
    ]
    assert 3 <= len([label for label in ticks if label.get_text()]) <= 9
    plt.close(figure)


def test_a_single_value_has_an_axis_too():
    figure, axes = plt.subplots()
    log_axis(axes, "x", 3e9, 3e9)
    low, high = axes.get_xlim()
    assert low < 3e9 < high < 4e9
    plt.close(figure)


def test_labels_are_moved_apart_in_their_order():
    placed = spaced([0.5, 0.5, 0.51, 0.9], 0.1)
    assert np.diff(sorted(placed)) == pytest.approx([0.1, 0.1, 0.29], abs=0.02)
    assert placed[3] == 0.9
    assert spaced([0.1, 0.9], 0.1) == [0.1, 0.9]
