"""Does a back-test return the published errors, choose the law that made the points, and refuse, or leave undecided?"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from analysis.backtest import EXAMPLES, backtest, beside, main, text
from analysis.choice import choose, information, verdict
from analysis.fit import fit
from analysis.foresight import WILD, draw, limit, panels, write
from analysis.forms import FORMS, WITHOUT
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.solver import Objective
from analysis.splits import MOST, Points, Split, collect, later, left_out, levels
from analysis.table import TableError
from analysis.window import evaluate

CHINCHILLA = Path(__file__).parents[2] / "results" / "published" / "chinchilla.parquet"
KEPT = ["--derive", "D=flops/(6*model_size)", "--where", "loss < 3.446995430227908"]
COLUMNS = ["--x", "N=model_size", "--x", "D=D", "--y", "loss"]
# cut-off: rows fitted and predicted, alpha, beta, E, mean |ln error|, and for the first its signed mean
REFERENCE = {
    1e20: (136, 104, 0.3109, 0.4702, 1.8644, 0.00889, 0.00233),
    3e20: (177, 63, 0.3300, 0.4525, 1.8844, 0.00998, None),
    6e20: (198, 42, 0.3249, 0.4267, 1.8491, 0.01043, None),
    1e21: (217, 23, 0.3271, 0.3961, 1.8205, 0.01052, None),
}
RATES = (16.0, 24.0, 32.0, 48.0, 64.0, 96.0)


def points(y, groups=None, **columns):
    held = {name: np.asarray(values, float) for name, values in columns.items()}
    labels = None if groups is None else tuple(groups)
    return Points(held, np.asarray(y, float), np.arange(len(y)), labels)


def curve(seed, asymptote, exponent, noise, budgets=8, repeats=3, decades=3):
    """y = asymptote + 10 x^-exponent with relative noise."""
    x = np.repeat(np.geomspace(1, 10**decades, budgets), repeats)
    y = asymptote + 10 * x**-exponent
    return points(y * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x))), x=1e9 * x)


def tradeoff(noise, seed=0):
    """y = F R^-f + A R^r C^-a over six rates and six budgets."""
    rate, flops = (grid.ravel() for grid in np.meshgrid(RATES, np.geomspace(1e15, 1e18, 6)))
    y = 60 * rate**-0.8 + 4e3 * rate**1.2 * flops**-0.3
    return points(y * np.exp(noise * np.random.default_rng(seed).standard_normal(len(y))), R=rate, C=flops)


def windows(report, law, scheme="later budgets"):
    return [each for each in report.windows if (each.law, each.scheme) == (law, scheme)]


def strict(path):
    """JSON that holds neither NaN nor infinity."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


# Chinchilla: leave-future-out with Huber's loss


@pytest.fixture(scope="module")
def chinchilla(tmp_path_factory):
    out = tmp_path_factory.mktemp("chinchilla") / "out.json"
    how = ["--law", "chinchilla", "--by", "flops", "--cutoffs", "1e20,3e20,6e20,1e21", "--loss", "huber"]
    where = ["--project", "N=1e12,D=2e13,flops=1.2e26", "--json", str(out)]
    assert main([str(CHINCHILLA), *COLUMNS, *KEPT, *how, "--delta", "1e-3", *where]) == 0
    return strict(out)


@pytest.mark.parametrize("cutoff", REFERENCE)
def test_reference_numbers_of_the_chinchilla_points(chinchilla, cutoff):
    fitted, predicted, a, b, asymptote, error, signed = REFERENCE[cutoff]
    (found,) = [each for each in chinchilla["windows"] if each["law"] == "chinchilla" and each["value"] == cutoff]
    assert (found["n_train"], found["n_test"], found["refused"]) == (fitted, predicted, None)
    rounded = [round(found["params"][name], 4) for name in ("a", "b", "E")]
    assert rounded == [a, b, asymptote]
    assert round(found["errors"]["log_mae"], 5) == error
    assert signed is None or round(found["errors"]["signed"], 5) == signed
    assert found["errors"]["largest"] == pytest.approx(0.04, abs=0.015)


