"""Is the best size, data or rate of a law the one that a search finds, and as sure as the points allow?"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from analysis.arms import Arm
from analysis.fit import fit
from analysis.forms import FORMS
from analysis.isoflop import isoflop
from analysis.lowest import REACH, bottom
from analysis.optimum import EXAMPLES, main, optimum, rates, sentences, text
from analysis.refusal import Refusal
from analysis.table import TableError
from analysis.valley import Valley

N, D = np.repeat(np.geomspace(5e7, 5e9, 6), 6), np.tile(np.geomspace(1e9, 1e11, 6), 6)
R, T, K = (np.array(values) for values in ([24.0, 48, 96, 192, 384, 768], [4.0, 8, 16, 32, 64], [3.0, 5, 7, 9, 11]))
C = np.geomspace(1e13, 1e16, 5)


def mesh(*axes):
    return np.stack([each.ravel() for each in np.meshgrid(*axes, indexing="ij")], axis=1)


SMALL_N, SMALL_D = np.geomspace(1e5, 1e7, 4), np.geomspace(1e6, 1e8, 4)
DESIGNS = {
    "chinchilla": np.stack([N, D], 1),
    "interaction": np.stack([N, D], 1),
    "overtraining": np.stack([N, D / N], 1),
    "tradeoff": mesh(R, C),
    "tradeoff_slope": mesh(R, C),
    "tradeoff_tokens": mesh(T, K, C),
    "tradeoff_nd": mesh(R, SMALL_N, SMALL_D),
    "tradeoff_nd_tokens": mesh(T, K, SMALL_N, SMALL_D),
}
TRUTHS = {
    "chinchilla": (1.69, 406.4, 410.7, 0.34, 0.28),
    "interaction": (1.69, 700.0, 500.0, 0.40, 0.33, 0.8),
    "overtraining": (1.69, 300.0, 900.0, 0.31),
    "tradeoff": (60.0, 3e4, 0.8, 0.4, 0.35),
    "tradeoff_slope": (60.0, 3e4, 0.8, 0.9, 0.35, 0.012),
    "tradeoff_tokens": (40.0, 3e3, 0.7, 0.6, 0.5, 0.4, 0.3),
    "tradeoff_nd": (60.0, 40.0, 90.0, 0.8, 0.3, 0.35, 0.4, 0.3),
    "tradeoff_nd_tokens": (40.0, 30.0, 60.0, 0.6, 0.5, 0.3, 0.35, 0.35, 0.4, 0.3, 0.3),
}


def value(form, x, truth=None):
    """A law in the caller's units."""
    law, truth = FORMS[form], truth or TRUTHS[form]
    theta = np.array([math.log(v) if n in law.positive else v for n, v in zip(law.parameters, truth, strict=True)])
    return law.value(theta[None], np.asarray(x, float)[None])[0]


def fitted(form, noise=0.0, seed=0, **how):
    x = DESIGNS[form]
    return fit(x, value(form, x) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(x))), form, **how)


def searched(form, given, open_, per_token=6.0):
    """ln of the open inputs where the true law is lowest, by a general minimiser."""
    names = FORMS[form].inputs

    def metric(logs):
        at = dict(given) | dict(zip(open_, np.exp(logs), strict=True))
        if "C" in given and "N" in names:
            at["D"] = given["C"] / per_token / at["N"]
            at["M"] = at["D"] / at["N"]
        return float(np.log(value(form, [[at[name] for name in names]])[0]))

    middle = dict(zip(names, np.exp(np.log(DESIGNS[form]).mean(0)), strict=True))
    start = np.log([middle[name] for name in open_])
    return minimize(metric, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-15, "maxiter": 4000}).x


