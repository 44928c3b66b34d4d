"""What is published on one-bit diffusion? The figure of BiDM, for ``analysis.literature.FIGURES``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.evidence import caption
from analysis.published import table
from analysis.theme import GREY, WIDTH, Caption, below, colours, log_axis, marker

METHODS = ("FP", "BiDM", "XNOR", "ReSTE", "ReActNet", "DoReFa", "EfficientDM", "BBCU", "XNOR++")
REPEATED = ("skips binary", "convolutions and linear layers")  # the paper's numbers, derived again
LADDER = (
    *("vanilla XNOR", "+ learnable k", "+ SPD", "+ TBS", "full, 0 connections", "full, 1 connection"),
    *("full, 8 connections", "full, 12 connections", "full, L2 distillation"),
)


def bidm(folder: Path) -> tuple[Figure, Caption]:
    """What does one bit per weight and activation cost in FID, and what does it save?"""
    results = table("bidm_results", folder).filter(resolution=256)
    costs = table("bidm_accounting", folder).filter(pl.col("model") == "LDM-4", ~pl.col("convention").is_in(REPEATED))
    ladder = table("bidm_ablations", folder)
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.8))
    sets = ("LSUN Bedrooms", "LSUN Churches", "FFHQ")
    palette = colours(sets)
    methods, shapes = axes[0, 0], dict(zip(sets, "osD", strict=True))
    for data in sets:
        for i, method in enumerate(METHODS):
            found = results.filter(data=data, method=method)["fid"].to_list()
            methods.plot(found, [i] * len(found), shapes[data], color=palette[data], markersize=5)
    methods.set_yticks(range(len(METHODS)), ["full precision", *METHODS[1:]])
    methods.invert_yaxis()
    log_axis(methods, "x", 2.5, 420)
    methods.set(xlabel="FID (log)")
    methods.set_title("a  methods at 1 bit")
    methods.grid(axis="y", linewidth=0.4)
    methods.legend(
        handles=[marker(shapes[data], data, colour=palette[data]) for data in sets],
        loc="lower left",
        frameon=True,
        framealpha=1,
        edgecolor="none",
    )
    quality = {row["method"]: row["fid"] for row in results.filter(data="LSUN Bedrooms").iter_rows(named=True)}
    for panel, column, label, title in (
        (axes[0, 1], "size_mib", "storage (MiB, log)", "b  storage"),
        (axes[1, 1], "ops_g", "operations per step (G, log)", "d  operations"),
    ):
        _precision(panel, costs.drop_nulls(column), column, quality)
        panel.set(xlabel=label, ylabel="FID, LSUN Bedrooms (log)")
        panel.set_title(title)
    steps = axes[1, 0]
    for i, name in enumerate(LADDER):
        fid = ladder.filter(setting=name)["fid"][0]
        steps.plot([1, fid], [i, i], color="0.75", linewidth=4, solid_capstyle="butt")
        steps.plot(fid, i, "o", color="black", markersize=4)
        steps.text(fid * 1.08, i, f"{fid:.4g}", va="center", fontsize=7.5)
    steps.set_yticks(range(len(LADDER)), LADDER)
    steps.invert_yaxis()
    log_axis(steps, "x", 18, 180)
    steps.set(xlabel="FID, LSUN Bedrooms (log)")
    steps.set_title("c  ablation")
    below(
        figure,
        [
            marker("s", "full precision"),
            marker("o", "BiDM as the paper counts", colour="black"),
            marker("o", "BiDM as released, derived from its configuration", "flagged", "black"),
        ],
    )
    text = (
        "BiDM, latent diffusion with 1-bit weights and activations. a: FID by method. b, d: FID on LSUN Bedrooms "
        "against what one network costs; one FID stands over several costs because the released network keeps its "
        "channel-changing paths in full precision: 73.6 or 111.4 MiB and 5.4 to 14.4 G operations, not 37.3 MiB and "
        "1.82 G. c: the parts; TBS is learnable k with 8 connections, full is TBS with SPD."
    )
    shown = costs.filter(pl.any_horizontal(pl.col("size_mib", "ops_g").is_not_null()))
    return figure, caption(
        "One bit costs a factor of seven to nine in FID; the released network saves less than is printed",
        text,
        [results, ladder, shown],
        protocol="unconditional LDM-4 (Churches: LDM-8), 256 px, 50,000 samples, DDIM 200 steps in the paper (100 in "
        "the README), no guidance; one multiply-accumulate is one operation, binary ones count 1/64.",
        never="anything about 1 bit at equal compute or with longer training; a saving of 28 times in storage and 53 "
        "times in operations for the released network; differences between late rungs of the ladder (one run each).",
    )


def _precision(panel: Axes, costs: pl.DataFrame, column: str, quality: Mapping[str, float]) -> None:
    """FID over one cost: full precision, BiDM as printed, BiDM as released under each convention."""
    heights = {"full precision": quality["FP"], "BiDM": quality["BiDM"]}
    for i, row in enumerate(costs.iter_rows(named=True)):
        whole, printed = row["network"] == "full precision", row["convention"] == "paper"
        shape, colour = ("s", GREY) if whole else ("o", "black")
        panel.plot(
            row[column],
            heights[row["network"]],
            shape,
            color=colour,
            fillstyle="full" if printed else "none",
            markersize=6,
        )
        panel.annotate(
            f"{row[column]:.4g}",
            (row[column], heights[row["network"]]),
            (0, 7) if i % 2 else (0, -14),  # neighbours are close
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    log_axis(panel, "x", 0.7 * float(costs[column].min()), 1.4 * float(costs[column].max()))  # type: ignore[arg-type]
    log_axis(panel, "y", 2.3, 40)
