"""Are published numbers what the sources say, typed, checked and drawn, and do the figures show what they must?"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from analysis import binarisation, catalogue, epochs, figures, literature, published, representations
from analysis.catalogue import COLUMNS, EVIDENCE, TABLES
from analysis.published import ROOT, build, parse, table
from analysis.refusal import Refusal
from analysis.result import Fit
from analysis.table import TableError

pytestmark = pytest.mark.usefixtures("agg")

SOURCES = ROOT / "sources"
SHARED = Path(__file__).parents[3] / "shared" / "data"

PANELS = {
    "fig1_llamagen_tokens": ["a  unguided", "b  best scale per cell", "c  fixed scale 1.75", "", "", ""],
    "fig2_maskbit_bits": ["a  generation", "b  reconstruction"],
    "fig3_compression_flips": [
        *("a  DC-AE, unguided", "b  DC-AE, guided", "c  f16 VAE, plain KL", "d  f16 VAE, aligned with DINOv2"),
    ],
    "fig4_raev2_layers": ["a  rFID", "b  PSNR (dB)", "c  gFID, unguided", "d  gFID, guided by the REPA head"],
    "fig5_ep_fid": [
        *("a  as published", "b  DINOv2-B", "c  DINOv3-B", "d  DINOv3-L"),
        *("e  EUPE-B", "f  SpatialPE-B", "g  WebSSL-1B"),
    ],
    "fig6_encoder_association": ["a  linear probe", "b  LDS", "c  linear probe", "d  LDS", "e  mean of both"],
    "fig7_crt": ["a  generation", "b  reconstruction"],
    "fig8_rcg": ["a  generators", "b  what MAGE-B is given", "c  representations", "d  images", "e  both"],
    "fig9_bidm": ["a  methods at 1 bit", "b  storage", "c  ablation", "d  operations"],
    "fig10_llamagen_laws": ["a  unguided", "b  best scale per cell", "c  fixed scale 1.75", *[""] * 6],
}


def only(frame: pl.DataFrame, column: str, **where: object) -> float:
    """The one value of a column among the rows where columns have these values."""
    held = frame.filter(*(pl.col(name).eq_missing(pl.lit(value)) for name, value in where.items()))[column]
    assert len(held) == 1, (where, held)
    return held[0]


# --- sources and tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["published_generation", "published_convergence", "chinchilla_svg_extracted"])
def test_sources_do_not_drift(name):
    origin = SHARED / f"{name}.csv"
    if not origin.is_file():
        pytest.skip("the data that the sources were copied from are not here")
    assert (SOURCES / f"{name}.csv").read_bytes() == origin.read_bytes()


def test_committed_tables_are_those_of_the_sources(tmp_path):
    assert build(SOURCES, tmp_path / "a") == list(TABLES)
    build(SOURCES, tmp_path / "b")
    assert sorted(path.stem for path in ROOT.glob("*.parquet")) == sorted(TABLES)
    for name in TABLES:
        assert_frame_equal(table(name), table(name, tmp_path / "a"))
        assert (tmp_path / "a" / f"{name}.parquet").read_bytes() == (tmp_path / "b" / f"{name}.parquet").read_bytes()
    assert {f"{held.source or name}.csv" for name, held in TABLES.items()} == {p.name for p in SOURCES.iterdir()}


def test_every_row_has_a_source_and_evidence():
    for name in TABLES:
        frame = table(name)
        assert frame["source"].null_count() == 0
        assert set(frame["evidence"]) <= set(EVIDENCE), name
        # nothing that has to be positive stands as 0
        for column, dtype in frame.schema.items():
            if COLUMNS[column] is catalogue.POSITIVE:
                assert dtype == pl.Float64
                assert not (frame[column] <= 0).any(), (name, column)


def test_a_row_is_missing_a_value_and_not_zero():
    assert only(table("crt"), "gfid", tokenizer="CRTopt", params_m=111.0) is None
    assert table("crt").filter(tokenizer="CRTopt")["rfid"].to_list() == [None] * 3
    assert only(table("ep_fid"), "epochs", method="DDT") is None


def broken(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """A copy of the sources with one text changed once."""
    folder = tmp_path / "sources"
    shutil.copytree(SOURCES, folder)
    text = (folder / f"{file}.csv").read_text()
    assert old in text
    (folder / f"{file}.csv").write_text(text.replace(old, new, 1))
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("crt", ",2.21,111,4.9,", ",2.21,111,-4.9,", r"row 2: column gfid: got '-4\.9'; allowed: a number above 0$"),
        ("crt", ",2.21,111,4.9,", ",2.21,111,0,", r"row 2: column gfid: got '0'; allowed: a number above 0$"),
        ("crt", ",2.21,111,4.9,", ",2.21,111,nan,", r"row 2: column gfid: got 'nan'"),
        ("crt", ",2.21,111,4.9,true", ",2.21,111,4.9,yes", r"column guided: got 'yes'; allowed: true or false$"),
        ("crt", "baseline,256,", "baseline,256.5,", r"column tokens: got '256\.5'; allowed: an integer from 1$"),
        ("crt", "secondary,baseline", "hearsay,baseline", r"column evidence: got 'hearsay'; allowed: code, repository"),
        ("crt", "secondary,baseline", ",baseline", r"column evidence: got None; allowed: text; a fact has a source"),
        ("crt", ",2.21,340,", ",2.21,111,", r"row 3: tokenizer=baseline, params_m=111\.0 stands in row 2 already"),
        ("crt", "tokenizer,tokens", "tokenizer,token", r"row 1: got columns .*; allowed: source, evidence, tokenizer"),
        (
            "bidm_results",
            ",67.92,",
            ",167.92,",
            r"column precision_pct: got '167\.92'; allowed: a number from 0 up to 100",
        ),
        (
            "published_generation",
            "prov=paper-text;",
            "prov=hearsay;",
            r"column notes: got 'prov=hearsay'; allowed: prim",
        ),
        ("published_generation", ";SSIM=0.575", ";SISM=0.575", r"row 2: column notes: got 'SISM='; allowed: .*SSIM"),
        (
            "published_generation",
            "prov=paper-text;",
            "paper-text;",
            r"column notes: got 'paper-text'; allowed: text that",
        ),
        (
            "published_convergence",
            "[table] JAX",
            "[tables] JAX",
            r"row 2: column notes: .*; allowed: \[table\], \[text\]",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, capsys, file, old, new, said):
    folder = broken(tmp_path, file, old, new)
    out = tmp_path / "out"
    assert published.main(["--sources", str(folder), "--out", str(out)]) == 2
    line = capsys.readouterr().err.strip()
    assert re.search(rf"{file}\.csv: .*{said}", line), line
    assert "\n" not in line
    assert not out.exists()


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TableError, match="table: got 'crts'; allowed: generation"):
        table("crts")
    with pytest.raises(TableError, match=r"crt\.parquet: no such file"):
        table("crt", tmp_path)
    with pytest.raises(TableError, match=r"crt\.csv: no such file"):
        parse("crt", tmp_path)
    table("crt").drop("note").write_parquet(tmp_path / "crt.parquet")
    with pytest.raises(TableError, match="columns are not those of the code"):
        table("crt", tmp_path)


def test_notes_become_columns():
    assert catalogue.pairs("prov=x; y;a_b=[0;1] z;c=") == {"prov": "x; y", "a_b": "[0;1] z", "c": ""}
    held = table("generation")
    row = held.row(0, named=True)
    assert row["caution"] == "SSIM computed with data_range=2 on [0;1] images in the repo script"
    assert (row["ssim"], row["usage"], row["input_px"], row["evidence"]) == (0.575, 0.0029, 256, "paper")
    searched = held.filter(pl.col("guidance") == "searched, step 0.25")
    assert len(searched) == 4
    assert searched["cfg"].null_count() == 4
    assert held["cfg"].is_not_null().sum() == 164 - 17  # the others are schedules, searches and pairs
    moved = table("convergence")
    assert dict(moved.group_by("evidence").len().iter_rows()) == {
        **{"table": 314, "digitised": 145, "secondary": 25, "issue": 8, "text": 7, "eye": 4},
    }
    assert moved.filter(cfg=2.0)["notes"].str.contains("cfg 2.0", literal=True).to_list() == [True] * 8
    assert set(moved["reference"].drop_nulls()) == {"ADM statistics", "JiT statistics"}


def test_readme_names_every_table_column_and_kind_of_evidence():
    readme = (ROOT / "README.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", readme, re.M | re.S))
    assert list(sections) == list(TABLES)
    for name, section in sections.items():
        columns = re.search(r"^- Columns: (.*?)\.\n", section, re.M | re.S)
        assert columns is not None
        assert tuple(re.findall(r"`(\w+)`", columns[1])) == TABLES[name].columns, name
        assert f"- {table(name).height} rows; source: " in section
    glossary = readme.split("## Columns")[1].split("## Figures")[0]
    described = dict(re.findall(r"^\| `(\w+)` \| .*? \| (.+) \|$", glossary, re.M))
    assert set(described) == set(COLUMNS)
    assert set(COLUMNS) == {column for held in TABLES.values() for column in held.columns}
    words = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", readme.split("## Tables")[0], re.M))
    assert words.pop("evidence") == "meaning"
    assert words == EVIDENCE
    assert set(re.findall(r"^\| `(fig\w+)` \|", readme, re.M)) == set(literature.FIGURES)


# --- numbers -----------------------------------------------------------------------------------------------------


def test_llamagen_has_122_rows():
    rows = literature.llamagen(ROOT)
    assert len(rows) == 122
    assert rows.select("tokens", "size", "epochs", "cfg").is_duplicated().sum() == 0
    assert (rows["guided"] == (rows["cfg"] != 1.0)).all()
    best = literature.PROTOCOLS["best scale per cell"](rows.filter(epochs=50))
    held = {(row["size"], row["tokens"]): (row["gfid"], row["cfg"]) for row in best.iter_rows(named=True)}
    assert held == {  # crt_llamagen notes, section 3.4
        **{("B", 256): (7.22, 2.25), ("L", 256): (4.218, 1.75), ("XL", 256): (3.391, 1.75)},
        **{("XXL", 256): (3.094, 1.75), ("3B", 256): (3.05, 1.5), ("B", 576): (8.309, 2.5), ("L", 576): (4.24, 2.0)},
        **{("XL", 576): (3.238, 2.0), ("XXL", 576): (2.893, 1.75), ("3B", 576): (2.611, 1.75)},
    }


@pytest.mark.parametrize(
    ("protocol", "brackets"),
    [("unguided", []), ("best scale per cell", [("L", "XL")]), ("fixed scale 1.75", [("XL", "XXL")])],
)
def test_the_crossing_depends_on_guidance(protocol, brackets):
    found = literature.token_crossings(literature.llamagen(ROOT).filter(epochs=50), protocol)
    assert [(each.below, each.above) for each in found] == brackets
    params = {"L": 343, "XL": 775, "XXL": 1400}
    assert all(params[each.below] < each.params_m < params[each.above] for each in found)


def test_a_crossing_is_where_power_laws_meet():
    """y = a N^-b meet at N = (a1 / a2)^(1 / (b1 - b2)), where interpolation in logarithms is exact."""
    params = np.geomspace(100, 3000, 5)
    few, many = 50 * params**-0.3, 500 * params**-0.7
    (found,) = literature.crossings("abcde", params.tolist(), few.tolist(), many.tolist())
    assert found.params_m == pytest.approx(10 ** (1 / 0.4))
    assert literature.crossings("abcde", params.tolist(), few.tolist(), (2 * few).tolist()) == []


# sizes by (tokens, epochs) in LlamaGen's tables 8 to 10
CELLS = {(256, 50): 5, (256, 300): 2, (576, 50): 5, (576, 100): 3, (576, 200): 5, (576, 300): 5}


def test_laws_of_size_are_fitted_where_there_are_sizes_enough():
    found = literature.size_laws(literature.llamagen(ROOT))
    assert len(found) == 3 * len(CELLS) * 2
    for law in found:
        assert law.rows.height == CELLS[law.tokens, law.epochs]
        assert law.rows["size"].is_unique().all()
        for column, value in (("tokens", law.tokens), ("epochs", law.epochs), ("guided", law.protocol != "unguided")):
            assert set(law.rows[column]) == {value}
        if law.protocol == "fixed scale 1.75":
            assert set(law.rows["cfg"]) == {1.75}
        if isinstance(law.found, Fit):
            assert law.found.n == law.rows.height
            assert law.found.y == pytest.approx(law.rows["gfid"].to_list())
            assert [x for (x,) in law.found.x] == pytest.approx((1e6 * law.rows["params_m"]).to_list())
            assert (law.found.inputs, law.found.output, law.found.form) == (("N",), "gFID", law.form)
    refused = {(law.tokens, law.epochs, law.form): law.found.code for law in found if isinstance(law.found, Refusal)}
    few = {(256, 300, "power"), (256, 300, "saturating"), (576, 100, "saturating")}
    assert refused == dict.fromkeys(few, "too_few")
    assert sum(isinstance(law.found, Refusal) for law in found) == 3 * len(few)


def test_laws_of_size_are_least_squares_on_logarithms():
    """A power law is a line in logarithms; of one with an asymptote, lower and higher E fit worse."""
    for law in literature.size_laws(literature.llamagen(ROOT)):
        if isinstance(law.found, Refusal):
            continue
        x, y = np.log(1e6 * law.rows["params_m"].to_numpy()), law.rows["gfid"].to_numpy()
        if law.form == "power":
            slope, level = np.polyfit(x, np.log(y), 1)
            assert law.found.params == pytest.approx({"A": np.exp(level), "a": -slope}, rel=1e-6)
            continue
        e, a = law.found.params["E"], law.found.params["a"]
        losses = []
        for e_tried, a_tried in ((e, a), (0.99 * e, a), (1.01 * e, a), (e, 0.99 * a), (e, 1.01 * a)):
            amplitude = law.found.params["A"]
            for _ in range(50):  # Newton's method on its logarithm
                term = amplitude * np.exp(-a_tried * x)
                gradient = term / (e_tried + term)
                amplitude *= np.exp((gradient * np.log(y / (e_tried + term))).sum() / (gradient**2).sum())
            losses.append((np.log(y / (e_tried + amplitude * np.exp(-a_tried * x))) ** 2).sum())
        assert losses[0] == pytest.approx(law.found.objective, rel=1e-6)
        assert losses[0] < min(losses[1:])


def test_laws_of_size_depend_on_guidance_and_form():
    """What the caption of the figure says in words."""
    rows = literature.llamagen(ROOT)
    found = {(law.protocol, law.tokens, law.epochs, law.form): law.found for law in literature.size_laws(rows)}
    whole = [cell for cell, count in CELLS.items() if count == 5]
    for protocol, cell in itertools.product(literature.PROTOCOLS, whole):
        power, saturating = (found[protocol, *cell, form] for form in ("power", "saturating"))
        assert power.aicc is not None
        assert saturating.aicc is None
        assert (power.dof, saturating.dof) == (3, 2)
        if protocol == "unguided":
            assert not saturating.identified["E"]
        else:
            assert saturating.sigma < power.sigma / 4
            assert saturating.params["a"] > 2.5 * power.params["a"]
    unguided = rows.filter(~pl.col("guided"), tokens=576)
    assert literature.size_law(unguided.filter(pl.col("epochs").is_in([50, 300])), "power").code == "mixed_protocols"
    over = literature.length_law(unguided)
    assert (over.n, over.n_groups, set(over.groups)) == (18, 5, set(literature.SIZES))
    assert not over.identified["b"]


def test_the_figure_of_the_laws_tells_fitted_refused_and_not_identified():
    held = json.loads((ROOT / "figures" / "fig10_llamagen_laws.json").read_text())
    laws = held["extra"]["laws"]
    for law, now in zip(laws, literature.size_laws(literature.llamagen(ROOT)), strict=True):
        assert (law["protocol"], law["tokens"], law["epochs"], law["form"]) == now[:4]
        assert law["n"] == CELLS[law["tokens"], law["epochs"]]
        assert ("refused" in law) == isinstance(now.found, Refusal)
        for name, ends in law.get("params", {}).items():
            assert ends[0] == pytest.approx(now.found.params[name], rel=1e-3)
            assert ends[1] <= ends[0] <= ends[2]
        level = f"{law['protocol']}, {law['tokens']} tokens, {law['epochs']} epochs: "
        if law["form"] == "saturating":
            assert (level in held["text"]) == ("E" in law.get("identified", ()))
    below = [panel["lines"] for panel in held["panels"][6:]]
    assert [sum(line["marker"] == "x" for line in panel) for panel in below] == [3, 3, 3]
    assert [sum(line["marker"] == "D" for line in panel) for panel in below] == [9, 9, 9]


def test_encoder_associations():
    probe, lds = (representations.scatter_association(ROOT, name) for name in ("linear_probe", "lds"))
    assert (probe.n, lds.n) == (27, 24)
    assert probe.estimate == pytest.approx(-0.2600, abs=3e-4)  # of digitised points; iREPA prints -.260
    assert lds.estimate == pytest.approx(-0.846, abs=5e-4)
    assert probe.low < 0 < probe.high
    printed = table("correlations").filter(encoders="common nine")
    for row in printed.iter_rows(named=True):
        found = representations.common_association(ROOT, row["arm"], row["property"])
        assert found.n == 9
        assert found.estimate == pytest.approx(row["r"], abs=0.006), row
    for row in table("correlations").drop_nulls("r_low").iter_rows(named=True):  # Fisher's z of what is printed
        half = 1.959964 / np.sqrt(row["n"] - 3)
        ends = np.tanh(np.arctanh(row["r"]) + np.array([-half, half]))
        assert ends == pytest.approx([row["r_low"], row["r_high"]], abs=0.011), row


def test_the_encoder_sweep_is_that_of_the_convergence_data():
    """18 encoders stand in two sources. The page draws averages of 8.4 and 5.9; those of the 18 are a little lower."""
    held = table("raev2_encoders")
    sweep = table("convergence").filter(pl.col("source").str.ends_with("fig_encoder_var.png"))
    names = sweep.with_columns(
        arm=pl.col("method").str.extract(r"^(.*) \(").str.replace(" + ", "+", literal=True),
        encoder=pl.col("method").str.extract(r"\((.*)\)"),
    )
    joined = held.join(names, on=["encoder", "arm"], validate="1:1")
    assert len(joined) == len(held) == len(sweep) == 36
    assert (joined["gfid"] == joined["gfid_right"]).all()
    means = dict(held.group_by("arm").agg(pl.col("gfid").mean()).iter_rows())
    assert means == {"RAE": pytest.approx(8.4, abs=0.1), "RAE+REPA": pytest.approx(5.9, abs=0.1)}


def test_layers_of_raev2():
    held = table("raev2_layers")
    unguided = held.filter(pl.col("metric") == "gfid", ~pl.col("guided"), method="RAEv2", epochs=80).sort("layers")
    assert unguided["layers"].to_list() == [*range(1, 11), 23]
    assert unguided["value"].is_sorted()
    guided = held.filter(pl.col("metric") == "gfid", "guided", method="RAEv2").sort("value")
    assert (guided["layers"][0], guided["value"][0], guided["evidence"][0]) == (7, 1.06, "page")
    rfid = held.filter(metric="rfid", method="RAEv2").sort("layers")["value"]
    assert rfid.diff().arg_max() == 8  # K = 9 goes up most
    same = table("convergence").filter(pl.col("source").str.contains("k_sweep|index.html"), ~pl.col("guided"))
    for layers, value in unguided.select("layers", "value").iter_rows():
        assert only(same, "gfid", method=f"RAEv2 K={layers}") == value


def test_epochs_to_a_threshold():
    """EP_FID@2 as published is a linear interpolation: 177 and 35."""
    slow, fast = (epochs.training_curve(ROOT, name) for name in (epochs.PAIRS[0].rae, epochs.PAIRS[0].raev2))
    assert epochs.epochs_to(slow, 2.0).linear == pytest.approx(80 + 0.23 / 0.38 * 160)
    assert epochs.epochs_to(slow, 2.0).bracket == (80, 240)
    assert round(epochs.epochs_to(slow, 2.0).linear) == only(table("ep_fid"), "epochs", method="RAE") == 177
    assert round(epochs.epochs_to(fast, 2.0).linear) == only(table("ep_fid"), "epochs", method="RAEv2") == 35
    assert epochs.epochs_to(slow, 2.0).log == pytest.approx(151.7, abs=0.05)
    assert epochs.epochs_to(fast, 2.0).log == pytest.approx(33.0, abs=0.05)
    eupe = epochs.training_curve(ROOT, "RAE (EUPE-B)")
    assert epochs.epochs_to(eupe, 2.0).linear == pytest.approx(75.0, abs=0.05)
    assert fast.select("epochs", "gfid").equals(
        epochs.training_curve(ROOT, "RAEv2 K=1 (EUPE-B)").select("epochs", "gfid")
    )
    assert epochs.epochs_to(epochs.training_curve(ROOT, "RAE (WebSSL-1B)"), 2.0).censored == "right"
    assert epochs.epochs_to(fast, 3.0).censored == "left"


def test_fdr_is_the_mean_of_its_parts():
    held = table("fdr")
    for method in ("RAE", "RAEv2"):
        parts = held.filter(pl.col("space").is_not_null(), method=method)
        assert set(parts["space"]) == set(table("fdr_spaces")["space"])
        assert parts["value"].mean() == pytest.approx(only(held, "value", method=method, space=None), abs=0.01)


def test_crt():
    held = table("crt")
    gains = [
        only(held, "gfid", tokenizer="CRT", params_m=size) / only(held, "gfid", tokenizer="baseline", params_m=size) - 1
        for size in (111.0, 340.0, 775.0)
    ]
    assert [round(100 * gain) for gain in gains] == [-11, -5, -8]
    assert held.filter(evidence="abstract").select("tokenizer", "params_m", "gfid").rows() == [("CRTopt", 775.0, 2.18)]
    rates = table("crt_sweeps")
    assert (rates["bits"] == rates["tokens"] * rates["codebook"].log(2).round(0)).all()
    assert (rates["bits_per_pixel"] - rates["bits"] / 256**2).abs().max() < 5.1e-4
    same = table("generation").filter(pl.col("source").str.starts_with("CRT"), pl.col("gfid").is_not_null())
    pairs = {(p, g) for p, g in held.drop_nulls("gfid").select("params_m", "gfid").iter_rows()}
    assert pairs == set(same.select("params_m", "gfid").iter_rows())


def test_maskbit_is_u_shaped():
    rows = table("generation").filter(pl.col("generator") == "MaskBit generator 64 steps").sort("latent_dim")
    assert rows["latent_dim"].to_list() == [10, 12, 14, 16, 18]
    assert rows["gfid"].to_list() == [1.68, 1.65, 1.62, 1.64, 1.67]
    assert rows["rfid"].to_list() == [1.76, 1.52, 1.37, 1.29, 1.16]


def test_rcg():
    held = table("rcg_generators")
    assert only(held, "fid", generator="DiT-XL/2", condition="RCG") == 4.89
    cost = table("rcg_cost")
    for row in held.filter(generator="MAGE-L").iter_rows(named=True):
        name = "RCG MAGE-L" if row["condition"] == "RCG" else "MAGE-L"
        assert cost.filter(pl.col("model") == name)["fid"].min() == row["fid"]
    default = table("rcg_ablations").filter(pl.col("fid") == 5.07)
    assert {"encoder", "RDM blocks", "RDM width", "conditioning"} <= set(default["factor"])
    assert set(default["rep_fd"].drop_nulls()) <= {0.47, 0.48, 0.49}


def test_bidm():
    held = table("bidm_results").filter(weight_bits=1)
    for data, gain in (("LSUN Bedrooms", 61.7), ("LSUN Churches", 30.7), ("FFHQ", 51.4)):
        rest = held.filter(pl.col("method") != "BiDM", pl.col("data") == data)["fid"].min()
        assert 100 * (1 - only(held, "fid", data=data, method="BiDM") / rest) == pytest.approx(gain, abs=0.06)
    costs = table("bidm_accounting").filter(model="LDM-4")
    for row in costs.drop_nulls(["binary_macs_g", "full_macs_g", "ops_g"]).iter_rows(named=True):
        assert row["binary_macs_g"] / 64 + row["full_macs_g"] == pytest.approx(row["ops_g"], abs=0.01)
    whole = only(costs, "params", network="full precision", convention="convolutions and linear layers")
    assert whole * 4 / 2**20 == pytest.approx(1045.44, abs=0.01)
    assert set(binarisation.LADDER) == set(table("bidm_ablations")["setting"])
    assert set(binarisation.METHODS) == set(table("bidm_results").filter(resolution=256)["method"])
    speed = table("bidm_speed")
    assert only(speed, "ms_per_iteration", row=8) * 200_000 / 3.6e6 == pytest.approx(30.4, abs=0.05)


# --- figures -----------------------------------------------------------------------------------------------------


def test_expected_panels_are_of_all_figures():
    assert list(PANELS) == list(literature.FIGURES)


@pytest.mark.parametrize("name", PANELS)
def test_a_figure_is_drawn_and_the_committed_one_is_current(tmp_path, name):
    assert figures.main([str(ROOT), "--out", str(tmp_path), "--only", name]) == 0
    held = json.loads((tmp_path / f"{name}.json").read_text())
    assert [panel["title"] for panel in held["panels"]] == PANELS[name]
    assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
    text = (tmp_path / f"{name}.txt").read_text()
    for part in ("Protocol: ", "Not to be concluded: ", "Source: ", f"n = {held['n']} published values: "):
        assert part in text
    assert held["extra"]["sources"]
    assert sum(held["extra"]["evidence"].values()) == held["n"]
    for panel in held["panels"]:
        (left, right), (low, high) = (sorted(panel[axis]["limits"]) for axis in "xy")
        for line in panel.get("lines", []):
            if line["marker"] in "osD^v*":  # markers lie inside the axes
                places = [(x, y) for x, y in zip(line["x"], line["y"], strict=True) if y is not None]
                assert all(left <= x <= right and low <= y <= high for x, y in places), (panel["title"], line)
    committed = ROOT / "figures"
    assert {path.suffix for path in committed.glob(f"{name}.*")} == {".png", ".svg", ".txt", ".json"}
    assert (committed / f"{name}.txt").read_text() == text
    before = json.loads((committed / f"{name}.json").read_text())
    assert before["extra"] == held["extra"]
    for was, now in zip(before["panels"], held["panels"], strict=True):
        was_lines, now_lines = (panel.get("lines", []) for panel in (was, now))
        assert [(line["x"], line["y"]) for line in was_lines] == [(line["x"], line["y"]) for line in now_lines]


def test_what_figures_show_follows_the_tables(tmp_path):
    """Another number in a table is another height in its figure."""
    shutil.copytree(ROOT, tmp_path / "published", ignore=shutil.ignore_patterns("figures"))
    held = table("crt").with_columns(gfid=pl.when(pl.col("gfid") == 4.9).then(4.7).otherwise(pl.col("gfid")))
    held.write_parquet(tmp_path / "published" / "crt.parquet")
    assert figures.main([str(tmp_path / "published"), "--only", "fig7_crt"]) == 0
    shown = json.loads((tmp_path / "published" / "figures" / "fig7_crt.json").read_text())["panels"][0]
    heights = {y for line in shown["lines"] for y in line["y"]}
    assert 4.7 in heights
    assert 4.9 not in heights


def test_a_figure_that_is_not_there_is_named(tmp_path, capsys):
    assert figures.main([str(ROOT), "--out", str(tmp_path), "--only", "fig1"]) == 2
    assert "--only: got 'fig1'; allowed: fig1_llamagen_tokens, " in capsys.readouterr().err
    (tmp_path / "published" / "sources").mkdir(parents=True)
    assert figures.main([str(tmp_path / "published")]) == 2
    assert "no such file; python -m analysis.published builds it" in capsys.readouterr().err
    assert not (tmp_path / "published" / "figures").exists()
