"""Does a study on a real Slurm survive what a cluster does to it, with every run done once and to the same bits?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sweep import launch, plan, rundir, tables, worker
from sweep.attempt import Stop
from tests import cluster
from tests.cluster import Cluster

ROOT = Path(launch.__file__).parents[1]
GRID = """
study: tiny
data: {{family: digits, views: 1, views_heldout: 1}}
tokenizer:
  family: vq
  fields: {{width: 4, tokens: 16, codebook: 16, attention: false}}
  steps: {points}
  train: {{batch: 8, lr: 2.0e-3, warmup: 2}}
  seeds: {seeds}
evaluation:
  - {{name: rebuilt, of: tokenizer, extractors: [digits-supervised], points: all, samples: 32}}
run: {{threads: 1, log_every: 5, save_every_s: 0.5, {run}}}
price: {{device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7]}}
"""


def planned(folder: Path, points: str = "[5, 10]", seeds: str = "[0]", run: str = "job_min: 0") -> Path:
    folder.mkdir(exist_ok=True)
    grid = folder / "grid.yaml"
    grid.write_text(GRID.format(points=points, seeds=seeds, run=run))
    result = plan.plan(plan.load(grid), folder / "results")
    plan.write(result)
    return result.study.resolve()


def runs(study: Path, stage: str = "tokenizer") -> list[str]:
    return [row["run_id"] for row in tables.plan(study, ["run_id", "stage"]) if row["stage"] == stage]


def events(study: Path, run_id: str) -> list[dict[str, Any]]:
    path = rundir.journal_file(study, run_id)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def state(study: Path, run_id: str) -> str:
    return str(rundir.status(study, run_id)["state"])


def waited(until: Callable[[], object], seconds: float = 120.0, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)


def trains(study: Path, run_id: str, after: int = 0) -> int:
    """Wait until an attempt later than ``after`` trains; its number."""

    def attempts() -> list[int]:
        return [event["attempt"] for event in events(study, run_id) if event["event"] == "record"]

    waited(lambda: max(attempts(), default=0) > after, what=f"attempt after {after} of {run_id} trains")
    return max(attempts())


def element(study: Path, run_id: str) -> str:
    """The job that has a run."""
    return str(rundir.status(study, run_id)["job"])


class Launcher:
    """A launch in a process of its own."""

    started: ClassVar[list[Launcher]] = []

    def __init__(self, slurm: Cluster, study: Path, *options: str, stage: str = "tokenizer") -> None:
        command = [sys.executable, "-m", "sweep.launch", str(study), "--stage", stage, "--cluster", "slurm"]
        self.process = subprocess.Popen(
            [*command, "--poll-s", "0.5", "--slurm", "gpu=no", *options],
            cwd=ROOT,
            env=os.environ | slurm.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(self)

    def ended(self, seconds: float = 240.0) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output


def cancelled(slurm: Cluster, study: Path, *run_ids: str) -> str:
    command = [sys.executable, "-m", "sweep.launch", str(study), "--cancel", *run_ids]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | slurm.environment(), text=True, capture_output=True, check=True
    ).stdout


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


def final(study: Path, run_id: str, point: int) -> bytes:
    return (rundir.point_file(study, run_id, point).parent / "point.safetensors").read_bytes()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := cluster.missing():
        pytest.skip(f"no Slurm: {why}")
    held = Cluster(tmp_path_factory.mktemp("site"), max_array=11, preempt=True, settings=cluster.ANNOUNCED)
    try:
        held.start()
        yield held
    finally:
        held.stop()


@pytest.fixture
def slurm(site: Cluster) -> Iterator[Cluster]:
    """The cluster, whole again after each test."""
    yield site
    for launcher in Launcher.started:
        launcher.process.kill()
        launcher.process.communicate()
    Launcher.started.clear()
    site.heal()


LONG = "[1500]"  # steps, half a minute of them


@pytest.mark.timeout(600)
def test_a_run_goes_on_after_whatever_ends_its_job(slurm, tmp_path, quiet):
    study = planned(tmp_path, points=LONG)
    (run,) = runs(study)
    launcher = Launcher(slurm, study)

    attempt = trains(study, run)
    job = element(study, run)
    slurm.call("scontrol", "requeue", job)  # an operator puts it back into the queue
    attempt = trains(study, run, attempt)
    assert element(study, run) == job

    slurm.submit("sleep 3", "--partition=urgent", f"--nodelist={slurm.job(job).node}", "--exclusive")  # preempted
    waited(lambda: state(study, run) == "interrupted", what="the run is interrupted")
    assert rundir.status(study, run)["reason"].startswith("preempted: asked to stop at step ")
    attempt = trains(study, run, attempt)
    assert element(study, run) == job

    os.kill(rundir.status(study, run)["pid"], signal.SIGKILL)  # the process at work dies: its parent starts another
    attempt = trains(study, run, attempt)
    assert element(study, run) == job
    assert rundir.status(study, run)["retries"] == {"lost": 1}

    node = slurm.job(job).node
    slurm.down(node)  # Slurm requeues by itself
    attempt = trains(study, run, attempt)

    slurm.kill("slurmctld")  # the controller dies and comes back; jobs do not notice
    time.sleep(2)
    slurm.restart("slurmctld")

    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 1500) == quiet(study, run, 1500)
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_a_process_that_slurm_has_lost_fences_itself_off(slurm, tmp_path, quiet):
    study = planned(tmp_path, points=LONG)
    (run,) = runs(study)
    launcher = Launcher(slurm, study)
    attempt = trains(study, run)
    pid, node = rundir.status(study, run)["pid"], slurm.job(element(study, run)).node
    os.kill(pid, signal.SIGSTOP)  # as one that hangs on a file system
    slurm.kill(node)  # with the step left alive: Slurm starts the job elsewhere
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
def test_a_time_limit_is_an_interruption(slurm, tmp_path, quiet):
    study = planned(tmp_path, points="[2500]")
    (run,) = runs(study)
    launcher = Launcher(slurm, study, "time_min=1", "signal_s=45")
    waited(lambda: state(study, run) == "interrupted", what="the limit comes near")
    assert rundir.status(study, run)["reason"].startswith("timeout: asked to stop at step ")
    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 2500) == quiet(study, run, 2500)


@pytest.mark.timeout(600)
def test_a_job_that_may_not_be_requeued_hands_over_to_the_next_of_its_array(slurm, tmp_path, quiet):
    study = planned(tmp_path, points=LONG)
    (run,) = runs(study)
    launcher = Launcher(slurm, study, "requeue=no")
    attempt = trains(study, run)
    job = element(study, run)
    slurm.submit("sleep 3", "--partition=urgent", f"--nodelist={slurm.job(job).node}", "--exclusive")
    waited(lambda: state(study, run) == "interrupted", what="the run is interrupted")
    trains(study, run, attempt)
    assert element(study, run) == f"{job.partition('_')[0]}_1"
    code, output = launcher.ended()
    assert code == 0, output
    assert final(study, run, 1500) == quiet(study, run, 1500)


@pytest.mark.timeout(600)
def test_who_cancels_a_job_or_a_run_means_it(slurm, tmp_path):
    study = planned(tmp_path, points="[20000]", seeds="[0, 1]")
    first, second = runs(study)
    launcher = Launcher(slurm, study)
    trains(study, first)
    trains(study, second)
    slurm.call("scancel", element(study, first))
    assert "1 runs were asked to save and stop" in cancelled(slurm, study, second)
    code, output = launcher.ended()
    assert code == 130, output
    assert "2 cancelled" in output
    assert rundir.status(study, second)["reason"].startswith("asked to stop at step ")
    again = Launcher(slurm, study)  # to launch is to ask for it
    trains(study, first, 1)
    trains(study, second, 1)
    cancelled(slurm, study)
    assert again.ended()[0] == 130
    waited(lambda: all(job.state in cluster.ENDED for job in slurm.jobs()), what="all jobs end")


@pytest.mark.timeout(600)
def test_launchers_come_and_go_and_every_run_is_started_once(slurm, tmp_path):
    study = planned(tmp_path, seeds=str(list(range(25))))  # arrays have 11 tasks at most here
    first = Launcher(slurm, study, "parallel=6", "--detach")
    assert first.ended()[0] == 0
    sizes: dict[str, int] = {}
    for job in slurm.jobs():
        sizes[job.array] = sizes.get(job.array, 0) + 1
    assert sorted(sizes.values()) == [1, 11, 11]  # a canary of three runs
    assert state(study, runs(study)[0]) == "planned"
    for moment in (0.3, 1.0, 2.5):
        killed = Launcher(slurm, study, "parallel=6")
        time.sleep(moment)
        killed.process.kill()
        killed.ended()
    both = [Launcher(slurm, study), Launcher(slurm, study)]
    for launcher in both:
        code, output = launcher.ended(480)
        assert code == 0, output
        assert "25 of 25 runs done" in output
    for run in runs(study):
        assert [event["event"] for event in events(study, run)].count("started") == 1
    assert {job.array for job in slurm.jobs()} <= set(sizes)  # nothing was handed over again
    assert not tables.verify(study)


@pytest.mark.timeout(600)
def test_the_first_runs_that_fail_alike_spare_the_others(slurm, tmp_path):
    study = planned(tmp_path, seeds=str(list(range(8))))
    patched = tmp_path / "patched"
    patched.mkdir()
    broken = (
        "from models import training\ndef train(*_, **__): raise ZeroDivisionError('always')\ntraining.train = train"
    )
    (patched / "sitecustomize.py").write_text(broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(patched))
        launcher = Launcher(slurm, study)
        code, output = launcher.ended()
    assert code == 1, output
    assert "stopped (the first 3 runs failed alike, code: ZeroDivisionError: always)" in output
    assert sorted(state(study, run) for run in runs(study)) == ["failed"] * 3 + ["planned"] * 5
    waited(lambda: all(job.state in cluster.ENDED for job in slurm.jobs()), what="the others leave the queue")
    assert "COMPLETED" not in {job.state for job in slurm.jobs()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_run_on_two_devices_is_two_tasks_that_stop_and_go_on_together(slurm, tmp_path, shard):
    study = planned(tmp_path, points=LONG, run=f"devices: 2, shard: {shard}")
    (run,) = runs(study)
    launcher = Launcher(slurm, study)
    attempt = trains(study, run)
    assert slurm.call("squeue", "-h", "-o", "%C").split() == ["2"]
    slurm.call("scontrol", "requeue", element(study, run))
    attempt = trains(study, run, attempt)
    node = slurm.job(element(study, run)).node
    slurm.submit("sleep 3", "--partition=urgent", f"--nodelist={node}", "--exclusive")
    waited(lambda: state(study, run) == "interrupted", what="the run is interrupted")
    code, output = launcher.ended()
    assert code == 0, output
    *before, last = [row["status"] for row in rows(study, "runs")]  # with the operator's, who is as good as a warning
    assert (set(before), last) == ({"interrupted"}, "done")
    assert not tables.verify(study)


def rows(study: Path, table: str) -> list[dict[str, Any]]:
    return [row for part in tables.parts(study, table) for row in tables.read(part, table).to_pylist()]


@pytest.mark.timeout(600)
def test_short_runs_share_a_job_one_after_the_other_and_side_by_side(slurm, tmp_path):
    study = planned(tmp_path, seeds="[0, 1, 2, 3]", run="job_min: 60, pack: 2")
    launcher = Launcher(slurm, study)
    code, output = launcher.ended()
    assert code == 0, output
    statuses = [rundir.status(study, run) for run in runs(study)]
    assert len({status["job"] for status in statuses}) == 1
    assert len({status["pid"] for status in statuses}) == 2
    assert len(rows(study, "runs")) == 4
    assert {row["status"] for row in rows(study, "runs")} == {"done"}


@pytest.mark.timeout(600)
def test_a_rank_that_does_not_fit_its_device_is_no_hang_and_has_its_retry(slurm, tmp_path):
    study = planned(tmp_path, run="devices: 2")
    (run,) = runs(study)
    patched = tmp_path / "patched"
    patched.mkdir()
    text = """
import os
from models import training
trained = training.train
def train(*given, runtime, **more):
    import torch
    if os.environ.get("SLURM_PROCID") == "1" and (runtime.micro_batch or 4) > 2:
        raise torch.OutOfMemoryError("out of memory")
    return trained(*given, runtime=runtime, **more)
training.train = train
"""
    (patched / "sitecustomize.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(patched))
        launcher = Launcher(slurm, study)
        code, output = launcher.ended()
    assert code == 0, output
    assert rundir.status(study, run)["micro_batch"] == 2
    (retry,) = (event for event in events(study, run) if event["event"] == "retry")
    assert retry["reason"] == "oom_gpu: OutOfMemoryError: out of memory (rank 1)"