def test_chinchilla_is_chosen_and_told_from_the_form_without_an_asymptote(chinchilla):
    assert chinchilla["laws"] == ["chinchilla", "chinchilla_power"]
    (choice,) = chinchilla["choices"]
    assert (choice["law"], choice["n"], choice["n_units"]) == ("chinchilla", 104 + 63 + 42 + 23, 4)
    best, other = choice["scores"]
    assert best["behind"] is None
    errors = [REFERENCE[cutoff][5] for cutoff in REFERENCE]
    assert best["log_mae"] == pytest.approx(np.mean(errors), abs=1e-5)  # each cut-off counts once
    assert other["behind"]["estimate"] == pytest.approx(other["log_mae"] - best["log_mae"])
    assert (other["behind"]["dof"], other["behind"]["low"] > 0) == (3, True)


def test_predictions_and_projections_are_told_apart(chinchilla):
    rows = [row for row in chinchilla["rows"] if row["law"] == "chinchilla"]
    predictions = [row for row in rows if row["kind"] == "prediction"]
    assert len(predictions) == 232
    for row in predictions:
        assert row["log_error"] == pytest.approx(math.log(row["predicted"] / row["observed"]))
        assert row["relative_error"] == pytest.approx(row["predicted"] / row["observed"] - 1)
    (projection,) = [row for row in rows if row["kind"] == "projection"]
    assert [projection[name] for name in ("observed", "log_error", "inside", "value")] == [None] * 4
    assert (projection["along"], projection["place"]) == ("flops", "extrapolation")
    published = 1.8172181 + 477.8259 * 1e12**-0.34731050 + 2143.4174 * 2e13**-0.36717243
    assert projection["predicted"] == pytest.approx(published, rel=1e-6)
    assert projection["distance"] == pytest.approx(math.log10(1.2e26 / pl.read_parquet(CHINCHILLA)["flops"].max()))


def test_without_least_squares_an_interval_and_aicc_are_null_with_a_reason(chinchilla):
    assert {row["low"] for row in chinchilla["rows"]} == {None}
    assert all("least squares" in row["reason"] for row in chinchilla["rows"])
    assert {each["aicc"] for each in chinchilla["aicc"]} == {None}
    assert "AICc compares nothing" in chinchilla["verdict"]


# Known truths


def test_the_saturating_law_wins_where_there_is_an_asymptote():
    for seed in range(5):
        report = backtest(curve(seed, 2.0, 0.5, 0.02), ["saturating"], by="x")
        (choice,) = report.choices
        assert choice.law == "saturating"
        assert choice.sentence.startswith("saturating foretells later budgets with")
        assert "does not contradict" in report.verdict
        power = windows(report, "power")
        # without an asymptote every prediction is too low
        assert all(each.errors.signed < -0.02 for each in power if each.errors)


def test_the_power_law_wins_where_there_is_none():
    best = []
    for seed in range(15):
        (choice,) = backtest(curve(seed, 0.0, 0.1, 0.03, decades=2), ["saturating"], by="x").choices
        assert choice.law != "saturating"
        best.append(choice.scores[0].law)
    assert best.count("power") >= 10


def test_laws_that_cannot_be_told_apart_are_not():
    report = backtest(curve(0, 0.1, 0.3, 0.1), ["saturating"], by="x")
    (choice,) = report.choices
    assert choice.law is None
    assert set(choice.among) == {"saturating", "power"}
    assert choice.sentence.startswith("Not separated: ")
    behind = choice.scores[1].behind
    assert behind is not None
    assert behind.low is not None
    assert behind.low < 0 < behind.high


def test_a_tradeoff_law_foretells_rates_that_it_has_not_seen():
    report = backtest(tradeoff(0.01), ["tradeoff", "tradeoff_offset"], by="C", hold="R")
    held = windows(report, "tradeoff", "values left out")
    assert [each.value for each in held] == list(RATES)
    edges = {each.value for each in held if each.place == "extrapolation"}
    assert edges == {16.0, 96.0}
    for each in held:
        assert each.errors.log_mae < 0.02
        assert each.params["a"] == pytest.approx(0.3, rel=0.05)
        assert each.params["r"] == pytest.approx(1.2, rel=0.05)
    later_budgets, left = report.choices
    assert (left.law, left.n, left.n_units) == ("tradeoff", 36, 6)
    wrong = next(each for each in left.scores if each.law == "tradeoff_power")
    assert wrong.interpolation < 0.7 * wrong.extrapolation
    assert later_budgets.scores[0].law == "tradeoff"
    assert "tradeoff_offset" not in later_budgets.among


