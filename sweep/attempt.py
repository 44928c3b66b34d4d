"""How is one attempt of one run accounted for? Its claim, rows, progress, costs, end; and how it is asked to stop."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models import config as families
from sweep import rundir, tables

POLL_S = 0.5  # between two looks at the flag files
STATUS_S = 2.0  # between two updates of a run's progress

State = Literal["done", "diverged", "failed", "cancelled"]


class Ended(NamedTuple):
    state: State
    reason: str | None = None


# --- being asked to stop -----------------------------------------------------------------------------------------


class Stop:
    """Was this process asked to stop? By a signal, or by a file that appears (``--cancel``, the launcher)."""

    def __init__(self, flag: Path | None = None) -> None:
        self.flag, self.raised = flag, False

    def listen(self) -> None:
        """Let signals set the flag; a second Ctrl-C kills."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _signalled(self, number: int, frame: object) -> None:
        self.raised = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def spread(self, reason: str) -> None:
        """Stop this process and every other one of its launch."""
        self.raised = True
        if self.flag is not None:
            staged = self.flag.with_name(f".{self.flag.name}-{os.getpid()}")
            staged.write_text(reason)
            os.replace(staged, self.flag)  # whoever sees the flag sees the reason

    def __call__(self) -> bool:
        if not self.raised and self.flag is not None and self.flag.exists():
            self.raised = True
        return self.raised


# --- one run -----------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One attempt of one run: what it is, and what it has cost so far."""

    study: Path
    config: dict[str, Any]
    claim: rundir.Claim
    stop: Stop
    runtime: families.Runtime
    steps: int = 0  # trained by this attempt
    train_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    asked: bool = False
    looked: float = 0.0
    told: float = 0.0

    def __post_init__(self) -> None:
        run_id, attempt = self.config["run_id"], self.claim.attempt
        self.before = rundir.status(self.study, run_id).get("spent", {"steps": 0, "train_s": 0.0, "wall_s": 0.0})
        self.curves = tables.Writer(self.study, "curves", run_id, attempt, self.claim.guard)
        self.images = tables.Writer(self.study, "images", run_id, attempt, self.claim.guard)

    @property
    def run_id(self) -> str:
        return str(self.config["run_id"])

    def should_stop(self) -> bool:
        """Was this run, or the process, asked to stop? Looks at the disk twice a second at most."""
        if (now := time.monotonic()) - self.looked > POLL_S:
            self.looked = now
            self.asked = self.asked or self.stop() or self.claim.cancelled()
        return self.asked or self.stop.raised

    def save(self) -> None:
        """Called before anything is saved: the claim still holds, and no row is newer than the checkpoint."""
        self.claim.guard()
        self.curves.flush()

    def note(self, event: str, **fields: Any) -> None:
        rundir.journal(self.study, self.run_id, event, attempt=self.claim.attempt, **fields)

    def spent(self) -> dict[str, float]:
        """Steps and seconds of all attempts."""
        now: dict[str, float] = {"steps": self.steps, "train_s": self.train_s, "wall_s": time.monotonic() - self.began}
        return {name: value + self.before[name] for name, value in now.items()}

    def progress(self, **fields: Any) -> None:
        """Tell how far the run is, not too often."""
        if (now := time.monotonic()) - self.told > STATUS_S:
            self.told = now
            self.claim.update(sync=False, spent=self.spent(), **fields)

    def end(self, ended: Ended, trace: str | None = None, witnessed: bool = True) -> None:
        """Write what is left of the rows, the row of the run, and its last status, in this order.

        ``witnessed`` is false where another process says so of a worker that is gone.
        """
        spent = self.spent()
        self.curves.flush()
        self.images.flush()
        runs = tables.Writer(self.study, "runs", self.run_id, self.claim.attempt, self.claim.guard)
        runs.append([_row(self, ended, spent, witnessed)])
        runs.flush()
        self.note("ended", state=ended.state, reason=ended.reason)
        self.claim.update(state=ended.state, reason=ended.reason, traceback=trace, spent=spent)


def _row(attempt: Attempt, ended: Ended, spent: dict[str, float], witnessed: bool) -> dict[str, Any]:
    """The row of table ``runs`` for an attempt that ended."""
    config, source = attempt.config, rundir.provenance()
    plan = config["plan"]
    flops = plan.get("flops_per_step")  # evaluations have none
    trained = flops is not None and attempt.steps and attempt.train_s
    device, mem_peak_gib = _used(attempt.runtime) if witnessed else (None, None)
    return {
        **{name: config[name] for name in ("stage", "family", "label", "seed")},
        "status": ended.state,
        "reason": ended.reason,
        "steps": spent["steps"] if flops is not None else None,
        **{name: plan[name] for name in ("params_core", "params_total")},
        "flops_paid": plan["flops_sample"] + plan["flops_measure"] if flops is None else spent["steps"] * flops,
        "wall_s": spent["wall_s"],
        "train_s": spent["train_s"] if flops is not None else None,
        "flops_per_s": attempt.steps * flops / attempt.train_s if trained else None,
        "mem_peak_gib": mem_peak_gib,
        "device": device,
        "threads": attempt.runtime.threads,
        "host": socket.gethostname() if witnessed else None,
        "started": attempt.started if witnessed else None,
        "ended": datetime.now(UTC),
        "commit": source["commit"],
        "dirty": source["dirty"],
        "versions": json.dumps(source["versions"]),
    }


def _used(runtime: families.Runtime) -> tuple[str, float]:
    """Name of the device, and the peak of its memory (of the process, on a CPU) in GiB."""
    torch = sys.modules.get("torch")
    if torch is not None and runtime.device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return "cpu", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peaks() -> None:
    """Let the peak of memory be that of the next run alone, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
