"""Does the cluster that tests break behave as Slurm does, and which words and signals does Slurm use?"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sweep import slurm
from tests import cluster
from tests.cluster import Cluster, until
from tests.conftest import running

LISTEN = """\
say() { echo "$1 ${SLURM_RESTART_COUNT:-first} $EPOCHREALTIME" >> "$0.said"; }
for name in CONT TERM USR2; do trap "say $name" $name; done
say started
while :; do sleep 0.1; done
"""


class Listener:
    """A shell script that notes which signals reach it, and when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text(LISTEN)

    def said(self) -> list[tuple[str, str, float]]:
        """Signal, restarts of the job so far ("first": none), time; in order."""
        path = self.path.with_name(f"{self.path.name}.said")
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(name, restarts, float(when)) for name, restarts, when in lines]

    def heard(self, restarts: str = "first") -> dict[str, float]:
        return {name: when for name, held, when in self.said() if held == restarts}


def listening(held: Cluster, folder: Path, name: str, *options: str, step: bool = True) -> tuple[str, list[Listener]]:
    """A job on n1 whose script listens, and a step of it; it runs when this returns."""
    batch, inner = Listener(folder / f"{name}-batch"), Listener(folder / f"{name}-step")
    first = f"srun bash {inner.path} &\n" if step else ""
    job = held.submit(f"{first}exec bash {batch.path}", "--nodelist=n1", *options)
    listeners = [batch, inner] if step else [batch]
    until(lambda: all(each.heard() for each in listeners), f"{name} listens")
    return job, listeners


# --- accounting ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(Cluster(tmp_path_factory.mktemp("accounted"), accounting=True))


@pytest.fixture(scope="module")
def overdue(accounted: Cluster) -> str:
    """A job beyond its time limit, early in this file: Slurm looks at limits every 30 s."""
    job = accounted.submit("sleep 300")
    accounted.wait(job, "RUNNING")
    accounted.call("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    return job


def told(held: Cluster, *options: str) -> list[list[str]]:
    said = held.call("sacct", "-X", "-n", "-P", *options, "-o", "JobID,State,ExitCode")
    return [line.split("|") for line in said.splitlines()]


@pytest.mark.usefixtures("overdue")
def test_accounting_tells_how_jobs_have_ended(accounted, monkeypatch):
    jobs = {
        "COMPLETED": accounted.submit("true"),
        "FAILED": accounted.submit("exit 3"),
        "CANCELLED by 0": accounted.submit("sleep 300"),
        "NODE_FAIL": accounted.submit("sleep 300", "--nodelist=n3", "--no-requeue"),
        "REQUEUED": accounted.submit("sleep 300"),
    }
    for state in ("CANCELLED by 0", "NODE_FAIL", "REQUEUED"):
        accounted.wait(jobs[state], "RUNNING")
    accounted.call("scancel", jobs["CANCELLED by 0"])
    accounted.down("n3")
    accounted.call("scontrol", "requeue", jobs["REQUEUED"])

    def ends() -> set[tuple[str, str]]:  # -D: of every attempt
        return {(job, state) for job, state, _ in told(accounted, "-D")}

    # seconds late; until then there may be no row at all
    until(lambda: {(job, state) for state, job in jobs.items()} <= ends(), "sacct knows all")
    assert told(accounted, "-j", jobs["FAILED"]) == [[jobs["FAILED"], "FAILED", "3:0"]]
    assert told(accounted, "-j", "99999") == []
    for name, value in accounted.environment().items():
        monkeypatch.setenv(name, value)
    array = accounted.submit("exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    until(lambda: len(slurm.accounted([array])) == 2, "sacct knows the array")
    assert slurm.accounted([array, jobs["CANCELLED by 0"], "99999"]) == {
        (array, 0): "COMPLETED",
        (array, 1): "FAILED",
        (jobs["CANCELLED by 0"], None): "CANCELLED",
    }


# --- the fixture itself ----------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_nothing_outlives_a_cluster(tmp_path):
    held = Cluster(tmp_path, nodes=1)
    pids: list[int] = []
    for _ in running(held):
        job = held.submit("trap '' TERM\nsetsid sleep 300 &\nenv -i sleep 300 &\nsleep 300\nsleep 300")
        until(lambda job=job: len(held.steps(job)) == 4, "the job runs")
        pids += held.steps(job)
        pids += [process.pid for process in held.daemons.values()]
        held.kill("n1", noticed=False)
        assert all(alive(pid) for pid in held.steps(job))
    assert not [pid for pid in pids if alive(pid)]


def test_a_process_of_a_job_can_be_killed(fragile):
    job = fragile.submit("sleep 300; exit 9")
    fragile.wait(job, "RUNNING")
    until(lambda: len(fragile.steps(job)) == 2, "shell and sleep run")
    os.kill(fragile.steps(job)[-1], 9)
    assert fragile.wait(job, "FAILED").reason == "NonZeroExitCode"
    assert fragile.steps(job) == []


def test_munged_can_be_killed_and_restarted(fragile):
    job = fragile.submit("sleep 300")
    fragile.kill("munged")
    fragile.restart("munged")
    assert fragile.wait(job, "RUNNING").node == "n1"


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--array=1001"], "Batch job submission failed: Invalid job array specification"),
        (["--partition=none"], "invalid partition specified: none"),
        (["--gres=gpu:3"], "Batch job submission failed: Requested node configuration is not available"),
        (["--gres=tpu:1"], "Invalid generic resource (gres) specification"),
        (["--cpus-per-task=9"], "CPU count per node can not be satisfied"),
        (["--mem=900G"], "Memory specification can not be satisfied"),
        (["--nodelist=n9"], "Batch job submission failed: Invalid node name specified"),
        (["--constraint=none"], "Batch job submission failed: Invalid feature specification"),
        (["--dependency=none:1"], "Batch job submission failed: Job dependency problem"),
    ],
)
def test_what_cannot_be_is_refused(fragile, options, says):
    answer = fragile.ask("sbatch", *options, "--wrap=true")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[0] == f"sbatch: error: {says}"


