"""Does a plan hold every run once, with all that a worker needs, priced, written whole or not at all?"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from models import config as families
from models.config import Recipe
from sweep import identity, rundir
from sweep import plan as planning
from sweep.advice import inseparable
from sweep.design import design
from sweep.grid import load
from sweep.schema import PLAN, VERSION, schema

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "grid.yaml", *sorted((ROOT / "grids").glob("*.yaml"))]
GRID: dict[str, Any] = {
    "study": "small",
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
        "sizes": ["5k", "25k"],
        "budgets": [1e9, 1e10],
        "tolerance": 0.05,
        "where": {"steps": {"min": 10}},
        "train": {"batch": {"rule": "tokens", "tokens": 64}, "lr": 0.003},
    },
    "evaluation": [
        {"name": "reconstruction", "of": "tokenizer", "extractors": ["digits-supervised"], "points": "all"},
        {"name": "plain", "of": "generator", "extractors": ["digits-supervised"], "points": "all", "seeds": [0, 1]},
        {
            "name": "guided",
            "of": "generator",
            "extractors": ["digits-supervised"],
            "guidance": [1, 2],
            "points": "last",
        },
    ],
    "price": {"peak_tflops": 0.05},
    "laws": [],
}


def grid(folder: Path, **sections: Any) -> Path:
    """A grid file; a section given as a mapping is merged into that of GRID."""
    held = copy.deepcopy(GRID)
    for name, value in sections.items():
        held[name] = held.get(name, {}) | value if isinstance(value, dict) else value
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in held.items() if value is not None}))
    return file


def rows(folder: Path, **sections: Any) -> list[dict[str, Any]]:
    return list(planning.enumerate_runs(load(grid(folder, **sections))))


def stage(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in found if row["stage"] == name]


def run(*arguments: Any) -> int:
    return planning.main([str(argument) for argument in arguments])


# --- the shipped grids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_grid_plans_and_is_within_its_own_limits(file, tmp_path):
    made = planning.plan(load(file), tmp_path)
    assert made.refusal() is None
    assert made.grid.study == ("digits" if file.stem == "grid" else file.stem)
    assert made.stages["evaluation"].runs > made.stages["generator"].runs > 0
    assert all(stage.hours[1] > 0 for stage in made.stages.values())


def test_the_default_study_is_the_one_that_was_asked_for():
    made = design(load(ROOT / "grid.yaml")).runs.values()
    tokenizers = [run for run in made if run.stage == "tokenizer"]
    assert len({run.variant.latent for run in tokenizers}) >= 3
    assert len({run.seed for run in tokenizers}) == 2
    sizes = {run.variant.counts.params_core for run in made if run.stage == "generator"}
    assert len(sizes) >= 4
    assert max(sizes) >= 100 * min(sizes)


def test_the_short_dead_leaves_study_fits_half_an_hour_and_60_mib(tmp_path):
    made = planning.plan(load(ROOT / "grids/compression_dead_leaves64_short.yaml"), tmp_path)
    assert made.grid.price.max_gpu_hours == 0.4
    assert made.total.hours[1] <= 0.4
    assert made.total.disk_gib * 1024 < 60


def test_the_imagenet_study_is_the_papers():
    made = design(load(ROOT / "grids/compression_imagenet256.yaml")).runs.values()
    rates = {(run.variant.latent.tokens, run.variant.latent.codebook) for run in made if run.stage == "tokenizer"}
    assert rates == {(tokens, codes) for tokens in (256, 400, 576) for codes in (1024, 16384, 131072)}
    generators = [run for run in made if run.stage == "generator"]
    assert len({run.variant.choice.size for run in generators}) == 7
    assert len(generators) == 63
    assert all(len(run.points) == 9 for run in generators)


# --- which runs ------------------------------------------------------------------------------------------------


def test_shared_runs_are_rows_once_and_everything_upstream_comes_before(tmp_path):
    found = rows(tmp_path)
    ids = [row["run_id"] for row in found]
    assert len(set(ids)) == len(ids)
    assert Counter(row["stage"] for row in found) == {"tokenizer": 4, "generator": 8, "evaluation": 8 + 2 * 16 + 8}
    seen: dict[str, list[int]] = {}
    for row in found:
        assert set(row) == set(PLAN)
        for source in row["upstream"]:
            run_id, point = identity.split_checkpoint(source)
            assert point in seen[run_id]
        seen[row["run_id"]] = row["points"]
    for row in stage(found, "tokenizer"):
        assert row["encode"] == [20]
    assert {row["tokenizer_steps"] for row in stage(found, "generator")} == {20}


def test_budgets_become_steps_and_both_are_kept(tmp_path):
    for row in stage(rows(tmp_path), "evaluation"):
        if row["protocol"] == "plain":
            assert abs(row["flops_to_point"] / row["flops_target"] - 1) <= 0.05
            planned = json.loads(row["config"])["plan"]
            assert (planned["flops_target"], planned["steps"]) == (row["flops_target"], row["point"])
    for row in stage(rows(tmp_path), "generator"):
        config = json.loads(row["config"])
        assert row["points"] == sorted(int(step) for step in config["plan"]["points"])
        assert row["steps"] == row["points"][-1]
        paid = families.steps_paid(tuple(row["points"]), Recipe(**config["recipe"]))
        assert row["flops_paid"] == paid * config["plan"]["flops_per_step"] > row["flops_to_point"]


def test_filters_leave_points_out_and_are_counted(tmp_path):
    everything = design(load(grid(tmp_path)))
    where = {"steps": {"min": 10}, "tokenizer_seed": {"in": [1]}}
    fewer = design(load(grid(tmp_path, generator={"where": where})))
    assert everything.removed == 0
    assert fewer.removed == 8
    assert {run.upstream["tokenizer"].run.seed for run in fewer.runs.values() if run.stage == "generator"} == {1}


def test_a_schedule_that_needs_its_length_is_a_run_per_length_and_last_is_the_longest(tmp_path):
    train = GRID["generator"]["train"] | {"schedule": "cosine"}
    found = rows(tmp_path, generator={"train": train})
    assert [len(row["points"]) for row in stage(found, "generator")] == [1] * 16
    guided = [row for row in stage(found, "evaluation") if row["protocol"] == "guided"]
    assert {row["flops_target"] for row in guided} == {1e10}
    assert len(guided) == 8


def test_generators_can_train_on_every_point_of_a_tokenizer(tmp_path):
    found = rows(tmp_path, generator={"upstream": {"tokenizer": {"stage": "tokenizer", "points": "all"}}})
    assert len(stage(found, "generator")) == 16
    assert {tuple(row["encode"]) for row in stage(found, "tokenizer")} == {(10, 20)}


def test_arms_are_compared_and_evaluated_by_name(tmp_path):
    base = GRID["generator"]
    arms = [base | {"name": "plain"}, base | {"name": "normed", "fields": {"qk_norm": True}}]
    guided = GRID["evaluation"][2] | {"arms": ["normed"]}
    found = rows(tmp_path, generator=arms, evaluation=[guided])
    assert len(stage(found, "generator")) == 16
    assert {json.loads(row["fields"])["qk_norm"] for row in stage(found, "evaluation")} == {True}


def test_the_same_measurement_under_two_names_is_one_row(tmp_path):
    plain = GRID["evaluation"][1]
    found = rows(tmp_path, evaluation=[plain, plain | {"name": "again", "points": "last", "seeds": [1, 2]}])
    assert Counter(row["protocol"] for row in stage(found, "evaluation")) == {"plain": 32, "again": 8}
    assert len({row["run_id"] for row in found}) == len(found)


def test_runs_at_the_edge_of_a_learning_rate_sweep_are_flagged(tmp_path):
    found = rows(tmp_path, generator={"axes": [{"product": {"train.lr": [0.001, 0.003, 0.01]}}]})
    flags = {(row["lr"], row["flags"]) for row in stage(found, "generator")}
    assert flags == {(0.001, "lr_edge"), (0.003, ""), (0.01, "lr_edge")}


OUTSIDE = """
from models.config import EncoderFields, Flops, GeneratorFields, Latent, Params, TokenizerFields

