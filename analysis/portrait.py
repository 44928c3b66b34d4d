"""What does a fitted law look like beside its points? One figure from a ``Fit`` alone, as a paper would print it.

One input: points by group, the law with its bands, dashed beyond the data, its asymptote, predictions that were asked
for, and residuals below. Several inputs: the law line by line, or observed against fitted, and residuals by each input.
``write`` makes the file, with its caption as text beside it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from analysis.forms import FORMS
from analysis.interval import Interval
from analysis.laws import Array
from analysis.result import Fit
from analysis.theme import GREY, MARKERS, WIDTH, Caption, below, colours, log_axis, plain, save, theme

FEW = 8  # groups, or values of an input, that can be told apart by colour and marker
GRID = 120  # places of a curve
BEYOND = 0.1  # of the measured range, in logarithms, that a law is drawn further on either side
DEEP = 1e-3  # of the law, where an interval that goes down to 0 is cut on a logarithmic axis
ROOM = 0.3  # of the height of points and law, in logarithms, that intervals may take above and below
COLUMN = 0.72 * WIDTH  # inches, a figure of one input
ENTRY = 0.46  # inches, an entry of a legend without its words
PRINT = 8  # points, the law above the panels and the legend below
NAME = 36  # characters of a name
INK, ASKED = "0.1", "#c44e00"  # colours of the one law, of predictions
BANDS = (("mean", 0.26, "law, 95 %"), ("obs", 0.12, "new observation, 95 %"))  # with their opacity
# residuals that get a tick, per cent below and above the law
PER_CENT = (*((-p, p) for p in (0.1, 0.2, 0.5, 1, 2, 5, 10)), (-20, 25), (-100 / 3, 50), (-50, 100), (-80, 400))


class Mark(NamedTuple):
    """Points that look alike."""

    kept: NDArray[np.bool_]  # [n]
    label: str
    colour: Any
    shape: str


def draw(found: Fit, *, at: ArrayLike | None = None, labels: Mapping[str, str] | None = None) -> Figure:
    """The law and its points. ``at`` [m] or [m, d]: inputs whose predictions are marked.

    ``labels``: what axes say, with units, for names in ``found.inputs`` and ``found.output``.
    """
    named = {name: _plain((labels or {}).get(name, name)) for name in (*found.inputs, found.output)}
    with matplotlib.rc_context():
        theme()
        return (_one if len(found.inputs) == 1 else _several)(found, _asked(found, at), named)


def caption(found: Fit, *, at: ArrayLike | None = None) -> Caption:
    """Law, n, groups, estimator, intervals, degrees of freedom, selection and bounds; why there is no band."""
    asked, held = _asked(found, at), found.intervals()
    values = "; ".join(f"{name} = {number(value)}{_ends_of(held[name])}" for name, value in found.params.items())
    groups = "" if found.n_groups is None else f" in {found.n_groups} group{'s' * (found.n_groups != 1)}"
    weighted = ", weighted" * (len(set(found.weights)) > 1)
    unit = "ln y" if found.residuals == "log" else "y"
    spread = "" if found.sigma is None else f"; residual standard deviation of {unit}: {number(found.sigma)}"
    parts = [
        f"{found.formula} with {values}{'' if found.reason else ' (95 % intervals in brackets)'}.",
        f"n = {found.n}{groups}, dof = {found.dof}; points: {found.selection}.",
        f"Estimator: {found.estimator}{weighted}{spread}. Intervals: {found.interval_method}.",
        *(f"{name} is at its {side} bound." for name, side in found.at_bound.items()),
        *(f"{name} has no interval: {each.reason}." for name, each in held.items() if each.reason and not found.reason),
        _said_of_bands(found),
    ]
    if unsure := [name for name, sure in found.identified.items() if not sure and held[name].low is not None]:
        parts.append(f"Not identified: {'; '.join(f'{name} ({found.doubts[name]})' for name in unsure)}.")
    if found.n_groups is not None and found.n_groups > FEW:
        parts.append(f"The {found.n_groups} groups are too many to be told apart by colour.")
    parts += [_foretold(found, row) for row in asked]
    title = f"{found.output} by {' and '.join(found.inputs)}, {found.form.replace('_', ' ')} law"
    return Caption(title, " ".join(parts), found.n, {"at": asked.tolist()})


def write(
    found: Fit, path: str | os.PathLike[str], *, at: ArrayLike | None = None, labels: Mapping[str, str] | None = None
) -> None:
    """The figure as PNG, SVG or PDF by the end of its name, and its caption as .txt beside it: both or neither.

    Raises ``TableError`` for another ending and for a place that cannot be written to.
    """
    save(lambda: draw(found, at=at, labels=labels), caption(found, at=at), path)


def residuals(found: Fit) -> Array:
    """ln(observed / fitted) [n], whatever the residuals of the estimator."""
    return np.log(np.asarray(found.y) / _level(found, np.asarray(found.x)))


def _asked(found: Fit, at: ArrayLike | None) -> Array:
    """Inputs of predictions [m, d]; none is [0, d]."""
    return np.asarray([] if at is None else at, np.float64).reshape(-1, len(found.inputs))


def curve(found: Fit, x: Array) -> pd.DataFrame:
    """The law at x [m, d] with its intervals, as in ``Prediction.summary_frame``, and whether they are identified."""
    foretold = found.get_prediction(x[:, 0] if x.shape[1] == 1 else x)
    return foretold.summary_frame().assign(identified=foretold.identified)


def _level(found: Fit, x: Array) -> Array:
    """The law at x [m, d]."""
    return found.predict(x[:, 0] if x.shape[1] == 1 else x)


# --- what a figure consists of -----------------------------------------------------------------------------------


def _one(found: Fit, asked: Array, named: Mapping[str, str]) -> Figure:
    x, y, gap = np.asarray(found.x)[:, 0], np.asarray(found.y), residuals(found)
    figure = Figure(figsize=(COLUMN, 4.8))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _headline(figure, found)
    low, high = _span(x, asked[:, 0])
    ends = (low, *_ends(x), high)
    across = np.concatenate([np.geomspace(*pair, GRID) for pair in itertools.pairwise(ends)])
    frame = curve(found, across[:, None])
    level = frame["mean"].to_numpy()
    _law(top, across, level, INK)
    handles = [Line2D([], [], color=INK, label="fitted law"), *bands(top, across, frame, INK)]
    marks = _marks(found)
    _points(top, x, y, marks)
    _points(bottom, x, gap, marks)
    wide = _predictions(top, asked[:, 0], found, asked, handles)
    edges = frame.filter(like="_ci_").to_numpy().ravel()
    name = FORMS[found.form].asymptote
    limits = found.conf_int().loc[[name] if name else []].to_numpy().ravel()
    _heights(top, np.concatenate([y, level]), np.concatenate([edges, wide, limits]))
    if name:
        _asymptote(top, found.params[name], limits, handles)
    log_axis(bottom, "x", low, high)
    _shares(bottom, gap)
    top.set_ylabel(_label(named[found.output], "y"))
    bottom.set(xlabel=_label(named[found.inputs[0]], FORMS[found.form].inputs[0]), ylabel="residual")
    below(figure, *_legend(figure, marks, handles))
    figure.align_ylabels([top, bottom])
    return figure


def _several(found: Fit, asked: Array, named: Mapping[str, str]) -> Figure:
    x, y, gap, count = np.asarray(found.x), np.asarray(found.y), residuals(found), len(found.inputs)
    figure = Figure(figsize=(WIDTH, max(4.4, 1.25 * count + 1.3)))
    cells = figure.add_gridspec(count, 2, width_ratios=(3, 2))
    left, panels = figure.add_subplot(cells[:, 0]), [figure.add_subplot(cells[i, 1]) for i in range(count)]
    _headline(figure, found)
    symbols = FORMS[found.form].inputs
    names = [_label(named[name], symbol) for name, symbol in zip(found.inputs, symbols, strict=True)]
    few = _few(x)
    marks = _by_value(x[:, 0], symbols[0]) if few else []
    handles: list[Any] = []
    if _lined(x):
        place, asked_place = x[:, 1], asked[:, 1]
        core, drawn = y, _lines(left, found, asked, marks, handles)
        across, title = _span(place, asked_place), "a  law"
        left.set_xlabel(names[1])
    else:
        place, asked_place = _level(found, x), _level(found, asked) if len(asked) else np.empty(0)
        core, drawn = np.concatenate([y, place, asked_place]), np.empty(0)
        across, title = _ends(core), "a  observed against fitted"
        left.plot(across, across, color=INK, linewidth=1, zorder=2, label="observed = fitted")
        handles.append(Line2D([], [], color=INK, linewidth=1, label="observed = fitted"))
        left.set_xlabel(f"fitted {named[found.output]}")
    wide = _predictions(left, asked_place, found, asked, handles)
    log_axis(left, "x", *across)
    _heights(left, core, np.concatenate([drawn, wide]))
    left.set_ylabel(_label(named[found.output], "y"))
    left.set_title(title)
    tint = ScalarMappable(LogNorm(*_ends(x[:, 0])), ListedColormap(list(colours([*map(str, range(256))]).values())))
    for panel, where, heights in ((left, place, y), *((panel, x[:, i], gap) for i, panel in enumerate(panels))):
        if few:
            _points(panel, where, heights, marks)
        else:
            panel.scatter(where, heights, s=13, c=tint.to_rgba(x[:, 0]), linewidths=0, alpha=0.85, zorder=4)
    for i, panel in enumerate(panels):
        log_axis(panel, "x", *_ends(x[:, i]))
        _shares(panel, gap)
        panel.set(xlabel=names[i], ylabel="residual")
    panels[0].set_title("b  residuals")
    if not few:
        bar = figure.colorbar(tint, ax=left, location="right", aspect=40, pad=0.02, fraction=0.05, label=names[0])
        log_axis(bar.ax, "y", *_ends(x[:, 0]))
        bar.ax.set_ylim(*_ends(x[:, 0]))
    below(figure, *_legend(figure, marks, handles))
    figure.align_ylabels(panels)
    return figure


def _few(x: Array) -> bool:
    """Whether the first input takes so few values that each can have its own look."""
    return len(np.unique(x[:, 0])) <= FEW


def _lined(x: Array) -> bool:
    """Whether the law is drawn line by line: two inputs, few values of the first."""
    return x.shape[1] == 2 and _few(x)


def _lines(axes: Axes, found: Fit, asked: Array, marks: Sequence[Mark], handles: list[Any]) -> Array:
    """The law over the second of two inputs, one line per value of the first; all of its heights."""
    x = np.asarray(found.x)
    low, high = _span(x[:, 1], asked[:, 1])
    levels: list[Array] = []
    entries: dict[str, Any] = {}
    for mark in marks:
        ends = (low, *_ends(x[mark.kept, 1]), high)
        across = np.concatenate([np.geomspace(*pair, GRID) for pair in itertools.pairwise(ends)])
        frame = curve(found, np.column_stack([np.full(len(across), x[mark.kept, 0][0]), across]))
        level = frame["mean"].to_numpy()
        _law(axes, across, level, mark.colour)
        levels.append(level)
        for entry in bands(axes, across, frame, mark.colour, names=1):
            if isinstance(entry, Line2D):  # a hatched patch is grey already, and keeps its hatching
                entry.set_color(GREY)
            entries[str(entry.get_label())] = entry
    handles += [Line2D([], [], color=GREY, label="fitted law"), *entries.values()]
    return np.concatenate(levels)


def _law(axes: Axes, across: Array, level: Array, colour: Any) -> None:
    """A law below, among and above the measured inputs: GRID places each, dashed where nothing was measured."""
    for i, style in enumerate(("--", "-", "--")):
        part = slice(i * GRID, (i + 1) * GRID)
        label = "law" if style == "-" else "law beyond the data"
        axes.plot(across[part], level[part], style, color=colour, linewidth=1.3, zorder=3, label=label)


def bands(axes: Axes, across: Array, frame: pd.DataFrame, colour: Any, names: int = 2) -> list[Any]:
    """The intervals that there are, hatched where they are too wide to rely on; their entries in a legend."""
    drawn: list[Any] = []
    unsure = ~frame["identified"].to_numpy(bool)
    for name, opacity, label in BANDS[:names]:
        low, high = (frame[f"{name}_ci_{end}"].to_numpy() for end in ("lower", "upper"))
        if not np.isfinite(high).any():
            continue
        low = np.maximum(low, DEEP * frame["mean"].to_numpy())  # a logarithmic axis has no 0
        axes.fill_between(across, low, high, color=colour, alpha=opacity, linewidth=0, zorder=1, label=label)
        drawn.append(_swatch(colour, opacity, label))
        if name == "mean" and unsure.any():
            look: dict[str, Any] = {"facecolor": "none", "edgecolor": "white", "hatch": "////", "linewidth": 0}
            axes.fill_between(across, low, high, where=unsure, **look, zorder=1.5, label="not identified")
            drawn.append(Patch(**look | {"facecolor": str(1 - opacity)}, label="not identified"))
    return drawn


def _predictions(axes: Axes, where: Array, found: Fit, asked: Array, handles: list[Any]) -> Array:
    """Predictions with the intervals of the law (thick) and of a new observation (thin): all heights drawn."""
    if not len(asked):
        return np.empty(0)
    frame = curve(found, asked)
    for (name, _, label), width in zip(BANDS, (3.0, 1.0), strict=True):
        ends = frame[[f"{name}_ci_lower", f"{name}_ci_upper"]].clip(lower=DEEP * frame["mean"], axis=0).to_numpy()
        look: dict[str, Any] = {"color": ASKED, "linewidth": width, "solid_capstyle": "butt", "zorder": 5}
        axes.plot(np.repeat(where[None], 2, 0), ends.T, label=f"asked: {label}", **look)
    for sure, face in ((True, ASKED), (False, "white")):
        kept = frame["identified"].to_numpy() == sure
        look = {"color": ASKED, "markerfacecolor": face, "markersize": 5.5, "zorder": 6}
        axes.plot(where[kept], frame["mean"].to_numpy()[kept], "D", label="asked", **look)
    handles.append(Line2D([], [], color=ASKED, marker="D", markersize=5, label="prediction, 95 %"))
    return frame[["mean", *frame.filter(like="_ci_")]].to_numpy().ravel()


def _asymptote(axes: Axes, level: float, limits: Array, handles: list[Any]) -> None:
    """The asymptote as a dotted line, its interval as a bar right of the axes, with an arrow where it goes on."""
    (low, high), (bottom, top) = limits, axes.get_ylim()
    if bottom < level < top:
        axes.axhline(level, color=GREY, linestyle=":", linewidth=1.3, label="asymptote")
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="asymptote"))
    if math.isfinite(low + high) and high > bottom and low < top:
        edge: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": GREY, "clip_on": False}
        ends = [max(low, bottom), min(high, top)]
        axes.plot([1.02] * 2, ends, linewidth=3, solid_capstyle="butt", label="asymptote, 95 %", **edge)
        for cut, place, shape in ((low < bottom, bottom, "v"), (high > top, top, "^")):
            if cut:
                axes.plot([1.02], [place], shape, markersize=6, **edge)
        handles.append(_swatch(GREY, 1.0, "asymptote, 95 %", 3))


def _marks(found: Fit) -> list[Mark]:
    """One look per group where they are few, grey points otherwise."""
    names = list(dict.fromkeys(found.groups or ()))
    if not 0 < len(names) <= FEW:
        return [Mark(np.ones(found.n, bool), "measured", GREY, "o")]
    tints, labels = list(colours(names).values()), np.asarray(found.groups)
    return [Mark(labels == name, _plain(name), tints[i], MARKERS[i]) for i, name in enumerate(names)]


def _by_value(values: Array, symbol: str) -> list[Mark]:
    """One look per value of an input, in its order."""
    levels = np.unique(values)
    tints = list(colours([str(level) for level in levels]).values())
    return [
        Mark(values == level, f"${symbol}$ = {plain(float(level))}", tints[i], MARKERS[i])
        for i, level in enumerate(levels)
    ]


def _points(axes: Axes, across: Array, heights: Array, marks: Sequence[Mark]) -> None:
    size, edge = (5.5, 0.4) if len(across) <= 60 else (3.5, 0.0)
    for mark in marks:
        axes.plot(
            *(across[mark.kept], heights[mark.kept], mark.shape),
            **{"color": mark.colour, "markersize": size, "markeredgecolor": "white", "markeredgewidth": edge},
            zorder=4,
            label="points",
        )


# --- axes and words ----------------------------------------------------------------------------------------------


def _ends(values: Array) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _span(x: Array, asked: Array) -> tuple[float, float]:
    """How far a law is drawn: a little beyond the data, and to what was asked."""
    low, high = _ends(x)
    more = (high / low) ** BEYOND
    return _ends(np.array([low / more, high * more, *asked]))


def _heights(axes: Axes, core: Array, wide: Array) -> None:
    """A logarithmic y axis that holds ``core``, and of ``wide`` as much as there is room for."""
    low, high = _ends(core)
    room = max((high / low) ** ROOM, 1.5)
    wide = np.clip(wide[np.isfinite(wide)], low / room, high * room)
    log_axis(axes, "y", *_ends(np.concatenate([core, wide])))


def _shares(axes: Axes, gap: Array) -> None:
    """A y axis of ln(observed / fitted) around 0, its ticks per cent of the law."""
    limit = max(1.3 * float(np.abs(gap).max()), 1.3e-3)
    ends = [pair for pair in PER_CENT if max(np.abs(np.log1p(np.array(pair) / 100))) <= limit][-1]
    axes.axhline(0.0, color=INK, linewidth=0.8, zorder=1)
    axes.set_ylim(-limit, limit)
    axes.yaxis.set_major_locator(FixedLocator([math.log1p(ends[0] / 100), 0.0, math.log1p(ends[1] / 100)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: _signed(100 * math.expm1(tick))))


def _signed(share: float) -> str:
    """A share as a tick: 0 %, +0.5 %, −33 %."""
    share = round(share, 9)
    text = f"{share:+.0f}" if abs(share) >= 10 else f"{share:+.3g}" if share else "0"
    return f"{text.replace('-', '−')} %"


def _plain(name: str) -> str:
    """A name of the caller as text: no mathematics between dollars, no entry that a legend would skip, no long one."""
    text = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def _label(name: str, symbol: str) -> str:
    """What an axis says: the name, and the symbol that stands for it in the law where that is another."""
    return name if name == symbol else f"{name} (${symbol}$)"


def number(value: float) -> str:
    """Three digits, without commas that a list would confuse: 0.541, 4876, 1.27e11."""
    text = f"{value:.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}"
    return re.sub(r"e\+?(-?)0*", r"e\1", text)


def _typeset(value: float) -> str:
    """A number in mathtext: 1.27 x 10^11."""
    return re.sub(r"e(-?\d+)$", r"$\\times$10$^{\1}$", number(value)).replace("-", "−", int(value < 0))


def formula(formula: str) -> str:
    """A law in mathtext: powers raised, factors apart."""
    text = re.sub(r"x\*", r"x^{*}", formula)
    text = re.sub(r"\^\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^(-\([^()]*\)|-?\w+)", r"^{\1}", text)
    text = re.sub(r"\bln ", r"\\ln ", text)
    return re.sub(r"(?<=[\w})]) (?=[\w(\\])", r"\\,", text)


def _headline(figure: Figure, found: Fit) -> None:
    """The law and its numbers above the panels, in lines that the figure is wide enough for."""
    lines = [f"${formula(found.formula)}$", ""]
    for name, held in found.intervals().items():
        notes = [f"at its {found.at_bound[name]} bound"] if name in found.at_bound else []
        notes += ["not identified"] if held.low is not None and not found.identified[name] else []
        item = f"${formula(name)}$ = {_typeset(found.params[name])}{_ends_of(held, _typeset)}"
        item += f" ({', '.join(notes)})" if notes else ""
        if lines[-1] and _breadth(f"{lines[-1]}    {item}") > 0.95 * figure.get_figwidth():
            lines.append("")
        lines[-1] = f"{lines[-1]}    {item}".strip()
    figure.suptitle("\n".join(lines), x=0.015, ha="left", fontsize=PRINT, linespacing=1.35)


def _breadth(text: str) -> float:
    """How wide small print is, in inches."""
    return float(TextPath((0, 0), text, size=PRINT).get_extents().width) / 72


def _ends_of(held: Interval, write: Callable[[float], str] = number) -> str:
    return "" if held.low is None or held.high is None else f" [{write(held.low)}, {write(held.high)}]"


def _said_of_bands(found: Fit) -> str:
    """Which bands a figure has, or why it has none."""
    x = np.asarray(found.x)
    frame = curve(found, x)
    law, observation = (bool(np.isfinite(frame[f"{name}_ci_upper"]).any()) for name, _, _ in BANDS)
    if found.reason or not law:
        return f"No band is drawn: {found.reason or f'the intervals of {found.interval} are of parameters alone'}."
    if x.shape[1] > 1:
        return (
            "Band: 95 % of the law; dashed: beyond the data." if _lined(x) else "Observed against fitted has no bands."
        )
    light = "light: of a new observation" if observation else "this loss says nothing about a new observation"
    return f"Dark band: 95 % of the law; {light}; dashed: beyond the data."


def _foretold(found: Fit, row: Array) -> str:
    """A prediction in words, and how far beyond the data it is."""
    frame, x = curve(found, row[None]), np.asarray(found.x)
    where = ", ".join(f"{name} = {number(value)}" for name, value in zip(found.inputs, row.tolist(), strict=True))
    said = []
    for (name, _, _), what in zip(BANDS, ("the law", "a new observation"), strict=True):
        low, high = frame[[f"{name}_ci_lower", f"{name}_ci_upper"]].to_numpy()[0]
        said += [f"[{number(low)}, {number(high)}] for {what}"] if math.isfinite(low + high) else []
    unsure = ", not identified" * (bool(said) and not frame["identified"].all())
    ratio = float(np.max(np.maximum(row / x.max(0), x.min(0) / row)))
    apart = "within the data" if ratio <= 1 else f"{number(ratio)} times beyond the data"
    level = number(float(frame["mean"].to_numpy()[0]))
    return f"At {where}, {apart}: {level}, {' and '.join(said) or 'without an interval'}{unsure}."


def _swatch(colour: Any, opacity: float, label: str, width: float = 7) -> Line2D:
    return Line2D([], [], color=colour, alpha=opacity, linewidth=width, solid_capstyle="butt", label=label)


def _legend(figure: Figure, marks: Sequence[Mark], handles: Sequence[Any]) -> list[list[Any]]:
    """Rows of entries, as many in each as the figure is wide; those of points apart where they are several."""
    dots: list[Any] = [
        Line2D([], [], linestyle="", marker=mark.shape, color=mark.colour, markersize=5, label=mark.label)
        for mark in marks
    ]
    parts = [[*dots, *handles]] if len(dots) < 2 else [dots, list(handles)]
    rows: list[list[Any]] = []
    for count in range(max(map(len, parts)), 0, -1):
        rows = [part[i : i + count] for part in parts for i in range(0, len(part), count)]
        columns = itertools.zip_longest(*([_breadth(str(each.get_label())) for each in row] for row in rows))
        if sum(max(each or 0.0 for each in column) + ENTRY for column in columns) < figure.get_figwidth():
            break
    return rows
