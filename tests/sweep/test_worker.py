"""Does a run end in exactly one way, with its rows, whatever happens to the process that works on it?"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from models import checkpoint
from sweep import failures, identity, plan, rundir, tables, worker
from sweep.attempt import Attempt, Ended, Stop

ROOT = Path(worker.__file__).parents[1]
GRID = """
study: {study}
data: {{family: digits, views: 2, views_heldout: 1}}
tokenizer:
  family: vq
  fields: {{width: 4, tokens: 4, codebook: 16}}
  steps: {points}
  train: {{batch: 16, lr: 2.0e-3, warmup: 2{train}}}
  seeds: {seeds}
generator:
  family: llama
  sizes: [5k]
  steps: [4, 8]
  train: {{batch: 16, lr: 3.0e-3, warmup: 2}}
  seeds: [0]
evaluation:
  - {{name: rebuilt, of: tokenizer, extractors: [digits-supervised], points: all, samples: 32}}
  - {{name: sampled, of: generator, extractors: [digits-supervised], points: all, samples: 32, guidance: [1, 2]}}
run: {{threads: 1, log_every: 5}}
price: {{device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7]}}
"""


def planned(folder: Path, **changes: Any) -> Path:
    """A planned study, every run registered."""
    values = {"study": "tiny", "points": "[10, 20]", "seeds": "[0]", "train": ""} | changes
    grid = folder / "grid.yaml"
    grid.write_text(GRID.format(**values))
    result = plan.plan(plan.load(grid), folder / "results")
    plan.write(result)
    for row in tables.plan(result.study, ["config"]):
        rundir.register(result.study, json.loads(row["config"]))
    return result.study.resolve()


def runs(study: Path, stage: str) -> list[str]:
    return [row["run_id"] for row in tables.plan(study, ["run_id", "stage"]) if row["stage"] == stage]


def rows(study: Path, table: str) -> list[dict[str, Any]]:
    assert not tables.compact(study)
    held: list[dict[str, Any]] = pq.read_table(rundir.compact_file(study, table)).to_pylist()
    return held


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that went through all its stages without disturbance."""
    study = planned(tmp_path_factory.mktemp("whole"))
    for row in tables.plan(study, ["run_id"]):  # in an order that works
        assert worker.work(study, row["run_id"], Stop()) == "done", rundir.status(study, row["run_id"])
    return study


# --- a run that goes well --------------------------------------------------------------------------------------------


def test_every_run_of_the_plan_ends_with_one_row(study):
    held = rows(study, "runs")
    assert sorted(row["run_id"] for row in held) == sorted(row["run_id"] for row in tables.plan(study, ["run_id"]))
    for row in held:
        assert row.items() >= {"status": "done", "reason": None, "attempt": 1, "threads": 1, "device": "cpu"}.items()
        assert row["commit"]
        assert row["wall_s"] > 0
        assert 0 < row["mem_peak_gib"] < 16
        assert json.loads(row["versions"])["torch"] == torch.__version__.partition("+")[0]
        measured = row["stage"] == "evaluation"
        assert (row["flops_per_s"] is None) == measured
        assert (row["steps"] is None) == measured
    assert not tables.verify(study)


def test_costs_are_those_that_were_planned(study):
    cost = {row["run_id"]: row for row in tables.plan(study, ["run_id", "flops_paid", "flops_total"])}
    for row in rows(study, "runs"):
        expected = cost[row["run_id"]]["flops_total" if row["stage"] == "evaluation" else "flops_paid"]
        assert row["flops_paid"] == pytest.approx(expected)


def test_training_rows_tell_the_trunk_from_its_branches(study):
    (tokenizer,) = runs(study, "tokenizer")
    (config,) = (json.loads(row["config"]) for row in tables.plan(study, ["run_id", "config"], [tokenizer]))
    held = [row for row in rows(study, "curves") if row["run_id"] == tokenizer]
    steps = {name: [row["step"] for row in held if row["metric"] == name] for name in ("loss", "loss@10", "loss@20")}
    assert steps == {"loss": [5, 8, 10, 15, 16], "loss@10": [10], "loss@20": [20]}
    for row in held:
        assert row["flops"] == row["step"] * config["plan"]["flops_per_step"]
        assert row["images"] == row["step"] * 16
        assert row["epochs"] == pytest.approx(row["images"] / 1438)
        assert row["checkpoint"] is None
        assert row["split"] == "train"


