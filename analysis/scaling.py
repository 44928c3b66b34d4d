"""How do quality, distortion and the best rate scale? Figures 1 to 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from analysis import report, study
from analysis.arms import candidates, envelope_table, named, nearest, words
from analysis.curves import Law
from analysis.interval import WIDE_RATIO
from analysis.report import Curves, Results
from analysis.theme import (
    ASTERISK,
    FILL,
    GREY,
    MARKERS,
    WIDTH,
    Caption,
    Gate,
    Missing,
    below,
    bits,
    caption,
    colours,
    direct_labels,
    gate_markers,
    gates_by_seed,
    log_axis,
    marker,
    power,
    verdict,
)

DODGE = 0.035  # markers of neighbouring rates are shifted by this share of their compute


def generators(results: Results, metric: str) -> pl.DataFrame:
    held = results.held
    if held.points.is_empty() or metric not in held.points.columns or held.points[metric].is_null().all():
        raise Missing(f"no generator has {words(metric)} yet ({held.progress})")
    return held.points.filter(pl.col(metric) > 0)


# --- figure 1: metric against compute ----------------------------------------------------------------------------


def _scaling_panel(axes: Axes, results: Results, curves: Curves, label: str) -> None:
    """One metric against generator compute: points, laws, bands, floors, labels."""
    held, metric = results.held, curves.metric
    points = generators(results, metric)
    palette = colours(held.rates)
    sizes = _sizes(held)
    ends: list[tuple[float, str, Any]] = []
    heights: list[float] = points[metric].to_list()  # everything that is drawn, for the axis
    rates = study.arms(points)
    for i, rate in enumerate(rates):
        rows = points.filter(pl.col("rate") == rate)
        colour = palette[rate]
        dodge = (1 + DODGE) ** (i - (len(rates) - 1) / 2)
        # points that look alike are one artist: a study has thousands of them
        alike: dict[tuple[str, bool, Gate], list[tuple[float, float]]] = {}
        chosen = _on_envelope(curves, rate)
        for row in rows.iter_rows(named=True):
            at = nearest(row["flops_target"], row["flops_to_point"])
            on = any((row["tokenizer_seed"], budget, row["generator_size"]) in chosen for budget in at)
            shape = "x" if row["past_minimum"] else MARKERS[sizes.index(row["generator_size"]) % len(MARKERS)]
            look = shape, on, verdict([row["tokenizer_gate"]])
            alike.setdefault(look, []).append((row["flops_to_point"] * dodge, row[metric]))
        for (shape, on, gate), places in alike.items():
            axes.plot(
                *zip(*places, strict=True),
                marker=shape,
                markersize=4.2 if on else 3.0,
                color=colour,
                fillstyle=FILL[gate],
                markeredgewidth=0.0 if gate == "passes" and shape != "x" else 0.8,
                alpha=0.95 if on else 0.3,
                linestyle="",
                zorder=3 if on else 2,
            )
        law = curves.laws.get(rate)
        if law is not None:
            style: Any = "-" if law.identified else (0, (4, 1.6)) if law.misfit.fits else (0, (1, 0.6, 4, 0.6))
            line = law.line()
            axes.plot(*line, color=colour, linestyle=style, linewidth=None if law.misfit.fits else 1.0, zorder=4)
            heights += [*line[1]]
            if law.drawn:
                heights += [*law.low, *law.high]
                axes.fill_between(law.grid, law.low, law.high, color=colour, alpha=0.16, linewidth=0, zorder=1)
                for edge in (law.low, law.high):
                    axes.plot(law.grid, edge, color=colour, linewidth=0.5, alpha=0.5, zorder=1)
            elif law.misfit.fits and len(law.by_seed) > 1:
                for seed, curve in zip(law.arm.seeds, law.by_seed, strict=True):
                    own = law.rows.loc[law.rows["seed"] == seed, "x"]
                    # within the seed's own points: beyond them its law is nobody's measurement
                    within = (law.grid >= 0.99 * own.min()) & (law.grid <= 1.01 * own.max()) & np.isfinite(curve)
                    axes.plot(law.grid[within], curve[within], color=colour, linewidth=0.6, alpha=0.8, zorder=3)
                    heights += [*curve[within]]
            mark = "" if law.identified else "\u2009*" if law.misfit.fits else "\u2009\u2020"
            ends.append((float(line[1][-1]), bits(held, rate) + mark, colour))
        else:
            last = rows.sort("flops_to_point")[-1]
            ends.append((float(last[metric][0]), bits(held, rate), colour))
        limit = report.floor(held, rate, metric)
        if limit is not None:
            axes.axhline(limit, color=colour, linestyle=":", linewidth=1.0, zorder=1)
            heights.append(limit)
    log_axis(axes, "x", float(points["flops_to_point"].min()), float(points["flops_to_point"].max()))  # type: ignore[arg-type]
    log_axis(axes, "y", min(heights), max(heights))
    for each in curves.frontier:
        if each.verdict == "crossing" and each.flops is not None and each.flops.low and each.flops.high:
            met = each.flops.estimate
            assert met is not None
            height = curves.laws[each.first].at(met)
            spread = [[met - each.flops.low], [each.flops.high - met]]
            axes.errorbar(
                met,
                height,
                xerr=spread,
                fmt="d",
                color="black",
                markersize=5,
                capsize=2.5,
                linewidth=1.1,
                zorder=6,
            )
    axes.set_xlabel("generator training compute (FLOPs)")
    axes.set_ylabel(label)
    direct_labels(axes, ends)


def _on_envelope(curves: Curves, rate: str) -> set[tuple[Any, ...]]:
    """Tokenizer seed, budget and generator size of the envelope that the law of a rate was fitted to."""
    law = curves.laws.get(rate)
    if law is None:
        return set()
    return {(row["seed"], row["budget"], row["size"]) for row in law.rows.to_dict("records")}


def _sizes(held: study.Study) -> list[str]:
    return held.points.sort("params_core", nulls_last=True)["generator_size"].unique(maintain_order=True).to_list()


def generation(results: Results, extractor: str) -> tuple[Figure, Caption]:
    """gFID and held-out code length against generator compute, per rate."""
    held = results.held
    metric = f"fid_{extractor}"
    points = generators(results, metric)
    with_bits = "nll_bits" in results.metrics
    figure, grid = plt.subplots(1, 2 if with_bits else 1, figsize=(WIDTH, 3.5), squeeze=False)
    panels = [(results.of(metric), words(metric))]
    if with_bits:
        panels.append((results.of("nll_bits"), "held-out code length (bits per image)"))
    titles = ("a  sample quality", "b  code length")
    for axes, (curves, label), title in zip(grid[0], panels, titles, strict=False):
        _scaling_panel(axes, results, curves, label)
        axes.set_title(title)
    shapes = [marker(MARKERS[i % len(MARKERS)], size) for i, size in enumerate(_sizes(held))]
    lines = [
        Line2D([], [], color=GREY, label="law"),
        Line2D([], [], color=GREY, linestyle="--", label="*not identified"),
    ]
    if any(not law.misfit.fits for curves, _ in panels for law in curves.laws.values()):
        lines.append(Line2D([], [], color=GREY, linestyle="-.", linewidth=1.0, label="\u2020no law fits, means joined"))
    if report.floor(held, study.arms(points)[0], metric) is not None:
        lines.append(Line2D([], [], color=GREY, linestyle=":", label="decoder floor"))
    if points["past_minimum"].any():
        lines.append(marker("x", "memorising, not fitted"))
    below(figure, shapes, lines + gate_markers(held))
    curves = results.of(metric)
    meet = [each.sentence() for each in curves.frontier] or [each.sentence() for each in curves.crossings[:3]]
    laws = [law for made, _ in panels for law in made.laws.values()]
    formulas = " or ".join(dict.fromkeys(law.fit.formula.replace("x", "C") for law in laws))
    what = f"gFID by {named(extractor)} against a fixed draw of training images"
    if with_bits:
        what += f" (a) and code length of {report.images(results, 'generator', 'nll_bits')} held-out images (b)"
    text = (
        f"{what} against generator training compute, by tokenizer "
        "rate. Marker shape: generator size (rates are shifted sideways by a few per cent); strong markers lie on "
        "the lower envelope over sizes of their tokenizer seed"
        f"{f', to which {formulas} is fitted (log residuals)' if laws else ''}. {_bands(laws)} "
        "Dashed: exponent not identified (interval wider than 30 % of it). With a dagger: budget "
        "means lie more than 20 % off the law and further than seeds scatter (F test, p < 0.01); they are joined. "
        "Dotted: Frechet distance of decoded held-out images, what a perfect generator of unseen images would score "
        "(one that reproduces training images can come below it). Black diamonds: identified crossings of the best two "
        "rates. Code length is no quality across rates: a coarser code always "
        f"costs fewer bits. {' '.join(meet)}"
    )
    title = f"Sample quality{' and code length' * with_bits} against compute"
    return figure, caption(results, title, text, len(points), extractors=[extractor])


def _bands(laws: Sequence[Law]) -> str:
    """What the bands are over, or why there are none, in sentences."""
    banded = [law for law in laws if np.isfinite(law.high).any()]
    if not laws:
        return "No law was fitted."
    if not banded:
        reasons = dict.fromkeys(law.intervals["a"].reason or "no standard error" for law in laws)
        return f"No bands: {'; '.join(reasons)}."
    counts = _span([len(law.arm.seeds) for law in banded])
    over = dict.fromkeys(f"{counts} {law.units}" if law.units == "tokenizer seeds" else law.units for law in banded)
    how = "; ".join(report.methods(law.intervals["a"] for law in banded))
    thin = any(law.misfit.fits and not law.drawn and len(law.arm.seeds) > 1 for law in laws)
    return (
        f"Bands: 95 % over {' and '.join(over)} ({how}), drawn where they are narrower than a factor of "
        f"{WIDE_RATIO:g} throughout{'; otherwise thin lines show the seeds' * thin}."
    )


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


# --- figure 2: rate and distortion -------------------------------------------------------------------------------


def rate_distortion(results: Results, extractor: str) -> tuple[Figure, Caption]:
    """Distortion of decoded held-out images against nominal, used and modelled bits."""
    held = results.held
    codes = held.codes
    wanted = [
        (f"rfid_{extractor}", f"rFID ({named(extractor)})", True),
        ("mse", "mean squared error", True),
        ("psnr", "PSNR (dB)", False),
    ]
    panels = [panel for panel in wanted if panel[0] in codes.columns and codes[panel[0]].is_not_null().any()]
    if codes.is_empty() or not panels:
        raise Missing("no tokenizer that generators use has been evaluated yet")
    if "nll_bits" in held.points.columns:
        modelled = held.points.group_by("tokenizer").agg(pl.col("nll_bits").min().alias("bits_modelled"))
        codes = codes.join(modelled, on="tokenizer", how="left")
    kinds = [("bits_nominal", "|", "nominal: tokens x log2 K"), ("bits_used", "s", "used: tokens x log2 perplexity")]
    kinds.append(("bits_modelled", "^", "modelled: best held-out code length"))
    kinds = [kind for kind in kinds if kind[0] in codes.columns and codes[kind[0]].is_not_null().any()]
    palette = colours(held.rates)
    figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, 2.9), squeeze=False)
    for axes, (column, label, logarithmic), letter in zip(grid[0], panels, "abc", strict=False):
        shown = codes.filter(pl.col(column).is_not_null())
        means = shown.group_by("rate", maintain_order=True).agg(pl.col("bits_nominal").mean(), pl.col(column).mean())
        axes.plot(means["bits_nominal"], means[column], color="0.8", linewidth=1.0, zorder=0)
        for row in shown.iter_rows(named=True):
            there = [(row[name], shape) for name, shape, _ in kinds if row[name]]
            axes.plot(
                [x for x, _ in there], [row[column]] * len(there), color=palette[row["rate"]], linewidth=0.6, alpha=0.6
            )
            for x, shape in there:
                tall = shape == "|"  # would else vanish behind the bits that are used, mostly as many
                axes.plot(
                    x,
                    row[column],
                    marker=shape,
                    color=palette[row["rate"]],
                    fillstyle=FILL[verdict([row["gate"]])],
                    markersize=10 if tall else 4.5,
                )
        everything = [v for name, _, _ in kinds for v in shown[name].drop_nulls().to_list() if v > 0]
        log_axis(axes, "x", min(everything), max(everything))
        if logarithmic:
            log_axis(axes, "y", float(shown[column].min()), float(shown[column].max()))  # type: ignore[arg-type]
        axes.set_xlabel("bits per image")
        axes.set_ylabel(label)
        axes.set_title(letter)
        if axes is grid[0][-1]:
            ends = [(float(y), rate, palette[rate]) for rate, _, y in means.iter_rows()]
            direct_labels(axes, ends)
    handles = [marker(shape, label) for _, shape, label in kinds]
    below(figure, handles, gate_markers(held))
    coded, measured = report.images(results, "tokenizer", "bits_used"), report.images(results, "generator", "nll_bits")
    meanings = {
        "bits_nominal": "nominal bits",
        "bits_used": f"bits that the codes of {coded} held-out images use",
        "bits_modelled": f"bits that the best of its generators needs for {measured} of them ({report.extent(held)}; "
        f"{report.protocol(held)})",
    }
    text = (
        "Distortion of decoded held-out images against rate, one row of markers per tokenizer seed; grey: means over "
        "seeds. The rates of one tokenizer share its height: "
        f"{', '.join(meanings[name] for name, _, _ in kinds)}."
    )
    used = [extractor] if panels[0][0] == f"rfid_{extractor}" else []
    return figure, caption(results, "Rate and distortion", text, len(codes), of="tokenizer", extractors=used)


# --- figure 3: best rate -----------------------------------------------------------------------------------------


def best_rate(results: Results, extractor: str) -> tuple[Figure, Caption]:
    """Which rate wins at each generator size and compute, and gFID against rate at each compute."""
    held, metric = results.held, f"fid_{extractor}"
    points = generators(results, metric)
    table = results.best_rates
    table = table[table["metric"] == metric] if len(table) else table
    if not len(table):
        raise Missing("fewer than two rates have been measured at the same compute with the same tokenizer seeds")
    palette = colours(held.rates)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3), width_ratios=(1.05, 1))
    gates = gates_by_seed(held)
    budgets = sorted(table["budget"].unique())
    rows = [*[size for size in _sizes(held) if size in set(table["size"].dropna())], None]
    names = {rate: rate + ASTERISK[verdict(by_seed.values())] for rate, by_seed in gates.items()}
    room = 2.6 * 72 / len(budgets) / (0.62 * max(map(len, names.values())))  # points, so that a name fits its cell
    for cell in table.to_dict("records"):
        x, y = budgets.index(cell["budget"]), rows.index(cell["size"] if isinstance(cell["size"], str) else None)
        colour = palette[cell["rate"]]
        sure = bool(cell["separated"])
        left.add_patch(
            Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=colour, alpha=1.0 if sure else 0.28, linewidth=0)
        )
        dark = sure and sum(colour) < 1.6
        ink = {"ha": "center", "va": "center", "color": "white" if dark else "black"}
        left.text(x, y + 0.12, names[cell["rate"]], fontsize=min(7.5, room), **ink)
        left.text(x, y - 0.2, f"{cell['ratio']:.2f}x", fontsize=min(6.5, room), **ink)
    left.set(xlim=(-0.55, len(budgets) - 0.45), ylim=(-0.55, len(rows) - 0.45))
    every_other = math.ceil(len(budgets) / 6)
    left.set_xticks(range(0, len(budgets), every_other), [power(budget) for budget in budgets[::every_other]])
    left.set_yticks(range(len(rows)), [size or "best size" for size in rows])
    left.tick_params(length=0)
    for side in ("left", "bottom"):
        left.spines[side].set_visible(False)
    left.set(xlabel="generator training compute (FLOPs)", ylabel="generator size")
    left.set_title("a  best rate (pale: not resolved)")
    arms = candidates(results.of(metric).arms)
    shades = sns.color_palette("flare", len(budgets))
    ends = []
    every: list[float] = []
    ticks: dict[float, str] = {}
    for budget, shade in zip(budgets, shades, strict=True):
        xs: list[float] = []
        rates: list[str] = []
        means: list[float] = []
        for arm in arms:
            envelope = envelope_table(arm)
            here = envelope[envelope["budget"] == budget]
            values = here["y"].tolist()
            if not values or arm.bits is None:
                continue
            ticks[arm.bits] = arm.rate
            for seed, value in zip(here["seed"], values, strict=True):
                fill = FILL[verdict([gates[arm.rate].get(seed)])]
                right.plot(arm.bits, value, "o", color=shade, fillstyle=fill, markersize=3, alpha=0.7)
            xs.append(arm.bits)
            rates.append(arm.rate)
            means.append(math.exp(float(np.mean(np.log(values)))))
            every += values
        if not xs:
            continue
        right.plot(xs, means, color=shade)
        winner = int(np.argmin(means))
        fill = FILL[verdict(gates[rates[winner]].values())]
        right.plot(xs[winner], means[winner], "*", color="white", markersize=12, zorder=5)  # apart from its curve
        right.plot(xs[winner], means[winner], "*", color=shade, fillstyle=fill, markersize=8, zorder=5)
        ends.append((means[-1], power(budget), shade))
    if every:
        log_axis(right, "x", min(ticks), max(ticks))
        log_axis(right, "y", min(every), max(every))
        right.set_xticks(list(ticks), [f"{nominal:.4g}" for nominal in ticks])
        right.xaxis.set_minor_locator(NullLocator())
        direct_labels(right, ends)
        right.annotate("FLOPs", (1.015, 1.0), xycoords="axes fraction", fontsize=8, color=GREY, annotation_clip=False)
    right.set(xlabel="nominal rate (bits per image)", ylabel=words(metric))
    right.set_title("b  gFID against rate, by compute")
    below(figure, [marker("o", "tokenizer seed"), marker("*", "best rate"), *gate_markers(held)])
    seeds = _span(table["seeds"].tolist())
    resolved = (
        "none can be resolved with one tokenizer seed"
        if seeds == "1"
        else f"full colour where that distance is resolved at 95 % (paired by {seeds} tokenizer seeds, Student-t; not "
        "corrected for the number of cells)"
    )
    states = {verdict(of.values()) for of in gates.values()}
    worst = " A rate with any flagged seed has an asterisk (a) and an open star (b)." * ("flagged" in states)
    worst += " One whose gate was not measured has a question mark (a) and a half-filled star (b)." * (
        "not measured" in states
    )
    text = (
        "(a) The rate with the lowest gFID (geometric mean over tokenizer seeds) for each generator size and "
        f"compute, and its distance to the runner-up; {resolved}. (b) gFID of the best size against nominal rate; dots "
        "are tokenizer seeds, stars the best rate at that compute. A star at an end of the range may have its optimum "
        f"outside.{worst}"
    )
    return figure, caption(
        results, "Best rate by generator size and compute", text, len(points), extractors=[extractor]
    )
