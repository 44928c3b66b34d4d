"""What every table holds, and how parts of it are written, verified and compacted.

    python -m sweep.tables verify results/digits      # open every part, name the damaged ones
    python -m sweep.tables compact results/digits     # one file per table, sources kept

Schemas are pyarrow; changes are additive, a type never changes, and a column's unit is in its name or its entry
in ``results/README.md``. A missing value is null with a reason beside it, never 0.

A run writes parts ``tables/<table>/study=<s>/run=<run_id>/<attempt>-<seq>.parquet``, each whole or not at all, and
never changes one. Rows of a later attempt supersede those of an earlier one with the same ``CURRENT`` key.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sweep import rundir

VERSION = 1  # of the layout of a results folder; readers refuse a folder that says another

S, I, F, B = pa.string(), pa.int64(), pa.float64(), pa.bool_()

# One row per planned run. Rows of later stages repeat what they were built from (tokenizer_*, generator_*), so
# that one file answers most questions without a join. A point is a step count of a run that is measured.
PLAN: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,
    "stage": S,
    "family": S,
    "label": S,  # what a person calls it: "vq 16x64 s0 > llama 120k s0 @ 1e11"
    "data": S,
    "seed": I,
    "upstream": pa.list_(S),  # checkpoints ("t0123456789ab@2000") or run ids that have to be done before
    "points": pa.list_(I),  # steps at which a trained run is measured, each with a checkpoint of its own
    "encode": pa.list_(I),  # points of a tokenizer whose codes generators train on
    "checkpoint": S,  # evaluation rows: the checkpoint that is measured
    "point": I,  # evaluation rows: its step
    "protocol": S,  # evaluation rows: name of the protocol in the grid
    "protocol_id": S,  # and the hash of its fields
    "fields": S,  # JSON of the family's fields
    "recipe": S,  # JSON of the training recipe
    "config": S,  # JSON of everything a worker needs
    "tokenizer": S,  # checkpoint id of the tokenizer that this row is or was built from
    "tokenizer_family": S,
    "tokenizer_seed": I,
    "tokenizer_steps": I,
    "tokens": I,
    "codebook": I,
    "bits_nominal": F,
    "generator": S,  # run id
    "generator_family": S,
    "generator_size": S,
    "generator_seed": I,
    "evaluation_seed": I,
    "params_core": I,
    "params_total": I,
    "batch": I,
    "lr": F,
    "steps": I,  # longest point
    "images": F,  # steps x batch, to the longest point (or to this point)
    "epochs": F,  # images / unique training images; null where images never repeat
    "flops_target": F,  # the budget that asked for this point
    "flops_to_point": F,  # training FLOPs of the path to this point, its decay branch included: the x of a law
    "flops_paid": F,  # training FLOPs of all pieces of this run, shared trunk once: the bill
    "flops_data": F,  # making the images
    "flops_encode": F,  # encoding the training images into codes, once per tokenizer checkpoint
    "flops_upstream": F,  # training FLOPs of the stages this row was built from, to their points
    "flops_sample": F,  # evaluation: sampling, search included
    "flops_measure": F,  # evaluation: decoding and metric features
    "flops_total": F,  # everything this row itself costs
    "mem_gib": F,
    "disk_gib": F,
    "gpu_h_low": F,
    "gpu_h_high": F,
    "price": S,  # "band" or "measured"
    "axes": S,  # JSON: grid axis -> value, for free-form grouping
    "flags": S,  # comma-separated: lr_edge, ...
}

# One row per (attempt of a) run that ended: what it was, what it cost, how it ended.
RUNS: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,
    "stage": S,
    "family": S,
    "label": S,
    "attempt": I,
    "status": S,  # done, diverged, failed, cancelled
    "reason": S,  # why, when not done
    "seed": I,
    "steps": I,  # steps trained in all (every piece)
    "params_core": I,
    "params_total": I,
    "flops_paid": F,
    "wall_s": F,
    "train_s": F,  # spent in training steps
    "flops_per_s": F,  # achieved in training steps
    "mem_peak_gib": F,
    "device": S,
    "threads": I,
    "host": S,
    "started": pa.timestamp("us", tz="UTC"),
    "ended": pa.timestamp("us", tz="UTC"),
    "commit": S,
    "dirty": B,
    "versions": S,  # JSON: python, torch, numpy, torch-fidelity
}

# Long: one row per (run, step, split, metric, protocol). Training losses and evaluations alike.
CURVES: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,  # the run that wrote the row (an evaluation writes under its own id)
    "checkpoint": S,  # what was measured; null on rows written while training
    "attempt": I,
    "step": I,
    "images": F,
    "epochs": F,
    "flops": F,  # training FLOPs of the path to this step
    "split": S,  # train, heldout, or null for generated samples
    "metric": S,
    "value": F,
    "reason": S,  # why value is null
    "error": F,  # standard error of value where one is known
    "n": I,  # images behind the value
    "protocol": S,
    "protocol_id": S,
    "extractor": S,
    "extractor_hash": S,
    "reference": S,  # train or heldout: what generated or decoded images were compared with
    "reference_hash": S,
    "weights": S,
    "sampler": S,
    "sampler_steps": I,
    "temperature": F,
    "top_k": I,
    "top_p": F,
    "guidance": F,
    "guidance_from": S,  # fixed or search
    "labels": S,
    "seed": I,  # of the samples
}

# Small image grids, so that figures need nothing but tables. Pixels are uint8, row-major, height x width x channel.
IMAGES: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,
    "checkpoint": S,
    "attempt": I,
    "step": I,
    "kind": S,  # original, reconstruction, sample
    "index": I,
    "label": I,
    "guidance": F,
    "height": I,
    "width": I,
    "channels": I,
    "pixels": pa.binary(),
}

TABLES: dict[str, dict[str, pa.DataType]] = {"plan": PLAN, "runs": RUNS, "curves": CURVES, "images": IMAGES}


def schema(table: str) -> pa.Schema:
    """The Arrow schema of a table; every column may be null."""
    return pa.schema([pa.field(name, kind) for name, kind in TABLES[table].items()])


# Which attempt of a row counts: the highest one with the same values here.
CURRENT: dict[str, tuple[str, ...]] = {
    "runs": ("run_id",),
    "curves": ("run_id", "step", "metric"),
    "images": ("run_id", "step", "kind"),
}
# What a row measures or costs; two current rows that agree on everything else are one row twice.
MEASURED = frozenset({"value", "reason", "error", "pixels", "images", "epochs", "flops", "label"})

ROW_GROUP_BYTES = 64 << 20


class Damaged(ValueError):
    """A file that cannot be read as what it should be; the message starts with its path."""


# --- writing ---------------------------------------------------------------------------------------------------


class Writer:
    """Collects rows of one attempt of one run; ``flush`` makes one part of them.

    ``guard`` is called before a part is written (a check that the attempt still owns the run).
    """

    def __init__(
        self, study: Path, table: str, run_id: str, attempt: int, guard: Callable[[], None] = lambda: None
    ) -> None:
        self.study, self.table, self.run_id, self.attempt, self.guard = study, table, run_id, attempt, guard
        self.rows: list[dict[str, Any]] = []
        self.seq = 0

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep rows (column -> value; missing columns become null) for the next part."""
        ours = {"study": self.study.name, "run_id": self.run_id, "attempt": self.attempt}
        for row in rows:
            assert row.keys() <= TABLES[self.table].keys(), row.keys() - TABLES[self.table].keys()
            self.rows.append({**row, **ours})

    def flush(self) -> Path | None:
        """Write what was collected; the part's path, or None when there was nothing."""
        if not self.rows:
            return None
        self.guard()
        path = rundir.part_file(self.study, self.table, self.run_id, self.attempt, self.seq)
        assert not path.exists(), path
        write(self.study, path, pa.Table.from_pylist(self.rows, schema(self.table)), run_id=self.run_id)
        self.rows, self.seq = [], self.seq + 1
        return path


