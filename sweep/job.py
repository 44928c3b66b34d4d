"""What does a task of a Slurm job do? A small process that never trains: it starts the ones that do, and minds them.

Signals only set a flag here. A warning that the job will end, or has to make room, becomes a file that the processes
at work read between steps; they save, and the job is put back into the queue. So it is with processes that die: what
they had is taken over by the next one. Where a run takes several devices, each has a task of its own (sweep.ranks).

A task ends well (0) when all runs of its pack did, so that Slurm says COMPLETED of nothing else.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
import uuid
from multiprocessing.process import BaseProcess
from pathlib import Path

from sweep import batches, ranks, rundir, slurm, worker
from sweep.attempt import Stop, abandoned
from sweep.batches import Batch
from sweep.sharing import sharing

TICK_S = 0.2
KEEP_S = 15.0  # of the warning time, for asking Slurm to put the job back into the queue
EARLY_S = 60.0  # by which Slurm may send the warning before its time
DEATHS = 5  # of processes at work, in a row without a run that ended, after which the job gives up
ELSEWHERE = 75  # exit code of a process that leaves a run to another job


def element(folder: str) -> None:
    """Do one task of a batch; what submitit calls in the job."""
    batch = batches.read(Path(folder))
    if batch is None:
        raise ValueError(f"{folder}: holds no readable record of a batch")
    # .submitit/<launch>/<bucket>/<number>
    study, task = batch.folder.parents[3], int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
    held = Task(study, batch, task)
    held.listen()
    sys.exit(held.run())


class Task:
    """One task of a batch, and what it has heard."""

    def __init__(self, study: Path, batch: Batch, task: int) -> None:
        self.study, self.batch, self.task = study, batch, task
        self.pack = batch.packs[0 if batch.serial else task]
        self.began = time.time()
        os.environ[rundir.START] = uuid.uuid4().hex
        # of this start of the job alone, and the same for all its ranks: not each is counted, but each has its srun
        start = (os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_SRUN_COMM_PORT", "0"))
        self.scratch = batch.folder / f"task-{task}-{'-'.join(start)}"
        self.flag = self.scratch / "stop"
        self.heard: int | None = None  # the first signal
        self.heard_at = 0.0

    def listen(self) -> None:
        """Take over from submitit's handlers, which would save and exit in the middle of a step."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it along, and would only wake us

    def _signalled(self, number: int, frame: object) -> None:
        if self.heard is None:
            self.heard, self.heard_at = number, time.monotonic()

    # --- the end ---

    def run(self) -> int:
        """Work until nothing is left to do here, or the job has to end; the exit code."""
        if self.batch.stopped:
            print("stopped before it began: runs like these failed alike, or somebody cancelled the launch")
            return 1
        self.scratch.mkdir(parents=True, exist_ok=True)
        if (size := int(os.environ.get("SLURM_NTASKS", "1"))) > 1:
            rank, local = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_LOCALID"])
            address = slurm.address() or socket.gethostname()
            team = ranks.Ranks(self.study, self.scratch, rank, size, local, self.stop, address)
            if rank > 0:
                return team.follow()
            left = not team.lead(self.pack, self.notes, self.mind, lambda: self.conclude(left=True))
        else:
            left = Crew(self).run()
        return self.conclude(left)

    def conclude(self, left: bool) -> int:
        """Put the job back into the queue where its runs are to go on; ``left``: a run was left to another job."""
        statuses = [rundir.status(self.study, run_id) for run_id in self.batch.runs(self.task)]
        goes_on = [status for status in statuses if status["state"] in ("planned", "interrupted", "running")]
        if goes_on and (self.heard is not None or left) and not self.batch.stopped and not self.batch.serial:
            again = {str(status.get("reason")).removeprefix("once more after ").partition(":")[0] for status in goes_on}
            more_memory = "oom_host" in again  # which this job does not have
            if not (self.heard is not None and self.kind == "ended") and not more_memory:
                without = {node for status in goes_on for node in status.get("exclude", ())}
                if (refused := slurm.requeue(self.batch.element(self.task), sorted(without))) is None:
                    return 1
                print(f"not put back into the queue: {refused}")
        return 0 if all(status["state"] == "done" for status in statuses) else 1

    # --- what a signal means ---

    @functools.cached_property
    def kind(self) -> str:
        """Why the job ends, a class of ``failures``: by what Slurm says of it, else by the clock.

        A job that Slurm has ended already (``ended``: by scancel, say) is not ours to put back into the queue.
        """
        said = slurm.told(self.batch.element(self.task))
        if said.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
            return "preempted"
        if said.get("JobState", "RUNNING") != "RUNNING":
            return "ended"
        began = float(os.environ.get("SLURM_JOB_START_TIME", self.began))
        limit = 60.0 * self.batch.request["time_min"]
        warned = limit - self.batch.request["signal_s"] - min(EARLY_S, limit / 2)
        return "timeout" if time.time() - began >= warned else "preempted"

    def mind(self) -> None:
        """Tell the processes at work, once, that the job has to end."""
        if self.heard is not None and not self.flag.exists():
            rundir.atomic_write(self.study, self.flag, self.kind.encode(), sync=False)

    def expired(self) -> bool:
        """Is the time to save over?"""
        return self.heard is not None and time.monotonic() - self.heard_at > self.batch.request["signal_s"] - KEEP_S

    def stop(self) -> Stop:
        """What the processes at work look at."""
        return Stop(*self.batch.flags, job=self.flag)

    @property
    def notes(self) -> Path | None:
        """Where ends are written down, if the others are to stop when the first ones fail alike."""
        return self.batch.bucket if self.batch.alike else None


