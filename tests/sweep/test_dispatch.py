"""Does a launch on Slurm hand every run over once, and know what became of its jobs, whatever Slurm answers?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import Runtime
from sweep import batches, dispatch, failures, launch, ledger, plan, request, rundir, slurm, source, tables, watch
from sweep.batches import Batch
from tests.fake_slurm import ACTIVE, FakeSlurm, Partition, Submitted, Worker

ROOT = Path(launch.__file__).parents[1]
GRID = {
    "study": "tiny",
    "data": {"family": "digits", "views": 1, "views_heldout": 1},
    "price": {"device": "core", "devices": 2, "peak_tflops": 0.06, "mfu": [0.2, 0.7]},
}
HOUR = 3_600_000  # steps of these tokenizers that are predicted to take one, and a bit


def arm(codebook: int = 16, seeds: int = 1, steps: Sequence[int] = (5,), **run: Any) -> dict[str, Any]:
    """Tokenizers of a grid; arms differ in their codebook."""
    return {
        "name": f"of-{codebook}",
        "family": "vq",
        "fields": {"width": 4, "tokens": 16, "codebook": codebook, "attention": False},
        "steps": list(steps),
        "train": {"batch": 8, "lr": 2.0e-3, "warmup": 2},
        "seeds": list(range(seeds)),
        "run": run,
    }


def planned(folder: Path, *arms: dict[str, Any], evaluation: Sequence[dict[str, Any]] = (), **run: Any) -> Path:
    grid = GRID | {"tokenizer": list(arms) or [arm()], "evaluation": list(evaluation)}
    grid |= {"run": {"threads": 1, "job_min": 0} | run}
    (folder / "grid.yaml").write_text(json.dumps(grid))
    result = plan.plan(plan.load(folder / "grid.yaml"), folder / "results")
    plan.write(result)
    return result.study.resolve()


def runs(study: Path, stage: str = "tokenizer") -> list[str]:
    return [row["run_id"] for row in tables.plan(study, ["run_id", "stage"]) if row["stage"] == stage]


def of(study: Path, codebook: int) -> list[str]:
    """Runs of an arm."""
    held = tables.plan(study, ["run_id", "stage", "codebook"])
    return [row["run_id"] for row in held if row["stage"] == "tokenizer" and row["codebook"] == codebook]


def states(study: Path, run_ids: Iterable[str] | None = None) -> list[str]:
    return [rundir.status(study, run_id)["state"] for run_id in (runs(study) if run_ids is None else run_ids)]


# --- what jobs do ----------------------------------------------------------------------------------------------------


def begin(study: Path, run_id: str, job: str, host: str = "n7") -> rundir.Claim:
    """What a job does first that has started on another machine."""
    claim = rundir.claim(study, run_id)
    assert claim is not None
    claim.update(state="running", reason=None, host=host, job=job)
    record = claim.folder / "holder.json"
    there = {"host": f"{host}.cluster", "node": host, "job": job, "restart": 0}
    record.write_text(json.dumps(json.loads(record.read_text()) | there))
    return claim


def silence(claim: rundir.Claim) -> None:
    """It has given no sign of life for long."""
    os.utime(claim.folder / "holder.json", (0, 0))


def end(study: Path, run_id: str, state: str = "done", reason: str | None = None) -> None:
    """What a job does last."""
    config = rundir.config(study, run_id)
    for point in config["points"] or ():
        rundir.atomic_write(study, rundir.point_file(study, run_id, point), {}, sync=False)
    for point in config["encode"] or ():
        codes = rundir.codes_folder(study, f"{run_id}@{point}", "0" * 64)
        rundir.atomic_write(study, codes / "manifest.json", {}, sync=False)
    rundir.mark(study, run_id, state, reason, points=config["points"])
    for record in (rundir.run_folder(study, run_id) / "claim").glob("*/holder.json"):
        record.rename(record.with_name("released.json"))


def record(job: Submitted) -> Batch:
    held = batches.read(job.folder)
    assert held is not None
    return held


def worked(job: Submitted, task: int) -> str:
    """Do all runs of a task, as far as they are still to do; how it ends."""
    batch = record(job)
    study = batch.folder.parents[3]
    for run_id in batch.runs(task):
        if rundir.status(study, run_id)["state"] in ("planned", "interrupted"):
            end(study, run_id)
    return "COMPLETED"


def work(slurm: FakeSlurm) -> None:
    """Let all jobs that may start begin and end."""
    for job, task in slurm.startable():
        slurm.put(worked(job, task), [job.elements[task]])


# --- launches --------------------------------------------------------------------------------------------------------

Story = Iterator[float]


class Clock:
    """Time for launches in this process: it passes where they sleep, and meanwhile a story goes on.

    A story yields the seconds until its next part. It begins when a launch has asked Slurm for the first time; Slurm is
    asked once in ten seconds.
    """

    def __init__(self) -> None:
        self.now = time.time()
        self.story: Story | None = None
        self.wakes = 0.0

    def time(self) -> float:
        return self.now

    monotonic = time

    def strftime(self, form: str) -> str:
        return time.strftime(form, time.localtime(self.now))

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1.0)
        if self.story is not None and self.now >= self.wakes:
            if (pause := next(self.story, None)) is None:
                raise AssertionError("the story is over, and the launch goes on")
            self.wakes = self.now + pause


class Site:
    """A Slurm, and launches on it."""

    def __init__(self, slurm: FakeSlurm, clock: Clock) -> None:
        self.slurm, self.clock = slurm, clock
        self.processes: list[subprocess.Popen[str]] = []

    def launch(self, study: Path, *options: str, story: Callable[[], Story] | None = None, stage: str = "") -> int:
        """A launch in this process that waits, while ``story`` is told; all is done at once where there is none."""

        def working() -> Story:
            while True:
                work(self.slurm)
                yield 1

        self.clock.now += 1  # launches are told apart by the second
        self.clock.story, self.clock.wakes = (story or working)(), 0.0
        words = ("--stage", stage or "tokenizer", "--cluster", "slurm", "--slurm", "gpu=no", *options)
        return launch.main([str(study), *words])

    def detach(self, study: Path, *options: str, stage: str = "") -> int:
        return self.launch(study, *options, "--detach", stage=stage)

    def start(self, study: Path) -> subprocess.Popen[str]:
        """A launch in a process of its own."""
        command = [sys.executable, "-m", "sweep.launch", str(study), "--stage", "tokenizer", "--cluster", "slurm"]
        command += ["--poll-s", "0.05", "--slurm", "gpu=no"]
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    @property
    def jobs(self) -> list[Submitted]:
        """All that sbatch took so far."""
        return list(self.slurm.jobs)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Commands of Slurm alone on PATH; time that passes as told."""
    clock, folder = Clock(), tmp_path / "bin"
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    git = shutil.which("git")
    monkeypatch.setenv("PATH", str(folder))
    for module in (launch, watch, dispatch, batches):
        monkeypatch.setattr(module, "time", clock)
    with FakeSlurm(folder) as held:
        if git:  # what runs is written down
            (folder / "git").symlink_to(git)
        there = Site(held, clock)
        yield there
        for process in there.processes:
            if process.poll() is None:  # a test has failed
                process.kill()
                process.communicate()


