"""Are the intervals that a plan promises those that simulated studies come out with?"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis import study, uncertainty
from analysis.arms import envelope_table
from analysis.curves import law
from analysis.fit import fit
from analysis.frontier import arms_of
from sweep import plan as planning
from sweep.grid import load
from sweep.width import Assumed, chi2, expected, half_width, sentences, student

REFERENCE = Path(__file__).parents[2] / "results" / "reference" / "compression_digits"
GRID: dict[str, Any] = {
    "study": "small",
    "data": {"family": "digits", "views": 2},
    "tokenizer": {
        "family": "vq",
        "axes": [{"list": [{"tokens": 4, "codebook": 16}, {"tokens": 16, "codebook": 8}]}],
        "steps": [10],
        "train": {"batch": 8, "lr": 0.001},
        "seeds": [0, 1, 2],
    },
    "generator": {
        "family": "llama",
        "sizes": ["5k", "25k"],
        "budgets": [1e9, 3e9, 1e10, 3e10, 1e11, 3e11],
        "tolerance": 0.1,
        "train": {"batch": {"rule": "tokens", "tokens": 64}, "lr": 0.003},
    },
    "evaluation": [
        {"name": "plain", "of": "generator", "extractors": ["digits-supervised"], "points": "all", "seeds": [0, 1]},
        {"name": "guided", "of": "generator", "extractors": ["digits-supervised"], "guidance": [1, 2]},
    ],
    "price": {"peak_tflops": 0.05},
    "laws": [],
}
TRUTH = Assumed(exponent=0.5, floor=0.3, noise=0.05, seed=0.1)


def grid(folder: Path, **sections: Any) -> Path:
    """A grid file; a section given as a mapping is merged into that of GRID."""
    held = copy.deepcopy(GRID)
    for name, value in sections.items():
        held[name] = held[name] | value if isinstance(value, dict) else value
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(held))
    return file


def promised(folder: Path, assumed: Assumed = TRUTH, **sections: Any) -> Any:
    return expected(planning.plan(load(grid(folder, **sections)), folder).table, assumed)


def found(curve: Any, assumed: Assumed, trials: int = 300) -> dict[str, float]:
    """Median half-widths, as shares, of what simulated studies of a curve's design come out with."""
    rng = np.random.default_rng(0)
    x, seeds = np.array(curve.budgets), len(curve.tokenizer_seeds)
    truth = np.log(assumed.floor + (1 - assumed.floor) * (x / x[0]) ** -assumed.exponent)
    halves: dict[str, list[float]] = {"exponent": [], "asymptote": []}
    for _ in range(trials):
        noise = rng.standard_normal((seeds, curve.generator_seeds, len(x))).mean(1) * assumed.noise
        log_y = truth + assumed.seed * rng.standard_normal((seeds, 1)) + noise
        fits = [fit(x, np.exp(log_y.mean(0)), "saturating")]
        if seeds > 1:
            labels = np.repeat(np.arange(seeds), len(x))
            fits.append(fit(np.tile(x, seeds), np.exp(log_y).ravel(), "saturating", groups=labels))
        limits = [each.conf_int() for each in fits]
        for name, parameter, true in (("exponent", "a", assumed.exponent), ("asymptote", "E", assumed.floor)):
            low = min(each["lower"][parameter] for each in limits)
            high = max(each["upper"][parameter] for each in limits)
            halves[name].append((high - low) / 2 / true)
    return {name: float(np.median(values)) for name, values in halves.items()}


# --- the promise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "generator_seeds", "assumed"),
    [
        ([0, 1, 2], [0], TRUTH),
        ([0, 1, 2, 3], [0, 1], TRUTH),
        ([0], [0], TRUTH),
        ([0, 1, 2], [0], Assumed()),
    ],
    ids=["three seeds", "four seeds of two runs", "one tokenizer", "as in the reference study"],
)
def test_widths_are_those_of_simulated_studies(tmp_path, seeds, generator_seeds, assumed):
    made = promised(tmp_path, assumed, tokenizer={"seeds": seeds}, generator={"seeds": generator_seeds})
    curve = made.curves[0]
    assert len(curve.tokenizer_seeds) == len(seeds)
    assert curve.generator_seeds == len(generator_seeds)
    simulated = found(curve, assumed)
    assert curve.exponent == pytest.approx(simulated["exponent"], rel=0.15)
    assert curve.asymptote == pytest.approx(simulated["asymptote"], rel=0.15)


