"""How many epochs do RAE and RAEv2 need to a gFID? The figure of EP_FID@k, for ``analysis.literature.FIGURES``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.crossing import Reached, reach
from analysis.evidence import caption, series, ticks
from analysis.published import table
from analysis.theme import GREY, WIDTH, Caption, below, colours, log_axis, marker


class Pair(NamedTuple):
    """Curves of RAE and RAEv2 to compare: title, the methods' names in ``convergence``, and published (k, epochs)."""

    title: str
    rae: str
    raev2: str
    marks: tuple[tuple[float, float], ...] = ()


RERUN = "RAE (RAEv2 rerun; 800 ep from RAE)"
PAIRS = (
    Pair("as published", RERUN, "RAEv2 (headline curve)", ((2, 177), (2, 35))),
    Pair("DINOv2-B", RERUN, "RAEv2 K=1 (DINOv2-B)"),
    *(
        Pair(name, f"RAE ({name})", f"RAEv2 K=1 ({name})")
        for name in ("DINOv3-B", "DINOv3-L", "EUPE-B", "SpatialPE-B", "WebSSL-1B")
    ),
)
CURVES = r"^raev2\.github\.io assets/fig_(raev2_gfid_)?convergence_"
THRESHOLDS = np.round(np.geomspace(1.52, 6.0, 57), 3)
BOUND = {"left": "v", "right": "^"}


def training_curve(folder: Path, method: str) -> pl.DataFrame:
    """The unguided points of one curve in RAEv2's figures, in the order of epochs."""
    held = table("convergence", folder).filter(pl.col("source").str.contains(CURVES), ~pl.col("guided"))
    return held.filter(method=method).sort("epochs")


def epochs_to(curve: pl.DataFrame, threshold: float) -> Reached:
    """EP_FID@threshold of a curve: epochs to the first gFID at or below it."""
    return reach(curve["epochs"].to_numpy(), curve["gfid"].to_numpy(), threshold)


def ep_fid(folder: Path) -> tuple[Figure, Caption]:
    """How many epochs do RAE and RAEv2 need to a gFID of k, with the same encoder?"""
    figure = plt.figure(figsize=(WIDTH, 4.4))
    axes = figure.subplot_mosaic("AABCD\nAAEFG", sharex=True, sharey=True)
    palette = colours(["RAE", "RAEv2"])
    shown = {}
    found: dict[str, Reached] = {}
    for (letter, panel), pair in zip(axes.items(), PAIRS, strict=True):
        for name, method in (("RAE", pair.rae), ("RAEv2", pair.raev2)):
            curve = training_curve(folder, method)
            shown[method] = curve
            _epochs(panel, curve, palette[name], name == "RAE")
            at = epochs_to(curve, 2.0)
            found[f"{pair.title}, {name}"] = at
        for k, epochs in pair.marks:
            panel.plot(k, epochs, "*", color="black", markersize=9, markeredgecolor="white", zorder=5)
            panel.annotate(f"{epochs:g}", (k, epochs), (7, 3), textcoords="offset points", fontsize=8, weight="bold")
        panel.axvline(2.0, color="0.85", linewidth=0.8, zorder=0)
        log_axis(panel, "y", 16, 900)
        ticks(panel, "y", [20, 50, 100, 200, 800])
        log_axis(panel, "x", 1.5, 6.2)
        ticks(panel, "x", [2, 3, 4, 6])
        panel.set_title(f"{letter.lower()}  {pair.title}")
    axes["A"].set_ylabel("EP_FID@k (epochs, log)")
    for letter in "BE":  # as high as a, but not beside it
        axes[letter].tick_params(labelleft=True)
    for letter in "AF":
        axes[letter].set_xlabel("gFID threshold k (log)")
    below(
        figure,
        [
            series("RAE", palette["RAE"], ""),
            series("RAEv2", palette["RAEv2"], ""),
            series("interpolated in logarithms", GREY, "", ":"),
            marker("^", "not reached by then"),
            marker("v", "reached before"),
            marker("*", "published @2", colour="black"),
        ],
    )
    same = ", ".join(f"{pair.title} {ratio}" for pair in PAIRS[1:] if (ratio := _ratio(found, pair.title)))
    slow, fast = found["as published, RAE"], found["as published, RAEv2"]
    text = (
        "Epochs until unguided gFID is first at or below k, between evaluations at 20, 40, 60, 80 epochs (RAE of a "
        "and b also 240 and 800), interpolated linearly (lines) and in the logarithms of both (dotted). a: RAE on "
        "DINOv2-B against the headline curve of RAEv2, which equals that of EUPE-B at K = 1 point by point: "
        f"{slow.linear:.1f} and {fast.linear:.1f} at k = 2 (linear), {slow.log:.1f} and {fast.log:.1f} (logarithms). "
        f"b to g: both on one encoder, RAEv2 at K = 1; ratio RAE / RAEv2 at k = 2: {same}; elsewhere one or both do "
        "not reach it."
    )
    return figure, caption(
        "EP_FID@k depends on k, on the encoder and on how one interpolates",
        text,
        list(shown.values()),
        protocol="ImageNet 256, DiT with a wide head (839M), batch 1024, unguided; RAEv2 also changes optimiser, "
        "schedule and conditioning, and its learning rate has decayed by epoch 50, RAE's by 800.",
        never="that RAEv2 is five times faster at every encoder or k; epochs leave out the decoder's and the "
        "encoder's training, and one run a curve has no interval; first crossings count, curves may rise again.",
        at_2={name: {"linear": at.linear, "log": at.log, "censored": at.censored} for name, at in found.items()},
    )


def _ratio(found: Mapping[str, Reached], title: str) -> str | None:
    slow, fast = (found[f"{title}, {name}"].linear for name in ("RAE", "RAEv2"))
    return None if slow is None or fast is None else f"{slow / fast:.1f}"


def _epochs(panel: Axes, curve: pl.DataFrame, colour: object, slow: bool) -> None:
    """EP_FID@k over k of one curve: both interpolations, and bounds where it is censored."""
    at = [epochs_to(curve, float(k)) for k in THRESHOLDS]
    for kind, line, width in (("linear", "-", 1.6), ("log", ":", 1.2)):
        values = [math.nan if (value := getattr(each, kind)) is None else value for each in at]
        panel.plot(THRESHOLDS, values, linestyle=line, color=colour, linewidth=width)
    for side, shape in BOUND.items():
        bounded = [
            (k, each.bracket[side == "left"]) for k, each in zip(THRESHOLDS, at, strict=True) if each.censored == side
        ]
        if bounded:
            x, y = zip(*bounded[:: 5 if side == "left" else 4], strict=True)
            shift = 1.12 if slow else 0.9  # both curves can be bounded at one epoch
            panel.plot(x, np.asarray(y) * shift, shape, color=colour, markersize=2.8, linestyle="")