def waited(until: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def launches(study: Path) -> list[Path]:
    """Their folders."""
    return sorted(rundir.launches_folder(study).glob("2*"))


def tasks(jobs: Iterable[Submitted]) -> list[list[str]]:
    """Runs of each task."""
    return [batch.runs(task) for batch in map(record, jobs) for task in range(batch.tasks)]


def flat(found: Iterable[list[str]]) -> list[str]:
    return [run_id for held in found for run_id in held]


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_every_run_of_a_large_study_is_in_one_task_of_arrays_that_slurm_takes(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2500))
    began = time.process_time()  # others may be at work on this machine
    assert site.detach(study) == 0
    first = time.process_time() - began
    jobs = site.jobs
    assert [job.tasks for job in jobs] == [1, 1001, 1001, 495]
    assert [job.options["array"].partition("%")[0] for job in jobs[1:]] == ["0-1000", "0-1000", "0-494"]
    given_out = Counter(run_id for runs in tasks(jobs) for run_id in runs)
    assert given_out == Counter(runs(study))
    assert sum(job.at_once for job in jobs) <= 256
    began = time.process_time()
    assert site.detach(study) == 0
    again = time.process_time() - began
    assert site.jobs == jobs
    assert len(launches(study)) == 1
    assert first < 15
    assert again < 5


def test_arrays_share_the_jobs_at_a_time_and_those_beyond_wait_for_an_earlier_one(site, tmp_path):
    site.slurm.max_array = 5
    study = planned(tmp_path, arm(seeds=25))
    assert site.detach(study, "--slurm", "parallel=3") == 0
    jobs = site.jobs
    assert [job.tasks for job in jobs] == [1, 5, 5, 5, 5, 2]
    assert [job.at_once for job in jobs[:3]] == [1, 1, 1]
    canary = jobs[0].id
    behind = [job.options.get("dependency") for job in jobs]
    others = [f"afterany:{canary}?after:{canary}+5"] * 2
    assert behind == [None, *others, f"afterany:{canary}", f"afterany:{jobs[1].id}", f"afterany:{jobs[2].id}"]
    assert sorted(flat(tasks(jobs))) == sorted(runs(study))


def test_the_cheapest_runs_go_first_and_the_others_of_their_kind_wait_for_them(site, tmp_path):
    lengths = [70, 10, 60, 20, 50, 30, 40]
    arms = [arm(codebook=2 ** (number + 1), steps=[steps]) for number, steps in enumerate(lengths)]
    study = planned(tmp_path, *arms, arm(codebook=1024, seeds=6, threads=2))
    assert site.detach(study) == 0
    by_cpus = {job.options["cpus-per-task"]: job for job in site.jobs}
    few = by_cpus["2"]
    assert (few.tasks, few.options.get("dependency")) == (6, None)  # too few to be spared
    canary, rest = (job for job in site.jobs if job.options["cpus-per-task"] == "1")
    assert tasks([canary]) == [[run_id for power in (6, 4, 2) for run_id in of(study, 2**power)]]
    assert len(tasks([rest])) == 4
    assert rest.options["dependency"] == f"afterany:{canary.id}?after:{canary.id}+5"


def test_runs_that_have_company_that_is_done_wait_for_no_canary(site, tmp_path):
    study = planned(tmp_path, arm(seeds=12))

    def story() -> Story:
        canary, rest = site.jobs
        site.slurm.put(worked(canary, 0), [canary.id])
        for run_id in flat(tasks([rest])):
            claim = begin(study, run_id, "x")
            claim.update(state="interrupted", reason="timeout: asked to stop at step 3")
            claim.release()
        site.slurm.put("TIMEOUT", rest.elements)
        yield 10
        again = site.jobs[-1]
        assert (again.tasks, "dependency" in again.options) == (9, False)
        work(site.slurm)
        yield 10

    assert site.launch(study, story=story) == 0


def test_a_launch_takes_the_jobs_at_a_time_that_others_of_the_study_leave(site, tmp_path):
    study = planned(tmp_path, arm(seeds=4), arm(codebook=32, seeds=4))
    assert site.detach(study, "--slurm", "parallel=3", "--only", "codebook=16") == 0
    assert site.detach(study, "--slurm", "parallel=5") == 0
    assert [(job.tasks, job.at_once) for job in site.jobs] == [(4, 3), (4, 2)]


def test_a_site_without_arrays_gets_a_job_for_each_run(site, tmp_path):
    site.slurm.max_array = 0
    study = planned(tmp_path, arm(seeds=4))
    assert site.detach(study) == 0
    assert [job.options.get("array") for job in site.jobs] == [None] * 4


@pytest.mark.parametrize("name", ["tiny", "a.b-c_d.2", "0--x..y"])
def test_jobs_are_told_apart_and_found_by_their_names(site, tmp_path, name):
    site.slurm.max_array = 3
    study = planned(tmp_path, arm(seeds=3), arm(codebook=32, threads=2)).rename(tmp_path / "results" / name)

    def story() -> Story:
        first, second = site.jobs
        assert first.name != second.name
        assert all(job.name.startswith(f"sweep-{name}-tokenizer-") for job in (first, second))
        site.slurm.put("RUNNING")
        yield 60
        assert len(site.jobs) == 2  # they were found
        for job in (first, second):
            for task in range(job.tasks):
                worked(job, task)
        yield 10

    assert site.launch(study, story=story) == 0


# --- what is asked for -----------------------------------------------------------------------------------------------


def asked(site: Site, folder: Path, *options: str, stage: str = "", **grid: Any) -> dict[str, str]:
    """What sbatch is told about the one job of a study."""
    assert site.detach(planned(folder, **grid), *options, stage=stage) == 0
    (job,) = site.jobs
    return job.options


