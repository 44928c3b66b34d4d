"""How do runs get done on this machine? Worker processes in slots, a device or a share of the cores each."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import Runtime
from sweep import ranks, rundir, source, worker
from sweep.attempt import Stop, abandoned
from sweep.progress import Progress
from sweep.sharing import sharing
from sweep.watch import Row, Watch, groups

if TYPE_CHECKING:
    import submitit

GRACE_S = 10.0  # for processes to end after the last run
FOREVER_MIN = 365 * 24 * 60  # submitit ends a local job after 2 minutes unless told otherwise


class Stillborn(RuntimeError):
    """Workers end before they get anything done."""


def devices() -> list[str]:
    """Names (numbers, or what stands in CUDA_VISIBLE_DEVICES) of the GPUs that this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(
    study: str, work: Sequence[Sequence[str]], launch: str, threads: int | None, device: str | None, alike: bool
) -> None:
    """Work off runs; what a process of a slot does.

    ``launch`` is the folder of the launch: the process registers there and stops when a file ``stop`` appears; with
    ``alike`` it stops all when the first runs fail alike. ``device`` names the GPUs that it may see. Where a run takes
    several devices, a slot is as many processes (sweep.ranks).
    """
    if device is not None:  # here and not by submitit, which knows numbers only and no names of parts of a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    folder, here = Path(launch), Path(study)
    with contextlib.suppress(PermissionError):  # a leader of a session already
        os.setsid()  # Ctrl-C in a terminal is the launcher's business
    rank, size = (
        int(os.environ.get(f"SUBMITIT_LOCAL_{name}", value)) for name, value in (("GLOBALID", 0), ("NTASKS", 1))
    )
    stop = Stop(folder / "stop")
    stop.listen()
    rundir.atomic_write(here, folder / f"worker-{os.getpid()}.json", rundir.myself() | {"rank": rank})
    notes = folder if alike else None
    if size == 1:
        worker.serve(here, work, stop, threads, notes)
        return
    scratch = folder / f"ranks-{os.environ['SUBMITIT_LOCAL_JOB_ID']}"
    scratch.mkdir(exist_ok=True)
    team = ranks.Ranks(here, scratch, rank, size, rank, lambda: stop, "127.0.0.1")
    if rank:
        team.follow()
    else:
        team.lead(work, notes, lambda: None, lambda: 1)


class Slots:
    """The worker processes of one launch; ``folder`` is private and holds their registrations and the stop flag."""

    def __init__(self, study: Path, configs: Iterable[Row], folder: Path, options: argparse.Namespace) -> None:
        runtimes = [Runtime(**config["runtime"]) for config in configs]
        self.study, self.threads, self.alike = study, options.threads_per_slot, not options.keep_going
        self.width = self.threads or max(runtime.threads for runtime in runtimes)
        self.devices = devices() if any(runtime.device != "cpu" for runtime in runtimes) else []
        cores = min(options.cores or _cores(), _cores())
        self.shared = min(runtime.pack or 1 for runtime in runtimes)
        places = len(self.devices) or max(1, cores // self.width)
        spans = {runtime.devices for runtime in runtimes}
        self.most = max(spans)  # devices that a run was planned for
        self.span = self.most if len(spans) == 1 and self.most <= places else 1  # and those that it gets
        if self.span > 1:
            self.shared = 1
        self.count = options.slots or places // self.span * (self.shared if self.devices else 1)
        self.folder, self.flag = folder, folder / "stop"
        self.jobs: list[submitit.Job[None]] = []
        self.given: list[str | None] = []  # the device of each job

    def start(self, work: list[list[str]]) -> None:
        """Start one more process on a list of runs."""
        import submitit

        executor = submitit.AutoExecutor(self.folder, cluster="local")
        executor.update_parameters(timeout_min=FOREVER_MIN, tasks_per_node=self.span)
        device = self.free()
        pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.width))
        code = source.paths(source.snapshot(rundir.code_folder(self.study)))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the launcher alone
        try:
            with submitit.helpers.environment_variables(**pools, **code):
                job = executor.submit(serve, str(self.study), work, str(self.folder), self.threads, device, self.alike)
        finally:
            signal.signal(signal.SIGINT, handler)
        self.jobs.append(job)
        self.given.append(device)

    def free(self) -> str | None:
        """The devices that the fewest live jobs have, as many as a run gets; None without devices."""
        held = (given for job, given in zip(self.jobs, self.given, strict=True) if given and not job.done())
        taken = [device for given in held for device in given.split(",")]
        return ",".join(sorted(self.devices, key=taken.count)[: self.span]) or None

    def live(self) -> int:
        return sum(not job.done() for job in self.jobs)

    def processes(self) -> list[dict[str, Any]]:
        """The processes that have registered, dead or alive."""
        return [json.loads(path.read_text()) for path in self.folder.glob("worker-*.json")]

    def kill(self) -> None:
        for process in self.processes():
            if rundir.alive(process["host"], process["pid"], process["born"]):
                os.kill(process["pid"], signal.SIGKILL)


