"""Can two processes ever own one run, and can a reader ever see half a file?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sweep import rundir

RUN = "g0123456789ab"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "digits"


def hold(study: Path, **changes: object) -> rundir.Claim:
    """A claim whose recorded holder is another process."""
    claim = rundir.claim(study, RUN)
    assert claim is not None
    record = claim.folder / "holder.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    return claim


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


# --- claims ------------------------------------------------------------------------------------------------------


def test_a_held_run_is_not_given_out_and_a_released_one_is(study):
    first = rundir.claim(study, RUN)
    assert first is not None
    assert first.attempt == 1
    assert rundir.claim(study, RUN) is None
    first.release()
    second = rundir.claim(study, RUN)
    assert second is not None
    assert second.attempt == 2


RACER = """
import sys, time
from pathlib import Path
from sweep import rundir
study, go = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
while not go.exists():
    pass
claim = rundir.claim(study, "g0123456789ab")
print(claim.attempt if claim else 0, flush=True)
sys.stdin.read()  # a holder that ended would be a dead one
"""


def test_of_many_racing_processes_one_gets_the_run(study, tmp_path):
    root = Path(rundir.__file__).parents[1]
    for attempt in (1, 2):
        go = tmp_path / f"go-{attempt}"
        command = [sys.executable, "-c", RACER, str(study), str(go)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
        racers = [subprocess.Popen(command, **pipes) for _ in range(4)]
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        go.touch()
        won = [int(racer.stdout.readline()) for racer in racers]
        for racer in racers:
            racer.communicate()
        assert sorted(won) == [0, 0, 0, attempt]  # the second round takes over from a dead process


@pytest.mark.parametrize("changes", [{"pid": "dead"}, {"born": 1}])
def test_a_run_of_a_dead_process_is_taken_over_and_fenced(study, changes):
    changes = {key: dead_pid() if value == "dead" else value for key, value in changes.items()}
    old = hold(study, **changes)
    held = rundir.holder(study, RUN)
    assert held is not None
    assert not held.alive
    new = rundir.claim(study, RUN)
    assert new is not None
    assert new.attempt == old.attempt + 1
    new.guard()
    with pytest.raises(rundir.Superseded, match="attempt 1 was superseded by attempt 2"):
        old.guard()
    with pytest.raises(rundir.Superseded):
        old.update(state="done")
    assert rundir.status(study, RUN)["state"] == "planned"


def test_another_machines_claim_is_stale_only_without_a_sign_of_life(study):
    claim = hold(study, host="elsewhere", pid=1)
    assert rundir.claim(study, RUN) is None
    long_ago = time.time() - rundir.STALE_S - 1
    os.utime(claim.folder / "holder.json", (long_ago, long_ago))
    claim.beat()
    assert rundir.claim(study, RUN) is None
    os.utime(claim.folder / "holder.json", (long_ago, long_ago))
    assert rundir.claim(study, RUN) is not None


def test_an_own_process_lives_however_old_its_sign_of_life(study):
    claim = rundir.claim(study, RUN)
    assert claim is not None
    os.utime(claim.folder / "holder.json", (0, 0))
    assert rundir.claim(study, RUN) is None


def test_a_superseded_attempt_may_release_without_harm(study):
    old = hold(study, pid=dead_pid())
    new = rundir.claim(study, RUN)
    old.release()
    assert new is not None
    new.guard()
    assert rundir.claim(study, RUN) is None


def test_only_a_living_holder_can_be_asked_to_stop(study):
    assert not rundir.cancel(study, RUN)
    claim = rundir.claim(study, RUN)
    assert claim is not None
    assert not claim.cancelled()
    assert rundir.cancel(study, RUN)
    assert claim.cancelled()
    claim.release()
    assert not rundir.cancel(study, RUN)
    after = rundir.claim(study, RUN)
    assert after is not None
    assert not after.cancelled()


# --- files -------------------------------------------------------------------------------------------------------


def test_a_reader_sees_whole_files_only(study):
    path = study / "runs" / RUN / "status.json"
    rundir.atomic_write(study, path, {"a": "x" * 1000})
    over = threading.Event()
    torn: list[bytes] = []

    def read() -> None:
        while not over.is_set():
            held = path.read_bytes()
            if not held.endswith(b"}"):
                torn.append(held)

    reader = threading.Thread(target=read)
    reader.start()
    for size in range(200):
        rundir.atomic_write(study, path, {"a": "y" * size * 50}, sync=False)
    over.set()
    reader.join()
    assert not torn
    assert not list(rundir.staging(study).iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(study):
    path = study / "plan.lock.json"
    rundir.atomic_write(study, path, {"version": 1})
    path.with_name("folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 (which one is the system's choice)
        rundir.atomic_write(study, path.with_name("folder"), b"x")
    with pytest.raises(TypeError):
        rundir.atomic_write(study, path, {"version": object()})
    assert json.loads(path.read_text()) == {"version": 1}
    assert not list(rundir.staging(study).iterdir())


def test_status_survives_a_torn_file(study):
    claim = rundir.claim(study, RUN)
    assert claim is not None
    claim.update(state="running", step=3)
    claim.update(step=4)
    assert rundir.status(study, RUN).items() >= {"state": "running", "step": 4, "attempt": 1}.items()
    rundir.status_file(study, RUN).write_text('{"state": "don')
    assert rundir.status(study, RUN)["state"] == "planned"


def test_an_extended_run_is_unfinished_again(study):
    done = {"run_id": RUN, "state": "done", "points": [100, 200]}
    codes = rundir.codes_folder(study, f"{RUN}@200", "0" * 64)
    rundir.atomic_write(study, codes / "manifest.json", {})
    rundir.atomic_write(study, rundir.codes_folder(study, f"{RUN}@100", "0" * 64) / "train.npy", b"")  # half a cache
    assert rundir.encoded(study, RUN) == {200}
    assert rundir.finished(study, done, [100], [])
    assert rundir.finished(study, done, [100, 200], [200])
    assert rundir.finished(study, {"state": "done"}, None, None)
    assert not rundir.finished(study, done, [100, 200, 400], [200])
    assert not rundir.finished(study, done, [100, 200], [100, 200])
    assert rundir.finished(study, {"state": "diverged"}, [100], [])
    assert not rundir.finished(study, {"state": "cancelled"}, [], [])
    (codes / "manifest.json").unlink()  # codes can be made again, so they may be deleted
    assert not rundir.finished(study, done, [100, 200], [200])


def test_the_journal_appends_one_json_object_per_line(study):
    rundir.journal(study, RUN, "started", attempt=1)
    rundir.journal(study, RUN, "record", loss=0.5)
    lines = [json.loads(line) for line in rundir.journal_file(study, RUN).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "record"]
    assert all(line["time"].endswith("+00:00") for line in lines)


@pytest.mark.parametrize(
    "name", ["../../etc", "g0123456789ab/..", "g0123456789AB", "0123456789abc", "g0123", "g0123456789ab\n"]
)
def test_a_run_id_cannot_leave_the_study(study, name):
    with pytest.raises(ValueError, match=r"run id: .* allowed: one letter and 12 hexadecimal digits"):
        rundir.run_folder(study, name)


def test_a_folder_of_another_version_is_refused_in_one_line(study):
    rundir.atomic_write(study, rundir.lock_file(study), {"version": 99})
    with pytest.raises(ValueError, match=r"plan.lock.json: version: got 99; allowed: 1$"):
        rundir.check_version(study, 1)
    rundir.lock_file(study).write_text("{")
    with pytest.raises(ValueError, match="version cannot be read"):
        rundir.check_version(study, 1)


def test_a_study_is_found_by_path_and_by_name(study, monkeypatch):
    study.mkdir()
    (study / "plan.parquet").touch()
    assert rundir.find(study) == study
    assert rundir.find("digits", study.parent) == study
    monkeypatch.chdir(study)
    assert rundir.find(".").name == "digits"
    with pytest.raises(ValueError, match=r"study: 'nothing' holds no plan\.parquet"):
        rundir.find("nothing")
