"""Does one table tell what happened to every run, and is nothing changed by looking?"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sweep import plan, rundir, status, tables

ROOT = Path(status.__file__).parents[1]
GRID = """
study: tiny
data: {family: digits, views: 1, views_heldout: 1}
tokenizer:
  family: vq
  fields: {width: 4, tokens: 16, codebook: 16, attention: false}
  steps: [5, 10]
  train: {batch: 8, lr: 2.0e-3}
  seeds: [0, 1, 2, 3, 4, 5]
generator:
  family: llama
  sizes: [5k]
  steps: [4]
  train: {batch: 8, lr: 3.0e-3}
evaluation:
  - {name: rebuilt, of: tokenizer, extractors: [digits-supervised], points: all, samples: 32}
  - {name: sampled, of: generator, extractors: [digits-supervised], points: all, samples: 32}
run: {threads: 1, devices: 2}
price: {device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7]}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(GRID)
    result = plan.plan(plan.load(tmp_path / "grid.yaml"), tmp_path / "results")
    plan.write(result)
    return result.study.resolve()


def runs(study: Path, stage: str) -> list[str]:
    return [row["run_id"] for row in tables.plan(study, ["run_id", "stage"]) if row["stage"] == stage]


@pytest.fixture
def busy(study: Path) -> Path:
    """One tokenizer in each state."""
    finished, running, gone, failed, other, waiting = runs(study, "tokenizer")
    spent = {"steps": 10, "train_s": 20.0, "wall_s": 36.0}
    rundir.mark(study, finished, "done", points=[5, 10], spent=spent)
    codes = rundir.codes_folder(study, f"{finished}@10", "0" * 64)
    rundir.atomic_write(study, codes / "manifest.json", {})
    claim = rundir.claim(study, running)
    assert claim is not None
    claim.update(
        state="running", step=4, steps=10, spent={"steps": 4, "train_s": 8.0, "wall_s": 9.0}, host="node7", pid=4242
    )
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim = rundir.claim(study, gone)
    assert claim is not None
    claim.update(state="running")
    record = claim.folder / "holder.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": dead.pid}))
    for run_id in (failed, other):
        rundir.mark(study, run_id, "failed", "code: ZeroDivisionError: x", traceback="Traceback\n  deep inside\n")
    rundir.mark(study, runs(study, "generator")[3], "blocked", f"{failed}@10 missing: its run is failed")
    assert rundir.status(study, waiting)["state"] == "planned"
    return study


def test_every_run_is_in_one_state(busy):
    snapshot = status.Reader(busy).look()
    tokenizer, gate, generator, evaluation = snapshot.stages
    assert [stage.name for stage in snapshot.stages] == ["tokenizer", "gate", "generator", "evaluation"]
    states = {state: count for state, count in tokenizer.runs.items() if count}
    assert states == {"done": 1, "running": 1, "lost": 1, "failed": 2, "pending": 1}
    assert (gate.total, generator.runs["blocked"], generator.runs["pending"], evaluation.total) == (12, 1, 5, 6)
    assert (tokenizer.open, generator.open, snapshot.open) == (3, 5, True)


def test_hours_are_of_devices_and_time_left_is_at_the_rate_of_what_is_done(busy):
    snapshot = status.Reader(busy).look()
    tokenizer, gate, *_ = snapshot.stages
    assert tokenizer.hours_spent == pytest.approx(2 * (36.0 + 9.0) / 3600)  # two devices each
    held = tables.plan(busy, ["stage", "gpu_h_low", "gpu_h_high"])
    planned = [sum(row[name] for row in held if row["stage"] == "tokenizer") for name in ("gpu_h_low", "gpu_h_high")]
    assert tokenizer.hours_planned == pytest.approx(planned)
    assert tokenizer.left_s == pytest.approx(2 * 36.0 * (0.6 + 1 + 1))  # as much work each, one runs now
    assert gate.left_s is None  # nothing to go by
    (run,) = snapshot.of("running")
    assert (run.step, run.steps, run.host, run.pid) == (4, 10, "node7", 4242)
    assert run.left_s == pytest.approx(6 * 2.0)


def test_a_run_with_new_points_or_lost_codes_is_to_do(busy):
    finished = runs(busy, "tokenizer")[0]
    reader = status.Reader(busy)
    rundir.mark(busy, runs(busy, "tokenizer")[5], "done", points=[5], step=10, steps=10)  # one point of two
    before = reader.look().stages[0].left_s
    next((rundir.codes_folder(busy, f"{finished}@10", "0" * 64)).iterdir()).unlink()
    assert next(run for run in reader.look().runs if run.run_id == finished).state == "pending"
    assert before == pytest.approx(2 * 36.0 * (0.6 + 1 + 1))  # as if the run had not begun