def test_jobs_ask_for_what_their_runs_need(site, tmp_path):
    study = planned(
        tmp_path,
        arm(codebook=2, seeds=2),
        arm(codebook=4, threads=4),
        arm(codebook=8, steps=[HOUR]),
        arm(codebook=16, seeds=2, pack=2),
        arm(codebook=32, devices=2),
    )
    assert site.detach(study) == 0
    found = {tuple({codebook(study, run_id) for run_id in flat(tasks([job]))}): job for job in site.jobs}
    assert set(found) == {(2,), (4,), (8,), (16,), (32,)}
    plain = {"time": "15", "nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "1", "mem": "2GB"}
    expected = {2: {}, 4: {"cpus-per-task": "4"}, 8: {"time": "240"}}
    expected |= {16: {"cpus-per-task": "2", "mem": "4GB"}, 32: {"ntasks-per-node": "2", "mem": "4GB"}}
    for (which,), job in found.items():
        assert {name: job.options[name] for name in plain} == plain | expected[which]
        assert "gres" not in job.options
        assert f"--cpus-per-task={job.options['cpus-per-task']}" in job.command  # of the step
        assert job.options["signal"] == "USR2@120"
        assert "requeue" in job.options
    assert tasks([found[16,]]) == [of(study, 16)]  # two side by side in one job


def codebook(study: Path, run_id: str) -> int:
    return int(rundir.config(study, run_id)["fields"]["codebook"])


def test_short_runs_follow_each_other_until_a_job_is_worth_it(site, tmp_path):
    study = planned(tmp_path, arm(seeds=7, steps=[HOUR // 6]), job_min=20)  # ten minutes and a bit each
    assert site.detach(study) == 0
    (job,) = [job for job in site.jobs if job.tasks > 1]
    assert sorted(len(runs) for runs in tasks(site.jobs)) == [1, 2, 2, 2]
    assert job.options["time"] == "60"


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        ({"gres": "gpu:8"}, [], {"nodes": "1", "ntasks-per-node": "4", "gres": "gpu:4", "mem": "64GB"}),
        ({"gres": "gpu:a100:2"}, [], {"nodes": "2", "ntasks-per-node": "2", "gres": "gpu:2", "mem": "32GB"}),
        ({"gres": "gpu:8"}, ["gpus_per_node=1"], {"nodes": "4", "ntasks-per-node": "1", "gres": "gpu:1"}),
        ({"gres": "gpu:a100:8(S:0-1)"}, ["gpu=a100"], {"ntasks-per-node": "4", "gres": "gpu:a100:4"}),
        ({"gres": "gpu:8", "memory_mb": 64 * 1024}, [], {"gres": "gpu:4", "mem": "30GB"}),  # half of a node, nearly
        ({}, [], {"nodes": "1", "ntasks-per-node": "4", "mem": "8GB"}),
        ({"gres": "gpu:8"}, ["gpu=no"], {"nodes": "1", "ntasks-per-node": "4", "mem": "8GB"}),
    ],
)
def test_a_run_on_several_devices_is_a_task_for_each(site, tmp_path, there, options, expected):
    site.slurm.partitions = [Partition("cpu", "1-00:00:00"), Partition("big", "2-00:00:00", **there)]
    held = asked(site, tmp_path, "--slurm", "gpu=auto", "partition=big", *options, devices=4)
    assert {name: held.get(name) for name in expected} == expected
    assert ("gres" in held) == ("gres" in expected)
    assert held["partition"] == "big"
    assert "--kill-on-bad-exit=1" in site.jobs[0].command  # ranks that lost one wait for ever


def test_a_job_keeps_to_the_time_limit_of_its_partition(site, tmp_path):
    site.slurm.partitions = [Partition("main", "1:30:00")]
    study = planned(tmp_path, arm(steps=[HOUR]), arm(codebook=32))
    assert site.detach(study) == 0
    assert {job.options["time"] for job in site.jobs} == {"90", "15"}


def test_evaluations_of_a_checkpoint_are_measured_in_one_job(site, tmp_path):
    shared = {"of": "tokenizer", "extractors": ["digits-supervised"], "points": "all"}
    protocols = [{"name": name, "samples": samples, **shared} for name, samples in (("few", 32), ("more", 48))]
    study = planned(tmp_path, arm(seeds=3, steps=[5, 10]), evaluation=protocols)
    assert site.launch(study) == 0
    before = len(site.jobs)
    assert site.detach(study, "--of", "tokenizer", stage="evaluation") == 0
    found = tasks(site.jobs[before:])
    assert [len(runs) for runs in found] == [2] * 6
    assert all(len({rundir.config(study, run_id)["checkpoint"] for run_id in runs}) == 1 for runs in found)


def test_settings_of_the_user_reach_sbatch_as_they_were_given(site, tmp_path):
    wanted = {"account": "a b;c&d", "qos": "x|y", "constraint": "[a*2&b]", "comment": "it > that", "mail-user": "a@b.c"}
    given_on = [f"{name if name in request.KEYS else f'sbatch.{name}'}={value}" for name, value in wanted.items()]
    held = asked(site, tmp_path, "--slurm", *given_on, "exclude=n[1-3,5],n9", "mem_gib=7", "cpus=3", "time_min=77")
    assert {name: held[name] for name in wanted} == wanted
    assert "#SBATCH --account='a b;c&d'" in site.jobs[0].script.splitlines()
    assert (held["exclude"], held["mem"], held["cpus-per-task"], held["time"]) == ("n[1-3,5],n9", "7GB", "3", "77")


@pytest.mark.parametrize("key", ["account", "sbatch.comment"])
@pytest.mark.parametrize("value", ["a\nb", "a\n", "a'b", 'a"b', "$HOME", "a\\b", "`id`", ""])
def test_a_setting_that_could_end_its_line_is_refused_and_nothing_is_written(site, tmp_path, capsys, key, value):
    study = planned(tmp_path)
    before = sorted(study.rglob("*"))
    assert site.detach(study, "--slurm", f"{key}={value}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--slurm {key}: got {value!r}; allowed: one line without")
    assert error.count("\n") == 1
    assert sorted(study.rglob("*")) == before
    assert not site.jobs


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("colour=red", "got 'colour=red'; allowed: KEY=VALUE of partition, "),
        ("partition", "got 'partition'; allowed: KEY=VALUE of partition, "),
        ("sbatch.-x=1", "got 'sbatch.-x=1'; allowed: KEY=VALUE of partition, "),
        ("sbatch.array=0-3", "got 'sbatch.array=0-3'; allowed: "),  # ours: without them no job is found again
        ("sbatch.job-name=x", "got 'sbatch.job-name=x'; allowed: "),
        ("sbatch.job_name=x", "got 'sbatch.job_name=x'; allowed: "),
        ("parallel=0", "parallel: got '0'; allowed: a whole number from 1 on"),
        ("time_min=1.5", "time_min: got '1.5'; allowed: a whole number from 1 on"),
        ("requeue=maybe", "requeue: got 'maybe'; allowed: yes, no"),
    ],
)
def test_a_setting_that_nobody_knows_is_refused_in_one_line(site, tmp_path, capsys, setting, says):
    assert site.detach(planned(tmp_path), "--slurm", setting) == 2
    error = capsys.readouterr().err
    assert error.startswith("--slurm")
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["scontrol", "sinfo"])
def test_a_launch_without_a_cluster_is_refused_and_nothing_is_written(site, tmp_path, capsys, command):
    site.slurm.answer(command, f"slurm_load_{command}: Unable to contact slurm controller", times=None)
    study = planned(tmp_path)
    before = sorted(study.rglob("*"))
    assert site.detach(study) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--cluster slurm: {command}: slurm_load_")
    assert error.count("\n") == 1
    assert sorted(study.rglob("*")) == before


