"""What did a study measure? The only reader of a results folder.

    from analysis.load import points
    frame = points("results/digits")        # polars; .to_pandas() at the plotting edge

Every part is read with the schema of ``sweep.schema``: missing columns are inserted as null, unknown ones ignored,
types cast, and nothing is inferred from a path (a run id such as ``r5e1000000000`` would come back as a number).
A damaged part is named in a warning and left out; in place of a damaged compact file its parts are read. Bare
``pandas.read_parquet(folder)`` is unsafe here: it takes its columns from the first file it meets and drops the others
without a word.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.schema import CURRENT, TABLES, VERSION
from sweep.schema import schema as arrow_schema

COLLAPSED = 0.5  # a tokenizer whose perplexity / K is below this is flagged
UNCONVERGED = 0.10  # so is one whose rFID moved by more than this share of its gFID floor in the last half of training
PREDICTION = "prediction.parquet"  # in a results folder, beside its tables
HALF = (0.4, 0.6)  # shares of the training length that count as its half

# columns of the plan that are long texts and that no analysis reads
TEXTS = ("config", "recipe", "upstream", "points", "encode", "flags")


class StudyError(ValueError):
    """A results folder that cannot be read, in one sentence."""


class DamagedPart(UserWarning):
    """A Parquet part that was left out because it cannot be read."""


def schema(name: str) -> pl.Schema:
    """The polars schema of a table, derived from the pyarrow one."""
    frame = pl.from_arrow(arrow_schema(name).empty_table())
    assert isinstance(frame, pl.DataFrame)
    return frame.schema


def _version(study: Path) -> None:
    lock = study / "plan.lock.json"
    if not lock.exists():
        return
    try:
        found = json.loads(lock.read_text()).get("version")
    except (ValueError, AttributeError):
        raise StudyError(f"{lock}: not readable as JSON; plan the study again") from None
    if found is not None and found != VERSION:
        raise StudyError(f"{lock}: version: got {found}; this code reads version {VERSION}")


def _part(path: Path, name: str) -> pa.Table:
    """One file in the table's schema; raises whatever pyarrow raises on a damaged one."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        stamp = (file.schema_arrow.metadata or {}).get(b"version", b"").decode()
        found = file.read(use_threads=False)  # a part is small; threads cost more than they save
    if stamp.isdigit() and int(stamp) != VERSION:
        raise StudyError(f"{path}: version: got {stamp}; this code reads version {VERSION}")
    kinds, names = arrow_schema(name), set(found.column_names)
    found = found.replace_schema_metadata(None)
    if found.schema.equals(kinds):
        return found
    columns = [
        found[field.name].cast(field.type) if field.name in names else pa.nulls(len(found), field.type)
        for field in kinds
    ]
    return pa.table(columns, schema=kinds)


def _sources(study: Path, name: str) -> tuple[list[Path], list[Path]]:
    """Files that hold a table, and those that hold it too and are read where one of the first is damaged.

    The compact one, and all parts where one of them is newer.
    """
    compact = study / "compact" / f"{name}.parquet"
    if name == "plan":
        copies = [path for path in (study / "plan.parquet", compact) if path.exists()]
        return copies[:1], copies[1:]
    parts = sorted((study / "tables" / name).glob("study=*/run=*/*.parquet"))
    if not compact.exists():
        return parts, []
    written = compact.stat().st_mtime_ns
    newer = any(part.stat().st_mtime_ns > written for part in parts)
    return ([compact, *parts], []) if newer else ([compact], parts)


def _damaged(path: Path, error: Exception, strict: bool = False) -> None:
    """Name a file that cannot be read: in a warning, or in an error if ``strict``."""
    line = f"{path}: damaged{'' if strict else ', left out'} ({str(error).splitlines()[0]})"
    if strict:
        raise StudyError(line) from None
    warnings.warn(line, DamagedPart, stacklevel=3)


