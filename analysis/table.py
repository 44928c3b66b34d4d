"""What is in someone's table? CSV, Parquet and JSONL files as polars, with filters and derived columns in SQL.

Expressions (``--where "loss < 3.45"``, ``--derive "D=flops/(6*params)"``) are polars SQL expressions and nothing else;
a name with spaces or capitals is written in double quotes there: ``"Model Size"``. Integers become float64 first: as
int64, 6 N D overflows without a word.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.refusal import EXIT_REFUSED, Refusal

READERS: dict[str, Callable[[Path], pl.DataFrame]] = {
    ".csv": lambda path: pl.read_csv(path, infer_schema_length=None, null_values=["", "NA", "nan", "NaN", "null"]),
    ".tsv": lambda path: pl.read_csv(path, separator="\t", infer_schema_length=None, null_values=["", "NA"]),
    ".parquet": pl.read_parquet,
    ".jsonl": lambda path: pl.read_ndjson(path, infer_schema_length=None),
    ".ndjson": lambda path: pl.read_ndjson(path, infer_schema_length=None),
}


MEASURED = {  # names under which tables say how a metric was measured
    *("protocol", "protocol_id", "samples", "n_samples", "num_samples", "guided", "guidance", "cfg", "cfg_scale"),
    *("reference", "reference_hash", "extractor", "sampler"),
}
WHOLE = 2.0**53  # up to which a float64 holds every whole number


class TableError(ValueError):
    """A file or an argument that cannot be used: what was given, and what is allowed, in one line. Exit code 2."""


def read(file: str | os.PathLike[str]) -> pl.DataFrame:
    """A table, by the end of its name; integers as float64, NaN as null. Raises ``TableError``."""
    path = Path(file)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise TableError(f"{path}: a table ends in {', '.join(READERS)}")
    if not path.is_file():
        raise TableError(f"{path}: no such file")
    try:
        frame = reader(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise TableError(f"{path}: not readable as {path.suffix}: {_first_line(error)}") from error
    return frame.with_columns(pl.selectors.integer().cast(pl.Float64)).with_columns(pl.selectors.float().fill_nan(None))


def derive(frame: pl.DataFrame, assignments: Sequence[str]) -> pl.DataFrame:
    """Adds a column per assignment ``"NAME=expression"``, in order. Raises ``TableError``."""
    for assignment in assignments:
        name, mark, expression = assignment.partition("=")
        if not mark or not name.strip() or not expression.strip():
            raise TableError(f'--derive: got {assignment!r}; write "NAME=expression", for example "D=flops/(6*params)"')
        frame = _sql(frame, "--derive", expression, name.strip())
    return frame


def where(frame: pl.DataFrame, conditions: Sequence[str]) -> pl.DataFrame:
    """The rows for which every condition holds. Raises ``TableError``, also when none is left."""
    for condition in conditions:
        kept = _sql(frame, "--where", condition, None)
        if kept.is_empty():
            raise TableError(f"--where: {condition!r} leaves none of {len(frame)} rows")
        frame = kept
    return frame


def column(frame: pl.DataFrame, name: str, option: str) -> pl.Series:
    """A column by its name as it stands in the file (spaces and all). Raises ``TableError`` naming the others."""
    if name not in frame.columns:
        raise TableError(f"{option}: got {name!r}; columns: {', '.join(frame.columns)}")
    return frame[name]


def numbers(frame: pl.DataFrame, name: str, option: str) -> NDArray[np.float64]:
    """A column as float64, NaN where it is null. Raises ``TableError`` for text that is no number."""
    held = column(frame, name, option)
    try:
        return held.cast(pl.Float64).to_numpy().astype(np.float64)
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{option}: {name!r} holds {held.dtype}, not numbers: {_first_line(error)}") from error


def labels(frame: pl.DataFrame, names: Sequence[str], option: str) -> list[str]:
    """One label per row from one or several columns, joined by " / "; a null is written "none", 256.0 as 256."""
    parts = [_written(column(frame, name, option)).fill_null("none").to_list() for name in names]
    return [" / ".join(row) for row in zip(*parts, strict=True)]


class Command(argparse.ArgumentParser):
    """A command line whose mistakes are one line, as those in files are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help)\n")


