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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from models import config as families
from sweep import failures, rundir, source, tables

if TYPE_CHECKING:
    from sweep.worker import Team

POLL_S = 0.5  # between two looks at the flag files
STATUS_S = 2.0  # between two updates of a run's progress
GRANTED = 3  # attempts in a row that were cut off before they saved anything

State = Literal["done", "diverged", "failed", "cancelled", "interrupted"]


class Ended(NamedTuple):
    state: State
    reason: str | None = None


# --- being asked to stop -----------------------------------------------------------------------------------------


class Stop:
    """Was this process asked to stop? By a signal, or by a file that appears.

    ``flags`` are of the launch, and of those of its runs that are alike: somebody does not want them now. ``job`` is
    written where the process has to make room, and says in one word why (a class of ``failures``): the run is
    interrupted and goes on when its job does. A process whose ``parent`` is gone has lost its job.
    """

    def __init__(self, *flags: Path, job: Path | None = None, parent: int | None = None) -> None:
        self.flags, self.job, self.parent = flags, job, parent
        self.raised = False
        self.kind: str | None = None  # of the interruption

    def listen(self) -> None:
        """Let signals set the flag; a second Ctrl-C kills."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _signalled(self, number: int, frame: object) -> None:
        self.raised = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def spread(self, reason: str, flag: Path | None = None) -> None:
        """Stop this process and every other one that looks at ``flag``; at that of the launch, where none is named."""
        self.raised = True
        if flag is not None or self.flags:
            flag = flag or self.flags[0]
            staged = flag.with_name(f".{flag.name}-{os.getpid()}")
            try:
                staged.write_text(reason)
            except OSError:  # a full disk may be the reason: the flag alone has to do
                with contextlib.suppress(OSError):
                    staged.write_bytes(b"")
            with contextlib.suppress(OSError):
                os.replace(staged, flag)  # whoever sees the flag sees the reason

    def __call__(self) -> bool:
        if not self.raised and any(flag.exists() for flag in self.flags):
            self.raised = True
        if not self.raised and self.job is not None and self.job.exists():
            self.kind, self.raised = self.job.read_text(), True
        if not self.raised and self.parent is not None and os.getppid() != self.parent:
            self.kind, self.raised = "preempted", True
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
    team: Team | None = None
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

    def begin(self, **here: Any) -> Ended | None:
        """Say that the run is worked on; its end instead, where attempt after attempt got no further.

        What ended the one before without its consent, an interruption or a death, may do so for ever: each has to leave
        a checkpoint that was not there before.
        """
        before = rundir.status(self.study, self.run_id)
        mark = rundir.mark_of(self.study, self.run_id)
        kind = str(before.get("reason")).partition(":")[0] if before["state"] == "interrupted" else "lost"
        cut_off = before["state"] in ("interrupted", "running")
        fruitless = before.get("fruitless", 0) + 1 if cut_off and before.get("mark") == mark else 0
        if fruitless > GRANTED:
            return Ended("failed", f"{kind}: {fruitless} attempts in a row ended before they saved anything")
        self.claim.update(state="running", reason=None, traceback=None, fruitless=fruitless, mark=mark, **here)
        return None

    def retry(self, ended: Ended) -> tuple[str, dict[str, Any]]:
        """What becomes of a run whose attempt failed, and what its status then says, by the policy of the failure."""
        status = rundir.status(self.study, self.run_id)
        kind = failures.kind({"state": ended.state, "reason": ended.reason}) or "code"
        policy = failures.POLICY[kind]
        if policy.stops_study:
            self.stop.spread(ended.reason or kind)
        if (change := failures.again(kind, status, self.config)) is None:
            return "failed", {}
        elsewhere = policy.where == "elsewhere" or self.team is not None  # ranks are out of step now
        if kind == "node":
            host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
            change["exclude"] = sorted({*status.get("exclude", ()), host})
        self.note("retry", reason=ended.reason, **change)
        change |= {"state": "planned", "reason": f"once more after {ended.reason}"}
        return "elsewhere" if elsewhere else "again", change

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

    def end(self, ended: Ended, trace: str | None = None, witnessed: bool = True, **fields: Any) -> None:
        """Write what is left of the rows, the row of the run, and its last status, in this order.

        ``witnessed`` is false where another process says so of a worker that is gone. ``fields`` go into the status
        too: a run that is to be tried again is planned, whatever became of the attempt.
        """
        spent = self.spent()
        self.curves.flush()
        self.images.flush()
        runs = tables.Writer(self.study, "runs", self.run_id, self.claim.attempt, self.claim.guard)
        runs.append([_row(self, ended, spent, witnessed)])
        runs.flush()
        self.note("ended", state=ended.state, reason=ended.reason)
        held = {"state": ended.state, "reason": ended.reason, "traceback": trace, "spent": spent}
        self.claim.update(**held | fields)


def abandoned(study: Path, config: dict[str, Any], kind: str, reason: str, gone: int | None = None) -> None:
    """A run that says it is running, but whose holder is gone: it goes on, once more, or it has failed.

    ``kind`` is the class of ``failures`` in which its holder went, ``reason`` how, in words; ``gone`` is an attempt
    that is known to be over although it may still look alive.
    """
    run_id, policy = config["run_id"], failures.POLICY[kind]
    holder = rundir.holder(study, run_id)
    if (claim := rundir.claim(study, run_id, gone)) is None:
        return
    with claim.held():
        status = rundir.status(study, run_id)
        if status["state"] != "running":
            return
        change: dict[str, Any] | None = None
        if not policy.resumes:
            change = failures.again(kind, status, config)
        if kind == "node" and change is not None and holder is not None and holder.node is not None:
            change["exclude"] = sorted({*status.get("exclude", ()), holder.node})
        if policy.resumes:
            claim.update(state="interrupted", reason=f"{kind}: {reason}")
        elif change is not None:
            claim.update(state="planned", reason=f"once more after {kind}: {reason}", **change)
        else:
            times = (status.get("retries") or {}).get(kind, 0) + 1
            attempt = Attempt(study, config, claim, Stop(), families.Runtime(**config["runtime"]))
            attempt.end(Ended("failed", f"{kind}: {reason}{f', {times} times' if times > 1 else ''}"), witnessed=False)
            return
        rundir.journal(study, run_id, "lost", attempt=claim.attempt, reason=f"{kind}: {reason}")


def _row(attempt: Attempt, ended: Ended, spent: dict[str, float], witnessed: bool) -> dict[str, Any]:
    """The row of table ``runs`` for an attempt that ended."""
    config, code = attempt.config, source.provenance()
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
        "commit": code["commit"],
        "dirty": code["dirty"],
        "versions": json.dumps(code["versions"]),
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
