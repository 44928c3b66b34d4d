"""What is the answer, in sentences and tables? laws.parquet, crossings.parquet, best_rates.parquet, report.md."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import polars as pl

from analysis import load, prediction, study, tuning
from analysis.arms import Arm, candidates, envelope_table, named, words
from analysis.curves import Law, law
from analysis.fit import compare
from analysis.frontier import Crossing, arms_of, best, crossings
from analysis.interval import Interval, short
from analysis.refusal import Refusal
from analysis.uncertainty import spearman, spread

SHARED = 10  # generators that share stage 1 in the report's second reading of total compute


@dataclass(frozen=True)
class Curves:
    """Everything fitted to one metric of a study."""

    metric: str
    arms: list[Arm]
    laws: dict[str, Law]
    refused: dict[str, Refusal]
    crossings: list[Crossing]

    @property
    def frontier(self) -> list[Crossing]:
        """Crossings at which the best rate of all changes hands (identified or not)."""
        found = []
        for each in self.crossings:
            if each.flops is None or each.flops.estimate is None:
                continue
            at = each.flops.estimate
            heights = {
                rate: held.at(at)
                for rate, held in self.laws.items()
                if held.grid[0] <= at * 1.01 and at <= held.grid[-1] * 1.01
            }
            ours = [heights[rate] for rate in (each.first, each.second) if rate in heights]
            if len(ours) == 2 and min(heights.values()) >= min(ours) * (1 - 1e-6):
                found.append(each)
        return found


def curves(held: study.Study, metric: str) -> Curves:
    """Arms, laws and crossings of one metric; what was refused, and why."""
    arms, refused = arms_of(held, metric)
    laws: dict[str, Law] = {}
    for each in arms:
        try:
            laws[each.rate] = law(each)
        except Refusal as refusal:
            refused[each.rate] = refusal
    return Curves(metric, arms, laws, refused, crossings(arms))


@dataclass
class Results:
    """The fits of a study, each made once, when first asked for."""

    held: study.Study
    made: dict[str, Curves] = field(default_factory=dict)

    def of(self, metric: str) -> Curves:
        if metric not in self.made:
            self.made[metric] = curves(self.held, metric)
        return self.made[metric]

    @property
    def metrics(self) -> list[str]:
        """Metrics that are fitted: gFID by each extractor, held-out code length."""
        names = [f"fid_{extractor}" for extractor in self.held.extractors] + ["nll_bits", "two_part_bits"]
        columns = self.held.points.columns
        return [name for name in names if name in columns and self.held.points[name].is_not_null().any()]

    @cached_property
    def numbers(self) -> pl.DataFrame:
        """How many images or samples lie behind what was measured, but of training images: protocol_id, metric, n."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", load.DamagedPart)  # named when the study was read
            frame = load.table(self.held.folder, "curves")
        return frame.filter(pl.col("split").fill_null("") != "train").select("protocol_id", "metric", "n").unique()

    @cached_property
    def laws(self) -> pd.DataFrame:
        return pd.DataFrame([row for metric in self.metrics for row in _law_rows(self.held, self.of(metric))])

    @cached_property
    def crossings(self) -> pd.DataFrame:
        rows = []
        for each in (found for metric in self.metrics for found in self.of(metric).crossings):
            row = {k: v for k, v in asdict(each).items() if k != "flops"}
            ends = each.flops or Interval(math.nan, None, None, math.nan, each.method)
            row |= {"flops": ends.estimate, "flops_low": ends.low, "flops_high": ends.high, "level": ends.level}
            rows.append({"study": self.held.name, **row, "sentence": each.sentence()})
        return pd.DataFrame(rows)

    @cached_property
    def best_rates(self) -> pd.DataFrame:
        """``frontier.best`` per metric and generator size; size null is the best over sizes."""
        found = []
        for metric in self.metrics:
            if metric == "nll_bits":  # code length is no quality across rates
                continue
            arms = self.of(metric).arms
            sizes: list[str | None] = [None, *(arms[0].sizes if arms else ())]
            for size in sizes:
                table = best(arms, size) if len(arms) > 1 else pd.DataFrame()
                if len(table):
                    found.append(table.assign(study=self.held.name, metric=metric, size=size))
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def floor(held: study.Study, rate: str, metric: str) -> float | None:
    """What a perfect generator of this tokenizer would score: decoded held-out images against the gFID reference."""
    column = metric.replace("fid_", "floor_", 1)
    if not metric.startswith("fid_") or column not in held.codes.columns:
        return None
    found = held.codes.filter(pl.col("rate") == rate)[column].drop_nulls().to_list()
    return math.exp(sum(math.log(v) for v in found) / len(found)) if found and min(found) > 0 else None


