"""How far is a study, what failed, and why? A table of its stages and of the runs in progress.

    python -m sweep.status results/digits                # live on a terminal until all is done, once elsewhere
    python -m sweep.status results/digits --failures     # every run that ended badly, alike ones together
    python -m sweep.status results/digits --why g012     # what is known of one run, its traceback included
    python -m sweep.status results/digits --tail g012    # the end of its log
    python -m sweep.status results/digits --json

Only reads: nothing is claimed, started or mended here. The start of a run id will do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep import batches, rundir, stages, tables

if TYPE_CHECKING:
    from rich.console import RenderableType

Row = dict[str, Any]

COLUMNS = (
    *("run_id", "stage", "label", "checkpoint", "points", "encode", "upstream"),
    *("flops_total", "gpu_h_low", "gpu_h_high", "config"),
)
STATES = ("done", "running", "queued", "pending", "lost", "blocked", "cancelled", "failed", "diverged")
BAD = ("failed", "diverged", "blocked", "lost")
REFRESH_S = 2.0
SHOWN = 20  # runs in progress


@dataclass
class Stage:
    """Runs of one stage by state; hours are device-hours."""

    name: str
    runs: dict[str, int]  # state -> number
    hours_planned: tuple[float, float]
    hours_spent: float
    left_s: float | None  # of the runs to do, at the rate of those that are done; null while none is

    @property
    def total(self) -> int:
        return sum(self.runs.values())

    @property
    def open(self) -> int:
        return self.total - sum(self.runs[state] for state in ("done", "failed", "diverged", "blocked", "cancelled"))


@dataclass
class Run:
    """One run as its record has it."""

    run_id: str
    label: str
    stage: str
    state: str
    attempt: int | None
    reason: str | None
    step: int | None
    steps: int | None
    left_s: float | None
    host: str | None
    pid: int | None
    job: str | None  # of Slurm, that has it or is to do it


@dataclass
class Snapshot:
    """A study at one moment."""

    study: str
    stages: list[Stage]
    runs: list[Run] = field(repr=False)

    def of(self, *states: str) -> list[Run]:
        return [run for run in self.runs if run.state in states]

    @property
    def open(self) -> bool:
        return any(stage.open for stage in self.stages)


class Reader:
    """Reads a study again and again; records that have not changed are read once."""

    def __init__(self, study: Path) -> None:
        self.study, self.records = study, rundir.Records(study)
        self.rows = tables.plan(study, COLUMNS)
        self.devices = {row["run_id"]: json.loads(row["config"])["runtime"]["devices"] for row in self.rows}
        self.rule = {row["run_id"]: _rule(row) for row in self.rows}

    def look(self) -> Snapshot:
        held = [(row, self.records.status(row["run_id"])) for row in self.rows]
        queued = batches.covered(batches.opened(self.study))
        runs = [self._run(row, status, queued) for row, status in held]
        by_rule: dict[str, list[tuple[Row, Row, Run]]] = {}
        for (row, status), run in zip(held, runs, strict=True):
            by_rule.setdefault(self.rule[row["run_id"]], []).append((row, status, run))
        found = [self._stage(name, by_rule[name]) for name in stages.RULES if name in by_rule]
        return Snapshot(self.study.name, found, runs)

    def _run(self, row: Row, status: Row, queued: dict[str, tuple[batches.Batch, int]]) -> Run:
        state, attempt = status["state"], status.get("attempt")
        if state == "running":
            holder = rundir.holder(self.study, row["run_id"])
            state = "running" if holder is not None and holder.alive else "lost"
        elif state in ("planned", "interrupted") or (
            state == "done" and not rundir.finished(self.study, status, row["points"], row["encode"])
        ):
            state = "queued" if row["run_id"] in queued else "pending"
        spent, step, steps = status.get("spent") or {}, status.get("step"), status.get("steps")
        left = None
        if state == "running" and steps and spent.get("steps") and spent.get("train_s"):
            left = (steps - (step or 0)) * spent["train_s"] / spent["steps"]
        here, job = state == "running", status.get("job") if state == "running" else None
        if state == "queued":
            batch, task = queued[row["run_id"]]
            job = batch.element(task) if batch.job else "being submitted"
        return Run(
            run_id=row["run_id"],
            label=row["label"],
            stage=self.rule[row["run_id"]],
            state=state,
            attempt=attempt,
            reason=status.get("reason"),
            step=step if steps else None,
            steps=steps,
            left_s=left,
            host=status.get("host") if here else None,
            pid=status.get("pid") if here else None,
            job=job,
        )

    def _stage(self, name: str, held: list[tuple[Row, Row, Run]]) -> Stage:
        spent = {
            row["run_id"]: (status.get("spent") or {}).get("wall_s", 0.0) * self.devices[row["run_id"]]
            for row, status, _ in held
        }
        ended = [row for row, _, run in held if run.state == "done" and spent[row["run_id"]]]
        seconds = sum(spent[row["run_id"]] for row in ended)
        work = sum(row["flops_total"] or 0.0 for row in ended)
        # a run that was given more points has an old record: only one that runs says how far it is
        behind = {
            run.run_id: run.step / run.steps for _, _, run in held if run.state == "running" and run.step and run.steps
        }
        to_do = sum(
            (row["flops_total"] or 0.0) * (1 - behind.get(row["run_id"], 0.0))
            for row, _, run in held
            if run.state in ("running", "queued", "pending", "lost")
        )
        at_work = sum(run.state == "running" for _, _, run in held)
        return Stage(
            name=name,
            runs=dict.fromkeys(STATES, 0) | Counter(run.state for _, _, run in held),
            hours_planned=(
                sum(row["gpu_h_low"] or 0.0 for row, _, _ in held),
                sum(row["gpu_h_high"] or 0.0 for row, _, _ in held),
            ),
            hours_spent=sum(spent.values()) / 3600,
            left_s=to_do * seconds / work / max(at_work, 1) if work and to_do else None,
        )


def _rule(row: Row) -> str:
    """The name of a run's stage in the workflow: an evaluation is named by what it measures."""
    of = (row["checkpoint"] or " ")[0]
    return next(
        rule for rule, known in stages.RULES.items() if known.stage == row["stage"] and (known.of or " ")[0] == of
    )