def test_the_contrast_is_that_of_paired_seeds(tmp_path):
    made = promised(tmp_path)
    rng = np.random.default_rng(0)
    shifts, points = rng.standard_normal((2, 4000, 3, 2)) * [[[[TRUTH.seed]]], [[[TRUTH.noise]]]]
    values = shifts + points
    test = stats.ttest_rel(values[..., 0], values[..., 1], axis=1).confidence_interval(0.95)
    assert made.contrast.seeds == 3
    assert math.log(made.contrast.ratio) == pytest.approx(np.median(test.high - test.low) / 2, rel=0.05)


def test_the_defaults_are_what_the_reference_study_measured():
    held = study.read(REFERENCE)
    arms, _ = arms_of(held, held.main)
    tables = [envelope_table(each).assign(rate=each.rate) for each in arms]
    spread = uncertainty.spread(pd.concat(tables).rename(columns={"budget": "cell", "y": "value"}))
    cells = np.mean([table["budget"].nunique() for table in tables])
    assert Assumed().noise == pytest.approx(spread["sd_rest"], abs=0.005)
    # the spread of means over budgets holds a share of the scatter of points
    assert Assumed().seed == pytest.approx(math.sqrt(spread["sd_seed"] ** 2 - spread["sd_rest"] ** 2 / cells), abs=0.01)
    laws = [each for each in (law(arm, draws=20) for arm in arms) if each.misfit.fits]
    assert len(laws) == 3
    assert Assumed().exponent == pytest.approx(np.median([each.fit.params["a"] for each in laws]), abs=0.05)
    floors = [each.fit.params["E"] / each.fit.predict([each.rows["x"].min()])[0] for each in laws]
    assert Assumed().floor == pytest.approx(np.median(floors), abs=0.01)


def test_more_seeds_runs_budgets_and_decades_narrow_it(tmp_path):
    budgets = GRID["generator"]["budgets"]
    plain = promised(tmp_path)
    for change in (
        {"tokenizer": {"seeds": [0, 1, 2, 3]}},
        {"generator": {"seeds": [0, 1]}},
        {"generator": {"budgets": [*budgets, 1e12]}},
        {"generator": {"budgets": [*budgets, 1.8e10]}},
    ):
        more = promised(tmp_path, **change)
        for before, after in zip(plain.curves, more.curves, strict=True):
            assert after.exponent < before.exponent
            assert after.asymptote < before.asymptote
        assert (more.contrast.ratio < plain.contrast.ratio) == ("budgets" not in change.get("generator", {}))
    quieter = promised(tmp_path, Assumed(exponent=0.5, floor=0.3, noise=0.02, seed=0.1))
    assert quieter.curves[0].exponent == pytest.approx(0.4 * plain.curves[0].exponent)


# --- what cannot be promised -----------------------------------------------------------------------------------


def test_one_tokenizer_seed_gives_no_contrast(tmp_path):
    made = promised(tmp_path, tokenizer={"seeds": [0]})
    assert made.contrast.ratio is None
    assert {each.unit for each in made.curves} == {"budgets given one tokenizer"}
    assert {each.dof for each in made.curves} == {3}
    lines = sentences(made)
    assert "t(3) = 3.18" in lines[0]
    assert "a report gives none" in lines[1]
    assert lines[2].startswith("A contrast between rates cannot be had: it needs two tokenizer seeds")
    # runs of the one tokenizer are units of their own
    made = promised(tmp_path, tokenizer={"seeds": [0]}, generator={"seeds": [0, 1, 2]})
    assert {(each.unit, each.dof) for each in made.curves} == {("generator seeds given one tokenizer", 2)}