def write(study: Path, path: Path, *rows: pa.Table, **meta: str) -> None:
    """Write one Parquet file through staging; the version and ``meta`` go into its footer."""
    _stream(study, path, rows[0].schema, iter(rows), meta)


def _stream(study: Path, path: Path, kind: pa.Schema, rows: Iterator[pa.Table], meta: Mapping[str, str]) -> None:
    """Write tables to one file, gathered into row groups of a fair size."""
    footer = {"version": str(VERSION), "commit": rundir.provenance()["commit"] or "", **meta}
    rundir.staging(study).mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=rundir.staging(study), prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            with pq.ParquetWriter(file, kind.with_metadata(footer), compression="zstd") as writer:
                held: list[pa.Table] = []
                for table in rows:
                    held.append(table.replace_schema_metadata(footer))
                    if sum(table.nbytes for table in held) > ROW_GROUP_BYTES:
                        writer.write_table(pa.concat_tables(held))
                        held = []
                if held:
                    writer.write_table(pa.concat_tables(held))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


# --- reading, for the sweep's own use (analysis.load is the reader) ----------------------------------------------


def plan(study: Path, columns: Iterable[str] = tuple(PLAN)) -> list[dict[str, Any]]:
    """Rows of the plan; ValueError when the folder has another version or the file is damaged."""
    rundir.check_version(study, VERSION)
    path = rundir.plan_file(study)
    try:
        rows: list[dict[str, Any]] = pq.ParquetFile(path).read(list(columns)).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise Damaged(f"{path}: cannot be read ({_line(error)}); plan the study again") from None
    return rows


