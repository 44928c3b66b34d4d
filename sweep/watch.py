"""Have all runs of a launch come to an end? Watched by what their own records say, whatever does the work.

``sweep.slots`` works with processes on this machine, ``sweep.dispatch`` with jobs of Slurm.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sweep import rundir
from sweep.progress import Progress

Row = dict[str, Any]

STOPPED = ("blocked", "cancelled")  # no attempt is to come in this launch
TICK_S = 0.25


def awaits(row: Row, runs: Container[str]) -> bool:
    """Is a run that this one is built on among ``runs``?"""
    return any(source.partition("@")[0] in runs for source in row["upstream"])


def groups(rows: Iterable[Row]) -> list[list[str]]:
    """Run ids in the order of work: longest first, all evaluations of a checkpoint together."""
    gathered: dict[str, list[Row]] = {}
    for row in rows:
        gathered.setdefault(row["checkpoint"] or row["run_id"], []).append(row)
    cost = {key: sum(row["flops_total"] or 0.0 for row in held) for key, held in gathered.items()}
    return [[row["run_id"] for row in gathered[key]] for key in sorted(gathered, key=lambda key: -cost[key])]


class Watch:
    """Runs that have to come to an end, and what a kind of place has to do for it."""

    def __init__(self, study: Path, rows: list[Row], configs: dict[str, Row], folder: Path) -> None:
        self.study, self.configs, self.folder = study, configs, folder
        self.rows = {row["run_id"]: row for row in rows}
        self.pending = dict.fromkeys(self.rows)
        self.outcomes: dict[str, Row] = {}
        self.records = rundir.Records(study)
        self.seen: dict[str, Row] = {}  # the last known status of runs that are or were pending
        self.signals = 0
        self.why = ""  # it was stopped, where not by a user

    # --- what a place does ---

    def about(self) -> str:
        """Where the work is done, for the first line of a launch."""
        raise NotImplementedError

    def tend(self) -> None:
        """Take over from whoever is gone, and see to it that every run has somebody to do it."""
        raise NotImplementedError

    def over(self, progress: Progress) -> bool:
        """Is there nothing more to wait for, although runs are pending? What is to be said about it is said."""
        raise NotImplementedError

    def queued(self) -> int:
        """Runs that wait in somebody else's queue."""
        return 0

    def leave(self) -> str:
        """Hand over what is to do and do not wait for it; what was done, in words."""
        raise NotImplementedError

    def close(self, keep: bool) -> None:
        """Clear up; ``keep`` what may have to be looked at."""
        raise NotImplementedError

    # --- the same everywhere ---

    def look(self) -> None:
        """Read what changed in the records of pending runs."""
        for run_id in list(self.pending):
            row, status = self.rows[run_id], self.records.status(run_id)
            self.seen[run_id] = status
            if status["state"] == "blocked" and awaits(row, self.pending):
                rundir.mark(self.study, run_id, "planned")  # what it is built on failed, and is tried again
            elif rundir.finished(self.study, status, row["points"], row["encode"]) or status["state"] in STOPPED:
                self.settle(run_id)

    def settle(self, run_id: str) -> None:
        """Let the last known status be the outcome of a run."""
        self.outcomes[run_id] = self.seen[run_id]
        del self.pending[run_id]

    def ready(self) -> Iterator[str]:
        """Pending runs that are built on no other pending one."""
        return (run_id for run_id in self.pending if not awaits(self.rows[run_id], self.pending))

    def worked(self) -> float:
        """Planned FLOPs that are behind, those of runs in progress included."""
        behind = sum(self.rows[run_id]["flops_total"] or 0.0 for run_id in self.outcomes)
        for run_id in self.pending:
            status = self.seen.get(run_id, {})
            if status.get("state") == "running" and status.get("steps"):
                behind += (self.rows[run_id]["flops_total"] or 0.0) * status.get("step", 0) / status["steps"]
        return behind

    def counts(self) -> tuple[int, int, int]:
        """Runs that ended well, run, failed."""
        states = Counter(status["state"] for status in self.outcomes.values())
        running = sum(self.seen.get(run_id, {}).get("state") == "running" for run_id in self.pending)
        return states["done"] + states["diverged"], running, states["failed"] + states["blocked"]

    def watch(self, progress: Progress, done: int) -> bool:
        """Until every run has an outcome (True), or the launch was stopped (False)."""
        with _signals(self._signalled):
            while True:
                began = time.monotonic()
                self.look()
                spent = time.monotonic() - began
                well, running, failed = self.counts()
                progress.show(done + well, running, failed, self.worked(), self.queued())
                if not self.pending:
                    return True
                if self.over(progress):
                    self.look()
                    return not self.pending
                self.tend()
                time.sleep(max(TICK_S, 5 * spent))  # most of the time is the workers'

    def _signalled(self) -> None:
        self.signals += 1


@contextmanager
def _signals(handle: Callable[[], None]) -> Iterator[None]:
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda *_: handle()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