class Eye(EncoderFields):
    depth: int = 1
    def networks(self): return frozenset({"digits-contrastive"})
    def params(self, data): return Params(10, 10)
    def flops(self, data): return Flops(1e3, 2e3)
    def activations(self, data): return 1.0

class Words(TokenizerFields):
    channels: int = 4
    def latent(self, data): return Latent(2, 2, channels=self.channels)
    def params(self, data): return Params(10, 10)
    def flops(self, data): return Flops(1e3, 2e3)
    def flops_encode(self, data): return 5.0
    def flops_decode(self, data): return 5.0
    def activations(self, data): return 1.0

class Flow(GeneratorFields):
    width: int = 8
    bits: int = 32
    def params(self, latent, classes): return Params(self.width, self.width * latent.channels)
    def flops(self, latent, classes): return Flops(1e4, 2e4)
    def flops_sample(self, latent, classes, guided): return 1e4
    def activations(self, latent, classes): return 1.0
"""
LATER: dict[str, Any] = {
    "encoder": {
        "family": "outside_families:Eye",
        "axes": [{"product": {"depth": [1, 2]}}],
        "steps": [5],
        "train": {"lr": 0.1},
        "seeds": [0, 1],
    },
    "tokenizer": {
        "family": "outside_families:Words",
        "steps": [10],
        "train": {"lr": 0.1},
        "upstream": {"encoder": {"stage": "encoder"}},
    },
    "generator": [
        {
            "family": "outside_families:Flow",
            "name": "full",
            "sizes": [{"name": "s", "width": 8}, {"name": "l", "width": 16}],
            "steps": [10, 20],
            "train": {"lr": 0.1},
        },
        {
            "family": "outside_families:Flow",
            "name": "binary",
            "fields": {"bits": 1},
            "sizes": [{"name": "s", "width": 8}, {"name": "l", "width": 16}],
            "steps": [10],
            "train": {"lr": 0.1},
            "upstream": {
                "teacher": {"stage": "generator", "arm": "full", "match": ["size"]},
                "target": {"stage": "encoder", "match": []},
            },
        },
    ],
}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Families from outside the tree."""
    (tmp_path / "outside_families.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield LATER
    sys.modules.pop("outside_families", None)


def test_later_families_fit_encoders_teachers_and_several_arms(tmp_path, outside):
    held = copy.deepcopy(GRID) | copy.deepcopy(outside) | {"evaluation": [GRID["evaluation"][1]]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(held))
    found = list(planning.enumerate_runs(load(tmp_path / "grid.yaml")))
    by_id = {row["run_id"]: row for row in found}
    assert len(stage(found, "encoder")) == len(stage(found, "tokenizer")) == 4
    arms = Counter(json.loads(row["fields"])["bits"] for row in stage(found, "generator"))
    # 4 tokenizers x 2 sizes; pupils: the same, teacher of the same size and tokenizer, each of 4 target encoders
    assert arms == {32: 8, 1: 32}
    for row in stage(found, "generator"):
        config = json.loads(row["config"])
        assert row["bits_nominal"] is None
        if config["fields"]["bits"] == 1:
            teacher = by_id[identity.split_checkpoint(config["upstream"]["teacher"])[0]]
            assert teacher["tokenizer"] == row["tokenizer"]
            assert json.loads(teacher["fields"])["width"] == config["fields"]["width"]
            assert {"teacher", "target", "tokenizer", "encoder"} <= set(config)
            assert config["teacher"]["family"] == "outside_families:Flow"
            assert row["flops_upstream"] > teacher["flops_to_point"]


def test_an_arm_that_nothing_upstream_fits_is_refused(tmp_path, outside, capsys):
    held = copy.deepcopy(GRID) | copy.deepcopy(outside) | {"evaluation": []}
    held["generator"][1]["sizes"] = [{"name": "xl", "width": 99}]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(held))
    assert run(tmp_path / "grid.yaml", "--dry-run") == 2
    assert "generator[1].upstream: got sources and matches that leave out every point" in capsys.readouterr().err