def writable(path: str) -> str:
    """The path of an option for a file to write."""
    target = Path(path)
    if target.is_dir() or (target.parent.exists() and not target.parent.is_dir()):
        raise argparse.ArgumentTypeError(f"got {path!r}; a file that can be written")
    return path


def parser(module: str, question: str, examples: str, row: str) -> argparse.ArgumentParser:
    """The command line of a module that reads a table: FILE, --where, --derive and --json; ``row``: what a row is."""
    made = Command(
        prog=f"python -m {module}",
        description=question,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("file", help=f"table: {', '.join(READERS)}; a row is {row}")
    made.add_argument("--where", action="append", default=[], metavar="SQL", help="rows to keep")
    made.add_argument("--derive", action="append", default=[], metavar="NAME=SQL", help="a further column")
    made.add_argument("--json", type=writable, metavar="OUT", help="write the answers as JSON")
    return made


def listed(text: str) -> list[str]:
    """The columns of an option ``COL,COL``."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"got {text!r}; write COL,COL")
    return found


def positive(option: str, given: Any) -> float:
    """A number above 0. Raises ``TableError``."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise TableError(f"{option}: got {given!r}; allowed: a number above 0, for example 1e20")
    return value


def selected(given: argparse.Namespace) -> pl.DataFrame:
    """The table of a command line: its columns and those derived, its rows. Raises ``TableError``."""
    return where(derive(read(given.file), given.derive), given.where)


def alike(frame: pl.DataFrame, names: Sequence[str], used: Sequence[str] | None = None) -> None:
    """Raises ``Refusal`` (mixed_protocols) where a column that says how rows were measured has several values.

    ``names``: those columns, or "none" alone. Without any, columns that are called like one (``MEASURED``) and are not
    among those ``used`` for something else: rows are never pooled over them unasked.
    """
    if list(names) == ["none"]:
        return
    guessed: list[str] = []
    if not names and used is not None:
        guessed = [name for name in frame.columns if name not in used and name.lower() in MEASURED]
    for name in (*names, *guessed):
        if (count := column(frame, name, "--protocol").n_unique()) > 1:
            several = ", ".join(sorted(set(labels(frame, [name], "--protocol")))[:4])
            how = "; --where keeps one of them, --protocol none pools them" if guessed else ""
            raise Refusal("mixed_protocols", f"{name}: {count} values among rows that are compared: {several}{how}")


def distinct(frame: pl.DataFrame, names: Sequence[str]) -> None:
    """Raises ``Refusal`` (duplicate_run) for rows that are equal in everything that is fitted."""
    if count := int(frame.select(names).is_duplicated().sum()):
        raise Refusal(
            "duplicate_run",
            f"{count} rows are not the only ones with their {', '.join(names)}: a run that stands twice counts twice; "
            "--id COL says what tells them apart",
        )


def refuse(refusal: Refusal, out: str | None, about: dict[str, Any]) -> int:
    """Say that a whole question is refused, on stderr and in the JSON of ``--json``; the exit code."""
    print(refusal, file=sys.stderr)
    if out:
        write_json(out, {**about, "refused": refusal.told})
    return EXIT_REFUSED


def write_json(path: str | os.PathLike[str], held: Any) -> None:
    """Write JSON whole or not at all."""
    target = Path(path)
    staged = target.with_name(f".{target.name}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    staged.write_text(json.dumps(held, indent=1, allow_nan=False) + "\n")
    staged.replace(target)


def _sql(frame: pl.DataFrame, option: str, expression: str, name: str | None) -> pl.DataFrame:
    """Adds the expression as column ``name``, or keeps the rows for which it holds."""
    try:
        made = pl.sql_expr(expression)
        return frame.filter(made) if name is None else frame.with_columns(made.alias(name))
    except pl.exceptions.ColumnNotFoundError as error:
        raise TableError(f"{option}: {expression!r}: no such column; columns: {', '.join(frame.columns)}") from error
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{option}: {expression!r}: {_first_line(error)}") from error


def _written(held: pl.Series) -> pl.Series:
    known = held.drop_nulls()
    whole = held.dtype.is_float() and bool((known.abs() < WHOLE).all()) and bool((known == known.floor()).all())
    return (held.cast(pl.Int64) if whole else held).cast(pl.String)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
