"""What is published on compression and generation? Every figure from the literature, and those of rates and codebooks.

    python -m analysis.figures results/published

``FIGURES`` names them all; those of representations are in ``analysis.representations`` and ``analysis.epochs``, that
of one-bit networks in ``analysis.binarisation``. Numbers come from ``analysis.published``. Nearly all are one training
run each, without an interval.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import binarisation, epochs, representations
from analysis.evidence import best, caption, series, ticks
from analysis.fit import fit
from analysis.portrait import bands, curve
from analysis.published import table
from analysis.refusal import Refusal
from analysis.result import Fit
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


FORMS = ("power", "saturating")
CELLS = ((256, 50), (256, 300), (576, 50), (576, 100), (576, 200), (576, 300))  # tokens and epochs of the tables
ALIKE = ("tokens", "epochs", "guided", "temperature", "top_k", "generated_px")  # what one fit has one value of


class Law(NamedTuple):
    """One law over the sizes of one protocol, token count and training length, or why there is none."""

    protocol: str
    tokens: int
    epochs: int
    form: str
    rows: pl.DataFrame
    found: Fit | Refusal


def size_law(rows: pl.DataFrame, form: str) -> Fit | Refusal:
    """gFID by parameters over the rows of one protocol, or why there is no such law."""
    try:
        return fit(
            1e6 * rows["params_m"].to_numpy(),
            rows["gfid"].to_numpy(),
            form,
            ids=rows["size"].to_list(),
            protocols=[str(row) for row in rows.select(ALIKE).rows()],
            inputs=("N",),
            output="gFID",
        )
    except Refusal as refusal:
        return refusal


def length_law(rows: pl.DataFrame) -> Fit | Refusal:
    """gFID by parameters and epochs without an asymptote; rows of one size are taken as one training run."""
    inputs = rows.select(1e6 * pl.col("params_m"), "epochs").to_numpy()
    groups = rows["size"].to_list()
    try:
        return fit(inputs, rows["gfid"].to_numpy(), "chinchilla_power", groups=groups, inputs=("N", "epochs"))
    except Refusal as refusal:
        return refusal


def size_laws(rows: pl.DataFrame) -> list[Law]:
    """A power law and one with an asymptote, for each protocol, token count and training length; never over several."""
    found = []
    for (protocol, choose), (tokens, length), form in itertools.product(PROTOCOLS.items(), CELLS, FORMS):
        held = by_size(choose(rows.filter(epochs=length)), tokens).select(rows.columns)
        found.append(Law(protocol, tokens, length, form, held, size_law(held, form)))
    return found


def llamagen_laws(folder: Path) -> tuple[Figure, Caption]:
    """Which law of the generator's size do LlamaGen's tables carry, by token count and guidance?"""
    rows = llamagen(folder)
    found = size_laws(rows)
    figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 7.4), height_ratios=(3, 3, 2.4))
    palette = colours(["256", "576"])
    sizes = rows["params_m"].unique().sort().to_list()
    for i, protocol in enumerate(PROTOCOLS):
        mine = [law for law in found if law.protocol == protocol]
        heights = pl.concat([law.rows for law in mine])["gfid"]
        for panel, length in zip(axes[:2, i], (50, 300), strict=True):
            for law in (law for law in mine if law.epochs == length):
                _law(panel, law, palette[str(law.tokens)])
            log_axis(panel, "y", 0.95 * float(heights.min()), float(heights.max()))  # type: ignore[arg-type]
            log_axis(panel, "x", 95, 3600)
            ticks(panel, "x", sizes, dict(zip(sizes, SIZES, strict=True)))
        axes[0, i].set_title(f"{'abc'[i]}  {protocol}")
        axes[1, i].set_xlabel("generator size (log)")
        axes[1, i].text(0.97, 0.95, "256 tokens: 2 sizes, no law", transform=axes[1, i].transAxes, ha="right", va="top")
        _exponents(axes[2, i], mine, palette)
    for panel, label in zip(axes[:, 0], ("gFID, 50 epochs", "gFID, 300 epochs", "exponent of the size"), strict=True):
        panel.set_ylabel(label)
    below(
        figure,
        [
            series("256 tokens", palette["256"], line=""),
            series("576 tokens", palette["576"], "s", ""),
            series("$E + A N^{-a}$", GREY, "", "-"),
            series("$A N^{-a}$", GREY, "", "--"),
        ],
        [
            marker("D", "exponent of $E + A N^{-a}$"),
            marker("D", "exponent of $A N^{-a}$", "flagged"),
            marker("x", "refused"),
            series("not identified (bands: hatched)", GREY, "", ":"),
        ],
    )
    return figure, _said_of_laws(rows, found)


def _law(panel: Axes, law: Law, colour: Any) -> None:
    """The points of one cell, and its law where there is one; the law with an asymptote has a band."""
    panel.plot(law.rows["params_m"], law.rows["gfid"], {256: "o", 576: "s"}[law.tokens], color=colour, markersize=4.5)
    if isinstance(law.found, Refusal):
        return
    across = np.geomspace(law.rows["params_m"][0], law.rows["params_m"][-1], 60)
    frame = curve(law.found, 1e6 * across[:, None])
    if law.form == "power":
        panel.plot(across, frame["mean"], "--", color=colour, linewidth=1.0)
    else:
        panel.plot(across, frame["mean"], "-", color=colour, linewidth=1.4)
        bands(panel, across, frame, colour, names=1)


def _exponents(panel: Axes, laws: Sequence[Law], palette: Mapping[str, Any]) -> None:
    """Exponents with 95 % intervals by training length; dotted where they are not identified."""
    for law in laws:
        place = CELLS.index((law.tokens, law.epochs)) + (-0.13 if law.form == "power" else 0.13)
        colour = palette[str(law.tokens)]
        if isinstance(law.found, Refusal):
            panel.plot(place, -0.85, "x", color=colour, markersize=4.5)
            continue
        ends = law.found.conf_int().loc[["a"]].to_numpy()[0]
        style = "-" if law.found.identified["a"] else ":"
        panel.plot([place, place], ends, style, color=colour, linewidth=1.6)
        fill: Any = "none" if law.form == "power" else "full"
        panel.plot(place, law.found.params["a"], "D", color=colour, fillstyle=fill, markersize=4.5)
    panel.axhline(0.0, color=GREY, linewidth=0.8)
    panel.axvline(1.5, color=GREY, linewidth=0.8)
    panel.set(xlim=(-0.5, 5.5), ylim=(-1.0, 2.4), xlabel="epochs (256 | 576 tokens)")
    ticks(panel, "x", range(len(CELLS)), {i: str(epochs) for i, (_, epochs) in enumerate(CELLS)})


def _said_of_laws(rows: pl.DataFrame, found: Sequence[Law]) -> Caption:
    fitted = [(law, law.found) for law in found if isinstance(law.found, Fit)]
    counts = {(law.tokens, law.epochs): law.rows.height for law in found}
    methods = {held.interval_method for _, held in fitted}
    power, saturating = (  # guided, five sizes
        [held for law, held in fitted if law.form == form and law.rows["guided"].all() and held.n == len(SIZES)]
        for form in FORMS
    )
    scatter = [[100 * (held.sigma or math.nan) for held in each] for each in (power, saturating)]
    steeper = [one.params["a"] / other.params["a"] for one, other in zip(saturating, power, strict=True)]
    sure = [
        f"{law.protocol}, {law.tokens} tokens, {law.epochs} epochs: {held.intervals()['E']}"
        for law, held in fitted
        if held.identified.get("E")
    ]
    lengths = {
        protocol: length_law(pl.concat([choose(rows.filter(tokens=576, epochs=e)) for e in (50, 100, 200, 300)]))
        for protocol, choose in PROTOCOLS.items()
    }
    unknown = [
        f"{protocol} {held.sentence if isinstance(held, Refusal) else held.intervals()['b']}"
        for protocol, held in lengths.items()
        if isinstance(held, Refusal) or not held.identified["b"]
    ]
    text = (
        "LlamaGen's gFID against parameters N: y = A N^-a (dashed) and y = E + A N^-a (solid, band: 95 % of the law), "
        "one fit per token count, training length and guidance, least squares on ln y. Below, their exponents with "
        f"95 % intervals ({', '.join(sorted(methods))}; dof = n - p, 1 to 3). Sizes per fit: "
        f"{'; '.join(f'{tokens} tokens at {length} epochs {count}' for (tokens, length), count in counts.items())}. "
        f"Refused, {len(found) - len(fitted)} of {len(found)}: both laws at 2 sizes, the one with an asymptote at 3. "
        "At 5 sizes AICc is not defined for the law with an asymptote, so that it does not choose. Guided, the power "
        f"law leaves a scatter of {min(scatter[0]):.0f} to {max(scatter[0]):.0f} %, the other {min(scatter[1]):.1f} to "
        f"{max(scatter[1]):.1f} %, and its exponent is {min(steeper):.1f} to {max(steeper):.1f} times as large. "
        f"Unguided no asymptote is identified. E where it is: {'; '.join(sure)}. At one training length compute "
        "is about N times a constant, so that these are the exponents of compute too. Over the four lengths of 576 "
        "tokens together (y = A N^-a + B epochs^-b, 18 rows, 5 sizes as groups) b is not identified: "
        f"{'; '.join(unknown)}."
    )
    return caption(
        "Which law of size LlamaGen's tables carry depends on guidance",
        text,
        [pl.concat([law.rows for law in found]).unique(maintain_order=True)],
        protocol="ImageNet 256, 50,000 samples, ADM statistics, all codes kept, temperature 1; 576-token images are "
        "made at 384 px and resized. Rows of 50, 100, 200 and 300 epochs, of either token count and of the three "
        "guidance protocols are never in one fit, but for b. Best scales are chosen on the samples that are reported.",
        never="that gFID follows either law, or an asymptote beyond these sizes: 5 sizes, one training run each, whose "
        "learning rate and batch grow with the size, 2 degrees of freedom; or one exponent of scaling: it follows the "
        "form and the guidance; or that 576 tokens are better at equal compute: their lower E at 50 epochs costs 2.25 "
        "times as much a step.",
        laws=[_facts(law) for law in found],
    )


def _facts(law: Law) -> dict[str, Any]:
    """One law, or its refusal, as JSON; four digits, which is what all machines agree on."""
    cell = law._asdict() | {"n": law.rows.height}
    del cell["rows"], cell["found"]
    if isinstance(law.found, Refusal):
        return cell | {"refused": law.found.told}
    params = {
        name: [None if end is None else float(f"{end:.4g}") for end in (each.estimate, each.low, each.high)]
        for name, each in law.found.intervals().items()
    }
    known = [name for name, sure in law.found.identified.items() if sure]
    return cell | {"params": params, "identified": known, "dof": law.found.dof}


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
    "fig10_llamagen_laws": llamagen_laws,
}
