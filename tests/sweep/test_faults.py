"""Does a study on a real Slurm survive what a cluster does to it, with every run done once and to the same bits?"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep import rundir, tables, worker
from sweep.attempt import Stop
from tests import cluster
from tests.faults import (
    LONG,
    Launcher,
    cancelled,
    element,
    events,
    final,
    planned,
    preempts,
    rows,
    runs,
    state,
    trains,
    waited,
)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str, int], bytes]:
    """Weights of a run that nothing disturbed, trained here."""
    held: dict[tuple[str, int], bytes] = {}

    def weights(study: Path, run_id: str, point: int) -> bytes:
        if (run_id, point) not in held:
            folder = tmp_path_factory.mktemp("quiet")
            rundir.register(folder, rundir.config(study, run_id))
            assert worker.work(folder, run_id, Stop()) == "done"
            held[run_id, point] = final(folder, run_id, point)
        return held[run_id, point]

    return weights


@pytest.mark.timeout(600)
def test_a_run_goes_on_after_whatever_ends_its_job(stormy, tmp_path, quiet):
    stormy.reconfigure(**cluster.ANNOUNCED)  # preemption sends what a job has asked for; elsewhere in this file SIGTERM
    study = planned(tmp_path, points=LONG)
    (run,) = runs(study)
    launcher = Launcher(stormy, study)

    attempt = trains(study, run)
    job = element(study, run)
    stormy.call("scontrol", "requeue", job)  # an operator puts it back into the queue
    attempt = trains(study, run, attempt)
    assert element(study, run) == job

    preempts(stormy, study, run)
    attempt = trains(study, run, attempt)
    assert element(study, run) == job

    os.kill(rundir.status(study, run)["pid"], signal.SIGKILL)  # the process at work dies: its parent starts another
    attempt = trains(study, run, attempt)
    assert element(study, run) == job
    assert rundir.status(study, run)["retries"] == {"lost": 1}

    node = stormy.job(job).node
    stormy.down(node)  # Slurm requeues by itself
    attempt = trains(study, run, attempt)

    stormy.save()
    stormy.kill("slurmctld")  # the controller dies and comes back; jobs do not notice
    time.sleep(2)
    stormy.restart("slurmctld")

    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 1500) == quiet(study, run, 1500)
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_a_process_that_slurm_has_lost_fences_itself_off(stormy, tmp_path, quiet):
    study = planned(tmp_path, points=LONG)
    (run,) = runs(study)
    launcher = Launcher(stormy, study)
    attempt = trains(study, run)
    pid, node = rundir.status(study, run)["pid"], stormy.job(element(study, run)).node
    os.kill(pid, signal.SIGSTOP)  # as one that hangs on a file system
    stormy.kill(node)  # with the step left alive: Slurm starts the job elsewhere
    trains(study, run, attempt)
    os.kill(pid, signal.SIGCONT)
    waited(lambda: not rundir.alive(rundir.myself()["host"], pid, None), what="the lost process ends")
    assert "attempt 1 was superseded by attempt 2" in rundir.log_file(study, run).read_text()
    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 1500) == quiet(study, run, 1500)
    ended = [event for event in events(study, run) if event["event"] == "ended"]
    assert [event["attempt"] for event in ended] == [2]


@pytest.mark.timeout(600)
def test_a_time_limit_is_an_interruption(stormy, tmp_path, quiet):
    study = planned(tmp_path, points="[2500]")
    (run,) = runs(study)
    launcher = Launcher(stormy, study, "time_min=1", "signal_s=45")
    waited(lambda: state(study, run) == "interrupted", what="the limit comes near")
    assert rundir.status(study, run)["reason"].startswith("timeout: asked to stop at step ")
    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 2500) == quiet(study, run, 2500)


@pytest.mark.timeout(600)
def test_a_job_that_may_not_be_requeued_hands_over_to_the_next_of_its_array(stormy, tmp_path, quiet):
    study = planned(tmp_path, points=LONG)
    (run,) = runs(study)
    launcher = Launcher(stormy, study, "requeue=no")
    attempt = trains(study, run)
    job = element(study, run)
    preempts(stormy, study, run)
    trains(study, run, attempt)
    assert element(study, run) == f"{job.partition('_')[0]}_1"
    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 1500) == quiet(study, run, 1500)


@pytest.mark.timeout(600)
def test_who_cancels_a_job_or_a_run_means_it(stormy, tmp_path):
    study = planned(tmp_path, points="[20000]", seeds="[0, 1]")
    first, second = runs(study)
    launcher = Launcher(stormy, study)
    trains(study, first)
    trains(study, second)
    stormy.call("scancel", element(study, first))
    assert "1 runs were asked to save and stop" in cancelled(stormy, study, second)
    code, output = launcher.ended()
    assert code == 130, output
    assert "2 cancelled" in output
    assert rundir.status(study, second)["reason"].startswith("asked to stop at step ")
    again = Launcher(stormy, study)  # to launch is to ask for it
    trains(study, first, 1)
    trains(study, second, 1)
    cancelled(stormy, study)
    assert again.ended()[0] == 130
    waited(lambda: all(job.state in cluster.ENDED for job in stormy.jobs()), what="all jobs end")


@pytest.mark.timeout(600)
def test_launchers_come_and_go_and_every_run_is_started_once(stormy, tmp_path):
    stormy.reconfigure(MaxArraySize=11)
    before = {job.array for job in stormy.jobs()}
    study = planned(tmp_path, seeds=str(list(range(25))))  # arrays have 11 tasks at most here
    first = Launcher(stormy, study, "parallel=6", "--detach")
    assert first.ended()[0] == 0
    sizes: dict[str, int] = {}
    for array in (job.array for job in stormy.jobs() if job.array not in before):
        sizes[array] = sizes.get(array, 0) + 1
    assert sorted(sizes.values()) == [1, 11, 11]  # a canary of three runs
    assert state(study, runs(study)[0]) == "planned"
    for moment in (0.3, 1.0, 2.5):
        killed = Launcher(stormy, study, "parallel=6")
        time.sleep(moment)
        killed.process.kill()
        killed.ended()
    both = [Launcher(stormy, study), Launcher(stormy, study)]
    for launcher in both:
        code, output = launcher.ended(480)
        assert code == 0, output
        assert "25 of 25 runs done" in output
    for run in runs(study):
        assert [event["event"] for event in events(study, run)].count("started") == 1
    assert {job.array for job in stormy.jobs()} <= before | set(sizes)  # nothing was handed over again
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_the_first_runs_that_fail_alike_spare_the_others(stormy, tmp_path):
    before = {job.array for job in stormy.jobs()}
    study = planned(tmp_path, seeds=str(list(range(8))))
    patched = tmp_path / "patched"
    patched.mkdir()
    broken = (
        "from models import training\ndef train(*_, **__): raise ZeroDivisionError('always')\ntraining.train = train"
    )
    (patched / "sitecustomize.py").write_text(broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(patched))
        launcher = Launcher(stormy, study)
        code, output = launcher.ended()
    assert code == 1, output
    assert "stopped (the first 3 runs failed alike, code: ZeroDivisionError: always)" in output
    assert sorted(state(study, run) for run in runs(study)) == ["failed"] * 3 + ["planned"] * 5
    waited(lambda: all(job.state in cluster.ENDED for job in stormy.jobs()), what="the others leave the queue")
    assert "COMPLETED" not in {job.state for job in stormy.jobs() if job.array not in before}


@pytest.mark.timeout(600)
def test_short_runs_share_a_job_one_after_the_other_and_side_by_side(stormy, tmp_path):
    study = planned(tmp_path, seeds="[0, 1, 2, 3]", run="job_min: 60, pack: 2")
    launcher = Launcher(stormy, study)
    code, output = launcher.ended()
    assert code == 0, output
    statuses = [rundir.status(study, run) for run in runs(study)]
    assert len({status["job"] for status in statuses}) == 1
    assert len({status["pid"] for status in statuses}) == 2
    assert len(rows(study, "runs")) == 4
    assert {row["status"] for row in rows(study, "runs")} == {"done"}