QUESTIONS = [
    ("chinchilla", {"C": 1e21}, ["N"]),
    ("interaction", {"C": 1e21}, ["N"]),
    ("overtraining", {"C": 1e21}, ["N"]),
    ("tradeoff", {"C": 1e15}, ["R"]),
    ("tradeoff_slope", {"C": 1e15}, ["R"]),
    ("tradeoff_tokens", {"C": 1e15, "k": 5.0}, ["T"]),
    ("tradeoff_tokens", {"C": 1e13, "T": 16.0}, ["k"]),
    ("tradeoff_nd", {"R": 96.0, "C": 1e14}, ["N"]),
    ("tradeoff_nd", {"N": 1e6, "D": 1e7}, ["R"]),
    ("tradeoff_nd", {"C": 6e13}, ["N", "R"]),
    ("tradeoff_nd", {"C": 6e13, "N": 1e6}, ["R"]),
    ("tradeoff_nd_tokens", {"C": 1e14, "k": 5.0}, ["N", "T"]),
    ("tradeoff_nd_tokens", {"T": 16.0, "N": 1e6, "D": 1e7}, ["k"]),
    ("tradeoff_nd_tokens", {"T": 16.0, "k": 7.0, "C": 1e14}, ["N"]),
]


@pytest.mark.parametrize(
    ("form", "given", "open_"), QUESTIONS, ids=[f"{f} {'+'.join(o)} of {'+'.join(g)}" for f, g, o in QUESTIONS]
)
def test_an_optimum_is_what_a_search_finds(form, given, open_):
    """On points without noise, so that the law is the true one."""
    found = optimum(fitted(form), given)
    expected = searched(form, given, open_)
    for name, log in zip(open_, expected, strict=True):
        assert math.log(found.best[name].estimate) == pytest.approx(log, abs=2e-4)
        assert found.best[name].low is None  # nothing scatters
        assert "to the last digit" in found.best[name].reason
    if "N" in open_:
        assert 6 * found.best["N"].estimate * found.best["D"].estimate == pytest.approx(given["C"])


def test_the_compute_optimum_of_chinchilla_has_its_closed_form():
    found = optimum(fitted("chinchilla"), {"C": 5.76e23})
    _, a_n, a_d, a, b = TRUTHS["chinchilla"]
    size = (a * a_n / (b * a_d)) ** (1 / (a + b)) * (5.76e23 / 6) ** (b / (a + b))
    assert found.best["N"].estimate == pytest.approx(size, rel=1e-6)
    assert found.best["D"].estimate == pytest.approx(5.76e23 / 6 / size, rel=1e-6)
    assert found.exponents["N"].estimate == pytest.approx(b / (a + b), rel=1e-6)
    assert found.exponents["D"].estimate == pytest.approx(a / (a + b), rel=1e-6)
    assert found.value.estimate == pytest.approx(value("chinchilla", [[size, 5.76e23 / 6 / size]])[0], rel=1e-9)
    assert found.beyond == ("C", "N", "D")
    # an exponent on the sum moves no optimum; equal exponents fix a_opt at a half
    same = optimum(fitted("interaction"), {"C": 1e21})
    _, a_n, a_d, a, b, _ = TRUTHS["interaction"]
    assert same.best["N"].estimate == pytest.approx(
        (a * a_n / (b * a_d)) ** (1 / (a + b)) * (1e21 / 6) ** (b / (a + b)), rel=1e-4
    )
    half = optimum(fitted("overtraining", 0.01), {"C": 1e21})
    assert half.exponents["N"].estimate == 0.5
    assert half.exponents["M"].estimate == 0.0
    assert half.exponents["N"].low is None
    assert half.exponents["N"].reason == "the form of the law fixes it"
    assert half.best["D"].estimate == pytest.approx(half.best["N"].estimate * half.best["M"].estimate)


@pytest.fixture(scope="module")
def chinchilla():
    """The 240 points that Epoch AI read off Chinchilla's figure (arXiv 2404.10102)."""
    folder = Path(__file__).parents[2] / "results" / "published"
    frame = pl.read_parquet(folder / "chinchilla.parquet").filter(pl.col("loss") < 3.446995430227908)
    size, flops = frame["model_size"].cast(float).to_numpy(), frame["flops"].to_numpy()
    return np.stack([size, flops / 6 / size], 1), frame["loss"].to_numpy()