def test_without_noise_predictions_are_exact_and_have_no_interval():
    report = backtest(tradeoff(0.0), ["tradeoff"], by="C", hold="R")
    rows = [row for row in report.rows if row.law == "tradeoff"]
    assert max(abs(row.log_error) for row in rows) < 1e-5
    assert {(row.low, row.high, row.inside) for row in rows} == {(None, None, None)}
    assert all("last digit" in row.reason for row in rows)


def test_intervals_of_a_new_observation_hold_what_they_say():
    rng, held = np.random.default_rng(0), 0
    x = np.geomspace(1e9, 1e11, 8)
    split = Split("later budgets", "x", x[6], np.arange(8) < 7, np.arange(8) == 7)
    for _ in range(400):
        y = 100 * x**-0.2 * np.exp(0.05 * rng.standard_normal(8))
        _, (row,) = evaluate(points(y, x=x), "power", split)
        held += row.inside
    assert held / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))


# What is the unit of a comparison?


def test_equally_good_laws_are_rarely_told_apart():
    """Lines through two noisy copies of the same points foretell a third: by the unit of a fit 5 %, by rows most."""
    rng, trials, found = np.random.default_rng(0), 200, {"fits": 0, "rows": 0}
    x = np.repeat(np.linspace(0, 1, 8), 3)
    budget = np.repeat(np.arange(8), 3)
    for _ in range(trials):
        copies = {law: rng.standard_normal(24) for law in ("one", "other")}
        truth, rows = rng.standard_normal(24), []
        for cut in range(2, 7):
            for law, y in copies.items():
                seen = budget <= cut
                error = np.polyval(np.polyfit(x[seen], y[seen], 1), x[~seen]) - truth[~seen]
                rows += [
                    (law, float(cut), int(row), "extrapolation", float(e))
                    for row, e in zip(np.flatnonzero(~seen), error, strict=True)
                ]
        frame = pl.DataFrame(rows, ["law", "unit", "row", "place", "log_error"], orient="row")
        found["fits"] += choose(frame, {"one": 2, "other": 2}, "later budgets", "cut-offs").law is not None
        apart = frame.with_columns(unit=pl.col("unit") * 100 + pl.col("row"))
        found["rows"] += choose(apart, {"one": 2, "other": 2}, "later budgets", "rows").law is not None
    assert found["fits"] < 0.12 * trials
    assert found["rows"] > 0.3 * trials


def errors(**laws):
    """A frame of errors, each law with a dictionary from (unit, row) to its error."""
    rows = [
        (law, float(unit), row, "extrapolation", error)
        for law, held in laws.items()
        for (unit, row), error in held.items()
    ]
    schema = {"law": pl.String, "unit": pl.Float64, "row": pl.Int64, "place": pl.String, "log_error": pl.Float64}
    return pl.DataFrame(rows, schema, orient="row")


def test_only_predictions_that_all_laws_made_are_compared():
    keys = [(unit, row) for unit in (1, 2, 3) for row in range(unit, 4)]
    good = dict.fromkeys(keys, 0.01)
    bad = {(unit, row): 0.1 + 0.01 * unit for unit, row in keys if unit > 1}
    wild = good | {(1, row): 5.0 for row in range(1, 4)}
    found = choose(errors(good=good, bad=bad, wild=wild), {"good": 1, "bad": 1, "wild": 1, "mute": 9}, "b", "units")
    assert (found.n, found.n_units, found.silent) == (3, 2, ("mute",))
    assert {each.law: each.log_mae for each in found.scores}["wild"] == pytest.approx(0.01)  # its 5.0 has no rival
    assert found.law is None
    assert set(found.among) == {"good", "wild"}
    assert "they predict the same" in found.sentence
    assert "Worse: bad" in found.sentence
    assert "Refused everywhere: mute" in found.sentence


