"""Does a study come out whole when workers, launchers and Slurm's daemons are killed at random moments?

pytest tests/test_chaos.py                    # a short one
pytest tests/test_chaos.py -m slow            # a hundred kills and more; writes tests/chaos.csv
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sweep import launch, plan, rundir, source, tables, worker
from sweep.attempt import Stop
from tests import cluster
from tests.cluster import Cluster

ROOT = Path(launch.__file__).parents[1]
TABLE = Path(__file__).with_name("chaos.csv")
GRID = """
study: chaos
data: {{family: digits, views: 1, views_heldout: 1}}
tokenizer:
  family: vq
  fields: {{width: 4, tokens: 16, codebook: 16, attention: false}}
  steps: [{steps}]
  train: {{batch: 8, lr: 2.0e-3, warmup: 2}}
  seeds: {seeds}
evaluation:
  - {{name: rebuilt, of: tokenizer, extractors: [digits-supervised], samples: 32}}
run: {{threads: 1, log_every: 5, save_every_s: 0.3, job_min: 0.3}}  # three runs, by the overhead of each, share a job
price: {{device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7], overhead_s: 6}}
"""
STAGES = ("tokenizer", "evaluation")


def planned(folder: Path, steps: int, runs: int) -> Path:
    """A study of as many runs, half of them tokenizers and half their measurements."""
    folder.mkdir(exist_ok=True)
    (folder / "grid.yaml").write_text(GRID.format(steps=steps, seeds=list(range(runs // 2))))
    result = plan.plan(plan.load(folder / "grid.yaml"), folder / "results")
    plan.write(result)
    return result.study.resolve()


def quiet(study: Path, folder: Path) -> Path:
    """The same study with nothing in its way, run in this process."""
    other = folder / study.name
    for row in tables.plan(study, ["run_id", "config"]):
        rundir.register(other, json.loads(row["config"]))
        assert worker.work(other, row["run_id"], Stop()) == "done"
    return other


def results(study: Path) -> tuple[dict[str, bytes], set[tuple[Any, ...]]]:
    """Weights of every point, and every measured value, as they are now."""
    weights = {str(path.relative_to(study)): path.read_bytes() for path in study.glob("runs/*/points/*/*.safetensors")}
    assert not tables.compact(study)
    curves = pq.read_table(rundir.compact_file(study, "curves")).to_pylist()
    names = ("run_id", "step", "metric", "split", "reference", "extractor", "value")
    return weights, {tuple(row[name] for name in names) for row in curves}


@dataclass
class Chaos:
    """A launch of one stage after the other, and what is done to it at random moments, by a seed."""

    slurm: Cluster
    study: Path
    seed: int
    pause_s: tuple[float, float]  # between two blows
    most: int  # after so many the study is left in peace
    blows: Counter[str] = field(default_factory=Counter)
    launches: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.down: dict[str, float] = {}  # daemons to start again, and when

    # --- blows; each says whether it hit ---

    def launcher(self) -> bool:
        self.process.kill()
        return True

    def at_work(self) -> bool:
        """A process that trains or measures."""
        return self._kill([status["pid"] for status in self._running()])

    def task(self) -> bool:
        """The parent of one, which minds it and speaks with Slurm."""
        parents = []
        for status in self._running():
            try:
                parents.append(int(Path(f"/proc/{status['pid']}/stat").read_text().rpartition(")")[2].split()[1]))
            except FileNotFoundError:
                continue
        return self._kill([pid for pid in parents if pid > 1])

    def controller(self) -> bool:
        return self._daemon("slurmctld")

    def node(self) -> bool:
        """A slurmd; what its jobs run lives on."""
        return self._daemon(self.dice.choice(self.slurm.names))

    def credentials(self) -> bool:
        return self._daemon("munged")

    def requeue(self) -> bool:
        jobs = [job for job in self._jobs() if job.state == "RUNNING"]
        return bool(jobs) and self.slurm.ask("scontrol", "requeue", self.dice.choice(jobs).id).returncode == 0

    def _running(self) -> list[dict[str, Any]]:
        statuses = (rundir.status(self.study, row["run_id"]) for row in tables.plan(self.study, ["run_id"]))
        return [status for status in statuses if status["state"] == "running"]

    def _kill(self, pids: list[int]) -> bool:
        if not pids:
            return False
        try:
            os.kill(self.dice.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _daemon(self, name: str) -> bool:
        if self.down:  # one at a time, or nothing would ever get done
            return False
        self.slurm.kill(name, noticed=False)
        self.down[name] = time.monotonic() + self.dice.uniform(0.5, 3)
        return True

    def _jobs(self) -> list[cluster.Job]:
        try:
            return self.slurm.jobs()
        except RuntimeError:  # there is no controller now
            return []

    # --- the study ---

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for stage in STAGES:
            while not self._launched(stage, deadline):
                assert time.monotonic() < deadline, f"{stage} does not come to an end"
        for name in self.down:
            self.slurm.restart(name)
        self.down.clear()

    def _launched(self, stage: str, deadline: float) -> bool:
        """Launch a stage, until it is done (True) or the launcher is gone."""
        command = [sys.executable, "-m", "sweep.launch", str(self.study), "--stage", stage, "--cluster", "slurm"]
        more = ["--poll-s", "0.5", "--slurm", "gpu=no", "parallel=4"]
        self.launches += 1
        with (self.study.parent / "launches.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, *more], cwd=ROOT, env=os.environ | self.slurm.environment(), stdout=log, stderr=log
            )
        strike = time.monotonic() + self.dice.uniform(*self.pause_s)
        while self.process.poll() is None and time.monotonic() < deadline:
            for name in [name for name, when in self.down.items() if when < time.monotonic()]:
                self.slurm.restart(name)
                del self.down[name]
            if time.monotonic() > strike and self.blows.total() < self.most:
                strike = time.monotonic() + self.dice.uniform(*self.pause_s)
                blow = self.dice.choice(BLOWS)
                self.blows[blow] += bool(getattr(self, blow)())
            time.sleep(0.05)
        self.process.kill()
        return self.process.wait() == 0


BLOWS = ("launcher", "at_work", "at_work", "task", "controller", "node", "credentials", "requeue")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    if why := cluster.missing():
        pytest.skip(f"no Slurm: {why}")
    held = Cluster(tmp_path / "slurm", max_array=11)
    try:
        held.start()
        yield held
    finally:
        held.stop()


def whole(study: Path, undisturbed: tuple[dict[str, bytes], set[tuple[Any, ...]]]) -> tuple[int, int]:
    """Runs that are lost, and results that are there twice; what is there is that of the undisturbed study."""
    ids = [row["run_id"] for row in tables.plan(study, ["run_id"])]
    lost = sum(rundir.status(study, run_id)["state"] != "done" for run_id in ids)
    problems = tables.verify(study)
    tables.compact(study)
    current = Counter(row["run_id"] for row in pq.read_table(rundir.compact_file(study, "runs")).to_pylist())
    twice = sum(count > 1 for count in current.values()) + sum(problem.kind == "twice" for problem in problems)
    assert not problems
    assert sorted(current) == sorted(ids)
    mine = results(study)
    assert mine[0] == undisturbed[0]
    assert mine[1] == undisturbed[1]
    return lost, twice


@pytest.mark.timeout(900)
def test_a_study_comes_out_whole(slurm, tmp_path):
    study = planned(tmp_path / "disturbed", steps=60, runs=20)
    undisturbed = results(quiet(study, tmp_path / "quiet"))
    chaos = Chaos(slurm, study, seed=1, pause_s=(0.5, 4.0), most=14)
    chaos.run(seconds=600)
    assert whole(study, undisturbed) == (0, 0)
    assert chaos.blows.total() >= 10, chaos.blows


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_blows(tmp_path):
    if why := cluster.missing():
        pytest.skip(f"no Slurm: {why}")
    done: list[dict[str, Any]] = []
    undisturbed = None
    for seed in range(1, 5):
        folder = tmp_path / f"seed{seed}"
        study = planned(folder, steps=400, runs=24)
        undisturbed = undisturbed or results(quiet(study, tmp_path / "quiet"))
        held = Cluster(folder / "slurm", max_array=11)
        began = time.monotonic()
        try:
            held.start()
            chaos = Chaos(held, study, seed, pause_s=(0.5, 5.0), most=60)
            chaos.run(seconds=1800)
        finally:
            held.stop()
        lost, twice = whole(study, undisturbed)
        assert (lost, twice) == (0, 0)
        kills = {name: chaos.blows[name] for name in dict.fromkeys(BLOWS)}
        done.append(
            {"seed": seed, "runs": 24, **kills, "all": sum(kills.values()), "launches": chaos.launches}
            | {"runs_lost": lost, "results_twice": twice, "time_min": round((time.monotonic() - began) / 60, 1)}
        )
    commit = str(source.provenance()["commit"])[:12]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["date", "commit", *done[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit, **row} for row in done)
    assert sum(row["all"] for row in done) >= 100