def test_the_published_exponent_of_the_compute_optimum(chinchilla):
    found = fit(*chinchilla, "chinchilla", loss="huber", delta=1e-3, interval="rows", draws=500)
    best = optimum(found, {"C": 5.76e23})
    assert best.exponents["N"].estimate == pytest.approx(0.5138995, abs=1e-6)
    assert 0.46 < best.exponents["N"].low < 0.49
    assert 0.54 < best.exponents["N"].high < 0.57
    assert "bootstrap of rows" in best.exponents["N"].method
    # tokens per parameter near 20, not Hoffmann's 70 B parameters by their approach 3
    assert 10 < best.best["D"].estimate / best.best["N"].estimate < 30


def test_a_surface_checks_a_parabola():
    """What a wide grid does to iso-FLOP parabolas it does not do to a law."""
    budget = np.repeat(np.geomspace(1e19, 1e21, 5), 9)
    _, a_n, a_d, a, b = TRUTHS["chinchilla"]
    size = (
        (a * a_n / (b * a_d)) ** (1 / (a + b)) * (budget / 6) ** (b / (a + b)) * np.tile(np.geomspace(1 / 16, 16, 9), 5)
    )
    x = np.stack([size, budget / 6 / size], 1)
    y = value("chinchilla", x)
    surface, parabola = optimum(fit(x, y, "chinchilla"), {"C": 1e24}), isoflop(size, budget, y).data.at(1e24)
    truth = 1e24 / 6 / ((a * a_n / (b * a_d)) ** (1 / (a + b)) * (1e24 / 6) ** (b / (a + b)))
    assert surface.best["D"].estimate == pytest.approx(truth, rel=1e-6)
    assert parabola.estimate / truth - 1 < -0.05


@settings(max_examples=15, deadline=None)
@given(st.floats(-9, 9), st.floats(-9, 9), st.floats(-3, 3), st.integers(0, 9))
def test_units_change_nothing(n, d, y, seed):
    """N in millions or D in billions: C = k N D keeps its unit by k."""
    x = DESIGNS["chinchilla"]
    metric = value("chinchilla", x) * np.exp(0.01 * np.random.default_rng(seed).standard_normal(len(x)))
    plain = optimum(fit(x, metric, "chinchilla"), {"C": 1e22}, draws=500)
    scaled = fit(x * [10.0**n, 10.0**d], metric * 10.0**y, "chinchilla")
    moved = optimum(scaled, {"C": 1e22}, per_token=6 * 10.0 ** -(n + d), draws=500)
    for name, factor in (("N", n), ("D", d)):
        for end in ("low", "estimate", "high"):
            expected = getattr(plain.best[name], end) * 10.0**factor
            assert getattr(moved.best[name], end) == pytest.approx(expected, rel=1e-4)
    assert moved.value.estimate == pytest.approx(plain.value.estimate * 10.0**y, rel=1e-6)
    assert moved.exponents["N"].low == pytest.approx(plain.exponents["N"].low, rel=1e-3)


def best_rate(flops):
    f, a, power, r, s = TRUTHS["tradeoff"]
    return (power * f * flops**s / (r * a)) ** (1 / (power + r))


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_a_best_rate_is_covered(noise):
    trials = 300
    inside = {"R": 0, "exponent": 0}
    for seed in range(trials):
        found = optimum(fitted("tradeoff", noise, seed), {"C": 2e14}, draws=2000)
        at, power = found.best["R"], found.exponents["R"]
        inside["R"] += at.low <= best_rate(2e14) <= at.high
        inside["exponent"] += power.low <= 0.35 / 1.2 <= power.high
    for count in inside.values():
        assert abs(count - 0.95 * trials) < 3 * math.sqrt(trials * 0.05 * 0.95)


def test_tokenizers_are_the_unit_of_a_best_rate():
    """Points of one tokenizer move together: taken as independent they say ten times too much."""
    rng, trials, tokenizers = np.random.default_rng(0), 150, np.repeat(np.arange(18), 5)
    x = np.concatenate([DESIGNS["tradeoff"]] * 3)
    inside, widths = {"groups": 0, "points": 0}, {"groups": [], "points": []}
    for _ in range(trials):
        y = value("tradeoff", x) * np.exp(0.08 * rng.standard_normal(18)[tokenizers] + 0.01 * rng.standard_normal(90))
        for name, groups in (("groups", tokenizers), ("points", None)):
            at = optimum(fit(x, y, "tradeoff", groups=groups), {"C": 1e14}, draws=400).best["R"]
            inside[name] += at.low <= best_rate(1e14) <= at.high
            widths[name].append(math.log(at.high / at.low))
    assert inside["groups"] >= 0.88 * trials
    assert inside["points"] < 0.75 * trials


