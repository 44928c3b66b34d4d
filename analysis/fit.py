"""Which law do these points follow, and how well is it known? Any table, any law of ``analysis.forms``.

    python -m analysis.fit results.csv --law saturating --x x=flops --y fid --group seed

Least squares on log residuals by default (relative errors: natural for positive metrics over decades), sum-reduced,
float64, exact derivatives. Points that share a trunk or a tokenizer are not independent: pass ``groups``, and intervals
are those of the groups. One group has none: what its points scatter by says nothing about another group.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analysis import solver
from analysis.estimate import Estimate, estimate
from analysis.forms import FORMS
from analysis.laws import Array, Form
from analysis.profile import suits
from analysis.refusal import EXIT_REFUSED, Refusal
from analysis.resampling import SAME, UNITS, points
from analysis.result import Fit, Method
from analysis.solver import Loss, Objective, Residuals

MISFIT = math.log(1.2)  # means that lie further off a law (root mean square of ln y) do not follow it
SEPARATE = 1e-4  # share of an input's spread (of ln x, squared) that the other inputs must leave unexplained
SQUARABLE = (1e-140, 1e140)  # size of y whose squared residuals are floats
DRAWS = 1000  # of a bootstrap that is the default


def check(
    form: Form, x: Array, y: Array, *, ids: Sequence[str] | None = None, protocols: Sequence[str] | None = None
) -> None:
    """Refuses points that no estimator could save: mixed protocols, duplicates, non-positive or too few values."""
    p = len(form.parameters)
    if not len(y):
        raise Refusal("too_few", f"no points for the {p} parameters of the {form.name} form")
    if protocols is not None and len(set(protocols)) > 1:
        several = ", ".join(sorted(set(protocols))[:4])
        raise Refusal("mixed_protocols", f"points of {len(set(protocols))} protocols cannot share a fit: {several}")
    if ids is not None and len(set(ids)) < len(ids):
        twice = sorted(name for name in set(ids) if list(ids).count(name) > 1)
        raise Refusal("duplicate_run", f"{twice[0]} stands {list(ids).count(twice[0])} times among the points")
    if np.isinf(x).any() or np.isinf(y).any():
        raise Refusal("overflow", "a value is infinite; give it in larger units")
    if np.isnan(x).any() or np.isnan(y).any():
        count = int((np.isnan(x).any(1) | np.isnan(y)).sum())
        raise Refusal("not_finite", f"{count} of {len(y)} points lack a value; leave them out by name")
    if (x <= 0).any() or (y <= 0).any():
        low = float(min(x.min(), y.min()))
        hint = "; an integer product that has overflowed?" if low < -1e15 else ""
        raise Refusal("non_positive", f"a power law and log residuals need positive values; one is {low:.6g}{hint}")
    logs = np.log(x)
    spread = logs.std(0)
    if still := [name for name, width in zip(form.inputs, spread, strict=True) if width < SAME]:
        raise Refusal("constant", f"{', '.join(still)} does not vary, so that no exponent of it can be told")
    distinct = int(points(x).max()) + 1
    if distinct < p + 1:
        raise Refusal(
            "too_few",
            f"{distinct} distinct {'x' if x.shape[1] == 1 else 'points'} for {p} parameters of the "
            f"{form.name} form; {p + 1} are needed",
        )
    if x.shape[1] > 1:
        values, vectors = np.linalg.eigh(np.corrcoef(logs.T))
        if values[0] < SEPARATE:  # what the others leave of an input is never less than that
            tied = " and ".join(
                name for name, size in zip(form.inputs, np.abs(vectors[:, 0]), strict=True) if size > 0.1
            )
            raise Refusal("collinear", f"{tied} move together, so that their terms cannot be told apart")


def fit(
    x: ArrayLike,
    y: ArrayLike,
    form: str = "saturating",
    *,
    groups: Sequence[Any] | None = None,
    weights: ArrayLike | None = None,
    residuals: Residuals = "log",
    loss: Loss = "squares",
    delta: float | None = None,
    interval: Method | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    protocols: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    output: str = "y",
    selection: str = "all points given",
    conventions: dict[str, str] | None = None,
) -> Fit:
    """Fit one law to points x [n] (or [n, d]) and y [n]; raises ``Refusal`` instead of answering badly.

    ``groups`` names the independent unit of each point (a tokenizer seed, a training run); without it the points are
    taken as independent, and the result says so. ``weights`` are relative: those of points with known standard errors s
    are 1 / s^2 (of ln y for log residuals); their common scale is estimated. ``delta`` is Huber's, in units of the
    residuals. ``interval`` None is chosen: the linearised one for least squares (of groups where there are any), a
    bootstrap of rows or groups for other losses. ``ids`` and ``protocols`` are checked for duplicates and mixtures.
    """
    law = FORMS[form]
    out = np.asarray(y, np.float64)
    at = np.asarray(x, np.float64)
    at = at[:, None] if at.ndim == 1 else at
    _usable(law, at, out, groups, ids, protocols, residuals, loss, delta, interval, draws)
    weight = np.ones(len(out)) if weights is None else np.asarray(weights, np.float64)
    if len(out) and not (np.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
        raise Refusal("non_positive", "a weight is negative, missing or infinite (a standard error of 0?)")
    if not weight.all():  # a point that counts nothing is no point of the fit, nor a group of its own
        counts = weight > 0
        at, out, weight = at[counts], out[counts], weight[counts]
        groups, ids, protocols = (_kept(each, counts) for each in (groups, ids, protocols))
    if len(weight):  # relative, so that sigma is that of a point of mean weight, and a new observation is one
        weight = weight / weight.mean()
    check(law, at, out, ids=ids, protocols=protocols)
    labels = None if groups is None else tuple(str(group) for group in groups)
    n_groups = None if labels is None else len(set(labels))
    codes = None if labels is None or n_groups == len(labels) else np.unique(labels, return_inverse=True)[1]
    found = estimate(law, at[None], out[None], weight[None], Objective(residuals, loss, delta), codes)
    if interval == "profile":
        suits(found)
    if residuals == "raw" and not SQUARABLE[0] < found.scale[0] < SQUARABLE[1]:
        raise Refusal("overflow", f"squares of y near {found.scale[0]:.3g} leave the floats; give it in other units")
    units = found.n if found.clusters is None else found.clusters
    if interval is None and loss != "squares" and units >= UNITS:
        interval = "rows" if codes is None else "groups"
    sampled = interval not in (None, "delta", "profile")
    made = result(
        found,
        labels=labels,
        interval=interval or "delta",
        draws=draws if sampled else None,
        seed=seed if sampled else None,
        inputs=tuple(inputs or law.inputs),
        output=output,
        selection=selection,
        conventions=conventions or {},
    )
    if not _finite(made):
        raise Refusal("overflow", f"a number of the {form} fit is beyond 1e308; give inputs and metric in other units")
    if made.interval != "delta":
        made.bse  # noqa: B018  a method that does not suit the points refuses now and not when it is printed
    return made


def _usable(
    law: Form,
    x: Array,
    y: Array,
    groups: Sequence[Any] | None,
    ids: Sequence[str] | None,
    protocols: Sequence[str] | None,
    residuals: str,
    loss: str,
    delta: float | None,
    interval: str | None,
    draws: int,
) -> None:
    """ValueError for arguments that no data could make right."""
    if len(y) and x.shape != (len(y), len(law.inputs)):
        raise ValueError(f"x: got shape {x.shape} for {len(y)} y; the {law.name} form takes [n, {len(law.inputs)}]")
    for name, each in (("groups", groups), ("ids", ids), ("protocols", protocols)):
        if each is not None and len(each) != len(y):
            raise ValueError(f"{name}: got {len(each)} for {len(y)} points")
    if groups is not None and any(group is None for group in groups):
        raise ValueError("groups: a point has none")
    for name, value, allowed in (
        ("residuals", residuals, get_args(Residuals)),
        ("loss", loss, get_args(Loss)),
        ("interval", interval or "delta", get_args(Method)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}; allowed: {', '.join(allowed)}")
    if (loss == "huber") != (delta is not None) or (delta is not None and not 0 < delta < math.inf):
        raise ValueError(f"loss {loss!r}, delta {delta}: Huber's loss has a delta above 0, the others have none")
    if draws < 2:
        raise ValueError(f"draws: got {draws}; two at least")


def _finite(made: Fit) -> bool:
    positive = [made.params[name] for name in FORMS[made.form].positive]
    return bool(np.isfinite([*made.params.values(), made.objective]).all() and np.greater(positive, 0).all())


def _kept(values: Sequence[Any] | None, counts: NDArray[np.bool_]) -> list[Any] | None:
    return None if values is None else [value for value, kept in zip(values, counts, strict=True) if kept]


def fit_each(curves: Sequence[tuple[ArrayLike, ArrayLike]], form: str = "saturating") -> list[Fit | Refusal]:
    """One law to each of many curves (x [n] or [n, d], y [n]) in one batch, by least squares on log residuals.

    As ``fit`` one by one, but a hundred times as fast; a curve that cannot be fitted has its refusal in its place.
    """
    law = FORMS[form]
    held = [
        (np.asarray(x, np.float64).reshape(len(np.atleast_1d(y)), -1), np.asarray(y, np.float64)) for x, y in curves
    ]
    answers: list[Fit | Refusal | None] = [None] * len(held)
    alike: dict[int, list[int]] = {}
    for i, (x, y) in enumerate(held):
        try:
            check(law, x, y)
            alike.setdefault(len(y), []).append(i)
        except Refusal as refusal:
            answers[i] = refusal
    for members in alike.values():
        x, y = (np.stack([held[i][side] for i in members]) for side in (0, 1))
        found = estimate(law, x, y, np.ones_like(y))
        for row, i in enumerate(members):
            made = result(found.take(row), selection=f"curve {i}")
            answers[i] = made if _finite(made) else Refusal("overflow", "a parameter is beyond what a float can hold")
    assert all(answer is not None for answer in answers)
    return [answer for answer in answers if answer is not None]


def result(
    found: Estimate,
    *,
    labels: tuple[str, ...] | None = None,
    interval: Method = "delta",
    draws: int | None = None,
    seed: int | None = None,
    inputs: tuple[str, ...] | None = None,
    output: str = "y",
    selection: str = "all points given",
    conventions: dict[str, str] | None = None,
) -> Fit:
    """The typed result of one fit (B = 1)."""
    law, objective, scale = found.law, found.objective, float(found.scale[0])
    units = scale ** {"squares": 2, "huber": 2, "absolute": 1}[objective.loss] if objective.residuals == "raw" else 1.0
    n, p = found.n, len(law.parameters)
    below, above = found.at_bound
    at_bound: dict[str, Literal["lower", "upper"]] = {
        name: "lower" if low else "upper"
        for name, low, high in zip(law.parameters, below[0], above[0], strict=True)
        if low or high
    }
    k = p + 1  # the residual variance is estimated too
    spare = n - k - 1
    rss = float(found.cost[0])
    aicc = n * math.log(max(rss, 1e-300) / n) + 2 * k * n / spare if spare > 0 and objective.loss == "squares" else None
    own = objective.delta if objective.delta is None or objective.residuals == "log" else objective.delta * scale
    told = Objective(objective.residuals, objective.loss, own)
    sigma = float(found.sigma[0]) * (scale if objective.residuals == "raw" else 1.0)
    return Fit(
        form=law.name,
        formula=law.formula,
        residuals=objective.residuals,
        loss=objective.loss,
        delta=own,
        estimator=f"{told}, variable projection and damped Newton steps",
        selection=selection,
        conventions=conventions or {},
        inputs=inputs or law.inputs,
        output=output,
        x=tuple(tuple(row) for row in (found.x[0] * found.pivots[0]).tolist()),
        y=tuple((found.y[0] * scale).tolist()),
        weights=tuple(found.weights[0].tolist()),
        groups=labels,
        theta=tuple(found.theta[0].tolist()),
        centre=tuple(found.centre[0].tolist()),
        pivots=tuple(found.pivots[0].tolist()),
        scale=scale,
        params=dict(zip(law.parameters, found.params[0].tolist(), strict=True)),
        interval=interval,
        draws=draws,
        seed=seed,
        n=n,
        n_groups=None if labels is None else len(set(labels)),
        dof=found.dof,
        sigma=sigma if math.isfinite(sigma) and objective.loss == "squares" else None,
        objective=rss * units,
        centre_objective=float(found.centre_cost[0]) * units,
        aicc=aicc,
        at_bound=at_bound,
        converged=bool(found.converged[0]),
        solver={"starts": "variable projection", "step": solver.STEP, "gain": solver.GAIN, "steps": solver.ITERATIONS},
        versions=_versions(),
    )


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "scipy", "pandas")}


def compare(fits: Sequence[Fit]) -> pd.DataFrame:
    """Forms fitted to the same points, best AICc first: form, n, parameters, objective, aicc, delta."""
    frame = pd.DataFrame(
        {
            "form": [each.form for each in fits],
            "n": [each.n for each in fits],
            "parameters": [len(each.params) for each in fits],
            "objective": [each.objective for each in fits],
            "aicc": pd.array([each.aicc for each in fits], dtype="Float64"),
        }
    )
    if len({(each.x, each.y, each.weights, each.residuals, each.loss) for each in fits}) > 1:
        raise Refusal("different_points", "AICc compares forms on the same points and residuals only")
    frame["delta"] = frame["aicc"] - frame["aicc"].min()
    return frame.sort_values("aicc", ignore_index=True)


def main(argv: Sequence[str] | None = None) -> int:
    from analysis import question, table  # the command line, which needs fit

    given = question.parser().parse_args(argv)
    try:
        try:
            held, refusal = question.answer(given), None
        except Refusal as refused:
            held, refusal = None, refused
        if held is not None and given.figure:
            from analysis import portrait  # matplotlib is slow to import

            portrait.write(held.fit, given.figure, at=held.at if len(held.at) else None)
        if given.json:
            table.write_json(given.json, question.record(given, held, refusal))
    except table.TableError as error:
        print(error, file=sys.stderr)
        return 2
    if held is None:
        print(f"{given.file}: refused, {refusal}", file=sys.stderr)
        return EXIT_REFUSED
    print(question.text(held))
    return 0


if __name__ == "__main__":
    sys.exit(main())
