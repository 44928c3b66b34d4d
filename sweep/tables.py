"""How are tables written, verified and compacted? Atomic parts per run; one file per table, rebuilt at will.

    python -m sweep.tables verify results/digits      # open every part, name the damaged ones
    python -m sweep.tables compact results/digits     # one file per table, sources kept

A run writes parts ``tables/<table>/study=<s>/run=<run_id>/<attempt>-<seq>.parquet``, each whole or not at all, and
never changes one. Rows of a later attempt supersede those of an earlier one with the same ``CURRENT`` key. The
columns are in ``sweep.schema``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep import arrow, rundir, source
from sweep.schema import CURRENT, CURVES, DISTINCT, IMAGES, PLAN, RUNS, TABLES, VERSION, schema

__all__ = ["CURVES", "IMAGES", "PLAN", "RUNS", "TABLES", "VERSION", "Writer", "compact", "current", "schema", "verify"]

ROW_GROUP_BYTES = 64 << 20
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


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
            self.rows.append({**dict.fromkeys(TABLES[self.table]), **row, **ours})

    def flush(self) -> Path | None:
        """Write what was collected; the part's path, or None when there was nothing."""
        if not self.rows:
            return None
        self.guard()
        path = rundir.part_file(self.study, self.table, self.run_id, self.attempt, self.seq)
        assert not path.exists(), path
        write(self.study, path, _rows(self.rows, self.table), run_id=self.run_id)
        self.rows, self.seq = [], self.seq + 1
        return path


def _rows(rows: list[dict[str, Any]], table: str) -> pa.Table:
    """Rows that have every column as an Arrow table (without loading pandas, which ``pyarrow.array`` would)."""
    return pa.Table.from_arrays(
        [_column([row[field.name] for row in rows], field.type) for field in schema(table)], schema=schema(table)
    )


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """``arrow.column``, and the types that only written tables have: bool, binary, timestamp in microseconds."""
    if pa.types.is_timestamp(kind):
        values = [None if value is None else (value - EPOCH) // timedelta(microseconds=1) for value in values]
        return arrow.column(values, pa.int64()).view(kind)
    if not (pa.types.is_boolean(kind) or pa.types.is_binary(kind)):
        return arrow.column(values, kind)
    valid = _bits(value is not None for value in values)
    if pa.types.is_boolean(kind):
        return pa.Array.from_buffers(kind, len(values), [valid, _bits(bool(value) for value in values)])
    offsets = np.cumsum([0, *(len(value or b"") for value in values)]).astype(np.int32)
    data = pa.py_buffer(b"".join(value or b"" for value in values))
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(offsets), data])


def _mask(keep: Iterable[bool]) -> pa.Array:
    held = list(keep)
    return pa.Array.from_buffers(pa.bool_(), len(held), [None, _bits(held)])


def _bits(flags: Iterable[bool]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.fromiter(flags, bool), bitorder="little"))


def write(study: Path, path: Path, *rows: pa.Table, **meta: str) -> None:
    """Write one Parquet file through staging; the version and ``meta`` go into its footer."""
    _stream(study, path, rows[0].schema, iter(rows), lambda: meta)


