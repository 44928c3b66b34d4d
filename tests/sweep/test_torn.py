"""What is left of a study when files are cut off, disks fill up, clocks are wrong and processes die?"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from analysis import load
from sweep import failures, launch, plan, rundir, source, stages, status, tables, worker
from sweep.attempt import Stop
from tests.sweep import test_worker
from tests.sweep.test_worker import After, planned, rows, runs, weights

ROOT = Path(rundir.__file__).parents[1]
POINTS = (10, 20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that went through all its stages without disturbance; not to be written to."""
    study = planned(tmp_path_factory.mktemp("finished"))
    for row in tables.plan(study, ["run_id"]):
        assert worker.work(study, row["run_id"], Stop()) == "done"
    tables.compact(study)
    return study


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study, to be damaged."""
    return copied(finished, tmp_path / "results")


def copied(study: Path, results: Path) -> Path:
    return Path(shutil.copytree(study, results / study.name))


# --- ways in which a file is damaged ---------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    """What some file systems leave after a power cut: the right length, nothing but zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def scramble(path: Path) -> None:
    """Bytes that are no text in UTF-8 either."""
    path.write_bytes(b"\x80\x04\xff\xfe" * 25)


def another_kind(path: Path) -> None:
    path.write_bytes(b"[1, 2]")


DAMAGES = (cut, empty, zero, scramble, another_kind)
damaged = pytest.mark.parametrize("damage", DAMAGES)


def hidden(study: Path) -> list[str]:
    """What a writer that did not get to its end has left."""
    patterns = (".staging/*", "runs/*/*/.*", "cache/*/.*", "cache/codes/*/.*", ".submitit/code/.*")
    return [str(path.relative_to(study)) for pattern in patterns for path in study.glob(pattern)]