def test_one_cut_off_or_one_law_decides_nothing():
    one = choose(errors(a={(1, 0): 0.1, (1, 1): 0.1}, b={(1, 0): 0.3, (1, 1): 0.3}), {"a": 1, "b": 1}, "b", "cut-offs")
    assert (one.law, one.scores[1].behind.low) == (None, None)
    assert "all errors share one fit" in one.sentence
    alone = choose(errors(a={(1, 0): 0.1, (2, 0): 0.1}), {"a": 1}, "budgets", "cut-offs")
    assert alone.law is None
    assert "no other law" in alone.sentence
    nothing = choose(errors(), {"a": 1}, "budgets", "cut-offs")
    assert (nothing.n, nothing.silent) == (0, ("a",))
    apart = choose(errors(a={(1, 0): 0.1}, b={(2, 0): 0.1}), {"a": 1, "b": 1}, "budgets", "cut-offs")
    assert (apart.n, apart.scores) == (0, ())


def test_aicc_and_the_back_test_may_disagree():
    x = np.geomspace(1e9, 1e11, 12)
    y = 1 + 10 * (x / x[0]) ** -0.4 * np.exp(0.01 * np.sin(np.arange(12)))
    aicc = information({law: fit(x, y, law) for law in ("saturating", "power")} | {"broken": Refusal("too_few", "no")})
    assert [row["law"] for row in aicc] == ["saturating", "power", "broken"]
    assert aicc[2]["refused"] == {"code": "too_few", "sentence": "no"}
    held = {(unit, unit): 0.1 for unit in range(3)}
    against = errors(power=held, saturating={key: 0.5 + 0.01 * key[0] for key in held})
    power = choose(against, {"power": 2, "saturating": 3}, "later budgets", "cut-offs")
    assert power.law == "power"
    assert "they disagree" in verdict([power], aicc)
    assert "does not contradict" in verdict([choose(errors(), {"power": 2}, "b", "c")], aicc)


@pytest.mark.parametrize("law", FORMS)
def test_the_form_without_an_asymptote_is_always_beside(law):
    laws = beside([law, law])
    assert laws[0] == law
    assert len(set(laws)) == len(laws)
    assert laws[-1] not in WITHOUT
    form = FORMS[laws[-1]]
    assert law == "parabola" or not ({"E", "F"} & set(form.parameters))


# Splits


def test_budgets_that_differ_by_rounding_are_one():
    index, tops = levels(np.array([1.0, 100.0, 1.01, 99.0, 10.0]))
    assert index.tolist() == [0, 2, 0, 2, 1]
    assert tops.tolist() == [1.01, 10.0, 100.0]
    held = points(np.ones(5), x=[1.0, 100.0, 1.01, 99.0, 10.0])
    assert [(each.value, each.train.tolist()) for each in later(held, "x")] == [
        (1.01, [True, False, True, False, False]),
        (10.0, [True, False, True, False, True]),
    ]
    assert [each.test.sum() for each in left_out(held, "x")] == [2, 1, 2]


def test_of_many_budgets_a_few_are_cut_offs():
    held = points(np.ones(91), x=np.geomspace(1, 1e6, 91))
    counts = [int(each.train.sum()) for each in later(held, "x")]
    assert len(counts) == MOST
    assert np.ptp(np.diff(counts)) <= 1
    assert counts[0] > 5
    assert counts[-1] < 86
    assert [each.value for each in later(held, "x", [50.0, 5.0, 50.0])] == [5.0, 50.0]


def test_distances_are_decades_beyond_what_was_fitted():
    held = tradeoff(0.01)
    report = backtest(held, ["tradeoff"], by="C", hold="R", projections=[{"R": 192.0, "C": 1e17}])
    for row in report.rows:
        if row.kind == "projection":
            assert (row.along, row.distance) == ("R", pytest.approx(math.log10(2)))
        elif row.scheme == "later budgets":
            assert row.distance == pytest.approx(math.log10(row.inputs["C"] / row.value))
            assert row.place == "extrapolation"
        else:
            ratio = {16.0: 24 / 16, 96.0: 96 / 64}.get(row.value, 1.0)
            assert (row.distance, row.along) == (pytest.approx(math.log10(ratio)), "R")


