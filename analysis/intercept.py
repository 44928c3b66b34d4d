"""How far is FID_inf from what was measured? FID against 1/n, the line and the interval at 0, for ``fid_inf``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.interval import LEVEL
from analysis.table import TableError
from analysis.tally import counted
from analysis.theme import GREY, WIDTH, Caption, below, save

if TYPE_CHECKING:
    from analysis.fid_inf import Group

MOST = 12  # panels that can still be read
ACROSS = 3
INK = "#0173b2"


def draw(shown: Sequence[Group], n: str, fid: str) -> Figure:
    """A panel per group; the axis is 1/n, its ticks are n."""
    across = min(len(shown), ACROSS)
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(WIDTH * max(across, 2.2) / ACROSS, 2.5 * down))
    axes = figure.subplots(down, across, squeeze=False)
    for panel, group in zip(axes.flat, shown, strict=False):
        row = group.row
        there = np.isfinite(group.sizes) & np.isfinite(group.fids)
        x, end = 1 / group.sizes[there], 1.06 / row["sizes"][0]
        line = np.array([0.0, 1 / row["sizes"][-1], end])
        level = row["estimate"] + row["slope"] * line
        panel.plot(line[1:], level[1:], color=INK, linewidth=1.2)
        panel.plot(line[:2], level[:2], color=INK, linewidth=1.2, linestyle="--")
        panel.plot(x, group.fids[there], "o", color=GREY, markersize=3.5)
        panel.plot(0, row["estimate"], "D", color=INK, markersize=3.5, clip_on=False, zorder=4)
        if row["low"] is not None:
            ends = (row["low"], row["high"])
            panel.plot((0, 0), ends, "_-", color=INK, linewidth=2, markersize=8, clip_on=False, zorder=3)
        told = "(no interval)" if row["low"] is None else f"[{row['low']:.4g}, {row['high']:.4g}]"
        name = row["group"].replace("$", r"\$")
        panel.set_title(
            f"{name}\nFID$_\\infty$ = {row['estimate']:.4g} {told}".replace("-", "−"), fontsize=7.5, weight="normal"
        )
        panel.set_xlim(-0.03 * end, end)
        sizes = _apart(row["sizes"])
        panel.set_xticks([0.0, *(1 / size for size in sizes)], [r"$\infty$", *(f"{size:,}" for size in sizes)])
        panel.set_xlabel(f"{n} (scale of 1/n)".replace("$", r"\$"))
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel(fid.replace("$", r"\$"))
    below(
        figure,
        [
            Line2D([], [], linestyle="", marker="o", color=GREY, markersize=3.5, label="measured"),
            Line2D([], [], color=INK, label="line in 1/n"),
            Line2D([], [], color=INK, linestyle="--", label="extrapolated"),
            Line2D([], [], color=INK, marker="D", linewidth=2, markersize=3.5, label=f"FID at infinity, {LEVEL:.0%}"),
        ],
    )
    return figure


def _apart(sizes: Sequence[int]) -> list[int]:
    """Sizes whose places on the axis leave room for their names."""
    found: list[int] = []
    for size in sorted(sizes):
        if min(1 / size, *(1 / other - 1 / size for other in found), 1.0) > 0.2 / sizes[0]:
            found.append(size)
    return found


def caption(shown: Sequence[Group], refused: int) -> Caption:
    rows = [group.row for group in shown]
    held = [f"{', '.join(dict.fromkeys(row['method'] for row in rows))}; {LEVEL:.0%} intervals, of sampling alone."]
    for row in rows:
        none = [f"no interval: {row['reason']}"] if row["low"] is None else []
        if told := [*none, *row["warnings"], *([row["note"]] if row["note"] else [])]:
            held.append(f"{row['group']}: {'; '.join(told)}.")
    held += [f"{counted(refused, 'groups')} refused and not shown."] if refused else []
    return Caption("FID at infinitely many samples", " ".join(held), sum(row["n"] for row in rows))


def write(groups: Sequence[Group], path: str | os.PathLike[str], *, n: str, fid: str) -> None:
    """Raises ``TableError`` for more groups than a figure holds, and for a place that cannot be written to."""
    shown = [group for group in groups if not group.row["refused"]]
    if len(shown) > MOST:
        raise TableError(f"--figure: {len(shown)} groups; a figure holds {MOST}, choose with --where")
    save(lambda: draw(shown, n, fid), caption(shown, len(groups) - len(shown)), path)
