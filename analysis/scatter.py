"""What do the points of a correlation look like? A panel per pair, with r, its interval and n, for ``association``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis.interval import LEVEL
from analysis.refusal import Refusal
from analysis.table import TableError
from analysis.tally import counted
from analysis.theme import WIDTH, Caption, save

if TYPE_CHECKING:
    from analysis.association import Group, Units

MOST = 12  # panels that can still be read
ACROSS = 3
SYMBOLS = {"pearson": "r", "spearman": r"\rho"}

Panel = tuple[str, "Units", dict[str, Any]]


def panels(groups: Sequence[Group]) -> list[Panel]:
    """Title, units and row of every pair over all of its units that has an answer. Raises ``TableError`` for many."""
    found: list[Panel] = []
    for group in groups:
        answered = [row for row in group.rows if (row["subset"], row["minus"], row["refused"]) == ("all", None, None)]
        if not isinstance(group.units, Refusal):
            found += [(group.name or "", group.units, row) for row in answered]
    if len(found) > MOST:
        raise TableError(f"--figure: {len(found)} pairs; a figure holds {MOST}, choose with --x, --y or --where")
    return found


def said(row: dict[str, Any]) -> str:
    """r, interval and n: r = -0.85 [-0.93, -0.67], n = 24."""
    ends = "(no interval)" if row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"
    return f"${SYMBOLS[row['method']]}$ = {row['r']:.2f} {ends}, n = {row['n']}".replace("-", "−")


def draw(shown: Sequence[Panel]) -> Figure:
    across = min(len(shown), ACROSS)
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(WIDTH * (0.5 if across == 1 else 1), 2.5 * down))
    axes = figure.subplots(down, across, squeeze=False)
    for panel, (title, units, row) in zip(axes.flat, shown, strict=False):
        kept = units.known([row["x"], row["y"], *row["given"]])
        x, y = (units.values(row[side], kept) for side in "xy")
        clusters = np.zeros(len(x), np.intp) if units.clusters is None else units.clusters[kept]
        alone = len(np.unique(clusters)) in (1, len(x))
        look: dict[str, Any] = {"color": "0.2"} if alone else {"c": clusters, "cmap": "tab20"}
        panel.scatter(x, y, s=18, linewidths=0, **look)
        panel.set_title("\n".join([*([title.replace("$", r"\$")] if title else []), said(row)]), fontsize=8)
        panel.set_xlabel(row["x"].replace("$", r"\$"))
        panel.set_ylabel(row["y"].replace("$", r"\$"))
        panel.margins(0.08)
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    return figure


def caption(shown: Sequence[Panel]) -> Caption:
    rows = [row for _, _, row in shown]
    how = ", ".join(dict.fromkeys(row["interval_method"] for row in rows))
    given = ", ".join(rows[0]["given"])
    held = [f"A point is one unit; {LEVEL:.0%} intervals: {how}."]
    held += [f"Partial correlations given {given}; the axes show the values as they are."] if given else []
    held += ["Colour: cluster."] if any((row["n_clusters"] or row["n"]) < row["n"] for row in rows) else []
    for title, units, row in shown:
        lost = [f"{counted(row['dropped'], 'units')} dropped: no value"] if row["dropped"] else []
        none = [f"no interval: {row['reason']}"] if row["low"] is None else []
        if told := [*lost, *none, *units.notes]:
            held.append(f"{' '.join(part for part in (title, row['x'], row['y']) if part)}: {'; '.join(told)}.")
    return Caption("Correlations and the points they are of", " ".join(held), sum(row["n"] for row in rows))


def write(groups: Sequence[Group], path: str | os.PathLike[str]) -> None:
    """Raises ``TableError`` for more pairs than a figure holds, and for a place that cannot be written to."""
    shown = panels(groups)
    save(lambda: draw(shown), caption(shown), path)
