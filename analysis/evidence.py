"""What does a caption of published numbers have to say? Source, evidence, protocol, n, and what not to conclude.

Also the few things that such figures draw alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.catalogue import EVIDENCE
from analysis.theme import Caption, plain


def caption(
    title: str, text: str, shown: Sequence[pl.DataFrame], *, protocol: str, never: str, **extra: Any
) -> Caption:
    """A caption over the rows that are shown; each row has a source and evidence, and counts once."""
    rows = pl.concat([frame.select("source", "evidence") for frame in shown])
    sources = rows["source"].unique(maintain_order=True).to_list()
    counts = dict(rows.group_by("evidence", maintain_order=True).len().iter_rows())
    said = "; ".join(f"{count} {EVIDENCE[word]}" for word, count in counts.items())
    parts = [
        text,
        f"Protocol: {protocol}",
        f"n = {len(rows)} published values: {said}.",
        f"Not to be concluded: {never}",
        f"Source: {'; '.join(sources)}.",
    ]
    facts = {"sources": sources, "evidence": counts, "protocol": protocol, "not_concluded": never, **extra}
    return Caption(title, " ".join(parts), len(rows), facts)


def ticks(axes: Axes, which: str, values: Sequence[float], labels: Mapping[float, str] | None = None) -> None:
    """These ticks on one axis, and no others, whatever its scale."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: (labels or {}).get(value, plain(value))))


def series(label: str, colour: Any, shape: str = "o", line: Any = "-", fill: str = "full") -> Line2D:
    """The entry of a legend for points joined by a line."""
    return Line2D([], [], color=colour, marker=shape, linestyle=line, fillstyle=fill, markersize=5, label=label)  # type: ignore[arg-type]


def best(frame: pl.DataFrame, by: Sequence[str], value: str) -> pl.DataFrame:
    """Of each group the row with the lowest value."""
    return frame.sort(value, maintain_order=True).group_by(by, maintain_order=True).first().sort(by)
