"""How many runs an hour get done packed, against one job after the other? Generators of the default study, two cores.

    python tests/benchmarks/packing.py [--runs N] [--cluster slurm]

Three ways in one call, each on a copy of a study whose tokenizers are trained:
one by one: a process per run with all threads, one after the other, as a job per run would have it on this machine;
side by side: a process per run too, as many at a time as there are cores;
packed: what sweep.launch does, processes that live on and take one short run after the other.
With --cluster slurm the last two are jobs of a real Slurm in a temporary folder (root, slurm-wlm, munge): a job a run
(run.job_min 0) against short runs in series.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from sweep import plan, rundir, tables

ROOT = Path(plan.__file__).parents[1]
CORES = len(os.sched_getaffinity(0))


def planned(folder: Path, runs: int, **run: Any) -> Path:
    """The default study with one tokenizer seed and its cheapest generators."""
    held = yaml.safe_load((ROOT / "grid.yaml").read_text())
    held["tokenizer"] |= {"seeds": [0], "steps": [100]}
    held["generator"] |= {"sizes": ["5k", "25k"], "budgets": [3.0e9, 1.0e10], "seeds": list(range(-(-runs // 6)))}
    held["run"] |= run
    del held["evaluation"]
    folder.mkdir(exist_ok=True)
    (folder / "grid.yaml").write_text(yaml.safe_dump(held))
    made = plan.plan(plan.load(folder / "grid.yaml"), folder / "results")
    plan.write(made)
    return made.study.resolve()


def launched(study: Path, stage: str, *options: str) -> None:
    command = [sys.executable, "-m", "sweep.launch", str(study), "--stage", stage, *options]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def one_by_one(study: Path, run_ids: list[str], threads: int, abreast: int) -> None:
    """A process per run, ``abreast`` of them at a time."""
    waiting, running = list(run_ids), list[subprocess.Popen[str]]()
    while waiting or running:
        while waiting and len(running) < abreast:
            command = [sys.executable, "-m", "sweep.worker", waiting.pop(0), "--results", str(study)]
            running.append(
                subprocess.Popen([*command, "--threads", str(threads)], cwd=ROOT, stdout=subprocess.DEVNULL, text=True)
            )
        time.sleep(0.01)
        for process in [process for process in running if process.poll() is not None]:
            assert process.returncode == 0
            running.remove(process)


def timed(title: str, study: Path, work: Callable[[Path, list[str]], None], first: float | None) -> float:
    """Do the generators on a copy of the study; runs an hour, also as a ratio to the first way."""
    run_ids = [row["run_id"] for row in tables.plan(study, ["run_id", "stage"]) if row["stage"] == "generator"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / study.name
        shutil.copytree(study, copy, ignore=shutil.ignore_patterns(".submitit"))
        began = time.perf_counter()
        work(copy, run_ids)
        seconds = time.perf_counter() - began
        assert all(rundir.status(copy, run_id)["state"] == "done" for run_id in run_ids)
    rate = 3600 * len(run_ids) / seconds
    ratio = "" if first is None else f", {rate / first:.2f} times the first"
    print(f"{title:<14} {len(run_ids)} runs in {seconds:6.1f} s, {rate:6.0f} runs an hour{ratio}", flush=True)
    return rate


@contextlib.contextmanager
def slurm() -> Iterator[None]:
    spec = importlib.util.spec_from_file_location("cluster", ROOT / "tests" / "cluster.py")
    assert spec is not None
    assert spec.loader is not None
    cluster = importlib.util.module_from_spec(spec)
    sys.modules["cluster"] = cluster
    spec.loader.exec_module(cluster)
    with tempfile.TemporaryDirectory() as folder:
        held = cluster.Cluster(Path(folder), nodes=1, cpus=CORES)
        try:
            held.start()
            os.environ.update(held.environment())
            yield
        finally:
            held.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=12, metavar="N", help="generators, in steps of 6 (default: 12)")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = planned(Path(folder), options.runs)
        launched(study, "tokenizer")
        if options.cluster == "local":
            first = timed("one by one", study, lambda copy, ids: one_by_one(copy, ids, CORES, 1), None)
            timed("side by side", study, lambda copy, ids: one_by_one(copy, ids, 1, CORES), first)
            timed("packed", study, lambda copy, _: launched(copy, "generator"), first)
            return 0
        with slurm():
            jobs = ("--cluster", "slurm", "--slurm", "gpu=no")
            planned(Path(folder), options.runs, job_min=0)
            first = timed("a job a run", study, lambda copy, _: launched(copy, "generator", *jobs), None)
            planned(Path(folder), options.runs, job_min=10)
            timed("packed", study, lambda copy, _: launched(copy, "generator", *jobs), first)
    return 0


if __name__ == "__main__":
    sys.exit(main())