def test_few_groups_have_their_own_degrees_of_freedom():
    x = np.concatenate([DESIGNS["tradeoff"]] * 3)
    seeds = np.repeat([0, 1, 2], 30)
    rng = np.random.default_rng(1)
    y = value("tradeoff", x) * np.exp(0.05 * rng.standard_normal(3)[seeds] + 0.02 * rng.standard_normal(90))
    found = optimum(fit(x, y, "tradeoff", groups=seeds), {"C": 1e14})
    assert 1 < found.best["R"].dof <= 2.0 + 1e-9
    one = optimum(fit(x, y, "tradeoff", groups=[0] * 90), {"C": 1e14})
    assert one.best["R"].low is one.best["R"].high is None
    assert one.edge_share is None
    assert one.best["R"].estimate == pytest.approx(found.best["R"].estimate)


def test_a_rate_at_an_edge_is_refused():
    found = fitted("tradeoff", 0.02)
    for flops, side in ((1e11, "below the lowest of the fit, 24"), (1e18, "above the highest of the fit, 768")):
        with pytest.raises(Refusal, match=f"at an edge: the best R at C = {flops:.0e}.*{side}") as refusal:
            optimum(found, {"C": float(flops)})
        assert refusal.value.code == "no_interior_minimum"
        assert "100% of draws" in refusal.value.sentence
    # near an edge the interval has no end on that side, and the share of draws is said
    near = next(c for c in np.geomspace(1e15, 1e17, 60) if best_rate(c) > 700)
    close = optimum(fitted("tradeoff", 0.05, 3), {"C": float(near)})
    assert 0.02 < close.edge_share < 0.7
    assert close.best["R"].high is None
    assert close.best["R"].low < close.best["R"].estimate < 768
    assert close.best["R"].reason == "it reaches the highest R of the fit"
    assert "above" in text(close)
    assert found.params["r"] > 0
    # a law in which a finer code costs nothing but compute has no best rate within any range
    for form in ("tradeoff_offset", "tradeoff_power"):
        x = DESIGNS["tradeoff"]
        with pytest.raises(Refusal, match="at or below the lowest"):
            optimum(fit(x, value("tradeoff", x), form), {"C": 1e15})


def test_fewer_than_five_rates_are_refused():
    x = mesh(R[:4], SMALL_N, SMALL_D)
    found = fit(x, value("tradeoff_nd", x), "tradeoff_nd")
    with pytest.raises(Refusal, match="4 values of R in the fit; the best one needs 5") as refusal:
        optimum(found, {"C": 1e14})
    assert refusal.value.code == "too_few"
    # the best size at one rate needs no more rates
    assert optimum(found, {"R": 96.0, "C": 1e14}).best["N"].estimate > 0
    # two rates within a rounding of each other are one
    x = mesh(np.array([24, 48, 96, 192, 193.0]), C)
    with pytest.raises(Refusal, match="4 values"):
        optimum(fit(x, value("tradeoff", x), "tradeoff"), {"C": 1e14})


def test_refits_given_are_used():
    found = fitted("tradeoff", 0.03)
    assert found.estimate.covariance is not None
    rng = np.random.default_rng(0)
    drawn = rng.multivariate_normal(found.theta, found.estimate.covariance.matrix[0], 4000)
    own, told = optimum(found, {"C": 1e14}).best["R"], optimum(found, {"C": 1e14}, replicates=drawn).best["R"]
    assert told.low == pytest.approx(own.low, rel=0.02)
    assert told.high == pytest.approx(own.high, rel=0.02)
    assert told.method == "4000 refits given, Student-t"
    alike = optimum(found, {"C": 1e14}, replicates=np.repeat([found.theta], 9, 0)).best["R"]
    assert alike.low is None