@pytest.mark.parametrize("command", ["sbatch", "srun"])
def test_a_machine_that_cannot_submit_says_so(site, tmp_path, capsys, command):
    site.slurm.remove(command)
    assert site.detach(planned(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--cluster slurm: {command}: not found")
    assert error.count("\n") == 1


def test_jobs_take_over_nothing_from_a_job_that_they_are_submitted_from(site, tmp_path, monkeypatch):
    others = {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SBATCH_PARTITION": "x"}
    others |= {"PMIX_RANK": "0", "PMI_FD": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "1", "RANK": "1"}
    others |= {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "TRITON_CACHE_DIR": "/x", "SLURMD_NODENAME": "n1"}
    kept = {"SLURM_CONF": "/etc/slurm/slurm.conf", "WANDB_MODE": "offline"}
    for name, value in (others | kept | {"OMP_NUM_THREADS": "7"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", "/given")
    study = planned(tmp_path, threads=2)
    assert site.detach(study) == 0
    found = site.jobs[0].environment
    assert not others.keys() & found.keys()
    assert {name: found[name] for name in kept} == kept
    assert found["OMP_NUM_THREADS"] == "2"  # as planned
    assert os.environ["SLURM_JOB_ID"] == "7"
    first, *rest = found["PYTHONPATH"].split(os.pathsep)
    assert Path(first).parent == rundir.code_folder(study)
    assert (Path(first) / "sweep" / "job.py").read_bytes() == (ROOT / "sweep" / "job.py").read_bytes()
    assert rest[-1] == "/given"


def test_code_that_is_edited_after_submission_is_not_what_runs(site, tmp_path, monkeypatch):
    source.provenance()  # of the true repository, once for all tests
    for package in source.PACKAGES:
        (tmp_path / "code" / package).mkdir(parents=True)
        (tmp_path / "code" / package / "x.py").write_text("before")
    monkeypatch.setattr(source, "ROOT", tmp_path / "code")
    study = planned(tmp_path)
    assert site.detach(study) == 0
    (tmp_path / "code" / "models" / "x.py").write_text("after")
    site.slurm.put("FAILED")  # before it began: another job does it
    assert site.detach(study) == 0
    copies = [Path(job.environment["PYTHONPATH"].partition(os.pathsep)[0]) for job in site.jobs]
    assert [(copy / "models" / "x.py").read_text() for copy in copies] == ["before", "after"]


def test_code_that_differs_from_its_commit_is_refused_where_that_is_asked_for(site, tmp_path, monkeypatch, capsys):
    study = planned(tmp_path)
    monkeypatch.setattr(source, "changes", lambda: [" M sweep/job.py", "?? sweep/x.py"])
    assert site.detach(study, "--require-clean") == 2
    assert capsys.readouterr().err == "--require-clean: 2 files differ from the commit (M sweep/job.py, ...)\n"
    assert not site.jobs
    monkeypatch.setattr(source, "changes", list)
    assert site.detach(study, "--require-clean") == 0
    assert len(site.jobs) == 1


def test_a_site_without_requeue_gets_arrays_whose_tasks_go_on_with_each_other(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2), arm(codebook=32, seeds=2, pack=2))
    assert site.detach(study, "--slurm", "requeue=no") == 0
    assert [job.options["array"] for job in site.jobs] == ["0-19%1"] * 3
    assert all("no-requeue" in job.options and "requeue" not in job.options for job in site.jobs)
    packs = [record(job).packs for job in site.jobs]
    assert [len(held) for held in packs] == [1, 1, 1]
    assert sorted(len(held[0]) for held in packs) == [1, 1, 2]

    def story() -> Story:
        one = next(job for job in site.jobs if job.tasks == 20 and len(record(job).packs[0]) == 1)
        (run,) = record(one).runs(0)
        silence(begin(study, run, one.elements[0]))
        site.slurm.put("TIMEOUT", [one.elements[0]])
        yield 20
        assert rundir.status(study, run)["state"] == "interrupted"
        assert len(site.jobs) == 3  # the next task of the array goes on with it
        work(site.slurm)
        yield 20

    assert site.launch(study, "--slurm", "requeue=no", story=story) == 0


# --- sbatch fails ----------------------------------------------------------------------------------------------------

BUSY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
INVALID = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"


def test_a_slurm_that_is_busy_is_asked_again_later_and_ever_less_often(site, tmp_path):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", BUSY, times=5)
    moments: list[float] = []

    def story() -> Story:
        while not site.jobs:
            moments.extend([site.clock.now] * (len(site.slurm.calls("sbatch")) - len(moments)))
            assert states(study) == ["planned"]
            yield 15
        work(site.slurm)
        yield 10

    assert site.launch(study, "--poll-s", "15", story=story) == 0
    pauses = [later - sooner for sooner, later in pairwise(moments)]
    assert all(pause >= wait for pause, wait in zip(pauses, dispatch.BACKOFF_S, strict=False))
    assert len(site.slurm.calls("sbatch")) == 6
    assert states(study) == ["done"]


@pytest.mark.parametrize(
    "text",
    [
        "AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
        "(job submit limit, user's size and/or time limits)",
        "sbatch: error: Batch job submission failed: Slurm temporarily unable to accept job, sleeping and retrying",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "sbatch: error: Batch job submission failed: Protocol authentication error",
        'sbatch: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file',
        BUSY,
        TIMED_OUT,
    ],
)
def test_what_may_be_granted_later_is_asked_again(text):
    assert slurm.Refused(text).passing


@pytest.mark.parametrize(
    "text",
    [
        INVALID,
        "sbatch: error: invalid partition specified: nope",
        "sbatch: error: Batch job submission failed: Requested node configuration is not available",
        "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates "
        "accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "sbatch: error: QOSMaxGRESPerUser\nsbatch: error: Batch job submission failed: Job violates accounting/QOS "
        "policy (job submit limit, user's size and/or time limits)",
    ],
)
def test_what_will_never_be_granted_is_not_asked_again(text):
    assert not slurm.Refused(text).passing


def test_a_refusal_stops_only_runs_that_ask_for_the_same(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=2), arm(codebook=32, seeds=2, threads=2))
    site.slurm.answer("sbatch", INVALID)
    assert site.launch(study) == 2
    assert Counter(states(study)) == {"done": 2, "failed": 2}
    refused = next(codebook for codebook in (16, 32) if states(study, of(study, codebook)) == ["failed"] * 2)
    reason = rundir.status(study, of(study, refused)[0])["reason"]
    assert reason == f"submit: {INVALID}"
    error = capsys.readouterr().err
    assert error.count(f"failed: {of(study, refused)[0]} ") == 1
    assert len(site.jobs) == 1
    assert len(batches.opened(study)) == 1  # nothing is left of what was refused

    assert site.launch(study) == 0  # mended meanwhile
    assert len(site.jobs) == 2


def test_a_refusal_of_long_jobs_leaves_short_ones_alone(site, tmp_path):
    site.slurm.partitions = [Partition("main", "1:00:00")]
    study = planned(tmp_path, arm(steps=[HOUR]), arm(codebook=32))
    with pytest.MonkeyPatch.context() as patch:  # the limit is not the partition's
        patch.setattr(slurm, "partition", lambda name: (slurm.Partition(), None))
        assert site.launch(study) == 2
    assert (states(study, of(study, 16)), states(study, of(study, 32))) == (["failed"], ["done"])
    assert "Requested time limit is invalid" in rundir.status(study, of(study, 16)[0])["reason"]


def test_a_detached_launch_that_is_refused_says_so(site, tmp_path, capsys):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", INVALID)
    assert site.detach(study) == 2
    assert f"submit: {INVALID}" in capsys.readouterr().err


def test_a_detached_launch_waits_for_a_slurm_that_is_busy_but_not_for_ever(site, tmp_path, capsys):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", BUSY, times=2)
    assert site.detach(study) == 0
    assert len(site.jobs) == 1
    site.slurm.put("FAILED")
    site.slurm.answer("sbatch", BUSY, times=None)
    assert site.detach(study, "--poll-s", "300") == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"Slurm takes no job: {BUSY}"


def test_a_job_that_was_accepted_although_sbatch_timed_out_is_adopted(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2), arm(codebook=32, threads=2))
    site.slurm.answer("sbatch", TIMED_OUT, obeys=True)

    def story() -> Story:
        assert len(site.jobs) == 1  # and no other while Slurm is so slow
        (batch,) = batches.opened(study)
        assert batch.job is None
        yield 10
        batch = next(found for found in batches.opened(study) if found.name == batch.name)
        assert batch.job == site.jobs[0].id
        for task in range(batch.tasks):
            assert (batch.folder / f"{batch.element(task)}_submitted.pkl").exists()
        yield 30
        assert sorted(flat(tasks(site.jobs))) == sorted(runs(study))
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0
    assert len(site.jobs) == 2


def test_a_job_whose_submission_was_answered_strangely_is_adopted(site, tmp_path):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", code=0, obeys=True, mute=True)  # a wrapper that swallows the number

    def story() -> Story:
        yield 40
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0
    assert len(site.jobs) == 1


def test_a_submission_that_was_never_accepted_is_made_again(site, tmp_path):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", TIMED_OUT)

    def story() -> Story:
        yield batches.SUBMITTING_S - 20
        assert len(site.slurm.calls("sbatch")) == 1
        assert len(batches.opened(study)) == 1
        yield 60
        assert len(site.slurm.calls("sbatch")) == 2
        assert [batch.job for batch in batches.opened(study)] == [site.jobs[0].id]
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0


def killed_over(site: Site, study: Path, accepted: bool) -> None:
    """A launch that dies while sbatch works."""
    site.slurm.answer("sbatch", code=0, obeys=accepted, hangs_s=3)
    process = site.start(study)
    waited(lambda: site.slurm.calls("sbatch"))
    waited(lambda: site.jobs or not accepted)
    process.kill()
    process.communicate()
    (batch,) = batches.opened(study)
    assert batch.job is None
    assert not list(batch.folder.glob("*_submitted.pkl"))


def test_a_job_whose_submitter_was_killed_is_adopted_by_the_next_launch(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))
    killed_over(site, study, accepted=True)

    def story() -> Story:
        (batch,) = batches.opened(study)
        assert batch.job == site.jobs[0].id
        laid = [batch.folder / f"{element}_submitted.pkl" for element in site.jobs[0].elements]
        assert all(path.exists() for path in laid)
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0
    assert len(site.jobs) == 1


def test_runs_whose_submitter_was_killed_too_early_are_submitted_again(site, tmp_path, monkeypatch):
    study = planned(tmp_path, arm(seeds=2))
    killed_over(site, study, accepted=False)
    monkeypatch.setattr(batches, "SUBMITTING_S", 60.0)

    def story() -> Story:
        assert not site.jobs  # what the dead one has sent may be on its way
        yield 80
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0
    assert len(site.jobs) == 1
    assert sorted(flat(tasks(site.jobs))) == sorted(runs(study))


def test_a_slurm_that_takes_nothing_for_an_hour_ends_the_launch(site, tmp_path, capsys):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", BUSY, times=None)

    def story() -> Story:
        yield dispatch.PATIENCE_S - 60
        yield 120

    assert site.launch(study, "--poll-s", "300", story=story) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == f"Slurm has taken no job for an hour ({BUSY}); the same command tries again"
    assert states(study) == ["planned"]


def test_a_launch_whose_last_job_was_taken_in_the_end_waits_for_it_as_long_as_it_takes(site, tmp_path):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", TIMED_OUT, obeys=True)

    def story() -> Story:
        site.slurm.put("RUNNING")
        yield 2 * dispatch.PATIENCE_S
        worked(site.jobs[0], 0)
        yield 20

    assert site.launch(study, "--poll-s", "300", story=story) == 0


def test_an_hour_without_a_job_counts_from_the_first_refusal(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))

    def story() -> Story:
        site.slurm.put("RUNNING")
        yield 2 * dispatch.PATIENCE_S
        site.slurm.answer("sbatch", BUSY)
        site.slurm.put("NODE_FAIL", site.jobs[0].elements[:1])
        yield 700
        assert len(site.jobs) == 2
        worked(site.jobs[0], 1)
        work(site.slurm)
        yield 400

    assert site.launch(study, "--poll-s", "300", story=story) == 0


