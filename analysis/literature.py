"""What is published on compression and generation? Every figure from the literature, and those of rates and codebooks.

    python -m analysis.figures results/published

``FIGURES`` names them all; those of representations are in ``analysis.representations`` and ``analysis.epochs``, that
of one-bit networks in ``analysis.binarisation``. Numbers come from ``analysis.published``. Nearly all are one training
run each, without an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.figure import Figure

from analysis import binarisation, epochs, representations
from analysis.evidence import best, caption, series, ticks
from analysis.published import table
from analysis.theme import GREY, WIDTH, Caption, below, colours, log_axis, marker

SIZES = ("B", "L", "XL", "XXL", "3B")
FIXED = 1.75  # LlamaGen's guidance scale for XL and XXL
CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # behind a text that a line would cross
LLAMAGEN = "LlamaGen paper arXiv:2406.06525 Table"


class Crossing(NamedTuple):
    """Where two curves over sizes change order: between which two sizes, and where by interpolation."""

    below: str
    above: str
    params_m: float


def crossings(
    sizes: Sequence[str], params_m: Sequence[float], few: Sequence[float], many: Sequence[float]
) -> list[Crossing]:
    """Changes of sign of ln many - ln few over ln params, interpolated linearly between two sizes."""
    gap, place = np.log(np.asarray(many)) - np.log(np.asarray(few)), np.log(np.asarray(params_m, np.float64))
    found = []
    for i in np.flatnonzero(gap[:-1] * gap[1:] < 0):
        share = gap[i] / (gap[i] - gap[i + 1])
        at = math.exp((1 - share) * place[i] + share * place[i + 1])
        found.append(Crossing(sizes[int(i)], sizes[int(i) + 1], at))
    return found


def llamagen(folder: Path) -> pl.DataFrame:
    """The 122 rows of LlamaGen's tables 8 to 10, with the generator's ``size``."""
    held = table("generation", folder).filter(pl.col("source").str.contains(f"^{LLAMAGEN}(8|9|10)$"))
    return held.with_columns(size=pl.col("generator").str.strip_prefix("LlamaGen-"))


PROTOCOLS: Mapping[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "unguided": lambda rows: rows.filter(~pl.col("guided")),
    "best scale per cell": lambda rows: best(rows.filter("guided"), ["tokens", "size"], "gfid"),
    f"fixed scale {FIXED:g}": lambda rows: rows.filter(pl.col("cfg") == FIXED),
}


def by_size(rows: pl.DataFrame, tokens: int) -> pl.DataFrame:
    """Rows of one token count in the order of the sizes."""
    return rows.filter(tokens=tokens).sort("params_m")


def token_crossings(rows: pl.DataFrame, protocol: str) -> list[Crossing]:
    """Where 576 tokens become better than 256 as generators grow, under one guidance protocol."""
    chosen = PROTOCOLS[protocol](rows)
    few, many = by_size(chosen, 256), by_size(chosen, 576)
    assert few["size"].to_list() == many["size"].to_list() == list(SIZES)
    return crossings(SIZES, few["params_m"].to_list(), few["gfid"].to_list(), many["gfid"].to_list())


def llamagen_tokens(folder: Path) -> tuple[Figure, Caption]:
    """Does the number of tokens that is best depend on the size of the generator, and on guidance?"""
    rows = llamagen(folder).filter(epochs=50)
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 4.6), sharex=True, height_ratios=(3, 2))
    palette = colours(["256", "576"])
    said, shown, edges = [], [], []
    turns = {protocol: token_crossings(rows, protocol) for protocol in PROTOCOLS}
    for i, (protocol, choose) in enumerate(PROTOCOLS.items()):
        top, bottom = axes[0, i], axes[1, i]
        chosen = choose(rows)
        shown.append(chosen)
        few, many = by_size(chosen, 256), by_size(chosen, 576)
        for name, held, shape, line in (("256", few, "o", "-"), ("576", many, "s", "--")):
            top.plot(held["params_m"], held["gfid"], line, color=palette[name])
            for row in held.iter_rows(named=True):
                edge = i == 1 and _edge(rows, row)
                edges += [f"{row['size']} at {name} tokens"] if edge else []
                fill = "none" if edge else "full"
                top.plot(row["params_m"], row["gfid"], shape, color=palette[name], fillstyle=fill, markersize=5)
        ratio = many["gfid"].to_numpy() / few["gfid"].to_numpy()
        bottom.axhline(1.0, color=GREY, linewidth=0.8)
        bottom.plot(few["params_m"], ratio, "D-", color="black", markersize=4)
        found = turns[protocol]
        for each in found:
            for panel in (top, bottom):
                panel.axvline(each.params_m, color=GREY, linestyle=":", linewidth=1.2)
        said.append(f"{protocol}: {' and '.join(_between(each) for each in found) or 'none'}")
        log_axis(top, "y", float(chosen["gfid"].min()), float(chosen["gfid"].max()))  # type: ignore[arg-type]
        log_axis(bottom, "x", 95, 3600)
        ticks(bottom, "x", few["params_m"].to_list(), dict(zip(few["params_m"], SIZES, strict=True)))
        bottom.set(ylim=(0.82, 1.52), xlabel="generator size (parameters, log)")
        top.set_title(f"{'abc'[i]}  {protocol}")
        where = f"crossing: {found[0].below} to {found[0].above}" if found else "no crossing"
        bottom.text(0.97, 0.93, where, transform=bottom.transAxes, ha="right", va="top", fontsize=8).set_bbox(CLEAR)
    axes[0, 0].set_ylabel("gFID")
    axes[1, 0].set_ylabel("gFID(576) / gFID(256)")
    below(
        figure,
        [
            series("256 tokens", palette["256"]),
            series("576 tokens", palette["576"], "s", "--"),
            marker("o", "best scale is the highest or lowest tried", "flagged"),
        ],
    )
    text = (
        "LlamaGen's generators after 50 epochs, 256 against 576 tokens: gFID (top) and its ratio (bottom; above 1 "
        f"fewer tokens are better). Crossings, ln gFID interpolated over ln parameters: {'; '.join(said)}. The "
        f"crossing depends on the guidance protocol. Best scales at an edge of those tried: {'; '.join(edges)}."
    )
    return figure, caption(
        "Which number of tokens is best depends on size and on guidance",
        text,
        shown,
        protocol="ImageNet 256, 50,000 samples, ADM statistics, 50 epochs, all codes kept, temperature 1; 576-token "
        "images are made at 384 px and resized. Scales are chosen on the samples that are reported, and the sets "
        "tried differ.",
        never="that either number of tokens is compute-optimal: 576 tokens cost 2.25 times the compute a step here; "
        "or that the crossing is known to better than its bracket: one training run a cell, and at L the two best "
        "differ by 0.5 %.",
        crossings={protocol: [each._asdict() for each in found] for protocol, found in turns.items()},
    )


def _edge(rows: pl.DataFrame, row: dict[str, object]) -> bool:
    """Whether the scale of this row is the lowest or highest guided one tried for its cell."""
    tried = rows.filter("guided").filter(size=row["size"], tokens=row["tokens"])["cfg"]
    return row["cfg"] in (tried.min(), tried.max())


def _between(found: Crossing) -> str:
    return f"between {found.below} and {found.above} (at {found.params_m:,.0f} M)"


def maskbit_bits(folder: Path) -> tuple[Figure, Caption]:
    """Is there a best codebook size for a fixed generator?"""
    rows = table("generation", folder).filter(pl.col("generator") == "MaskBit generator 64 steps").sort("latent_dim")
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.7))
    least = rows.sort("gfid")[0]
    for panel, column, label in zip(axes, ("gfid", "rfid"), ("a  generation", "b  reconstruction"), strict=True):
        panel.plot(rows["latent_dim"], rows[column], "o-", color="black", markersize=5)
        panel.set(
            xlabel="bits per token (log2 of the codebook), 256 tokens", ylabel={"gfid": "gFID", "rfid": "rFID"}[column]
        )
        panel.set_title(label)
        panel.set_xticks(rows["latent_dim"].to_list())
        panel.set_xlim(9.2, 18.8)
        heights = rows[column].to_list()
        for k, (x, y) in enumerate(zip(rows["latent_dim"], heights, strict=True)):
            # beside the point, on the side where the curve is lower
            falls, rose = y > min(heights[k + 1 :], default=y), y > min(heights[:k], default=y)
            place, side = ((5, 4), "left") if falls else ((-5, 4), "right") if rose else ((0, -12), "center")
            panel.annotate(f"{y:.2f}", (x, y), place, textcoords="offset points", ha=side, fontsize=8)
    axes[0].set_ylim(1.605, 1.695)
    axes[1].set_ylim(1.05, 1.90)
    text = (
        f"MaskBit with codebooks of 10 to 18 bits per token: gFID is lowest at {least['latent_dim'][0]} bits while "
        "rFID falls throughout. The whole U is 0.06 deep."
    )
    return figure, caption(
        "gFID is U-shaped in the size of the codebook",
        text,
        [rows],
        protocol="ImageNet 256, one generator (24 layers, width 1024), guided, 64 sampling steps; scale, samples and "
        "reference are not stated in the table.",
        never="that 14 bits are best: one run a point and no interval; users of the released weights got 1.74 where "
        "1.62 is published (maskbit issue #10), twice the depth of the U. The README gives a codebook use of 0.5 at "
        "18 bits.",
    )


def compression_flips(folder: Path) -> tuple[Figure, Caption]:
    """Does a larger generator prefer another compression?"""
    held = table("generation", folder)
    dcae = held.filter(pl.col("tokenizer").str.starts_with("DC-AE"), pl.col("generator").str.starts_with("UViT"))
    dcae = dcae.filter(pl.col("params_m") > 100)
    vavae = held.filter(pl.col("source").str.starts_with("VA-VAE"))
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 5.4))
    palette = colours(["64", "256"])
    for i, guided in enumerate((False, True)):
        panel = axes[0, i]
        rows = dcae.filter(guided=guided)
        for tokens, shape in ((256, "o"), (64, "s")):
            curve = rows.filter(pl.col("tokens") == tokens, ~pl.col("generator").str.contains("steps")).sort("params_m")
            longer = rows.filter(pl.col("tokens") == tokens, pl.col("generator").str.contains("steps"))
            panel.plot(curve["params_m"], curve["gfid"], shape + "-", color=palette[str(tokens)], markersize=5)
            panel.plot(
                longer["params_m"], longer["gfid"], shape, color=palette[str(tokens)], fillstyle="none", markersize=5
            )
        log_axis(panel, "y", float(rows["gfid"].min()), float(rows["gfid"].max()))  # type: ignore[arg-type]
        log_axis(panel, "x", 420, 1900)
        ticks(panel, "x", [500.87, 1580.4], {500.87: "UViT-H (0.5B)", 1580.4: "UViT-2B (1.6B)"})
        panel.set(ylabel="gFID, 512 px")
        panel.set_title(f"{'ab'[i]}  DC-AE, {'guided' if guided else 'unguided'}")
    axes[0, 1].legend(
        handles=[
            series("f32: 256 tokens", palette["256"]),
            series("f64: 64 tokens", palette["64"], "s"),
            marker("s", "f64, 2,000k steps", "flagged", palette["64"]),
        ],
        loc="upper right",
    )
    tints = colours(["16", "32", "64"])
    for i, (kind, label) in enumerate((("LDM", "plain KL"), ("+VF(DINOv2)", "aligned with DINOv2"))):
        panel = axes[1, i]
        rows = vavae.filter(pl.col("tokenizer").str.ends_with(kind))
        for dim, shape, line in ((16, "o", "-"), (32, "s", "--"), (64, "D", ":")):
            curve = rows.filter(latent_dim=dim)
            panel.plot(range(3), curve["gfid"], shape, linestyle=line, color=tints[str(dim)], markersize=5)
        panel.set_xticks(range(3), ["B", "L", "XL"])
        log_axis(panel, "y", 7.8, 38)
        ticks(panel, "y", [8, 10, 15, 20, 30])
        panel.set(xlim=(-0.3, 2.3), xlabel="LightningDiT size", ylabel="FID of 10,000 samples")
        panel.set_title(f"{'cd'[i]}  f16 VAE, {label}")
    axes[1, 1].legend(
        handles=[
            series(f"{dim} channels", tints[str(dim)], shape, line)
            for dim, shape, line in ((16, "o", "-"), (32, "s", "--"), (64, "D", ":"))
        ],
        loc="upper right",
    )
    text = (
        "a, b: DC-AE at 512 px; unguided, 64 tokens overtake 256 between UViT-H and UViT-2B (13.96 against 9.83, "
        "then 7.78 against 8.13), guided they do not. c, d: an f16 VAE with 16, 32 or 64 channels; more channels "
        "always reconstruct better; with plain KL generation is worse at every size, by less the larger the model; "
        "aligned with DINOv2, 32 channels overtake 16 between B and L."
    )
    return figure, caption(
        "A larger generator can prefer another compression",
        text,
        [dcae, vavae.filter(pl.col("tokenizer").str.contains(r"LDM$|DINOv2"))],
        protocol="a, b: ImageNet 512, token counts assume patch size 1, guidance scale not stated. c, d: ImageNet "
        "256, FID of 10,000 samples, guidance not stated; the grouping by channels is inferred from the order of "
        "rows in a copy of the table.",
        never="that a flip is established: two or three sizes, one run each, in d a difference of 0.2 % at B; "
        "heights in a, b and in c, d are different metrics, and compute is not equal (64 tokens cost a quarter).",
    )


def crt(folder: Path) -> tuple[Figure, Caption]:
    """Does a tokenizer that is easier to predict generate better at equal compute, though it reconstructs worse?"""
    rows = table("crt", folder)
    known = rows.drop_nulls("gfid")
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.0), width_ratios=(3, 2))
    names = rows["tokenizer"].unique(maintain_order=True).to_list()
    palette = colours(names)
    look = dict(zip(names, (("o", "-"), ("s", "--"), ("D", ":")), strict=True))
    for name in names:
        shape, line = look[name]
        curve = known.filter(tokenizer=name).sort("params_m")
        left.plot(curve["params_m"], curve["gfid"], linestyle=line, color=palette[name])
        for row in curve.iter_rows(named=True):
            fill = "full" if row["evidence"] == "abstract" else "none"
            left.plot(row["params_m"], row["gfid"], shape, color=palette[name], fillstyle=fill, markersize=6)
    log_axis(left, "x", 95, 950)
    ticks(left, "x", rows["params_m"].unique().sort().to_list(), {111: "111M", 340: "340M", 775: "775M"})
    log_axis(left, "y", 2.1, 5.1)
    ticks(left, "y", [2, 2.5, 3, 4, 5])
    left.set(xlabel="generator parameters", ylabel="gFID")
    left.set_title("a  generation")
    for i, name in enumerate(names):
        rfid = rows.filter(tokenizer=name)["rfid"][0]
        if rfid is None:
            right.text(i, 2.16, "not found", ha="center", fontsize=8, color=GREY)
        else:
            right.plot(i, rfid, look[name][0], color=palette[name], fillstyle="none", markersize=7)
            right.annotate(f"{rfid:.2f}", (i, rfid), (0, 8), textcoords="offset points", ha="center", fontsize=8)
    right.set_xticks(range(len(names)), names)
    right.set(xlim=(-0.5, 2.5), ylim=(2.12, 2.46), ylabel="rFID")
    right.set_title("b  reconstruction")
    below(
        figure,
        [
            *(series(name, palette[name], look[name][0], look[name][1], "none") for name in names),
            marker("D", "in the abstract", colour=palette[names[-1]]),
        ],
    )
    text = (
        "CRT: the causal regulariser raises rFID from 2.21 to 2.36 and lowers gFID at three generator sizes. CRTopt "
        "(131k codes, larger decoder, longer training) reaches 2.18 at 775M; its value at 111M and its rFID were not "
        "found."
    )
    return figure, caption(
        "A tokenizer that reconstructs worse generates better",
        text,
        [rows],
        protocol="ImageNet 256, 256 tokens, 16k codes (CRTopt: 131k); CRT's tokenizer trains 5 % fewer steps, for "
        "equal compute; guidance is assumed, its scale, samples and reference are not stated.",
        never="the size of the gain: all values but one are third parties' notes, without intervals or seeds; CRTopt "
        "differs in codes, decoder and training, not in the regulariser alone; its total parameters may not be 775M.",
    )


FIGURES: Mapping[str, Callable[[Path], tuple[Figure, Caption]]] = {
    "fig1_llamagen_tokens": llamagen_tokens,
    "fig2_maskbit_bits": maskbit_bits,
    "fig3_compression_flips": compression_flips,
    "fig4_raev2_layers": representations.raev2_layers,
    "fig5_ep_fid": epochs.ep_fid,
    "fig6_encoder_association": representations.encoder_association,
    "fig7_crt": crt,
    "fig8_rcg": representations.rcg,
    "fig9_bidm": binarisation.bidm,
}
