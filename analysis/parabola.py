"""What do iso-FLOP curves look like? Loss against size with a parabola per budget, and N*(C) with its band."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.interval import short
from analysis.isoflop import Budget, Isoflop, Trend
from analysis.laws import Array
from analysis.refusal import Refusal
from analysis.theme import GREY, WIDTH, Caption, colours, log_axis, power, save
from analysis.valley import FLAGS, Residuals, methods, told

LABELS = 8  # budgets in the legend at most
GRID = 120  # points of a curve
BAR: dict[str, Any] = {"linewidth": 3, "solid_capstyle": "butt", "zorder": 3}
PALE = "0.8"  # runs of a budget that was refused


class Points(NamedTuple):
    """Runs: sizes, budgets and the metric, [n] each."""

    size: Array
    budget: Array
    y: Array


def draw(found: Isoflop, points: Points, size: str, metric: str, residuals: Residuals) -> Figure:
    """Two panels, side by side; refused budgets are pale points without a curve."""
    figure = Figure(figsize=(WIDTH, 3.3))
    left, right = figure.subplots(1, 2)
    names = [f"{each.budget!r}" for each in found.budgets]
    tints = colours(names)
    pale = np.isin(points.budget, list(found.refused)) & np.isfinite(points.size) & (points.size > 0)
    left.plot(points.size[pale], points.y[pale], ".", color=PALE, zorder=1)
    for each, name in zip(found.budgets, names, strict=True):
        _parabola(left, each, points, residuals, tints[name])
        _vertex(right, each, tints[name])
    kept = np.isin(points.budget, [each.budget for each in found.budgets]) | pale
    log_axis(left, "x", float(points.size[kept].min()), float(points.size[kept].max()))
    if residuals == "log":
        log_axis(left, "y", float(points.y[kept].min()), float(points.y[kept].max()))
    left.set_xlabel(_plain(size))
    left.set_ylabel(_plain(metric))
    left.set_title("One parabola per budget")
    budgets = [each.budget for each in found.budgets]
    heights = [end for each in found.budgets for end in (each.sizes.best.low, each.sizes.best.estimate) if end]
    heights += [each.sizes.best.high for each in found.budgets if each.sizes.best.high]
    if not isinstance(found.size, Refusal):
        heights += _law(right, found.size)
    log_axis(right, "x", min(budgets), max(budgets))
    log_axis(right, "y", min(heights), max(heights))
    right.set_xlabel("budget C (FLOPs)")
    right.set_ylabel(f"best {_plain(size)}, N*")
    right.set_title("Best size at each budget")
    figure.legend(handles=_handles(found, tints), loc="outside lower center", ncols=5, columnspacing=1.2)
    return figure


def _parabola(axes: Axes, each: Budget, points: Points, residuals: Residuals, colour: str) -> None:
    """Points of one budget, the parabola over its sizes, the vertex with its interval."""
    own, held = points.budget == each.budget, each.sizes
    assert held.best.estimate is not None
    assert held.value.estimate is not None
    assert held.curvature.estimate is not None
    at = np.geomspace(held.low, held.high, GRID)
    rise = held.curvature.estimate * np.log(at / held.best.estimate) ** 2
    curve = held.value.estimate * np.exp(rise) if residuals == "log" else held.value.estimate + rise
    axes.plot(points.size[own], points.y[own], ".", color=colour, markersize=4)
    axes.plot(at, curve, color=colour, linewidth=1.2)
    if held.best.low is not None and held.best.high is not None:
        axes.plot([held.best.low, held.best.high], [held.value.estimate] * 2, color=colour, **BAR)
    fill = "white" if "flat" in held.flags else colour
    axes.plot(held.best.estimate, held.value.estimate, "D", color=colour, markerfacecolor=fill, markersize=4, zorder=4)


def _vertex(axes: Axes, each: Budget, colour: str) -> None:
    """N* of one budget with its interval; open where the curvature cannot be told from zero."""
    best = each.sizes.best
    assert best.estimate is not None
    if best.low is not None and best.high is not None:
        axes.plot([each.budget] * 2, [best.low, best.high], color=colour, **BAR)
    fill = "white" if "flat" in each.sizes.flags else colour
    axes.plot(each.budget, best.estimate, "D", color=colour, markerfacecolor=fill, markersize=4, zorder=4)


def _law(axes: Axes, law: Trend) -> list[float]:
    """N*(C) with its band between the budgets; the heights that it takes."""
    at = np.geomspace(min(law.budgets), max(law.budgets), GRID)
    ends = [law.at(float(budget)) for budget in at]
    middle = [each.estimate for each in ends if each.estimate is not None]
    axes.plot(at, middle, color=GREY, linewidth=1.2, zorder=2)
    low = [each.low for each in ends if each.low is not None]
    high = [each.high for each in ends if each.high is not None]
    if len(low) == len(high) == len(at):
        axes.fill_between(at, low, high, color=GREY, alpha=0.2, linewidth=0)
        return [*middle, *low, *high]
    return middle


def _handles(found: Isoflop, tints: dict[str, str]) -> list[Artist]:
    """Budgets, evenly chosen where there are many, and what marks mean."""
    count = len(found.budgets)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(count, LABELS))})
    budgets = [found.budgets[i].budget for i in chosen]
    handles: list[Artist] = [Line2D([], [], color=tints[f"{c!r}"], label=f"{power(c)} FLOPs") for c in budgets]
    mark: dict[str, Any] = {"linestyle": "", "marker": "D", "markersize": 4, "color": GREY}
    handles.append(Line2D([], [], **mark, label="best size"))
    if any(each.sizes.best.low and each.sizes.best.high for each in found.budgets):
        handles.append(Line2D([], [], color=GREY, linewidth=3, label="its 95 % interval"))
    if any("flat" in each.sizes.flags for each in found.budgets):
        handles.append(Line2D([], [], **mark, markerfacecolor="white", label="curvature not told from 0"))
    if found.refused:
        handles.append(Line2D([], [], linestyle="", marker=".", color=PALE, label="budget refused"))
    if not isinstance(found.size, Refusal) and found.size.level.low is not None:
        handles.append(Patch(color=GREY, alpha=0.2, linewidth=0, label="95 % of N*(C)"))
    return handles


def _plain(name: str) -> str:
    """A name of the caller as text: no mathematics between dollars."""
    return name.replace("$", r"\$")


def caption(found: Isoflop, size: str, metric: str, residuals: Residuals) -> Caption:
    """What a reader has to know: which parabola, its intervals, the law, what was left out and flagged."""
    runs = sum(each.sizes.n for each in found.budgets)
    what = f"ln {metric}" if residuals == "log" else metric
    parts = [f"Parabolas of {what} in ln {size}, {runs} runs at {len(found.budgets)} budgets; diamonds are vertices."]
    parts += [f"{line}." for line in methods([each.sizes.best for each in found.budgets])]
    if isinstance(found.size, Refusal):
        parts.append(f"No law over budgets: {found.size.sentence}.")
    else:
        law = found.size
        line = f"N* = {told(law.level)} x (C / {short(law.pivot)})^{told(law.exponent)}"
        parts.append(f"{line}, {len(law.budgets)} budgets, {law.exponent.method}.")
    for flag, words in FLAGS.items():
        if raised := [short(each.budget) for each in found.budgets if flag in each.sizes.flags]:
            parts.append(f"At {', '.join(raised)}: {words}.")
    if lost := [
        short(each.budget) for each in found.budgets if each.sizes.best.reason and "flat" not in each.sizes.flags
    ]:
        parts.append(f"At {', '.join(lost)}: a vertex without two ends of its interval.")
    if found.refused:
        parts.append(f"Refused budgets: {found.counted}.")
    return Caption("Best size at each budget", " ".join(parts), runs)


def write(
    found: Isoflop, points: Points, path: str | os.PathLike[str], *, size: str, metric: str, residuals: Residuals
) -> None:
    """The figure as PNG, SVG or PDF by the end of its name, its caption as .txt beside it: both or neither.

    Raises ``TableError`` for another ending and for a place that cannot be written to.
    """
    save(lambda: draw(found, points, size, metric, residuals), caption(found, size, metric, residuals), path)
