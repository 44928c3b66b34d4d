"""What do all figures share? One theme, colours by rate, readable log axes, labels beside curves, captions."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis import report, study
from analysis.arms import named
from analysis.report import Results
from analysis.table import TableError

WIDTH = 7.2  # inches, two columns of a paper
MARKERS = ("o", "s", "D", "^", "v", "P", "p", "h", "*", "<")
GREY = "0.45"
FORMATS: Mapping[str, Mapping[str, Any]] = {  # without a date, so that the same figure is the same file
    ".png": {"dpi": 200},
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}
TICKS = 3  # labelled ticks that an axis has at least
# 1-2-5 and its like, from few ticks a decade to many
STEPS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 2.0, 3.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))

Gate = Literal["passes", "flagged", "not measured"]
FILL: dict[Gate, Literal["full", "none", "left"]] = {"passes": "full", "flagged": "none", "not measured": "left"}
ASTERISK: dict[Gate, str] = {"passes": "", "flagged": " *", "not measured": " ?"}


class Missing(ValueError):
    """A figure whose inputs have not been measured, in one sentence."""


@dataclass(frozen=True)
class Caption:
    """What a reader has to know: written beside the figure as text and JSON."""

    title: str
    text: str
    n: int
    extra: dict[str, Any] = field(default_factory=dict)


def theme() -> None:
    """Set the one look of all figures."""
    sns.set_theme(
        context="paper",
        style="ticks",
        palette="colorblind",
        rc={
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 9,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.linewidth": 0.8,
            "figure.constrained_layout.use": True,
            "font.size": 8.5,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "lines.linewidth": 1.5,
            "svg.fonttype": "none",
            "svg.hashsalt": "figures",
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
        },
    )


def colours(rates: Sequence[str]) -> dict[str, Any]:
    """One colour per rate, ordered with it: dark is a low rate. Safe for colour-blind readers, distinct in grey."""
    stops = sns.color_palette("viridis", as_cmap=True)(np.linspace(0.0, 0.85, max(len(rates), 2)))
    return {rate: tuple(stop[:3]) for rate, stop in zip(rates, stops, strict=False)}


def plain(value: float, _: object = None) -> str:
    """A tick as people write it: 0.5, 20, 3,000, and powers of ten from a million on."""
    if value >= 1e6 or (0 < value < 1e-3):
        exponent = math.floor(math.log10(value) + 1e-9)
        lead = value / 10**exponent
        return f"$10^{{{exponent}}}$" if abs(lead - 1) < 1e-6 else f"${lead:.3g}\\!\\times\\!10^{{{exponent}}}$"
    return f"{value:,.10g}"


def log_axis(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis over [low, high] with at least three ticks that can be read, and not many more.

    The sparsest of decades, 1-3, 1-2-5, ... that gives three; even steps where the range is too short for any.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    pad = max((high / low) ** 0.04, 1.005)  # a single value has a width too
    low, high = low / pad, high * pad
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in STEPS:
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= TICKS:
            axis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 8)]))
            axis.set_minor_locator(LogLocator(base=10, subs=tuple(range(1, 10))))
            break
    else:
        axis.set_major_locator(MaxNLocator(5, min_n_ticks=TICKS))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def spaced(positions: Sequence[float], gap: float) -> list[float]:
    """The positions, moved as little as needed to lie ``gap`` apart, in their order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups = [[positions[i], 1, [i]] for i in order]
    merged: list[list[Any]] = []
    for center, size, members in groups:
        merged.append([center, size, members])
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            last, before = merged.pop(), merged.pop()
            total = last[1] + before[1]
            middle = (last[0] * last[1] + before[0] * before[1]) / total
            merged.append([middle, total, before[2] + last[2]])
    placed = [0.0] * len(positions)
    for center, size, members in merged:
        for k, i in enumerate(members):
            placed[i] = center + gap * (k - (size - 1) / 2)
    return placed


def direct_labels(axes: Axes, ends: Sequence[tuple[float, str, Any]], size: float = 8) -> None:
    """Labels right of the axes at the heights where curves end, moved apart, never over the data."""
    low, high = axes.get_ylim()
    scale = (math.log(high / low), math.log(low)) if axes.get_yscale() == "log" else (high - low, low)
    heights = [((math.log(y) if axes.get_yscale() == "log" else y) - scale[1]) / scale[0] for y, _, _ in ends]
    gap = size * 1.25 / 72 / (axes.get_figure().get_size_inches()[1] * 0.72)  # type: ignore[union-attr]
    for height, (_, text, colour) in zip(spaced(heights, gap), ends, strict=True):
        axes.annotate(
            text,
            (1.015, height),
            xycoords="axes fraction",
            color=colour,
            fontsize=size,
            va="center",
            annotation_clip=False,
        )