def _law_rows(held: study.Study, made: Curves) -> list[dict[str, Any]]:
    known = {"study": held.name, "metric": made.metric}
    rows: list[dict[str, Any]] = [{**known, "rate": r, "refused": str(why)} for r, why in made.refused.items()]
    for arm in made.arms:
        if arm.rate in made.refused:
            continue
        row: dict[str, Any] = {**known, "rate": arm.rate, "refused": None, "bits": arm.bits, "axis": arm.axis}
        row |= {"seeds": len(arm.seeds), "budgets": len(arm.budgets)}
        found = made.laws[arm.rate]
        row |= {"form": found.fit.form, "formula": found.fit.formula, "identified": found.identified}
        row |= {"fits": found.misfit.fits, "misfit": found.misfit.rms, "misfit_p": found.misfit.p}
        for name, interval in found.intervals.items():
            given = found.given[name]
            row |= {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
            row |= {f"{name}_given_low": given.low, f"{name}_given_high": given.high}
        limit = floor(held, arm.rate, made.metric)
        row |= {
            "at_bound": ", ".join(found.fit.at_bound) or None,
            "n": found.fit.n,
            "sigma": found.fit.sigma,
            "aicc": found.fit.aicc,
            "aicc_power": found.power.aicc if found.power else None,
            "preferred": compare([f for f in (found.fit, found.power) if f])["form"].iloc[0],
            "floor": limit,
            "below_floor": None if limit is None else found.fit.params.get("E", math.inf) < limit,
            "edges": int(found.rows["edge"].sum()),
            "selected_on": "another evaluation seed" if arm.fresh else "the same evaluation seed",
            "interval_method": found.intervals["a"].method,
            "interval_reason": found.intervals["a"].reason,
            "fit": found.fit.to_json(),
        }
        rows.append(row)
    return rows


def _join(items: list[str]) -> str:
    return ", ".join(items[:-1]) + f" and {items[-1]}" if len(items) > 1 else "".join(items)


def _seeds(frame: pl.DataFrame, *levels: str) -> str:
    counts = {level: frame[f"{level}_seed"].n_unique() for level in levels}
    return _join([f"{number} {level} seed{'s' if number > 1 else ''}" for level, number in counts.items()])


def extent(held: study.Study) -> str:
    """n and seeds of the main points, as a sentence of captions."""
    points = held.points
    if points.is_empty():
        return f"0 of {held.planned} planned points"
    budgets = f"{len(held.budgets)} budgets"
    if held.by_steps:  # their own computes hardly meet, so curves are interpolated
        budgets = f"{points['point'].n_unique()} training lengths, compared at {budgets} between them"
    return (
        f"{len(points)} of {held.planned} planned points: {points['rate'].n_unique()} rates, "
        f"{points['generator_size'].n_unique()} generator sizes, {budgets}; "
        f"{_seeds(points, 'tokenizer', 'generator', 'evaluation')}"
    )


def reconstruction(results: Results) -> str:
    """n, seeds and protocol of the tokenizers that generators train on, as a sentence of captions."""
    codes = results.held.codes
    names = _join(codes["protocol"].drop_nulls().unique().sort().to_list())
    return (
        f"{len(codes)} tokenizers: {codes['rate'].n_unique()} rates; {_seeds(codes, 'tokenizer', 'evaluation')}; "
        f"protocol {names}, {images(results, 'tokenizer', 'fid')} held-out images"
    )


def images(results: Results, of: Literal["tokenizer", "generator"], metric: str) -> str:
    """How many held-out images (or samples) lie behind a metric of ``curves``, in words."""
    shown = results.held.codes if of == "tokenizer" else results.held.points
    rows = results.numbers.filter(
        pl.col("metric") == metric, pl.col("protocol_id").is_in(shown["protocol_id"].unique().to_list())
    )
    numbers = rows["n"].drop_nulls().unique().sort().to_list()
    return " or ".join(f"{number:,}" for number in numbers) or "an unknown number of"


def protocol(held: study.Study) -> str:
    """The main protocol's settings, as a sentence of captions."""
    if held.points.is_empty():
        return "no generator measured yet"
    row = held.points.row(0, named=True)
    parts = [f"protocol {row['protocol']}"]
    if row["samples"] is not None:
        parts.append(f"{row['samples']:,} samples")
    if row["weights"]:
        parts.append(f"{'EMA' if row['weights'] == 'ema' else row['weights']} weights")
    parts.append("guidance by search" if row["guidance_from"] == "search" else f"guidance {row['guidance'] or 'off'}")
    if row["temperature"] is not None:
        parts.append(f"temperature {row['temperature']:g}")
    return ", ".join(parts)


def unmeasured(held: study.Study) -> dict[str, list[str]]:
    """What of the gate was not measured -> tokenizers without it that are not flagged either, as "16x64 s0"."""
    known = held.codes.select("rate", "tokenizer_seed", "gate")
    bare = held.points.filter(pl.col("tokenizer_gate").is_null())
    bare = bare.select("rate", "tokenizer_seed", pl.lit("gate not measured").alias("gate"))
    found: dict[str, list[str]] = {}
    for rate, seed, gate in pl.concat([known, bare]).unique(maintain_order=True).iter_rows():
        words = gate.split(", ")
        if {"collapsed", "unconverged"} & set(words):
            continue  # flagged, and named with its gate there
        for what in words:
            if what.endswith(" not measured"):
                found.setdefault(what.removesuffix(" not measured"), []).append(f"{rate} s{seed}")
    return found


def omissions(held: study.Study, marks: tuple[str, str] | None = None) -> str:
    """Which tokenizers are flagged or unmeasured and what was left out, as sentences of captions.

    ``marks``: how a figure draws the one and the other.
    """
    flagged, half = (f" ({mark})" for mark in marks) if marks else ("", "")
    gates = [f"Flagged tokenizers{flagged}: {'; '.join(held.flagged)}."] if held.flagged else []
    gates += [
        f"{what.capitalize()} not measured for {'; '.join(names)}{half}." for what, names in unmeasured(held).items()
    ]
    gates = gates or ["No tokenizer flagged."]
    left = "; ".join(f"{number} {reason}" for reason, number in held.left_out.items())
    damaged = f" Damaged files left out: {len(held.damaged)}." if held.damaged else ""
    return f"{' '.join(gates)} Left out of fits: {left or 'nothing'}.{damaged}"


def text(results: Results) -> str:
    """The report: what was measured, who wins, laws, spread, agreement, prediction, omissions."""
    held = results.held
    lines = [
        f"# {held.name}",
        "",
        f"{extent(held)}; {protocol(held)}.",
        omissions(held),
        "",
        _answer(results),
        "",
        "## Which rate wins",
        "",
    ]
    if len(results.best_rates) and results.best_rates["seeds"].max() > 1:
        lines += ["Each contrast at 95 %, paired by tokenizer seed, not corrected for how many there are.", ""]
    lines += _winners(results)
    told: list[Crossing] = []
    for metric in results.metrics:
        if metric != "nll_bits":
            told += _told(results.of(metric), everything=metric == held.main)
    for shared in (1, SHARED):
        arms, _ = arms_of(held, held.main, "total", shared)
        told += crossings(arms)[: max(len(arms) - 1, 0)]
    lines += ["", "## Crossings", "", *dict.fromkeys(f"- {each.sentence()}" for each in told)]
    lines.append("- Every pair is in crossings.parquet.")
    lines += ["", "## Laws", ""]
    laws = [found for metric in results.metrics for found in results.of(metric).laws.values()]
    over = methods(found.intervals["a"] for found in laws)
    lines += [f"Intervals are 95 % ({'; '.join(over)}); in brackets, given these tokenizers.", ""] if over else []
    for metric in results.metrics:
        for rate, found in results.of(metric).laws.items():
            sure = "" if found.identified else "; **exponent not identified**"
            if not found.misfit.fits:
                sure = f"; **the law does not fit**: budget means lie {math.exp(found.misfit.rms):.2g}x off it"
            bound = f"; {', '.join(found.fit.at_bound)} at its bound" if found.fit.at_bound else ""
            limit = floor(held, rate, metric)
            asymptote = found.fit.params.get("E")
            low = "; asymptote below the decoder's floor" if asymptote and limit and asymptote < limit else ""
            values = [f"{p} = {found.intervals[p]} ({_ends(found.given[p])})" for p in found.intervals if p != "A"]
            lines.append(
                f"- {words(metric)}, {rate}, {found.fit.formula}: {', '.join(values)}, n = {found.fit.n}, "
                f"{len(found.arm.seeds)} tokenizer seed{'s' * (len(found.arm.seeds) > 1)}{sure}{bound}{low}"
            )
        lines += [
            f"- {words(metric)}, {rate}: no law, {why.sentence}" for rate, why in results.of(metric).refused.items()
        ]
    if swept := tuning.sentences(held.sweeps, words(held.main)):
        lines += ["", "## Training settings", "", "The best of each sweep, which alone goes into curves and fits.", ""]
        lines += swept
    lines += ["", "## How sure", ""]
    lines += _spreads(results) + _agreement(held) + _guided(held)
    if held.prediction is not None:
        lines += ["", "## Prediction of the largest budget", ""]
        for row in prediction.outcome(held, held.prediction).iter_rows(named=True):
            lines.append(f"- {_foretold(row)}")
    if held.lost or held.damaged:
        lines += ["", "## Left out", ""]
        lines += [f"- {run}: {how}." for run, how in held.lost.items()]
        lines += [f"- {line}." for line in held.damaged]
    lines += [] if laws else ["", "No law was fitted."]
    return "\n".join(lines) + "\n"


def methods(intervals: Iterable[Interval]) -> list[str]:
    """The distinct methods of intervals that there are."""
    return list(dict.fromkeys(each.method for each in intervals if each.low is not None and each.high is not None))


def _ends(interval: Interval) -> str:
    return (
        "none" if interval.low is None or interval.high is None else f"{short(interval.low)} to {short(interval.high)}"
    )


def _told(made: Curves, everything: bool) -> list[Crossing]:
    """Crossings worth a sentence: of the best rates, and of neighbours in rate or of all three."""
    count = len(made.arms)
    near = made.crossings[: count - 1 if count > 3 else len(made.crossings)] if everything else []
    return near + [each for each in made.frontier if each not in near]


def _answer(results: Results) -> str:
    """The study's answer in one sentence."""
    held, table = results.held, results.best_rates
    if table.empty:
        return "No answer yet: fewer than two rates have been measured at the same compute."
    chosen = table[(table["metric"] == held.main) & table["size"].isna()].sort_values("budget").to_dict("records")
    if not chosen:
        return f"No answer yet by {words(held.main)}."
    parts = [f"{chosen[0]['rate']} is best at {short(chosen[0]['budget'])} generator training FLOPs"]
    for before, row in pairwise(chosen):
        if row["rate"] == before["rate"]:
            continue
        pair = {before["rate"], row["rate"]}
        meet = next((c for c in results.of(held.main).crossings if {c.first, c.second} == pair), None)
        where = f"from {short(row['budget'])} on"
        if meet is not None and meet.flops is not None and meet.flops.low is not None:
            where = f"from {meet.flops} on"
        parts.append(
            f"{row['rate']} {where}{' (not identified)' if meet is None or meet.verdict != 'crossing' else ''}"
        )
    if len(parts) == 1:
        parts[0] = (
            f"{chosen[0]['rate']} is best from {short(chosen[0]['budget'])} to {short(chosen[-1]['budget'])} FLOPs"
        )
    resolved = sum(row["separated"] for row in chosen)
    return (
        f"By {words(held.main)}, {', then '.join(parts)}; the best rate is told from the runner-up at {resolved} of "
        f"{len(chosen)} budgets."
    )


def _winners(results: Results) -> list[str]:
    table = results.best_rates
    if table.empty:
        return ["- Fewer than two rates have been measured at the same compute: nothing to compare."]
    lines = []
    for metric in table["metric"].unique():
        chosen = table[(table["metric"] == metric) & table["size"].isna()]
        for row in chosen.to_dict("records"):
            sure = "by one tokenizer seed, which says nothing of the next"
            if row["seeds"] > 1:
                resolved = "resolved" if row["separated"] else "not resolved"
                sure = f"{resolved} by {row['seeds']} paired tokenizer seeds; chosen in {row['share']:.0%} of resamples"
            lines.append(
                f"- {words(metric)} at {short(row['budget'])} FLOPs: {row['rate']} ({row['value']:.3g}), "
                f"{row['ratio']:.3g}x below {row['runner_up']}, {sure}."
            )
    return lines


def _spreads(results: Results) -> list[str]:
    lines = []
    for metric in results.metrics:
        frame = results.held.fitted.filter(pl.col(metric) > 0).select(
            "rate",
            pl.format("{}@{}", "generator_size", tuning.BUDGET).alias("cell"),
            pl.col("tokenizer_seed").alias("seed"),
            pl.col(metric).alias("value"),
        )
        try:
            found = spread(frame.group_by("rate", "cell", "seed").agg(pl.col("value").mean()).to_pandas())
        except Refusal as refusal:
            lines.append(f"- {words(metric)}: {refusal.sentence}.")
            continue
        lines.append(
            f"- {words(metric)}: tokenizer seeds of one rate differ by {short(100 * found['sd_seed'])} % "
            f"[{short(100 * found['low'])}, {short(100 * found['high'])}] (standard deviation of the logarithm, "
            f"{found['dof']} dof); what is left within them is {short(100 * found['sd_rest'])} %."
        )
    return lines


def agreement(held: study.Study) -> tuple[Interval, int] | None:
    """Rank agreement of gFID by the first two extractors over the main points."""
    if len(held.extractors) < 2 or held.points.is_empty():
        return None
    columns = [f"fid_{extractor}" for extractor in held.extractors[:2]]
    if any(column not in held.points.columns for column in columns):
        return None
    frame = held.points.drop_nulls(columns)
    try:
        return spearman(frame[columns[0]].to_list(), frame[columns[1]].to_list(), frame["tokenizer"].to_list())
    except Refusal:
        return None


def _agreement(held: study.Study) -> list[str]:
    found = agreement(held)
    if found is None:
        return []
    first, second = held.extractors[:2]
    return [f"- Rank agreement of gFID by {named(first)} and {named(second)}: Spearman {found[0]}, n = {found[1]}."]


def _guided(held: study.Study) -> list[str]:
    """Who wins with guidance, at the largest budget that has it, beside who wins without.

    Envelopes as everywhere else, of the same candidates in both: sizes measured both ways for every tokenizer seed, as
    many evaluation seeds. So the unguided values may differ from those of "Which rate wins", which have more of each.
    """
    if not held.unguided and len(held.points):
        return [f"- No unguided evaluation: every curve is of the guided protocol {held.points['protocol'][0]}."]
    if held.guided.is_empty() or held.main not in held.guided.columns:
        return []
    ways = {"guided": study.one_protocol(held.guided), "unguided": held.points}
    samples = {way: rows["evaluation_seed"].unique().sort().to_list() for way, rows in ways.items()}
    count = min(map(len, samples.values()))
    ways = {way: rows.filter(pl.col("evaluation_seed").is_in(samples[way][:count])) for way, rows in ways.items()}
    arms: dict[str, dict[str, Arm]] = {}
    lines = []
    for way, rows in ways.items():
        found, refused = arms_of(replace(held, points=rows), held.main)
        arms[way] = {each.rate: each for each in found}
        lines += [f"- {way}, {why.sentence}." for why in refused.values()]
    shared = [rate for rate in arms["guided"] if rate in arms["unguided"]]
    pairs = [candidates([arms[way][rate] for way in ways]) for rate in shared]
    tables = [[envelope_table(each).assign(rate=each.rate) for each in pair] for pair in pairs if pair]
    if not tables:
        return lines
    budgets = [set(guided["budget"]) for guided, _ in tables]
    largest = max(set.intersection(*budgets) or set.union(*budgets))
    chosen = "another evaluation seed" if count > 1 else "the evaluation seed that is reported"
    for way, own in zip(ways, zip(*tables, strict=True), strict=True):
        at = pd.concat(own).query("budget == @largest")
        means = np.exp(np.log(at["y"]).groupby(at["rate"]).mean()).sort_values()
        order = ", ".join(f"{rate} {value:.3g}" for rate, value in means.items())
        lines.append(
            f"- {way} at {short(largest)} FLOPs, best size per tokenizer seed among those measured both ways (chosen "
            f"by {chosen}), {words(held.main)}: {order}."
        )
    return lines


def _foretold(row: dict[str, Any]) -> str:
    what = f"{words(row['metric'])}, {row['rate']} at {short(row['flops'])} FLOPs"
    if row["predicted"] is None:
        return f"{what}: not predicted, {row['refused']}."
    ends = "no interval" if row["low"] is None else f"[{row['low']:.3g}, {row['high']:.3g}]"
    if row["outcome"] is None:
        came = "outcome incomplete" if row["by_seed"] else "not measured yet"
    else:
        inside = "" if row["inside"] is None else ", inside" if row["inside"] else ", outside"
        if row["inside"] is None and row["low"] is not None:
            inside = ", outcome incomplete"
        came = f"came out {row['outcome']:.3g} ({row['outcome'] / row['predicted'] - 1:+.1%}{inside})"
    late = " (written after the outcome)" if row["outcome_known"] else ""
    return f"{what}: predicted {row['predicted']:.3g} {ends}{late}; {came}."


def write(results: Results, out: Path) -> list[Path]:
    """Write the tables and the report into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in ("laws", "crossings", "best_rates"):
        frame = getattr(results, name)
        if len(frame):
            written.append(out / f"{name}.parquet")
            frame.to_parquet(written[-1])
    written.append(out / "report.md")
    written[-1].write_text(text(results))
    return written