def test_arms_that_agree_in_everything_are_one(tmp_path):
    arms = [GRID["generator"] | {"name": name} for name in ("one", "other")]
    assert len(stage(rows(tmp_path, generator=arms), "generator")) == 8


def test_a_network_that_takes_part_in_training_measures_nothing(tmp_path, outside, capsys):
    held = copy.deepcopy(GRID) | copy.deepcopy(outside)
    held["evaluation"] = [GRID["evaluation"][1] | {"extractors": ["digits-supervised", "digits-contrastive"]}]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(held))
    assert run(tmp_path / "grid.yaml", "--results", tmp_path / "results") == 2
    error = capsys.readouterr().err
    assert "evaluation[0].extractors: got 'digits-contrastive'; allowed: an extractor that takes no part" in error
    assert not (tmp_path / "results").exists()


def test_a_family_that_cannot_read_the_latent_is_refused(tmp_path, outside, capsys):
    held = copy.deepcopy(GRID) | {"tokenizer": outside["tokenizer"], "encoder": outside["encoder"]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(held))
    assert run(tmp_path / "grid.yaml", "--dry-run") == 2
    assert "llama reads code ids; its tokenizer gives continuous latents" in capsys.readouterr().err


# --- what a worker needs ---------------------------------------------------------------------------------------


