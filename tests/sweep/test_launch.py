"""Does every run get done once, whoever dies, and does a second launch notice?"""

from __future__ import annotations

import argparse
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sweep import launch, ledger, plan, rundir, slots, tables, watch, worker
from sweep.attempt import Stop

ROOT = Path(launch.__file__).parents[1]
GRID = """
study: {study}
data: {{family: digits, views: 1, views_heldout: 1}}
tokenizer:
  family: vq
  fields: {{width: 4, tokens: 16, codebook: 16, attention: false}}
  steps: {points}
  train: {{batch: 8, lr: 2.0e-3, warmup: 2}}
  seeds: {seeds}
generator:
  family: llama
  sizes: [5k]
  steps: [4]
  train: {{batch: 8, lr: 3.0e-3, warmup: 2}}
  seeds: [0]
evaluation:
  - {{name: rebuilt, of: tokenizer, extractors: [digits-supervised], points: all, samples: 32}}
  - {{name: again, of: tokenizer, extractors: [digits-supervised], points: all, samples: 48}}
  - {{name: sampled, of: generator, extractors: [digits-supervised], points: all, samples: 32}}
run: {{threads: 1, log_every: 5, save_every_s: 1}}
price: {{device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7]}}
"""


def planned(folder: Path, **changes: Any) -> Path:
    values = {"study": "tiny", "points": "[5, 10]", "seeds": "[0, 1]"} | changes
    grid = folder / "grid.yaml"
    grid.write_text(GRID.format(**values))
    result = plan.plan(plan.load(grid), folder / "results")
    plan.write(result)
    return result.study.resolve()


def runs(study: Path, stage: str) -> list[str]:
    return [row["run_id"] for row in tables.plan(study, ["run_id", "stage"]) if row["stage"] == stage]


def events(study: Path, run_id: str) -> list[dict[str, Any]]:
    path = rundir.journal_file(study, run_id)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def states(study: Path, stage: str) -> list[str]:
    return [rundir.status(study, run_id)["state"] for run_id in runs(study, stage)]


def done(study: Path, stage: str) -> None:
    """Say that the runs of a stage are done, without doing them."""
    for row in tables.plan(study, ["run_id", "stage", "points", "encode"]):
        if row["stage"] == stage:
            rundir.mark(study, row["run_id"], "done", points=row["points"])
            for point in row["encode"] or ():
                codes = rundir.codes_folder(study, f"{row['run_id']}@{point}", "0" * 64)
                rundir.atomic_write(study, codes / "manifest.json", {})
            for point in row["points"]:
                rundir.atomic_write(study, rundir.point_file(study, row["run_id"], point), {})