def find(rows: Iterable[Row], start: str) -> Row:
    """The one run whose id starts so; ValueError names those that do."""
    found = [row for row in rows if row["run_id"].startswith(start)] if start else []
    if len(found) != 1:
        some = ", ".join(row["run_id"] for row in found[:5]) or "no run of this plan"
        raise ValueError(f"run id: got {start!r}; allowed: the start of one id; this is that of {some}")
    return found[0]


# --- what is shown -----------------------------------------------------------------------------------------------


def clock(seconds: float | None) -> str:
    """h:mm:ss; empty when it is not known."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def hours(value: float) -> str:
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def table(snapshot: Snapshot) -> RenderableType:
    """Stages, and below them what runs now."""
    from rich.console import Group
    from rich.table import Table

    states = [state for state in STATES if state == "done" or any(stage.runs[state] for stage in snapshot.stages)]
    whole = Table(title=f"{snapshot.study}", title_justify="left")
    whole.add_column("stage")
    for name in ("runs", *states, "hours spent", "planned", "left"):
        whole.add_column(name, justify="right")
    for stage in snapshot.stages:
        low, high = stage.hours_planned
        counts = [str(stage.runs[state] or "") for state in states]
        span = f"{hours(low)}–{hours(high)}"
        whole.add_row(stage.name, str(stage.total), *counts, hours(stage.hours_spent), span, clock(stage.left_s))
    parts: list[RenderableType] = [whole]
    if running := snapshot.of("running"):
        now = Table(title="running", title_justify="left")
        for name, side in (("run", "left"), ("what", "left"), ("step", "right"), ("left", "right"), ("where", "left")):
            now.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
        for run in running[:SHOWN]:
            step = f"{run.step} of {run.steps}" if run.steps else ""
            again = f", attempt {run.attempt}" if (run.attempt or 1) > 1 else ""
            where = f"{run.host}, job {run.job}" if run.job else f"{run.host} {run.pid}"
            now.add_row(run.run_id, run.label, step, clock(run.left_s), f"{where}{again}")
        parts.append(now)
        if len(running) > SHOWN:
            parts.append(f"... and {len(running) - SHOWN} more")
    if bad := snapshot.of(*BAD):
        counted = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in bad).items())
        parts.append(f"{counted}: --failures lists them, --why RUN explains one")
    return Group(*parts)


def failures(snapshot: Snapshot) -> list[str]:
    """Runs that ended badly, those with equal reasons under one line."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in snapshot.of(*BAD):
        alike.setdefault((run.state, run.reason or "no reason was recorded"), []).append(run)
    lines: list[str] = []
    for (state, reason), held in sorted(alike.items(), key=lambda item: (BAD.index(item[0][0]), -len(item[1]))):
        lines.append(f"{state}, {len(held)} run{'s' if len(held) > 1 else ''}: {reason}")
        lines += [f"  {run.run_id}  {run.stage}  {run.label}" for run in held]
    return lines or ["nothing ended badly"]


