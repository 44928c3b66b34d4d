"""Which jobs were handed to Slurm, and for which runs do they speak? A record per batch, written before submission.

A batch is one job, or one array; each of its tasks has a *pack* of runs to do. Its folder,
``.submitit/<launch>/<bucket>/<number>/``, holds ``batch.json`` for as long as a task of it may be alive, then
``closed.json``; beside it lies what submitit writes. Its name carries a random part, so that a job whose submitter died
before it could write the job's id down is found again by name. A record only coordinates: which run is done by whom is
said by claims, and what is finished by ``status.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sweep import rundir, slurm

OPEN, CLOSED = "batch.json", "closed.json"
SUBMITTING_S = 150.0  # longer than sbatch may take to answer: a job that is not known by then was never accepted

Pack = list[list[str]]  # groups of runs


@dataclass
class Batch:
    """``packs`` of the tasks, by index; a ``serial`` batch has one pack, which its tasks go on with in turn."""

    folder: Path
    name: str
    packs: list[Pack]
    tasks: int
    serial: bool
    request: dict[str, Any]  # what was asked of Slurm, see sweep.request
    alike: bool  # stop when the first runs fail alike
    launcher: dict[str, Any]  # the process that submitted it
    created: float  # seconds since the epoch
    job: str | None = None
    ended: dict[str, str | None] = field(default_factory=dict)  # task -> how, of those that were looked after

    def runs(self, task: int) -> list[str]:
        return [run_id for group in self.packs[0 if self.serial else task] for run_id in group]

    def element(self, task: int) -> str:
        """What Slurm calls a task."""
        return f"{self.job}_{task}" if self.tasks > 1 else str(self.job)

    def open_tasks(self) -> Iterator[int]:
        return (task for task in range(self.tasks) if str(task) not in self.ended)

    @property
    def bucket(self) -> Path:
        """The folder of the batches of one launch that ask for the same; its flag stops them."""
        return self.folder.parent

    @property
    def flags(self) -> tuple[Path, Path]:
        """Of the launch and of the bucket: runs stop, and no new one starts, where one of them is."""
        return self.bucket.parent / "stop", self.bucket / "stop"

    @property
    def stopped(self) -> bool:
        return any(flag.exists() for flag in self.flags)

    @property
    def why(self) -> str:
        """It was stopped; empty where it was not, or where a user cancelled everything."""
        return next(filter(None, (flag.read_text() for flag in self.flags if flag.exists())), "")

    def log(self, task: int) -> str:
        """Where to look when a task ended without a word, relative to here."""
        return os.path.relpath(self.folder / f"{self.element(task)}_0_log.out")

    def save(self, study: Path) -> None:
        """Write the record; a batch whose tasks have all ended is closed."""
        record = {name: value for name, value in asdict(self).items() if name != "folder"}
        rundir.atomic_write(study, self.folder / OPEN, record)
        if len(self.ended) == self.tasks:
            (self.folder / OPEN).rename(self.folder / CLOSED)

    def adopt(self, study: Path, job: str) -> None:
        """Write down the id of a job that was found by its name, and lay what submitit had not yet laid where it looks.

        The pickles of all tasks are alike (a function and this folder), so any of them will do.
        """
        self.job = job
        self.save(study)
        left = sorted(self.folder.glob("*.pkl"))
        for task in range(self.tasks):
            target = self.folder / f"{self.element(task)}_submitted.pkl"
            if left and not target.exists():
                staged = target.with_suffix(".adopted")
                shutil.copyfile(left[0], staged)
                staged.rename(target)


def read(folder: Path) -> Batch | None:
    """The batch of a folder, open or closed; None where its record is missing or unreadable."""
    for name in (OPEN, CLOSED):
        try:
            return Batch(folder, **json.loads((folder / name).read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
    return None


def opened(study: Path) -> list[Batch]:
    """All batches of a study that may have a task alive, oldest first."""
    found = (read(path.parent) for path in rundir.launches_folder(study).glob(f"*/*/*/{OPEN}"))
    return sorted((batch for batch in found if batch is not None), key=lambda batch: batch.created)


def covered(batches: list[Batch]) -> dict[str, tuple[Batch, int]]:
    """Run -> the latest task that is to do it, of tasks that nobody has looked after since they ended."""
    return {run_id: (batch, task) for batch in batches for task in batch.open_tasks() for run_id in batch.runs(task)}


class Queue:
    """What Slurm has said of tasks so far; silence is no answer, and one absence no proof."""

    ABSENT = 2  # answers in a row that do not show a task, after which it is over

    def __init__(self) -> None:
        self.states: dict[tuple[str, int], str] = {}  # (name, task) -> state in the last answer that showed it
        self.jobs: dict[str, str] = {}  # name -> job
        self.waits: dict[str, str] = {}  # element that has not started -> why
        self.lived: set[tuple[str, int]] = set()  # what some answer showed that was not over
        self.missing: dict[tuple[str, int], int] = {}
        self.silent_since: float | None = None
        self.silence = ""

    def look(self, batches: list[Batch]) -> None:
        """Ask once for everything."""
        tasks, failed = slurm.queue()
        if failed:
            self.silent_since = self.silent_since or time.monotonic()
            self.silence = failed
            return
        self.silent_since = None
        shown = {(task.name, task.place): task for task in tasks}
        self.jobs = {task.name: task.job for task in tasks}
        self.states |= {key: task.state for key, task in shown.items()}
        self.lived |= {key for key, task in shown.items() if task.state not in slurm.OVER}
        held = {batch.name: batch for batch in batches if batch.job is not None}
        waiting = ((key, task.why) for key, task in shown.items() if task.state == "PENDING" and key[0] in held)
        self.waits = {held[name].element(index): why for (name, index), why in waiting}
        for batch in batches:
            for index in batch.open_tasks():
                key = batch.name, index
                self.missing[key] = 0 if key in shown else self.missing.get(key, 0) + 1

    def alive(self, batch: Batch, task: int) -> bool:
        """May this task still do something?"""
        key = batch.name, task
        if self.missing.get(key, 0) == 0:
            return self.states.get(key, "?") not in slurm.OVER
        if batch.job is None:  # submitted at this moment, or by somebody who died over it: its sbatch may live on
            return time.time() - batch.created < SUBMITTING_S
        return self.missing[key] < self.ABSENT

    def over(self, batches: list[Batch]) -> list[tuple[Batch, int, str | None]]:
        """Tasks that are over and that nobody has looked after, and what Slurm called their end, where it said so."""
        tasks = [(batch, task) for batch in batches for task in batch.open_tasks() if not self.alive(batch, task)]
        unsaid = {
            batch.job for batch, task in tasks if batch.job and self.states.get((batch.name, task)) not in slurm.OVER
        }
        known = slurm.accounted(unsaid)
        found: list[tuple[Batch, int, str | None]] = []
        for batch, task in tasks:
            state = self.states.get((batch.name, task))
            if state not in slurm.OVER and batch.job is not None:
                state = known.get((batch.job, task if batch.tasks > 1 else None))
            found.append((batch, task, state if state in slurm.OVER else None))
        return found
