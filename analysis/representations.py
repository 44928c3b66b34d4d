"""What is published on representations? The figures of RAEv2, iREPA and RCG, for ``analysis.literature.FIGURES``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import polars as pl
from matplotlib.figure import Figure

from analysis.association import Association, associate, collect
from analysis.evidence import caption, series, ticks
from analysis.published import table
from analysis.theme import GREY, WIDTH, Caption, below, colours, log_axis, marker

ARMS = ("REPA", "RAE", "RAE+REPA")
PROPERTIES = {"linear_probe": "linear probe", "lds": "LDS", "mean": "mean of both"}
COMMON = {"linear_probe": "linear_probe_pct", "lds": "lds", "mean": "mean"}


def raev2_layers(folder: Path) -> tuple[Figure, Caption]:
    """What does summing more encoder layers do to reconstruction and to generation?"""
    held = table("raev2_layers", folder).filter(
        pl.col("metric") != "linear_probe_pct", pl.col("evidence") != "secondary"
    )
    panels = (
        ("a  rFID", "rfid", None),
        ("b  PSNR (dB)", "psnr", None),
        ("c  gFID, unguided", "gfid", False),
        ("d  gFID, guided by the REPA head", "gfid", True),
    )
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.6), sharex=True)
    for panel, (title, metric, guided) in zip(axes.flat, panels, strict=True):
        rows = held.filter(pl.col("metric") == metric, pl.col("guided").eq_missing(guided))
        curve = rows.filter(method="RAEv2").sort("layers")
        panel.plot(curve["layers"], curve["value"], "-", color="black", linewidth=1.0)
        for x, y, evidence in curve.select("layers", "value", "evidence").iter_rows():
            fill = "full" if evidence == "page" else "none"
            panel.plot(x, y, "o", color="black", fillstyle=fill, markerfacecoloralt="white", markersize=5)
        baseline = rows.filter(method="RAE")["value"][0]
        panel.axhline(baseline, color=GREY, linestyle="--", linewidth=1.0)
        log_axis(panel, "x", 1, 23)
        ticks(panel, "x", [1, 2, 3, 4, 5, 7, 10, 23])
        panel.set_title(title)
    for panel in axes[1]:
        panel.set_xlabel("K, encoder layers that are summed (log)")
    below(
        figure,
        [
            marker("o", "RAEv2, in a table of the page", colour="black"),
            marker("o", "RAEv2, digitised", "flagged", "black"),
            series("RAE, as drawn there", GREY, "", "--"),
        ],
    )
    text = (
        "RAEv2 on DINOv3-L by the number K of layers whose sum is the latent. Reconstruction improves with K (rFID "
        "not at every step: K = 5 and 9 go up); unguided generation worsens with every K; guided it is best at K = 7."
    )
    return figure, caption(
        "More layers reconstruct better and, unguided, generate worse",
        text,
        [held],
        protocol="ImageNet 256, DiT with a wide head, 80 epochs; a, b need no generator. The released code averages "
        "layers and takes every second one for K = 7 (11, 13, ..., 23).",
        never="that K = 7 is best: one run a point and no intervals, and guided values from K = 3 to 8 lie within "
        "0.04; or that RAE against RAEv2 is the effect of K: optimiser, schedule, width and conditioning differ too.",
    )


# --- encoders ----------------------------------------------------------------------------------------------------


def scatter_association(folder: Path, measure: str) -> Association:
    """r of one encoder property with gFID over the points of iREPA's scatter."""
    rows = table("irepa_association", folder).filter(pl.col("property") == measure)
    return associate(collect(rows, ["value", "gfid"]), "value", "gfid")


def common_association(folder: Path, arm: str, measure: str) -> Association:
    """r of one encoder property with gFID over the nine encoders that all arms of RAEv2 have."""
    rows = table("raev2_common_encoders", folder).filter(arm=arm)
    mean = {"mean": (COMMON["linear_probe"], COMMON["lds"])}
    units = collect(rows, [COMMON[measure], "gfid"], unit="encoder", composites=mean)
    return associate(units, COMMON[measure], "gfid")


