"""Which points of a study may be compared, and which are left out, flagged or missing? Data behind every figure."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from analysis import load, tuning
from analysis.arms import budgets

LOST = ("diverged", "failed")  # runs whose points are left out, those before the end included
RISE = 0.005  # held-out code length this share above its minimum along a trunk: memorising, not noise


@dataclass(frozen=True)
class Study:
    """A results folder as analysis sees it. ``points`` are those of the main generator protocol.

    That is an unguided one; where none has been measured it is a guided one, and ``unguided`` says so. Points of runs
    that diverged or failed are in ``lost`` and nowhere else. Where a grid swept training settings, ``points`` has the
    best setting of each rate, size and budget; ``sweeps`` (``analysis.tuning``) has them all.
    """

    name: str
    folder: Path
    points: pl.DataFrame  # load.points, with past_minimum and tokenizer_gate
    guided: pl.DataFrame  # the same, of other protocols that searched or fixed a guidance scale
    unguided: bool  # the main protocol is
    tokenizers: pl.DataFrame  # load.tokenizers, one row per checkpoint
    sweeps: pl.DataFrame
    extractors: tuple[str, ...]  # as in column names; the first is the main one
    planned: int  # evaluations of generators, main protocol
    left_out: dict[str, int]  # reason -> number of runs or points
    lost: dict[str, str]  # run that diverged or failed -> how, in words
    prediction: pl.DataFrame | None  # load.prediction
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
    def budgets(self) -> list[float]:
        """FLOPs at which curves are compared (``analysis.arms.budgets``)."""
        return budgets(self.points)

    @property
    def by_steps(self) -> bool:
        """Points were planned by steps: budgets are those of a grid onto which curves are interpolated."""
        return self.points["flops_target"].null_count() > 0

    @property
    def progress(self) -> str:
        """How many points there are, and what became of the others: "0 of 12 points measured; 4 diverged ..."."""
        return "; ".join([f"{len(self.points)} of {self.planned} points measured", *_counted(self.left_out)])

    @property
    def metrics(self) -> list[str]:
        """Columns of points that are metrics and have values."""
        settings = {"guidance", "temperature", "top_p", *load.schema("plan").names()}
        floats = [name for name, kind in self.points.schema.items() if kind == pl.Float64 and name not in settings]
        named = [name for name in floats if not name.endswith("_error")]
        return [name for name in named if self.points[name].is_not_null().any()]

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
    """Adds ``past_minimum``: held-out code length has risen along the trunk, so the generator memorises.

    A property of the checkpoint, seen by any protocol that measured those before it: one that measures the last point
    only (a guidance search, say) sees no rise.
    """
    if "nll_bits" not in frame.columns:
        return frame.with_columns(pl.lit(False).alias("past_minimum"))
    lowest = pl.col("nll_bits").cum_min().over("generator", "protocol_id", "evaluation_seed", order_by="flops_to_point")
    risen = (pl.col("nll_bits") > lowest * (1 + RISE)).fill_null(False)
    return frame.with_columns(risen.alias("past_minimum")).with_columns(pl.col("past_minimum").any().over("checkpoint"))


def one_protocol(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of the protocol (and guidance scale, unless searched) with most points; of the first among equals."""
    fixed = pl.col("guidance_from").fill_null("fixed") != "search"
    keyed = frame.with_columns(pl.when(fixed).then(pl.col("guidance").fill_null(1.0)).alias("scale"))
    counts = keyed.group_by("protocol_id", "scale", maintain_order=True).len()
    most = counts.sort("len", descending=True, maintain_order=True).head(1)
    on = ["protocol_id", "scale"]
    return keyed.join(most, on=on, how="semi", nulls_equal=True, maintain_order="left").drop("scale")


def _guided() -> pl.Expr:
    searched = pl.col("guidance_from").fill_null("fixed") == "search"
    return searched | (pl.col("guidance").fill_null(1.0) != 1.0)


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{number} {reason}" for reason, number in counts.items()]


def _ended(folder: Path, plan: pl.DataFrame) -> tuple[dict[str, int], dict[str, str]]:
    """Runs of the plan that are not done, counted by how they ended; which of them are lost, and how, in words."""
    ours = pl.col("run_id").is_in(plan["run_id"].to_list())
    runs = load.table(folder, "runs").filter(ours, pl.col("status") != "done").sort("status", "stage", "run_id")
    counts: dict[str, int] = {}
    for status, stage, number in runs.group_by("status", "stage", maintain_order=True).len().iter_rows():
        counts[f"{status} {stage} run{'s' if number > 1 else ''}"] = number
    lost = runs.filter(pl.col("status").is_in(LOST)).select("run_id", "status", "stage", "reason")
    return counts, {
        run: f"{status} {stage} run" + (f", {reason.splitlines()[0]}" if reason else "")
        for run, status, stage, reason in lost.iter_rows()
    }


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
        prediction = load.prediction(folder)
        left_out, lost = _ended(folder, plan)
        if everything.is_empty() and tokenizers.is_empty():
            why = "; ".join([f"0 of {len(evaluations)} planned evaluations", *_counted(left_out), *_said(caught)])
            raise load.StudyError(f"{folder}: nothing measured yet ({why})")
        everything = past_minimum(everything)
        gates = tokenizers.select("tokenizer", pl.col("gate").alias("tokenizer_gate")).unique(subset="tokenizer")
        everything = everything.join(gates, on="tokenizer", how="left", maintain_order="left")
        unguided = everything.filter(~_guided())
        points = one_protocol(everything if unguided.is_empty() else unguided)
        guided = everything.filter(_guided()).join(points, on=["run_id", "guidance"], how="anti", nulls_equal=True)
        ours = evaluations.filter(pl.col("generator").is_not_null())
        if not points.is_empty():
            ours = ours.filter(pl.col("protocol_id") == points["protocol_id"][0])
        extractors = _extractors(points, tokenizers)
        if len(ours) > len(points):
            left_out["planned but not measured"] = len(ours) - len(points)
        of_lost = pl.any_horizontal(pl.col("run_id", "generator", "tokenizer_run").is_in(list(lost)))
        if number := int(points.select(of_lost.sum()).item()):
            left_out[f"point{'s' if number > 1 else ''} of diverged or failed runs"] = number
        points, guided = points.filter(~of_lost), guided.filter(~of_lost)
        if number := int(points["past_minimum"].sum()):
            left_out["past the held-out minimum"] = number
        sweeps = tuning.sweeps(points, f"fid_{extractors[0]}" if extractors else "fid")
        if len(sweeps):
            measured, points = len(points), tuning.tuned(points, sweeps)
            left_out["not the best of its sweep"] = measured - len(points)
    return Study(
        name=folder.resolve().name,
        folder=folder,
        points=points,
        guided=tuning.tuned(guided, sweeps),
        unguided=not unguided.is_empty() or everything.is_empty(),
        tokenizers=tokenizers.unique(subset=["tokenizer"], keep="first", maintain_order=True),
        sweeps=sweeps,
        extractors=extractors,
        planned=len(ours),
        left_out=left_out,
        lost=lost,
        prediction=prediction,
        damaged=tuple(_said(caught)),
    )


def _said(caught: list[warnings.WarningMessage]) -> list[str]:
    """What was said of damaged files, each once."""
    return list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, load.DamagedPart)))