def why(study: Path, row: Row, run: Run) -> list[str]:
    """What is known of one run, in the order in which one would ask."""
    status, holder = rundir.status(study, row["run_id"]), rundir.holder(study, row["run_id"])
    lines = [f"{run.run_id}: {run.label}", f"state: {run.state}{f', {run.reason}' if run.reason else ''}"]
    if holder is not None:
        gone = "" if holder.alive else ", gone: the next launch takes the run over"
        where = f" (job {holder.job})" if holder.job else ""
        lines.append(f"held by: process {holder.pid} on {holder.host}{where}, attempt {holder.attempt}{gone}")
    if run.state == "queued":
        lines.append(f"to be done by: job {run.job}")
    for source in row["upstream"] or ():
        lines.append(f"needs: {source}, {rundir.status(study, source.partition('@')[0])['state']}")
    if spent := status.get("spent"):
        steps = f", {spent['steps']:,} steps" if spent.get("steps") else ""
        lines.append(f"spent: {clock(spent['wall_s'])}{steps}; attempts: {status.get('attempt', 1)}")
    for event in _events(study, row["run_id"]):
        told = {key: value for key, value in event.items() if key not in ("time", "event", "attempt")}
        about = ", ".join(f"{key} {value}" for key, value in told.items() if isinstance(value, str | int | float))
        lines.append(f"{event.get('time')}  attempt {event.get('attempt', '?')}  {event['event']}  {about}".rstrip())
    if trace := status.get("traceback"):
        lines += ["", trace.rstrip()]
    log = rundir.log_file(study, row["run_id"])
    return [*lines, *([f"log: {os.path.relpath(log)}"] if log.exists() else [])]


def _events(study: Path, run_id: str) -> list[Row]:
    """The journal without what training reports every few steps."""
    try:
        lines = rundir.journal_file(study, run_id).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(event, dict) and event.get("event", "record") != "record":
            events.append(event)
    return events


def tail(study: Path, run_id: str, count: int) -> list[str]:
    """The last lines of a run's log; ValueError when it has none."""
    log = rundir.log_file(study, run_id)
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 400 * count))
            held = file.read().decode(errors="replace").splitlines()[-count:]
        return held or [f"{os.path.relpath(log)} is empty: nothing was said"]
    except FileNotFoundError:
        raise ValueError(f"--tail: {run_id} has written nothing yet; allowed: a run that was started") from None


def watch(reader: Reader) -> None:
    """Show the table until nothing is left to do, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    # a label, or the name of a folder, may look like markup
    with Live(table(reader.look()), console=Console(markup=False), refresh_per_second=4) as live:
        while (snapshot := reader.look()).open:
            live.update(table(snapshot))
            time.sleep(REFRESH_S)
        live.update(table(snapshot))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep.status", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", metavar="STUDY", help="results/<study>, or the study's name")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--failures", action="store_true", help="runs that ended badly, with their reasons")
    shown.add_argument("--why", metavar="RUN", help="what is known of one run")
    shown.add_argument("--tail", metavar="RUN", help="the end of a run's log")
    shown.add_argument("--json", action="store_true", help="everything, for programs")
    parser.add_argument("--once", action="store_true", help="on a terminal too: print and return")
    parser.add_argument("--lines", type=int, default=20, metavar="N", help="of --tail (default: 20)")
    options = parser.parse_args(argv)
    try:
        return _show(rundir.find(options.study), options)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.study}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def _show(study: Path, options: argparse.Namespace) -> int:
    reader = Reader(study)
    if options.tail is not None:
        print(*tail(study, find(reader.rows, options.tail)["run_id"], max(options.lines, 1)), sep="\n")
        return 0
    table_only = not (options.failures or options.why is not None or options.json)
    if table_only and not options.once and sys.stdout.isatty():
        watch(reader)
        return 0
    snapshot = reader.look()
    if options.json:
        print(json.dumps(asdict(snapshot), indent=1))
    elif options.failures:
        print(*failures(snapshot), sep="\n")
    elif options.why is not None:
        row = find(reader.rows, options.why)
        run = next(run for run in snapshot.runs if run.run_id == row["run_id"])
        print(*why(study, row, run), sep="\n")
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table(snapshot), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
