"""Which points of a study may be compared, and which are left out, flagged or missing? Data behind every figure."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from analysis import load, tuning

RISE = 0.005  # held-out code length this share above its minimum along a trunk: memorising, not noise


@dataclass(frozen=True)
class Study:
    """A results folder as analysis sees it. ``points`` are those of the main unguided generator protocol.

    Where a grid swept training settings, ``points`` has the best setting of each rate, size and budget; ``sweeps``
    (``analysis.tuning``) has them all.
    """

    name: str
    folder: Path
    points: pl.DataFrame  # load.points, with past_minimum and tokenizer_gate
    guided: pl.DataFrame  # the same, of protocols that searched or fixed a guidance scale
    tokenizers: pl.DataFrame  # load.tokenizers, one row per checkpoint
    sweeps: pl.DataFrame
    extractors: tuple[str, ...]  # as in column names; the first is the main one
    planned: int  # evaluations of generators, main protocol
    left_out: dict[str, int]  # reason -> number of runs or points
    damaged: tuple[str, ...]

    @property
    def rates(self) -> list[str]:
        """Rate labels by nominal bits."""
        return arms(pl.concat([self.points, self.tokenizers.filter("codes")], how="diagonal"))

    @property
    def main(self) -> str:
        """The headline metric: gFID by the main extractor."""
        return f"fid_{self.extractors[0]}"

    @property
    def fitted(self) -> pl.DataFrame:
        """Points that fits use: past the held-out minimum is out."""
        return self.points.filter(~pl.col("past_minimum"))

    @property
    def codes(self) -> pl.DataFrame:
        """Tokenizers whose codes generators train on."""
        return self.tokenizers.filter("codes")

    @property
    def flagged(self) -> list[str]:
        """Tokenizers that failed the gate, as "16x64 s0 (collapsed)"."""
        wrong = self.codes.filter(pl.col("collapsed").fill_null(False) | pl.col("unconverged").fill_null(False))
        rows = wrong.select("rate", "tokenizer_seed", "gate").unique(maintain_order=True).iter_rows()
        return [f"{rate} s{seed} ({gate})" for rate, seed, gate in rows]


def arms(frame: pl.DataFrame) -> list[str]:
    """Rate labels of a frame by nominal bits, then tokens."""
    order = frame.group_by("rate").agg(pl.col("bits_nominal").min(), pl.col("tokens").min())
    return order.sort("bits_nominal", "tokens", "rate", nulls_last=True)["rate"].to_list()


def past_minimum(frame: pl.DataFrame) -> pl.DataFrame:
    """Adds ``past_minimum``: held-out code length has risen along the trunk, so the generator memorises."""
    if "nll_bits" not in frame.columns:
        return frame.with_columns(pl.lit(False).alias("past_minimum"))
    trunk = ["generator", "protocol_id", "evaluation_seed", "guidance"]
    lowest = pl.col("nll_bits").cum_min().over(trunk, order_by="flops_to_point")
    return frame.with_columns((pl.col("nll_bits") > lowest * (1 + RISE)).fill_null(False).alias("past_minimum"))


def _main_protocol(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of the unguided protocol with most points; of the first in the plan where several have as many."""
    unguided = frame.filter(
        pl.col("guidance").fill_null(1.0) == 1.0, pl.col("guidance_from").fill_null("fixed") != "search"
    )
    counts = (
        unguided.group_by("protocol_id", maintain_order=True).len().sort("len", descending=True, maintain_order=True)
    )
    return unguided.filter(pl.col("protocol_id") == counts["protocol_id"][0]) if len(counts) else unguided


def _left_out(folder: Path, plan: pl.DataFrame, points: pl.DataFrame, planned: int) -> dict[str, int]:
    counts: dict[str, int] = {}
    ours = pl.col("run_id").is_in(plan["run_id"].to_list())
    runs = load.table(folder, "runs").filter(ours, pl.col("status") != "done")
    for status, stage, number in runs.group_by("status", "stage").len().sort("status", "stage").iter_rows():
        counts[f"{status} {stage} run{'s' if number > 1 else ''}"] = number
    if planned > len(points):
        counts["planned but not measured"] = planned - len(points)
    past = int(points["past_minimum"].sum())
    if past:
        counts["past the held-out minimum"] = past
    return counts


def _extractors(points: pl.DataFrame, tokenizers: pl.DataFrame) -> tuple[str, ...]:
    """Extractors of generators, then those of tokenizers only, in the order in which they were measured."""
    known = {
        load.slug(entry.split("=")[0])
        for frame in (points, tokenizers)
        for entries in frame["extractors"].drop_nulls().unique()
        for entry in entries.split(";")
    }
    columns = [c.removeprefix("fid_") for c in points.columns if c.startswith("fid_") and points[c].is_not_null().any()]
    columns += [c.removeprefix("rfid_") for c in tokenizers.columns if c.startswith("rfid_")]
    return tuple(name for name in dict.fromkeys(columns) if name in known)


def read(folder: str | Path) -> Study:
    """The study in a results folder; StudyError, in one sentence, when nothing in it has been measured."""
    folder = Path(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", load.DamagedPart)
        plan = load.plan(folder)
        everything = load.points(folder)
        tokenizers = load.tokenizers(folder)
        evaluations = plan.filter(pl.col("stage") == "evaluation")
        if everything.is_empty() and tokenizers.is_empty():
            raise load.StudyError(f"{folder}: nothing measured yet (0 of {len(evaluations)} planned evaluations)")
        everything = past_minimum(everything)
        gates = tokenizers.select("tokenizer", pl.col("gate").alias("tokenizer_gate")).unique(subset="tokenizer")
        everything = everything.join(gates, on="tokenizer", how="left", maintain_order="left")
        points = _main_protocol(everything)
        searched = pl.col("guidance_from").fill_null("fixed") == "search"
        guided = everything.filter(searched | (pl.col("guidance").fill_null(1.0) != 1.0))
        ours = evaluations.filter(pl.col("generator").is_not_null())
        if not points.is_empty():
            ours = ours.filter(pl.col("protocol_id") == points["protocol_id"][0])
        left_out = _left_out(folder, plan, points, len(ours))
        extractors = _extractors(points, tokenizers)
        sweeps = tuning.sweeps(points, f"fid_{extractors[0]}" if extractors else "fid")
        if len(sweeps):
            measured, points = len(points), tuning.tuned(points, sweeps)
            left_out["not the best of its sweep"] = measured - len(points)
    return Study(
        name=folder.resolve().name,
        folder=folder,
        points=points,
        guided=tuning.tuned(guided, sweeps),
        tokenizers=tokenizers.unique(subset=["tokenizer"], maintain_order=True),
        sweeps=sweeps,
        extractors=extractors,
        planned=len(ours),
        left_out=left_out,
        damaged=tuple(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, load.DamagedPart))),
    )