class Crew:
    """The processes at work on one device: as many as share it, each with a run of its own at a time."""

    def __init__(self, task: Task) -> None:
        self.task, self.study = task, task.study
        self.context = multiprocessing.get_context("fork")  # nothing heavy is loaded here, so there is little to copy
        self.processes: list[BaseProcess] = []
        self.size = min(task.batch.request["pack"], len(task.pack))

    def run(self) -> bool:
        """Until nobody is at work; whether a run was left to another job."""
        left, deaths, ended = False, 0, self._ended()
        with sharing(self.size):
            self.processes = [self._start() for _ in range(self.size)]
            while self.processes:
                self.task.mind()
                if self.task.expired():
                    break  # whoever is still at it dies with the job: what was saved before counts
                time.sleep(TICK_S)
                for process in [process for process in self.processes if not process.is_alive()]:
                    self.processes.remove(process)
                    process.join()
                    left = left or process.exitcode == ELSEWHERE
                    if process.exitcode in (0, ELSEWHERE):
                        continue
                    self._inherit(process)
                    deaths, before, ended = deaths + 1, ended, self._ended()
                    deaths = deaths if ended == before else 0
                    if deaths < DEATHS and self.task.heard is None and not self.task.batch.stopped:
                        self.processes.append(self._start())
        return left

    def _ended(self) -> int:
        statuses = (rundir.status(self.study, run_id) for run_id in self.task.batch.runs(self.task.task))
        return sum(status["state"] not in ("planned", "interrupted", "running") for status in statuses)

    def _start(self) -> BaseProcess:
        process = self.context.Process(target=_at_work, args=(self.task, os.getpid()))
        process.start()
        return process

    def _inherit(self, dead: BaseProcess) -> None:
        """What a process that died had in hand: once more, or failed."""
        killed = dead.exitcode == -signal.SIGKILL and _out_of_memory()
        kind = "oom_host" if killed else "lost"
        for run_id in self.task.batch.runs(self.task.task):
            holder = rundir.holder(self.study, run_id)
            if holder is not None and holder.pid == dead.pid and holder.host == rundir.myself()["host"]:
                config = rundir.config(self.study, run_id)
                how = f"its worker died (pid {dead.pid} on {holder.host}, exit code {dead.exitcode})"
                abandoned(self.study, config, kind, how, holder.attempt)


def _at_work(task: Task, parent: int) -> None:
    """One process of a crew."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Slurm signals every process; ours hear of it from their parent
    stop = task.stop()
    stop.parent = parent
    sys.exit(0 if worker.serve(task.study, task.pack, stop, notes=task.notes) else ELSEWHERE)


def _out_of_memory() -> bool:
    """Has the kernel killed a process of this job's control group for memory?"""
    try:
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].partition("::")[2]
        events = (Path("/sys/fs/cgroup") / group.lstrip("/") / "memory.events").read_text()
    except OSError:
        return False
    return any(line.split()[0] == "oom_kill" and int(line.split()[1]) > 0 for line in events.splitlines())