def parts(study: Path, table: str) -> list[Path]:
    """Every part of a table, by run, attempt and sequence."""
    found = rundir.table_folder(study, table).glob("study=*/run=*/*.parquet")
    return sorted(found, key=lambda path: (path.parent, len(path.name), path.name))


def read(path: Path, table: str) -> pa.Table:
    """One part, all columns of the schema (null where it has none); ``Damaged`` names file and reason."""
    try:
        with pq.ParquetFile(path) as file:
            footer = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
            if (version := footer.get("version")) != str(VERSION):
                raise Damaged(f"{path}: schema version: got {version}; allowed: {VERSION}")
            if f"run={footer.get('run_id')}" != path.parent.name:
                raise Damaged(f"{path}: holds rows of run {footer.get('run_id')}, not of the folder it lies in")
            held = file.read().replace_schema_metadata(None)
        columns = [
            held[field.name].cast(field.type) if field.name in held.column_names else _nulls(held, field)
            for field in schema(table)
        ]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise Damaged(f"{path}: cannot be read ({_line(error)})") from None
    return pa.Table.from_arrays(columns, schema=schema(table))


def _nulls(held: pa.Table, field: pa.Field[Any]) -> pa.Array[Any]:
    return pa.nulls(held.num_rows, field.type)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _attempt(path: Path) -> int:
    return int(path.stem.split("-")[0])


def current(rows: pa.Table, table: str) -> pa.Table:
    """Rows of the highest attempt of each ``CURRENT`` key."""
    keys = list(zip(*(rows[name].to_pylist() for name in CURRENT[table]), strict=True))
    attempts = rows["attempt"].to_pylist()
    newest: dict[tuple[Any, ...], int] = {}
    for key, attempt in zip(keys, attempts, strict=True):
        newest[key] = max(attempt, newest.get(key, 0))
    return rows.filter(pa.array([newest[key] == attempt for key, attempt in zip(keys, attempts, strict=True)]))


# --- verify and compact ------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What is wrong with a file (or with the rows of a run); ``run_id`` is whose rows are affected."""

    path: Path
    what: str
    run_id: str
    damaged: bool