def test_measured_rows_carry_checkpoint_compute_and_protocol(study):
    by_run = {row["run_id"]: row for row in tables.plan(study)}
    held = [row for row in rows(study, "curves") if row["run_id"].startswith("v")]
    metrics = Counter(row["metric"] for row in held)
    assert metrics["mse"] == metrics["nll_bits"] / 2 == 2
    assert metrics.keys() >= {"fid", "fid_data", "kid", "usage", "fid_search"}
    for row in held:
        expected = by_run[row["run_id"]]
        for name in ("checkpoint", "protocol", "protocol_id", "images"):
            assert row[name] == expected[name]
        assert row["step"] == expected["point"]
        assert row["flops"] == expected["flops_to_point"]
        assert row["seed"] == expected["evaluation_seed"]
    assert {row["kind"] for row in rows(study, "images")} == {"original", "reconstruction", "sample"}


def test_codes_are_cached_where_generators_look(study):
    (tokenizer,) = runs(study, "tokenizer")
    (generator,) = runs(study, "generator")
    config = rundir.config(study, generator)
    assert rundir.encoded(study, tokenizer) == {20}
    assert (worker.codes_of(study, f"{tokenizer}@20", config) / "manifest.json").exists()
    assert identity.split_checkpoint(config["upstream"]["tokenizer"]) == (tokenizer, 20)


def test_what_is_finished_is_not_done_again(study):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*") if path.is_file()}
    for row in tables.plan(study, ["run_id"]):
        assert worker.work(study, row["run_id"], Stop()) == "over"
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*") if path.is_file()} == before


# --- interruption, extension -----------------------------------------------------------------------------------------