@pytest.mark.parametrize(
    ("form", "given", "said"),
    [
        ("tradeoff", {}, "got nothing; tradeoff needs C"),
        ("tradeoff", {"R": 96.0}, "needs C"),
        ("tradeoff", {"C": 1e14, "R": 96.0}, "nothing is left to choose"),
        ("tradeoff", {"C": 1e14, "bits": 96.0}, "got 'bits'; inputs of tradeoff: R, C"),
        ("tradeoff", {"C": -1.0}, "a number above 0"),
        ("tradeoff", {"C": math.inf}, "a number above 0"),
        ("chinchilla", {"N": 1e9}, "chinchilla needs C, or N and D"),
        ("chinchilla", {"N": 1e9, "D": 1e10}, "nothing is left"),
        ("chinchilla", {"N": 1e9, "C": 1e20}, "nothing is left"),
        ("tradeoff_nd", {"C": 1e14, "D": 1e7}, "D follows from C and N"),
        ("saturating", {"x": 1.0}, "laws with an optimum: chinchilla"),
    ],
)
def test_what_makes_no_question_is_one_line(form, given, said):
    found = fitted(form) if form in DESIGNS else fit(C, 1 + C**-0.1, form)
    with pytest.raises(TableError, match=said):
        optimum(found, given)


def test_two_open_rates_have_no_optimum():
    with pytest.raises(Refusal, match="T and k has no optimum in both") as refusal:
        optimum(fitted("tradeoff_tokens"), {"C": 1e15})
    assert refusal.value.code == "no_interior_minimum"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(-30, 30).map(lambda tenths: tenths / 10)), min_size=1, max_size=3)
)
def test_the_bottom_of_a_sum_of_exponentials(terms):
    log, power = (np.array([each]) for each in zip(*terms, strict=True))
    found = bottom(log, power)[0]
    if (power > 0).any() and (power < 0).any():
        at = math.copysign(REACH, found) if math.isinf(found) else found
        scaled = power * np.exp(log + power * at - (log + power * at).max())
        if math.isfinite(found):
            assert abs(scaled.sum()) < 1e-6 * np.abs(scaled).sum()
        else:  # still on its way at the end of where it is looked for
            assert scaled.sum() * found <= 0
    else:
        assert found == (math.inf if (power < 0).any() else -math.inf)


def arms(noise=0.0, seeds=3, bits=R, centre=120.0, seed=0):
    """Rates whose gFID is a parabola of ln bits around a best rate that rises with compute."""
    rng, budgets = np.random.default_rng(seed), np.geomspace(1e10, 1e12, 4)
    made = []
    for each in bits:
        off = np.log(each / (centre * (budgets / 1e11) ** 0.2))
        y = (0.2 * off**2 + noise * rng.standard_normal((seeds, 4)))[:, None, None]
        x, there = np.broadcast_to(np.log(budgets), y.shape), np.ones(y.shape, bool)
        about = (f"{each:g}", float(each), "fid_a", "generator training FLOPs", tuple(range(seeds)), ("5k",))
        made.append(Arm(*about, tuple(budgets.tolist()), x, y, y, there, False))
    return made


def test_the_best_of_separately_measured_rates():
    inside = 0
    for seed in range(25):
        found = rates(arms(0.02, seed=seed))
        assert len(found) == 4
        for budget, each in found.items():
            assert isinstance(each, Valley)
            inside += each.best.low < 120 * (budget / 1e11) ** 0.2 < each.best.high
            assert each.n_groups == 3
            assert each.best.dof == 2
            assert "wide" in each.flags
    assert inside >= 88
    lines = sentences(rates(arms(0.02)), arms(0.02))
    assert "R* at 1e10 generator training FLOPs:" in lines[0]
    assert lines[-1] == "95 % intervals: Fieller, delete-one-group jackknife over 3 groups, Student-t"
    with pytest.raises(Refusal, match="4 rates; the best one needs 5"):
        rates(arms(bits=R[:4]))
    edge = rates(arms(0.001, centre=900.0))
    assert {each.code for each in edge.values() if isinstance(each, Refusal)} == {"no_interior_minimum"}
    assert "refused (no_interior_minimum)" in sentences(edge, arms())[3]
    # each tokenizer seed has a value at a budget of its own, the others were left out
    own = np.eye(4, dtype=bool)[:3, None, None]
    parts = [replace(a, report=np.where(own, a.report, np.nan), x=np.where(own, a.x, np.nan)) for a in arms()]
    with pytest.raises(Refusal, match="share no budget"):
        rates([replace(each, select=each.report) for each in parts])
    one = rates(arms(0.02, seeds=1))
    assert all("one group says nothing" in each.best.reason for each in one.values() if isinstance(each, Valley))


