"""Where do worker processes run? Slots of one launch: a device or a share of the cores each, through submitit."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import Runtime
from sweep import rundir, worker

if TYPE_CHECKING:
    import submitit

GRACE_S = 10.0  # for processes to end after the last run
FOREVER_MIN = 365 * 24 * 60  # submitit ends a local job after 2 minutes unless told otherwise


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


class Slots:
    """The worker processes of one launch; ``folder`` is private and holds their registrations and the stop flag."""

    def __init__(self, study: Path, configs: Iterable[dict[str, Any]], options: argparse.Namespace) -> None:
        runtimes = [Runtime(**config["runtime"]) for config in configs]
        self.study, self.cluster, self.threads = study, options.cluster, options.threads_per_slot
        self.width = self.threads or max(runtime.threads for runtime in runtimes)
        self.devices = devices() if any(runtime.device != "cpu" for runtime in runtimes) else []
        cores = min(options.cores or _cores(), _cores())
        self.count = options.slots or len(self.devices) or max(1, cores // self.width)
        self.folder = rundir.launches_folder(study) / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        self.flag = self.folder / "stop"
        self.jobs: list[submitit.Job[None]] = []
        self.given: list[str | None] = []  # the device of each job
        self.folder.mkdir(parents=True)
        self.folder.parent.chmod(0o700)  # submitit pickles what it runs

    def start(self, work: list[list[str]]) -> None:
        """Start one more process on a list of runs."""
        import submitit

        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        executor.update_parameters(timeout_min=FOREVER_MIN, tasks_per_node=1)
        device = self.free()
        pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.width))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the launcher alone
        try:
            with submitit.helpers.environment_variables(**pools):
                job = executor.submit(worker.serve, str(self.study), work, str(self.folder), self.threads, device)
        finally:
            signal.signal(signal.SIGINT, handler)
        self.jobs.append(job)
        self.given.append(device)

    def free(self) -> str | None:
        """The device that the fewest live jobs have; None without devices."""
        taken = [device for job, device in zip(self.jobs, self.given, strict=True) if not job.done()]
        return min(self.devices, key=taken.count, default=None)

    def live(self) -> int:
        return sum(not job.done() for job in self.jobs)

    def processes(self) -> list[dict[str, Any]]:
        """The processes that have registered, dead or alive."""
        return [json.loads(path.read_text()) for path in self.folder.glob("worker-*.json")]

    def kill(self) -> None:
        for process in self.processes():
            if rundir.alive(process["host"], process["pid"], process["born"]):
                os.kill(process["pid"], signal.SIGKILL)

    def close(self, keep: bool) -> None:
        """Wait for the processes to end, and clear up after them unless there may be something to look at."""
        deadline = time.monotonic() + GRACE_S
        while self.live() and time.monotonic() < deadline:
            time.sleep(0.02)
        if not keep and not self.live():
            shutil.rmtree(self.folder, ignore_errors=True)