def test_an_array_that_a_site_will_never_take_is_made_smaller(site, tmp_path):
    site.slurm.submit_limit = 4
    study = planned(tmp_path, arm(seeds=6))

    found: dict[str, list[str]] = {}

    def story() -> Story:
        while set(states(study)) != {"done"}:
            found.update({job.id: flat(tasks([job])) for job in site.jobs if job.id not in found})
            work(site.slurm)
            yield 10

    assert site.launch(study, story=story) == 0
    assert max(job.tasks for job in site.jobs) <= 4
    assert sorted(flat(found.values())) == sorted(runs(study))


# --- what became of jobs ---------------------------------------------------------------------------------------------

GONE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_queue_that_cannot_be_read_is_no_empty_queue(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))

    def story() -> Story:
        (job,) = site.jobs
        site.slurm.put("RUNNING")
        claims = [begin(study, run_id, element) for run_id, element in zip(runs(study), job.elements, strict=True)]
        site.slurm.answer("squeue", GONE, times=None)
        for claim in claims:
            silence(claim)  # the file system hangs too
        yield 600
        assert (states(study), len(site.jobs)) == (["running"] * 2, 1)
        site.slurm.heal("squeue")
        yield 60
        assert (states(study), len(site.jobs)) == (["running"] * 2, 1)
        site.slurm.put("TIMEOUT")
        yield 10
        assert (states(study), len(site.jobs)) == (["interrupted"] * 2, 2)  # it is looked after again
        work(site.slurm)
        yield 10

    assert site.launch(study, story=story) == 0


def test_a_queue_that_does_not_answer_in_time_has_not_answered(site, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.2)
    site.slurm.answer("squeue", hangs_s=5.0)
    assert slurm.queue() == ([], "squeue: no answer within 0.2 s")
    assert slurm.queue() == ([], None)


def test_lines_that_are_no_jobs_are_no_jobs(site, monkeypatch):
    greeting = "#!/bin/sh\necho 'Welcome to the cluster'\necho '7|N/A|RUNNING|mine|None'\n"
    (site.slurm.bin / "squeue").write_text(greeting)
    assert slurm.queue() == ([slurm.Task("7", 0, "RUNNING", "mine", "None")], None)


def test_an_hour_of_silence_ends_the_launch_and_leaves_jobs_alone(site, tmp_path, capsys):
    study = planned(tmp_path)

    def story() -> Story:
        site.slurm.put("RUNNING")
        site.slurm.answer("squeue", GONE, times=None)
        yield dispatch.PATIENCE_S
        assert states(study) == ["planned"]
        yield 700

    assert site.launch(study, "--poll-s", "300", story=story) == 1
    expected = f"Slurm has not answered for an hour (squeue: {GONE}); jobs go on, the same command waits\n"
    assert capsys.readouterr().err == expected
    assert site.slurm.states() == {site.jobs[0].id: "RUNNING"}
    assert not site.slurm.calls("scancel")
    site.slurm.heal("squeue")

    def healed() -> Story:
        worked(site.jobs[0], 0)
        yield 20

    assert site.launch(study, story=healed) == 0
    assert len(site.jobs) == 1


def test_a_job_that_is_absent_once_is_not_gone(site, tmp_path):
    study = planned(tmp_path)
    (run,) = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        site.slurm.put("RUNNING")
        silence(begin(study, run, job.id))
        for _ in range(3):
            site.slurm.forget()
            yield 10
            site.slurm.put("RUNNING")
            yield 10
        assert (states(study), len(site.jobs)) == (["running"], 1)
        end(study, run)
        yield 10

    assert site.launch(study, story=story) == 0


@pytest.mark.parametrize("accounting", ["answers", "disabled", "missing"])
def test_a_job_that_is_gone_is_lost_when_its_signs_of_life_stop(site, tmp_path, accounting):
    site.slurm.accounting = accounting == "answers"  # that it still runs, as a database does that nobody told
    if accounting == "missing":
        site.slurm.remove("sacct")
    study = planned(tmp_path)
    (run,) = runs(study)

    def story() -> Story:
        (first,) = site.jobs
        site.slurm.put("RUNNING")
        claim = begin(study, run, first.id)
        yield 10
        site.slurm.forget()
        yield 10 * (batches.Queue.ABSENT + 3)
        assert (states(study), len(site.jobs)) == (["running"], 1)
        silence(claim)
        yield 20
        status = rundir.status(study, run)
        assert (status["state"], status["retries"]) == ("planned", {"lost": 1})
        assert status["reason"] == "once more after lost: its worker gives no sign of life"
        second = site.jobs[1]
        site.slurm.put("RUNNING", [second.id])
        silence(begin(study, run, second.id))
        yield 10
        site.slurm.forget()
        yield 10 * batches.Queue.ABSENT + 5

    assert site.launch(study, story=story) == 1
    status = rundir.status(study, run)
    assert (status["state"], status["reason"]) == ("failed", f"lost: job {site.jobs[1].id} is gone, 2 times")
    assert len(site.jobs) == 2

    assert site.launch(study) == 0  # the cause lay outside the run
    assert len(site.jobs) == 3


