"""May the results be believed? Figures 6 to 8: tokenizer gate, agreement of extractors, prediction against outcome."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import load, report, study
from analysis import prediction as foretold
from analysis.arms import envelope_table, named, words
from analysis.report import Results
from analysis.theme import (
    FILL,
    GREY,
    MARKERS,
    WIDTH,
    Caption,
    Gate,
    Missing,
    below,
    caption,
    colours,
    direct_labels,
    gate_markers,
    gates_by_seed,
    log_axis,
    marker,
    verdict,
)

BAR: dict[str, Any] = {"linewidth": 6, "alpha": 0.3, "solid_capstyle": "butt"}
REACH = 4.0  # outcomes further off their prediction than this factor are arrows at the edge


def gate(results: Results) -> tuple[Figure, Caption]:
    """Had the tokenizers converged, and did their codebooks collapse?"""
    held = results.held
    codes = held.codes
    if codes.is_empty() or not held.extractors or codes["perplexity"].is_null().all():
        raise Missing("no tokenizer that generators use has been evaluated yet")
    main = held.extractors[0]
    palette = colours(held.rates)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.0))
    rates = study.arms(codes)
    beside = _beside(codes)  # an open marker on a full one of its colour would not be seen
    for row in codes.iter_rows(named=True):
        colour = palette[row["rate"]]
        fill = FILL[verdict([row["gate"]])]
        if row["perplexity_share"] is not None:
            x = rates.index(row["rate"]) + 0.4 * beside[row["tokenizer"]]
            left.plot(x, row["perplexity_share"], "o", color=colour, fillstyle=fill, markersize=5)
    left.axhspan(0, load.COLLAPSED, color="0.93", zorder=0)
    left.set_xticks(range(len(rates)), rates)
    left.set(
        xlim=(-0.5, len(rates) - 0.5), ylim=(0, 1.02), ylabel="codebook use: perplexity / K", xlabel="tokenizer rate"
    )
    left.text(len(rates) - 0.55, 0.02, "collapsed", ha="right", fontsize=7.5, color="0.4")
    left.set_title("a  codebook use")
    final, half = f"rfid_{main}", f"rfid_{main}_half"
    trained = codes.drop_nulls([final, half]) if half in codes.columns and final in codes.columns else codes.clear()
    ends = []
    for row in trained.iter_rows(named=True):
        colour = palette[row["rate"]]
        fill = FILL[verdict([row["gate"]])]
        places, y = np.array([0, 1]) + 0.1 * beside[row["tokenizer"]], [row[half], row[final]]
        right.plot(places, y, "-", color=colour, linewidth=1.0, alpha=0.8)
        right.plot(places, y, "o", color=colour, fillstyle=fill, markersize=4.5)
    for rate in study.arms(trained) if len(trained) else []:
        last = trained.filter(pl.col("rate") == rate)
        change = float(last["rfid_change"].mean())  # type: ignore[arg-type]
        ends.append((float(np.exp(last[final].log().mean())), f"{rate}  {change:.0%}", palette[rate]))  # type: ignore[arg-type]
    right.set_xticks([0, 1], ["half", "full"])
    right.set(xlim=(-0.25, 1.25), xlabel="stage-1 training", ylabel=f"rFID ({named(main)})")
    right.set_title("b  convergence")
    if len(trained):
        values = [*trained[final].to_list(), *trained[half].to_list()]
        log_axis(right, "y", min(values), max(values))
        right.set_xlim(-0.25, 1.25)
        direct_labels(right, ends)
    else:
        right.set_yticks([])
        right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center", color=GREY)
    if marks := gate_markers(held):
        below(figure, [marker("o", "passes"), *marks])
    count = report.images(results, "tokenizer", "perplexity")
    text = (
        "Gate of the tokenizers that generators train on, one marker per tokenizer seed. (a) Perplexity of the "
        f"codes of {count} held-out images over codebook size; below {load.COLLAPSED:g} a tokenizer is flagged as "
        "collapsed. "
        "(b) rFID after half and all of training, with its change as a share of the decoder's gFID floor (the largest "
        f"of any extractor, mean over seeds); above {load.UNCONVERGED:.0%} a tokenizer is flagged as unconverged."
    )
    return figure, caption(results, "Tokenizer gate", text, len(codes), of="tokenizer", extractors=[main])


def _beside(codes: pl.DataFrame) -> dict[str, float]:
    """Where each tokenizer stands among those of its rate, from -0.5 to 0.5."""
    found: dict[str, float] = {}
    for _, rows in codes.sort("tokenizer_seed").group_by("rate", maintain_order=True):
        names = rows["tokenizer"].to_list()
        found |= {name: (i + 0.5) / len(names) - 0.5 for i, name in enumerate(names)}
    return found


def extractors(results: Results) -> tuple[Figure, Caption]:
    """Do two extractors rank the same points alike?"""
    held = results.held
    if len(held.extractors) < 2:
        raise Missing("fewer than two extractors have been used")
    first, second = (f"fid_{extractor}" for extractor in held.extractors[:2])
    if held.points.is_empty() or first not in held.points.columns or second not in held.points.columns:
        raise Missing(
            f"no generator has gFID by both extractors yet ({len(held.points)} of {held.planned} points measured)"
        )
    points = held.points.filter(pl.col(first) > 0, pl.col(second) > 0)
    palette = colours(held.rates)
    sizes = points.sort("params_core", nulls_last=True)["generator_size"].unique(maintain_order=True).to_list()
    figure, axes = plt.subplots(figsize=(WIDTH * 0.62, 3.5))
    looks = points.group_by("rate", "generator_size", "tokenizer_gate", maintain_order=True)
    for (rate, size, gate), rows in looks:
        colour, shape = palette[str(rate)], MARKERS[sizes.index(size) % len(MARKERS)]
        fill = FILL[verdict([str(gate) if gate else None])]
        axes.plot(rows[first], rows[second], shape, color=colour, fillstyle=fill, markersize=4, alpha=0.8)
    log_axis(axes, "x", float(points[first].min()), float(points[first].max()))  # type: ignore[arg-type]
    log_axis(axes, "y", float(points[second].min()), float(points[second].max()))  # type: ignore[arg-type]
    axes.set(xlabel=words(first), ylabel=words(second))
    found = report.agreement(held)
    agreed = "" if found is None else f"Spearman {found[0]}, n = {found[1]}"
    axes.set_title(agreed, fontweight="normal")
    handles = [marker("o", rate, colour=palette[rate]) for rate in study.arms(points)]
    figure.legend(handles=handles, loc="outside right center", title="rate")
    below(figure, [marker(MARKERS[i % len(MARKERS)], size) for i, size in enumerate(sizes)], gate_markers(held))
    text = (
        "gFID of the same samples by two extractors, each against the same reference images; one marker per point. "
        f"{agreed}{': ' + found[0].method if found else ''}."
    )
    return figure, caption(results, "Agreement of the extractors", text, len(points), extractors=held.extractors[:2])


def prediction(results: Results) -> tuple[Figure, Caption]:
    """What was predicted for the largest budget, and what came out?"""
    held = results.held
    path = foretold.file(held.folder)
    if not path.exists():
        raise Missing(f"{path} has not been written (python -m analysis.frontier {held.folder} --predict-largest)")
    if held.prediction is None:
        raise Missing(f"{path} is damaged")
    frame = foretold.outcome(held, held.prediction).filter(pl.col("predicted").is_not_null())
    if frame.is_empty():
        raise Missing(f"{path} holds no prediction that was not refused")
    metrics = frame["metric"].unique(maintain_order=True).to_list()
    palette = colours(held.rates or frame["rate"].unique(maintain_order=True).to_list())
    figure, grid = plt.subplots(1, len(metrics), figsize=(WIDTH, 3.1), squeeze=False)
    for axes, metric in zip(grid[0], metrics, strict=True):
        rows = frame.filter(pl.col("metric") == metric).to_dicts()
        axes.axhline(1.0, color=GREY, linewidth=0.8, zorder=0)
        reach = 1.05
        for row in rows:
            near = [row["outcome"], row["low"], row["high"], *row["by_seed"]]
            ratios = [value / row["predicted"] for value in near if value]
            reach = min(max(reach, *(max(ratio, 1 / ratio) for ratio in ratios)), REACH) if ratios else reach
        log_axis(axes, "y", 1 / reach, reach)
        for x, row in enumerate(rows):
            colour, predicted = palette.get(row["rate"], "black"), row["predicted"]
            if row["low"] is not None:
                axes.plot([x, x], [row["low"] / predicted, row["high"] / predicted], color=colour, **BAR)
            for gate, value in _outcomes(results, row):
                _within(axes, x, value / predicted, "o", colour, fillstyle=FILL[gate], markersize=3)
            if row["outcome"] is not None:
                _within(axes, x, row["outcome"] / predicted, "_", "black", markersize=13, markeredgewidth=1.6)
        axes.set_xticks(range(len(rows)), [f"{row['rate']}\n{row['predicted']:.3g}" for row in rows], fontsize=7)
        axes.set(xlim=(-0.6, len(rows) - 0.4), xlabel="rate and prediction")
        axes.set_title(words(metric), fontsize=8)
    grid[0][0].set_ylabel("outcome / prediction")
    handles = [
        Line2D([], [], color=GREY, label="95 % interval", **BAR),
        marker("o", "outcome, tokenizer seeds"),
        marker("_", "outcome, mean", colour="black"),
    ]
    below(figure, handles + gate_markers(held))
    row = frame.row(0, named=True)
    late = "after" if frame["outcome_known"].any() else "before"
    seen = frame.filter(pl.col("by_seed").list.len() > 0)
    known = seen.filter(pl.col("inside").is_not_null())
    partial = len(seen.filter(pl.col("inside").is_null(), pl.col("low").is_not_null()))
    came = [f"{known['inside'].sum()} of {len(known)} outcomes lie inside."] if len(known) else []
    came += [f"{partial} outcome{'s are' if partial > 1 else ' is'} incomplete."] if partial else []
    came = came or ["No outcome has been measured yet."]
    used = [f"{value:.3g}" for value in frame["largest_used"].drop_nulls().unique().sort()]
    ways: dict[str, dict[str, list[str]]] = {}  # method -> metric -> rates
    for each in frame.iter_rows(named=True):
        ways.setdefault(each["method"], {}).setdefault(words(each["metric"]), []).append(each["rate"])
    methods = [
        f"{method} ({'; '.join(f'{metric} of ' + ', '.join(rates) for metric, rates in which.items())})"
        for method, which in ways.items()
    ]
    text = (
        f"Prediction of the largest budget ({row['flops']:.3g} FLOPs) from those up to {' or '.join(used)}, "
        f"written {row['written']:%Y-%m-%d %H:%M} UTC at commit {(row['commit'] or 'unknown')[:12]}, {late} the "
        f"outcome was known. Bar: 95 % interval for the mean of these tokenizers. {' '.join(came)} An outcome off the "
        f"axis is an arrow at its edge, with the ratio. Methods: {'; '.join(methods)}."
    )
    compared = [metric.removeprefix("fid_") for metric in metrics if metric.startswith("fid_")]
    return figure, caption(results, "Prediction and outcome", text, len(frame), extractors=compared)


def _outcomes(results: Results, row: dict[str, Any]) -> list[tuple[Gate, float]]:
    """What each tokenizer seed gave at the predicted budget, with the verdict on that tokenizer."""
    found: list[tuple[Gate, float]] = []
    for arm in results.of(row["metric"]).arms:
        if arm.rate == row["rate"]:
            table = envelope_table(arm)
            gates = gates_by_seed(results.held)[arm.rate]
            at = table[table["budget"] == row["flops"]]
            found += [(verdict([gates.get(seed)]), y) for seed, y in zip(at["seed"], at["y"], strict=True)]
    return found


def _within(axes: Axes, x: float, ratio: float, shape: str, colour: Any, **look: Any) -> None:
    """A marker, or where its ratio lies off the axis an arrow at the edge with the number."""
    low, high = axes.get_ylim()
    if low <= ratio <= high:
        axes.plot(x, ratio, shape, color=colour, **look)
        return
    up = ratio > high
    edge, way = (high, "^") if up else (low, "v")
    axes.plot(x, edge, way, color=colour, clip_on=False, **{**look, "markersize": 6})
    if shape == "_":  # of the mean; its seeds lie around it
        axes.annotate(
            f"{ratio:.3g}x",
            (x, edge),
            xytext=(5, -2 if up else 2),
            textcoords="offset points",
            va="top" if up else "bottom",
            fontsize=7,
        )