def test_a_config_rebuilds_its_modules_and_hashes_to_its_id(tmp_path):
    for row in rows(tmp_path):
        config = json.loads(row["config"])
        text = identity.canonical(config["identity"])
        assert identity.run_id(row["stage"], text) == row["run_id"] == config["run_id"]
        for key in ("study", "stage", "family", "label", "seed", "points", "encode"):
            assert config[key] == row[key]
        assert list(config["upstream"].values()) == row["upstream"]
        data = dict(config["data"])
        data = families.family("data", data.pop("family"))(**data)
        families.Runtime(**config["runtime"])
        built = {
            name: families.family(name, config[name]["family"])(**config[name]["fields"])
            for name in ("tokenizer", "generator")
            if name in config
        }
        if row["stage"] == "evaluation":
            assert families.Protocol(**config["protocol"]).of in built
            assert config[config["protocol"]["of"]]["checkpoint"] == row["checkpoint"] == config["checkpoint"]
            assert config["plan"]["flops_total"] == row["flops_total"]
        else:
            assert Recipe(**config["recipe"]).batch == row["batch"]
            assert families.family(row["stage"], config["family"])(**config["fields"]).identity()
        if "tokenizer" in built:
            assert built["tokenizer"].latent(data).tokens == row["tokens"]
            assert config["tokenizer"]["checkpoint"] == row["tokenizer"]


def test_paths_reach_the_worker_and_no_id(tmp_path, monkeypatch):
    monkeypatch.setenv("PICTURES", str(tmp_path / "pictures"))
    data = {"family": "image_folder", "name": "some", "size": 16, "classes": 3, "count": 100, "count_heldout": 10}
    held = copy.deepcopy(GRID) | {"data": data | {"root": "$PICTURES/all"}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(held))
    found = list(planning.enumerate_runs(load(tmp_path / "grid.yaml")))
    config = json.loads(found[0]["config"])
    assert config["data"]["root"] == str(tmp_path / "pictures/all")
    assert "root" not in json.dumps(config["identity"])
    assert any("the folder" in warning for warning in planning.plan(load(tmp_path / "grid.yaml"), tmp_path).warnings)


# --- what it costs ---------------------------------------------------------------------------------------------