def test_a_projected_point_that_was_measured_is_no_projection():
    held = curve(0, 2.0, 0.5, 0.02)
    at = [{"x": float(held.columns["x"][5]) * 1.001}, {"x": 3e10}, {"x": 1e13}]
    report = backtest(held, ["power"], by="x", projections=at)
    rows = [row for row in report.rows if row.kind != "prediction"]
    assert [row.kind for row in rows] == ["fitted", "projection", "projection"]
    assert [row.place for row in rows] == ["interpolation", "interpolation", "extrapolation"]
    assert [row.distance for row in rows] == [0.0, 0.0, pytest.approx(1.0)]
    assert all(row.low < row.predicted < row.high and row.identified for row in rows)


def test_an_interval_that_says_little_is_marked():
    held = curve(0, 0.0, 0.3, 0.3, budgets=5, repeats=1, decades=1)
    found = text(report := backtest(held, ["power"], by="x", projections=[{"x": 1e16}]), held, Objective())
    assert [row.identified for row in report.rows if row.kind == "projection"] == [False]
    assert "not identified" in found


def test_outcomes_do_not_leak_into_predictions():
    held = tradeoff(0.05)
    for split in [*later(held, "C")[1:], *left_out(held, "R")]:
        changed = np.where(split.test, held.y[::-1] * 7, held.y)
        one, other = (evaluate(points(y, **held.columns), "tradeoff", split) for y in (held.y, changed))
        assert one[0].params == other[0].params
        said = [[(row.predicted, row.low, row.high) for row in rows] for _, rows in (one, other)]
        assert said[0] == said[1]
        assert [row.observed for row in one[1]] != [row.observed for row in other[1]]


# Refusals


def test_a_fit_that_is_refused_is_a_row_and_not_an_exception():
    report = backtest(curve(0, 2.0, 0.5, 0.02), ["saturating"], by="x", min_train=14)
    codes = [each.refused and each.refused["code"] for each in windows(report, "power")]
    assert codes == ["too_few"] * 4 + [None] * 3
    assert "--min-train asks for 14" in windows(report, "power")[0].refused["sentence"]
    without = windows(backtest(curve(0, 2.0, 0.5, 0.02), ["saturating"], by="x"), "saturating")
    assert [each.refused is None for each in without] == [False] * 3 + [True] * 4
    for each in without:
        assert (each.errors is None) == (each.refused is not None) == (not each.params)


def test_one_group_has_no_interval_and_says_why():
    held = curve(0, 2.0, 0.5, 0.02)
    grouped = points(held.y, groups=["s0"] * len(held.y), **held.columns)
    rows = backtest(grouped, ["power"], by="x").rows
    assert {(row.low, row.inside, row.group) for row in rows} == {(None, None, "s0")}
    assert all("one group" in row.reason for row in rows)
    three = points(held.y, groups=["s0", "s1", "s2"] * 8, **held.columns)
    assert all(row.low < row.high for row in backtest(three, ["power"], by="x").rows if row.value > 2e10)


def test_rows_without_a_value_are_left_out_and_counted():
    frame = pl.DataFrame({"x": [1.0, 2.0, None, 4.0], "y": [4.0, None, 2.0, 1.0], "s": ["a", "b", "c", "d"]})
    found = collect(frame, ["power"], {"x": "x"}, "y", along=["x"], group="s")
    assert (found.rows.tolist(), found.groups, found.dropped) == ([0, 3], ("a", "d"), 2)
    assert found.note == "2 rows dropped: no value of y, x"


def test_a_run_that_stands_twice_is_refused(table, tmp_path, capsys):
    frame = pl.read_csv(table)
    pl.concat([frame, frame[3:5]]).with_row_index("row").write_csv(table)
    out = tmp_path / "out.json"
    assert main([str(table), *RUN, "--by", "x", "--group", "seed", "--json", str(out)]) == EXIT_REFUSED
    held = strict(out)["refused"]
    assert held["code"] == "duplicate_run"
    assert held["sentence"].startswith("4 rows are not the only ones with their my fid, flops, seed: a run")
    assert main([str(table), *RUN, "--by", "x", "--id", "row"]) == 0  # they are said to be other runs
    capsys.readouterr()
    assert main([str(table), *RUN, "--by", "x", "--id", "seed,steps"]) == EXIT_REFUSED
    assert "stands 2 times among the rows (--id)" in capsys.readouterr().err
    assert main([str(table), *RUN, "--by", "x", "--group", "row"]) == 0  # a group each


