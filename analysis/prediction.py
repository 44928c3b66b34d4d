"""What will the largest budget give? A prediction from the smaller ones, written before the outcome is known.

    python -m analysis.frontier results/digits --predict-largest

Per rate and metric: the mean curve of the tokenizer seeds below the largest budget is fitted (saturating law from four
budgets on, pure power law with three) and extrapolated, with a Student-t interval for a new observation of that mean.
Where that law misses the means by more than 20 %, a power law through the last three budgets is extrapolated instead.
It speaks of these tokenizers, which the outcome shares, and not of others of the same rate. What means miss their laws
by (noise, and what the law gets wrong) is pooled over the rates that were treated alike: one curve of four budgets has
one degree of freedom.
"""

from __future__ import annotations

import math
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from scipy import stats

from analysis import load, study
from analysis.arms import Arm, arm, envelope_table, mean_curve
from analysis.fit import MISFIT, fit
from analysis.forms import FORMS
from analysis.interval import LEVEL
from analysis.refusal import Refusal
from analysis.result import Fit

LAST = 3  # budgets of a local power law

COLUMNS: dict[str, Any] = {
    "study": pl.String,
    "rate": pl.String,
    "bits": pl.Float64,
    "metric": pl.String,
    "flops": pl.Float64,  # generator training FLOPs of the predicted budget
    "predicted": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "level": pl.Float64,
    "form": pl.String,
    "method": pl.String,
    "budgets": pl.Int64,  # points of the fit
    "seeds": pl.Int64,  # tokenizer seeds behind each
    "largest_used": pl.Float64,
    "refused": pl.String,  # why there is no number
    "protocol": pl.String,
    "outcome_known": pl.Boolean,  # points of the predicted budget had been measured when this was written
    "written": pl.Datetime("us", "UTC"),
    "commit": pl.String,
}


def file(folder: Path) -> Path:
    return folder / load.PREDICTION


def predict(held: study.Study) -> pl.DataFrame:
    """The largest planned budget from all smaller ones, one row per rate and metric; StudyError if there is none."""
    planned = load.plan(held.folder).filter(pl.col("stage") == "evaluation", pl.col("generator").is_not_null())
    budgets = planned["flops_target"].drop_nulls().unique().sort().to_list()
    if len(planned) and not budgets:
        raise load.StudyError(f"{held.folder}: a prediction needs a plan by FLOP budgets; this one is by steps")
    if held.points.is_empty() or len(budgets) < 4:
        raise load.StudyError(
            f"{held.folder}: a prediction needs generators measured at three budgets and a larger one planned; "
            f"{len(budgets)} planned, {held.points['flops_target'].n_unique() if len(held.points) else 0} measured"
        )
    largest = budgets[-1]
    metrics = [f"fid_{extractor}" for extractor in held.extractors] + ["nll_bits"]
    known = not held.points.filter(pl.col("flops_target") == largest).is_empty()
    now, commit = datetime.now(UTC), _commit()
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        if metric not in held.points.columns:
            continue
        fits: dict[str, Fit] = {}
        for rate in study.arms(held.points):
            row: dict[str, Any] = {"study": held.name, "rate": rate, "metric": metric, "flops": largest}
            row |= {"written": now, "commit": commit, "protocol": held.points["protocol"][0], "outcome_known": known}
            try:
                curve = arm(held.points, rate, metric).take(below=largest)
                fits[rate] = _law(curve)
                row |= {"bits": curve.bits, "seeds": len(curve.seeds), "largest_used": max(curve.budgets)}
            except Refusal as refusal:
                row["refused"] = str(refusal)
            rows.append(row)
        for row in rows:
            if row["metric"] == metric and (found := fits.get(row["rate"])):
                alike = [each for each in fits.values() if each.selection == found.selection]
                row |= _extrapolate(found, largest, *_pooled(alike), len(alike))
    return pl.DataFrame(rows, schema=COLUMNS)


def _law(curve: Arm) -> Fit:
    x, y = mean_curve(curve)
    form = "saturating" if len(x) > len(FORMS["saturating"].parameters) else "power"
    found = fit(x, y, form, selection="mean of the tokenizer seeds, budgets below the predicted one")
    if len(x) > LAST and math.sqrt(found.objective / found.n) > MISFIT:
        found = fit(
            x[-LAST:], y[-LAST:], "power", selection=f"mean of the tokenizer seeds, the {LAST} budgets before it"
        )
    return found


def _pooled(fits: list[Fit]) -> tuple[float, int]:
    """Standard deviation of ln y of seed means about their laws, over all rates, and its degrees of freedom."""
    dof = sum(each.dof for each in fits)
    return (math.sqrt(sum(each.objective for each in fits) / dof) if dof > 0 else math.nan), dof


def _extrapolate(found: Fit, largest: float, sigma: float, dof: int, rates: int) -> dict[str, Any]:
    line = found.get_prediction([largest])
    predicted = float(line.mean[0])
    # the fit's own errors are in units of its own sigma
    scale = sigma / found.sigma if found.sigma else math.nan
    half = float(stats.t.ppf(0.5 + LEVEL / 2, dof)) * math.hypot(scale * line.se_log[0], sigma) if dof > 0 else math.nan
    known = math.isfinite(half)
    return {
        "predicted": predicted,
        "low": predicted * math.exp(-half) if known else None,
        "high": predicted * math.exp(min(half, 300.0)) if known else None,
        "level": LEVEL,
        "form": found.form,
        "method": f"{found.formula}, {found.estimator}, {found.selection}; new observation of the seed mean, delta, "
        f"Student-t with {dof} degrees of freedom from {rates} rate{'s' if rates > 1 else ''}",
        "budgets": found.n,
    }


def _commit() -> str | None:
    run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


def write(held: study.Study) -> str:
    """Write prediction.parquet into the results folder; a sentence about what was written."""
    frame = predict(held)
    path = file(held.folder)
    if path.exists() and held.prediction is None:
        raise load.StudyError(f"{path}: damaged; delete it to predict again")
    before = held.prediction is not None and not held.prediction["outcome_known"].any()
    if before and frame["outcome_known"].any():
        raise load.StudyError(f"{path}: was written before its outcome was known; delete it to predict again")
    staged = path.with_name(f".{path.name}.tmp")
    frame.write_parquet(staged)
    staged.replace(path)
    late = " (the outcome was already known)" if frame["outcome_known"].any() else ""
    number = frame["predicted"].count()
    return f"{path}: {number} of {len(frame)} predictions at {frame['flops'][0]:.3g} FLOPs{late}"


def outcome(held: study.Study, frame: pl.DataFrame) -> pl.DataFrame:
    """Adds to a prediction what came out: ``outcome`` (mean over seeds of the envelope), ``by_seed``, ``inside``.

    ``outcome`` is null until as many tokenizer seeds are there as were predicted: it is their mean that was.
    """
    found = []
    for row in frame.iter_rows(named=True):
        values: list[float] = []
        try:
            table = envelope_table(arm(held.points, row["rate"], row["metric"]))
            values = table.loc[table["budget"] == row["flops"], "y"].tolist()
        except Refusal:
            pass
        whole = len(values) >= max(row["seeds"] or 1, 1)
        mean = math.exp(sum(math.log(v) for v in values) / len(values)) if whole else None
        inside = None if mean is None or row["low"] is None else row["low"] <= mean <= row["high"]
        found.append({"outcome": mean, "by_seed": values, "inside": inside})
    added = pl.DataFrame(found, schema={"outcome": pl.Float64, "by_seed": pl.List(pl.Float64), "inside": pl.Boolean})
    return pl.concat([frame, added], how="horizontal")