def encoder_association(folder: Path) -> tuple[Figure, Caption]:
    """Which property of an encoder goes with better generation, and does that depend on the method?"""
    points = table("irepa_association", folder)
    published = table("correlations", folder).filter(study="RAEv2", encoders="as published")
    figure = plt.figure(figsize=(WIDTH, 5.2))
    grid = figure.add_gridspec(2, 6, height_ratios=(3, 2))
    ratios = {}
    for i, (measure, label) in enumerate((("linear_probe", "linear probe (%)"), ("lds", "LDS"))):
        panel = figure.add_subplot(grid[0, 3 * i : 3 * i + 3])
        rows = points.filter(pl.col("property") == measure)
        panel.plot(rows["value"], rows["gfid"], "o", color="black", markersize=4.5, alpha=0.75)
        found = ratios[measure] = scatter_association(folder, measure)
        panel.text(0.97, 0.97, f"r = {_told(found)}", transform=panel.transAxes, ha="right", va="top", fontsize=8.5)
        panel.set(xlabel=label, ylabel="gFID (REPA, SiT-XL/2, 20 epochs)", ylim=(17.5, 46.5))
        panel.set_title(f"{'ab'[i]}  {PROPERTIES[measure]}")
    common = {}
    for i, (measure, label) in enumerate(PROPERTIES.items()):
        panel = figure.add_subplot(grid[1, 2 * i : 2 * i + 2])
        panel.axvline(0, color=GREY, linewidth=0.8)
        for j, arm in enumerate(ARMS):
            said = published.filter(pl.col("arm") == arm, pl.col("property") == measure).row(0, named=True)
            each = common[f"{arm}, {measure}"] = common_association(folder, arm, measure)
            panel.plot([said["r_low"], said["r_high"]], [j - 0.17] * 2, "-", color=GREY, linewidth=1.4)
            panel.plot(said["r"], j - 0.17, "s", color=GREY, fillstyle="none", markersize=5)
            panel.text(1.03, j - 0.17, f"{said['n']}", fontsize=7.5, va="center", color="0.35")
            panel.plot([each.low, each.high], [j + 0.17] * 2, "-", color="black", linewidth=1.4)  # type: ignore[arg-type]
            panel.plot(each.estimate, j + 0.17, "o", color="black", markersize=5)
            panel.text(1.03, j + 0.17, f"{each.n}", fontsize=7.5, va="center")
        panel.set_yticks(range(len(ARMS)), ARMS if i == 0 else [""] * len(ARMS))
        panel.set(xlim=(-1, 1), ylim=(len(ARMS) - 0.55, -0.6), xlabel="r with gFID")
        panel.set_xticks([-1, -0.5, 0, 0.5, 1], ["−1", "−.5", "0", ".5", "1"])
        panel.text(1.03, -0.52, "n", fontsize=7.5, va="center", style="italic")
        panel.set_title(f"{'cde'[i]}  {label}")
    below(
        figure,
        [
            series("common nine encoders", "black"),
            series("as published, each with its own encoders", GREY, "s", fill="none"),
        ],
    )
    nine = table("raev2_common_encoders", folder)
    text = (
        f"a, b: iREPA's scatter over encoders; r = {_told(ratios['linear_probe'])} for the linear probe and "
        f"{_told(ratios['lds'])} for LDS (local against distant similarity of patches; 24 of 27 points could be "
        "read). c to e: RAEv2's correlations as published, over different encoders for each, and over the nine "
        "encoders that all have. A negative r: the higher, the lower gFID. The linear probe goes with RAE, spatial "
        "structure with REPA; on equal sets the mean of both is nearly as good for RAE alone as for RAE+REPA."
    )
    return figure, caption(
        "Linear probe or spatial structure: it depends on the method",
        text,
        [points, published, nine],
        protocol="ImageNet 256, unguided, 20 epochs. a, b and REPA: SiT-XL/2, batch 256, SDE 250 steps, linear probe "
        "on mean-pooled patches; c to e: a stronger probe (70 to 88 %); RAE: DiT with a wide head, batch 1024. "
        "Intervals: 95 %, Fisher's z.",
        never="a cause, or an order of nearby r: encoders come in families, so intervals are too narrow; iREPA's "
        "script gives SpatialPE-L the result of LangPE-L; a correlation over one set of encoders does not compare "
        "with one over another.",
        scatter={name: _facts(found) for name, found in ratios.items()},
        common={name: _facts(found) for name, found in common.items()},
    )


def _told(found: Association) -> str:
    return f"{found.estimate:.3f} [{found.low:.2f}, {found.high:.2f}], n = {found.n}".replace("-", "−")


def _facts(found: Association) -> dict[str, object]:
    return {"r": round(found.estimate, 4), "low": found.low, "high": found.high, "n": found.n}


# --- RCG ---------------------------------------------------------------------------------------------------------

CONDITIONS = {"none": ("o", "unconditional"), "class label": ("s", "class label"), "RCG": ("D", "RCG")}
FACTORS = {"RDM width": ("o", "width", 1536), "RDM blocks": ("s", "blocks", 12), "RDM epochs": ("^", "epochs", None)}