def test_arrays_and_the_number_of_jobs_have_limits(tmp_path):
    held = Cluster(tmp_path, nodes=1, max_array=11, settings={"MaxJobCount": 4})
    for _ in running(held):
        refused = held.ask("sbatch", "--hold", "--array=0-11", "--wrap=true")
        assert refused.stderr == "sbatch: error: Batch job submission failed: Invalid job array specification\n"
        assert held.submit("true", "--hold", "--array=8-10") == "1"  # elements count, also those that have ended
        # for two minutes; then "Batch job submission failed: Resource temporarily unavailable"
        patient = held.ask("timeout", "2", "sbatch", "--hold", "--wrap=true")
        assert patient.stderr == "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"


def test_some_of_what_cannot_be_waits_for_ever_unless_limits_are_enforced(fragile):
    too_much = {
        "--cpus-per-task=25": "More processors requested than permitted",
        "--nodes=4": "Node count specification invalid",
        "--time=61": "Requested time limit is invalid (missing or exceeds some limit)",
    }
    for option in too_much:
        job = fragile.submit("true", option)
        until(lambda job=job: fragile.job(job).reason == "PartitionConfig", f"{option} waits")
        assert fragile.job(job).state == "PENDING"
    fragile.submit("true", "--account=none")  # an account is not looked at where accounting is off
    fragile.reconfigure(EnforcePartLimits="ALL")
    for option, says in too_much.items():
        assert (
            fragile.ask("sbatch", option, "--wrap=true").stderr
            == f"sbatch: error: Batch job submission failed: {says}\n"
        )


def test_squeue_has_a_row_for_every_element_of_an_array(fragile):
    def rows() -> list[str]:
        return fragile.call("squeue", "-h", "-r", "-t", "all", "-j", array, "-o", "%F|%K|%A|%T|%j|%N").splitlines()

    flag = fragile.folder / "go"
    script = f"until [ -e {flag} ]; do sleep 0.1; done; exit $SLURM_ARRAY_TASK_ID"
    array = fragile.submit(script, "--array=0-2%2", "--job-name=some", "--nodelist=n1")
    fragile.wait(f"{array}_0", "RUNNING")
    fragile.wait(f"{array}_1", "RUNNING")
    number = int(array)
    assert sorted(rows()) == [
        f"{array}|0|{number + 1}|RUNNING|some|n1",
        f"{array}|1|{number + 2}|RUNNING|some|n1",
        f"{array}|2|{array}|PENDING|some|",
    ]
    flag.touch()
    fragile.wait(f"{array}_2", "FAILED")
    assert sorted(rows()) == [
        f"{array}|0|{number + 1}|COMPLETED|some|n1",
        f"{array}|1|{number + 2}|FAILED|some|n1",
        f"{array}|2|{array}|FAILED|some|n1",
    ]
    answer = fragile.ask("squeue", "-h", "-j", "99999")
    assert (answer.returncode, answer.stderr) == (1, "slurm_load_jobs error: Invalid job id specified\n")