def test_the_bill_is_the_sum_of_the_rows(tmp_path):
    made = planning.plan(load(grid(tmp_path)), tmp_path)
    found = rows(tmp_path)
    assert made.table.to_pylist() == found
    for name in ("tokenizer", "generator", "evaluation"):
        mine, total = stage(found, name), made.stages[name]
        assert total.runs == len(mine)
        assert total.hours[1] == pytest.approx(sum(row["gpu_h_high"] for row in mine))
        assert total.flops_measure == pytest.approx(sum(row["flops_measure"] or 0 for row in mine))
        assert total.params_total == (min(r["params_total"] for r in mine), max(r["params_total"] for r in mine))
    parts = ("flops_paid", "flops_data", "flops_encode", "flops_sample", "flops_measure")
    for row in found:
        assert row["flops_total"] == pytest.approx(sum(row[part] or 0.0 for part in parts))
    # references are paid for once
    assert len({row["flops_measure"] for row in stage(found, "evaluation") if row["protocol"] == "reconstruction"}) == 3


def test_nothing_is_left_of_a_plan_that_is_done(tmp_path):
    file = grid(tmp_path)
    study = planning.plan(load(file), tmp_path).study
    for row in rows(tmp_path):
        status = {"run_id": row["run_id"], "state": "done", "points": row["points"]}
        rundir.atomic_write(study, rundir.status_file(study, row["run_id"]), status)
        for point in row["encode"] or ():
            codes = rundir.codes_folder(study, f"{row['run_id']}@{point}", "0" * 64)
            rundir.atomic_write(study, codes / "manifest.json", {})
    after = planning.plan(load(file), tmp_path)
    assert after.total.done == after.total.runs
    assert after.total.hours_left == (0.0, 0.0)  # and no rounding of it


def test_what_does_not_fit_a_device_is_divided_over_several_and_keeps_its_id(tmp_path):
    """Generators have 2 devices of 0.9 GiB: enough for the small ones, and for the large ones with half their state."""
    sizes = [{"name": "small", "width": 64}, {"name": "large", "width": 1024}]
    section = {"sizes": sizes, "budgets": [3e12], "tolerance": 0.5, "run": {"devices": 2}}

    def planned(**price: float) -> dict[str, dict[str, Any]]:
        return {row["run_id"]: row for row in rows(tmp_path, generator=section, price=price)}

    plain, tight = planned(), planned(mem_gib=0.9)
    assert plain.keys() == tight.keys()
    assert {row["generator_size"] for row in tight.values()} == {None, "small", "large"}
    for run_id, row in tight.items():
        config, free = json.loads(row["config"]), json.loads(plain[run_id]["config"])
        large = row["stage"] == "generator" and row["generator_size"] == "large"
        assert config["runtime"] == free["runtime"] | {"shard": large}
        assert free["runtime"]["shard"] is False
        assert (row["mem_gib"] < plain[run_id]["mem_gib"]) == large
        assert families.Runtime(**config["runtime"]).devices == (2 if row["stage"] == "generator" else 1)
        if large:
            state = 20 * row["params_total"] / 2**30
            assert plain[run_id]["mem_gib"] - row["mem_gib"] == pytest.approx(state / 2)


def test_one_device_cannot_divide_a_run(tmp_path, capsys):
    for sections, key in (
        ({"run": {"shard": True}}, "run.shard"),
        ({"generator": {"run": {"shard": True}}}, "generator.run.shard"),
    ):
        file = grid(tmp_path, **sections)
        assert run(file, "--dry-run") == 2
        allowed = "allowed: null, false, or devices of 2 and more"
        assert capsys.readouterr().err == f"{file}: {key}: got true with devices: 1; {allowed}\n"