def _by_run(study: Path, table: str, problems: list[Problem]) -> Iterator[tuple[str, list[Path], pa.Table]]:
    """The current rows of each run, and the parts they come from; damaged parts go to ``problems`` instead."""

    def attempt(path: Path) -> pa.Table | Problem:
        try:
            return read(path, table)
        except Damaged as error:
            what = str(error).removeprefix(f"{path}: ")
            return Problem(path, what, path.parent.name.removeprefix("run="), True)

    with ThreadPoolExecutor(4) as pool:
        for folder, group in groupby(parts(study, table), key=lambda path: path.parent):
            paths = list(group)
            held: list[pa.Table] = []
            for found in pool.map(attempt, paths) if len(paths) > 1 else map(attempt, paths):
                if isinstance(found, Problem):
                    problems.append(found)
                else:
                    held.append(found)
            if held:
                rows = pa.concat_tables(held)
                several = len({_attempt(path) for path in paths}) > 1
                yield folder.name.removeprefix("run="), paths, current(rows, table) if several else rows


def verify(study: Path) -> list[Problem]:
    """Open and decode every part; also duplicates, and runs that are marked done but have no rows."""
    problems: list[Problem] = []
    holds: dict[str, set[str]] = {table: set() for table in CURRENT}
    for table in CURRENT:
        names = [name for name in TABLES[table] if name not in MEASURED]
        for run_id, paths, rows in _by_run(study, table, problems):
            holds[table].add(run_id)
            seen = Counter(zip(*(rows[name].to_pylist() for name in names), strict=True))
            if twice := sum(count - 1 for count in seen.values()):
                what = f"{twice} rows of run {run_id} are there twice, among {len(paths)} parts"
                problems.append(Problem(paths[-1], what, run_id, False))
    for folder in sorted((study / "runs").glob("*")):
        if rundir.status(study, folder.name)["state"] == "done":
            needed = ("runs", "curves") if folder.name.startswith("v") else ("runs",)
            for table in needed:
                if folder.name not in holds[table]:
                    path = rundir.table_folder(study, table) / f"study={study.name}" / f"run={folder.name}"
                    problems.append(Problem(path, "the run is marked done but has no rows here", folder.name, False))
    return problems


def quarantine(study: Path, problems: Iterable[Problem]) -> None:
    """Move damaged parts out of the data set, and let the next launch write the rows of their runs again."""
    for problem in problems:
        if problem.damaged:
            target = study / "damaged" / problem.path.relative_to(study / "tables")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(problem.path, target.with_name(target.name + ".damaged"))
        if problem.damaged or problem.path.is_dir() is False:
            _reopen(study, problem.run_id)


def _reopen(study: Path, run_id: str) -> None:
    if rundir.run_folder(study, run_id).is_dir() and (claim := rundir.claim(study, run_id)):
        claim.update(state="planned", reason="rows were damaged")
        claim.release()


def compact(study: Path) -> list[Problem]:
    """Merge the current rows of each table into ``compact/<table>.parquet``; damaged parts are left out and returned.

    Parts stay. A table whose parts are those of the last time is not written again.
    """
    problems: list[Problem] = []
    for table in CURRENT:
        listing = [(str(path.relative_to(study)), path.stat().st_size) for path in parts(study, table)]
        digest = hashlib.sha256(repr(listing).encode()).hexdigest()
        target = rundir.compact_file(study, table)
        if target.exists() and _digest(target) == digest:
            continue
        damaged: list[Problem] = []
        rows = (rows for _, _, rows in _by_run(study, table, damaged))
        _stream(study, target, schema(table), rows, {"parts": digest})
        problems += damaged
    return problems


def _digest(path: Path) -> str | None:
    try:
        held = (pq.read_metadata(path).metadata or {}).get(b"parts")
    except (pa.ArrowException, OSError):
        return None
    return held.decode() if held else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("verify", "compact"))
    parser.add_argument("study", help="results/<study>, or the study's name")
    parser.add_argument("--quarantine", action="store_true", help="verify: move damaged parts out of the tables")
    arguments = parser.parse_args(argv)
    try:
        study = rundir.find(arguments.study)
        rundir.check_version(study, VERSION)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    problems = verify(study) if arguments.command == "verify" else compact(study)
    for problem in problems:
        print(f"{os.path.relpath(problem.path)}: {problem.what}", file=sys.stderr)
    if arguments.quarantine:
        quarantine(study, problems)
    count = sum(len(parts(study, table)) for table in CURRENT)
    print(f"{arguments.study}: {count} parts, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