def test_rows_of_several_protocols_are_refused(table, tmp_path):
    out = tmp_path / "out.json"
    pl.read_csv(table).with_columns(samples=pl.Series([5000] * 20 + [50000] * 4)).write_csv(table)
    for more in ([], ["--protocol", "samples"]):
        assert main([str(table), *RUN, "--by", "x", *more, "--json", str(out)]) == EXIT_REFUSED
        assert strict(out)["refused"]["code"] == "mixed_protocols"
    assert main([str(table), *RUN, "--by", "x", "--protocol", "none"]) == 0


def test_one_input_needs_no_name_and_numbers_are_numbers(table, tmp_path, capsys):
    out = tmp_path / "out.json"
    how = ["--by", "x", "--cutoffs", "5e10", "--loss", "huber", "--delta", "1e-3", "--json", str(out)]
    assert main([str(table), "--law", "power", "--x", "flops", "--y", "my fid", *how]) == 0
    held = strict(out)
    assert (held["delta"], held["cutoffs"], held["refused"]) == (1e-3, [5e10], None)
    printed = capsys.readouterr().out
    assert "(1 cut-off, 12 predictions)" in printed
    assert (
        "12 predictions without an interval: the scatter of new observations is that of least squares only" in printed
    )


@pytest.mark.parametrize(
    ("y", "code"), [([1.0, -1.0], "non_positive"), ([1.0, math.inf], "overflow"), ([None, None], "too_few")]
)
def test_values_that_have_no_logarithm_are_refused(y, code):
    frame = pl.DataFrame({"x": [1.0, 2.0], "y": pl.Series(y, dtype=pl.Float64)})
    with pytest.raises(Refusal) as caught:
        collect(frame, ["power"], {"x": "x"}, "y")
    assert caught.value.code == code


def test_one_budget_or_one_rate_is_refused():
    held = points(np.ones(4), x=[1.0, 1.01, 1.0, 1.0])
    for split in (later, left_out):
        with pytest.raises(Refusal, match="all rows are of one x"):
            split(held, "x")
    with pytest.raises(TableError, match=r"--cutoffs: got 5; x allows from 1 to below 1\.01"):
        later(held, "x", [5.0])


# Command line


@pytest.fixture
def table(tmp_path):
    held = curve(3, 2.0, 0.5, 0.02)
    frame = pl.DataFrame({"flops": held.columns["x"], "my fid": held.y, "seed": [0, 1, 2] * 8, "steps": range(24)})
    path = tmp_path / "runs.csv"
    frame.write_csv(path)
    return path


RUN = ["--law", "saturating", "--x", "x=flops", "--y", "my fid"]


def test_the_command_prints_a_table_and_sentences(table, tmp_path, capsys):
    out = tmp_path / "deep" / "out.json"
    more = ["--by", "x", "--group", "seed", "--project", "x=1e13", "--json", str(out)]
    assert main([str(table), *RUN, *more]) == 0
    printed = capsys.readouterr().out
    assert "refused (too_few)" in printed
    assert "saturating foretells later budgets with a mean |ln error|" in printed
    assert "projection (no run there) of saturating at x = 1e13" in printed
    assert "1 decade beyond the rows in x" in printed
    held = strict(out)
    assert (held["n"], held["dropped"], held["refused"]) == (24, 0, None)
    assert held["estimator"] == "least squares on log residuals"
    assert len(held["windows"]) == 2 * 7
    assert {row["group"] for row in held["rows"] if row["kind"] == "prediction"} == {"0", "1", "2"}
    tested = [row for row in held["rows"] if row["kind"] == "prediction" and row["law"] == "saturating"]
    inside = sum(each["errors"]["inside"] for each in held["windows"] if each["errors"] and each["law"] == "saturating")
    assert inside == sum(row["inside"] is True for row in tested)