def test_the_grid_of_the_readme_plans(tmp_path):
    text = (ROOT / "README.md").read_text()
    (tmp_path / "grid.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    planned = planning.plan(load(tmp_path / "grid.yaml"), tmp_path)
    assert planned.stages.keys() == {"tokenizer", "generator", "evaluation"}
    assert planned.refusal() is None


def test_what_is_done_is_not_to_do_and_its_throughput_prices_the_rest(tmp_path):
    file = grid(tmp_path)
    before = planning.plan(load(file), tmp_path)
    done, other = stage(rows(tmp_path), "generator")[:2]
    for row, points in ((done, done["points"]), (other, other["points"][:1])):
        status = {"run_id": row["run_id"], "state": "done", "points": points}
        rundir.atomic_write(before.study, rundir.status_file(before.study, row["run_id"]), status)
    after = planning.plan(load(file), tmp_path)
    assert after.stages["generator"].done == 1
    assert after.total.hours_left[1] == pytest.approx(before.total.hours[1] - done["gpu_h_high"])
    rate = dict.fromkeys(schema("runs").names) | {"stage": "generator", "family": "llama", "status": "done"}
    rate |= {"params_total": done["params_total"], "flops_per_s": 1e9}
    part = rundir.part_file(before.study, "runs", done["run_id"], 1, 0)
    part.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([rate], schema("runs")), part)
    priced = planning.plan(load(file), tmp_path)
    assert 0 < priced.stages["generator"].measured < 8
    row = next(row for row in priced.table.to_pylist() if row["run_id"] == done["run_id"])
    assert (row["price"], row["gpu_h_low"]) == ("measured", pytest.approx(row["flops_total"] / 1e9 / 3600))
    part.write_bytes(b"broken")
    assert any("not read" in warning for warning in planning.plan(load(file), tmp_path).warnings)


def test_a_plan_beyond_its_limit_is_refused_and_nothing_is_written(tmp_path, capsys):
    results = tmp_path / "results"
    assert run(grid(tmp_path), "--results", results, "--max-gpu-hours", "1e-9") == 3
    captured = capsys.readouterr()
    assert "small: " in captured.out
    assert captured.err.startswith("--max-gpu-hours: the plan needs up to ")
    assert captured.err.count("\n") == 1
    for limit in ("max_gpu_hours", "max_disk_gib"):
        file = grid(tmp_path, price={limit: 1e-9})
        assert run(file, "--results", results, "--json") == 3
        assert f"{file}: price.{limit}: the plan needs up to " in capsys.readouterr().err
    assert not results.exists()
    assert run(grid(tmp_path, price={"max_gpu_hours": 1}), "--results", results, "--max-gpu-hours", "1") == 0


def test_warnings_say_what_will_not_come_out(tmp_path):
    def warned(**sections: Any) -> str:
        return "\n".join(planning.plan(load(grid(tmp_path, **sections)), tmp_path).warnings)

    assert "2 rates; a law in rate needs 5" in warned(laws=["rate"])
    assert "law" not in warned(laws=[])
    assert "single seed" not in warned()
    assert "tokenizer: a single seed of vq 4x16 (2 of 2" in warned(tokenizer={"seeds": [0]})
    assert "a single model size" in warned(laws=["compute"], generator={"sizes": ["5k"]})
    assert "cannot be told apart" not in warned(laws=["compute"])
    assert "GiB are needed where" in warned(price={"mem_gib": 0.001})
    assert "requeue" in warned(price={"time_limit_h": 1e-6})


