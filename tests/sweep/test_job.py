"""Does a task of a job know why it has to end, and end as its runs did?"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sweep import job, rundir, slurm
from sweep.batches import Batch

RUN = "t0123456789ab"


def task(folder: Path, minutes: int = 5, **changes: Any) -> job.Task:
    """A task of a batch with one run; its job started when the process did."""
    batch = Batch(
        folder=folder / ".submitit" / "launch" / "bucket" / "0000",
        name="sweep-x-tokenizer-0",
        packs=[[[RUN]]],
        tasks=1,
        serial=False,
        request={"time_min": minutes, "signal_s": 90, "pack": 1, "parallel": 1},
        alike=True,
        launcher=rundir.myself(),
        created=time.time(),
        job="7",
    )
    for name, value in changes.items():
        setattr(batch, name, value)
    return job.Task(folder, batch, 0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rundir.START, "")  # a task sets it: taken back after the test


def heard(held: job.Task, number: int = signal.SIGUSR2) -> job.Task:
    held._signalled(number, None)
    return held


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What scontrol says of the job; nothing until a test says so."""
    answer: dict[str, str] = {}
    monkeypatch.setattr(slurm, "told", lambda element: answer)
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(int(time.time())))
    return answer


@pytest.mark.parametrize(
    ("minutes", "elapsed_s", "kind"),
    [
        (5, 3, "preempted"),  # the case in which submitit counts every signal as a timeout
        (5, 140, "preempted"),
        (5, 155, "timeout"),  # 90 s before the end, and up to 60 s earlier
        (600, 3600, "preempted"),
        (600, 600 * 60 - 91, "timeout"),
        (1, 20, "timeout"),
    ],
)
def test_the_clock_tells_a_time_limit_from_a_preemption(tmp_path, said, monkeypatch, minutes, elapsed_s, kind):
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(time.time() - elapsed_s))
    assert heard(task(tmp_path, minutes)).kind == kind


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"JobState": "RUNNING", "PreemptTime": "2026-11-25T10:00:00"}, "preempted"),
        ({"JobState": "COMPLETING", "PreemptTime": "None"}, "ended"),
        ({"JobState": "CANCELLED", "PreemptTime": "None"}, "ended"),
        ({"JobState": "RUNNING", "PreemptTime": "None"}, "timeout"),
    ],
)
def test_what_slurm_says_counts_before_the_clock(tmp_path, said, monkeypatch, answer, kind):
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(time.time() - 290))
    said |= answer
    assert heard(task(tmp_path)).kind == kind


def test_processes_at_work_hear_of_it_once_and_why(tmp_path, said):
    held = task(tmp_path)
    held.mind()
    assert not held.flag.exists()
    heard(held, signal.SIGTERM)
    heard(held, signal.SIGUSR2)
    assert held.heard == signal.SIGTERM  # the first
    held.mind()
    stop = held.stop()
    assert stop()
    assert stop.kind == "preempted"
    held.flag.write_text("timeout")
    held.mind()
    assert held.flag.read_text() == "timeout"  # is not written again


def test_what_an_earlier_start_of_the_job_has_left_is_not_heard(tmp_path, said, monkeypatch):
    monkeypatch.setenv("SLURM_SRUN_COMM_PORT", "46181")
    earlier = heard(task(tmp_path))
    earlier.mind()
    assert earlier.stop()()
    assert task(tmp_path).scratch == earlier.scratch  # another rank of the same start
    monkeypatch.setenv("SLURM_SRUN_COMM_PORT", "39017")  # started anew by a controller that did not count
    assert not task(tmp_path).stop()()


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Jobs that were put back into the queue, and which nodes they avoid."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(slurm, "requeue", lambda element, without: calls.append((element, without)))
    return calls


@pytest.mark.parametrize(
    ("state", "fields", "signalled", "left", "again"),
    [
        ("done", {}, True, False, []),
        ("failed", {"reason": "code: x"}, True, False, []),
        ("cancelled", {}, True, False, []),
        ("interrupted", {"reason": "preempted: x"}, True, False, [("7", [])]),
        ("planned", {"reason": "once more after comms: x"}, False, True, [("7", [])]),
        ("planned", {"reason": "once more after node: x", "exclude": ["n2"]}, False, True, [("7", ["n2"])]),
        ("planned", {"reason": "once more after oom_host: x"}, False, True, []),  # it takes a job with more memory
        ("planned", {}, False, False, []),
    ],
)
def test_a_job_goes_back_into_the_queue_where_its_runs_go_on_in_it(
    tmp_path, said, requeued, state, fields, signalled, left, again
):
    held = heard(task(tmp_path)) if signalled else task(tmp_path)
    rundir.mark(tmp_path, RUN, state, **fields)
    assert held.conclude(left) == (0 if state == "done" else 1)  # so that Slurm calls nothing else COMPLETED
    assert requeued == again


@pytest.mark.parametrize("change", [{"serial": True}, {"flag": "launch/stop"}, {"flag": "launch/bucket/stop"}])
def test_a_job_stays_out_of_the_queue_where_another_goes_on_or_nobody_wants_it(tmp_path, said, requeued, change):
    held = heard(task(tmp_path, serial=change.get("serial", False)))
    if "flag" in change:
        flag = tmp_path / ".submitit" / change["flag"]
        flag.parent.mkdir(parents=True)
        flag.touch()
    rundir.mark(tmp_path, RUN, "interrupted", "preempted: x")
    assert held.conclude(False) == 1
    assert not requeued


def test_a_task_of_a_stopped_bucket_does_nothing(tmp_path, capsys):
    flag = tmp_path / ".submitit" / "launch" / "bucket" / "stop"
    flag.parent.mkdir(parents=True)
    flag.touch()
    assert task(tmp_path).run() == 1
    assert "stopped before it began" in capsys.readouterr().out
    assert not (rundir.run_folder(tmp_path, RUN) / "claim").exists()


@pytest.mark.parametrize(
    ("held", "mine", "taken"),
    [
        ({"job": "7", "restart": 0, "start": "a"}, ("7", "1", "b"), True),  # Slurm has started the job again
        ({"job": "7", "restart": 0, "start": "a"}, ("7", "0", "b"), True),  # and did not count
        ({"job": "7", "restart": 0, "start": "a"}, ("7", "0", "a"), False),  # another process of the same crew
        ({"job": "7", "restart": 1, "start": "b"}, ("7", "0", "a"), False),  # the one that was lost
        ({"job": "8", "restart": 0, "start": "c"}, ("7", "1", "b"), False),
    ],
)
def test_a_job_that_starts_again_has_its_runs_at_once(tmp_path, monkeypatch, held, mine, taken):

    old = rundir.claim(tmp_path, RUN)
    assert old is not None
    record = old.folder / "holder.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"host": "elsewhere", "pid": 1, "node": "n1"} | held))
    job_id, restart, start = mine
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    monkeypatch.setenv(rundir.START, start)
    assert (rundir.claim(tmp_path, RUN) is not None) == taken
