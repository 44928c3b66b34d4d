"""What do the papers report? Published numbers as typed tables: built from CSV facts, read from Parquet.

    python -m analysis.published [--out DIR]

``results/published/sources/*.csv`` hold what was read in papers, repositories, pages and figures, one fact a row with
its source and evidence. This turns them into ``results/published/*.parquet``: typed, checked, with the protocol that
stands in their notes as columns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from analysis.catalogue import COLUMNS, EVIDENCE, FLAG, TABLES, TEXT, Wrong
from analysis.table import TableError

ROOT = Path(__file__).parents[1] / "results" / "published"


def holds(folder: Path) -> bool:
    """Whether a folder is one of published tables and not a study."""
    return (folder / "sources").is_dir()


def table(name: str, folder: Path = ROOT) -> pl.DataFrame:
    """One built table by its name in ``TABLES``. Raises ``TableError``."""
    if name not in TABLES:
        raise TableError(f"table: got {name!r}; allowed: {', '.join(TABLES)}")
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise TableError(f"{path}: no such file; python -m analysis.published builds it")
    frame = pl.read_parquet(path)
    if dict(frame.schema) != dict(pl.Schema(TABLES[name].schema)):
        raise TableError(f"{path}: its columns are not those of the code; python -m analysis.published builds it anew")
    return frame


def parse(name: str, sources: Path) -> pl.DataFrame:
    """One table from its CSV file. Raises ``TableError`` with file, row (the header is row 1), column and value."""
    held = TABLES[name]
    path = sources / f"{held.source or name}.csv"
    if not path.is_file():
        raise TableError(f"{path}: no such file")
    try:
        raw = pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise TableError(f"{path}: not readable as CSV: {str(error).splitlines()[0]}") from error
    header = held.header or held.columns
    if set(raw.columns) != set(header):
        raise TableError(f"{path}: row 1: got columns {', '.join(raw.columns)}; allowed: {', '.join(header)}")
    rows: list[dict[str, object]] = []
    seen: dict[tuple[object, ...], int] = {}
    for i, text in enumerate(raw.iter_rows(named=True), start=2):
        try:
            fields = held.convert(text) if held.convert else text
            row = {column: _value(column, fields.get(column)) for column in held.columns}
        except Wrong as wrong:
            column, value, allowed = wrong.args
            raise TableError(f"{path}: row {i}: column {column}: got {value!r}; allowed: {allowed}") from None
        key = tuple(row[column] for column in held.key)
        if key in seen:
            names = ", ".join(f"{column}={value}" for column, value in zip(held.key, key, strict=True))
            raise TableError(f"{path}: row {i}: {names} stands in row {seen[key]} already")
        seen[key] = i
        rows.append(row)
    return pl.DataFrame(rows, schema=held.schema, orient="row")


def _value(column: str, text: str | None) -> object:
    """The text of one cell as the column's type; None where it is empty."""
    kind = COLUMNS[column]
    if text is None or not text.strip():
        if column in ("source", "evidence"):
            raise Wrong(column, text, "text; a fact has a source and evidence")
        return None
    if column == "evidence" and text not in EVIDENCE:
        raise Wrong(column, text, ", ".join(EVIDENCE))
    if kind is TEXT:
        return text
    if kind is FLAG:
        if text not in ("true", "false"):
            raise Wrong(column, text, kind.allowed)
        return text == "true"
    try:
        value = int(text) if kind.dtype is pl.Int64 else float(text)
    except ValueError:
        raise Wrong(column, text, kind.allowed) from None
    too_low = kind.low is not None and (value <= kind.low if kind.open else value < kind.low)
    if value != value or too_low or (kind.high is not None and value > kind.high):
        raise Wrong(column, text, kind.allowed)
    return value


def build(sources: Path, out: Path) -> list[str]:
    """Write every table to ``out``, or none where one is wrong; their names. Raises ``TableError``."""
    frames = {name: parse(name, sources) for name in TABLES}
    out.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        staged = out / f".{name}.parquet.tmp"
        frame.write_parquet(staged, compression="zstd", statistics=False)
        staged.replace(out / f"{name}.parquet")
    return list(frames)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis.published", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=Path, default=ROOT / "sources", help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder for the tables")
    arguments = parser.parse_args(argv)
    try:
        names = build(arguments.sources, arguments.out)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.out}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