def test_one_ratio_of_length_to_size_is_collinear():
    assert inseparable([(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]) == "log N and log D correlate at +1.000"
    assert inseparable([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) == "log N and log D correlate at -1.000"
    assert inseparable([(1.0, 1.0), (1.0, 2.0)]) == "a single model size"
    assert inseparable([(1.0, 1.0), (2.0, 1.0)]) == "a single training length"
    assert inseparable([(1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0)]) == ""


# --- writing ---------------------------------------------------------------------------------------------------


def test_a_plan_is_written_whole_and_left_alone_when_nothing_changed(tmp_path, capsys):
    file, results = grid(tmp_path), tmp_path / "results"
    assert run(file, "--results", results, "--dry-run") == 0
    assert not results.exists()
    assert run(file, "--results", results) == 0
    study = results / "small"
    names = {path.name for path in study.iterdir()}
    assert names == {"plan.parquet", "plan.lock.json", "grid.yaml", ".staging"}
    assert not list((study / ".staging").iterdir())
    lock = json.loads((study / "plan.lock.json").read_text())
    assert set(lock) >= {"version", "grid_sha256", "commit", "versions", "created"}
    assert (study / "grid.yaml").read_bytes() == file.read_bytes()
    assert pq.ParquetFile(study / "plan.parquet").schema_arrow.equals(schema("plan"))
    times = {path: path.stat().st_mtime_ns for path in study.iterdir() if path.is_file()}
    capsys.readouterr()
    assert run(file, "--results", results) == 0
    assert "unchanged" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert run(grid(tmp_path, tokenizer={"seeds": [0, 1, 2]}), "--results", results) == 0
    assert all(path.stat().st_mtime_ns > time for path, time in times.items())


def test_a_folder_of_another_version_is_left_alone(tmp_path, capsys):
    study = tmp_path / "results" / "small"
    study.mkdir(parents=True)
    lock = study / "plan.lock.json"
    lock.write_text(json.dumps({"version": VERSION + 1}))
    assert run(grid(tmp_path), "--results", tmp_path / "results") == 2
    assert capsys.readouterr().err == (
        f"{lock}: version: got {VERSION + 1}; allowed: {VERSION}, or another --results folder\n"
    )
    assert [path.name for path in study.iterdir()] == ["plan.lock.json"]
    lock.write_text("{ torn")
    assert run(grid(tmp_path), "--results", tmp_path / "results") == 0
    assert json.loads(lock.read_text())["version"] == VERSION


def test_a_results_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(grid(tmp_path), "--results", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_json_is_for_programs(tmp_path, capsys):
    assert run(grid(tmp_path), "--results", tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 60
    assert told["written"] is True
    assert told["stages"]["tokenizer"]["runs"] == 4
    assert told["total"]["hours"][1] == pytest.approx(sum(stage["hours"][1] for stage in told["stages"].values()))


def test_the_table_can_be_read(tmp_path, capsys):
    assert run(grid(tmp_path, laws=["rate"]), "--results", tmp_path, "--dry-run") == 0
    told = capsys.readouterr().out
    for word in ("tokenizer", "generator", "evaluation", "FLOPs of training", "device-hours", "GiB of disk", "To do: "):
        assert word in told
    assert "warning: tokenizer: 2 rates" in told


def test_runs_are_explained_and_compared_by_the_start_of_their_ids(tmp_path, capsys):
    file = grid(tmp_path)
    first, second = (row["run_id"] for row in stage(rows(tmp_path), "generator")[:2])
    assert run(file, "--explain", first[:8], "--results", tmp_path / "results") == 0
    assert "12 hex digits of SHA-256" in capsys.readouterr().out
    assert run(file, "--diff", first, second) == 0
    assert "upstream.tokenizer" in capsys.readouterr().out
    for prefix, told in (("g", "g" + first[1:5]), ("nothing", "no run of this grid")):
        assert run(file, "--explain", prefix) == 2
        error = capsys.readouterr().err
        assert f"run id: got {prefix!r}; allowed: the start of one id" in error
        assert told in error
    assert not (tmp_path / "results").exists()


# --- light and fast --------------------------------------------------------------------------------------------


def test_planning_loads_no_torch_and_no_data_frames(tmp_path):
    code = (
        "import sys; from sweep.plan import main; "
        f"code = main([{str(grid(tmp_path))!r}, '--results', {str(tmp_path)!r}]); "
        "heavy = {'torch', 'pandas', 'polars', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_100_000_runs_plan_in_ten_seconds_and_one_gib():
    benchmark = ROOT / "tests/benchmarks/plan_100k.py"
    done = subprocess.run([sys.executable, benchmark], cwd=ROOT, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        told = json.loads(line)
        assert told["rows"] >= 100_000
        assert told["cpu_s"] < 10
        assert told["peak_gib"] < 1
