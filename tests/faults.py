"""How does a test launch a study on a real Slurm, and see what becomes of it?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from sweep import launch, plan, rundir, tables
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


def final(study: Path, run_id: str, point: int) -> bytes:
    return (rundir.point_file(study, run_id, point).parent / "point.safetensors").read_bytes()


def rows(study: Path, table: str) -> list[dict[str, Any]]:
    return [row for part in tables.parts(study, table) for row in tables.read(part, table).to_pylist()]


LONG = "[1500]"  # steps, half a minute of them


def preempts(slurm: Cluster, study: Path, run_id: str) -> None:
    """Let a job of more weight take the node of a run; returns when the run has made room."""
    node = slurm.job(element(study, run_id)).node
    slurm.submit("sleep 3", "--partition=urgent", f"--nodelist={node}", "--exclusive")
    waited(lambda: state(study, run_id) == "interrupted", what=f"{run_id} is interrupted")
    assert rundir.status(study, run_id)["reason"].startswith("preempted: asked to stop at step ")


def end() -> None:
    """Kill the launches that a test has left behind."""
    for launcher in Launcher.started:
        launcher.process.kill()
        launcher.process.communicate()
    Launcher.started.clear()