def _current(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """Rows of the highest attempt of each key: a run that was interrupted goes on under a higher number."""
    if name not in CURRENT or frame.is_empty():
        return frame
    attempt = pl.col("attempt").fill_null(0)
    return frame.filter(attempt == attempt.max().over(CURRENT[name]))


@overload
def table(study: str | Path, name: str, pandas: Literal[False] = False, strict: bool = False) -> pl.DataFrame: ...
@overload
def table(study: str | Path, name: str, pandas: Literal[True], strict: bool = False) -> Any: ...
def table(study: str | Path, name: str, pandas: bool = False, strict: bool = False) -> Any:
    """One table of a study ("plan", "runs", "curves", "images"), current attempts only; polars or pandas.

    An unfinished study gives what there is, an empty one no rows. A part that cannot be read is named in a
    ``DamagedPart`` warning and left out, or raised as ``StudyError`` if ``strict``. Where it is the compact file, the
    parts that it was made of are read if they are still there.
    """
    folder = Path(study)
    if name not in TABLES:
        raise StudyError(f"table: got {name!r}; allowed: {', '.join(TABLES)}")
    if not folder.is_dir():
        raise StudyError(f"{folder}: no such results folder")
    _version(folder)
    found = [arrow_schema(name).empty_table()]
    first, instead = _sources(folder, name)
    for paths in (first, instead):
        whole = True
        for path in paths:
            try:
                found.append(_part(path, name))
            except (pa.ArrowException, OSError) as error:
                _damaged(path, error, strict)
                whole = False
        if whole:
            break
    frame = pl.from_arrow(pa.concat_tables(found))
    assert isinstance(frame, pl.DataFrame)
    frame = _current(frame.unique(maintain_order=True), name)
    return frame.to_pandas() if pandas else frame


def plan(study: str | Path) -> pl.DataFrame:
    """The plan of a study; StudyError if there is none, or none that can be read."""
    frame = table(study, "plan")
    if frame.is_empty():
        table(study, "plan", strict=True)  # names a damaged file
        raise StudyError(f"{study}: no plan.parquet; plan the study first (python -m sweep.plan grid.yaml)")
    return frame


def prediction(study: str | Path) -> pl.DataFrame | None:
    """What was predicted for the largest budget (``analysis.prediction``); None without a file that can be read."""
    path = Path(study) / PREDICTION
    if not path.exists():
        return None
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        _damaged(path, error)
        return None


def slug(name: str) -> str:
    """An extractor's name as it stands in column names: digits-supervised gives digits_supervised."""
    return re.sub(r"\W+", "_", Path(name).stem if "/" in name else name)


def _metric(metric: str, extractor: str | None, reference: str | None, split: str | None) -> str:
    """Name of a metric's column. Without suffix: samples or held-out images, compared with the gFID reference."""
    parts = [metric]
    if extractor:
        parts.append(slug(extractor))
    if not metric.endswith(("_train", "_heldout")):  # unless the metric's own name says it
        parts += ["heldout"] * (reference == "heldout") + ["train"] * (split == "train")
    return "_".join(parts)


def _coalesce(frame: pl.DataFrame, other: pl.DataFrame, on: str, columns: Iterable[str], first: bool) -> pl.DataFrame:
    """``columns`` of ``frame`` with gaps filled from the row of ``other`` whose run id is in column ``on``.

    ``first``: other's values win over the frame's own.
    """
    columns = list(columns)
    right = other.select(pl.col("run_id").alias(on), *(pl.col(c).alias(f"{c}:other") for c in columns))
    joined = frame.join(right.unique(subset=on), on=on, how="left")
    ends = [(f"{c}:other", c) if first else (c, f"{c}:other") for c in columns]
    filled = [pl.coalesce(a, b).alias(c) for (a, b), c in zip(ends, columns, strict=True)]
    return joined.with_columns(filled).drop([f"{c}:other" for c in columns])


def _evaluations(study: str | Path, of: Literal["tokenizer", "generator"]) -> pl.DataFrame:
    """One row per evaluation (x guidance scale, where one reports several), metrics as columns."""
    planned = plan(study).filter(pl.col("stage") == "evaluation")
    is_generator = pl.col("generator").is_not_null()
    planned = planned.filter(is_generator if of == "generator" else ~is_generator).drop(TEXTS)
    curves = table(study, "curves").filter(pl.col("run_id").is_in(planned["run_id"].to_list()))
    names = pl.Series(
        "name",
        [_metric(*row) for row in curves.select("metric", "extractor", "reference", "split").iter_rows()],
        pl.String,
    )
    curves = curves.with_columns(names)
    # what a protocol fixes, from the rows of samples (a Frechet distance) where there are any, else from any row
    sampled = curves.filter(pl.col("metric") == "fid").sort("guidance", nulls_last=True)
    fixed = ["weights", "sampler", "sampler_steps", "temperature", "top_k", "top_p", "guidance_from", "labels"]
    wide = (
        pl.concat([sampled, curves.filter(~pl.col("run_id").is_in(sampled["run_id"].unique().to_list()))])
        .group_by(
            "run_id",
            "guidance" if of == "generator" else pl.lit(None, pl.Float64).alias("guidance"),
            maintain_order=True,
        )
        .agg(
            pl.col("n").first().alias("samples"),
            *(pl.col(c).drop_nulls().first() for c in fixed),
            pl.col("flops").drop_nulls().first().alias("flops_measured"),
            (pl.col("extractor") + "=" + pl.col("extractor_hash").fill_null(""))
            .unique()
            .sort()
            .str.join(";")
            .alias("extractors"),
            (pl.col("reference") + "=" + pl.col("reference_hash").fill_null(""))
            .unique()
            .sort()
            .str.join(";")
            .alias("references"),
        )
    )
    missing = (
        curves.filter(pl.col("value").is_null())
        .group_by("run_id")
        .agg(
            (pl.col("name") + ": " + pl.col("reason").fill_null("no reason given"))
            .unique()
            .sort()
            .str.join("; ")
            .alias("missing")
        )
    )
    wide = wide.join(missing, on="run_id", how="left")
    for (name,), rows in curves.group_by("name", maintain_order=True):
        for source, column in (("value", str(name)), ("error", f"{name}_error")):
            if source == "error" and rows["error"].null_count() == len(rows):
                continue
            keys = ["run_id", "guidance"] if rows["guidance"].is_not_null().any() and of == "generator" else ["run_id"]
            values = rows.group_by(keys).agg(pl.col(source).first().alias(column))
            wide = wide.join(values, on=keys, how="left", nulls_equal=True)
    return planned.join(wide, on="run_id", how="inner", maintain_order="left")


def differing(held: Sequence[dict[str, Any]]) -> list[str]:
    """Names, sorted, that have not one value in all of several settings; an absent one is null."""
    names = sorted(set().union(*held))
    return [name for name in names if len({json.dumps(each.get(name), sort_keys=True) for each in held}) > 1]


def _labels(planned: pl.DataFrame) -> dict[str, str]:
    """What figures call each tokenizer checkpoint without its seed: "16x64", longer where that is ambiguous.

    What tells designs apart is looked for among the checkpoints that generators train on; another checkpoint of the
    same run (half-way, say) has its design's label.
    """
    rows = planned.filter(pl.col("stage") == "tokenizer").to_dicts()
    for row in rows:
        row["fields"] = json.loads(row["fields"] or "{}")
        row["coded"] = tuple(row["encode"] or row["points"] or [row["steps"]])

    def base(row: dict[str, Any]) -> str:
        if row["tokens"] is None:
            return str(row["family"])
        return f"{row['tokens']}x{row['codebook']}" if row["codebook"] else f"{row['tokens']} tokens"

    labels: dict[str, str] = {}
    for row in rows:
        same = [other for other in rows if base(other) == base(row)]
        parts = [base(row)]
        if len({other["family"] for other in same}) > 1:
            parts.append(str(row["family"]))
        for name in differing([other["fields"] for other in same]):
            parts.append(f"{name}={row['fields'].get(name)}")
        several = len({step for other in same for step in other["coded"]}) > 1
        for step in {*(row["points"] or []), *row["coded"]}:
            steps = [f"{step} steps"] if several and step in row["coded"] else []
            labels[f"{row['run_id']}@{step}"] = " ".join(parts + steps)
    return labels


def _arms(planned: pl.DataFrame, frame: pl.DataFrame) -> pl.DataFrame:
    """Adds the tokenizer's run and its rate label to rows that name its checkpoint in ``tokenizer``."""
    labels = _labels(planned)
    rates = [labels.get(checkpoint or "", checkpoint) for checkpoint in frame["tokenizer"].to_list()]
    run = pl.col("tokenizer").str.split("@").list.first().alias("tokenizer_run")
    return frame.with_columns(run, pl.Series("rate", rates, pl.String))


def _settings(axes: pl.Series) -> pl.Series:
    """What the grid swept of the generators' training, "lr=0.003" by row; "" where there is one value of everything."""
    prefix = "generator.train."
    held = [json.loads(text or "{}") for text in axes.to_list()]
    swept = [name for name in differing(held) if name.startswith(prefix)]
    texts = [" ".join(f"{name.removeprefix(prefix)}={row.get(name)}" for name in swept) for row in held]
    return pl.Series("setting", texts, pl.String)


def _sized(frame: pl.DataFrame) -> pl.DataFrame:
    """Gives generators of a grid without a ladder of sizes a ``generator_size``.

    Where every rate has one, they are of one size, though their parameters may depend on the rate; else parameters
    name it.
    """
    unnamed = frame.filter(pl.col("generator_size").is_null())
    single = (unnamed.group_by("rate").agg(pl.col("params_core").n_unique())["params_core"] == 1).all()
    name = pl.lit("one size") if single else pl.col("params_core").cast(pl.String)
    return frame.with_columns(pl.coalesce("generator_size", name))


def points(study: str | Path) -> pl.DataFrame:
    """One row per evaluated generator checkpoint x protocol x evaluation seed (x guidance scale).

    Columns: those of the plan, ``rate`` (label of the tokenizer), ``setting`` (training settings that the grid swept,
    "lr=0.003", or ""), ``samples`` and the protocol's settings, and one
    column per metric: ``fid_<extractor>`` against the gFID reference, ``fid_<extractor>_heldout``, ``nll_bits``
    (held-out, bits per image), ``nll_bits_train``, ``two_part_bits`` (those and the bits of the image given its
    reconstruction: a quality across rates without a network), ... Parameters and the compute of earlier stages are
    those of the generator's own row, so that ``flops_upstream`` is the cost of its tokenizer and nothing else.
    """
    frame = _evaluations(study, "generator")
    planned = plan(study)
    trained = planned.filter(pl.col("stage") == "generator")
    frame = _coalesce(
        frame, trained, "generator", ["params_core", "params_total", "batch", "lr", "generator_seed"], True
    )
    frame = _coalesce(frame, trained, "generator", ["flops_upstream"], True)
    frame = frame.with_columns(pl.coalesce("flops_to_point", "flops_measured").alias("flops_to_point")).drop(
        "flops_measured"
    )
    frame = _sized(_arms(planned, frame).with_columns(_settings(frame["axes"])))
    encoders = planned.filter(pl.col("stage") == "tokenizer")
    # a tokenizer's row pays for every checkpoint that is encoded; a generator reads one of them
    encoders = encoders.with_columns(pl.col("flops_encode") / pl.col("encode").list.len().clip(1))
    frame = _coalesce(frame, encoders, "tokenizer_run", ["flops_encode"], True)
    return _two_parts(study, frame).sort(
        "bits_nominal", "tokenizer_seed", "params_core", "flops_to_point", "evaluation_seed", nulls_last=True
    )


def _two_parts(study: str | Path, frame: pl.DataFrame) -> pl.DataFrame:
    """Adds ``two_part_bits``: held-out bits of the codes and of the images given what the codes decode to."""
    if "nll_bits" not in frame.columns:
        return frame
    coded = _evaluations(study, "tokenizer")
    if "residual_bits" not in coded.columns:
        return frame
    checkpoint = pl.coalesce("tokenizer", "checkpoint").alias("tokenizer")
    left = coded.group_by(checkpoint).agg(pl.col("residual_bits").drop_nulls().first())
    joined = frame.join(left, on="tokenizer", how="left", maintain_order="left")
    return joined.with_columns((pl.col("nll_bits") + pl.col("residual_bits")).alias("two_part_bits")).drop(
        "residual_bits"
    )


def tokenizers(study: str | Path) -> pl.DataFrame:
    """One row per evaluated tokenizer checkpoint x protocol x evaluation seed, with its gate.

    Metrics: ``mse``, ``psnr``, ``ssim``, ``residual_bits``, ``usage``, ``perplexity``, ``bits_used``,
    ``rfid_<extractor>`` (decoded held-out images against held-out images), ``floor_<extractor>`` (the same against the
    gFID reference), ``fid_data_<extractor>`` and ``fid_train_<extractor>`` (real images against that reference). Gate:
    ``perplexity_share`` (perplexity / K), ``rfid_change`` (how far rFID moved over the last half of training over the
    floor by the same extractor, the largest of them: rFID itself may go to zero, so its own share need not settle),
    ``collapsed``, ``unconverged`` (null: not measured), ``gate`` ("ok", or the names of what is wrong
    and of what was not measured). ``codes``: generators train on this checkpoint's codes.
    """
    planned = plan(study)
    frame = _evaluations(study, "tokenizer").drop("flops_measured")
    rows = planned.filter(pl.col("stage") == "tokenizer")
    frame = frame.with_columns(
        pl.coalesce("tokenizer", "checkpoint").alias("tokenizer"),
        pl.coalesce("tokenizer_steps", "point").alias("tokenizer_steps"),
    )
    frame = _arms(planned, frame)
    known = ["tokenizer_family", "tokenizer_seed", "tokens", "codebook", "bits_nominal"]
    frame = _coalesce(frame, rows, "tokenizer_run", known, False)
    names = {}
    for column in frame.columns:
        found = re.fullmatch(r"fid_(?!data_|train_|search_)(.+?)(_heldout)?(_error)?", column)
        if found:
            names[column] = ("rfid_" if found[2] else "floor_") + found[1] + (found[3] or "")
    frame = frame.rename(names)
    used = set(planned.filter(pl.col("generator").is_not_null())["tokenizer"].drop_nulls().to_list())
    encoded = {f"{row[0]}@{step}" for row in rows.select("run_id", "encode").iter_rows() for step in row[1] or []}
    frame = frame.with_columns(pl.col("tokenizer").is_in(sorted(used | encoded)).alias("codes"))
    return _gate(frame).sort("bits_nominal", "tokenizer_seed", "tokenizer_steps", nulls_last=True)


def _gate(frame: pl.DataFrame) -> pl.DataFrame:
    """Adds the gate: did the codebook collapse, had the tokenizer stopped improving?"""
    measured = [c for c in frame.columns if c.startswith("rfid_") and not c.endswith("_error")]
    changes: list[float | None] = []
    earlier: dict[str, list[float | None]] = {f"{c}_half": [] for c in measured}
    for row in frame.iter_rows(named=True):
        same = (pl.col("tokenizer_run") == row["tokenizer_run"]) & (pl.col("protocol_id") == row["protocol_id"])
        steps = row["tokenizer_steps"] or 0
        halves = frame.filter(
            same,
            pl.col("evaluation_seed").eq_missing(row["evaluation_seed"]),
            pl.col("tokenizer_steps").is_between(HALF[0] * steps, HALF[1] * steps),
        ).sort((pl.col("tokenizer_steps") - steps / 2).abs())
        moved = []
        for column in measured:
            before = halves[column][0] if len(halves) else None
            earlier[f"{column}_half"].append(before)
            floor = row.get(column.replace("rfid_", "floor_", 1))
            if before is not None and row[column] is not None and floor:
                moved.append(abs(before - row[column]) / floor)
        changes.append(max(moved, default=None))
    frame = frame.with_columns(
        pl.Series("rfid_change", changes, pl.Float64), *(pl.Series(k, v, pl.Float64) for k, v in earlier.items())
    )
    if "perplexity" not in frame.columns:
        frame = frame.with_columns(pl.lit(None, pl.Float64).alias("perplexity"))
    frame = frame.with_columns((pl.col("perplexity") / pl.col("codebook")).alias("perplexity_share"))
    frame = frame.with_columns(
        (pl.col("perplexity_share") < COLLAPSED).alias("collapsed"),
        (pl.col("rfid_change") > UNCONVERGED).alias("unconverged"),
    )
    # a latent without a codebook has no codes to use, so nothing was left unmeasured there
    unused = pl.col("collapsed").is_null() & pl.col("codebook").is_not_null()
    wrong = pl.concat_str(
        pl.when("collapsed").then(pl.lit("collapsed")),
        pl.when("unconverged").then(pl.lit("unconverged")),
        pl.when(unused).then(pl.lit("codebook use not measured")),
        pl.when(pl.col("unconverged").is_null()).then(pl.lit("convergence not measured")),
        separator=", ",
        ignore_nulls=True,
    )
    return frame.with_columns(pl.when(wrong == "").then(pl.lit("ok")).otherwise(wrong).alias("gate"))