def opened(study: Path, run_id: str) -> None:
    """Open a run again, as a launch does."""
    if rundir.status(study, run_id)["state"] in ("failed", "cancelled", "blocked"):
        rundir.mark(study, run_id, "planned")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def halted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A study whose tokenizer was stopped twice, and its run: it has two states to go on from."""
    monkeypatch.setattr("sweep.attempt.POLL_S", 0.0)
    study = planned(tmp_path)
    (run_id,) = runs(study, "tokenizer")
    for _ in range(2):
        assert worker.work(study, run_id, After(3)) == "cancelled"
        opened(study, run_id)
    return study, run_id


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("state.safetensors", damage) for damage in (cut, empty, Path.unlink)),
        *(("state.json", damage) for damage in (*DAMAGES, Path.unlink)),
    ],
)
def test_a_run_goes_on_from_the_state_before_a_damaged_one_to_the_same_bits(finished, halted, name, damage):
    study, run_id = halted
    older, newer = sorted((rundir.run_folder(study, run_id) / "ckpt").iterdir())
    damage(newer / name)
    assert worker.work(study, run_id, Stop()) == "done"
    assert [weights(study, run_id, point) for point in POINTS] == [weights(finished, run_id, p) for p in POINTS]
    again = int(newer.name.partition("-")[2]) - int(older.name.partition("-")[2])
    assert rundir.status(study, run_id)["spent"]["steps"] == 22 + again


def test_copies_beside_the_states_of_a_run_are_somebody_elses(finished, halted):
    study, run_id = halted
    folder = rundir.run_folder(study, run_id) / "ckpt"
    newest = max(folder.iterdir())
    kept = [newest.with_name(name) for name in (f"{newest.name} (copy)", f"{newest.name}-old", "trunk-best", ".notes")]
    for path in kept:
        shutil.copytree(newest, path)
    assert worker.work(study, run_id, Stop()) == "done"
    assert weights(study, run_id, 20) == weights(finished, run_id, 20)
    assert all((path / "state.json").exists() for path in kept)


@pytest.mark.parametrize("name", ["point.safetensors", "point.json"])
def test_a_damaged_point_is_named_by_what_measures_it_and_hurts_nothing_else(study, name):
    (tokenizer,) = runs(study, "tokenizer")
    held = {row["run_id"]: row["checkpoint"] for row in tables.plan(study, ["run_id", "checkpoint"])}
    file = rundir.point_file(study, tokenizer, 20).with_name(name)
    cut(file)
    for run_id in (run_id for run_id, checkpoint in held.items() if (checkpoint or "").startswith("t")):
        rundir.mark(study, run_id, "planned")
        hurt = held[run_id] == f"{tokenizer}@20"
        assert worker.work(study, run_id, Stop()) == ("failed" if hurt else "done")
        if hurt:
            reason = rundir.status(study, run_id)["reason"]
            assert str(file.with_name("point.safetensors")) in reason
            assert failures.reopens({"state": "failed", "reason": reason})  # the next launch looks again


def test_a_point_that_was_deleted_is_made_again(finished, study):
    (tokenizer,) = runs(study, "tokenizer")
    shutil.rmtree(rundir.point_file(study, tokenizer, 20).parent)
    assert worker.work(study, tokenizer, Stop()) == "done"
    assert weights(study, tokenizer, 20) == weights(finished, tokenizer, 20)


def test_a_run_whose_folder_was_deleted_is_done_again_and_its_new_rows_count(finished, study):
    """To delete it is how one asks for that; its old rows lie elsewhere."""
    measured = runs(study, "evaluation")[0]
    config = rundir.config(study, measured)
    shutil.rmtree(rundir.run_folder(study, measured))
    rundir.register(study, config)
    assert worker.work(study, measured, Stop()) == "done"
    assert not tables.verify(study)
    assert values(study) == values(finished)


@pytest.mark.parametrize(
    ("name", "damage"), [*(("manifest.json", damage) for damage in DAMAGES), ("train.npy", cut), ("train.npy", empty)]
)
def test_damaged_codes_name_their_folder_and_are_made_again_without_it(finished, study, name, damage):
    (tokenizer,), (generator,) = runs(study, "tokenizer"), runs(study, "generator")
    codes = worker.codes_of(study, f"{tokenizer}@20", rundir.config(study, generator))
    damage(codes / name)
    shutil.rmtree(rundir.points_folder(study, generator))
    rundir.mark(study, generator, "planned", points=[])
    assert worker.work(study, generator, Stop()) == "failed"
    reason = rundir.status(study, generator)["reason"]
    assert str(codes) in reason
    assert reason.endswith("delete the folder")
    shutil.rmtree(codes)
    assert worker.work(study, tokenizer, Stop()) == "done"
    opened(study, generator)
    assert worker.work(study, generator, Stop()) == "done"
    assert weights(study, generator, 8) == weights(finished, generator, 8)


# --- tables ----------------------------------------------------------------------------------------------------------


def values(study: Path) -> list[tuple[str, ...]]:
    """What was measured, whichever attempt did it."""
    return sorted(
        (*(str(row[name]) for name in sorted(row.keys() - {"attempt", "value", "error"})), repr(row["value"]))
        for row in rows(study, "curves")
    )


@damaged
def test_a_damaged_part_is_left_out_and_its_rows_are_written_again(finished, study, damage, capsys):
    measured = runs(study, "evaluation")[0]
    part = next(path for path in tables.parts(study, "curves") if measured in str(path))
    damage(part)
    others = [row for row in rows(finished, "curves") if row["run_id"] != measured]
    shutil.rmtree(study / "compact")
    with pytest.warns(load.DamagedPart, match=part.name):
        assert load.table(study, "curves").height == len(others)
    assert tables.main(["compact", str(study)]) == 1
    assert part.name in capsys.readouterr().err
    assert pq.read_table(rundir.compact_file(study, "curves")).to_pylist() == others
    assert tables.main(["verify", str(study), "--quarantine"]) == 1
    assert f"{measured}: the next launch writes its rows again" in capsys.readouterr().err
    assert worker.work(study, measured, Stop()) == "done"
    assert values(study) == values(finished)
    assert tables.main(["verify", str(study)]) == 0


def test_the_row_of_a_trained_run_is_written_again_without_training(finished, study):
    (tokenizer,) = runs(study, "tokenizer")
    part = next(path for path in tables.parts(study, "runs") if tokenizer in str(path))
    empty(part)
    assert tables.main(["verify", str(study), "--quarantine"]) == 1
    assert worker.work(study, tokenizer, Stop()) == "done"
    (row,) = (row for row in rows(study, "runs") if row["run_id"] == tokenizer)
    assert (row["status"], row["steps"]) == ("done", 22)
    assert weights(study, tokenizer, 20) == weights(finished, tokenizer, 20)


def test_a_flipped_byte_in_the_rows_of_a_part_is_noticed(study):
    """Parquet has no checksums unless it is asked for them: a third of such bytes changed values without a word."""
    for table in ("curves", "images"):
        part = max(tables.parts(study, table), key=lambda path: path.stat().st_size)
        whole, held = tables.read(part, table), part.read_bytes()
        pages = len(held) - 8 - int.from_bytes(held[-8:-4], "little")  # then comes the footer
        for place in random.Random(0).sample(range(4, pages), 120):
            hurt = bytearray(held)
            hurt[place] ^= 1
            part.write_bytes(hurt)
            try:
                found = tables.read(part, table)
            except tables.Damaged:
                continue
            assert found.equals(whole), place
        part.write_bytes(held)


def test_a_damaged_compact_table_is_made_again_from_its_parts(study):
    file = rundir.compact_file(study, "curves")
    before = pq.read_table(file)
    for damage in DAMAGES:
        damage(file)
        with pytest.warns(load.DamagedPart, match="curves.parquet"):
            assert load.table(study, "curves").height == before.num_rows
        assert not tables.compact(study)
        assert pq.read_table(file).equals(before)


# --- records ---------------------------------------------------------------------------------------------------------


def without_a_state(path: Path) -> None:
    """As a later version might write it."""
    path.write_text(json.dumps({"version": 9, "phase": "done"}))


@pytest.mark.parametrize("damage", [*DAMAGES, without_a_state])
def test_a_run_with_a_damaged_status_is_looked_at_again_and_not_trained_again(finished, study, damage, capsys):
    (tokenizer,) = runs(study, "tokenizer")
    damage(rundir.status_file(study, tokenizer))
    assert status.main([str(study), "--why", tokenizer]) == 0
    assert "pending" in capsys.readouterr().out
    assert plan.main([str(study / "grid.yaml"), "--results", str(study.parent)]) == 0
    assert not [problem for problem in tables.verify(study) if problem.kind == "damaged"]
    assert worker.work(study, tokenizer, Stop()) == "done"
    held = rundir.status(study, tokenizer)
    assert (held["points"], held["spent"]["steps"]) == (list(POINTS), 0)
    assert weights(study, tokenizer, 20) == weights(finished, tokenizer, 20)


@damaged
def test_a_damaged_config_is_named_and_laid_down_again(study, damage):
    (tokenizer,) = runs(study, "tokenizer")
    whole = rundir.config(study, tokenizer)
    for name in ("config.json", "identity.json"):
        damage(rundir.config_file(study, tokenizer).with_name(name))
    with pytest.raises(ValueError, match=r"config\.json: missing or unreadable; launch or plan the study again"):
        rundir.config(study, tokenizer)
    rundir.register(study, whole)
    assert rundir.config(study, tokenizer) == whole


@damaged
def test_a_journal_that_was_cut_off_goes_on_in_a_line_of_its_own(study, damage, capsys):
    (tokenizer,) = runs(study, "tokenizer")
    damage(rundir.journal_file(study, tokenizer))
    rundir.journal(study, tokenizer, "started", attempt=2, host="node7")
    rundir.journal(study, tokenizer, "ended", attempt=2, state="done")
    assert status.main([str(study), "--why", tokenizer]) == 0
    shown = capsys.readouterr().out
    assert "attempt 2  started  host node7" in shown
    assert "attempt 2  ended  state done" in shown


@damaged
@pytest.mark.parametrize("name", ["plan.lock.json", "plan.parquet"])
def test_a_damaged_plan_is_one_line_for_every_command_and_is_made_again(finished, study, name, damage, capsys):
    (tokenizer,) = runs(study, "tokenizer")
    damage(study / name)
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (launch.main, [str(study), "--stage", "tokenizer"]),
        (status.main, [str(study)]),
        (worker.main, [tokenizer, "--results", str(study)]),
    ]
    if name == "plan.lock.json":
        commands += [(tables.main, [command, str(study)]) for command in ("verify", "compact")]
    for command, arguments in commands:
        assert command(arguments) == 2
        error = capsys.readouterr().err
        assert name in error
        assert error.endswith("plan the study again\n")
        assert error.count("\n") == 1
    assert plan.main([str(study / "grid.yaml"), "--results", str(study.parent)]) == 0
    assert tables.plan(study, ["run_id", "config"]) == tables.plan(finished, ["run_id", "config"])


@damaged
def test_a_damaged_stamp_is_written_again(study, damage):
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    stamp = rundir.stamp_file(study, "tokenizer")
    whole = stamp.read_bytes()
    damage(stamp)
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    assert stamp.read_bytes() == whole


# --- claims ----------------------------------------------------------------------------------------------------------


def waiting(folder: Path) -> tuple[Path, str]:
    """A study that was only planned, and its tokenizer."""
    study = planned(folder)
    (run_id,) = runs(study, "tokenizer")
    return study, run_id


def held_by(study: Path, run_id: str, **changes: object) -> Path:
    """The record of a claim whose holder is somebody else."""
    claim = rundir.claim(study, run_id)
    assert claim is not None
    record = claim.folder / "holder.json"
    record.write_text(json.dumps(json.loads(record.read_bytes()) | changes))
    return record


def age(record: Path) -> None:
    """Let the last sign of life be too old, by the clock of the file system."""
    probe = record.with_name("probe")
    probe.touch()
    os.utime(record, (probe.stat().st_mtime - rundir.STALE_S - 5,) * 2)
    probe.unlink()


def test_a_run_whose_process_died_is_finished_by_the_next_one(finished, tmp_path):
    study, run_id = waiting(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    held_by(study, run_id, pid=gone.pid)
    assert worker.work(study, run_id, Stop()) == "done"
    assert rundir.status(study, run_id)["attempt"] == 2
    assert weights(study, run_id, 20) == weights(finished, run_id, 20)


def test_a_run_of_another_host_is_left_alone_until_it_has_been_silent(finished, tmp_path):
    study, run_id = waiting(tmp_path)
    record = held_by(study, run_id, host="elsewhere", pid=1)
    assert worker.work(study, run_id, Stop()) == "held"
    age(record)
    assert worker.work(study, run_id, Stop()) == "done"
    assert weights(study, run_id, 20) == weights(finished, run_id, 20)


@pytest.mark.parametrize("minutes", [-600, -10, 10, 600])
def test_a_wrong_clock_of_this_host_makes_no_claim_stale_and_none_fresh(tmp_path, minutes, monkeypatch):
    study, run_id = waiting(tmp_path)
    record = held_by(study, run_id, host="elsewhere", pid=1)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 60 * minutes)
    assert rundir.claim(study, run_id) is None
    age(record)
    assert rundir.claim(study, run_id) is not None


def test_a_claim_outlives_the_folder_in_which_files_are_made(tmp_path):
    """A hidden folder of odds and ends looks like something to tidy up."""
    study, run_id = waiting(tmp_path)
    held_by(study, run_id, host="elsewhere", pid=1)
    shutil.rmtree(rundir.staging(study))
    assert rundir.claim(study, run_id) is None


def without(*names: str) -> Callable[[dict[str, Any]], bytes]:
    return lambda held: json.dumps({key: value for key, value in held.items() if key not in names}).encode()


HOLDERS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda held: b"",
    "cut off": lambda held: json.dumps(held).encode()[:20],
    "zeros": lambda held: bytes(80),
    "no text": lambda held: b"\x80\x04\xff",
    "a list": lambda held: b"[]",
    "no host": without("host"),
    "no process": without("pid"),
    "nothing but a version": lambda held: b'{"version": 9}',
    "a process by name": lambda held: json.dumps(held | {"pid": "job 7"}).encode(),
    "a process below one": lambda held: json.dumps(held | {"pid": 0}).encode(),
    "a process beyond all": lambda held: json.dumps(held | {"pid": 2**70}).encode(),
    "hosts": lambda held: json.dumps(held | {"host": ["a", "b"]}).encode(),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_holder_that_cannot_be_told_holds_for_as_long_as_it_gives_signs_of_life(tmp_path, kind, capsys):
    """A record that was cut off, or that another version wrote."""
    study, run_id = waiting(tmp_path)
    record = held_by(study, run_id)
    record.write_bytes(HOLDERS[kind](json.loads(record.read_bytes())))
    assert rundir.claim(study, run_id) is None
    assert worker.work(study, run_id, Stop()) == "held"
    assert status.main([str(study), "--why", run_id]) == 0
    capsys.readouterr()
    age(record)
    assert rundir.claim(study, run_id) is not None


def test_a_holder_without_its_start_is_told_by_its_process(tmp_path):
    study, run_id = waiting(tmp_path)
    record = held_by(study, run_id)
    record.write_bytes(without("born")(json.loads(record.read_bytes())))
    age(record)
    assert rundir.claim(study, run_id) is None  # this process, which lives
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid}))
    assert rundir.claim(study, run_id) is not None


# --- disks -----------------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """A small file system of its own."""

    path: Path

    def mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self.path)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    def fill(self, leave: int = 0) -> None:
        """Let somebody else take all but ``leave`` bytes."""
        held = os.statvfs(self.path)
        (self.path / "ballast").write_bytes(bytes(max(0, held.f_bavail * held.f_frsize - leave)))

    def clear(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    held = Disk(tmp_path / "disk")
    held.path.mkdir()
    if sys.platform != "linux":
        pytest.skip("a tmpfs of a given size takes Linux")
    held.mount("-t", "tmpfs", "-o", "size=64m", "tmpfs")
    try:
        yield held
    finally:
        subprocess.run(["umount", "-l", str(held.path)], check=True)


def whole_files(study: Path) -> None:
    """No file is there that somebody wrote half of."""
    assert hidden(study) == []
    for path in study.rglob("*.json"):
        json.loads(path.read_bytes())
    for path in study.rglob("*.parquet"):
        pq.read_metadata(path)


def footprint(study: Path, run_id: str) -> int:
    """Bytes of disk that a run has taken in the end, in whole pages; on its way it takes more."""
    sizes = [path.stat().st_size for path in study.rglob("*") if path.is_file() and run_id in str(path)]
    return sum(-(-size // 4096) * 4096 for size in sizes)


@pytest.mark.parametrize("eighths", range(8))
def test_wherever_the_disk_fills_the_run_stops_all_others_and_goes_on_to_the_same_bits(
    finished, disk, tmp_path, eighths
):
    study, run_id = waiting(tmp_path)
    study = copied(study, disk.path / "results")
    disk.fill(footprint(finished, run_id) * eighths // 8)
    flag = disk.path / "stop"
    try:
        assert worker.work(study, run_id, Stop(flag)) == "failed"
    except OSError:
        assert rundir.status(study, run_id)["state"] == "planned"  # there was no room for a claim
    else:
        assert flag.exists()
    state = rundir.status(study, run_id)
    if state["state"] == "failed":
        assert failures.kind(state) == "storage", state["reason"]
        (part,) = tables.parts(study, "runs")
        assert tables.read(part, "runs")["reason"].to_pylist() == [state["reason"]]
    holder = rundir.holder(study, run_id)
    assert holder is None or not holder.alive
    whole_files(study)
    disk.clear()
    opened(study, run_id)
    assert worker.work(study, run_id, Stop()) == "done"
    assert [weights(study, run_id, point) for point in POINTS] == [weights(finished, run_id, p) for p in POINTS]
    assert not tables.verify(study)
    assert all(json.loads(line) for line in rundir.journal_file(study, run_id).read_text().splitlines())


@pytest.mark.parametrize("pages", [4, 8, 16])
def test_wherever_the_disk_fills_a_measurement_leaves_nothing_half_written(finished, disk, pages):
    study = copied(finished, disk.path / "results")
    measured = runs(study, "evaluation")[-1]
    rundir.mark(study, measured, "planned")
    shutil.rmtree(rundir.references_folder(study))
    disk.fill(4096 * pages)
    assert worker.work(study, measured, Stop()) == "failed"
    whole_files(study)
    disk.clear()
    opened(study, measured)
    assert worker.work(study, measured, Stop()) == "done"
    assert values(study) == values(finished)


def launched(study: Path) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", "sweep.launch", str(study), "--stage", "tokenizer", "--slots", "2"]
    return subprocess.run(called, cwd=ROOT, text=True, capture_output=True, timeout=300)


@pytest.mark.timeout(600)
def test_a_launch_on_a_disk_that_fills_ends_cleanly_and_the_next_one_finishes(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(test_worker, "GRID", test_worker.GRID.replace("width: 4", "width: 8"))
    undisturbed = planned(tmp_path, seeds="[0, 1, 2]")
    study = copied(undisturbed, disk.path / "results")
    source.snapshot(rundir.code_folder(study))  # as an earlier launch has left it
    for run_id in (wanted := runs(study, "tokenizer")):
        assert worker.work(undisturbed, run_id, Stop()) == "done"
    room = 400_000  # for records, and for no weights
    assert len(weights(undisturbed, wanted[0], 20)) > room
    disk.fill(room)
    ended = launched(study)
    assert ended.returncode in (1, 2), ended.stdout + ended.stderr
    assert "storage: " in ended.stderr
    assert "Traceback" not in ended.stderr
    states = [rundir.status(study, run_id)["state"] for run_id in wanted]
    assert "failed" in states
    assert set(states) <= {"failed", "planned", "cancelled"}
    assert not any(holder and holder.alive for holder in (rundir.holder(study, run_id) for run_id in wanted))
    assert not rundir.stamp_file(study, "tokenizer").exists()
    whole_files(study)
    disk.clear()
    ended = launched(study)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for run_id in wanted:
        assert weights(study, run_id, 20) == weights(undisturbed, run_id, 20)
    assert not tables.verify(study)


def refused(main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command says that the disk is full, or not to be written to."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


FULL = "No space left on device\n"


def test_a_launch_that_cannot_register_its_runs_is_one_line(disk, tmp_path, capsys):
    study, run_id = waiting(tmp_path)
    shutil.rmtree(study / "runs")
    study = copied(study, disk.path / "results")
    disk.fill()
    assert refused(launch.main, [str(study), "--stage", "tokenizer"], capsys).endswith(FULL)
    whole_files(study)
    assert rundir.status(study, run_id)["state"] == "planned"


def test_a_stamp_that_does_not_fit_is_one_line(finished, disk, capsys):
    study = copied(finished, disk.path / "results")
    disk.fill()
    assert refused(launch.main, [str(study), "--stage", "tokenizer"], capsys).endswith(FULL)
    assert not rundir.stamp_file(study, "tokenizer").exists()
    whole_files(study)
    disk.clear()
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0


def test_a_plan_that_does_not_fit_is_one_line_and_the_old_one_holds(disk, tmp_path, capsys):
    study = copied(planned(tmp_path), disk.path / "results")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    planned(tmp_path, seeds="[0, 1]")
    arguments = [str(tmp_path / "grid.yaml"), "--results", str(study.parent)]
    disk.fill()
    assert refused(plan.main, arguments, capsys).endswith(FULL)
    with pytest.raises(ValueError, match=r"No space left on device$"):
        stages.ensure(arguments[0], arguments[2])  # as the workflow plans
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
    assert hidden(study) == []
    assert len(runs(study, "tokenizer")) == 1
    disk.clear()
    assert plan.main(arguments) == 0
    assert len(runs(study, "tokenizer")) == 2


def test_tables_that_cannot_be_compacted_are_one_line_and_the_old_ones_hold(finished, disk, capsys):
    study = copied(finished, disk.path / "results")
    measured = runs(study, "evaluation")[0]
    before = {path: path.read_bytes() for path in (study / "compact").iterdir()}
    again = rundir.part_file(study, "curves", measured, 7, 0)
    part = next(path for path in tables.parts(study, "curves") if measured in str(path))
    tables.write(study, again, tables.read(part, "curves"), run_id=measured)
    disk.fill()
    assert refused(tables.main, ["compact", str(study)], capsys).endswith(FULL)
    assert {path: path.read_bytes() for path in (study / "compact").iterdir()} == before
    whole_files(study)


@pytest.fixture
def frozen(finished: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A copy of the finished study that this process may read and not write.

    One run is held by another host, one is to do, and one part is damaged.
    """
    disk: Disk | None = request.getfixturevalue("disk") if os.geteuid() == 0 else None  # permissions do not bind root
    study = copied(finished, (disk.path if disk else tmp_path) / "results")
    (tokenizer,) = runs(study, "tokenizer")
    rundir.mark(study, tokenizer, "running")
    held_by(study, tokenizer, host="elsewhere", pid=1)
    damaged, to_do = runs(study, "evaluation")[:2]
    cut(next(path for path in tables.parts(study, "curves") if damaged in str(path)))
    rundir.mark(study, to_do, "planned")
    if disk:
        disk.mount("-o", "remount,ro")
        yield study
        return
    folders = [path for path in (study.parent, *study.parent.rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    yield study
    for path in folders:
        path.chmod(0o755)


def test_a_folder_that_cannot_be_written_to_is_read_and_every_writer_says_so_in_one_line(frozen, monkeypatch, capsys):
    monkeypatch.setattr(Stop, "listen", lambda self: None)
    (tokenizer,), (generator,) = runs(frozen, "tokenizer"), runs(frozen, "generator")
    name, results = str(frozen), str(frozen.parent)
    assert status.main([name]) == 0
    assert status.main([name, "--why", tokenizer]) == 0
    shown = capsys.readouterr().out
    assert "held by: process 1 on elsewhere" in shown
    assert ", gone" not in shown
    assert tables.main(["verify", name]) == 1
    with pytest.warns(load.DamagedPart):
        assert load.points(frozen).height > 0
    assert plan.main([str(frozen / "grid.yaml"), "--results", results, "--dry-run"]) == 0
    assert worker.main([generator, "--results", name]) == 0  # it is done already
    capsys.readouterr()
    refusals: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (plan.main, [str(frozen / "grid.yaml"), "--results", f"{results}/new"]),
        (launch.main, [name, "--stage", "generator"]),
        (launch.main, [name, "--stage", "evaluation", "--of", "tokenizer"]),
        (worker.main, [runs(frozen, "evaluation")[1], "--results", name]),
    ]
    for main, arguments in refusals:
        assert results in refused(main, arguments, capsys)
    assert tables.main(["verify", name, "--quarantine"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(("Read-only file system", "Permission denied"))