def test_the_end_of_a_job_that_is_gone_is_looked_up_where_there_is_accounting(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))
    first, second = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        site.slurm.put("RUNNING")
        yield 10
        begin(study, first, job.elements[0])  # signs of life stop later: that it is over is known already
        begin(study, second, job.elements[1])
        site.slurm.put("TIMEOUT", [job.elements[0]])
        site.slurm.put("OUT_OF_MEMORY", [job.elements[1]])
        site.slurm.forget()
        yield 10 * batches.Queue.ABSENT
        assert rundir.status(study, first)["state"] == "interrupted"
        assert rundir.status(study, second)["retries"] == {"oom_host": 1}
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0


# What Slurm says of a job with a run in hand -> the run's state, its reason, what counts as an attempt.
VERDICTS = {
    "PREEMPTED": ("interrupted", "preempted: ", {}),
    "TIMEOUT": ("interrupted", "timeout: ", {}),
    "DEADLINE": ("interrupted", "timeout: ", {}),
    "OUT_OF_MEMORY": ("planned", "once more after oom_host: ", {"oom_host": 1}),
    "NODE_FAIL": ("planned", "once more after node: ", {"node": 1}),
    "BOOT_FAIL": ("planned", "once more after node: ", {"node": 1}),
    "FAILED": ("planned", "once more after lost: ", {"lost": 1}),
    "COMPLETED": ("planned", "once more after lost: ", {"lost": 1}),
}


def test_every_end_of_a_job_has_a_consequence():
    assert failures.ENDED_AS.keys() <= VERDICTS.keys() <= slurm.OVER
    for verdict, kind in failures.ENDED_AS.items():
        assert VERDICTS[verdict][1].removeprefix("once more after ") == f"{kind}: "


@pytest.mark.parametrize("seeds", [1, 2], ids=["job", "array"])
@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_job_that_ends_with_its_run_is_followed_by_one_that_does_better(site, tmp_path, verdict, seeds):
    study = planned(tmp_path, arm(seeds=seeds))
    run, *others = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        begin(study, run, job.elements[0])
        site.slurm.put("RUNNING")
        yield 10
        site.slurm.put(verdict, [job.elements[0]])  # at once, however lively it was
        yield 10
        status = rundir.status(study, run)
        reason = f"{VERDICTS[verdict][1]}job {job.elements[0]} ended as {verdict}"
        assert (status["state"], status["reason"]) == (VERDICTS[verdict][0], reason)
        assert (status.get("retries") or {}) == VERDICTS[verdict][2]
        again = site.jobs[1]
        assert tasks([again]) == [[run]]
        assert again.options["mem"] == ("4GB" if verdict == "OUT_OF_MEMORY" else "2GB")
        assert states(study, others) == ["planned"] * (seeds - 1)
        work(site.slurm)
        for other in others:
            end(study, other)
        yield 20

    assert site.launch(study, story=story) == 0
    assert len(site.jobs) == 2


@pytest.mark.parametrize("verdict", ["NODE_FAIL", "BOOT_FAIL"])
def test_the_next_job_avoids_a_machine_that_failed(site, tmp_path, verdict):
    study = planned(tmp_path)
    (run,) = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        begin(study, run, job.id, host="n7")
        site.slurm.put(verdict)
        yield 10
        assert site.jobs[1].options["exclude"] == "n7,n[1-3]"
        work(site.slurm)
        yield 20

    assert site.launch(study, "--slurm", "exclude=n[1-3]", story=story) == 0


def test_a_run_that_is_too_large_for_twice_the_memory_has_failed(site, tmp_path):
    study = planned(tmp_path)
    (run,) = runs(study)

    def story() -> Story:
        for number in range(2):
            begin(study, run, site.jobs[number].id)
            site.slurm.put("OUT_OF_MEMORY", [site.jobs[number].id])
            yield 20

    assert site.launch(study, story=story) == 1
    assert rundir.status(study, run)["reason"] == f"oom_host: job {site.jobs[1].id} ended as OUT_OF_MEMORY, 2 times"
    assert len(site.jobs) == 2


def test_a_claim_that_is_another_jobs_by_now_stays_with_it(site, tmp_path):
    study = planned(tmp_path)
    (run,) = runs(study)

    def story() -> Story:
        begin(study, run, "another")
        site.slurm.put("FAILED")
        yield 60
        assert (states(study), len(site.jobs)) == (["running"], 1)
        end(study, run)
        yield 10

    assert site.launch(study, story=story) == 0


@pytest.mark.parametrize("began", [False, True])
def test_a_job_that_somebody_cancels_cancels_its_run_until_the_next_launch(site, tmp_path, began):
    study = planned(tmp_path)
    (run,) = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        if began:
            begin(study, run, job.id)
        site.slurm.put("CANCELLED")
        yield 20

    assert site.launch(study, story=story) == 130
    status = rundir.status(study, run)
    assert (status["state"], status["reason"]) == ("cancelled", f"job {site.jobs[0].id} ended as CANCELLED")
    assert len(site.jobs) == 1

    assert site.launch(study) == 0
    assert len(site.jobs) == 2


@pytest.mark.parametrize("began", [False, True])
def test_a_job_that_was_cancelled_while_nobody_waited_is_done_by_whoever_launches_next(site, tmp_path, began):
    study = planned(tmp_path)
    assert site.detach(study) == 0
    (run,) = runs(study)
    if began:
        begin(study, run, site.jobs[0].id)
    site.slurm.put("CANCELLED")
    assert site.launch(study) == 0
    assert len(site.jobs) == 2
    assert not rundir.status(study, run).get("retries")  # nothing went wrong


@pytest.mark.parametrize("verdict", ["FAILED", "COMPLETED", "NODE_FAIL"])
def test_jobs_that_end_before_they_begin_their_run_are_not_sent_for_ever(site, tmp_path, capsys, verdict):
    study = planned(tmp_path, arm(seeds=2), arm(codebook=32))
    (other,) = of(study, 32)

    def story() -> Story:
        for _ in range(dispatch.FRUITLESS):
            assert "failed" not in states(study)
            for job in site.jobs:
                bad = [element for element, runs in zip(job.elements, tasks([job]), strict=True) if other not in runs]
                site.slurm.put(verdict, [element for element in bad if site.slurm.states()[element] in ACTIVE])
            yield 10
        assert states(study, of(study, 16)) == ["failed"] * 2
        end(study, other)
        yield 10

    with pytest.MonkeyPatch.context() as patch:  # what is tidied up is looked at here
        patch.setattr(dispatch.Cluster, "tidy", lambda self, batch: None)
        assert site.launch(study, story=story) == 2
    error = capsys.readouterr().err
    assert error.count("submit: 3 jobs ended before they began it; see ") == 2
    named = error.partition("; see ")[2].splitlines()[0]
    assert Path(named).parents[2].resolve() in list(rundir.launches_folder(study).iterdir())
    assert named.endswith("/*/*/*_log.out")

    assert site.launch(study) == 0  # without --retry


def test_jobs_that_get_on_with_their_pack_are_not_fruitless(site, tmp_path):
    study = planned(tmp_path, arm(seeds=6), job_min=60)

    def story() -> Story:
        for number in range(6):
            job = site.jobs[number]
            assert len(record(job).runs(0)) == 6 - number
            run = record(job).runs(0)[0]
            begin(study, run, job.id).release()
            end(study, run)
            site.slurm.put("NODE_FAIL", [job.id])
            yield 20

    assert site.launch(study, story=story) == 0


def test_what_a_node_could_not_start_is_released(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))

    def story() -> Story:
        held = site.jobs[0].elements[1]
        site.slurm.put("PENDING", [held], why=slurm.HELD)
        yield 20
        assert site.slurm.calls("scontrol")[-1:] == [["release", held]]
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 0
    assert len(site.jobs) == 1


