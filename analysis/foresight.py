"""How far off was each law? Predicted over observed by law, for ``analysis.backtest``.

Of later budgets against the distance beyond what was fitted, of values left out against the value. Laws of a scheme
share their axes; a law so far off that it would flatten the others ends in arrows at the edge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from analysis.laws import Array
from analysis.table import TableError
from analysis.theme import WIDTH, Caption, log_axis, plain, save
from analysis.window import Row

MOST = 12  # panels that can still be read
ACROSS = 3
TICKS = (1.0, *(1 + step * 10.0**decade for decade in (-6, -5, -4, -3, -2, -1) for step in (1, 2, 5)), 2, 5, 10, 1e3)
FAR = 7.0  # |e|, a factor of 1,000, beyond which every point is an arrow
WILD = 3.0  # times the largest error of the best law, beyond which a point is an arrow


class Panel(NamedTuple):
    """Predictions of one law in one scheme: ``place`` and ``value`` (cut-off, or value left out) [n], errors e [n]."""

    scheme: str
    law: str
    along: str
    place: Array
    value: Array
    error: Array


def panels(rows: Sequence[Row], laws: Sequence[str]) -> list[Panel]:
    """Of each scheme, the laws in their order. Raises ``TableError`` for more than a figure holds."""
    held = [row for row in rows if row.kind == "prediction" and row.log_error is not None]
    found = []
    schemes = dict.fromkeys(str(row.scheme) for row in held)
    for scheme, law in ((scheme, law) for scheme in schemes for law in laws):
        mine = [row for row in held if (row.scheme, row.law) == (scheme, law)]
        if not mine:
            continue
        value = np.array([row.value for row in mine], np.float64)
        place = np.array([row.distance for row in mine]) if scheme == "later budgets" else value
        found.append(Panel(scheme, law, mine[0].along, place, value, np.array([row.log_error for row in mine])))
    if len(found) > MOST:
        raise TableError(f"--figure: {len(found)} laws and schemes; a figure holds {MOST}, choose with --law")
    return found


def limit(shown: Sequence[Panel], scheme: str) -> float:
    """|e| at the edge of the panels of a scheme."""
    largest = [float(np.abs(each.error).max()) for each in shown if each.scheme == scheme]
    return max(min(max(largest), WILD * min(largest), FAR), 1e-6)


def draw(shown: Sequence[Panel], output: str) -> Figure:
    schemes = list(dict.fromkeys(each.scheme for each in shown))
    across = min(max(sum(each.scheme == scheme for each in shown) for scheme in schemes), ACROSS)
    lines = [
        row
        for scheme in schemes
        for mine in [[each for each in shown if each.scheme == scheme]]
        for row in (mine[i : i + across] for i in range(0, len(mine), across))
    ]
    width = WIDTH * max(across, 2) / ACROSS
    figure = Figure(figsize=(width, 2.4 * len(lines)))
    axes = figure.subplots(len(lines), across, squeeze=False)
    norm, colours = _norm(shown), sns.color_palette("viridis", as_cmap=True)
    for line, row in zip(axes, lines, strict=True):
        for panel in line[len(row) :]:
            panel.set_visible(False)
        for panel, each in zip(line, row, strict=False):
            _errors(panel, each, limit(shown, each.scheme), norm, colours)
        line[0].set_ylabel(f"{output}: predicted / observed".replace("$", r"\$"))
    later = [panel for line, row in zip(axes, lines, strict=True) for panel in line if row[0].scheme == "later budgets"]
    if later and norm is not None:
        mappable = ScalarMappable(norm, colours)
        bar: Colorbar = figure.colorbar(mappable, ax=later, aspect=30, pad=0.02)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.set_label(f"cut-off, {shown[0].along}".replace("$", r"\$"))
    return figure


def _norm(shown: Sequence[Panel]) -> LogNorm | None:
    """Colours of the cut-offs; None for one."""
    values = np.concatenate([each.value for each in shown if each.scheme == "later budgets"] or [np.ones(1)])
    return LogNorm(float(values.min()), float(values.max())) if np.ptp(values) > 0 else None


def _errors(axes: Axes, each: Panel, edge: float, norm: LogNorm | None, colours: Any) -> None:
    later = each.scheme == "later budgets"
    look: dict[str, Any] = {"c": each.value, "norm": norm, "cmap": colours} if later and norm else {"color": "0.2"}
    inside = np.abs(each.error) <= edge * (1 + 1e-9)
    axes.axhline(1, color="0.1", linewidth=0.8, zorder=0)
    for kept, shape, size in ((inside, "o", 12), (each.error > edge, "^", 22), (each.error < -edge, "v", 22)):
        kept = kept & (inside if shape == "o" else ~inside)
        own = look | ({"c": each.value[kept]} if "c" in look else {})
        heights = np.exp(np.clip(each.error[kept], -edge, edge))
        axes.scatter(each.place[kept], heights, s=size, marker=shape, linewidths=0, alpha=0.75, clip_on=False, **own)
    axes.set_yscale("log")
    axes.set_ylim(math.exp(-1.1 * edge), math.exp(1.1 * edge))
    tick = max(factor for factor in TICKS if math.log(factor) <= edge)
    axes.yaxis.set_major_locator(FixedLocator([1 / tick if tick > 1.5 else 2 - tick, 1.0, tick]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    beyond = f", {int((~inside).sum())} beyond" if not inside.all() else ""
    axes.set_title(f"{each.law.replace('_', ' ')}\nmean |e| {np.abs(each.error).mean():.3g}{beyond}", fontsize=8)
    if later:
        axes.set_xlabel(f"decades beyond the fit\n({each.along})".replace("$", r"\$"))
    else:
        log_axis(axes, "x", float(each.place.min()), float(each.place.max()))
        axes.set_xlabel(f"{each.along}, left out".replace("$", r"\$"))


def caption(shown: Sequence[Panel], output: str) -> Caption:
    text = "A point is a run that the fit had not seen; above 1 the law said more than was measured; e = ln(predicted "
    text += "/ observed), its mean over predictions."
    for scheme in dict.fromkeys(each.scheme for each in shown):
        laws = [each for each in shown if each.scheme == scheme]
        text += f" {scheme[0].upper()}{scheme[1:]} of {laws[0].along}: {', '.join(each.law for each in laws)}."
        if any(np.abs(each.error).max() > limit(shown, scheme) for each in laws):
            text += f" Arrows: |e| above {limit(shown, scheme):.3g}, {WILD:g} times the largest of the best law."
    return Caption(f"{output} as foretold and as measured", text, sum(len(each.error) for each in shown))


def write(rows: Sequence[Row], laws: Sequence[str], path: str | os.PathLike[str], *, output: str) -> None:
    """Raises ``TableError`` for more panels than a figure holds, and for a place that cannot be written to."""
    shown = panels(rows, laws)
    save(lambda: draw(shown, output), caption(shown, output), path)