class After(Stop):
    """Raised after a number of looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        self.raised = self.raised or self.looks < 0
        return self.raised


def weights(study: Path, run_id: str, point: int) -> bytes:
    return (rundir.point_file(study, run_id, point).parent / "point.safetensors").read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_bits(study, tmp_path, monkeypatch):
    monkeypatch.setattr("sweep.attempt.POLL_S", 0.0)
    other = planned(tmp_path)
    (tokenizer,) = runs(other, "tokenizer")
    outcomes = []
    while "done" not in outcomes:
        outcomes.append(worker.work(other, tokenizer, After(7)))
        if outcomes[-1] == "cancelled":
            status = rundir.status(other, tokenizer)
            assert "asked to stop at" in status["reason"]
            assert worker.work(other, tokenizer, Stop()) == "over"  # until a launch opens it again
            rundir.mark(other, tokenizer, "planned")
    assert len(outcomes) > 2
    for point in (10, 20):
        assert weights(other, tokenizer, point) == weights(study, tokenizer, point)
    (row,) = rows(other, "runs")
    assert row["attempt"] == len(outcomes)
    assert row["steps"] == 22  # both branches, no step twice
    mine = {(row["step"], row["metric"]): row["value"] for row in rows(other, "curves")}
    undisturbed = [row for row in rows(study, "curves") if row["run_id"] == tokenizer]
    assert mine == {(row["step"], row["metric"]): row["value"] for row in undisturbed}
    assert not tables.verify(other)


def test_a_measurement_stops_between_batches_and_is_made_again(study, tmp_path, monkeypatch):
    monkeypatch.setattr("sweep.attempt.POLL_S", 0.0)
    other = planned(tmp_path)
    (tokenizer,), (generator,) = runs(other, "tokenizer"), runs(other, "generator")
    for run_id in (tokenizer, generator):
        assert worker.work(other, run_id, Stop()) == "done"
    for run_id in runs(other, "evaluation"):
        assert worker.work(other, run_id, After(2)) == "cancelled"
        assert "asked to stop before it measured" in rundir.status(other, run_id)["reason"]
        rundir.mark(other, run_id, "planned")
        assert worker.work(other, run_id, Stop()) == "done"

    def measured(folder: Path) -> list[tuple[Any, ...]]:
        held = [row for row in rows(folder, "curves") if row["run_id"].startswith("v")]
        return sorted(
            (
                row["run_id"],
                row["metric"],
                str(row["extractor"]),
                str(row["guidance"]),
                str(row["reference"]),
                str(row["split"]),
                row["value"],
            )
            for row in held
        )

    assert measured(other) == measured(study)


def test_a_point_can_be_added_to_a_finished_run(study, tmp_path):
    other = planned(tmp_path, points="[10, 20]")
    (tokenizer,) = runs(other, "tokenizer")
    worker.work(other, tokenizer, Stop())
    longer = planned(tmp_path, points="[10, 20, 40]")
    assert runs(longer, "tokenizer") == [tokenizer]
    assert worker.work(longer, tokenizer, Stop()) == "done"
    status = rundir.status(longer, tokenizer)
    assert status["points"] == [10, 20, 40]
    assert rundir.encoded(longer, tokenizer) == {20, 40}
    assert status["spent"]["steps"] == 22 + (40 - 16)
    assert weights(longer, tokenizer, 20) == weights(study, tokenizer, 20)


# --- runs that do not go well ----------------------------------------------------------------------------------------


def test_divergence_is_a_result_and_blocks_what_builds_on_it(tmp_path):
    study = planned(tmp_path, train=", diverged: 1.0e-6")
    (tokenizer,), (generator,) = runs(study, "tokenizer"), runs(study, "generator")
    assert worker.work(study, tokenizer, Stop()) == "diverged"
    (row,) = rows(study, "runs")
    assert row["status"] == "diverged"
    assert row["reason"].startswith("loss ")
    assert worker.work(study, tokenizer, Stop()) == "over"
    assert worker.work(study, generator, Stop()) == "blocked"
    status = rundir.status(study, generator)
    assert status["diverged_upstream"]
    assert f"{tokenizer}@20 missing: its run is diverged" in status["reason"]
    assert "attempt" not in status
    (measurement, *_) = runs(study, "evaluation")
    assert worker.work(study, measurement, Stop()) == "blocked"


def test_codes_that_were_deleted_are_made_again(tmp_path):
    study = planned(tmp_path)
    (tokenizer,), (generator,) = runs(study, "tokenizer"), runs(study, "generator")
    assert worker.work(study, tokenizer, Stop()) == "done"
    codes = worker.codes_of(study, f"{tokenizer}@20", rundir.config(study, generator))
    held = {path.name: path.read_bytes() for path in codes.iterdir()}
    killed = codes.parent / f".{codes.name}.0123456789ab"
    shutil.copytree(codes, killed)  # left by a process that died while encoding
    shutil.rmtree(codes)
    assert worker.work(study, generator, Stop()) == "blocked"
    assert "codes of" in rundir.status(study, generator)["reason"]
    assert worker.work(study, tokenizer, Stop()) == "done"
    assert {path.name: path.read_bytes() for path in codes.iterdir()} == held
    assert not killed.exists()
    assert rundir.status(study, tokenizer)["spent"]["steps"] == 22  # nothing was trained again


def test_a_run_waits_for_one_of_its_own_launch_and_for_no_other(tmp_path):
    study = planned(tmp_path)
    (tokenizer,), (generator,) = runs(study, "tokenizer"), runs(study, "generator")
    assert worker.work(study, generator, Stop(), siblings={tokenizer, generator}) == "early"
    assert rundir.status(study, generator)["state"] == "planned"
    rundir.mark(study, tokenizer, "failed", "code: x")
    assert worker.work(study, generator, Stop(), siblings={tokenizer, generator}) == "blocked"


@pytest.mark.parametrize(("stored", "planned_for", "used"), [(4, None, 4), (4, 2, 2), (None, 2, 2), (2, 4, 2)])
def test_the_smaller_of_what_fitted_and_what_is_planned_is_used(tmp_path, monkeypatch, stored, planned_for, used):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")
    config = rundir.config(study, tokenizer)
    config["runtime"]["micro_batch"] = planned_for
    rundir.register(study, config)
    rundir.mark(study, tokenizer, "planned", micro_batch=stored)
    seen: list[int | None] = []

    def look(attempt: Attempt) -> Ended:
        seen.append(attempt.runtime.micro_batch)
        return Ended("done")

    replaced(monkeypatch, look)
    assert worker.work(study, tokenizer, Stop()) == "done"
    assert seen == [used]


def test_a_device_beyond_use_does_not_hide_the_reason(tmp_path, monkeypatch):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")

    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    replaced(monkeypatch, broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    with pytest.raises(RuntimeError, match="device-side"):  # ends the process: nothing works on that device any more
        worker.work(study, tokenizer, Stop())
    status = rundir.status(study, tokenizer)
    assert status["state"] == "failed"
    assert "device-side assert" in status["traceback"]


def test_what_a_failed_attempt_trained_is_on_the_bill(tmp_path, monkeypatch):
    from models import checkpoint

    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")

    def broken(self: checkpoint.Checkpoints, point: int, *_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save_point", broken)
        assert worker.work(study, tokenizer, Stop()) == "failed"
    (row,) = rows(study, "runs")
    assert row["steps"] == rundir.status(study, tokenizer)["spent"]["steps"] == 10  # to the first point, saved nowhere
    assert row["flops_per_s"] > 0
    rundir.mark(study, tokenizer, "planned")
    assert worker.work(study, tokenizer, Stop()) == "done"
    config = rundir.config(study, tokenizer)
    (row,) = rows(study, "runs")
    assert row["steps"] == 10 + 22
    assert row["flops_paid"] == 32 * config["plan"]["flops_per_step"]


def test_a_failure_keeps_its_traceback_and_the_process(study, tmp_path, capsys):
    other = planned(tmp_path)
    (tokenizer,), (generator,) = runs(other, "tokenizer"), runs(other, "generator")
    assert worker.work(other, tokenizer, Stop()) == "done"
    codes = worker.codes_of(other, f"{tokenizer}@20", rundir.config(other, generator)) / "train.npy"
    codes.chmod(0o644)
    codes.write_bytes(codes.read_bytes()[:-1])
    assert worker.work(other, generator, Stop()) == "failed"
    status = rundir.status(other, generator)
    assert status["reason"].startswith("input: ValueError: ")
    assert "train.npy" in status["reason"]
    assert "Traceback" in status["traceback"]
    assert "Traceback" in capsys.readouterr().err
    assert [row["status"] for row in rows(other, "runs")] == ["failed", "done"]
    assert worker.work(other, generator, Stop()) == "over"


def replaced(monkeypatch: pytest.MonkeyPatch, stage: Any) -> None:
    monkeypatch.setitem(worker.STAGES, "tokenizer", stage)


@pytest.mark.parametrize(("saves", "state"), [(True, "interrupted"), (False, "failed")])
def test_a_run_that_is_cut_off_goes_on_for_as_long_as_it_gets_further(tmp_path, monkeypatch, saves, state):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")
    stop = Stop(job=tmp_path / "stop")
    (tmp_path / "stop").write_text("timeout")

    def cut_off(attempt: Attempt) -> Ended:
        if saves:
            (rundir.run_folder(study, tokenizer) / "ckpt" / f"trunk-{attempt.claim.attempt:08d}").mkdir(parents=True)
        assert attempt.stop()
        return Ended("cancelled", "asked to stop at step 1")

    replaced(monkeypatch, cut_off)
    ends = [worker.work(study, tokenizer, stop) for _ in range(8)]
    assert ends[:4] == ["interrupted"] * 4
    assert set(ends[4:]) == ({"interrupted"} if saves else {"failed", "over"})
    status = rundir.status(study, tokenizer)
    assert status["state"] == state
    if not saves:
        assert status["reason"] == "timeout: 4 attempts in a row ended before they saved anything"
        assert failures.reopens(status)  # a longer limit may help


def test_a_full_disk_stops_every_process_of_the_launch(tmp_path, monkeypatch):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")

    def full(attempt: Attempt) -> Ended:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("cannot save") from error

    replaced(monkeypatch, full)
    stop = Stop(tmp_path / "stop")
    assert worker.work(study, tokenizer, stop) == "failed"
    assert stop()
    assert Stop(tmp_path / "stop")()
    assert rundir.status(study, tokenizer)["reason"].startswith("storage: ")


def test_a_superseded_attempt_leaves_no_trace(tmp_path, monkeypatch):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")
    claims = rundir.run_folder(study, tokenizer) / "claim"

    def overtaken(attempt: Attempt) -> Ended:
        attempt.curves.append([{"step": 1, "metric": "loss", "value": 1.0}])
        (claims / "0002").mkdir()
        rundir.atomic_write(study, claims / "0002" / "holder.json", rundir.myself())
        return Ended("done")

    replaced(monkeypatch, overtaken)
    assert worker.work(study, tokenizer, Stop()) == "superseded"
    assert rundir.status(study, tokenizer)["state"] == "running"  # as the other attempt will say
    assert not tables.parts(study, "curves")
    assert not tables.parts(study, "runs")
    assert worker.work(study, tokenizer, Stop()) == "held"


def test_a_holder_gives_signs_of_life_and_can_be_asked_to_stop(tmp_path, monkeypatch):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")
    monkeypatch.setattr(rundir, "BEAT_S", 0.05)
    monkeypatch.setattr("sweep.attempt.POLL_S", 0.0)
    seen: dict[str, Any] = {}

    def slow(attempt: Attempt) -> Ended:
        record = attempt.claim.folder / "holder.json"
        os.utime(record, (0, 0))
        time.sleep(0.5)
        seen["beat"] = record.stat().st_mtime
        seen["before"] = attempt.should_stop()
        rundir.cancel(study, tokenizer)
        seen["after"] = attempt.should_stop()
        return Ended("cancelled", "asked")

    replaced(monkeypatch, slow)
    assert worker.work(study, tokenizer, Stop()) == "cancelled"
    assert seen["beat"] > time.time() - 60
    assert (seen["before"], seen["after"]) == (False, True)


def test_failures_are_told_apart():
    def caused(error: Exception, by: Exception) -> Exception:
        error.__cause__ = by
        return error

    full = OSError(errno.ENOSPC, "No space left on device")
    assert failures.classify(full) == "storage"
    assert failures.classify(caused(RuntimeError("x"), full)) == "storage"
    assert failures.classify(RuntimeError("I/O error: No space left on device (os error 28)")) == "storage"
    assert failures.classify(torch.OutOfMemoryError("CUDA out of memory")) == "oom_gpu"
    assert failures.classify(MemoryError()) == "oom_host"
    host = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert failures.classify(host) == "oom_host"
    assert failures.classify(torch.distributed.DistBackendError("NCCL timeout")) == "comms"
    assert failures.classify(ValueError("lr: got -1")) == "input"
    assert failures.classify(FileNotFoundError("data")) == "data"
    assert failures.classify(ZeroDivisionError()) == "code"
    assert failures.classify(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")) == "comms"
    assert failures.classify(checkpoint.Damaged("point.safetensors: its checksum is not the recorded one")) == "data"
    assert failures.classify(RuntimeError("CUDA error: uncorrectable ECC error encountered")) == "node"
    named = {
        "preempted",
        "timeout",
        "oom_gpu",
        "oom_host",
        "node",
        "comms",
        "storage",
        "submit",
        "data",
        "code",
        "lost",
        "ended",
    }
    assert named | {"input"} == failures.POLICY.keys()


def test_half_of_a_batch_divides_it():
    assert [failures.halved(64, micro) for micro in (64, 32, 3, 2, 1)] == [32, 16, 1, 1, None]
    assert [failures.halved(60, micro) for micro in (60, 30, 15)] == [30, 15, 6]


# --- the command -----------------------------------------------------------------------------------------------------


def test_progress_counts_the_whole_program():
    from models.config import Recipe

    recipe = Recipe(lr=1.0, warmup=2)
    paid = [worker._paid(step, point, (10, 20), recipe) for step, point in ((8, None), (10, 10), (16, None), (20, 20))]
    assert paid == [8, 10, 18, 22]
    cosine = Recipe(lr=1.0, schedule="cosine")
    assert worker._paid(7, None, (20,), cosine) == 7


def test_a_run_in_the_foreground_loads_only_what_it_needs(tmp_path):
    study = planned(tmp_path)
    (tokenizer,) = runs(study, "tokenizer")
    code = f"""
import sys
from sweep import worker
assert "torch" not in sys.modules
code = worker.main(["{tokenizer}", "--results", {str(study.parent)!r}])
heavy = ("torchvision", "timm", "torch_fidelity", "sklearn", "pandas", "polars", "matplotlib", "submitit")
print(code, [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stdout.startswith(f"{tokenizer} vq 4x16 s0: done")


@pytest.mark.parametrize("name", ["t0123456789ab", "nonsense"])
def test_an_unknown_run_is_one_line(study, name, capsys):
    assert worker.main([name, "--results", str(study.parent)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("run id: ")
    assert "allowed: " in error
    assert error.count("\n") == 1


def test_the_command_says_who_holds_a_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Stop, "listen", lambda self: None)
    study = planned(tmp_path)
    (tokenizer,), (generator,) = runs(study, "tokenizer"), runs(study, "generator")
    assert rundir.claim(study, tokenizer)
    assert worker.main([tokenizer, "--results", str(study)]) == 1
    assert f"held by process {os.getpid()}" in capsys.readouterr().err
    assert worker.main([generator, "--results", str(study)]) == 1
    assert "blocked" in capsys.readouterr().out