@pytest.fixture
def table(tmp_path):
    x = DESIGNS["tradeoff"]
    y = value("tradeoff", x) * np.exp(0.03 * np.random.default_rng(0).standard_normal(len(x)))
    pl.DataFrame({"bits": x[:, 0], "flops": x[:, 1], "fid": y}).write_parquet(tmp_path / "points.parquet")
    return tmp_path / "points.parquet"


def test_the_command_line(table, tmp_path, capsys):
    options = ["--law", "tradeoff", "--x", "R=bits", "--x", "C=flops", "--y", "fid", "--json", str(tmp_path / "o.json")]
    assert main([str(table), *options, "--at", "C=1e14", "--at", "C=1e19"]) == 0
    written = capsys.readouterr()
    assert "R* = " in written.out
    assert "at an edge" in written.err
    held = json.loads((tmp_path / "o.json").read_text())
    first, second = held["optima"]
    assert first["best"]["R"]["low"] < best_rate(1e14) < first["best"]["R"]["high"]
    assert first["refused"] is None
    assert second["refused"]["code"] == "no_interior_minimum"
    assert held["params"]["a"] == pytest.approx(0.35, abs=0.1)
    assert "95 % intervals: 4000 multivariate normal draws, Student-t" in written.out
    assert main([str(table), *options, "--at", "C=1e19"]) == 3
    assert json.loads((tmp_path / "o.json").read_text())["refused"]["code"] == "no_interior_minimum"
    assert main([str(table), *options, "--at", "C=1e14", "--where", "bits > 100"]) == 3
    assert json.loads((tmp_path / "o.json").read_text())["optima"][0]["refused"]["code"] == "too_few"
    # refits of a bootstrap that was asked for are those that are searched
    assert main([str(table), *options, "--at", "C=1e14", "--bootstrap", "200"]) == 0
    assert "200 draws" in json.loads((tmp_path / "o.json").read_text())["optima"][0]["best"]["R"]["method"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--at", "C"], "--at: got 'C'; write"),
        (["--at", "C=much"], "--at: got 'C=much'; write"),
        (["--at", "B=1"], "--at: got 'B'; inputs of tradeoff: R, C"),
        (["--at", "C=1e14", "--figure", "a.png"], "python -m analysis.fit draws the law"),
        (["--at", "C=1e14", "--per-token", "0"], "--per-token"),
        (["--at", "C=1e14", "--at", "R=96"], "--at: got R=96; tradeoff needs C"),
        (["--at", "C=1e14", "--at", "C=-1"], "--at: got C=-1; allowed: a number above 0"),
        (["--at", "C=1e14,C=1e15"], "--at: got 'C=1e14,C=1e15'; every name once"),
    ],
)
def test_mistakes_are_one_line(table, tmp_path, capsys, options, said):
    base = ["--law", "tradeoff", "--x", "R=bits", "--x", "C=flops", "--y", "fid", "--json", str(tmp_path / "o.json")]
    assert main([str(table), *base, *options]) == 2
    written = capsys.readouterr()
    assert said in written.err
    assert len(written.err.splitlines()) == 1
    assert written.out == ""  # before anything is fitted
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("law", "said"),
    [([], "required: --law"), (["--law", "saturating"], "invalid choice: 'saturating' (choose from 'chinchilla'")],
)
def test_a_law_has_to_be_a_surface(table, capsys, law, said):
    """The default of analysis.fit has one input, and no optimum."""
    with pytest.raises(SystemExit) as stop:
        main([str(table), "--x", "R=bits", "--x", "C=flops", "--y", "fid", "--at", "C=1e14", *law])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_help_names_what_can_be_used(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert EXAMPLES in said
    assert "tradeoff_nd" in said
    assert "--figure" not in said