def _stream(
    study: Path, path: Path, kind: pa.Schema, rows: Iterator[pa.Table], meta: Callable[[], Mapping[str, str]]
) -> None:
    """Write tables to one file, gathered into row groups of a fair size; ``meta`` is asked after the last of them."""
    footer = {"version": str(VERSION), "commit": source.provenance()["commit"] or ""}
    rundir.staging(study).mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=rundir.staging(study), prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            kind = kind.with_metadata(footer)
            with pq.ParquetWriter(file, kind, compression="zstd", write_page_checksum=True) as writer:
                held: list[pa.Table] = []
                gathered = 0
                for table in rows:
                    held.append(table.replace_schema_metadata(footer))
                    gathered += table.get_total_buffer_size()
                    if gathered > ROW_GROUP_BYTES:
                        writer.write_table(pa.concat_tables(held))
                        held, gathered = [], 0
                if held:
                    writer.write_table(pa.concat_tables(held))
                writer.add_key_value_metadata(dict(meta()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        Path(staged).unlink(missing_ok=True)
        raise


# --- reading, for the sweep's own use (analysis.load is the reader) ----------------------------------------------


def plan(
    study: Path, columns: Sequence[str] = tuple(PLAN), run_ids: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """Rows of the plan, or of some runs; ValueError when the folder has another version or the file is damaged."""
    rundir.check_version(study, VERSION)
    path = rundir.plan_file(study)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            held = file.read(list(columns))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise Damaged(f"{path}: cannot be read ({_line(error)}); plan the study again") from None
    if missing := [name for name in columns if name not in held.column_names]:
        raise Damaged(f"{path}: has no column {missing[0]}; plan the study again")
    if run_ids is not None:
        wanted = set(run_ids)
        held = held.filter(_mask(run_id in wanted for run_id in held["run_id"].to_pylist()))
    rows: list[dict[str, Any]] = held.to_pylist()
    return rows


def parts(study: Path, table: str) -> list[Path]:
    """Every part of a table, by run, attempt and sequence."""
    found = rundir.table_folder(study, table).glob("study=*/run=*/*.parquet")
    return sorted(found, key=lambda path: (path.parent, len(path.name), path.name))


def read(path: Path, table: str) -> pa.Table:
    """One part, all columns of the schema (null where it has none); ``Damaged`` names file and reason."""
    wanted = schema(table)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            footer = {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}
            if (version := footer.get("version")) != str(VERSION):
                raise Damaged(f"{path}: schema version: got {version}; allowed: {VERSION}")
            if f"run={footer.get('run_id')}" != path.parent.name:
                raise Damaged(f"{path}: holds rows of run {footer.get('run_id')}, not of the folder it lies in")
            held = file.read(use_threads=False).replace_schema_metadata(None)
        if held.schema.equals(wanted):
            return held
        names, known = set(held.column_names), set(wanted.names)
        if names - known and known - names:  # columns come over time; one for another is a name that changed
            raise Damaged(f"{path}: has columns {sorted(names - known)} where {sorted(known - names)} are missing")
        columns = [
            held[field.name].cast(field.type) if field.name in names else pa.nulls(held.num_rows, field.type)
            for field in wanted
        ]
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise Damaged(f"{path}: cannot be read ({_line(error)})") from None
    return pa.Table.from_arrays(columns, schema=wanted)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def current(rows: pa.Table, table: str) -> pa.Table:
    """Rows of the highest attempt of each ``CURRENT`` key."""
    keys = list(zip(*(rows[name].to_pylist() for name in CURRENT[table]), strict=True))
    attempts = rows["attempt"].to_pylist()
    newest: dict[tuple[Any, ...], int] = {}
    for key, attempt in zip(keys, attempts, strict=True):
        newest[key] = max(attempt, newest.get(key, 0))
    return rows.filter(_mask(newest[key] == attempt for key, attempt in zip(keys, attempts, strict=True)))


# --- verify and compact ------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What is wrong with a file (or with the rows of a run); ``run_id`` is whose rows are affected."""

    path: Path
    what: str
    run_id: str
    kind: Literal["damaged", "twice", "missing"]


def _by_run(study: Path, table: str, problems: list[Problem]) -> Iterator[tuple[str, list[Path], pa.Table]]:
    """The current rows of each run, and the parts they come from; damaged parts go to ``problems`` instead."""

    for folder, group in groupby(parts(study, table), key=lambda path: path.parent):
        run_id, paths, held = folder.name.removeprefix("run="), list(group), []
        for path in paths:
            try:
                held.append(read(path, table))
            except Damaged as error:
                problems.append(Problem(path, str(error).removeprefix(f"{path}: "), run_id, "damaged"))
        if held:
            rows = pa.concat_tables(held)
            several = len({path.stem.split("-")[0] for path in paths}) > 1
            yield run_id, paths, current(rows, table) if several else rows


def verify(study: Path) -> list[Problem]:
    """Open and decode every part; also duplicates, and runs that are marked done but have no rows."""
    problems: list[Problem] = []
    holds: dict[str, set[str]] = {table: set() for table in CURRENT}
    for table in CURRENT:
        for run_id, paths, rows in _by_run(study, table, problems):
            holds[table].add(run_id)
            seen = Counter(zip(*(rows[name].to_pylist() for name in DISTINCT[table]), strict=True))
            if twice := sum(count - 1 for count in seen.values()):
                what = f"{twice} rows of run {run_id} are there twice, among {len(paths)} parts"
                problems.append(Problem(paths[-1], what, run_id, "twice"))
    for folder in sorted((study / "runs").glob("*")):
        if rundir.RUN_ID.fullmatch(folder.name) and rundir.status(study, folder.name)["state"] == "done":
            needed = ("runs", "curves") if folder.name.startswith("v") else ("runs",)
            for table in needed:
                if folder.name not in holds[table]:
                    path = rundir.table_folder(study, table) / f"study={study.name}" / f"run={folder.name}"
                    problems.append(
                        Problem(path, "the run is marked done but has no rows here", folder.name, "missing")
                    )
    return problems


def quarantine(study: Path, problems: Iterable[Problem]) -> list[str]:
    """Move damaged parts out of the data set, and let the next launch write rows again; what follows, in sentences."""
    follows: dict[str, None] = {}
    for problem in problems:
        if problem.kind == "damaged":
            target = study / "damaged" / problem.path.relative_to(study / "tables")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(problem.path, target.with_name(target.name + ".damaged"))
        if problem.kind != "twice":
            follows[_reopen(study, problem)] = None
    return list(follows)


def _reopen(study: Path, problem: Problem) -> str:
    """Let the next launch write the rows of a run again, where it can."""
    run_id, table = problem.run_id, problem.path.relative_to(study / "tables").parts[0]
    holder = rundir.holder(study, run_id)
    if table != "runs" and not run_id.startswith("v"):
        return f"{run_id}: some of its training curve is gone; its checkpoints and what was measured on them are not"
    if holder and holder.alive:
        return f"{run_id}: is running; verify again when it has ended"
    if not rundir.status_file(study, run_id).exists():
        return f"{run_id}: is not of this folder"
    rundir.mark(study, run_id, "planned", "its rows were damaged")
    return f"{run_id}: the next launch writes its rows again"


def compact(study: Path) -> list[Problem]:
    """Merge the current rows of each table into ``compact/<table>.parquet``; damaged parts are left out and returned.

    Parts stay. A table whose parts are those of the last time, all of them whole, is not written again.
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
        _stream(study, target, schema(table), rows, partial(_vouched, digest, damaged))
        problems += damaged
    return problems


def _vouched(digest: str, damaged: list[Problem]) -> dict[str, str]:
    """The footer of a compact file: it stands for its parts unless some could not be read, which is said every time."""
    return {} if damaged else {"parts": digest}


def _digest(path: Path) -> str | None:
    try:
        held = (pq.read_metadata(path).metadata or {}).get(b"parts")
    except (pa.ArrowException, OSError):
        return None
    return held.decode() if held else None


def _run(arguments: argparse.Namespace) -> int:
    study = rundir.find(arguments.study)
    rundir.check_version(study, VERSION)
    problems = verify(study) if arguments.command == "verify" else compact(study)
    for problem in problems:
        print(f"{os.path.relpath(problem.path)}: {problem.what}", file=sys.stderr)
    if arguments.quarantine:
        for sentence in quarantine(study, problems):
            print(sentence, file=sys.stderr)
        if problems:
            print("launch these stages again, or call snakemake with --forceall: what is done stays", file=sys.stderr)
    count = sum(len(parts(study, table)) for table in CURRENT)
    print(f"{arguments.study}: {count} parts, {len(problems)} problems")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("verify", "compact"))
    parser.add_argument("study", help="results/<study>, or the study's name")
    parser.add_argument("--quarantine", action="store_true", help="verify: move damaged parts out of the tables")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or arguments.study}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
