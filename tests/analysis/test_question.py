"""Does the command line fit anyone's table, say what it did, and refuse with a code?"""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from analysis.fit import fit, main
from analysis.forms import FORMS
from analysis.result import Fit

FLOPS = np.geomspace(1e16, 1e20, 9)
RUNS = pl.DataFrame(
    {
        "Training FLOP": FLOPS,
        "model size": (FLOPS / 6 / 20) ** 0.5,
        "fid": (2 + 30 * (FLOPS / 1e16) ** -0.4) * np.exp(0.03 * np.random.default_rng(0).standard_normal(9)),
        "fid error": np.linspace(0.3, 0.05, 9),
        "run": [f"r{i}" for i in range(9)],
        "protocol": ["50k, cfg 1"] * 9,
    }
)
LAW = ["--x", "Training FLOP", "--y", "fid"]


@pytest.fixture
def table(tmp_path):
    def written(frame=RUNS, name="runs.csv"):
        path = tmp_path / name
        {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}[path.suffix](path)
        return str(path)

    return written


def asked(capsys, *arguments):
    code = main([str(each) for each in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize("name", ["runs.csv", "runs.parquet", "runs.jsonl"])
def test_a_law_an_interval_and_a_record(table, tmp_path, capsys, name):
    out = tmp_path / "law.json"
    code, text, error = asked(capsys, table(name=name), *LAW, "--predict", "x=1e21", "--json", out)
    assert (code, error) == (0, "")
    held = json.loads(out.read_text())
    expected = fit(FLOPS, RUNS["fid"])
    assert held["params"] == pytest.approx(expected.params, rel=1e-6)
    assert held["bse"] == pytest.approx(expected.bse, rel=1e-4)
    assert held["conf_int"]["a"] == pytest.approx(expected.conf_int().loc["a"].tolist(), rel=1e-4)
    assert held["interval_method"] == "delta, Student-t, points taken as independent"
    assert (held["n"], held["n_groups"], held["dof"], held["at_bound"], held["refused"]) == (9, None, 6, {}, None)
    assert held["objective"] == pytest.approx(expected.objective, rel=1e-6)
    assert held["selection"].startswith("9 of 9 rows of ")
    (ahead,) = held["predictions"]
    assert ahead["kind"] == "extrapolation"
    assert ahead["outside_decades"]["x"] == pytest.approx(1)
    frame = expected.get_prediction([1e21]).summary_frame()
    assert ahead["mean_ci_upper"] == pytest.approx(frame["mean_ci_upper"].iloc[0], rel=1e-4)
    assert held["without"]["form"] == "power"
    assert "the points ask for the fuller form" in text
    assert "1 decades beyond x" in text
    assert Fit.from_json(out.read_text()).params == held["params"]  # the record is the result, too


def test_names_with_spaces_expressions_and_filters(table, tmp_path, capsys):
    out = tmp_path / "law.json"
    code, text, _ = asked(
        *(capsys, table(), "--derive", 'D="Training FLOP"/(6*"model size")', "--derive", "C=D*1e3"),
        *("--x", "x=C", "--y", "fid", "--where", '"Training FLOP" > 2e16', "--where", "fid < 25", "--json", out),
    )
    assert code == 0
    held = json.loads(out.read_text())
    assert held["conventions"] == {"D": '"Training FLOP"/(6*"model size")', "C": "D*1e3"}
    assert held["n"] == int(((RUNS["Training FLOP"] > 2e16) & (RUNS["fid"] < 25)).sum()) < 9
    assert held["inputs"] == ["C"]
    assert "x = C" in text
    assert "where fid < 25" in held["selection"]


def test_the_chinchilla_replication_from_its_published_table(tmp_path, capsys):
    out = tmp_path / "law.json"
    code, text, _ = asked(
        *(capsys, "results/published/chinchilla.parquet", "--law", "chinchilla", "--x", "N=model_size", "--x", "D=D"),
        *("--derive", "D=flops/(6*model_size)", "--y", "loss", "--where", "loss < 3.446995430227908"),
        *("--loss", "huber", "--delta", "1e-3", "--bootstrap", "400", "--seed", "42", "--json", out),
    )
    held = json.loads(out.read_text())
    assert code == 0
    assert held["objective"] == pytest.approx(1.0182740178005976e-03, abs=1e-9)
    assert held["params"]["A"] == pytest.approx(477.8259, rel=1e-6)
    assert (held["loss"], held["delta"], held["draws"], held["seed"], held["n"]) == ("huber", 1e-3, 400, 42, 240)
    assert held["interval_method"] == "percentiles, bootstrap of rows, taken as independent, 400 draws, seed 42"
    assert 80 < held["bse"]["A"] < 180
    assert held["aicc"] is None
    assert "240 of 245 rows" in held["selection"]
    assert "Monte-Carlo errors" in text


def test_groups_weights_and_bootstraps_of_groups(table, tmp_path, capsys):
    rng = np.random.default_rng(1)
    frame = pl.concat(
        [
            RUNS.with_columns(pl.col("fid") * float(np.exp(0.1 * rng.standard_normal())), seed=s)
            for s in (pl.lit(i) for i in range(3))
        ]
    )
    path, out = table(frame), tmp_path / "law.json"
    assert asked(capsys, path, *LAW, "--group", "seed", "--json", out)[0] == 0
    held = json.loads(out.read_text())
    assert (held["n_groups"], held["dof"]) == (3, 2)
    assert held["interval_method"].startswith("delta, cluster-robust over 3 groups")
    asked(capsys, path, *LAW, "--group", "seed", "--bootstrap", "100", "--json", out)
    assert "bootstrap of 3 groups" in json.loads(out.read_text())["interval_method"]
    asked(capsys, path, *LAW, "--group", "seed", "--interval", "rows", "--bootstrap", "100", "--json", out)
    assert "rows, taken as independent" in json.loads(out.read_text())["interval_method"]
    asked(capsys, path, *LAW, "--error", "fid error", "--json", out)
    expected = fit(frame["Training FLOP"], frame["fid"], weights=(frame["fid"] / frame["fid error"]) ** 2)
    assert json.loads(out.read_text())["params"] == pytest.approx(expected.params, rel=1e-6)


@pytest.mark.parametrize(
    ("frame", "more", "code", "words"),
    [
        (RUNS[:3], [], "too_few", "3 distinct x for 3 parameters"),
        (
            RUNS.with_columns(protocol=pl.col("run")),
            ["--protocol", "protocol"],
            "mixed_protocols",
            "protocol: 9 values",
        ),
        (pl.concat([RUNS, RUNS[:1]]), ["--id", "run"], "duplicate_run", "r0 stands 2 times"),
        (pl.concat([RUNS, RUNS[:1]]), [], "duplicate_run", "2 rows are not the only ones with their fid"),
        (RUNS, ["--interval", "profile", "--loss", "huber", "--delta", "0.1"], "unsuited", "other losses"),
        (RUNS.with_columns(fid=pl.col("fid") - 3), [], "non_positive", "positive values"),
        (
            RUNS.with_columns(fid=pl.when(pl.col("run") != "r1").then("fid")),
            [],
            "not_finite",
            "1 of 9 rows have no fid (the first is row 2); --where 'fid IS NOT NULL'",
        ),
        (RUNS.with_columns(pl.lit(1e20).alias("Training FLOP")), [], "constant", "does not vary"),
        (RUNS.with_columns(pl.col("Training FLOP") * 1e300), [], "overflow", "infinite"),
        (RUNS, ["--derive", '"D"="model size"*20'], "collinear", "N and D move together"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refusals_have_a_code_a_sentence_and_a_record(table, tmp_path, capsys, frame, more, code, words):
    out, law = tmp_path / "law.json", LAW
    if code == "collinear":
        more, law = ["--derive", 'D="model size"*20'], ["--law", "chinchilla", "--x", "N=model size", "--x", "D=D"]
        law += ["--y", "fid"]
    status, text, error = asked(capsys, table(frame), *law, *more, "--json", out)
    held = json.loads(out.read_text())
    assert (status, text, held["refused"]["code"]) == (3, "", code)
    assert words in held["refused"]["sentence"]
    assert held["refused"]["sentence"] in error
    for key in ("params", "bse", "conf_int", "interval_method", "objective", "n", "n_groups", "dof", "at_bound"):
        assert held[key] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--x", "N=flops", "--y", "fid"], "saturating (y = E + A x^-a) takes --x x=COL"),
        (["--x", "flop", "--y", "fid"], "got 'flop'; columns: Training FLOP"),
        (["--law", "chinchilla", "--x", "N=model size", "--y", "fid"], "needs D too"),
        ([*LAW, "--loss", "huber"], "--loss huber needs one"),
        ([*LAW, "--delta", "0.1"], "squares has none"),
        ([*LAW, "--predict", "x=-1"], "write a positive number per input, x=1e9"),
        ([*LAW, "--predict", "N=1"], "write a positive number per input"),
        ([*LAW, "--where", "flops >"], "--where"),
        ([*LAW, "--bootstrap", "99"], "100 refits at least"),
        ([*LAW, "--bootstrap", "100", "--interval", "delta"], "draws nothing"),
        ([*LAW, "--figure", "law.tiff"], "a figure ends in"),
        (["--x", "run", "--y", "fid"], "not numbers"),
    ],
)
def test_bad_input_is_one_line(table, tmp_path, capsys, arguments, words):
    out = tmp_path / "law.json"
    status, text, error = asked(capsys, table(), *arguments, "--json", out)
    assert (status, text, error.count("\n")) == (2, "", 1)
    assert words in error
    assert not out.exists()


def test_help_names_every_law_and_works_three_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("power", "saturating", "chinchilla", "interaction", "overtraining", "broken", "tradeoff", "parabola"):
        assert f" {name} {' '.join(FORMS[name].formula.split())}" in text
    assert text.count("python -m analysis.fit") >= 4


def test_a_figure_and_its_caption(table, tmp_path, capsys):
    assert asked(capsys, table(), *LAW, "--figure", tmp_path / "law.png", "--predict", "x=1e21")[0] == 0
    assert (tmp_path / "law.png").stat().st_size > 20_000
    assert "y = E + A x^-a" in (tmp_path / "law.txt").read_text()
