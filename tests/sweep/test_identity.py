"""Do ids stay what they are, and move when and only when a result can?

``golden_ids.json`` holds ids of known configurations. A change there moves every id that users have on disk: it is an
event. To write it anew: ``python tests/sweep/test_identity.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import VQ, DeadLeaves, Digits, ImageFolder, Llama, Protocol, Recipe
from sweep import identity
from sweep.grid import load
from sweep.identity import assemble, canonical
from sweep.plan import enumerate_runs

GOLDEN = Path(__file__).parent / "golden_ids.json"
FOLDER = ImageFolder(name="imagenet-1k", root="/data", classes=1000, count=1281167, count_heldout=50000)


def known() -> dict[str, str]:
    """Ids of defaults (which a changed default moves), of settings, of every stage there is."""

    def trained(stage: str, family: str, fields: Any, data: Any, recipe: Recipe, **more: Any) -> str:
        name = {Digits: "digits", DeadLeaves: "dead_leaves", ImageFolder: "image_folder"}[type(data)]
        source = canonical({"family": name, **data.identity()})
        parts = canonical(fields.identity()), source, canonical(recipe.identity())
        return identity.run_id(stage, identity.trained(stage, family, *parts, **({"seed": 0, "upstream": {}} | more)))

    def measured(protocol: Protocol, upstream: dict[str, str], **more: Any) -> str:
        source = canonical({"family": "digits", **Digits().identity()})
        what = {"seeds": [0], "weights": {}} | more
        texts = identity.evaluations(source, canonical(upstream), canonical(protocol.identity()), **what)
        return identity.run_id("evaluation", next(texts))

    recipe = Recipe(lr=1e-3)
    tokenizer = trained("tokenizer", "vq", VQ(), Digits(), recipe)
    upstream = {"tokenizer": f"{tokenizer}@2000"}
    generator = trained("generator", "llama", Llama(), Digits(), recipe, upstream=upstream)
    cosine = Recipe(lr=1e-3, schedule="cosine")
    extractors = ("digits-supervised",)
    return {
        "tokenizer, defaults": tokenizer,
        "tokenizer, seed 1": trained("tokenizer", "vq", VQ(), Digits(), recipe, seed=1),
        "tokenizer, 4 x 16": trained("tokenizer", "vq", VQ(tokens=4, codebook=16), Digits(), recipe),
        "tokenizer, larger input": trained("tokenizer", "vq", VQ(tokens=400, input_size=320), FOLDER, recipe),
        "tokenizer, dead leaves": trained("tokenizer", "vq", VQ(), DeadLeaves(), recipe),
        "generator, defaults": generator,
        "generator, cosine": trained("generator", "llama", Llama(), Digits(), cosine, upstream=upstream, steps=300),
        "generator, from outside": trained("generator", "pack.age:Class", Llama(), Digits(), recipe),
        "evaluation of a tokenizer": measured(
            Protocol(of="tokenizer", extractors=extractors), {"checkpoint": f"{tokenizer}@2000"}
        ),
        "evaluation of a generator": measured(
            Protocol(of="generator", extractors=extractors, guidance=(1, 2)),
            {"checkpoint": f"{generator}@300", **upstream},
            seeds=[1],
            weights={"digits-supervised": "0123456789ab"},
        ),
    }


def test_ids_are_the_committed_ones():
    assert known() == json.loads(GOLDEN.read_text())


def test_an_id_is_a_letter_and_the_start_of_a_hash_that_anyone_can_recompute():
    text = identity.trained("generator", "llama", '{"width":8}', '{"family":"digits"}', '{"lr":0.1}', 3, {"a": "t0@1"})
    expected = {
        "stage": "generator",
        "version": 1,
        "family": "llama",
        "fields": {"width": 8},
        "data": {"family": "digits"},
        "recipe": {"lr": 0.1},
        "seed": 3,
        "upstream": {"a": "t0@1"},
    }
    plain = json.dumps(expected, sort_keys=True, separators=(",", ":"))
    assert text == plain
    assert identity.run_id("generator", text) == "g" + hashlib.sha256(plain.encode()).hexdigest()[:12]
    assert {identity.run_id(stage, text)[0] for stage in identity.LETTERS} == set("etrgv")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), inner),
    max_leaves=10,
)


@given(parts=st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), JSON))
def test_canonical_json_has_one_form_and_says_everything(parts):
    text = canonical(parts)
    assert json.loads(text) == parts
    assert text == canonical(dict(reversed(parts.items())))
    assert text == assemble({key: canonical(value) for key, value in parts.items()})
    assert text.isascii()


def test_no_nan_has_an_id():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="Out of range float"):
            canonical({"lr": value})


def test_a_checkpoint_id_splits_again():
    assert identity.split_checkpoint(identity.checkpoint_id("t0123456789ab", 2000)) == ("t0123456789ab", 2000)
    for wrong in ("t0123456789ab", "t0@", "t0@-3", "t0@x"):
        with pytest.raises(ValueError, match="allowed: RUN_ID@STEP"):
            identity.split_checkpoint(wrong)


GRID = """
study: ids
data: {family: digits}
tokenizer: {family: vq, fields: {width: 8, tokens: 4}, steps: [10], train: {batch: 8, lr: 1.0e-3}}
generator:
  family: llama
  sizes: [5k]
  steps: [20, 40]
  train: {batch: 8, lr: 1.0e-3}