def test_a_record_is_read_again_when_it_has_changed(busy, monkeypatch):
    reader, read = status.Reader(busy), rundir.status
    reader.look()
    asked: list[str] = []
    monkeypatch.setattr(rundir, "status", lambda study, run_id: asked.append(run_id) or read(study, run_id))
    reader.look()
    assert not asked
    waiting = runs(busy, "tokenizer")[5]
    rundir.mark(busy, waiting, "failed", "oom_host: MemoryError:")
    asked.clear()
    assert reader.look().stages[0].runs["failed"] == 3
    assert asked == [waiting]


def test_failures_of_one_kind_stand_together(busy, capsys):
    assert status.main([str(busy), "--failures"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "failed, 2 runs: code: ZeroDivisionError: x"
    assert [line.split()[0] for line in lines[1:3]] == sorted(
        runs(busy, "tokenizer")[3:5], key=runs(busy, "tokenizer").index
    )
    assert lines[3].startswith("blocked, 1 run: ")
    assert lines[5].startswith("lost, 1 run: ")


def test_a_clean_study_has_no_failures(study, capsys):
    assert status.main([str(study), "--failures"]) == 0
    assert capsys.readouterr().out == "nothing ended badly\n"


def test_why_has_the_traceback_the_holder_and_what_a_run_waits_for(busy, capsys):
    _, running, gone, failed, *_ = runs(busy, "tokenizer")

    def said(run_id: str) -> str:
        assert status.main([str(busy), "--why", run_id]) == 0
        return capsys.readouterr().out

    text = said(failed[:8])
    assert text.startswith(f"{failed}: vq 16x16 s3\nstate: failed, code: ZeroDivisionError: x\n")
    assert "  deep inside" in text
    assert f"held by: process {os.getpid()} on " in said(running)
    assert "gone: the next launch takes the run over" in said(gone)
    text = said(runs(busy, "generator")[3])
    assert "state: blocked" in text
    assert f"needs: {failed}@10, failed" in text


def test_tail_is_the_end_of_the_log(busy, capsys):
    run = runs(busy, "tokenizer")[1]
    log = rundir.log_file(busy, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert status.main([str(busy), "--tail", run, "--lines", "3"]) == 0
    assert capsys.readouterr().out == "line 99997\nline 99998\nline 99999\n"
    assert status.main([str(busy), "--tail", runs(busy, "tokenizer")[5]]) == 2
    assert "has written nothing yet" in capsys.readouterr().err


def test_json_holds_every_run_and_stage(busy, capsys):
    assert status.main([str(busy), "--json"]) == 0
    held: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {run["run_id"] for run in held["runs"]} == {row["run_id"] for row in tables.plan(busy, ["run_id"])}
    assert held["stages"][0]["runs"]["failed"] == 2


@pytest.mark.parametrize("start", ["", "x", "t"])
def test_a_run_that_is_not_one_run_is_one_line(busy, start, capsys):
    assert status.main([str(busy), "--why", start]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"run id: got {start!r}; allowed: ")
    assert error.count("\n") == 1


def test_looking_changes_nothing(busy, capsys):
    before = {path: path.stat().st_mtime_ns for path in busy.rglob("*")}
    for options in ([], ["--failures"], ["--json"], ["--why", runs(busy, "tokenizer")[3]]):
        assert status.main([str(busy), *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in busy.rglob("*")} == before
    assert "--failures lists them" in capsys.readouterr().out


def test_on_a_terminal_the_table_lives_until_all_is_done(study):
    for row in tables.plan(study, ["run_id", "points", "encode"]):
        rundir.mark(study, row["run_id"], "done", points=row["points"])
        for point in row["encode"] or ():
            codes = rundir.codes_folder(study, f"{row['run_id']}@{point}", "0" * 64)
            rundir.atomic_write(study, codes / "manifest.json", {})
    generator = runs(study, "generator")[0]
    rundir.mark(study, generator, "planned")
    above, below = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "sweep.status", str(study)], cwd=ROOT, stdout=below, stderr=below)
    os.close(below)
    text = ""
    while "generator" not in text:
        text += os.read(above, 4096).decode()
    assert process.poll() is None
    rundir.mark(study, generator, "done")
    while True:
        try:
            if not (more := os.read(above, 4096).decode()):
                break
        except OSError:  # the other side was closed
            break
        text += more
    assert process.wait(timeout=60) == 0
    assert "tiny" in text


def test_a_large_study_is_shown_in_seconds(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(GRID.replace("[0, 1, 2, 3, 4, 5]", str(list(range(1000)))))
    result = plan.plan(plan.load(tmp_path / "grid.yaml"), tmp_path / "results")
    plan.write(result)
    assert status.main([str(result.study), "--once"]) == 0
    assert "1000" in capsys.readouterr().out
