"""How do runs get done on Slurm? Arrays of jobs through submitit, looked after by whichever launch is awake.

A launch hands over what nobody has in hand, and waits; it may be killed, or detach, at any point. What was handed over
stands in records (``sweep.batches``), so that the next launch finds it: one that is closed by then, jobs that were
requeued meanwhile, jobs whose id nobody had time to write down. Several launches of a study take turns: who looks after
ended jobs and submits new ones holds a lease, and a job is looked after once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from models.config import Runtime
from sweep import batches, failures, job, request, rundir, slurm, source, worker
from sweep.attempt import abandoned
from sweep.batches import Batch, Pack
from sweep.ledger import ALIKE
from sweep.progress import Progress
from sweep.request import Request
from sweep.watch import STOPPED, Row, Watch, groups

CANARY_MIN = 5  # after which the others of a bucket need not wait for its first runs any more
BACKOFF_S = (15.0, 30.0, 60.0, 120.0, 300.0)  # between two tries where Slurm cannot take a job now
PATIENCE_S = 3600.0  # with a Slurm that says nothing, or takes nothing
FRUITLESS = 3  # jobs in a row that end before they begin a run
AFRESH = 20  # tasks of a serial array at the most
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Cluster(Watch):
    """A launch on Slurm."""

    def __init__(
        self, study: Path, rows: list[Row], configs: dict[str, Row], folder: Path, options: argparse.Namespace
    ) -> None:
        super().__init__(study, rows, configs, folder)
        self.where = request.site(options.slurm)
        self.poll_s, self.alike, self.stage = options.poll_s, not options.keep_going, options.stage
        self.most, self.there = _limits(self.where)
        self.queue = batches.Queue()
        self.open: list[Batch] = []
        self.past = {batch.name for batch in batches.opened(study) if batch.stopped}  # they concern us no more
        self.asked: float | None = None
        self.given: dict[str, int] = {}  # run -> its attempt when it was last handed over
        self.barren: Counter[str] = Counter()  # run -> jobs in a row that were to do it and began nothing
        self.refusals = 0
        self.refused_at = self.since = 0.0  # the last of them, and the first
        self.refusal = ""

    def about(self) -> str:
        return f"on Slurm{f', partition {self.where.partition}' if self.where.partition else ''}"

    def over(self, progress: Progress) -> bool:
        silent = self.queue.silent_since
        if silent is not None and time.monotonic() - silent > PATIENCE_S:
            raise slurm.Silent(
                f"Slurm has not answered for an hour ({self.queue.silence}); jobs go on, the same command waits"
            )
        if self.refusals and time.monotonic() - self.since > PATIENCE_S:
            raise slurm.Silent(f"Slurm has taken no job for an hour ({self.refusal}); the same command tries again")
        if self.signals:
            progress.say(f"detached: jobs go on. The same command waits for them again; {self.how_to_cancel()}")
            return True
        flag = self.folder / "stop"  # without a reason: a user has cancelled everything
        saving = any(self.seen[run_id]["state"] == "running" for run_id in self.pending)
        return not saving and flag.exists() and not flag.read_text()

    def covered(self) -> dict[str, tuple[Batch, int]]:
        """Runs that some task is to do."""
        return batches.covered([batch for batch in self.open if batch.name not in self.past])

    def queued(self) -> int:
        covered = self.covered()
        return sum(run_id in covered and self.seen[run_id]["state"] != "running" for run_id in self.pending)

    def how_to_cancel(self) -> str:
        return f"python -m sweep.launch {os.path.relpath(self.study)} --cancel ends them"

    def close(self, keep: bool) -> None:
        if not keep and not list(self.folder.glob(f"*/*/{batches.OPEN}")):
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- one round ---

    def tend(self) -> None:
        now = time.monotonic()
        if self.asked is None or now - self.asked >= self.poll_s:
            self.asked = now
            self.round()

    def leave(self) -> str:
        """Hand over what is to do and do not wait for it; what was done, in words. Raises ``slurm.Silent``."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.look()
            self.round()
            self.look()
            if self.queue.silent_since is None and not any(self.unclaimed()):
                break
            if time.monotonic() > deadline:
                raise slurm.Silent(f"Slurm takes no job: {self.queue.silence or self.refusal}")
            time.sleep(self.poll_s)
        covered = self.covered()
        jobs = {
            batch.element(task) for batch, task in (covered[run_id] for run_id in self.pending if run_id in covered)
        }
        waiting = sum(run_id not in covered for run_id in self.pending)
        later = f"; {waiting} wait for others: launch again when those are done" if waiting else ""
        self.close(keep=False)  # others may have it all
        done = f"{len(jobs)} jobs have {len(self.pending) - waiting} runs to do{later}"
        if refused := [status["reason"] for status in self.outcomes.values() if failures.kind(status) == "submit"]:
            raise ValueError(f"{len(refused)} runs were not handed over ({refused[0]}); {done}")
        return done

    def round(self) -> None:
        """Ask Slurm, look after what has ended, hand over what nobody has in hand."""
        self.open = batches.opened(self.study)
        self.queue.look(self.open)
        if self.queue.silent_since is not None:
            return
        self.halt()
        for element, why in self.queue.waits.items():
            if slurm.HELD in why:
                slurm.release(element)
        self.give_up()
        unclaimed = any(self.unclaimed())
        if not unclaimed and all(batch.job for batch in self.open):
            self.refusals = 0  # somebody has it all
        if not (self.queue.over(self.open) or self._found() or (unclaimed and not self.resting())):
            return
        if (lease := rundir.lease(self.study, rundir.launches_folder(self.study) / "dispatch")) is None:
            return  # another launch is at it
        with lease.held(), contextlib.suppress(rundir.Superseded):
            self.open = batches.opened(self.study)  # it may have submitted since
            for batch, name in self._found():
                batch.adopt(self.study, name)
            self.look_after()
            self.hand_over(lease)

    def _found(self) -> list[tuple[Batch, str]]:
        """Jobs whose submitter had no time to write their id down."""
        unknown = (batch for batch in self.open if batch.job is None)
        return [(batch, self.queue.jobs[batch.name]) for batch in unknown if batch.name in self.queue.jobs]

    def halt(self) -> None:
        """Let go of runs that are not to be started: those before them failed alike, or the disk is full.

        Where a user cancelled everything, the records of runs say so.
        """
        unwanted = {batch.element(task) for batch in self.open if batch.stopped for task in batch.open_tasks()}
        slurm.cancel(self.queue.waits.keys() & unwanted)
        for run_id, (batch, _) in self.covered().items():
            why = batch.why if run_id in self.pending and self.seen[run_id]["state"] != "running" else ""
            if why:
                self.why = self.why or why
                self.settle(run_id)

    def give_up(self) -> None:
        """Take jobs back that would wait for ever, and say so of their runs."""
        never = {element: why for element, why in self.queue.waits.items() if why in slurm.NEVER}
        for run_id, (batch, task) in batches.covered(self.open).items():
            why = never.get(batch.element(task))
            if why is not None and rundir.status(self.study, run_id)["state"] in ("planned", "interrupted"):
                rundir.mark(self.study, run_id, "failed", f"submit: Slurm will never start its job ({why})")
        slurm.cancel(never)

    def unclaimed(self) -> Iterator[str]:
        """Pending runs that wait for nothing, that no job is to do and that nobody holds."""
        covered = self.covered()
        for run_id in self.ready():
            if run_id not in covered:
                holder = rundir.holder(self.study, run_id)
                if holder is None or not holder.alive:
                    yield run_id

    # --- what became of jobs ---

    def look_after(self) -> None:
        """Say of every task that is over what became of its runs; their records know unless it died."""
        changed: dict[Path, Batch] = {}
        for batch, task, verdict in self.queue.over(self.open):
            self.count(batch, task)
            for run_id in batch.runs(task):
                self.left(batch, task, verdict, run_id)
            batch.ended[str(task)] = verdict
            changed[batch.folder] = batch
        for batch in changed.values():
            batch.save(self.study)
            if len(batch.ended) == batch.tasks:
                self.tidy(batch)
        self.open = [batch for batch in self.open if len(batch.ended) < batch.tasks]

    def tidy(self, batch: Batch) -> None:
        """Remove what a batch left behind that nobody will look at: all of it, where every task completed."""
        if set(batch.ended.values()) != {"COMPLETED"}:
            for pickled in batch.folder.glob("*.pkl"):
                pickled.unlink()
            return
        shutil.rmtree(batch.folder, ignore_errors=True)
        launch = batch.bucket.parent
        if launch != self.folder and not list(launch.glob("*/*/*.json")):
            shutil.rmtree(launch, ignore_errors=True)

    def count(self, batch: Batch, task: int) -> None:
        """Remember of a task that is over whether it began anything."""
        ours = [run_id for run_id in batch.runs(task) if run_id in self.given]
        began = any(rundir.status(self.study, run_id).get("attempt", 0) > self.given[run_id] for run_id in ours)
        for run_id in ours if batch.job else ():
            self.barren[run_id] = 0 if began else self.barren[run_id] + 1

    def left(self, batch: Batch, task: int, verdict: str | None, run_id: str) -> None:
        """A run whose task is over."""
        element = batch.element(task)
        config, status = rundir.config(self.study, run_id), rundir.status(self.study, run_id)
        holder = rundir.holder(self.study, run_id)
        if holder is not None and holder.alive and (verdict is None or holder.job != element):
            return  # somebody is at it, or may be: absence proves nothing while there are signs of life
        how = f"job {element} ended as {verdict}" if verdict else f"job {element} is gone"
        # what was cancelled before this launch, or because runs like it failed, nobody has cancelled for this launch
        lately = batch.bucket.parent == self.folder or (batch.name, task) in self.queue.lived
        meant = verdict == "CANCELLED" and lately and not batch.stopped
        if meant and status["state"] in ("planned", "interrupted", "running"):
            self.cancelled(run_id, how, holder.attempt if holder else None)
        elif status["state"] == "running":
            kind = "preempted" if verdict == "CANCELLED" else failures.ENDED_AS.get(verdict or "", "lost")
            abandoned(self.study, config, kind, how, holder.attempt if holder else None)

    def cancelled(self, run_id: str, how: str, gone: int | None) -> None:
        if (claim := rundir.claim(self.study, run_id, gone)) is not None:
            with claim.held():
                claim.update(state="cancelled", reason=how)

    # --- new jobs ---

    def resting(self) -> bool:
        """Is it too early to ask again, after Slurm could not take a job?"""
        wait = BACKOFF_S[min(self.refusals, len(BACKOFF_S)) - 1] if self.refusals else 0.0
        return time.monotonic() - self.refused_at < wait

    def hand_over(self, lease: rundir.Lease) -> None:
        """Submit what nobody has in hand."""
        if self.resting():
            return
        held = []
        for group in groups(self.rows[run_id] for run_id in list(self.unclaimed()) if self.wanted(run_id)):
            rows, config = [self.rows[run_id] for run_id in group], self.configs[group[0]]
            status = rundir.status(self.study, group[0])
            asked = request.of(rows[0], config, status, self.where, self.there)
            held.append((rows, asked, Runtime(**config["runtime"])))
        planned = list(self.plan(request.packed(held, self.where, self.there)))
        standing = [batch for batch in self.open if batch.name not in self.past]
        used = sum(min(batch.request["parallel"], batch.tasks - len(batch.ended)) for batch in standing)
        parallel = max(1, self.where.parallel - used)
        caps = request.shares(parallel, [len(packs) for _, packs, _ in planned[:parallel]])
        sent: list[Batch | None] = []
        never: dict[Request, str] = {}  # what will never be taken, and why
        for number, (asked, packs, canary) in enumerate(planned):
            behind, depends = sent[number - parallel] if number >= parallel else None, None
            first = sent[canary] if canary is not None else None
            if behind is not None:
                depends = f"afterany:{behind.job}"
            elif first is not None:
                depends = f"afterany:{first.job}?after:{first.job}+{CANARY_MIN}"
            lease.guard()
            sent.append(None)
            if asked not in never:
                try:
                    sent[-1] = self.send(asked, packs, caps[number % len(caps)], depends)
                except slurm.Refused as refused:
                    if refused.passing:
                        self.refused_at = time.monotonic()
                        self.since = self.since if self.refusals else self.refused_at
                        self.refusal, self.refusals = str(refused), self.refusals + 1
                        if refused.crowded:  # so large an array may never be taken
                            self.most = max(1, len(packs) // 2)
                        return
                    never[asked] = str(refused)
            for run_id in _runs(packs) if asked in never else ():
                rundir.mark(self.study, run_id, "failed", f"submit: {never[asked]}")

    def wanted(self, run_id: str) -> bool:
        """Can a job do something about this run? What stands in the way is written into its record."""
        status, row = rundir.status(self.study, run_id), self.rows[run_id]
        if status["state"] == "running":
            abandoned(self.study, self.configs[run_id], "lost", "its worker gives no sign of life")
            return False
        over = rundir.finished(self.study, status, row["points"], row["encode"])
        if over or status["state"] in STOPPED:  # since the last look
            return False
        if why := worker.blocked(self.study, row["stage"], row["upstream"]):
            rundir.mark(self.study, run_id, "blocked", why.reason, diverged_upstream=why.diverged)
            return False
        if self.barren[run_id] >= FRUITLESS:
            where = os.path.relpath(self.folder)
            reason = f"submit: {FRUITLESS} jobs ended before they began it; see {where}/*/*/*_log.out"
            rundir.mark(self.study, run_id, "failed", reason)
            return False
        return True

    def plan(self, packed: dict[Request, list[tuple[float, Pack]]]) -> Iterator[tuple[Request, list[Pack], int | None]]:
        """Arrays to submit, in order: what they ask for, their packs, and which earlier one they wait for."""
        number = 0
        for asked, timed in packed.items():
            flags = [flag for flag in (self.folder / "stop", self.bucket(asked) / "stop") if flag.exists()]
            if why := next(filter(None, (flag.read_text() for flag in flags)), ""):
                self.why = self.why or why
                for run_id in _runs([pack for _, pack in timed]):
                    self.settle(run_id)
            if flags:
                continue
            packs, canary = [pack for _, pack in timed], None
            if len(packs) > 2 * ALIKE and not self.proven(asked):
                first: Pack = []
                while len(first) < ALIKE:  # the shortest of all
                    first = packs.pop() + first
                yield asked, [first], None
                number, canary = number + 1, number
            size = 1 if self.where.requeue == "no" else self.most
            waiting = iter(packs)
            while chunk := list(islice(waiting, size)):
                yield asked, chunk, canary
                number += 1

    def bucket(self, asked: Request) -> Path:
        """The folder of jobs that ask for the same, time and nodes aside."""
        kind = asked._replace(time_min=0, exclude=None)
        return self.folder / hashlib.sha256(repr(kind).encode()).hexdigest()[:8]

    def proven(self, asked: Request) -> bool:
        """Has a run like these ended well before?"""
        done = any(self.records.status(run_id)["state"] == "done" for run_id in islice(self.rows, 1000))
        return done or (self.bucket(asked) / "ended" / "well").is_dir()

    def send(self, asked: Request, packs: list[Pack], cap: int, depends: str | None) -> Batch:
        """Submit one array. Raises ``slurm.Refused``."""
        bucket = self.bucket(asked)
        serial = self.where.requeue == "no"
        tasks = min(self.most, AFRESH) if serial else len(packs)
        batch = Batch(
            folder=bucket / f"{len(list(bucket.glob('*/*.json'))):04d}-{uuid.uuid4().hex[:4]}",
            name=f"sweep-{self.study.name}-{self.stage}-{uuid.uuid4().hex[:12]}",
            packs=packs,
            tasks=tasks,
            serial=serial,
            request=asked._asdict() | {"parallel": 1 if serial else cap, "signal_s": self.where.signal_s},
            alike=self.alike,
            launcher=rundir.myself(),
            created=time.time(),
        )
        batch.save(self.study)  # first: whoever finds a job of this name knows what it is for
        try:
            batch.job = self.submit(batch, asked, depends)
        except slurm.Refused as refused:
            if not refused.unsure:  # else it may have been taken all the same, and its name will tell
                shutil.rmtree(batch.folder, ignore_errors=True)
            raise
        batch.save(self.study)
        self.refusals = 0
        self.open.append(batch)
        self.given |= {run_id: rundir.status(self.study, run_id).get("attempt", 0) for run_id in _runs(packs)}
        return batch

    def submit(self, batch: Batch, asked: Request, depends: str | None) -> str:
        """Hand a batch to sbatch, through submitit; the id of its job."""
        import submitit

        code = source.paths(source.snapshot(rundir.code_folder(self.study)))
        threads = dict.fromkeys(THREADS, str(max(1, asked.cpus_per_task // asked.pack)))
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C must not cut sbatch off
        try:
            with slurm.environment(code | threads):
                executor = submitit.SlurmExecutor(folder=batch.folder)
                executor.update_parameters(**self.parameters(batch, asked, depends))
                jobs = executor.map_array(job.element, [str(batch.folder)] * batch.tasks)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise slurm.Refused(" ".join(str(error).split()) or "sbatch failed without a word") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # what came meanwhile arrives now
        return str(jobs[0].job_id).partition("_")[0]

    def parameters(self, batch: Batch, asked: Request, depends: str | None) -> dict[str, Any]:
        where = self.where
        return {
            "job_name": batch.name,
            "time": asked.time_min,
            "nodes": asked.nodes,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": asked.cpus_per_task,
            "mem": f"{asked.mem_gib}GB",
            "gres": asked.gres,
            "exclude": asked.exclude,
            "dependency": depends,
            "partition": where.partition,
            "account": where.account,
            "qos": where.qos,
            "constraint": where.constraint,
            "signal_delay_s": where.signal_s,
            "array_parallelism": batch.request["parallel"],
            "stderr_to_stdout": True,
            "wckey": None,
            # since Slurm 22.05 a step does not inherit the cores of its job; ranks that lost one wait for ever
            "srun_args": [f"--cpus-per-task={asked.cpus_per_task}", "--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue" if where.requeue == "yes" else "no-requeue": True, **where.sbatch},
        }


def _runs(packs: Iterable[Pack]) -> list[str]:
    return [run_id for pack in packs for group in pack for run_id in group]


def _limits(where: request.Site) -> tuple[int, slurm.Partition]:
    """Tasks of one array, and what the partition has; ValueError without a cluster."""
    config, silent = slurm.configuration()
    there, hidden = slurm.partition(where.partition)  # without an answer, runs that want a GPU would go without
    lacking = [f"{command}: not found" for command in ("sbatch", "srun") if shutil.which(command) is None]
    if failed := next(filter(None, (*lacking, silent, hidden)), None):
        raise ValueError(f"--cluster slurm: {failed}; allowed: where sbatch works (python -m sweep.doctor says more)")
    most = config.get("MaxArraySize", "")
    return max(1, int(most)) if most.isdecimal() else 1000, there
