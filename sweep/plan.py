"""What would a grid run, and what does it cost? Writes results/<study>/plan.parquet.

    python -m sweep.plan grid.yaml                     # a priced table; writes the plan
    python -m sweep.plan grid.yaml --dry-run --json    # the same for programs, nothing written
    python -m sweep.plan grid.yaml --explain g3f       # what a run is and what its id is made of
    python -m sweep.plan grid.yaml --diff g3f g81      # what sets two runs apart
    python -m sweep.plan grid.yaml --assume noise=0.05 # the intervals to expect where points scatter by 5 %

Exit codes: 0; 2 a mistake in the grid, one line; 3 the plan costs more than is allowed, one line, nothing written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sweep import advice, arrow, cost, identity, rundir, source, width
from sweep.bill import Stage, bill, show
from sweep.design import Design, design
from sweep.document import GridError, naming
from sweep.given import given
from sweep.grid import Grid, load
from sweep.rows import Row, rows
from sweep.schema import VERSION, schema

__all__ = ["Plan", "Stage", "enumerate_runs", "load", "main", "plan", "write"]

BATCH = 4096  # rows that are held as Python objects at once


@dataclass
class Plan:
    """All rows of a grid, priced against what is done already."""

    grid: Grid
    study: Path
    table: pa.Table
    stages: dict[str, Stage]
    removed: int
    warnings: list[str] = field(default_factory=list)

    @property
    def total(self) -> Stage:
        return Stage.total(self.stages.values())

    def refusal(self, max_gpu_hours: float | None = None) -> str | None:
        """Why this plan must not be launched, in one line: a limit of the grid or of the command line."""
        price, total = self.grid.price, self.total
        high = total.hours_left[1]
        limits = (
            ("--max-gpu-hours", max_gpu_hours, high, "device-hours"),
            (f"{self.grid.file}: price.max_gpu_hours", price.max_gpu_hours, high, "device-hours"),
            (f"{self.grid.file}: price.max_disk_gib", price.max_disk_gib, total.disk_gib, "GiB"),
        )
        for name, limit, needed, unit in limits:
            if limit is not None and needed > limit:
                return f"{name}: the plan needs up to {needed:.3g} {unit}; allowed: {limit:g}"
        return None


def enumerate_runs(grid: Grid) -> Iterator[Row]:
    """Rows of the plan (``sweep.schema.PLAN``), priced by the band; GridError where the grid is impossible."""
    with naming(grid.file):
        yield from rows(grid, design(grid), cost.Rates(grid.price))


def plan(grid: Grid, results: str | Path = "results") -> Plan:
    """The plan of a grid, with what ``results`` holds of it already. Writes nothing."""
    study = Path(results) / grid.study
    version = _lock(study).get("version", VERSION)
    if version != VERSION:
        raise GridError.got("version", version, f"{VERSION}, or another --results folder", str(rundir.lock_file(study)))
    with naming(grid.file):
        planned = design(grid)
        throughput, unread = cost.measured(study)
        priced = rows(grid, planned, cost.Rates(grid.price, throughput))
        table = pa.Table.from_batches(_batches(priced), schema("plan"))
    stages = bill(table, study, _states(study))
    result = Plan(grid, study, table, stages, planned.removed)
    result.warnings += advice.identifiability(grid, planned.runs) + advice.missing(grid) + _limits(result, planned)
    result.warnings += [f"{part}: not read; its throughput is left out of the price." for part in unread]
    return result


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield arrow.batch(batch, schema("plan"))


def _states(study: Path) -> dict[str, dict[str, Any]]:
    """Recorded status by run, of runs that have a folder."""
    try:
        names = os.listdir(study / "runs")
    except OSError:
        return {}
    return {name: rundir.status(study, name) for name in names if rundir.RUN_ID.fullmatch(name)}


def _limits(result: Plan, planned: Design) -> list[str]:
    """Runs that do not fit a device or a time limit, as sentences."""
    price, found = result.grid.price, []
    for name, stage in result.stages.items():
        if price.mem_gib is not None and stage.mem_gib > price.mem_gib:
            remedy = "." if name == "evaluation" else "; a smaller run.micro_batch helps."
            found.append(
                f"{name}: up to {stage.mem_gib:.3g} GiB are needed where a {price.device} has {price.mem_gib:g}{remedy}"
            )
    if price.time_limit_h is not None:
        longest: dict[str, float] = {}
        columns = (result.table[name].to_pylist() for name in ("run_id", "stage", "gpu_h_high"))
        for run_id, name, hours in zip(*columns, strict=True):
            devices = planned.runs[run_id].variant.arm.runtime.devices if run_id in planned.runs else 1
            longest[name] = max(longest.get(name, 0.0), hours / devices)
        for name, hours in longest.items():
            if (times := math.ceil(hours / price.time_limit_h) - 1) > 0:
                found.append(
                    f"{name}: the longest run may take {hours:.3g} h, beyond the limit of {price.time_limit_h:g} h: "
                    f"up to {times} requeue{'s' if times > 1 else ''}."
                )
    return found


# --- writing ---------------------------------------------------------------------------------------------------


def write(result: Plan) -> bool:
    """Put plan.parquet, plan.lock.json and a copy of the grid into the study; False where all is there already.

    An equal plan is left as it is, its time of change included.
    """
    study, text = result.study, result.grid.text
    sink = pa.BufferOutputStream()
    kind = result.table.schema.with_metadata({"version": str(VERSION)})
    repetitive = [name for name in kind.names if name not in ("config", "run_id", "label", "checkpoint", "upstream")]
    pq.write_table(
        result.table.replace_schema_metadata(kind.metadata),
        sink,
        compression="zstd",
        use_dictionary=repetitive,
        row_group_size=16 * BATCH,
        write_page_checksum=True,
    )
    made, held, before = sink.getvalue().to_pybytes(), _read(rundir.plan_file(study)), _lock(study)
    names = {name for evaluation in result.grid.evaluations for name in evaluation.protocol.extractors}
    weights = [file for name in names if (file := advice.weights_file(name)) is not None]
    stands_for = {"grid_sha256": hashlib.sha256(text).hexdigest(), "given": given(text.decode(), weights)}
    if held == made and before.items() >= stands_for.items():
        return False
    code = source.provenance()
    lock = {
        "version": VERSION,
        **stands_for,
        "commit": code["commit"],
        "versions": code["versions"],
        "created": rundir.now(),
    }
    rundir.atomic_write(study, study / "grid.yaml", text)
    if held != made:
        rundir.atomic_write(study, rundir.plan_file(study), made)
    rundir.atomic_write(study, rundir.lock_file(study), lock)  # last: it vouches for the others
    return True


def _lock(study: Path) -> dict[str, Any]:
    """What plan.lock.json says; empty where there is none or it is damaged, as planning writes it anew."""
    try:
        held = json.loads(_read(rundir.lock_file(study)) or b"{}")
    except ValueError:
        return {}
    return held if isinstance(held, dict) else {}


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


# --- showing ---------------------------------------------------------------------------------------------------


def summary(result: Plan) -> dict[str, Any]:
    """The plan in figures, as JSON values."""
    total, devices = result.total, result.grid.price.devices
    return {
        "study": result.grid.study,
        "grid": result.grid.file,
        "plan": str(rundir.plan_file(result.study)),
        "rows": result.table.num_rows,
        "points_removed": result.removed,
        "device": result.grid.price.device,
        "stages": {name: vars(stage) for name, stage in result.stages.items()},
        "total": vars(total),
        "wall_hours_left": [hours / devices for hours in total.hours_left],
        "warnings": result.warnings,
    }


def _find(grid: Grid, prefixes: list[str]) -> list[Row]:
    """The rows whose ids start with each prefix; GridError unless each means one row."""
    found: dict[str, list[Row]] = {prefix: [] for prefix in prefixes}
    for row in enumerate_runs(grid):
        for prefix, matches in found.items():
            if row["run_id"].startswith(prefix):
                matches.append(row)
    for prefix, matches in found.items():
        if len(matches) != 1:
            some = ", ".join(row["run_id"] for row in matches[:5]) or "no run of this grid"
            raise GridError.got("run id", prefix, f"the start of one id; this is that of {some}", grid.file)
    return [found[prefix][0] for prefix in prefixes]


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number of hours above 0")
    return value


def _run(options: argparse.Namespace) -> int:
    assumed = width.Assumed.read(options.assume) if options.assume is not None else width.Assumed()
    grid = load(options.grid)
    if options.explain:
        print(identity.explain(_find(grid, [options.explain])[0]))
        return 0
    if options.diff:
        print(identity.diff(*_find(grid, options.diff)))
        return 0
    result = plan(grid, options.results)
    refusal = result.refusal(options.max_gpu_hours)
    written = None if options.dry_run or refusal else write(result)
    expected = width.expected(result.table, assumed)
    if options.json:
        told = {"expected": expected.values() if expected else None, "written": bool(written), "refused": refusal}
        print(json.dumps(summary(result) | told, indent=2))
    else:
        show(result.grid, result.stages, result.removed, result.warnings)
        for line in width.sentences(expected) if expected else ():
            print(line)
        if written is not None:
            print(f"{'wrote' if written else 'unchanged:'} {rundir.plan_file(result.study)}")
    if refusal:
        print(refusal, file=sys.stderr)
        return 3
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sweep.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("grid", metavar="GRID", help="a grid file")
    parser.add_argument("--results", default="results", metavar="DIR", help="where studies lie (default: results)")
    parser.add_argument("--json", action="store_true", help="print figures for programs")
    parser.add_argument("--max-gpu-hours", type=_hours, metavar="H", help="refuse a plan that may need more")
    parser.add_argument("--assume", metavar="NAME=VALUE,...", help=f"for expected intervals: {', '.join(width.RANGES)}")
    parser.add_argument("--explain", metavar="RUN_ID", help="what a run is; the start of its id will do")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what sets two runs apart")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except GridError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or options.results}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
