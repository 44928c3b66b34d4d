"""How do the runs of a stage get done? Worker processes in slots, watched until every run has an outcome.

    python -m sweep.launch results/digits --stage tokenizer
    python -m sweep.launch results/digits --stage evaluation --of generator
    python -m sweep.launch results/digits --stage generator --only generator_size=25k --retry
    python -m sweep.launch results/digits --cancel                  # from another terminal

What is finished stays: a second call returns at once, one after an interruption resumes. Ctrl-C lets the workers
save and stop; the second kills them. Two launches of one study share its runs, as whoever claims a run has it.

Exit codes: 0 all done, or diverged; 1 some failed; 2 bad input; 3 refused; 130 stopped before the end.
Runs that failed are tried again with --retry; where a file or the disk was to blame, by the next launch anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.config import STAGES, Runtime
from sweep import failures, rundir, tables, worker
from sweep.attempt import Attempt, Ended, Stop
from sweep.progress import Progress
from sweep.slots import Slots

Row = dict[str, Any]

COLUMNS = ("run_id", "stage", "label", "checkpoint", "points", "encode", "upstream", "flops_total", "gpu_h_high")
STOPPED = ("blocked", "cancelled")  # no attempt is to come in this launch
LISTED = ("failed", "blocked", "diverged")  # outcomes that are named with their reason
SHOWN = 20  # of them
TICK_S = 0.25
ALIKE = 3  # runs that fail for one reason before any other ends, at which a launch stops


class Stillborn(RuntimeError):
    """Workers end before they get anything done."""


# --- which runs --------------------------------------------------------------------------------------------------


def select(study: Path, stage: str | None, of: str | None, only: Iterable[str] = ()) -> list[Row]:
    """Rows of the plan by stage, by what an evaluation measures, and by filters (a run id, or column=value)."""
    filters = [text.partition("=") for text in only]
    known = {*tables.PLAN} - {"config", "fields", "recipe"}
    rows = tables.plan(study, sorted({*COLUMNS, "axes", *(key for key, _, _ in filters if key in known)}))
    axes = {axis for row in rows for axis in json.loads(row["axes"] or "{}")} if filters else set()
    for key, mark, _ in filters:
        if not mark:
            rundir.run_folder(study, key)  # says what a run id looks like
        elif key not in known | axes:
            raise ValueError(f"--only: got {key!r}; allowed: RUN_ID, or KEY=VALUE of {', '.join(sorted(known | axes))}")
    found = [
        row
        for row in rows
        if (stage is None or row["stage"] == stage)
        and (of is None or (row["checkpoint"] or "").startswith(of[0]))
        and all(_matches(row, *parts) for parts in filters)
    ]
    if filters and not found:
        raise ValueError(f"--only: got {' '.join(only)}; no {stage or ''} run of the plan is so")
    return found


def _matches(row: Row, key: str, mark: str, value: str) -> bool:
    if not mark:
        return bool(row["run_id"] == key)
    held = row[key] if key in row else json.loads(row["axes"] or "{}").get(key)
    try:
        return float(held) == float(value)
    except (TypeError, ValueError):
        return str(held) == value


def groups(rows: Iterable[Row]) -> list[list[str]]:
    """Run ids in the order of work: longest first, all evaluations of a checkpoint together."""
    gathered: dict[str, list[Row]] = {}
    for row in rows:
        gathered.setdefault(row["checkpoint"] or row["run_id"], []).append(row)
    cost = {key: sum(row["flops_total"] or 0.0 for row in held) for key, held in gathered.items()}
    return [[row["run_id"] for row in gathered[key]] for key in sorted(gathered, key=lambda key: -cost[key])]


# --- a launch ----------------------------------------------------------------------------------------------------


class Launch:
    """Runs that have to come to an end, watched by what their own records say."""

    def __init__(
        self, study: Path, rows: list[Row], configs: dict[str, Row], slots: Slots, keep_going: bool = False
    ) -> None:
        self.study, self.configs, self.slots, self.keep_going = study, configs, slots, keep_going
        self.rows = {row["run_id"]: row for row in rows}
        self.pending = dict.fromkeys(self.rows)
        self.outcomes: dict[str, Row] = {}
        self.records = rundir.Records(study)
        self.seen: dict[str, Row] = {}  # the last known status of runs that are or were pending
        self.retried: Counter[tuple[str, str]] = Counter()  # by run and class of failure
        self.since: list[int] = []  # attempts that had ended at the start of each job
        self.signals = 0
        self.why = ""  # it was stopped, where not by a user

    def look(self) -> None:
        """Read what changed in the records of pending runs."""
        for run_id in list(self.pending):
            row, status = self.rows[run_id], self.records.status(run_id)
            self.seen[run_id] = status
            if status["state"] == "blocked" and _awaits(row, self.pending):
                rundir.mark(self.study, run_id, "planned")  # what it is built on failed, and is tried again
                continue
            if rundir.finished(self.study, status, row["points"], row["encode"]) or status["state"] in STOPPED:
                if not self.again(run_id, status):
                    self.outcomes[run_id] = status
                    del self.pending[run_id]
            elif status["state"] == "running":
                self.recover(run_id)

    def again(self, run_id: str, status: Row) -> bool:
        """Open a failed run for another attempt, where the policy of its failure grants one."""
        if (kind := failures.kind(status)) is None:
            return False
        policy, reason = failures.POLICY[kind], status["reason"]
        if kind == "lost" or self.retried[run_id, kind] >= policy.retries:  # lost runs are counted where they are found
            return False
        change = _smaller(self.configs[run_id], status) if policy.smaller else {}
        if change is None:
            return False
        self.retried[run_id, kind] += 1
        rundir.mark(self.study, run_id, "planned", f"once more after {reason}", **change)
        rundir.journal(self.study, run_id, "retry", reason=reason, **change)
        return True

    @property
    def ended(self) -> int:
        """Attempts that came to an end."""
        return len(self.outcomes) + self.retried.total()

    def hopeless(self) -> str | None:
        """Why the others need not be tried: the first runs that ended all failed, and for one reason."""
        states = {status["state"] for status in self.outcomes.values()}
        reasons = {status["reason"] for status in self.outcomes.values()}
        sources = {self.rows[run_id]["checkpoint"] or run_id for run_id in self.outcomes}  # one damaged file is one
        if self.keep_going or len(sources) < ALIKE or states != {"failed"} or len(reasons) > 1:
            return None
        return f"the first {len(self.outcomes)} runs failed alike, {reasons.pop()}"

    def recover(self, run_id: str) -> None:
        """A run that says it is running, but whose holder is gone: once more, or failed."""
        holder = rundir.holder(self.study, run_id)
        if (holder is not None and holder.alive) or rundir.status(self.study, run_id)["state"] != "running":
            return
        if (claim := rundir.claim(self.study, run_id)) is None:
            return
        lost = rundir.status(self.study, run_id).get("lost", 0) + 1
        reason = "lost: its worker died" + (f" (pid {holder.pid} on {holder.host})" if holder else "")
        if lost > failures.POLICY["lost"].retries:
            config = self.configs[run_id]
            attempt = Attempt(self.study, config, claim, Stop(), Runtime(**config["runtime"]))
            attempt.end(Ended("failed", f"{reason}, {lost} times"), witnessed=False)
        else:
            claim.update(state="planned", reason=reason, lost=lost)
            rundir.journal(self.study, run_id, "lost", attempt=claim.attempt, reason=reason)
        claim.release()

    def fill(self) -> None:
        """Start processes for runs that nobody works on, as far as there are slots."""
        live = self.slots.live()
        if live >= self.slots.count:
            return
        ours = {(process["host"], process["pid"]) for process in self.slots.processes()}
        holders = {run_id: rundir.holder(self.study, run_id) for run_id in self.pending}
        held = {run_id: (holder.host, holder.pid) for run_id, holder in holders.items() if holder and holder.alive}
        busy = ours & set(held.values())
        others = {process for process in set(held.values()) - ours if rundir.alive(*process, None)}
        ready = (row for run_id in self.pending if not _awaits(row := self.rows[run_id], self.pending))
        waiting = groups(row for row in ready if row["run_id"] not in held)
        needed = min(self.slots.count - len(others) - live, len(waiting) - (live - len(busy)))
        ended = zip(self.since, self.slots.jobs, strict=True)
        barren = sum(since == self.ended and job.done() for since, job in ended)
        if needed > 0 and barren > self.slots.count:
            raise Stillborn(f"workers end before they end a run; see {_short(self.slots.folder)}/*_log.err")
        for _ in range(needed):
            self.since.append(self.ended)
            self.slots.start(groups(self.rows[run_id] for run_id in self.pending))

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
        stopping = False
        while True:
            began = time.monotonic()
            self.look()
            well, running, failed = self.counts()
            progress.show(done + well, running, failed, self.worked())
            if not self.pending:
                return True
            if not (stopping or self.slots.flag.exists()) and (why := self.hopeless()):
                rundir.atomic_write(self.study, self.slots.flag, why.encode())
            if (self.signals or self.slots.flag.exists()) and not stopping:
                stopping = True
                why = self.why = self.slots.flag.read_text() if self.slots.flag.exists() else ""
                self.slots.flag.touch()
                progress.say(f"stopping{f' ({why})' if why else ''}: workers save and end; Ctrl-C again kills them")
            if self.signals > 1:
                self.slots.kill()
                return False
            if stopping and not self.slots.live():
                self.look()
                return not self.pending
            if not stopping:
                self.fill()
            time.sleep(max(TICK_S, 5 * (time.monotonic() - began)))


def _smaller(config: Row, status: Row) -> Row | None:
    """Half as many images at a time than in the last attempt of a run, which is the same run; null below one image."""
    runtime = Runtime(**config["runtime"])
    batch = min(status.get("measure_batch") or runtime.measure_batch, runtime.measure_batch) // 2
    change: Row = {"measure_batch": batch} if batch else {}
    if config["stage"] != "evaluation":
        images = config["recipe"]["batch"]
        sizes = (status.get("micro_batch"), runtime.micro_batch, images)
        micro = failures.halved(images, min(size for size in sizes if size))
        change |= {"micro_batch": micro} if micro else {}
    return change or None


@contextmanager
def _signals(handle: Callable[[], None]) -> Iterator[None]:
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda *_: handle()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run(study: Path, options: argparse.Namespace) -> int:
    """Bring the selected runs to an end; the exit code."""
    began = time.monotonic()
    rows = select(study, options.stage, options.of, options.only)
    statuses = {row["run_id"]: rundir.status(study, row["run_id"]) for row in rows}
    pending, waits = [], {}
    for row in rows:
        status = statuses[row["run_id"]]
        if (options.retry and status["state"] == "failed") or failures.reopens(status):
            status = status | {"state": "planned"}
        if not rundir.finished(study, status, row["points"], row["encode"]):
            pending.append(row)
    ours = {row["run_id"] for row in pending}
    for row in pending:
        if not _awaits(row, ours) and (why := worker.blocked(study, row["stage"], row["upstream"])):
            waits[row["run_id"]] = why
    pending = [row for row in pending if row["run_id"] not in waits]
    title = options.stage + (f" --of {options.of}" if options.of else "")
    hours = sum(row["gpu_h_high"] or 0.0 for row in pending)
    if options.max_gpu_hours is not None and hours > options.max_gpu_hours:
        print(f"--max-gpu-hours: {title} needs up to {hours:.3g}; allowed: {options.max_gpu_hours:g}", file=sys.stderr)
        return 3
    for run_id, why in waits.items():
        rundir.mark(study, run_id, "blocked", why.reason, diverged_upstream=why.diverged)
    stopped = _bring(study, title, pending, len(rows) - len(pending) - len(waits), len(rows), options)
    statuses |= {run_id: rundir.status(study, run_id) for run_id in (*waits, *(row["run_id"] for row in pending))}
    return _report(study, title, rows, statuses, stopped, options, time.monotonic() - began)


def _awaits(row: Row, runs: Container[str]) -> bool:
    """Is a run that this one is built on among ``runs``?"""
    return any(source.partition("@")[0] in runs for source in row["upstream"])


def _bring(study: Path, title: str, pending: list[Row], done: int, total: int, options: argparse.Namespace) -> int:
    """Run what is pending: 0, or where it was stopped before the end 130 (by a user) or 1 (by what went wrong)."""
    if not pending:
        return 0
    wanted = [row["run_id"] for row in pending]
    configs = {row["run_id"]: json.loads(row["config"]) for row in tables.plan(study, ["run_id", "config"], wanted)}
    for root in {config["data"].get("root") for config in configs.values()} - {None}:
        if not Path(root).is_dir():
            raise ValueError(f"{_short(study / 'grid.yaml')}: data.root: got {root}; allowed: a folder that is here")
    if (most := max(config["runtime"]["devices"] for config in configs.values())) > 1:
        print(
            f"{title}: planned for up to {most} devices a run; a launch on this machine gives each one", file=sys.stderr
        )
    for run_id in wanted:
        rundir.register(study, configs[run_id])
        status, holder = rundir.status(study, run_id), rundir.holder(study, run_id)
        if (status["state"] != "planned" or status.get("lost")) and not (holder and holder.alive):
            # who asks for a retry may have more memory now
            sizes = dict.fromkeys(("micro_batch", "measure_batch")) if options.retry and status.get("attempt") else {}
            rundir.mark(study, run_id, "planned", lost=0, **sizes)
    slots = Slots(study, configs.values(), options)
    launch = Launch(study, pending, configs, slots, options.keep_going)
    print(f"{title}: {len(pending)} of {total} runs to do, {slots.count} x {slots.width} threads", flush=True)
    keep = True
    try:
        with (
            _signals(lambda: setattr(launch, "signals", launch.signals + 1)),
            Progress(title, total, done, sum(row["flops_total"] or 0.0 for row in pending)) as progress,
        ):
            whole = launch.watch(progress, done)
        keep = not whole or any(status["state"] == "failed" for status in launch.outcomes.values())
    finally:
        slots.close(keep)
    for problem in tables.compact(study):
        print(f"{_short(problem.path)}: {problem.what}; left out", file=sys.stderr)
    if whole and all(status["state"] != "cancelled" for status in launch.outcomes.values()):
        return 0
    return 1 if launch.why else 130


def _report(
    study: Path,
    title: str,
    rows: list[Row],
    statuses: dict[str, Row],
    stopped: int,
    options: argparse.Namespace,
    seconds: float,
) -> int:
    """Say how the runs ended, leave the stamp of a stage that is complete; the exit code."""
    counts = Counter(statuses[row["run_id"]]["state"] for row in rows)
    listed = [(row, statuses[row["run_id"]]) for row in rows if statuses[row["run_id"]]["state"] in LISTED]
    for row, status in listed[:SHOWN]:
        print(f"{status['state']}: {row['run_id']} {row['label']}: {status.get('reason')}", file=sys.stderr)
    if len(listed) > SHOWN:
        print(f"... and {len(listed) - SHOWN} more", file=sys.stderr)
    bad = [
        row["run_id"]
        for row, status in listed
        if not (status["state"] == "diverged" or status.get("diverged_upstream"))
    ]
    if failed := [run_id for run_id in bad if statuses[run_id].get("traceback")]:
        where = "" if study.parent == Path("results").resolve() else f" --results {_short(study)}"
        print(
            f"tracebacks: status.json and logs/ in {_short(study / 'runs')}/RUN_ID; in the foreground: "
            f"python -m sweep.worker {failed[0]}{where}; once more: --retry",
            file=sys.stderr,
        )
    parts = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()) if state != "done")
    also = f" ({parts})" if parts else ""
    print(f"{title}: {counts['done']} of {len(rows)} runs done{also}, {seconds:.1f} s", flush=True)
    if stopped:
        print("stopped before the end; the same command resumes", file=sys.stderr)
        return stopped
    if bad and not (options.keep_going and counts["done"]):
        return 2 if all(failures.reopens(statuses[run_id]) for run_id in bad) else 1
    if not options.only:
        outcome = {row["run_id"]: statuses[row["run_id"]]["state"] for row in rows}
        stamp = {"stage": options.stage, "of": options.of, "runs": outcome}
        rundir.atomic_write(study, rundir.stamp_file(study, options.stage, options.of), stamp)
    return 0


def cancel(study: Path, options: argparse.Namespace) -> int:
    """Ask running runs to save and stop: those selected, or all, with the launches they belong to."""
    rows = select(study, options.stage, options.of, options.only)
    if not (options.only or options.stage):
        for folder in rundir.launches_folder(study).glob("*/"):
            (folder / "stop").touch()
    asked = sum(rundir.cancel(study, row["run_id"]) for row in rows)
    print(f"{asked} runs were asked to save and stop" if asked else "nothing is running")
    return 0


def _short(path: Path) -> str:
    return os.path.relpath(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep.launch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", metavar="STUDY", help="results/<study>, or the study's name")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--of", choices=STAGES[:-1], help="evaluations: of which stage")
    parser.add_argument("--only", action="append", default=[], metavar="RUN_ID|KEY=VALUE", help="may be repeated")
    parser.add_argument("--retry", action="store_true", help="also runs that failed")
    parser.add_argument("--keep-going", action="store_true", help="call the stage complete though some runs failed")
    parser.add_argument("--cancel", action="store_true", help="ask what is running to save and stop")
    parser.add_argument("--cluster", choices=("local",), default="local")
    parser.add_argument(
        "--cores", type=worker.positive, metavar="N", help="cores to use (default: all of this process)"
    )
    parser.add_argument("--slots", type=worker.positive, metavar="N", help="worker processes (default: GPUs, or cores)")
    parser.add_argument(
        "--threads-per-slot", type=worker.positive, metavar="N", help="instead of the plan's run.threads"
    )
    parser.add_argument("--max-gpu-hours", type=float, metavar="H", help="refuse to start more, by the high estimate")
    options = parser.parse_args(argv)
    if not (options.stage or options.cancel):
        parser.error("--stage is required")
    if options.of and options.stage not in (None, "evaluation"):
        parser.error("--of goes with --stage evaluation")
    try:
        study = rundir.find(options.study)
        return cancel(study, options) if options.cancel else run(study, options)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.study}: {error.strerror}", file=sys.stderr)
        return 2
    except Stillborn as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