def test_a_job_that_will_never_start_is_taken_back_and_its_runs_say_so(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=2))
    first, second = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        stuck = next(element for element, run in zip(job.elements, (first, second), strict=True) if run == first)
        site.slurm.put("PENDING", [stuck], why="PartitionTimeLimit")
        yield 20
        assert states(study, [first]) == ["failed"]
        assert ["scancel", stuck] in [["scancel", *call] for call in site.slurm.calls("scancel")]
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 2  # the user's to mend, and tried again by the next launch
    assert "submit: Slurm will never start its job (PartitionTimeLimit)" in capsys.readouterr().err
    assert states(study, [second]) == ["done"]


# --- stopped ---------------------------------------------------------------------------------------------------------


def cancelled(study: Path, *run_ids: str) -> int:
    return launch.main([str(study), "--cancel", *run_ids])


def test_runs_that_are_done_are_not_cancelled_although_their_job_is_still_ending(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=2))
    assert site.launch(study) == 0
    capsys.readouterr()
    assert batches.opened(study)  # nobody has looked since
    assert cancelled(study) == 0
    assert capsys.readouterr().out == "nothing is running\n"
    assert states(study) == ["done", "done"]


def test_a_mistake_in_a_setting_is_one_whether_there_is_anything_to_do_or_not(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=2))
    assert site.launch(study) == 0
    assert launch.main([str(study), "--stage", "tokenizer", "--cluster", "slurm", "--slurm", "partitio=x"]) == 2
    assert capsys.readouterr().err.startswith("--slurm: got 'partitio=x'; allowed: KEY=VALUE of partition,")


def test_who_cancels_everything_empties_the_queue_and_the_next_launch_fills_it_again(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=3))
    first, *others = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        claim = begin(study, first, job.elements[0])
        site.slurm.put("RUNNING", [job.elements[0]])
        yield 10
        assert cancelled(study) == 0
        assert "1 runs were asked to save and stop, 2 that waited are cancelled" in capsys.readouterr().out
        assert claim.cancelled()
        assert list(site.slurm.states().values()) == ["RUNNING", "CANCELLED", "CANCELLED"]
        assert states(study, others) == ["cancelled"] * 2
        yield 10
        assert states(study, [first]) == ["running"]  # it saves
        end(study, first, "cancelled", "asked to stop at step 3")
        site.slurm.put("FAILED", [job.elements[0]])
        yield 10

    assert site.launch(study, story=story) == 130
    assert "3 cancelled" in capsys.readouterr().out
    assert len(site.jobs) == 1
    assert site.launch(study) == 0
    assert states(study) == ["done"] * 3


def test_who_cancels_everything_also_stops_what_was_not_handed_over_yet(site, tmp_path):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", BUSY, times=None)

    def story() -> Story:
        assert cancelled(study) == 0
        yield 60

    assert site.launch(study, story=story) == 130
    site.slurm.heal("sbatch")
    assert site.launch(study) == 0


def test_who_cancels_everything_wants_no_new_jobs_while_the_last_runs_save(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))
    first, _ = runs(study)

    def story() -> Story:
        (job,) = site.jobs
        for run_id, element in zip(runs(study), job.elements, strict=True):
            begin(study, run_id, element)
        site.slurm.put("RUNNING")
        yield 10
        assert cancelled(study) == 0
        site.slurm.put("NODE_FAIL", job.elements[1:])
        yield 20
        assert states(study) == ["running", "planned"]
        end(study, first, "cancelled", "asked to stop at step 3")
        yield 10

    assert site.launch(study, story=story) == 130
    assert len(site.jobs) == 1
    assert site.launch(study) == 0


def test_what_was_cancelled_while_nobody_waited_is_done_by_whoever_launches_next(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2))
    assert site.detach(study) == 0
    assert cancelled(study) == 0
    assert states(study) == ["cancelled"] * 2
    assert site.launch(study) == 0
    assert [job.tasks for job in site.jobs] == [2, 2]


def test_who_cancels_some_runs_gets_the_others(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=5))
    first, second, *_ = runs(study)

    def story() -> Story:
        assert cancelled(study, first, second) == 0
        assert "2 that waited are cancelled" in capsys.readouterr().out
        found = zip(tasks(site.jobs), site.slurm.states().values(), strict=True)
        assert {run_id for (run_id,), state in found if state == "CANCELLED"} == {first, second}
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 130
    assert Counter(states(study)) == {"done": 3, "cancelled": 2}
    assert site.launch(study) == 0
    assert [job.tasks for job in site.jobs] == [5, 2]
    assert states(study) == ["done"] * 5


def test_a_job_some_of_whose_runs_are_cancelled_does_the_others(site, tmp_path):
    study = planned(tmp_path, arm(seeds=2), job_min=60)
    first, _ = runs(study)

    def story() -> Story:
        assert cancelled(study, first) == 0
        assert list(site.slurm.states().values()) == ["PENDING"]
        work(site.slurm)
        yield 20

    assert site.launch(study, story=story) == 130
    assert states(study) == ["cancelled", "done"]
    assert site.launch(study) == 0
    assert (states(study), len(site.jobs)) == (["done"] * 2, 2)


def test_all_waiting_jobs_are_cancelled_although_some_are_forgotten_by_now(site, tmp_path):
    study = planned(tmp_path, arm(seeds=3))
    assert site.detach(study) == 0
    forgotten = [f"0_{task}" for task in range(600)]  # more than one command line takes
    assert slurm.cancel([*site.jobs[0].elements, *forgotten]) == "scancel: error: Invalid job id 0_0"
    assert set(site.slurm.states().values()) == {"CANCELLED"}
    assert [len(words) for words in site.slurm.calls("scancel")] == [500, 103]


ALIKE = "the first 3 runs failed alike, code: ZeroDivisionError: x"


def test_runs_like_those_that_failed_alike_are_let_go_and_others_go_on(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=8), arm(codebook=32, seeds=8, threads=2))

    def story() -> Story:
        canary, rest = (job for job in site.jobs if job.options["cpus-per-task"] == "1")
        bucket = record(canary).bucket
        for run_id in record(canary).runs(0):
            end(study, run_id, "failed", "code: ZeroDivisionError: x")
            why = ledger.note(bucket, run_id, "failed", "code: ZeroDivisionError: x")
        assert why == ALIKE
        (bucket / "stop").write_text(ALIKE)
        site.slurm.put("RUNNING", rest.elements[:1])  # it will see the flag itself
        site.slurm.put("FAILED", [canary.id])
        yield 10
        found = site.slurm.states()
        assert [found[element] for element in rest.elements] == ["RUNNING"] + ["CANCELLED"] * 4
        assert {found[element] for job in site.jobs if job not in (canary, rest) for element in job.elements} == {
            "PENDING"
        }
        for _ in range(3):
            work(site.slurm)
            yield 10

    assert site.launch(study, story=story) == 1
    assert f"tokenizer: stopped ({ALIKE})" in capsys.readouterr().err
    assert Counter(states(study, of(study, 16))) == {"failed": 3, "planned": 5}
    assert states(study, of(study, 32)) == ["done"] * 8
    before = len(site.jobs)
    assert site.launch(study, "--retry") == 0  # mended: nobody is held back by what was
    assert len(site.jobs) > before
    assert set(states(study)) == {"done"}


def test_a_full_disk_stops_everything_at_once(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=2), arm(codebook=32, threads=2))
    full = "storage: OSError: No space left on device"

    def story() -> Story:
        launched = record(site.jobs[0]).bucket.parent
        (launched / "stop").write_text(full)
        yield 60

    assert site.launch(study, story=story) == 1
    assert f"tokenizer: stopped ({full})" in capsys.readouterr().err
    assert set(site.slurm.states().values()) == {"CANCELLED"}
    assert set(states(study)) == {"planned"}
    assert site.launch(study) == 0


