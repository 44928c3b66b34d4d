"""Do correlations over encoders return the published numbers, hold their level, and refuse what they cannot say?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis.association import EXAMPLES, Units, associate, collect, composite, main
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.scatter import said
from analysis.table import TableError

# The nine encoders with every value, digitised from the figures of RAEv2 (arXiv 2605.18324): linear probe in %, local
# minus distant similarity, gFID of RAE and RAE + REPA at 20 epochs and of REPA (SiT-XL/2) at 100k steps.
NINE = """encoder,family,lp,lds,rae,both,repa
DINOv2-B,DINOv2,83.9,.41,3.75,3.41,19.34
DINOv3-B,DINOv3,84.5,.38,4.12,2.78,21.24
DINOv3-L,DINOv3,87.0,.42,3.34,2.65,20.4
PE-B,PE,80.7,.20,6.18,4.57,22.47
PE-L,PE,85.5,.14,7.03,5.69,28.71
LangPE-L,LangPE,83.0,.20,5.00,3.88,22.03
SpatialPE-B,SpatialPE,70.8,.33,11.33,6.62,21.01
SpatialPE-L,SpatialPE,78.4,.34,8.73,5.72,21.11
WebSSL-1B,WebSSL,84.1,.18,8.57,6.05,25.53
"""
# 27 encoders of iREPA (arXiv 2512.10794), SiT-XL/2 at 100k steps: linear probe of mean-pooled patches in %, gFID.
PROBE = np.array(
    """56.9,41.51 51.8,40.00 82.8,32.35 80.0,29.90 78.3,28.70 57.3,26.89 76.0,26.10 82.1,25.91 73.1,25.24 67.2,22.44
    74.8,22.05 63.9,22.04 72.4,22.04 56.9,21.70 75.3,21.70 73.4,21.45 85.2,21.11 53.1,21.02 73.2,20.79 78.9,20.40
    77.0,20.25 75.3,20.02 72.4,19.97 68.1,19.86 58.7,19.81 75.5,19.37 71.6,19.34""".replace(",", " ").split(),
    float,
).reshape(-1, 2)
# The 24 of them whose local minus distant similarity could be read: gFID, LDS.
STRUCTURE = np.array(
    """41.5,.040 40.0,.064 32.4,.085 29.9,.094 28.7,.138 26.9,.160 26.1,.184 25.9,.260 25.2,.156 22.5,.193 22.04,.338
    22.04,.351 22.04,.192 21.7,.248 21.7,.408 21.45,.377 21.1,.427 21.0,.340 20.8,.358 20.4,.409 19.85,.335 19.8,.439
    19.36,.383 19.34,.415""".replace(",", " ").split(),
    float,
).reshape(-1, 2)


def units(clusters=None, **columns):
    return Units({name: np.asarray(values, float) for name, values in columns.items()}, clusters)


def exactly(matrix, n, seed=0):
    """Columns [p, n] whose sample correlations are exactly ``matrix``."""
    held = np.random.default_rng(seed).standard_normal((len(matrix), n))
    held -= held.mean(1, keepdims=True)
    return np.linalg.cholesky(np.asarray(matrix, float)) @ np.linalg.solve(np.linalg.cholesky(held @ held.T), held)


@pytest.fixture
def nine(tmp_path):
    path = tmp_path / "nine.csv"
    path.write_text(NINE)
    return path


def table_of(path):
    return {(r["subset"], r["x"], r["y"], r["minus"]): r for r in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize(
    ("r", "n", "low", "high"),
    [
        (0.336, 16, -0.19, 0.71),
        (-0.892, 19, -0.96, -0.74),
        (-0.561, 16, -0.83, -0.09),
        (-0.813, 16, -0.93, -0.53),
        (-0.129, 11, -0.68, 0.51),
        (-0.551, 11, -0.86, 0.07),
        (-0.639, 12, -0.89, -0.10),
        (-0.527, 9, -0.88, 0.21),
        (-0.829, 9, -0.96, -0.37),
    ],
)
def test_fisher_intervals_of_the_published_correlations(r, n, low, high):
    x, y = exactly([[1, r], [r, 1]], n)
    found = associate(units(x=x, y=y), "x", "y")
    assert (found.estimate, found.n) == (pytest.approx(r), n)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.0051), pytest.approx(high, abs=0.0051))
    scipy = stats.pearsonr(x, y).confidence_interval()
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high))


def test_encoders_of_irepa():
    probe = associate(units(lp=PROBE[:, 0], fid=PROBE[:, 1]), "lp", "fid")
    structure = associate(units(lds=STRUCTURE[:, 1], fid=STRUCTURE[:, 0]), "lds", "fid")
    assert (probe.n, round(probe.estimate, 3)) == (27, -0.260)
    assert (structure.n, round(structure.estimate, 3)) == (24, -0.846)


def test_common_subset_of_nine_encoders(nine, tmp_path):
    out = tmp_path / "out.json"
    # MAE-L has no structure value here: it counts in "all" and not in "common"
    nine.write_text(NINE + "MAE-L,MAE,85.0,,17.70,12.51,41.51\n")
    xs = ["--x", "lp,lds,mean", "--composite", "mean=lp,lds"]
    assert main([str(nine), *xs, "--y", "repa,rae,both", "--common", "--json", str(out)]) == 0
    rows = table_of(out)
    published = {"repa": (0.26, -0.83, -0.51), "rae": (-0.79, -0.34, -0.78), "both": (-0.63, -0.53, -0.83)}
    for y, values in published.items():
        for x, value in zip(("lp", "lds", "mean"), values, strict=True):
            row = rows["common", x, y, None]
            assert (row["r"], row["n"], row["dropped"]) == (pytest.approx(value, abs=0.006), 9, 1)
    assert rows["all", "lp", "rae", None]["n"] == 10
    assert rows["all", "lp", "rae", None]["r"] != pytest.approx(-0.79, abs=0.05)
    difference = rows["common", "lp", "repa", "lds"]
    one, other = rows["common", "lp", "repa", None], rows["common", "lds", "repa", None]
    assert difference["r"] == pytest.approx(one["r"] - other["r"])
    assert 0 < difference["low"] < difference["r"] < difference["high"]
    # the same predictor of two outcomes: r(repa, lp) - r(rae, lp)
    assert rows["common", "repa", "lp", "rae"]["r"] == pytest.approx(one["r"] - rows["common", "lp", "rae", None]["r"])


def test_spearman_has_the_variance_of_bonett_and_wright():
    """The example of ``ci.spear`` in statpsych (Bonett): .8700 with (.5841, .9638), n = 15."""
    y = [21, 4, 9, 12, 35, 18, 10, 22, 24, 1, 6, 8, 13, 16, 19]
    x = [67, 28, 30, 28, 52, 40, 25, 37, 44, 10, 14, 20, 28, 40, 51]
    found = associate(units(x=x, y=y), "x", "y", method="spearman")
    assert found.estimate == pytest.approx(0.8699639, abs=1e-7)
    assert (found.low, found.high) == pytest.approx((0.5840951, 0.9638297), abs=1e-6)


def test_difference_has_the_limits_of_zou():
    """Example 2 of Zou (2007): r12 .396, r13 .179, r23 .088, n = 66 gives (-.093, .517)."""
    y, one, other = exactly([[1, 0.396, 0.179], [0.396, 1, 0.088], [0.179, 0.088, 1]], 66)
    found = associate(units(y=y, one=one, other=other), "one", "y", minus="other")
    assert (round(found.low, 3), round(found.high, 3)) == (-0.093, 0.517)
    assert found.interval_method == "Zou, from Fisher z"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(6, 40))
def test_what_correlations_do_not_depend_on(seed, n):
    x, y = np.random.default_rng(seed).standard_normal((2, n)).round(6)
    for method, change in (("pearson", lambda v: 1e3 - 7 * v), ("spearman", lambda v: -np.exp(v))):
        for approach in ("fisher", "jackknife"):
            whole = associate(units(x=x, y=y), "x", "y", method=method, approach=approach)
            turned = associate(units(x=change(x), y=y), "x", "y", method=method, approach=approach)
            swapped = associate(units(x=x, y=y), "y", "x", method=method, approach=approach)
            assert turned.estimate == pytest.approx(-whole.estimate, abs=1e-8)
            assert swapped.estimate == pytest.approx(whole.estimate, abs=1e-12)
            if whole.low is not None:
                assert (turned.low, turned.high) == pytest.approx((-whole.high, -whole.low), abs=1e-7)
    assert associate(units(x=x, y=y), "x", "y").estimate == pytest.approx(stats.pearsonr(x, y).statistic)
    ranked = associate(units(x=x, y=y), "x", "y", method="spearman").estimate
    assert ranked == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(14, 40), st.sampled_from(["pearson", "spearman"]))
def test_partial_correlation_is_that_of_residuals(seed, n, method):
    held = np.random.default_rng(seed).standard_normal((4, n))
    held[:2] += held[2] - held[3] / 2
    x, y, a, b = held
    sample = units(x=x, y=y, a=a, b=b)
    found = associate(sample, "x", "y", given=["a", "b"], method=method)
    assert associate(sample, "y", "x", given=["b", "a"], method=method).estimate == pytest.approx(found.estimate)
    precision = np.linalg.inv(np.corrcoef(stats.rankdata(held, axis=1) if method == "spearman" else held))
    assert found.estimate == pytest.approx(-precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1]))
    if method == "pearson":  # n - k - 3 in place of n - 3
        half = (math.atanh(found.high) - math.atanh(found.low)) / 2
        assert half == pytest.approx(1.959964 / math.sqrt(n - 5))


def correlated(rng, shape, rho):
    return rng.standard_normal((*shape, 2)) @ np.array([[1, rho], [0, math.sqrt(1 - rho**2)]])


def families(rng, count, members, rho, shared=0.8):
    """Encoders in families: (x, y) of a family and of its members both correlate at rho."""
    made = math.sqrt(shared) * correlated(rng, (count, 1), rho)
    made = made + math.sqrt(1 - shared) * correlated(rng, (count, members), rho)
    return Units(dict(zip("xy", made.reshape(-1, 2).T, strict=True)), np.repeat(np.arange(count), members))


def covered(found, truth):
    return sum(each.low <= truth <= each.high for each in found if each.low is not None) / len(found)


@pytest.mark.parametrize("rho", [0.0, -0.8])
@pytest.mark.parametrize("n", [9, 27])
def test_fisher_covers_for_independent_units(n, rho):
    rng = np.random.default_rng(n)
    draws = [units(x=x, y=y) for x, y in (correlated(rng, (n,), rho).T for _ in range(1000))]
    assert 0.93 < covered([associate(each, "x", "y") for each in draws], rho) < 0.97
    rank = 6 / math.pi * math.asin(rho / 2)  # of the normal distribution
    assert 0.93 < covered([associate(each, "x", "y", method="spearman") for each in draws], rank) < 0.99


@pytest.mark.parametrize("rho", [0.0, -0.8])
@pytest.mark.parametrize("count", [7, 16])
def test_clusters_cover_where_their_units_would_not(count, rho):
    rng = np.random.default_rng(count)
    draws = [families(rng, count, 3, rho) for _ in range(600)]
    assert 0.925 < covered([associate(each, "x", "y") for each in draws], rho) < 0.98
    naive = [associate(Units(each.columns), "x", "y") for each in draws]
    assert covered(naive, rho) < 0.85


def test_bootstrap_over_clusters():
    rng = np.random.default_rng(5)
    draws = [families(rng, 20, 2, -0.6) for _ in range(80)]
    found = [associate(each, "x", "y", approach="bootstrap") for each in draws]
    assert 0.82 < covered(found, -0.6) < 0.98  # 0.9 in the long run: BCa undercovers with few clusters
    jackknife = [associate(each, "x", "y") for each in draws]
    widths = [np.mean([each.high - each.low for each in made]) for made in (found, jackknife)]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)
    assert found[0] == associate(draws[0], "x", "y", approach="bootstrap")  # the same draws each time
    assert found[0].n_groups == 20
    assert found[0].n == 40


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_difference_covers(method):
    """x1 and x2 correlate with y at .8 and .4, with each other at .5."""
    rng, rank = np.random.default_rng(3), lambda r: 6 / math.pi * math.asin(r / 2)
    root = np.linalg.cholesky([[1, 0.8, 0.4], [0.8, 1, 0.5], [0.4, 0.5, 1]])
    draws = [units(**dict(zip("yab", root @ rng.standard_normal((3, 16)), strict=True))) for _ in range(400)]
    truth = 0.4 if method == "pearson" else rank(0.8) - rank(0.4)
    found = [associate(each, "a", "y", minus="b", method=method) for each in draws]
    assert 0.93 < covered(found, truth) < 0.98


def test_seeds_are_not_units(tmp_path):
    """Ten encoders of five seeds, no association: seeds as units call it significant far too often."""
    rng = np.random.default_rng(0)
    wrong = right = 0
    for _ in range(200):
        lds, quality = np.repeat(rng.standard_normal((2, 10)), 5, axis=1)
        frame = pl.DataFrame({"encoder": np.repeat(list("abcdefghij"), 5), "lds": lds})
        frame = frame.with_columns(gfid=quality + 0.1 * rng.standard_normal(50))
        as_rows = associate(collect(frame, ["lds", "gfid"]), "lds", "gfid")
        by_encoder = associate(collect(frame, ["lds", "gfid"], unit="encoder"), "lds", "gfid")
        assert (as_rows.n, by_encoder.n) == (50, 10)
        wrong += as_rows.low > 0 or as_rows.high < 0
        right += by_encoder.low > 0 or by_encoder.high < 0
    assert wrong / 200 > 0.3
    assert right / 200 < 0.09


def test_units_are_means_of_what_is_known():
    frame = pl.DataFrame({"e": ["b", "a", "b", "c"], "f": ["x", "x", "x", "y"], "v": [1.0, 5.0, 3.0, None]})
    held = collect(frame.with_columns(w=pl.Series([None, float("nan"), 4.0, 2.0])), ["v", "w"], unit="e", cluster="f")
    np.testing.assert_array_equal(held.columns["v"], [5, 2, np.nan])
    np.testing.assert_array_equal(held.columns["w"], [np.nan, 4, 2])
    assert held.clusters.tolist() == [0, 0, 1]
    assert held.known(["v", "w"]).tolist() == [False, True, False]


def test_composite_is_the_mean_of_scaled_columns():
    assert composite([np.array([1.0, 3, 2]), np.array([10.0, 10, 20])]).tolist() == [0, 0.5, 0.75]
    with pytest.raises(Refusal, match="min-max"):
        composite([np.ones(3), np.arange(3.0)])


FOUR = {"x": [1.0, 2, 4, 3], "y": [1.0, 3, 2, 4]}


@pytest.mark.parametrize(
    ("columns", "how", "code", "said"),
    [
        ({"x": [1.0, 2, 3, np.nan], "y": [1.0, 3, 2, 4]}, {}, "too_few", "3 of 4 units have x, y"),
        (FOUR | {"z": [1.0, 2, 2, 1]}, {"given": ["z"]}, "too_few", "needs 5"),
        (FOUR | {"x": [0.1] * 4}, {}, "constant", "x is the same in all 4 units"),
        (FOUR | {"x": [1.0, 2, np.inf, 3]}, {}, "not_finite", "x is infinite in 1 of 4 units"),
        ({"x": range(6), "y": [1, 3, 2, 5, 4, 6], "z": range(0, 12, 2)}, {"given": ["z"]}, "collinear", "fix"),
    ],
)
def test_refusals_of_data(columns, how, code, said):
    with pytest.raises(Refusal, match=said) as refusal:
        associate(units(**columns), "x", "y", **how)
    assert refusal.value.code == code


def test_clusters_refuse_an_interval_for_independent_units():
    with pytest.raises(Refusal, match="4 units are 2 clusters") as refusal:
        associate(units(np.array([0, 0, 1, 1]), **FOUR), "x", "y", approach="fisher")
    assert refusal.value.code == "grouped"
    alone = associate(units(np.arange(4), **FOUR), "x", "y", approach="fisher")
    assert alone.low is not None


@pytest.mark.parametrize(
    ("held", "how", "said"),
    [
        (units(x=range(5), y=range(0, 10, 2)), {}, "perfect correlation"),
        (units(x=range(5), y=np.exp(range(5))), {"method": "spearman"}, "perfect correlation"),
        (units(np.array([0, 0, 1, 2]), **FOUR), {}, "3 clusters"),
        (units(**FOUR), {"approach": "bootstrap"}, "needs 8"),
        (units(x=[1, 2, 3, 9.0], y=[1, 2, 3, 0.0]), {"approach": "jackknife"}, "r is perfect"),
        (units(x=[1, 1, 1, 1, 1, 1, 1, 9.0], y=range(8)), {"approach": "bootstrap"}, "constant column"),
        (units(a=FOUR["x"], **FOUR), {"minus": "a"}, "perfectly correlated"),
        (units(a=FOUR["y"], **FOUR), {"minus": "a"}, "perfect correlation"),
    ],
    ids=["pearson", "spearman", "clusters", "bootstrap", "jackknife", "constant", "same", "perfect-minus"],
)
def test_no_interval_has_a_reason(held, how, said):
    found = associate(held, "x", "y", **how)
    assert (found.low, found.high) == (None, None)
    assert said in found.reason
    assert -2 < found.estimate <= 1


def test_table_shows_n_in_every_row(nine, capsys):
    arguments = [str(nine), "--x", "lp,lds", "--y", "rae", "--unit", "encoder", "--cluster", "family", "--common"]
    assert main([*arguments, "--where", "encoder <> 'PE-B'", "--method", "spearman"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    start = head.index("dropped") - len("clusters  ")
    names = ["units", "correlation", "r", "low", "high", "n", "clusters", "dropped", "interval", "(95%)"]
    assert head.split() == names
    assert [row[:start].split()[-1] for row in rows] == ["8"] * 5
    assert "r(lp, rae) - r(lds, rae)" in rows[-1]
    assert all("jackknife of z over clusters" in row for row in rows)


def test_refused_pairs_stand_in_the_table_and_the_json(nine, tmp_path, capsys):
    out = tmp_path / "out.json"
    derived = ["--derive", "flat=lp*0+1", "--derive", "odd=lp/0"]
    assert main([str(nine), "--x", "flat,odd,lp", "--y", "rae", *derived, "--json", str(out)]) == 0
    rows = table_of(out)
    assert rows["all", "flat", "rae", None] == {
        "group": None,
        "protocol": {},
        "notes": [],
        "subset": "all",
        "x": "flat",
        "y": "rae",
        "minus": None,
        "given": [],
        "method": "pearson",
        "r": None,
        "low": None,
        "high": None,
        "level": 0.95,
        "n": 9,
        "n_clusters": None,
        "dropped": None,
        "interval_method": None,
        "reason": "flat is the same in all 9 units",
        "refused": "constant",
    }
    assert rows["all", "odd", "rae", None]["refused"] == "not_finite"
    assert rows["all", "lp", "rae", None]["refused"] is None
    assert "refused (constant)" in capsys.readouterr().out
    assert main([str(nine), "--x", "lp", "--y", "rae", "--where", "lp > 85", "--json", str(out)]) == 3
    assert table_of(out)["all", "lp", "rae", None]["refused"] == "too_few"
    held = json.loads(out.read_text())["refused"]
    assert held == {"code": "too_few", "sentence": "2 of 2 units have lp, rae; a correlation needs 4"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--x", "lp", "--y", "gfid"], "--y: got 'gfid'; columns: encoder, family"),
        (["--x", "nope", "--y", "rae"], "--x: got 'nope'; columns"),
        (["--x", "lp", "--y", "rae", "--given", "nope"], "--given: got 'nope'; columns"),
        (["--x", "m", "--y", "rae", "--composite", "m=lp,nope"], "--composite: got 'nope'; columns"),
        (["--x", "lp", "--y", "rae", "--by", "kind"], "--by: got 'kind'"),
        (["--x", "lp", "--y", "rae", "--protocol", "kind"], "--protocol: got 'kind'"),
        (["--x", "lp", "--y", "rae", "--figure", "out.tif"], "--figure: got 'out.tif'; a figure ends in .png"),
        (["--x", "lp", "--y", "lp"], "lp stands there twice"),
        (["--x", "lp", "--y", "rae", "--given", "rae"], "rae stands there twice"),
        (["--x", "encoder", "--y", "rae"], "'encoder' holds String, not numbers"),
        (["--x", "lp", "--y", "rae", "--composite", "m=lp"], 'write "NAME=COL,COL"'),
        (["--x", "lp", "--y", "rae", "--cluster", "kind"], "--cluster: got 'kind'"),
        (["--x", "lp", "--y", "rae", "--unit", "family", "--cluster", "encoder"], "stands in"),
    ],
)
def test_mistakes_are_one_line(nine, tmp_path, capsys, arguments, said):
    out = tmp_path / "out.json"
    assert main([str(nine), *arguments, "--json", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_rows_without_a_unit_are_named():
    frame = pl.DataFrame({"e": ["a", None], "x": [1.0, 2.0]})
    with pytest.raises(TableError, match="--unit: 'e' is missing in 1 of 2 rows"):
        collect(frame, ["x"], unit="e")


def test_examples_of_the_help_run(nine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    held = pl.read_csv(nine).rename({"rae": "gfid"})
    held.write_csv("encoders.csv")
    pl.concat([held, held]).write_parquet("runs.parquet")
    long = held.unpivot(["lp", "lds"], index=["encoder", "gfid"], variable_name="property")
    long.with_columns(reference=pl.lit("adm")).write_csv("points.csv")
    commands = [line.split()[3:] for line in EXAMPLES.splitlines() if "python -m" in line]
    assert len(commands) == 5
    for command in commands:
        assert main(command) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    assert EXAMPLES.splitlines()[0] in capsys.readouterr().out


PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def test_a_correlation_for_each_property(tmp_path, capsys):
    """The two of iREPA, with the encoders each has, as in ``test_encoders_of_irepa``."""
    out, figure = tmp_path / "out.json", tmp_path / "r.svg"
    arguments = [str(PUBLISHED / "irepa_association.parquet"), "--x", "value", "--y", "gfid", "--json", str(out)]
    assert main([*arguments, "--by", "property", "--protocol", "reference,guided", "--figure", str(figure)]) == 0
    probe, structure = json.loads(out.read_text())["rows"]
    assert (probe["group"], probe["n"], round(probe["r"], 3)) == ("linear_probe", 27, -0.260)
    assert (structure["group"], structure["n"], round(structure["r"], 3)) == ("lds", 24, -0.846)
    assert probe["protocol"] == {"reference": "ADM statistics", "guided": "false"}
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.endswith(":")] == ["linear_probe:", "lds:"]
    assert said(probe) == "$r$ = −0.26 [−0.58, 0.13], n = 27"
    assert all(part in figure.read_text() for part in ("linear_probe", "n = 27", "n = 24"))
    assert main(arguments) == 0
    assert "pooled over property (2 values): --by gives a correlation for each" in capsys.readouterr().out


def test_rows_of_several_protocols_are_refused(nine, tmp_path, capsys):
    out = tmp_path / "out.json"
    steps = pl.read_csv(nine).with_columns(sampler=pl.Series(["heun"] * 8 + ["euler"]))
    steps.write_csv(nine)
    arguments = [str(nine), "--x", "lp", "--y", "rae", "--json", str(out), "--figure", str(tmp_path / "r.png")]
    for more in ([], ["--protocol", "sampler"]):
        assert main([*arguments, *more]) == EXIT_REFUSED
        assert json.loads(out.read_text())["refused"]["code"] == "mixed_protocols"
        assert not (tmp_path / "r.png").exists()
    assert main([*arguments, "--protocol", "none"]) == 0
    assert main([*arguments, "--by", "sampler"]) == 0  # of one encoder nothing is said, of the other eight it is
    assert [row["refused"] for row in json.loads(out.read_text())["rows"]] == [None, "too_few"]
    assert json.loads(out.read_text())["refused"] is None
    steps.with_columns(sampler=pl.Series(["heun"] * 8 + [None])).write_csv(nine)
    assert main([*arguments, "--protocol", "sampler"]) == EXIT_REFUSED
    assert "(no_protocol): sampler is missing in 1 of 9 rows" in capsys.readouterr().out


def test_what_a_unit_averages_is_said(tmp_path, capsys):
    """gFID of three arms, 9 encoders each: one point per encoder pools the arms."""
    out = tmp_path / "out.json"
    arguments = [str(PUBLISHED / "raev2_common_encoders.parquet"), "--x", "lds", "--y", "gfid", "--unit", "encoder"]
    assert main([*arguments, "--json", str(out)]) == 0
    told = "each of 9 units (encoder) is the mean of 3 rows, which differ in arm, generator, iterations, note"
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert json.loads(out.read_text())["rows"][0]["notes"] == [told]
    assert main([*arguments, "--by", "arm"]) == 0
    assert "mean of" not in capsys.readouterr().out
    uneven = pl.DataFrame({"e": ["a", "a", "b"], "x": [1.0, None, 2.0]})
    assert collect(uneven, ["x"], unit="e").notes == (
        "each of 2 units (e) is the mean of 1 to 2 rows",
        "1 row dropped: no value of x",
    )