def below(figure: Figure, *lines: Sequence[Line2D]) -> None:
    """A legend under the panels, where it covers nothing; one line of entries after another."""
    columns = max(len(line) for line in lines)
    blank = Line2D([], [], linestyle="", label=" ")
    padded = [[*line, *[blank] * (columns - len(line))] for line in lines if line]
    # matplotlib fills column by column
    handles = [line[i] for i in range(columns) for line in padded]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handletextpad=0.4, columnspacing=1.4)


def marker(shape: str, label: str, gate: Gate = "passes", colour: Any = GREY) -> Line2D:
    return Line2D([], [], linestyle="", marker=shape, color=colour, fillstyle=FILL[gate], markersize=5, label=label)


def gate_markers(held: study.Study) -> list[Line2D]:
    """What open and half-filled markers mean, where a figure has them."""
    found = [marker("o", "flagged tokenizer", "flagged")] if held.flagged else []
    return found + ([marker("o", "gate not measured", "not measured")] if report.unmeasured(held) else [])


def bits(held: study.Study, rate: str) -> str:
    """A rate's label with its nominal bits: "16x64 (96 bit)"."""
    frame = held.points if rate in held.points["rate"].to_list() else held.tokenizers
    nominal = frame.filter(pl.col("rate") == rate)["bits_nominal"][0]
    return rate if nominal is None else f"{rate} ({nominal:.4g} bit)"


def verdict(gates: Iterable[str | None]) -> Gate:
    """What the gates of one or several tokenizers say together: the worst of them; null is one never evaluated."""
    words = {word for gate in gates for word in (gate or "not measured").split(", ")}
    if words & {"collapsed", "unconverged"}:
        return "flagged"
    return "passes" if words <= {"ok"} else "not measured"


def gates_by_seed(held: study.Study) -> dict[str, dict[int, str | None]]:
    """Gate of each rate's tokenizers by seed; a tokenizer without a seed is seed 0, as in ``analysis.arms``."""
    rows = held.points.select("rate", pl.col("tokenizer_seed").fill_null(0), "tokenizer_gate").unique()
    found: dict[str, dict[int, str | None]] = {}
    for rate, seed, gate in rows.iter_rows():
        found.setdefault(rate, {})[seed] = gate
    return found


def caption(
    results: Results,
    title: str,
    text: str,
    n: int,
    *,
    of: Literal["generator", "tokenizer"] = "generator",
    extractors: Sequence[str] = (),
    marks: tuple[str, str] = ("open markers", "half-filled markers"),
) -> Caption:
    """A caption that ends with n, seeds, protocol and extractors of what is shown, gates, and what was left out.

    ``of`` says whose measurements a figure shows; ``marks`` how it draws flagged tokenizers and those whose gate was
    not measured.
    """
    held = results.held
    shown = f"{report.extent(held)}; {report.protocol(held)}" if of == "generator" else report.reconstruction(results)
    names = " and ".join(named(extractor) for extractor in extractors)
    parts = [text, f"{shown}.", *([f"Extractor{'s' * (len(extractors) > 1)}: {names}."] if extractors else [])]
    parts.append(report.omissions(held, marks))
    facts: dict[str, Any] = {
        "study": held.name,
        "extractor": names or None,
        "flagged": held.flagged,
        "left_out": held.left_out,
    }
    facts["not_measured"] = report.unmeasured(held)
    return Caption(title, " ".join(parts), n, facts)


def power(value: float) -> str:
    """A budget as a label: 10^10, 3.2 10^9."""
    exponent = math.floor(math.log10(value) + 1e-9)
    lead = value / 10**exponent
    return f"$10^{{{exponent}}}$" if abs(lead - 1) < 0.01 else f"${lead:.2g}\\!\\cdot\\!10^{{{exponent}}}$"


def save(draw: Callable[[], Figure], words: Caption, path: str | os.PathLike[str]) -> None:
    """A figure in this theme as PNG, SVG or PDF by the end of its name, its caption as .txt beside it: both or neither.

    Raises ``TableError`` for another ending and for a place that cannot be written to.
    """
    target = Path(path)
    options = FORMATS.get(target.suffix.lower())
    if options is None:
        raise TableError(f"--figure: got {str(path)!r}; a figure ends in {', '.join(FORMATS)}")
    told = target.with_suffix(".txt")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".figure", dir=target.parent) as folder, matplotlib.rc_context():
            theme()
            staged = Path(folder) / target.name
            draw().savefig(staged, **options)
            staged.with_suffix(".txt").write_text(f"{words.title}. {words.text}\n")
            for made in (told, target):
                if made.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "is a folder")
            staged.with_suffix(".txt").replace(told)
            staged.replace(target)
    except OSError as error:
        raise TableError(f"--figure: {target}: {error.strerror or error}") from error