def test_a_budget_may_be_a_column_that_no_law_sees(table, tmp_path):
    out = tmp_path / "out.json"
    derive = ["--derive", "images=256*(steps+1)"]
    project = ["--project", "x=1e13", "--project", "x=1e10,images=1e6"]
    assert main([str(table), *RUN, *derive, "--by", "images", *project, "--json", str(out)]) == 0
    held = strict(out)
    row = next(row for row in held["rows"] if row["kind"] == "prediction")
    assert (row["along"], list(row["inputs"])) == ("images", ["x"])
    assert row["distance"] == pytest.approx(math.log10(256 * (row["row"] + 1) / row["value"]))
    one, other = (row for row in held["rows"] if row["kind"] == "projection" and row["law"] == "power")
    assert (one["along"], one["distance"]) == ("x", pytest.approx(1.0))
    assert (other["along"], other["distance"]) == ("images", pytest.approx(math.log10(1e6 / (256 * 24))))


def test_where_every_fit_is_refused_the_command_is_too(table, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main([str(table), *RUN, "--by", "x", "--where", "flops < 1e10", "--json", str(out)]) == EXIT_REFUSED
    held = strict(out)
    assert {each["refused"]["code"] for each in held["windows"]} == {"constant", "too_few"}
    assert held["refused"]["code"] == "constant"
    assert "no prediction was made by any law" in held["choices"][0]["sentence"]
    assert main([str(table), *RUN, "--by", "x", "--derive", "flops=1e9", "--json", str(out)]) == EXIT_REFUSED
    assert strict(out)["refused"]["code"] == "too_few"
    assert "all rows are of one x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--law", "cubic", "--x", "x=flops", "--y", "my fid", "--by", "x"], "--law: got 'cubic'; allowed: saturating"),
        ([*RUN[:2], "--x", "N=flops", "--y", "my fid", "--by", "N"], "--x: no x; the inputs of saturating are x"),
        (["--law", "chinchilla", "--x", "flops", "--y", "my fid", "--by", "N"], "--x: got 'flops'; write NAME=COL"),
        (
            ["--law", "chinchilla,overtraining", "--x", "N=flops", "--x", "D=steps", "--y", "my fid", "--by", "N"],
            "no M; the inputs of overtraining are N, M, and each input of each law needs its own --x (M = D/N can be",
        ),
        ([*RUN, "--by", "x", "--project", "1e20"], "--project: got '1e20'; a point has x (write \"NAME=number,...\")"),
        ([*RUN, "--by", "x", "--id", "run"], "--id: got 'run'; columns"),
        ([*RUN, "--by", "x", "--figure", "out.tif"], "--figure: got 'out.tif'; a figure ends in .png"),
        ([*RUN, "--x", "D=steps", "--by", "x"], "--x: got D; the inputs of saturating are x"),
        ([*RUN, "--by", "C"], "got 'C'; columns: flops, my fid, seed, steps"),
        ([*RUN[:5], "my fid ", "--by", "x"], "--y: got 'my fid '; columns"),
        (RUN, "--by, --hold: neither given"),
        ([*RUN, "--hold", "x", "--cutoffs", "1e9"], "--cutoffs: they are of the budget"),
        ([*RUN, "--by", "x", "--cutoffs", "1e9,many"], "--cutoffs: got 'many'; allowed: a number above 0"),
        ([*RUN, "--by", "x", "--cutoffs", "1e15"], "--cutoffs: got 1e+15; x allows from 1e+09 to below 1e+12"),
        ([*RUN, "--by", "x", "--loss", "huber"], "--loss, --delta: got huber, None"),
        ([*RUN, "--by", "x", "--delta", "1e-3"], "--loss, --delta: got squares, 1e-3"),
        ([*RUN, "--by", "x", "--project", "x=-1"], "--project x: got '-1'; allowed: a number above 0"),
        ([*RUN, "--by", "x", "--project", "N=1e9"], "--project: got 'N=1e9'; a point has x"),
        ([*RUN, "--by", "x", "--group", "run"], "--group: got 'run'; columns"),
    ],
)
def test_wrong_options_are_one_line(table, tmp_path, capsys, arguments, told):
    out = tmp_path / "out.json"
    assert main([str(table), *arguments, "--json", str(out)]) == 2
    printed = capsys.readouterr()
    assert told in printed.err
    assert (len(printed.err.splitlines()), printed.out, out.exists()) == (1, "", False)