def test_a_flag_is_for_whoever_waits_for_the_jobs_that_look_at_it(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=2))
    assert site.detach(study) == 0

    def story() -> Story:
        (record(site.jobs[0]).bucket / "stop").write_text(ALIKE)
        yield 60

    assert site.launch(study, story=story) == 1
    assert f"tokenizer: stopped ({ALIKE})" in capsys.readouterr().err
    assert len(site.jobs) == 1


def test_jobs_that_were_stopped_while_nobody_waited_make_room_for_others(site, tmp_path):
    study = planned(tmp_path, arm(seeds=4))
    assert site.detach(study, "--slurm", "parallel=2") == 0
    (record(site.jobs[0]).bucket / "stop").write_text(ALIKE)
    assert site.detach(study, "--slurm", "parallel=2") == 0
    assert set(site.slurm.states().values()) == {"CANCELLED", "PENDING"}
    assert [(job.tasks, job.at_once) for job in site.jobs] == [(4, 2), (4, 2)]


# --- several launches, and their end ---------------------------------------------------------------------------------


def test_two_launches_at_once_hand_every_run_over_once(site, tmp_path):
    site.slurm.max_array = 7
    study = planned(tmp_path, arm(seeds=30), arm(codebook=32, seeds=5, threads=2))
    done: Counter[str] = Counter()

    def counted(job: Submitted, task: int) -> str:
        done.update(record(job).runs(task))
        return worked(job, task)

    both = [site.start(study), site.start(study)]
    waited(lambda: sum(job.tasks for job in site.jobs) >= 33)
    with Worker(site.slurm, counted):
        for process in both:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0, output
            assert "35 of 35 runs done" in output
    assert done == Counter(runs(study))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_a_launch_leaves_its_jobs_alone_and_is_told_how_to_go_on(site, tmp_path, number):
    study = planned(tmp_path, arm(seeds=2))
    process = site.start(study)
    waited(lambda: len(site.slurm.calls("squeue")) > 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    said = "detached: jobs go on. The same command waits for them again; python -m sweep.launch "
    assert f"{said}{os.path.relpath(study, ROOT)} --cancel ends them" in output
    assert "stopped before the end; the same command resumes" in output
    assert set(site.slurm.states().values()) == {"PENDING"}
    assert not site.slurm.calls("scancel")
    assert site.launch(study) == 0
    assert len(site.jobs) == 1


def test_ctrl_c_during_a_submission_is_heard_after_it(site, tmp_path):
    study = planned(tmp_path)
    site.slurm.answer("sbatch", code=0, obeys=True, hangs_s=0.3)
    process = site.start(study)
    waited(lambda: site.slurm.calls("sbatch"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert [batch.job for batch in batches.opened(study)] == [site.jobs[0].id]


def test_who_detaches_is_told_what_was_handed_over(site, tmp_path, capsys):
    study = planned(tmp_path, arm(seeds=3), arm(codebook=32, seeds=2, pack=2))
    assert site.detach(study) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "tokenizer: 5 of 5 runs to do, on Slurm",
        "tokenizer: 4 jobs have 5 runs to do; the same command without --detach waits for them",
    ]
    assert not captured.err
    assert not rundir.stamp_file(study, "tokenizer").exists()


def test_a_launch_that_is_done_leaves_a_stamp_and_the_next_one_clears_up_after_its_jobs(site, tmp_path):
    measured = {"name": "few", "of": "tokenizer", "extractors": ["digits-supervised"], "samples": 32}
    study = planned(tmp_path, arm(seeds=2), evaluation=[measured])
    assert site.launch(study) == 0
    assert rundir.stamp_file(study, "tokenizer").exists()
    assert len(batches.opened(study)) == 1  # its job has just ended: nobody has asked Slurm yet
    site.slurm.forget()
    assert site.detach(study) == 0
    assert len(site.jobs) == 1

    def story() -> Story:
        yield 30
        work(site.slurm)
        yield 30

    assert site.launch(study, story=story, stage="evaluation") == 0
    assert [job.folder for job in site.jobs[1:]] == [batch.folder for batch in batches.opened(study)]
    assert launches(study) == [site.jobs[1].folder.parents[1]]


def test_a_run_that_somebody_else_has_done_meanwhile_is_not_handed_over(site, tmp_path, monkeypatch):
    study = planned(tmp_path)
    lease = rundir.lease

    def late(*where: Path) -> rundir.Lease | None:
        end(study, runs(study)[0])  # between the look at its record and the right to hand it over
        return lease(*where)

    monkeypatch.setattr(rundir, "lease", late)
    assert site.launch(study, story=lambda: iter([10.0])) == 0
    assert not site.jobs


def test_runs_that_are_built_on_others_are_handed_over_after_them(site, tmp_path, capsys):
    fields = {"family": "llama", "sizes": ["5k"], "train": {"batch": 8, "lr": 3.0e-3, "warmup": 2}}
    teacher = fields | {"name": "teacher", "steps": [4]}
    pupil = fields | {
        "name": "pupil",
        "steps": [400],
        "upstream": {"teacher": {"stage": "generator", "arm": "teacher"}},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GRID, "generator", [teacher, pupil])
        study = planned(tmp_path)
    assert site.launch(study) == 0
    assert site.detach(study, stage="generator") == 0
    assert "1 jobs have 1 runs to do; 1 wait for others: launch again when those are done; " in capsys.readouterr().out
    assert site.launch(study, stage="generator") == 0
    assert [job.tasks for job in site.jobs] == [1, 1, 1]
    assert set(states(study, runs(study, "generator"))) == {"done"}


# --- shares and packs ------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 300))
def test_shares_keep_to_the_jobs_at_a_time_and_leave_nobody_without(data, parallel):
    sizes = data.draw(st.lists(st.integers(1, 1001), max_size=parallel))
    caps = request.shares(parallel, sizes)
    assert len(caps) == len(sizes)
    assert all(1 <= cap <= size for cap, size in zip(caps, sizes, strict=True))
    assert sum(caps) == min(parallel, sum(sizes))


ASKED = request.Request(1, 1, 1, None, 2, 1, None, 15)
MEMBERS = st.tuples(
    st.integers(1, 5),  # runs of a checkpoint
    st.floats(0, 30, allow_subnormal=False),  # hours
    st.sampled_from([ASKED, ASKED._replace(mem_gib=4), ASKED._replace(pack=3), ASKED._replace(exclude="n1")]),
)


@given(st.lists(MEMBERS, max_size=40), st.floats(0, 600), st.sampled_from([None, 45, 1440]))
@settings(deadline=None)
def test_every_group_is_in_one_pack_of_a_job_that_asks_for_what_it_needs(members, job_min, longest):
    runtime = Runtime(job_min=job_min)
    held, wanted = [], {}
    for number, (count, hours, asked) in enumerate(members):
        rows = [{"run_id": f"{number}-{place}", "gpu_h_high": hours / count} for place in range(count)]
        held.append((rows, asked, runtime))
        wanted[tuple(row["run_id"] for row in rows)] = asked
    found: Counter[tuple[str, ...]] = Counter()
    for asked, timed in request.packed(held, request.Site(), slurm.Partition(longest)).items():
        assert asked.time_min in (*request.TIMES_MIN, longest)
        assert [minutes for minutes, _ in timed] == sorted((minutes for minutes, _ in timed), reverse=True) or job_min
        for minutes, pack in timed:
            assert minutes * 2 <= asked.time_min or asked.time_min in (longest, request.TIMES_MIN[-1])
            for group in pack:
                found[tuple(group)] += 1
                assert wanted[tuple(group)] == asked._replace(time_min=wanted[tuple(group)].time_min)
    assert found == Counter(dict.fromkeys(wanted, 1))