def test_seeds_that_rates_do_not_share_pair_nothing(tmp_path):
    where = {"tokens": {"in": [4]}, "tokenizer_seed": {"in": [0, 1]}}
    arms = [GRID["generator"] | {"name": "one", "where": where}]
    arms += [GRID["generator"] | {"name": "other", "where": {"tokens": {"in": [16]}, "tokenizer_seed": {"in": [1, 2]}}}]
    made = promised(tmp_path, generator=arms)
    assert [each.tokenizer_seeds for each in made.curves] == [(0, 1), (1, 2)]
    assert made.contrast == (None, 1, "it needs two tokenizer seeds that all rates have")


def test_few_budgets_leave_a_power_law_or_none(tmp_path):
    power = promised(tmp_path, generator={"budgets": [1e9, 1e10, 1e11]})
    assert {(each.form, each.asymptote) for each in power.curves} == {("power", None)}
    assert power.curves[0].exponent < promised(tmp_path).curves[0].exponent
    none = promised(tmp_path, generator={"budgets": [1e9, 1e10]})
    assert {each.exponent for each in none.curves} == {None}
    assert sentences(none)[0] == "No law of vq 4x16 and 1 more: 2 budgets where a law needs 3."


def test_a_plan_by_steps_counts_four_computes_a_decade(tmp_path):
    made = promised(tmp_path, generator={"budgets": None, "steps": [100, 300, 1000, 3000]})
    for curve in made.curves:
        places = 4 * np.log10(curve.budgets)
        assert np.allclose(places, np.round(places))
        assert 4 <= len(curve.budgets) <= 9  # of eight points
    assert promised(tmp_path, evaluation=[]) is None


# --- the command line ------------------------------------------------------------------------------------------


def test_the_plan_prints_what_to_expect_and_json_says_the_same(tmp_path, capsys):
    file = str(grid(tmp_path))
    arguments = [file, "--results", str(tmp_path), "--dry-run", "--assume", "exponent=.5, floor=.3,noise=.05,seed=.1"]
    assert planning.main(arguments) == 0
    text = capsys.readouterr().out
    assert planning.main([*arguments, "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["expected"]
    assert held["assumed"] == TRUTH.numbers
    assert held["source"] == "as given"
    assert [each["rate"] for each in held["curves"]] == ["vq 4x16", "vq 16x8"]
    share = held["curves"][0]["exponent"]
    assert f"exponent ±{100 * share:.0f} %" in text
    assert f"from a difference of {held['contrast']['ratio']:.3g}x on (3 paired tokenizer seeds)" in text
    assert "Medians at exponent 0.5, floor 0.3, noise 0.05, seed 0.1, as given;" in text
    assert planning.main([file, "--results", str(tmp_path), "--dry-run", "--assume", "noise=0.2"]) == 0
    assert "noise as given, else as gFID in results/reference/compression_digits" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["noise=0", "noise=-1", "seed=x", "floor=1", "exponent=nan", "nois=1", "noise", ""])
def test_an_impossible_assumption_is_one_line(tmp_path, capsys, text):
    assert planning.main([str(grid(tmp_path)), "--results", str(tmp_path), "--assume", text]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--assume: got ")
    assert "; allowed: " in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "small").exists()


# --- distributions ---------------------------------------------------------------------------------------------


def test_distributions_are_those_of_scipy():
    for dof in (*range(1, 40), 119, 999):
        assert student(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-12)
        for share in (1e-3, 0.5, 0.99):
            assert chi2(stats.chi2.ppf(share, dof), dof) == pytest.approx(share, abs=1e-12)
    assert chi2(1e9, 999) == 1.0


def test_the_median_of_the_widest_is_that_of_draws():
    assert half_width([(2.0, 1)]) == pytest.approx(2 * stats.t.ppf(0.975, 1) * math.sqrt(stats.chi2.median(1)))
    rng = np.random.default_rng(0)
    errors = [(1.0, 2), (1.3, 3), (0.0, 5)]
    drawn = [stats.t.ppf(0.975, d) * e * np.sqrt(rng.chisquare(d, 200_000) / d) for e, d in errors]
    assert half_width(errors) == pytest.approx(np.median(np.max(drawn, axis=0)), rel=0.01)