def waited(until: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# --- a stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = planned(tmp_path_factory.mktemp("launched"))
    assert launch.main([str(study), "--stage", "tokenizer", "--slots", "2"]) == 0
    assert launch.main([str(study), "--stage", "evaluation", "--of", "tokenizer", "--slots", "2"]) == 0
    return study


def test_a_stage_runs_to_its_end_in_processes_of_its_own(launched):
    assert states(launched, "tokenizer") == ["done", "done"]
    pids = {rundir.status(launched, run_id)["pid"] for run_id in runs(launched, "tokenizer")}
    assert os.getpid() not in pids
    assert all(not rundir.alive(rundir.myself()["host"], pid, None) for pid in pids)
    held = tables.read(tables.parts(launched, "runs")[0], "runs").to_pylist()
    assert held[0]["status"] == "done"
    assert rundir.compact_file(launched, "curves").exists()
    assert not tables.verify(launched)


def test_evaluations_of_a_checkpoint_share_a_process(launched):
    held = tables.plan(launched, ["run_id", "stage", "checkpoint"])
    pids: dict[str, set[int]] = {}
    for row in held:
        if row["stage"] == "evaluation" and row["checkpoint"].startswith("t"):
            pids.setdefault(row["checkpoint"], set()).add(rundir.status(launched, row["run_id"])["pid"])
    assert len(pids) == 4
    assert all(len(found) == 1 for found in pids.values())


def test_a_stamp_lists_outcomes_and_nothing_of_submitit_is_left(launched):
    stamp = json.loads(rundir.stamp_file(launched, "tokenizer").read_text())
    assert stamp == {"stage": "tokenizer", "of": None, "runs": dict.fromkeys(runs(launched, "tokenizer"), "done")}
    assert rundir.stamp_file(launched, "evaluation", "tokenizer").name == "evaluation-tokenizer.json"
    assert rundir.stamp_file(launched, "evaluation", "tokenizer").exists()
    folder = rundir.launches_folder(launched)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["code"]  # what ran


def test_a_second_call_returns_at_once_with_one_line(launched):
    command = [sys.executable, "-X", "importtime", "-m", "sweep.launch", str(launched), "--stage", "tokenizer"]
    call = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert call.returncode == 0
    assert call.stdout.startswith("tokenizer: 2 of 2 runs done")
    assert call.stdout.count("\n") == 1
    loaded = {line.rpartition("|")[2].strip() for line in call.stderr.splitlines()}
    assert "sweep.launch" in loaded or "sweep.slots" in loaded
    assert not loaded & {"torch", "submitit", "pandas", "rich"}


# --- what is not run -------------------------------------------------------------------------------------------------


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process may be started."""

    def start(self: slots.Slots, work: list[list[str]]) -> None:
        raise AssertionError(f"started on {work}")

    monkeypatch.setattr(slots.Slots, "start", start)


@pytest.mark.usefixtures("still")
def test_what_is_missing_upstream_blocks_without_an_attempt(tmp_path, capsys):
    study = planned(tmp_path)
    assert launch.main([str(study), "--stage", "generator"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("blocked: g") == 2
    assert "its run is planned" in captured.err
    assert "0 of 2 runs done (2 blocked)" in captured.out
    assert not rundir.stamp_file(study, "generator").exists()
    assert not (rundir.run_folder(study, runs(study, "generator")[0]) / "claim").exists()


@pytest.mark.usefixtures("still")
def test_divergence_upstream_is_no_failure(tmp_path, capsys):
    study = planned(tmp_path)
    done(study, "generator")
    for run_id in runs(study, "tokenizer"):
        rundir.mark(study, run_id, "diverged", "loss nan at step 5")
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    assert "2 diverged" in capsys.readouterr().out
    for run_id in runs(study, "generator"):
        rundir.mark(study, run_id, "planned", points=[])
    assert launch.main([str(study), "--stage", "generator"]) == 0
    assert "loss nan at step 5" in capsys.readouterr().err
    stamp = json.loads(rundir.stamp_file(study, "generator").read_text())
    assert set(stamp["runs"].values()) == {"blocked"}


@pytest.mark.usefixtures("still")
def test_a_failure_is_listed_and_stays_until_it_is_asked_for(tmp_path, capsys):
    study = planned(tmp_path)
    done(study, "tokenizer")
    failed = runs(study, "tokenizer")[1]
    rundir.mark(study, failed, "failed", "code: ZeroDivisionError: x", traceback="Traceback ...")
    assert launch.main([str(study), "--stage", "tokenizer"]) == 1
    error = capsys.readouterr().err
    assert f"failed: {failed} vq 16x16 s1: code: ZeroDivisionError: x" in error
    assert f"python -m sweep.worker {failed}" in error
    with pytest.raises(AssertionError, match=f"started on .*{failed}"):
        launch.main([str(study), "--stage", "tokenizer", "--retry"])


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("reason", ["input: FileNotFoundError: cat.png", "storage: OSError: No space left on device"])
def test_a_cause_outside_the_run_is_looked_at_again(tmp_path, reason):
    study = planned(tmp_path)
    done(study, "tokenizer")
    failed = runs(study, "tokenizer")[1]
    rundir.mark(study, failed, "failed", reason)
    with pytest.raises(AssertionError, match=f"started on .*{failed}"):
        launch.main([str(study), "--stage", "tokenizer"])


FOLDER = "{{family: image_folder, name: pets, root: ROOT, size: 16, classes: 2, count: 2, count_heldout: 2, views: 4}}"


def of_images(folder: Path, root: Path) -> Path:
    """A study of the images in a folder."""
    text = GRID.replace("{{family: digits, views: 1, views_heldout: 1}}", FOLDER.replace("ROOT", str(root)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(globals(), "GRID", text)
        return planned(folder, seeds="[0]")


def test_an_image_that_cannot_be_read_is_bad_input_and_names_the_file(tmp_path, capsys):
    from PIL import Image

    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(file)
    broken = tmp_path / "images" / "train" / "dog" / "b.png"
    broken.write_bytes(b"no image")
    study = of_images(tmp_path, tmp_path / "images")
    assert launch.main([str(study), "--stage", "tokenizer", "--slots", "1"]) == 2
    assert str(broken) in capsys.readouterr().err
    Image.new("RGB", (16, 16)).save(broken)
    assert launch.main([str(study), "--stage", "tokenizer", "--slots", "1"]) == 0  # mended, and tried again


@pytest.mark.usefixtures("still")
def test_a_missing_data_folder_is_bad_input_and_nothing_is_written(tmp_path, capsys):
    study = of_images(tmp_path, Path("/nowhere/images"))
    before = sorted(study.rglob("*"))
    assert launch.main([str(study), "--stage", "tokenizer"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("grid.yaml: data.root: got /nowhere/images; allowed: a folder that is here\n")
    assert sorted(study.rglob("*")) == before


def test_a_stage_whose_runs_build_on_each_other_is_one_launch(tmp_path):
    pupil = """generator:
  - name: teacher
    family: llama
    sizes: [5k]
    steps: [4]
    train: {{batch: 8, lr: 3.0e-3, warmup: 2}}
  - name: pupil
    family: llama
    sizes: [5k]
    steps: [400]
    train: {{batch: 8, lr: 3.0e-3, warmup: 2}}
    upstream: {{teacher: {{stage: generator, arm: teacher}}}}
evaluation:"""
    start, stop = GRID.index("generator:"), GRID.index("evaluation:")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(globals(), "GRID", GRID[:start] + pupil + GRID[stop + len("evaluation:") :])
        study = planned(tmp_path, seeds="[0]")
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    assert launch.main([str(study), "--stage", "generator", "--slots", "2"]) == 0
    assert states(study, "generator") == ["done", "done"]
    teacher, pupil_ = sorted([event["time"] for event in events(study, run_id)] for run_id in runs(study, "generator"))
    assert teacher[-1] < pupil_[0]


# --- retries ---------------------------------------------------------------------------------------------------------

FAILING = """
import sys
from models import training
from sweep import worker
trained, told = training.train, {told!r}

def train(module, stream, recipe, points, *, runtime, **more):
    with open(told, "a") as file:
        print(runtime.micro_batch, file=file)
    {fails}
    return trained(module, stream, recipe, points, runtime=runtime, **more)

training.train = train
"""


def failing(folder: Path, fails: str) -> tuple[dict[str, str], Path]:
    """An environment in which training fails as the text says, and where each attempt tells its micro-batch."""
    (folder / "patched").mkdir()
    told = folder / "told"
    (folder / "patched" / "sitecustomize.py").write_text(FAILING.format(told=str(told), fails=fails))
    return {"PYTHONPATH": f"{folder / 'patched'}{os.pathsep}{ROOT}"}, told


def called(study: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sweep.launch", str(study), "--stage", "tokenizer", "--slots", "1", *more]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, text=True, capture_output=True, timeout=300)


@pytest.mark.timeout(600)
def test_a_run_that_does_not_fit_the_device_is_trained_in_smaller_pieces(tmp_path):
    study = planned(tmp_path, seeds="[0]")
    (run,) = runs(study, "tokenizer")
    fails = (
        "import torch\n    if (runtime.micro_batch or recipe.batch) > 2: raise torch.OutOfMemoryError('out of memory')"
    )
    env, told = failing(tmp_path, fails)
    done_ = called(study, env)
    assert done_.returncode == 0, done_.stderr
    assert told.read_text().split() == ["None", "4", "2"]  # the batch of 8 is halved twice
    assert [event["event"] for event in events(study, run)].count("retry") == 2
    assert rundir.status(study, run)["state"] == "done"
    ended = [row for part in tables.parts(study, "runs") for row in tables.read(part, "runs").to_pylist()]
    assert [row["status"] for row in ended] == ["failed", "failed", "done"]
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_a_run_that_fits_in_no_pieces_fails_and_says_why(tmp_path):
    study = planned(tmp_path, seeds="[0]")
    env, told = failing(tmp_path, "import torch; raise torch.OutOfMemoryError('out of memory')")
    ended = called(study, env)
    assert ended.returncode == 1
    assert "oom_gpu: OutOfMemoryError: out of memory" in ended.stderr
    assert told.read_text().split() == ["None", "4", "2", "1", "1"]  # the last one codes fewer images at a time


@pytest.mark.timeout(600)
def test_a_launch_stops_when_its_first_runs_fail_alike(tmp_path):
    study = planned(tmp_path, seeds=str(list(range(8))))
    env, told = failing(tmp_path, "import time; time.sleep(1); raise ZeroDivisionError('always')")
    ended = called(study, env)
    assert ended.returncode == 1
    assert "the first 3 runs failed alike, code: ZeroDivisionError: always" in ended.stdout
    assert 3 <= len(told.read_text().split()) < 8
    assert Counter(states(study, "tokenizer"))["planned"] >= 1
    assert not rundir.stamp_file(study, "tokenizer").exists()


def watched(study: Path, stage: str) -> slots.Local:
    """A launch of a stage as it stands, without any process."""
    rows = launch.select(study, stage, None)
    configs = {row["run_id"]: json.loads(row["config"]) for row in tables.plan(study, ["run_id", "config"])}
    return slots.Local(study, rows, configs, folder_of(study), options())


def folder_of(study: Path) -> Path:
    folder = rundir.launches_folder(study) / "x"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_evaluations_of_one_checkpoint_are_one_failure(tmp_path):
    told = [ledger.note(tmp_path, source, "failed", "code: x") for source in ("t1@5", "t1@5", "t1@10", "t2@5")]
    assert told == [None, None, None, "the first 3 runs failed alike, code: x"]


@pytest.mark.parametrize(("state", "reason"), [("done", None), ("diverged", "loss nan"), ("failed", "code: y")])
def test_one_other_end_shows_that_not_all_fail_alike(tmp_path, state, reason):
    assert ledger.note(tmp_path, "t0", state, reason) is None
    assert [ledger.note(tmp_path, f"t{number}", "failed", "code: x") for number in range(1, 6)] == [None] * 5


def test_a_run_that_was_blocked_by_one_that_is_tried_again_is_open(tmp_path):
    study = planned(tmp_path)
    held = watched(study, "generator")
    first, second = held.rows.values()
    second["upstream"] = [f"{first['run_id']}@4"]
    rundir.mark(study, second["run_id"], "blocked", "its run is failed")
    held.look()
    assert rundir.status(study, second["run_id"])["state"] == "planned"
    rundir.mark(study, first["run_id"], "failed", "code: x")
    held.look()
    rundir.mark(study, second["run_id"], "blocked", "its run is failed")
    held.look()
    assert held.outcomes[second["run_id"]]["state"] == "blocked"


@pytest.mark.usefixtures("still")
def test_a_retry_that_is_asked_for_starts_at_full_size(tmp_path):
    study = planned(tmp_path, seeds="[0]")
    (run,) = runs(study, "tokenizer")
    rundir.mark(study, run, "failed", "oom_gpu: x", micro_batch=2, measure_batch=31, attempt=5)
    with pytest.raises(AssertionError, match="started on"):
        launch.main([str(study), "--stage", "tokenizer", "--retry"])
    status = rundir.status(study, run)
    assert (status["state"], status["micro_batch"], status["measure_batch"]) == ("planned", None, None)


@pytest.mark.usefixtures("still")
def test_runs_that_were_planned_for_more_devices_than_they_get_are_named(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(globals(), "GRID", GRID.replace("run: {{", "run: {{devices: 64, "))
        study = planned(tmp_path)
    with pytest.raises(AssertionError, match="started on"):
        launch.main([str(study), "--stage", "tokenizer"])
    assert "they were planned for up to 64 devices each and get one" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_a_run_on_two_devices_is_two_processes_with_one_record(tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(globals(), "GRID", GRID.replace("run: {{", "run: {{devices: 2, "))
        study = planned(tmp_path)
    command = [sys.executable, "-m", "sweep.launch", str(study), "--stage", "tokenizer", "--cores", "2"]
    done_ = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done_.returncode == 0, done_.stderr
    assert "1 x 2 processes of 1 threads" in done_.stdout
    (tmp_path / "alone").mkdir()
    alone = planned(tmp_path / "alone")
    for run_id in runs(study, "tokenizer"):
        rundir.register(alone, json.loads(tables.plan(alone, ["run_id", "config"], [run_id])[0]["config"]))
        assert worker.work(alone, run_id, Stop()) == "done"
        assert [event["event"] for event in events(study, run_id)].count("started") == 1
        mine, other = (
            load_file(rundir.point_file(held, run_id, 10).parent / "point.safetensors") for held in (study, alone)
        )
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5)
    assert not tables.verify(study)


@pytest.mark.usefixtures("still")
def test_a_failed_measurement_keeps_nothing_else_from_running(tmp_path, capsys):
    study = planned(tmp_path)
    done(study, "evaluation")
    measured = [row["run_id"] for row in launch.select(study, "evaluation", "tokenizer")]
    rundir.mark(study, measured[0], "failed", "oom_host: MemoryError:")
    command = [str(study), "--stage", "evaluation", "--of", "tokenizer"]
    assert launch.main(command) == 1
    assert not rundir.stamp_file(study, "evaluation", "tokenizer").exists()
    assert launch.main([*command, "--keep-going"]) == 0
    assert f"failed: {measured[0]}" in capsys.readouterr().err
    stamp = json.loads(rundir.stamp_file(study, "evaluation", "tokenizer").read_text())
    assert stamp["runs"][measured[0]] == "failed"
    rundir.stamp_file(study, "evaluation", "tokenizer").unlink()
    for run_id in measured:
        rundir.mark(study, run_id, "failed", "code: x")
    assert launch.main([*command, "--keep-going"]) == 1  # a stage without any result is not complete
    assert not rundir.stamp_file(study, "evaluation", "tokenizer").exists()


@pytest.mark.usefixtures("still")
def test_a_run_that_another_launch_finished_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    study = planned(tmp_path)
    registered = rundir.register

    def late(folder: Path, config: dict[str, Any]) -> None:  # between the look at what is to do and the start
        registered(folder, config)
        done(study, "tokenizer")

    monkeypatch.setattr(rundir, "register", late)
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    assert states(study, "tokenizer") == ["done", "done"]


@pytest.mark.usefixtures("still")
def test_a_run_with_a_new_point_is_to_do_again(tmp_path, capsys):
    study = planned(tmp_path, seeds="[0]")
    done(study, "tokenizer")
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    planned(tmp_path, seeds="[0]", points="[5, 10, 20]")
    with pytest.raises(AssertionError, match="started on"):
        launch.main([str(study), "--stage", "tokenizer"])
    assert "1 of 1 runs to do" in capsys.readouterr().out


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing", "--stage", "tokenizer"], "study: 'nothing' holds no plan.parquet"),
        (["STUDY", "--stage", "tokenizer", "--only", "sede=1"], "--only: got 'sede'; allowed: RUN_ID, or KEY=VALUE of"),
        (["STUDY", "--stage", "tokenizer", "--only", "seed=7"], "--only: got seed=7; no tokenizer run"),
        (["STUDY", "--stage", "tokenizer", "--only", "../x"], "run id: '../x'; allowed: one letter and 12"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, arguments, says, capsys):
    study = planned(tmp_path)
    before = sorted(study.rglob("*"))
    assert launch.main([str(study) if word == "STUDY" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(says)
    assert error.count("\n") == 1
    assert sorted(study.rglob("*")) == before


@pytest.mark.usefixtures("still")
def test_a_price_beyond_the_limit_is_refused(tmp_path, capsys):
    study = planned(tmp_path)
    before = sorted(study.rglob("*"))
    assert launch.main([str(study), "--stage", "tokenizer", "--max-gpu-hours", "1e-9"]) == 3
    assert capsys.readouterr().err.startswith("--max-gpu-hours: tokenizer needs up to ")
    assert sorted(study.rglob("*")) == before


def test_runs_are_selected_by_id_column_and_axis(tmp_path):
    study = planned(tmp_path)
    first, second = runs(study, "tokenizer")

    def selected(*only: str, stage: str | None = "tokenizer", of: str | None = None) -> list[str]:
        return [row["run_id"] for row in launch.select(study, stage, of, only)]

    assert selected() == [first, second]
    assert selected(first) == [first]
    assert selected("seed=1") == [second]
    assert selected("lr=2e-3", "seed=0.0") == [first]
    assert selected("family=vq", "tokens=16") == [first, second]
    assert selected("tokenizer_seed=1", stage="generator") == [runs(study, "generator")[1]]
    assert len(selected(stage="evaluation", of="tokenizer")) == 8
    assert len(selected(stage="evaluation", of="generator")) == 2


def test_work_is_ordered_longest_first_with_checkpoints_together():
    def row(run_id: str, flops: float, checkpoint: str | None = None) -> dict[str, Any]:
        return {"run_id": run_id, "flops_total": flops, "checkpoint": checkpoint}

    assert watch.groups([row("a", 1.0), row("b", 3.0), row("c", 2.0)]) == [["b"], ["c"], ["a"]]
    held = [row("a", 2.0, "g@1"), row("b", 3.0, "g@2"), row("c", 2.0, "g@1")]
    assert watch.groups(held) == [["a", "c"], ["b"]]


def test_a_large_finished_study_costs_seconds(tmp_path, capsys):
    study = planned(tmp_path, seeds=str(list(range(500))), points="[1, 2, 3, 4, 5]")
    assert len(tables.plan(study, ["run_id"])) >= 5000
    for run_id in runs(study, "evaluation"):
        rundir.run_folder(study, run_id).mkdir(parents=True)
        rundir.status_file(study, run_id).write_text(json.dumps({"run_id": run_id, "state": "done"}))
    began = time.monotonic()
    assert launch.main([str(study), "--stage", "evaluation", "--of", "tokenizer"]) == 0
    assert time.monotonic() - began < 5
    assert "5000 of 5000 runs done" in capsys.readouterr().out


# --- slots -----------------------------------------------------------------------------------------------------------


def options(**changes: Any) -> argparse.Namespace:
    values = {"threads_per_slot": None, "cores": None, "slots": None, "keep_going": False}
    return argparse.Namespace(**(values | changes))


@pytest.mark.parametrize(
    ("threads", "device", "visible", "changes", "expected"),
    [
        (1, "cpu", "", {"cores": 2}, (2, 1, [])),
        (2, "cpu", "", {"cores": 2}, (1, 2, [])),
        (4, "cpu", "", {"cores": 2}, (1, 4, [])),
        (4, "cpu", "", {"cores": 8, "threads_per_slot": 2}, (4, 2, [])),
        (1, "auto", "", {"cores": 2}, (2, 1, [])),
        (1, "cpu", "", {"cores": 4096}, (8, 1, [])),  # what Snakemake calls no limit
        (1, "cpu", "", {}, (8, 1, [])),
        (1, "auto", "0,2,3", {"cores": 2}, (3, 1, ["0", "2", "3"])),
        (1, "auto", "GPU-5ab,MIG-7c/1/0", {"cores": 2}, (2, 1, ["GPU-5ab", "MIG-7c/1/0"])),
        (1, "auto", "-1", {"cores": 2}, (2, 1, [])),
        (1, "cpu", "0,1", {"cores": 4}, (4, 1, [])),
        (1, "cuda", "0", {"cores": 4, "slots": 3}, (3, 1, ["0"])),
        (1, "cuda", "0,1", {"cores": 4, "pack": 3}, (6, 1, ["0", "1"])),  # three share each
    ],
)
def test_slots_divide_devices_or_cores(tmp_path, monkeypatch, threads, device, visible, changes, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(slots, "_cores", lambda: 8)
    configs = [{"runtime": {"threads": threads, "device": device, "pack": changes.pop("pack", None)}}]
    held = slots.Slots(tmp_path / "study", configs, tmp_path, options(**changes))
    assert (held.count, held.width, held.devices) == expected


def test_a_process_gets_the_device_that_is_free(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    configs = [{"runtime": {"threads": 1, "device": "cuda"}}]
    held = slots.Slots(tmp_path / "study", configs, tmp_path, options())
    over = [argparse.Namespace(done=lambda ended=ended: ended) for ended in (False, True)]
    assert held.free() == "GPU-a"
    held.jobs, held.given = over, ["GPU-a", "GPU-b"]  # the second died
    assert held.free() == "GPU-b"


def test_a_process_sees_its_device_alone(tmp_path, monkeypatch):
    study = planned(tmp_path)
    folder = rundir.launches_folder(study) / "x"
    folder.mkdir(parents=True)
    code = f"""
import os
from sweep import slots
slots.serve({str(study)!r}, [], {str(folder)!r}, None, "MIG-7c/1/0", True)
print(os.environ["CUDA_VISIBLE_DEVICES"])
"""
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "MIG-7c/1/0\n"


def test_a_worker_that_cannot_start_ends_the_launch(tmp_path, monkeypatch, capsys):
    study = planned(tmp_path)
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert launch.main([str(study), "--stage", "tokenizer", "--slots", "1"]) == 1
    assert "workers end before they end a run; see " in capsys.readouterr().err
    assert states(study, "tokenizer") == ["planned", "planned"]


# --- disturbances ----------------------------------------------------------------------------------------------------


def launcher(study: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sweep.launch", str(study), "--stage", "tokenizer", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def tidy() -> Iterator[list[Path]]:
    """Whatever a test leaves running in these studies ends with it."""
    studies: list[Path] = []
    yield studies
    for study in studies:
        for path in rundir.launches_folder(study).glob("*/worker-*.json"):
            process = json.loads(path.read_text())
            if rundir.alive(process["host"], process["pid"], process["born"]):
                os.kill(process["pid"], signal.SIGKILL)


def trained(study: Path, run_id: str, attempt: int) -> bool:
    return any(event["event"] == "record" and event["attempt"] >= attempt for event in events(study, run_id))


@pytest.mark.timeout(600)
def test_a_run_survives_kills_cancels_and_ctrl_c_bit_for_bit(tmp_path, tidy):
    study = planned(tmp_path, seeds="[0]", points="[250]")
    tidy.append(study)
    (run,) = runs(study, "tokenizer")

    # a worker dies: noticed, and the run goes on in another process
    first = launcher(study)
    waited(lambda: trained(study, run, 1))
    os.kill(rundir.status(study, run)["pid"], signal.SIGKILL)
    waited(lambda: rundir.status(study, run).get("retries") == {"lost": 1}, seconds=10)
    waited(lambda: trained(study, run, 2))

    # somebody cancels from another terminal
    assert launch.main([str(study), "--cancel"]) == 0
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "stopped before the end; the same command resumes" in output
    assert "1 cancelled" in output
    assert rundir.status(study, run)["reason"].startswith("asked to stop at step")
    saved = max(event["attempt"] for event in events(study, run))

    # Ctrl-C twice: everything is gone, nothing is lost
    second = launcher(study)
    waited(lambda: trained(study, run, saved + 1))
    pid = rundir.status(study, run)["pid"]
    second.send_signal(signal.SIGINT)
    second.send_signal(signal.SIGINT)
    second.communicate(timeout=60)
    assert second.returncode == 130
    waited(lambda: rundir.alive(rundir.myself()["host"], pid, None) is False, seconds=10)

    rundir.mark(study, run, "planned")
    assert worker.work(study, run, Stop()) == "done"
    (tmp_path / "quiet").mkdir()
    quiet = planned(tmp_path / "quiet", seeds="[0]", points="[250]")
    rundir.register(quiet, json.loads(tables.plan(quiet, ["run_id", "config"], [run])[0]["config"]))
    assert worker.work(quiet, run, Stop()) == "done"
    mine, other = (rundir.point_file(held, run, 250).parent / "point.safetensors" for held in (study, quiet))
    assert mine.read_bytes() == other.read_bytes()
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_two_launches_at_once_run_nothing_twice(tmp_path, tidy):
    study = planned(tmp_path, seeds="[0, 1, 2]")
    tidy.append(study)
    both = [launcher(study, "--slots", "1") for _ in range(2)]
    for process in both:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        assert "3 of 3 runs done" in output
    for run_id in runs(study, "tokenizer"):
        assert [event["event"] for event in events(study, run_id)].count("started") == 1
    assert states(study, "tokenizer") == ["done"] * 3


def test_a_run_that_loses_its_worker_twice_has_failed(tmp_path):
    study = planned(tmp_path, seeds="[0]")
    (run,) = runs(study, "tokenizer")
    rundir.register(study, json.loads(tables.plan(study, ["run_id", "config"], [run])[0]["config"]))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for lost in (1, 2):
        claim = rundir.claim(study, run)
        assert claim is not None
        claim.update(state="running")
        record = claim.folder / "holder.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": gone.pid}))
        held = watched(study, "tokenizer")
        held.stopping = True  # nothing is to be started
        held.look()
        held.tend()
        held.look()
        status = rundir.status(study, run)
        assert (status["state"], run in held.pending) == (("planned", True) if lost == 1 else ("failed", False))
        with pytest.raises(rundir.Superseded):
            claim.guard()  # the dead may come back
    assert status["reason"] == f"lost: its worker died (pid {gone.pid} on {rundir.myself()['host']}), 2 times"
    (part,) = tables.parts(study, "runs")
    (ended,) = tables.read(part, "runs").to_pylist()
    assert (ended["status"], ended["attempt"], ended["host"], ended["mem_peak_gib"]) == ("failed", 4, None, None)