def rcg(folder: Path) -> tuple[Figure, Caption]:
    """How much of the gap between unconditional and class-conditional generation does RCG close, and what matters?"""
    generators = table("rcg_generators", folder)
    ablations = table("rcg_ablations", folder)
    figure = plt.figure(figsize=(WIDTH, 5.4))
    grid = figure.add_gridspec(2, 6)
    left, right = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    names = generators["generator"].unique(maintain_order=True).to_list()
    palette = colours(list(CONDITIONS))
    for i, name in enumerate(names):
        rows = generators.filter(generator=name)
        left.plot(rows["fid"], [i] * len(rows), color="0.8", linewidth=3, zorder=1)
        for condition, fid in rows.select("condition", "fid").iter_rows():
            left.plot(fid, i, CONDITIONS[condition][0], color=palette[condition], markersize=6)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    log_axis(left, "x", 3, 45)
    ticks(left, "x", [3, 5, 10, 20, 40])
    left.set(xlabel="FID (log)")
    left.set_title("a  generators")
    left.legend(
        handles=[marker(shape, label, colour=palette[name]) for name, (shape, label) in CONDITIONS.items()],
        loc="lower right",
    )
    conditioning = ablations.filter(factor="conditioning")
    for i, (level, fid) in enumerate(conditioning.select("level", "fid").iter_rows()):
        right.barh(i, fid, color="0.75", height=0.6)
        right.text(fid + 0.25, i, f"{fid:.2f}  {level}", va="center", fontsize=8)
    right.set_yticks([])
    right.invert_yaxis()
    right.set(xlabel="FID to validation images", xlim=(0, 19.5), xticks=[0, 5, 10, 15])
    right.set_title("b  what MAGE-B is given")
    size = ablations.filter(pl.col("factor").is_in(["RDM width", "RDM blocks"]))
    tints = colours(list(FACTORS))
    floor = ablations.filter(factor="floor")["rep_fd"][0]
    for i, (column, label) in enumerate((("rep_fd", "rep FD (log)"), ("fid", "FID (log)"))):
        panel = figure.add_subplot(grid[1, 2 * i : 2 * i + 2])
        for factor, (shape, _, default) in FACTORS.items():
            if default is not None:
                rows = size.filter(factor=factor).sort("level_value")
                line = "-" if shape == "o" else "--"
                panel.plot(
                    rows["level_value"] / default, rows[column], shape + line, color=tints[factor], markersize=4.5
                )
        log_axis(panel, "x", 0.15, 2.2)
        ticks(panel, "x", [0.2, 0.5, 1, 2])
        log_axis(panel, "y", *((0.31, 6.5) if column == "rep_fd" else (4.8, 14)))
        panel.set(xlabel="RDM size / default (log)", ylabel=label)
        if column == "rep_fd":
            panel.axhline(floor, color=GREY, linestyle=":", linewidth=1.2)
            panel.text(2.2, floor * 0.97, "real images", ha="right", va="top", fontsize=7.5, color="0.35")
        panel.set_title(f"{'cd'[i]}  {'representations' if column == 'rep_fd' else 'images'}")
    panel = figure.add_subplot(grid[1, 4:])
    for factor, (shape, _, _) in FACTORS.items():
        rows = ablations.filter(factor=factor)
        panel.plot(rows["rep_fd"], rows["fid"], shape, color=tints[factor], markersize=4.5)
    log_axis(panel, "x", 0.4, 6.5)
    ticks(panel, "x", [0.5, 1, 2, 5])
    log_axis(panel, "y", 4.8, 14)
    panel.set(xlabel="rep FD (log)", ylabel="FID (log)")
    panel.set_title("e  both")
    below(
        figure,
        [
            series("RDM width (default 1536)", tints["RDM width"]),
            series("RDM blocks (default 12)", tints["RDM blocks"], "s", "--"),
            marker("^", "RDM epochs (in e)", colour=tints["RDM epochs"]),
        ],
    )
    text = (
        "RCG: a generator conditioned on representations that a small diffusion model (RDM) draws. a: FID of five "
        "generators unconditional, with class labels where published, and with RCG. b: MAGE-B given nothing, a "
        "cluster label, a class label, a drawn or a real image's representation. c to e: size and training of the "
        "RDM; the distance of representations, which needs no image generator, falls with FID and then both level "
        "off; dotted: 50,000 real images."
    )
    used = ablations.filter(pl.col("factor").is_in([*FACTORS, "conditioning", "floor"]))
    return figure, caption(
        "Unguided, RCG generates better without labels than class-conditional generators",
        text,
        [generators, used],
        protocol="ImageNet 256, no guidance. a: 50,000 samples, ADM statistics, each generator's own training "
        "length. b to e: MAGE-B 200 epochs, RDM 100 epochs (e also 10 to 300), against validation images.",
        never="a gain at equal compute: the encoder's training is not counted, and a's heights do not compare with "
        "those of b to e (another reference); one run a point, so levels beyond the default cannot be told apart.",
    )