def test_a_job_waits_for_all_of_its_dependencies_or_for_one(fragile):
    ended, lasting = fragile.submit("true"), fragile.submit("sleep 300")
    fragile.wait(ended, "COMPLETED")
    fragile.wait(lasting, "RUNNING")

    def waits(what: str) -> str:
        job = fragile.submit("true", f"--dependency={what}")
        until(lambda: fragile.job(job).reason == "Dependency" or fragile.job(job).state == "COMPLETED", what)
        return fragile.call("squeue", "-h", "-t", "all", "-j", job, "-o", "%E").strip()

    # minutes after its start: also for a job that has ended meanwhile
    assert waits(f"afterany:{lasting}?after:{ended}+1") == (
        f"afterany:{lasting}(unfulfilled)?after:{ended}+1(unfulfilled)"
    )
    assert waits(f"afterany:{lasting}?after:{ended}") == "(null)"  # one is enough
    assert waits(f"afterany:{lasting},after:{ended}") == f"afterany:{lasting}(unfulfilled)"  # both are wanted
    # a question mark makes all of them alternatives
    assert waits(f"afterany:{lasting}?after:{lasting}+1,after:{ended}+1") == "?".join(
        [f"afterany:{lasting}(unfulfilled)", f"after:{lasting}+1(unfulfilled)", f"after:{ended}+1(unfulfilled)"]
    )
    assert waits("afterok:99999") == "(null)"  # what Slurm does not know (any more) has been fulfilled
    failed = fragile.submit("exit 1")
    fragile.wait(failed, "FAILED")
    job = fragile.submit("true", f"--dependency=afterok:{failed}")
    until(lambda: fragile.job(job).reason == "DependencyNeverSatisfied", "it waits for ever")


def test_without_accounting_there_is_no_sacct(fragile):
    answer = fragile.ask("sacct", "-X", "-n", "-P", "-o", "JobID,State")
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "", "Slurm accounting storage is disabled\n")


# --- faults ----------------------------------------------------------------------------------------------------------


def test_jobs_start_again_when_requeued_and_when_their_node_is_down_or_lost(fragile):
    said = fragile.folder / "starts"
    script = f"echo $SLURM_JOB_ID $SLURMD_NODENAME ${{SLURM_RESTART_COUNT:-first}} >> {said}; sleep 300"

    def starts(restarts: str) -> list[list[str]]:
        rows = [line.split() for line in said.read_text().splitlines()] if said.exists() else []
        return sorted(row[:2] for row in rows if row[2] == restarts)

    lost = fragile.submit(script)
    assert fragile.wait(lost, "RUNNING").node == "n1"
    down, requeued = fragile.submit(script, "--nodelist=n2"), fragile.submit(script, "--nodelist=n3")
    given_up = fragile.submit("sleep 300", "--nodelist=n2", "--no-requeue")
    fragile.wait(given_up, "RUNNING")
    until(lambda: starts("first") == sorted([[lost, "n1"], [down, "n2"], [requeued, "n3"]]), "all have started")

    fragile.call("scontrol", "requeue", requeued)
    fragile.down("n2", "power")
    assert fragile.states()["n2"] == "down"
    assert fragile.wait(requeued, "PENDING").reason == "BeginTime"
    assert fragile.wait(down, "PENDING").reason == "BeginTime"
    assert fragile.wait(given_up, "NODE_FAIL").reason == "NodeDown"
    fragile.resume("n2")
    old = fragile.steps(lost, "n1")
    fragile.kill("n1")
    assert fragile.states()["n1"] == "down*"
    assert fragile.wait(lost, "RUNNING").node == "n2"
    until(lambda: starts("1") == sorted([[lost, "n2"], [down, "n2"], [requeued, "n3"]]), "all have started again")

    # the old process lives on until its node comes back and is told that its job is none any more
    assert old
    assert fragile.steps(lost, "n1") == old
    assert fragile.steps(lost) == sorted(old + fragile.steps(lost, "n2"))
    fragile.restart("n1")
    until(lambda: not fragile.steps(lost, "n1"), "the old process has ended")
    assert fragile.steps(lost, "n2")


