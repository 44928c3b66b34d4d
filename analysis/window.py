"""How far off is a law at points that its fit has not seen? One law on one split, and at a point without a run.

An error is ln(predicted / observed): positive where the law said more than was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from analysis.fit import fit
from analysis.forms import FORMS
from analysis.interval import LEVEL
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.resampling import SAME
from analysis.result import Fit
from analysis.solver import Objective
from analysis.splits import Flags, Place, Points, Scheme, Split, outside, place

SQUARES = Objective()
NARROW = 1e-9  # relative width below which an interval is rounding


@dataclass(frozen=True)
class Errors:
    """Over the predictions of a window, e = ln(predicted / observed)."""

    log_mae: float  # mean |e|
    signed: float  # mean e
    largest: float  # max |e|
    inside: int  # outcomes inside the interval of a new observation, of
    intervals: int  # predictions that have one


@dataclass(frozen=True)
class Window:
    """One law on one split; no errors and parameters where the fit is ``refused`` (code and sentence)."""

    law: str
    scheme: Scheme
    along: str
    value: float  # the last budget that was fitted, or the value left out
    n_train: int
    n_test: int
    place: Place
    errors: Errors | None = None
    params: dict[str, float | None] = field(default_factory=dict)
    at_bound: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] | None = None


@dataclass(frozen=True)
class Row:
    """What one fit says about one point.

    ``kind``: a prediction was measured, unseen by the fit; of a projection there is no run; "fitted" is a point of
    --project that is a run, and so was among the rows of the fit. ``low``, ``high``: of a new observation, None for a
    ``reason``.
    """

    law: str
    kind: Literal["prediction", "projection", "fitted"]
    scheme: Scheme | None
    value: float | None  # that of the window
    row: int | None  # of the table after --where, from 0
    group: str | None
    inputs: dict[str, float]
    along: str  # what distance is in decades of
    distance: float
    place: Place
    predicted: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = LEVEL
    identified: bool | None = None  # narrow enough to be quoted (``analysis.estimate``)
    reason: str | None = None
    observed: float | None = None
    log_error: float | None = None
    relative_error: float | None = None
    inside: bool | None = None
    refused: dict[str, str] | None = None


def fitted(points: Points, law: str, kept: Flags, objective: Objective, selection: str) -> Fit:
    """The law through the rows that are kept [n]; raises ``Refusal``."""
    groups = None if points.groups is None else [points.groups[i] for i in np.flatnonzero(kept)]
    return fit(
        points.inputs(law)[kept],
        points.y[kept],
        law,
        groups=groups,
        residuals=objective.residuals,
        loss=objective.loss,
        delta=objective.delta,
        interval="delta",  # what a bootstrap adds is of the curve, not of a new observation
        inputs=FORMS[law].inputs,
        output=points.output,
        selection=selection,
    )


def _ends(found: Fit, at: Array) -> list[dict[str, Any]]:
    """Per point [m, d]: predicted, low and high of a new observation, and the reason where there are none."""
    line = found.get_prediction(at)
    with np.errstate(over="ignore", invalid="ignore"):
        frame, identified = line.summary_frame(1 - LEVEL), line.identified
    ends = frame[["mean", "obs_ci_lower", "obs_ci_upper"]].to_numpy().tolist()
    made = []
    for (mean, low, high), sure in zip(ends, identified, strict=True):
        if not (math.isfinite(mean) and mean > 0):
            raise Refusal("overflow", f"the fitted {found.form} law overflows at a point that it is to predict")
        reason = None
        if math.isnan(low) or math.isnan(high):
            reason = "the scatter of new observations is that of least squares only"
            if found.loss == "squares":
                reason = found.reason or "the fitted rows say nothing there"
        elif math.isinf(high):
            reason = "its upper end overflows"
        elif high - low <= NARROW * mean:
            reason = "the fitted rows lie on the law to the last digit, which says nothing"
        made.append({"predicted": mean, "low": None, "high": None, "reason": reason})
        if reason is None:
            made[-1] |= {"low": low, "high": high, "identified": sure}
    return made


def evaluate(
    points: Points, law: str, split: Split, objective: Objective = SQUARES, min_train: int = 0
) -> tuple[Window, list[Row]]:
    """One law on one split. A fit that is refused gives a window that says so, and no rows."""
    tested, along = np.flatnonzero(split.test), points.columns[split.along]
    distances = [outside(float(along[i]), along[split.train]) for i in tested]
    window = Window(
        law=law,
        scheme=split.scheme,
        along=split.along,
        value=split.value,
        n_train=int(split.train.sum()),
        n_test=len(tested),
        place=place(max(distances)),
    )
    try:
        if window.n_train < min_train:
            raise Refusal("too_few", f"{window.n_train} rows to fit, --min-train asks for {min_train}")
        found = fitted(points, law, split.train, objective, str(split))
        said = _ends(found, points.inputs(law)[tested])
    except Refusal as refusal:
        return replace(window, refused=refusal.told), []
    rows = []
    for i, distance, ends in zip(tested, distances, said, strict=True):
        observed = float(points.y[i])
        error = math.log(ends["predicted"] / observed)
        rows.append(
            Row(
                law=law,
                kind="prediction",
                scheme=split.scheme,
                value=split.value,
                row=int(points.rows[i]),
                group=None if points.groups is None else points.groups[i],
                inputs={name: float(points.columns[name][i]) for name in FORMS[law].inputs},
                along=split.along,
                distance=distance,
                place=place(distance),
                observed=observed,
                log_error=error,
                relative_error=math.expm1(error),
                inside=None if ends["low"] is None else ends["low"] <= observed <= ends["high"],
                **ends,
            )
        )
    window = replace(
        window,
        errors=_errors(rows),
        params={name: value if math.isfinite(value) else None for name, value in found.params.items()},
        at_bound=dict(found.at_bound),
    )
    return window, rows


def _errors(rows: Sequence[Row]) -> Errors:
    errors = np.array([row.log_error for row in rows])
    return Errors(
        log_mae=float(np.abs(errors).mean()),
        signed=float(errors.mean()),
        largest=float(np.abs(errors).max()),
        inside=sum(row.inside is True for row in rows),
        intervals=sum(row.inside is not None for row in rows),
    )


def project(points: Points, law: str, found: Fit | Refusal, at: Mapping[str, float]) -> Row:
    """What a fit to all rows says about a point: an input each, and a budget that is no input where it is known.

    Its distance is in whatever lies furthest beyond what was measured.
    """
    inputs = {name: at[name] for name in FORMS[law].inputs}
    beyond = {name: outside(value, points.columns[name]) for name, value in at.items()}
    along = max(beyond, key=beyond.__getitem__)
    apart = [np.abs(np.log(points.columns[name] / value)) for name, value in inputs.items()]
    row = Row(
        law=law,
        kind="fitted" if (np.max(apart, axis=0) <= SAME).any() else "projection",
        scheme=None,
        value=None,
        row=None,
        group=None,
        inputs=inputs,
        along=along,
        distance=beyond[along],
        place=place(beyond[along]),
    )
    try:
        if isinstance(found, Refusal):
            raise found
        return replace(row, **_ends(found, np.array([list(inputs.values())]))[0])
    except Refusal as refusal:
        return replace(row, refused=refusal.told)