def test_a_name_that_is_an_input_and_another_column_is_refused():
    frame = pl.DataFrame({"x": [1.0, 2.0], "flops": [1.0, 3.0], "y": [1.0, 2.0]})
    with pytest.raises(TableError, match="'x' is an input and a column of its own"):
        collect(frame, ["power"], {"x": "flops"}, "y", along=["x"])


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame = pl.read_parquet(CHINCHILLA).filter(pl.col("loss") < 3.446995430227908)
    frame.select(params="model_size", flops="flops", loss="loss").write_csv("chinchilla.csv")
    held = tradeoff(0.02)
    seeds = np.repeat([0, 1, 2], 12)
    pl.DataFrame(
        {"bits": held.columns["R"], "flops": held.columns["C"], "gfid": held.y, "tokenizer_seed": seeds}
    ).write_parquet("points.parquet")
    told = EXAMPLES.replace("\\\n", " ").splitlines()
    commands = [line.split("python -m analysis.backtest ")[1] for line in told if "python -m" in line]
    assert len(commands) == 3
    for command in commands:
        arguments = [part.strip('"') for part in command.split()]
        assert main(arguments) == 0
    assert os.path.exists("out.json")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert EXAMPLES.splitlines()[0] in capsys.readouterr().out


def test_another_loss_is_another_estimator():
    held = curve(0, 2.0, 0.5, 0.05)
    one = windows(backtest(held, ["saturating"], by="x"), "saturating")[-1]
    other = windows(backtest(held, ["saturating"], by="x", objective=Objective("raw")), "saturating")[-1]
    assert one.params != other.params
    assert other.errors.intervals == other.n_test


# Figure


def title(panel):
    return panel.get_title() or panel.get_title(loc="left")


def test_the_figure_shows_every_error_once():
    held = tradeoff(0.03)
    report = backtest(held, ["tradeoff"], by="C", hold="R")
    shown = panels(report.rows, report.laws)
    assert [(each.scheme, each.law) for each in shown] == [
        (scheme, law) for scheme in ("later budgets", "values left out") for law in ("tradeoff", "tradeoff_power")
    ]
    axes = [panel for panel in draw(shown, "gfid").axes if title(panel)]
    for panel, each in zip(axes, shown, strict=True):
        dots = np.concatenate([np.asarray(kind.get_offsets()) for kind in panel.collections])
        assert len(dots) == len(each.error)
        edge = math.exp(limit(shown, each.scheme))
        assert sorted(dots[:, 1]) == pytest.approx(sorted(np.clip(np.exp(each.error), 1 / edge, edge)))
        assert sorted(dots[:, 0]) == pytest.approx(sorted(each.place))
        assert f"mean |e| {np.abs(each.error).mean():.3g}" in title(panel)
    best = min(np.abs(each.error).max() for each in shown if each.scheme == "later budgets")
    assert limit(shown, "later budgets") == pytest.approx(WILD * best)
    assert "beyond" in title(axes[1])


def test_the_figure_is_written_with_its_caption(table, tmp_path):
    path = tmp_path / "errors.png"
    assert main([str(table), *RUN, "--by", "x", "--figure", str(path)]) == 0
    assert path.exists()
    assert "Later budgets of x: saturating, power." in path.with_suffix(".txt").read_text()
    path.unlink()
    assert main([str(table), *RUN, "--by", "x", "--where", "flops < 1e10", "--figure", str(path)]) == EXIT_REFUSED
    assert not path.exists()
    report = backtest(curve(0, 2.0, 0.5, 0.02), ["saturating"], by="x")
    others = [replace(row, law=f"{row.law}{i}") for i in range(7) for row in report.rows]
    laws = [f"{law}{i}" for i in range(7) for law in report.laws]
    with pytest.raises(TableError, match="14 laws and schemes; a figure holds 12"):
        write(others, laws, path, output="y")


def test_a_dense_table_has_many_budgets():
    """Five hundred budgets over three decades lie within 2 % of their neighbours, and are not one."""
    x = np.geomspace(1.0, 1e3, 500)
    index, tops = levels(x)
    assert 200 < len(tops) < 500
    assert index.max() + 1 == len(tops)
    assert tops[-1] == pytest.approx(1e3)
