"""Does a study know which runs would narrow its intervals most, what they cost, and how to write them down?"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import addition, amendment, frontier, proposal, study, target
from analysis.amendment import AmendmentError, appended, repeated
from analysis.curves import law
from analysis.fit import fit
from analysis.refusal import Refusal
from analysis.target import Design, Scatter, widest
from sweep import plan as planning
from sweep import width
from sweep.grid import load

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference"
SHIPPED = [ROOT / "grid.yaml", *sorted((ROOT / "grids").glob("*.yaml"))]


@pytest.fixture
def copy(tmp_path):
    """A reference study in a folder of its own; ``seeds`` keeps those tokenizers only."""

    def made(name: str = "digits", seeds: tuple[int, ...] | None = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(REFERENCE / name, folder, ignore=shutil.ignore_patterns("figures"))
        if seeds is not None:
            plan = pl.read_parquet(folder / "plan.parquet").filter(pl.col("tokenizer_seed").is_in(seeds))
            whole = pq.read_schema(folder / "plan.parquet").metadata
            pq.write_table(plan.to_arrow().replace_schema_metadata(whole), folder / "plan.parquet")
            curves = folder / "compact" / "curves.parquet"
            kept = pl.read_parquet(curves).filter(pl.col("run_id").is_in(plan["run_id"].to_list()))
            kept.write_parquet(curves)
            grid = folder / "grid.yaml"
            grid.write_text(grid.read_text().replace("seeds: [0, 1]\n\n", f"seeds: {list(seeds)}\n\n", 1))
        return folder

    return made


def run(folder: Path, *options: str) -> int:
    return frontier.main([str(folder), "--propose", *options])


def planned_rows(file: Path, folder: Path) -> list[dict[str, Any]]:
    return planning.plan(load(file), folder).table.to_pylist()


def ids(file: Path, folder: Path) -> set[str]:
    return {row["run_id"] for row in planned_rows(file, folder)}


# --- the whole way ---------------------------------------------------------------------------------------------


def test_a_proposal_plans_and_holds_every_old_run(copy, tmp_path, capsys):
    folder = copy()
    out = folder / "proposal.yaml"
    assert run(folder, "--metric", "nll_bits") == 0
    said = capsys.readouterr().out
    assert f"wrote {out}" in said
    rows = [line for line in said.splitlines() if line.startswith(("one more", "the run at the predicted optimum"))]
    assert "one more tokenizer seed (2)" in said
    assert len(rows) >= 6
    text = out.read_text()
    assert text.startswith(proposal.MARK)
    # the grid's own comments are still there
    assert "# How far should digits be compressed" in text
    assert "# training FLOPs" in text
    before, after = ids(folder / "grid.yaml", tmp_path), ids(out, tmp_path)
    assert len(after) > len(before)
    gone = {row["protocol"] for row in planned_rows(folder / "grid.yaml", tmp_path) if row["run_id"] not in after}
    assert gone == ({"guided"} if "Evaluations of the last point" in said else set())
    # a second one may take its place
    assert proposal.destination(folder, folder / "grid.yaml", None) == out


def test_what_is_added_narrows_and_costs_what_the_plan_costs_more(copy, tmp_path):
    folder = copy("compression_digits")
    held = study.read(folder)
    arms, _ = frontier.arms_of(held, held.main)
    laws, _ = proposal.fitted(arms)
    aim, scattered = target.target(arms, laws, "exponent"), target.scatter(arms, laws)
    assert aim.words == "exponent of 4x256"  # the best one that follows its law
    assert aim.first is None
    source = folder / "grid.yaml"
    before = proposal.planned(tmp_path / "before.yaml", source.read_text(), held, source)
    assert set(before.designs) == {each.rate for each in arms}
    assert before.rows == len(pl.read_parquet(folder / "plan.parquet"))
    now = aim.width(before.designs, scattered)
    old = set(pl.read_parquet(folder / "plan.parquet")["run_id"])
    found = addition.drafts(source.read_text(), held, arms, laws)
    assert [draft.kind for draft in found[:4]] == ["tokenizer seed", "generator seed", "budget", "budget"]
    assert [draft.words for draft in found if draft.kind == "rate"] == [
        "one more rate between 4x256 and 4x64: 4x128, 28 bits",
        "one more rate between 4x256 and 16x8: 4x1024, 40 bits",
    ]
    for draft in (found[0], found[2]):
        file = tmp_path / "after.yaml"
        after = proposal.planned(file, draft.text, held, source)
        assert aim.width(after.designs, scattered) < 0.9 * now
        low, high = (a - b for a, b in zip(after.hours, before.hours, strict=True))
        assert 0 < low < high
        planned = planning.plan(load(file), tmp_path)
        new = [row for row in planned.table.to_pylist() if row["run_id"] not in old]
        if draft.kind == "tokenizer seed":
            assert old < set(planned.table["run_id"].to_pylist())
            assert high == pytest.approx(sum(row["gpu_h_high"] for row in new), rel=1e-6)
            assert not draft.longer
        else:  # the last point has moved, and what was measured of the last one alone with it
            kept = set(planned.table["run_id"].to_pylist())
            gone = pl.read_parquet(folder / "plan.parquet").filter(~pl.col("run_id").is_in(kept))
            assert set(gone["protocol"]) == {"guided"}
            assert draft.longer
    # a seed leaves alone what a law gets wrong
    assert any(line.startswith("16x64: the means of its budgets lie") for line in target.misses(laws))


def test_one_tokenizer_seed_is_told_to_add_a_second_first(copy, capsys):
    folder = copy(seeds=(0,))
    assert run(folder, "--metric", "nll_bits") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "expected of this design: no interval" in lines[0]
    assert "tokenizer seeds by unknown" in lines[1]
    assert "One more tokenizer seed comes first: one tokenizer seed says nothing about another." in lines
    first = next(line for line in lines if line.startswith("one more"))
    assert first.startswith("one more tokenizer seed (1)")
    assert "±" in first
    assert yaml.safe_load((folder / "proposal.yaml").read_text())["tokenizer"]["seeds"] == [0, 1]
    # no contrast of rates without it either
    arms, _ = frontier.arms_of(study.read(folder), "nll_bits")
    for narrow in ("crossing", "rate"):
        aim = target.target(arms, {each.rate: law(each) for each in arms}, narrow)
        assert aim.first == target.ALONE
        assert aim.width({}, Scatter(0.1, None)) is None


def test_a_best_rate_at_an_edge_needs_a_rate_beyond_it(copy, capsys):
    folder = copy()
    assert run(folder, "--metric", "nll_bits", "--narrow", "rate") == 0  # a coarser code always costs fewer bits
    lines = capsys.readouterr().out.splitlines()
    assert "One more rate beyond the edge comes first: 4x16 is best, the edge of what was tried." in lines
    assert next(line for line in lines if line.startswith("one more")).startswith("one more rate beyond 4x16, the edge")
    assert "{tokens: 4, codebook: 4}" in (folder / "proposal.yaml").read_text()


# --- what cannot be ---------------------------------------------------------------------------------------------


def test_a_price_that_nothing_meets_is_one_line_and_writes_nothing(copy, capsys):
    folder = copy()
    assert run(folder, "--metric", "nll_bits", "--hours", "1e-9") == 2
    error = capsys.readouterr().err
    assert error.startswith("--hours: got 1e-09; allowed: ")
    assert len(error.splitlines()) == 1
    assert run(folder, "--hours", "-1") == 2
    assert "allowed: a number of device-hours above 0" in capsys.readouterr().err
    assert not (folder / "proposal.yaml").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (None, "grid.yaml: No such file"),
        ("study: [", "grid.yaml: not readable as YAML"),
        ("- 1\n", "grid.yaml: not a YAML mapping"),
        ("study: digits\n", "grid.yaml: data: got nothing; allowed: a value"),
    ],
    ids=["missing", "no YAML", "no mapping", "no grid"],
)
def test_a_grid_that_is_none_is_one_line(copy, capsys, damage, told):
    folder = copy()
    file = folder / "grid.yaml"
    file.unlink() if damage is None else file.write_text(damage)
    assert run(folder, "--metric", "nll_bits") == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not (folder / "proposal.yaml").exists()


def test_a_grid_in_use_is_not_written_over(copy, tmp_path, capsys):
    folder = copy()
    mine = tmp_path / "mine.yaml"
    mine.write_text("study: mine\n")
    planned = folder / "proposal.yaml"
    planned.write_text(f"{proposal.MARK}something\n{(folder / 'grid.yaml').read_text()}")
    planning.write(planning.plan(load(planned), tmp_path))
    for out in (mine, folder / "grid.yaml", planned):
        held = out.read_bytes()
        assert run(folder, "--out", str(out)) == 2
        assert (
            capsys.readouterr().err == f"--out: got {out}; allowed: a new file, or a proposal that is not planned yet\n"
        )
        assert out.read_bytes() == held


def test_no_law_is_a_refusal(copy, make_study, capsys):
    folder = make_study("short", budgets=(1e10, 3e10))
    shutil.copy(REFERENCE / "digits" / "grid.yaml", folder / "grid.yaml")
    assert run(folder) == 3
    assert "no law could be fitted" in capsys.readouterr().err
    assert frontier.main([str(copy()), "--propose", "--sum", "total"]) == 2
    assert capsys.readouterr().err.startswith("--sum: got total; allowed with --propose: generator")


def test_seeds_do_not_narrow_what_no_law_fits(copy):
    held = study.read(copy("compression_digits"))
    arms, _ = frontier.arms_of(held, held.main)
    laws = {each.rate: law(each, draws=20) for each in arms if each.rate in ("16x8", "16x64")}
    with pytest.raises(Refusal, match="seeds do not narrow what a law gets wrong"):
        target.target(arms, laws, "exponent")


# --- widths ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laws():
    held = study.read(REFERENCE / "compression_digits")
    arms, _ = frontier.arms_of(held, held.main)
    return {each.rate: law(each, draws=20) for each in arms}


@pytest.mark.parametrize(("name", "seeds", "runs"), [("a", 3, 1), ("E", 2, 2), ("a", 1, 3)])
def test_a_plan_and_a_proposal_expect_the_same(laws, name, seeds, runs):
    found = laws["4x64"].fit
    budgets = laws["4x64"].arm.budgets
    floor = found.params["E"] / float(found.predict([budgets[0]])[0])
    assumed = width.Assumed(exponent=found.params["a"], floor=floor, noise=0.2, seed=0.1)
    curve = width.Curve("4x64", 24.0, (), tuple(range(seeds)), runs, budgets)
    planned = width.intervals(curve, assumed)
    aim = target.Parameter(laws["4x64"], name)
    expected = aim.width({"4x64": Design(24.0, budgets, seeds, runs)}, Scatter(0.2, 0.1))
    share = {"a": planned.exponent, "E": planned.asymptote}[name]
    assert expected / aim.value == pytest.approx(share, rel=1e-6)


def test_the_width_of_a_crossing_is_that_of_simulated_studies(laws):
    """So many seeds and budgets that Student-t is normal: half a width is 1.96 standard deviations of ln C."""
    pair = laws["4x16"], laws["4x256"]
    budgets = tuple(np.geomspace(3e9, 1e12, 60))
    grid = np.linspace(math.log(3e9), math.log(1e12), 4000)
    truth = [np.log(each.fit.predict(np.exp(grid))) for each in pair]
    zero = math.exp(grid[np.flatnonzero(np.diff(np.sign(truth[0] - truth[1])))[0]])
    crossing = frontier.crossing(pair[0].arm, pair[1].arm, draws=20)
    aim = target.Meeting(*pair, crossing)
    aim.flops = zero
    design, noise = Design(None, budgets, 400, 1), Scatter(0.5, 0.5)
    expected = aim.width({"4x16": design, "4x256": design}, noise)
    rng, found = np.random.default_rng(0), []
    for _ in range(150):
        curves = []
        for each in pair:
            mean = noise.point / 20 * rng.standard_normal(60) + noise.seed / 20 * rng.standard_normal()
            values = np.log(each.fit.predict(budgets)) + mean
            curves.append(np.log(fit(budgets, np.exp(values)).predict(np.exp(grid))))
        turn = np.flatnonzero(np.diff(np.sign(curves[0] - curves[1])))
        found.append(grid[turn[0]])
    assert expected == pytest.approx(stats.norm.ppf(0.975) * np.std(found), rel=0.15)


def test_the_width_of_a_best_rate_is_that_of_simulated_studies():
    bits = [16.0, 20.0, 24.0, 32.0, 40.0, 48.0, 64.0, 96.0] * 5
    bits = [value * (1 + 0.01 * i) for i, value in enumerate(bits)]
    truth = [1 + 0.5 * math.log(value / 35) ** 2 for value in bits]
    aim = target.Best("best rate", 1e12, fit(bits, truth, "parabola"))
    designs = {str(value): Design(value, (1e12,), 300, 1) for value in bits}
    expected = aim.width(designs, Scatter(0.8, 0.6))
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        noise = rng.standard_normal(len(bits)) / math.sqrt(300)
        found.append(math.log(fit(bits, np.array(truth) * np.exp(noise), "parabola").params["x*"]))
    assert expected == pytest.approx(stats.norm.ppf(0.975) * np.std(found), rel=0.15)


def test_the_median_of_the_widest_is_the_planners():
    for errors in ([(1.0, 2)], [(1.0, 2), (1.3, 3)], [(0.5, 1), (0.5, 1)], [(2.0, 5), (0.0, 1)]):
        assert widest(errors) == pytest.approx(width.half_width(errors))


# --- the text of a grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_grid_takes_a_seed_and_another_arm(file):
    text = file.read_text()
    for stage in ("tokenizer", "generator"):
        made = appended(text, [stage, "seeds"], "99", absent="0")
        before, after = yaml.safe_load(text), yaml.safe_load(made)
        assert after[stage].pop("seeds") == [*before[stage].pop("seeds", [0]), 99]
        assert after == before
        assert comments(made) == comments(text)
    before, made = yaml.safe_load(text), text
    for i in range(2):
        made = repeated(made, ["generator", 0] if i else ["generator"], {"name": f"n{i}", "seeds": "[7]"})
        assert comments(made) == comments(text)
    first, *others = yaml.safe_load(made)["generator"]
    assert first == before["generator"]
    assert others == [before["generator"] | {"name": f"n{i}", "seeds": [7]} for i in range(2)]


def comments(text: str) -> list[str]:
    return [line.partition(" #")[2] or line for line in text.splitlines() if "#" in line]


LAYOUTS = (
    "a: [1, 2] # x\nb: 3\n",
    "a:\n- 1\n- 2 # x\n# y\nb: 3\n",
    "a:\n  - 1\n  - 2\n\n  # y\nb: 3",
    "{a: [1, 2], b: 3}",
)


@pytest.mark.parametrize("text", LAYOUTS, ids=["flow", "indentless", "block", "all flow"])
def test_lists_of_every_layout_grow(text):
    assert yaml.safe_load(appended(text, ["a"], "{c: 4}")) == {"a": [1, 2, {"c": 4}], "b": 3}
    assert yaml.safe_load(appended(text, ["d"], "5", absent="4")) == {"a": [1, 2], "b": 3, "d": [4, 5]}
    with pytest.raises(AmendmentError, match="b: no list"):
        appended(text, ["b"], "1")
    with pytest.raises(AmendmentError, match=r"a\.0: no mapping"):
        appended(text, ["a", 0, "x"], "1")


@settings(deadline=None)
@given(
    st.recursive(
        st.integers() | st.booleans() | st.text("ab: #-'\"\\"), lambda x: st.lists(x, max_size=3), max_leaves=8
    )
)
def test_a_node_reads_the_same_on_one_line(value):
    text = yaml.safe_dump({"held": value}, default_flow_style=False)
    line = amendment.flow(yaml.compose(text))
    assert "\n" not in line
    assert yaml.safe_load(line) == {"held": value}


def test_lengths_are_round():
    assert [addition.digits(value) for value in (3.3e12, 5.48e9, 1.42e10, 9.6e11)] == [
        "3.0e+12",
        "5.0e+09",
        "1.4e+10",
        "1.0e+12",
    ]