def test_a_controller_that_was_killed_knows_what_it_has_saved_and_undoes_the_rest(fragile, tmp_path):
    kept = fragile.submit("sleep 300")
    fragile.wait(kept, "RUNNING")
    listener = Listener(tmp_path / "undone")
    undone = fragile.submit(f"exec bash {listener.path}", "--hold")
    fragile.save()
    saved = shutil.copy(fragile.folder / "state" / "job_state", tmp_path)
    fragile.call("scontrol", "release", undone)
    until(listener.heard, "the job runs")
    first = {job: fragile.steps(job)[0] for job in (kept, undone)}

    fragile.kill("slurmctld")
    lost = "Unable to contact slurm controller (connect failure)"
    says = {
        "squeue -h -r -t all": (1, f"slurm_load_jobs error: {lost}\n"),
        "sbatch --wrap=true": (1, f"sbatch: error: Batch job submission failed: {lost}\n"),
        f"scancel {kept}": (8, f"scancel: error: Kill job error on job id {kept}: {lost}\n"),
        f"scontrol requeue {kept}": (1, f"Unexpected message received for job {kept}\n"),
        "sinfo": (1, f"slurm_load_partitions: {lost}\n"),
    }
    with ThreadPoolExecutor() as pool:  # each tries for a while
        answers = dict(zip(says, pool.map(lambda command: fragile.ask(*command.split()), says), strict=True))
    assert {command: (answer.returncode, answer.stderr) for command, answer in answers.items()} == says
    assert {job: fragile.steps(job)[0] for job in (kept, undone)} == first

    # a controller that wrote its state last before a job started: it would also do so after some seconds, or not
    shutil.copy(saved, fragile.folder / "state")
    fragile.restart("slurmctld")
    assert fragile.job(kept).state == "RUNNING"
    assert fragile.job(undone).state == "PENDING"
    until(lambda: not fragile.steps(undone), "what should not run has been ended")
    assert set(listener.heard()) == {"started"}  # without a warning
    assert fragile.steps(kept)[0] == first[kept]
    time.sleep(1.1)  # within the same second the node would refuse it ("Job credential revoked": FAILED)
    fragile.call("scontrol", "release", undone)
    until(lambda: len(listener.said()) == 2, "the job runs for the second time")
    assert listener.said()[1][:2] == ("started", "first")  # and does not know


# --- preemption ------------------------------------------------------------------------------------------------------


def test_preemption_sends_sigterm_to_steps_at_once_and_nothing_to_scripts(fragile, tmp_path):
    _, (batch, step) = listening(fragile, tmp_path, "job", "--signal=USR2@60")
    asked = time.time()
    fragile.submit("true", "--partition=urgent", "--cpus-per-task=8", "--nodelist=n1")
    until(lambda: {"CONT", "TERM"} <= step.heard().keys(), "the step hears")
    assert step.heard().keys() == {"started", "CONT", "TERM"}
    assert step.heard()["TERM"] - asked < fragile.grace
    assert batch.heard().keys() == {"started"}


def test_preemption_that_announces_itself_sends_what_was_asked_for_and_requeues(fragile, tmp_path):
    fragile.reconfigure(**cluster.ANNOUNCED)
    tasks, (quiet, step) = listening(fragile, tmp_path, "tasks", "--signal=USR2@60")
    script, (batch,) = listening(fragile, tmp_path, "script", "--signal=B:USR2@60", step=False)
    ready = tmp_path / "ready"
    leaves = f"trap 'exit 0' USR2; touch {ready}; sleep 300 & wait"
    leaver = fragile.submit(leaves, "--signal=B:USR2@60", "--nodelist=n1")
    until(ready.exists, "the leaver listens")
    urgent = fragile.submit("true", "--partition=urgent", "--cpus-per-task=8", "--nodelist=n1")
    until(lambda: {"CONT", "USR2"} <= step.heard().keys() & batch.heard().keys(), "both hear")
    assert step.heard().keys() == batch.heard().keys() == {"started", "CONT", "USR2"}
    assert quiet.heard().keys() == {"started"}
    fragile.wait(leaver, "COMPLETED")  # who leaves does not come back
    fragile.wait(urgent, "RUNNING", "COMPLETED")
    for job in (tasks, script):
        assert fragile.wait(job, "PENDING").node == ""
    for listener in (step, batch):
        assert listener.heard()["TERM"] - listener.heard()["USR2"] == pytest.approx(fragile.grace, abs=2)
    assert quiet.heard()["TERM"] == pytest.approx(batch.heard()["TERM"], abs=1)


# --- accounting ------------------------------------------------------------------------------------------------------


def test_accounting_tells_of_a_time_limit(accounted, overdue):
    until(lambda: told(accounted, "-j", overdue) == [[overdue, "TIMEOUT", "0:0"]], "the limit is noticed")
