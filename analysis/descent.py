"""When do curves fall to a threshold? The curves above, each crossing with bracket and interval below.

Drawn for ``analysis.convergence``: the bracket as a pale bar, both interpolations, the interval as a line, and an arrow
where a curve is not there at its last point or there at its first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.crossing import Reached, number
from analysis.interval import LEVEL
from analysis.table import TableError
from analysis.tally import counted
from analysis.theme import GREY, WIDTH, Caption, below, colours, log_axis, marker, save

if TYPE_CHECKING:
    from analysis.convergence import Curve

MOST = 40  # crossings that can still be read
NAME = 40  # characters of a name
DISTINCT = 8  # curves that a palette of categories tells apart
BEYOND = 3.0  # times the measured range that an interval may take
ROW = 0.17  # inches, a crossing
CURVES = 2.7  # inches, the curves


def draw(shown: Sequence[Curve], metric: str) -> Figure:
    """``shown``: curves with points, one entry for each threshold."""
    names = list(dict.fromkeys(each.name for each in shown))
    palette = sns.color_palette("colorblind") if len(names) <= DISTINCT else colours(names).values()
    colour = dict(zip(names, palette, strict=False))
    lower = 0.25 + ROW * len(shown)
    figure = Figure(figsize=(WIDTH, CURVES + lower + 0.7))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(CURVES, lower))
    drawn = {each.name: each.reached.runs for each in shown}
    for name, runs in drawn.items():
        for run in runs:
            top.plot(*zip(*run.points, strict=True), "o-", color=colour[name], markersize=2.5, linewidth=1.1)
    for k in dict.fromkeys(each.reached.threshold for each in shown):
        top.axhline(k, color="0.3", linewidth=0.8, linestyle=":", zorder=0)
        top.annotate(number(k), (1.005, k), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    points = np.array([point for runs in drawn.values() for run in runs for point in run.points])
    if points[:, 1].min() > 0:
        log_axis(top, "y", *_ends(np.append(points[:, 1], [each.reached.threshold for each in shown])))
    if points[:, 0].min() > 0:
        low, high = _ends(points[:, 0])
        spans = [end for each in shown for end in (each.reached.interval.low, each.reached.interval.high) if end]
        log_axis(top, "x", *_ends([low, high, *np.clip(spans, low / BEYOND, high * BEYOND)]))
    top.tick_params(labelbottom=False)
    for place, each in enumerate(shown):
        _crossing(bottom, each.reached, place, colour[each.name])
    several = len({each.reached.threshold for each in shown}) > 1
    told = [_short(each.name) + (f", {number(each.reached.threshold)}" if several else "") for each in shown]
    bottom.set_yticks(range(len(shown)), told, fontsize=7)
    bottom.set_ylim(len(shown) - 0.4, -0.6)
    bottom.set_xlabel(shown[0].reached.axis.replace("$", r"\$"))
    top.set_ylabel(metric.replace("$", r"\$"))
    below(
        figure,
        [
            marker("o", "linear", colour="0.2"),
            Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color="0.2", markersize=5, label="ln-ln"),
            Line2D([], [], color=GREY, alpha=0.35, linewidth=6, solid_capstyle="butt", label="bracket"),
            Line2D([], [], color="0.2", linewidth=1.4, label=f"{LEVEL:.0%} interval"),
            marker(">", "not reached by then", colour="0.2"),
            marker("<", "there at its first point", colour="0.2"),
        ],
    )
    return figure


def _ends(values: Any) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


def _short(name: str) -> str:
    return (name if len(name) <= NAME else f"{name[: NAME - 1]}…").replace("$", r"\$")


def _crossing(axes: Axes, at: Reached, place: int, colour: Any) -> None:
    """A row of the lower panel."""
    low, high = at.bracket
    left, right = axes.get_xlim()
    if at.censored == "right" and low is not None:
        axes.plot(low, place, ">", color=colour, markersize=5)
    elif at.censored == "left" and high is not None:
        axes.plot(high, place, "<", color=colour, markersize=5)
    elif low is not None and high is not None:
        axes.plot((low, high), (place, place), color=colour, alpha=0.3, linewidth=6, solid_capstyle="butt")
    span = at.interval
    if span.low is not None or span.high is not None:
        ends = (left if span.low is None else span.low, right if span.high is None else span.high)
        axes.plot(ends, (place, place), color=colour, linewidth=1.4)
    if at.log is not None:
        axes.plot(at.log, place, "o", color=colour, markerfacecolor="white", markersize=4.5)
    if at.linear is not None:
        axes.plot(at.linear, place, "o", color=colour, markersize=4.5)


def caption(curves: Sequence[Curve], shown: Sequence[Curve], metric: str) -> Caption:
    axis, n = shown[0].reached.axis, len({each.name for each in shown})
    thresholds = ", ".join(number(k) for k in dict.fromkeys(each.reached.threshold for each in shown))
    runs = sum(len(runs) for runs in {each.name: each.reached.runs for each in shown}.values())
    text = f"{counted(n, 'curves')} of {counted(runs, 'training runs')}; dotted: threshold {thresholds}. "
    text += "Below, when each first is at or below it: bracket of the points on either side, both interpolations."
    hows = dict.fromkeys(each.reached.interval.method for each in shown if each.reached.interval.method != "none")
    text += f" {LEVEL:.0%} intervals: {'; '.join(hows)}." if hows else " No curve has an interval."
    lost = dict.fromkeys(each.name for each in curves if not each.reached.runs)
    text += f" Refused and not drawn: {', '.join(lost)}." if lost else ""
    return Caption(f"{axis} to {metric} {thresholds}", text, n)


def write(curves: Sequence[Curve], path: str | os.PathLike[str], *, metric: str) -> None:
    """Raises ``TableError`` for more crossings than a figure holds, and for a place that cannot be written to."""
    shown = [each for each in curves if each.reached.runs]
    if len(shown) > MOST:
        raise TableError(f"--figure: {len(shown)} crossings; a figure holds {MOST}, choose with --where or --by")
    save(lambda: draw(shown, metric), caption(curves, shown, metric), path)
