"""Is every mistake in a grid named in one line, and does every grid mean what it says?"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sweep import plan as planning
from sweep.document import GridError, parse
from sweep.grid import load
from sweep.plan import enumerate_runs

VALID: dict[str, Any] = {
    "study": "tiny",
    "data": {"family": "digits", "views": 2},
    "tokenizer": {
        "family": "vq",
        "fields": {"width": 8},
        "axes": [{"list": [{"tokens": 4, "codebook": 16}, {"tokens": 16, "codebook": 8}]}],
        "steps": [10, 20],
        "train": {"batch": 8, "lr": 0.001},
        "seeds": [0, 1],
    },
    "generator": {
        "family": "llama",
        "sizes": ["5k", {"name": "small", "layers": 1, "width": 16, "heads": 1}],
        "axes": [
            {"product": {"train.weight_decay": [0.0, 0.1]}},
            {"zip": {"class_dropout": [0.1, 0.2], "dropout": [0, 0.1]}},
        ],
        "budgets": [1e9, 3e9],
        "tolerance": 0.2,
        "where": {"steps": {"min": 2}, "size": {"not": ["large"]}},
        "train": {
            "batch": {"rule": "tokens", "tokens": 256},
            "lr": {"rule": "power", "base": 0.003, "width": 64},
        },
        "seeds": [0],
    },
    "evaluation": [
        {"name": "reconstruction", "of": "tokenizer", "extractors": ["digits-supervised"], "points": "all"},
        {"name": "guided", "of": "generator", "extractors": ["digits-supervised"], "guidance": [1, 2], "seeds": [0, 1]},
    ],
    "run": {"threads": 1},
    "price": {"peak_tflops": 0.05, "mfu": [0.2, 0.5]},
    "laws": [],
}
GONE = object()


def written(folder: Path, grid: Any) -> Path:
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(grid) if not isinstance(grid, str) else grid)
    return file


def changed(path: str, value: Any) -> dict[str, Any]:
    """The valid grid with one value set (or taken out)."""
    grid = copy.deepcopy(VALID)
    at: Any = grid
    *steps, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for step in steps:
        at = at[step]
    if value is GONE:
        del at[last]
    else:
        at[last] = value
    return grid


def planned(folder: Path, grid: Any) -> list[dict[str, Any]]:
    return list(enumerate_runs(load(written(folder, grid))))


def test_the_valid_grid_is_valid(tmp_path):
    stages = [row["stage"] for row in planned(tmp_path, VALID)]
    # 2 rates x 2 seeds; each x 2 sizes x 2 x 2 axes
    assert (stages.count("tokenizer"), stages.count("generator")) == (4, 32)


MISTAKES = [
    ("studdy", "x", r"studdy: got an unknown key; allowed: .*\(did you mean 'study'\?\)"),
    ("study", "No Spaces", r"study: got 'No Spaces'; allowed: "),
    ("study", GONE, "study: got nothing; allowed: a value"),
    ("data/views", 0, "data.views: got 0; allowed: greater than or equal to 1"),
    ("data/view", 3, r"data.view: got an unknown key; allowed: .*views.*did you mean 'views'"),
    ("data/family", "digit", "data.family: 'digit' is not a data family; allowed: .*digits"),
    ("data/family", "no.such:Thing", "data.family: 'no.such:Thing' cannot be imported"),
    ("data/family", "models.config:VQ", r"data.family: .* has to be a subclass of models.config.DataFields"),
    ("tokenizer/feilds", {}, r"tokenizer.feilds: got an unknown key; allowed: .*fields.*did you mean 'fields'"),
    ("tokenizer/fields/width", "wide", "tokenizer.fields.width: got 'wide'; allowed: a valid integer"),
    ("tokenizer/fields/width", True, "tokenizer.fields.width: got True; allowed: a value that is not true or false"),
    ("tokenizer/fields/widht", 8, "tokenizer.fields.widht: got an unknown key"),
    ("tokenizer/fields/width", 10**30, "tokenizer.fields.width: got .*allowed: .*64"),
    ("tokenizer/axes/0", {"list": []}, r"tokenizer.axes\[0\].list: got \[\]; allowed: .*at least 1 item"),
    ("tokenizer/axes/0", {"product": {}}, r"tokenizer.axes\[0\].product: got {}; allowed: "),
    ("tokenizer/axes/0", {"product": {"tokens": []}}, r"tokenizer.axes\[0\].product.tokens: got \[\]; allowed: "),
    (
        "tokenizer/axes/0",
        {"product": {"token": [4]}},
        r"product.token\[0\]: got an unknown key; .*did you mean 'tokens'",
    ),
    ("tokenizer/axes/0", {"product": {"train.lrr": [1]}}, r"train.lrr\[0\]: got an unknown key; .*'train.lr'"),
    (
        "tokenizer/axes/0",
        {"product": {"tokens": ["x"]}},
        r"tokenizer.axes\[0\].product.tokens\[0\]: got 'x'; allowed: ",
    ),
    (
        "tokenizer/axes/0",
        {"product": {"tokens": [4, 5]}},
        r"axes\[0\].product.tokens\[1\]: 5 does not tile .*64, 16, 4",
    ),
    ("tokenizer/axes/0", {"zip": {"tokens": [4, 16], "codebook": [8]}}, "equal length under zip .*tokens has 2"),
    ("tokenizer/axes/0", {"product": {"tokens": [4]}, "list": [{"tokens": 4}]}, "exactly one of product, zip, list"),
    ("tokenizer/steps", [], r"tokenizer.steps: got \[\]; allowed: "),
    ("tokenizer/steps", [5, 5], r"tokenizer.steps: got \[5, 5\]; allowed: different values"),
    ("tokenizer/steps", GONE, "tokenizer: got .*; allowed: exactly one of steps, budgets"),
    ("tokenizer/train/lr", -1, "tokenizer.train.lr: got -1; allowed: greater than 0"),
    ("tokenizer/train/lr", GONE, "tokenizer.train.lr: got nothing"),
    ("tokenizer/train/lr", {"rule": "table", "values": {"4": 0.1}}, "tokenizer.train.lr: got a rule without a value"),
    ("tokenizer/train/lr", {"rule": "powr"}, "tokenizer.train.lr.rule: got 'powr'; allowed: constant, power, table"),
    ("tokenizer/train/lr", {"rule": "power", "base": 1}, "tokenizer.train.lr.width: got nothing"),
    ("tokenizer/seeds", [-1], r"tokenizer.seeds\[0\]: got -1; allowed: "),
    ("tokenizer/run", {"treads": 1}, "tokenizer.run.treads: got an unknown key"),
    ("run/threads", 0, "run.threads: got 0; allowed: "),
    ("generator/sizes/0", "7k", r"generator.sizes\[0\]: got '7k'; allowed: .*5k"),
    ("generator/sizes/1/depth", 3, r"generator.sizes\[1\].depth: got an unknown key"),
    ("generator/sizes/1/heads", 3, r"generator.sizes\[1\].width: 16 over 3 heads"),
    (
        "generator/tolerance",
        0.0001,
        r"generator.budgets\[0\]: got 1000000000.0; allowed: what whole steps spend within 0.0001 .*steps? of llama",
    ),
    ("generator/where/stepz", {"min": 1}, r"generator.where.stepz: got an unknown key; .*did you mean 'steps'"),
    ("generator/where/size", {"min": 1}, "generator.where.size: got '5k'; allowed: in or not"),
    ("generator/where/steps", {"min": 10**9}, "generator.where: got filters that remove every point"),
    (
        "generator/where/steps",
        {"minn": 1},
        "generator.where.steps.minn: got an unknown key; allowed: in, max, min, not",
    ),
    ("generator/upstream", {"generator": {"stage": "tokenizer"}}, "generator.upstream.generator: got 'generator'"),
    ("generator/upstream", {"eyes": {"stage": "encoder"}}, "generator.upstream.eyes.stage: got 'encoder'; allowed: "),
    ("generator/upstream", {"tokenizer": {"stage": "tokenizer", "arm": "vqq"}}, "arm: got 'vqq'; allowed: vq"),
    ("evaluation/0/sampels", 3, r"evaluation\[0\].sampels: got an unknown key; .*did you mean 'samples'"),
    ("evaluation/0/of", "encoder", r"evaluation\[0\].of: got 'encoder'; allowed: generator, tokenizer"),
    ("evaluation/0/extractors", ["digit"], r"evaluation\[0\].extractors\[0\]: got 'digit'; allowed: "),
    ("evaluation/0/extractors", [], r"evaluation\[0\].extractors: got \[\]; allowed: "),
    ("evaluation/0/name", "guided", "evaluation: got 'guided'; allowed: a different name"),
    ("evaluation/1/guidance", [2, 2], r"evaluation\[1\].guidance: "),
    ("evaluation/1/arms", ["gpt"], r"evaluation\[1\].arms: got 'gpt'; allowed: llama"),
    ("price/mfu", [0.5, 0.2], "price: got .*; allowed: mfu"),
    ("price/peak_tflops", True, "price.peak_tflops: got True; allowed: a number"),
    ("laws", ["all"], r"laws\[0\]: got 'all'; allowed: 'rate' or 'compute'"),
]


@pytest.mark.parametrize(
    ("path", "value", "line"), MISTAKES, ids=[f"{p}={'' if v is GONE else repr(v):.30}" for p, v, _ in MISTAKES]
)
def test_a_mistake_is_one_line_that_names_file_key_value_and_what_is_allowed(tmp_path, path, value, line):
    file = written(tmp_path, changed(path, value))
    with pytest.raises(GridError, match=line) as caught:
        list(enumerate_runs(load(file)))
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("study: a\nstudy: b\n", "study: got this key twice \\(line 2\\)"),
        ("study: [", "line 1, column 9: got no YAML"),
        ("", "the file: got None; allowed: "),
        ("- 1", "the file: got \\[1\\]; allowed: "),
        ("study: !!timestamp x", "got no YAML"),
        ("a: " + "[" * 3000, "nested"),
        ("study: \x00", "got no YAML"),
    ],
)
def test_what_is_no_grid_at_all_is_one_line_too(tmp_path, text, line):
    with pytest.raises(GridError, match=line):
        load(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GridError, match=r"absent.yaml: cannot be read \(No such file"):
        load(tmp_path / "absent.yaml")


def test_a_budget_has_to_buy_a_step_unless_a_filter_takes_the_point_out(tmp_path):
    grid = changed("generator/where", {})
    grid["generator"]["budgets"] = [1.0, 3e9]
    with pytest.raises(GridError, match=r"generator.budgets\[0\]: got 1.0; allowed: at least .*, one step of llama 5k"):
        planned(tmp_path, grid)
    grid["generator"]["where"] = {"steps": {"min": 1}}
    assert {row["flops_target"] for row in planned(tmp_path, grid) if row["stage"] == "generator"} == {3e9}


def test_numbers_read_as_they_look():
    assert parse(b"[1e10, 3E-4, 1.5e3, 1_000, 5k, 07:30]")[:3] == [1e10, 3e-4, 1500.0]


def test_blocks_multiply_and_an_axis_stands_above_size_and_fields(tmp_path):
    grid = copy.deepcopy(VALID)
    grid["generator"] |= {
        "fields": {"class_dropout": 0.5, "dropout": 0.3},
        "axes": [
            {"product": {"layers": [1, 2], "qk_norm": [False, True]}},
            {"zip": {"train.lr": [0.1, 0.2], "class_dropout": [0.6, 0.7]}},
        ],
    }
    arm = load(written(tmp_path, grid)).arms["generator"][0]
    choices = list(arm.choices())
    assert len(choices) == 2 * 4 * 2
    assert all(choice.fields["dropout"] == 0.3 for choice in choices)
    assert {(choice.train["lr"], choice.fields["class_dropout"]) for choice in choices} == {(0.1, 0.6), (0.2, 0.7)}
    assert {choice.fields["layers"] for choice in choices} == {1, 2}


def test_rules_give_batch_and_learning_rate(tmp_path):
    rows = [row for row in planned(tmp_path, VALID) if row["stage"] == "generator"]
    assert {(row["tokens"], row["batch"]) for row in rows} == {(4, 64), (16, 16)}
    assert {(row["generator_size"], row["lr"]) for row in rows} == {("5k", 0.0096), ("small", 0.012)}
    table = changed("generator/train/lr", {"rule": "table", "values": {"5k": 0.1, "small": 0.2}})
    rows = [row for row in planned(tmp_path, table) if row["stage"] == "generator"]
    assert {(row["generator_size"], row["lr"]) for row in rows} == {("5k", 0.1), ("small", 0.2)}


def test_filters_are_counted_and_null_passes_a_bound(tmp_path):
    grid = changed("generator/where", {"epochs": {"max": 100}, "generator_seed": {}})
    with pytest.raises(GridError, match="generator_seed: got an unknown key"):
        planned(tmp_path, grid)
    endless = changed("data", {"family": "dead_leaves", "size": 16})
    endless["tokenizer"]["where"] = {"epochs": {"max": 0.001}}
    endless["tokenizer"]["axes"] = []
    endless["evaluation"] = []
    assert any(row["stage"] == "tokenizer" for row in planned(tmp_path, endless))


# --- nothing but GridError ever comes out -----------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["vq", "llama", "5k", "all", "last", "tokens", "tokenizer", "a.b:C", "$HOME", "1e3", "train.lr"]),
)
KEYS = st.one_of(
    st.text(max_size=8), st.integers(), st.sampled_from(["min", "in", "list", "zip", "product", "rule", "lr"])
)
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The valid grid after a few arbitrary changes."""
    grid = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        *steps, last = draw(st.sampled_from(places(grid) or [("study",)]))
        at: Any = grid
        for step in steps:
            at = at[step]
        match draw(st.sampled_from(["set", "delete", "rename", "add"])):
            case "set":
                at[last] = draw(JUNK)
            case "delete":
                del at[last]
            case "rename" if isinstance(at, dict):
                at[draw(KEYS)] = at.pop(last)
            case _ if isinstance(at, dict):
                at[draw(KEYS)] = draw(JUNK)
            case _:
                at.append(draw(JUNK))
    return grid


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grid=mutated())
def test_any_change_to_a_grid_gives_a_plan_or_one_line(tmp_path, capsys, grid):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.dump(grid, Dumper=yaml.SafeDumper, allow_unicode=True), errors="surrogatepass")
    code = planning.main([str(file), "--results", str(tmp_path / "results"), "--dry-run", "--json"])
    out, err = capsys.readouterr()
    assert code in (0, 2, 3)
    if code == 2:
        assert out == ""
        assert err.startswith(f"{file}: ")
        assert err.count("\n") == 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
def test_any_bytes_give_one_line(tmp_path, text):
    file = tmp_path / "grid.yaml"
    file.write_bytes(text)
    with pytest.raises(GridError) as caught:
        load(file)
    assert "\n" not in str(caught.value)