evaluation:
  - {name: plain, of: generator, extractors: [digits-supervised], points: all}
price: {peak_tflops: 1}
"""


def ids(folder: Path, *changes: tuple[str, str]) -> dict[str, list[str]]:
    text = GRID
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "grid.yaml").write_text(text)
    found: dict[str, list[str]] = {}
    for row in enumerate_runs(load(folder / "grid.yaml")):
        found.setdefault(row["stage"], []).append(row["run_id"])
    return found


@pytest.mark.parametrize(
    "change",
    [
        ("study: ids", "study: other"),
        ("price:", "run: {threads: 2, micro_batch: 4, device: cpu, log_every: 3}\nprice:"),
        ("peak_tflops: 1", "peak_tflops: 2"),
        ("lr: 1.0e-3", "lr: 0.001"),
        ("family: llama", "family: llama\n  name: gpt"),
        ("sizes: [5k]", "sizes: [{name: same, layers: 1, width: 20, heads: 1}]"),
        ("name: plain", "name: other"),
        ("width: 8,", "width: 8, input_size: null,"),
    ],
)
def test_what_cannot_change_a_result_moves_no_id(tmp_path, change):
    assert ids(tmp_path, change) == ids(tmp_path)


def test_a_point_more_is_the_same_run_with_more_evaluations(tmp_path):
    before, after = ids(tmp_path), ids(tmp_path, ("[20, 40]", "[20, 40, 80]"))
    assert after["generator"] == before["generator"]
    assert set(before["evaluation"]) < set(after["evaluation"])


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (("width: 8", "width: 16"), {"tokenizer", "generator", "evaluation"}),
        (("steps: [10]", "steps: [12]"), {"generator", "evaluation"}),
        (("family: digits}", "family: digits, rotate_deg: 3}"), {"tokenizer", "generator", "evaluation"}),
        (("sizes: [5k]", "sizes: [25k]"), {"generator", "evaluation"}),
        (("points: all", "points: all, samples: 2000"), {"evaluation"}),
        (("points: all", "points: all, seeds: [1]"), {"evaluation"}),
    ],
)
def test_what_can_change_a_result_moves_ids_downstream(tmp_path, change, moved):
    before, after = ids(tmp_path), ids(tmp_path, change)
    assert {stage for stage in before if not set(before[stage]) & set(after[stage])} == moved
    assert {stage for stage in before if before[stage] == after[stage]} == set(before) - moved


def test_a_path_is_no_part_of_an_id():
    elsewhere = FOLDER.model_copy(update={"root": "/elsewhere"})
    assert elsewhere.identity() == FOLDER.identity()


def test_explain_gives_the_text_that_was_hashed_and_diff_what_differs(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID.replace("sizes: [5k]", "sizes: [5k, 25k]"))
    rows = [row for row in enumerate_runs(load(tmp_path / "grid.yaml")) if row["stage"] == "generator"]
    told = identity.explain(rows[0])
    assert rows[0]["run_id"] in told
    assert "fields.width = 20" in told
    assert "runtime.threads = 1" in told.split("and not of")[1]
    text = canonical(json.loads(rows[0]["config"])["identity"])
    assert identity.run_id("generator", text) == rows[0]["run_id"]
    compared = identity.diff(*rows)
    inside, outside = compared.split("outside the id")
    assert "fields.width: 20 | 32" in inside
    assert "recipe" not in inside
    assert re.search(r"plan.flops_per_step: \S+ \| \S+", outside)
    assert identity.diff(rows[0], rows[0]).count("nothing") == 2


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(known(), indent=2) + "\n")
