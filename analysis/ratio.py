"""What do compute gains look like over quality? One line with its band per method, the baseline at 1."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.gain import Gain
from analysis.theme import GREY, WIDTH, Caption, colours, direct_labels, log_axis, save

LINES = ("-", "--", "-.", ":")
ROOM = 3.0  # factor that a band may take beyond the curves


def draw(gains: Sequence[Gain]) -> Figure:
    """Gains over quality, better to the right, both axes logarithmic."""
    figure = Figure(figsize=(0.66 * WIDTH, 3.1))
    axes = figure.subplots()
    tints = colours([each.method for each in gains])
    heights = [1.0]
    for each, style in zip(gains, LINES * len(gains), strict=False):
        quality, curve, colour = np.array(each.quality), np.array(each.curve), tints[each.method]
        low, high = (np.array(ends, np.float64) for ends in (each.low, each.high))
        axes.fill_between(quality, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(quality, curve, style, color=colour)
        heights += [*curve, *np.clip(low, curve.min() / ROOM, None), *np.clip(high, None, curve.max() * ROOM)]
        if each.gain.estimate is not None:
            if each.gain.low is not None and each.gain.high is not None:
                ends = [each.gain.low, each.gain.high]
                axes.plot([each.at] * 2, ends, color=colour, linewidth=3, solid_capstyle="butt")
            axes.plot(each.at, each.gain.estimate, "o", color=colour, markeredgecolor="white", markersize=6)
            heights.append(each.gain.estimate)
    axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=1)
    qualities = np.concatenate([[*each.quality, each.at] if each.gain.estimate else each.quality for each in gains])
    known = np.array(heights)[np.isfinite(heights)]
    log_axis(axes, "x", float(qualities.min()), float(qualities.max()))
    log_axis(axes, "y", float(known.min()), float(known.max()))
    axes.invert_xaxis()
    direct_labels(axes, [(each.curve[-1], _plain(each.method), tints[each.method]) for each in gains])
    first = gains[0]
    axes.set_xlabel(f"{_plain(first.metric)} (better to the right)")
    axes.set_ylabel(f"compute gain: {_plain(first.axis)}\nof {_plain(first.baseline)} / of the method")
    handles: list[Artist] = [
        Line2D([], [], color=GREY, marker="o", markeredgecolor="white", label="stated quality, 95 %")
    ]
    if any(value is not None for each in gains for value in each.low):
        handles.append(Patch(color=GREY, alpha=0.2, linewidth=0, label="95 % at each quality"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _plain(name: str) -> str:
    """A name of the caller as text: no mathematics between dollars."""
    return name.replace("$", r"\$")


def caption(gains: Sequence[Gain]) -> Caption:
    """What a reader has to know: every gain in a sentence, forms, intervals, groups."""
    first = gains[0]
    forms = ", ".join(dict.fromkeys(each.form for each in gains))
    methods = "; ".join(dict.fromkeys(each.gain.method for each in gains))
    parts = [
        f"{first.axis} that {first.baseline} needs, over what each method needs for the same {first.metric}.",
        f"Curves: {forms}. Intervals at each quality by itself: {methods}.",
        *(f"{each.sentence()}." for each in gains),
    ]
    units = [each.units for each in gains if each.units is not None]
    return Caption(f"Compute gain over {first.baseline}", " ".join(parts), min(units, default=0))


def write(gains: Sequence[Gain], path: str | os.PathLike[str]) -> None:
    """The figure as PNG, SVG or PDF by the end of its name, its caption as .txt beside it: both or neither.

    Raises ``TableError`` for another ending and for a place that cannot be written to.
    """
    save(lambda: draw(gains), caption(gains), path)