class Local(Watch):
    """A launch on this machine."""

    def __init__(
        self, study: Path, rows: list[Row], configs: dict[str, Row], folder: Path, options: argparse.Namespace
    ) -> None:
        super().__init__(study, rows, configs, folder)
        self.slots = Slots(study, configs.values(), folder, options)
        self.since: list[int] = []  # attempts that had ended at the start of each job
        self.stopping = False

    def about(self) -> str:
        slots = self.slots
        several = f"{slots.span} processes of " if slots.span > 1 else ""
        few = f"; they were planned for up to {slots.most} devices each and get one" if slots.most > slots.span else ""
        return f"{slots.count} x {several}{slots.width} threads{few}"

    def watch(self, progress: Progress, done: int) -> bool:
        with sharing(self.slots.shared if self.slots.devices else 1):
            return super().watch(progress, done)

    def tend(self) -> None:
        for run_id in self.pending:
            if self.seen[run_id]["state"] == "running":
                self.recover(run_id)
        if not self.stopping:
            self.fill()

    def recover(self, run_id: str) -> None:
        """A run that says it is running, but whose holder is gone: once more, or failed."""
        holder = rundir.holder(self.study, run_id)
        if (holder is None or not holder.alive) and rundir.status(self.study, run_id)["state"] == "running":
            who = f" (pid {holder.pid} on {holder.host})" if holder else ""
            abandoned(self.study, self.configs[run_id], "lost", f"its worker died{who}")

    @property
    def ended(self) -> int:
        """Attempts that came to an end, as far as they show."""
        tried = (status.get("retries") or {} for status in self.seen.values())
        return len(self.outcomes) + sum(sum(retries.values()) for retries in tried)

    def fill(self) -> None:
        """Start processes for runs that nobody works on, as far as there are slots."""
        live = self.slots.live()
        if live >= self.slots.count:
            return
        ours = {(process["host"], process["pid"]) for process in self.slots.processes() if not process["rank"]}
        holders = {run_id: rundir.holder(self.study, run_id) for run_id in self.pending}
        held = {run_id: (holder.host, holder.pid) for run_id, holder in holders.items() if holder and holder.alive}
        busy = ours & set(held.values())
        others = {process for process in set(held.values()) - ours if rundir.alive(*process, None)}
        waiting = groups(self.rows[run_id] for run_id in self.ready() if run_id not in held)
        needed = min(self.slots.count - len(others) - live, len(waiting) - (live - len(busy)))
        ended = zip(self.since, self.slots.jobs, strict=True)
        barren = sum(since == self.ended and job.done() for since, job in ended)
        if needed > 0 and barren > self.slots.count:
            raise Stillborn(f"workers end before they end a run; see {os.path.relpath(self.folder)}/*_log.err")
        for _ in range(needed):
            self.since.append(self.ended)
            self.slots.start(groups(self.rows[run_id] for run_id in self.pending))

    def over(self, progress: Progress) -> bool:
        if (self.signals or self.slots.flag.exists()) and not self.stopping:
            self.stopping = True
            why = self.why = self.slots.flag.read_text() if self.slots.flag.exists() else ""
            self.slots.flag.touch()
            progress.say(f"stopping{f' ({why})' if why else ''}: workers save and end; Ctrl-C again kills them")
        if self.signals > 1:
            self.slots.kill()
            return True
        return self.stopping and not self.slots.live()

    def close(self, keep: bool) -> None:
        """Wait for the processes to end, and clear up after them unless there may be something to look at."""
        deadline = time.monotonic() + GRACE_S
        while self.slots.live() and time.monotonic() < deadline:
            time.sleep(0.02)
        if not keep and not self.slots.live():
            shutil.rmtree(self.folder, ignore_errors=True)
