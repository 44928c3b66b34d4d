"""How do the runs of a stage get done? By processes on this machine or jobs of Slurm, until every run has an outcome.

    python -m sweep.launch results/digits --stage tokenizer
    python -m sweep.launch results/digits --stage evaluation --of generator
    python -m sweep.launch results/digits --stage generator --only generator_size=25k --retry
    python -m sweep.launch results/digits --stage generator --cluster slurm --slurm partition=gpu time_min=1440
    python -m sweep.launch results/digits --stage generator --cluster slurm --detach
    python -m sweep.launch results/digits --cancel                  # from another terminal; --cancel RUN for some

What is finished stays: a second call returns at once, one after an interruption resumes. Ctrl-C lets the workers of
this machine save and stop, and the second kills them; jobs of Slurm go on, and the same command waits for them again.
Launches of one study share its runs, as whoever claims a run has it.

Exit codes: 0 all done, or diverged (--detach: submitted); 1 some failed; 2 bad input; 3 refused; 130 stopped or
detached before the end. Runs that failed are tried again with --retry; where the cause lay outside the run (a file, the
disk, the machine), by the next launch anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from models.config import STAGES
from sweep import batches, failures, request, rundir, slurm, source, tables, worker
from sweep.progress import Progress
from sweep.slots import Local, Stillborn
from sweep.watch import Row, Watch, awaits

COLUMNS = (
    *("run_id", "stage", "label", "checkpoint", "points", "encode", "upstream"),
    *("flops_total", "gpu_h_high", "mem_gib"),
)
LISTED = ("failed", "blocked", "diverged")  # outcomes that are named with their reason
SHOWN = 20  # of them


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


# --- a launch ----------------------------------------------------------------------------------------------------


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
        if not awaits(row, ours) and (why := worker.blocked(study, row["stage"], row["upstream"])):
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
    if pending and options.detach:
        return stopped
    statuses |= {run_id: rundir.status(study, run_id) for run_id in (*waits, *(row["run_id"] for row in pending))}
    return _report(study, title, rows, statuses, stopped, options, time.monotonic() - began)


def _bring(study: Path, title: str, pending: list[Row], done: int, total: int, options: argparse.Namespace) -> int:
    """Run what is pending: 0, or where it was left before the end 130 (by a user) or 1 (by what went wrong)."""
    if not pending:
        return 0
    wanted = [row["run_id"] for row in pending]
    configs = {row["run_id"]: json.loads(row["config"]) for row in tables.plan(study, ["run_id", "config"], wanted)}
    for root in {config["data"].get("root") for config in configs.values()} - {None}:
        if not Path(root).is_dir():
            raise ValueError(f"{_short(study / 'grid.yaml')}: data.root: got {root}; allowed: a folder that is here")
    if options.require_clean and (changed := source.changes()):
        raise ValueError(f"--require-clean: {len(changed)} files differ from the commit ({changed[0].strip()}, ...)")
    folder = rundir.launches_folder(study) / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    watch = _place(study, pending, configs, folder, options)
    folder.mkdir(parents=True)
    folder.parent.chmod(0o700)  # submitit pickles what it runs
    in_hand = batches.covered(batches.opened(study))
    for row in pending:
        rundir.register(study, configs[row["run_id"]])
        state = rundir.status(study, row["run_id"])["state"]
        if row["run_id"] not in in_hand or state in ("failed", "cancelled"):
            _reopen(study, row, options.retry)
    print(f"{title}: {len(pending)} of {total} runs to do, {watch.about()}", flush=True)
    if options.detach:
        print(f"{title}: {watch.leave()}; the same command without --detach waits for them")
        return 0
    keep = True
    try:
        with Progress(title, total, done, sum(row["flops_total"] or 0.0 for row in pending)) as progress:
            whole = watch.watch(progress, done)
        keep = not whole or any(status["state"] == "failed" for status in watch.outcomes.values())
    finally:
        watch.close(keep)
    for problem in tables.compact(study):
        print(f"{_short(problem.path)}: {problem.what}; left out", file=sys.stderr)
    if watch.why:
        print(f"{title}: stopped ({watch.why})", file=sys.stderr)
        return 1
    return 0 if whole and all(status["state"] != "cancelled" for status in watch.outcomes.values()) else 130


def _place(study: Path, rows: list[Row], configs: dict[str, Row], folder: Path, options: argparse.Namespace) -> Watch:
    """Where the runs are done."""
    if options.cluster == "local":
        return Local(study, rows, configs, folder, options)
    from sweep.dispatch import Cluster

    return Cluster(study, rows, configs, folder, options)


def _reopen(study: Path, row: Row, retry: bool) -> None:
    """Let a run that nobody has in hand start with a clean slate."""
    holder = rundir.holder(study, row["run_id"])  # first: a run that ends says so before it is given back
    status = rundir.status(study, row["run_id"])
    if (holder and holder.alive) or status["state"] == "interrupted":
        return
    if status["state"] in ("done", "diverged") and rundir.finished(study, status, row["points"], row["encode"]):
        return  # since it was found to be pending, by another launch
    if status["state"] != "planned" or status.get("retries"):
        # who asks for a retry may have more memory now
        sizes = dict.fromkeys(("micro_batch", "measure_batch")) if retry and status.get("attempt") else {}
        rundir.mark(study, row["run_id"], "planned", retries={}, **sizes)


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
        kinds = [failures.kind(statuses[run_id]) for run_id in bad]
        return 2 if all(kind is not None and failures.POLICY[kind].mend for kind in kinds) else 1
    if not options.only:
        outcome = {row["run_id"]: statuses[row["run_id"]]["state"] for row in rows}
        stamp = {"stage": options.stage, "of": options.of, "runs": outcome}
        rundir.atomic_write(study, rundir.stamp_file(study, options.stage, options.of), stamp)
    return 0


def cancel(study: Path, options: argparse.Namespace) -> int:
    """Let runs save and stop, and take those that wait out of the queue: those named or selected, or all.

    Where all are meant, the launches they belong to stop too.
    """
    chosen = select(study, options.stage, options.of, options.only)
    if options.cancel:
        named = {row["run_id"] for run_id in options.cancel for row in select(study, None, None, [run_id])}
        chosen = [row for row in chosen if row["run_id"] in named]
    everything = not (options.cancel or options.only or options.stage)
    opened = batches.opened(study)
    if everything:
        for folder in rundir.launches_folder(study).glob("*/"):
            if folder != rundir.code_folder(study):
                (folder / "stop").touch()
    asked = [row["run_id"] for row in chosen if rundir.cancel(study, row["run_id"])]
    covered = batches.covered(opened).keys() - set(asked)
    waiting = [row["run_id"] for row in chosen if row["run_id"] in covered and not _resting(study, row["run_id"])]
    for run_id in waiting:
        rundir.mark(study, run_id, "cancelled", "cancelled before it began")
    idle = [
        batch.element(task)
        for batch in opened
        for task in batch.open_tasks()
        if batch.job and all(_resting(study, run_id) for run_id in batch.runs(task))
    ]
    if idle and (failed := slurm.cancel(idle)):
        print(f"jobs could not be taken out of the queue: {failed}", file=sys.stderr)
    said = f"{len(asked)} runs were asked to save and stop" if asked else "nothing is running"
    print(f"{said}, {len(waiting)} that waited are cancelled" if waiting else said)
    return 0


def _resting(study: Path, run_id: str) -> bool:
    """Is nothing to be done about a run, now or later?"""
    holder, state = rundir.holder(study, run_id), rundir.status(study, run_id)["state"]
    return state in (*rundir.FINAL, "cancelled", "blocked") and not (holder and holder.alive)


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
    parser.add_argument(
        "--cancel", nargs="*", metavar="RUN", help="let runs save and stop; without a name all, and the launches too"
    )
    parser.add_argument("--max-gpu-hours", type=float, metavar="H", help="refuse to start more, by the high estimate")
    parser.add_argument("--require-clean", action="store_true", help="refuse to run code that differs from its commit")
    parser.add_argument("--cluster", choices=("local", "slurm"), default="local", help="where (default: this machine)")
    here = parser.add_argument_group("on this machine")
    here.add_argument("--cores", type=worker.positive, metavar="N", help="cores to use (default: all of this process)")
    here.add_argument("--slots", type=worker.positive, metavar="N", help="worker processes (default: GPUs, or cores)")
    here.add_argument("--threads-per-slot", type=worker.positive, metavar="N", help="instead of the plan's run.threads")
    queue = parser.add_argument_group("on Slurm")
    waits = queue.add_mutually_exclusive_group()
    waits.add_argument("--wait", action="store_true", help="until all runs have an outcome (default)")
    waits.add_argument("--detach", action="store_true", help="submit and return")
    queue.add_argument(
        "--slurm", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=f"KEY: {', '.join(request.KEYS)}"
    )
    queue.add_argument("--poll-s", type=float, default=10.0, metavar="S", help="between two questions to Slurm")
    options = parser.parse_args(argv)
    if not (options.stage or options.cancel is not None):
        parser.error("--stage is required")
    if options.of and options.stage not in (None, "evaluation"):
        parser.error("--of goes with --stage evaluation")
    if options.cluster == "local" and (options.detach or options.slurm):
        parser.error("--detach and --slurm go with --cluster slurm")
    try:
        request.site(options.slurm)  # a mistake is one whether there is anything to do or not
        study = rundir.find(options.study)
        return cancel(study, options) if options.cancel is not None else run(study, options)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.study}: {error.strerror}", file=sys.stderr)
        return 2
    except (Stillborn, slurm.Silent) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
