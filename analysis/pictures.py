"""What do samples and reconstructions look like? Figures 4 and 5, from the images table alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from analysis import load, study
from analysis.report import Results
from analysis.theme import ASTERISK, WIDTH, Caption, Missing, caption, verdict

SHOWN = 16  # samples per cell of figure 4
CELL = 2.2  # inches, side of a cell of figure 4 at most
COLUMNS = 12  # images per row of figure 5
SIGNS = ("*", "?")  # behind the rates of flagged tokenizers, and of those whose gate was not measured


def _pixels(row: dict[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], row["channels"])


def mosaic(rows: Sequence[dict[str, Any]], columns: int) -> NDArray[np.uint8]:
    """Pictures side by side with a white line between them: [H, W, C] of uint8."""
    pictures = [_pixels(row) for row in rows]
    height, width, channels = pictures[0].shape
    lines = max(1, height // 16)
    count = math.ceil(len(pictures) / columns)
    sheet = np.full((count * (height + lines) - lines, columns * (width + lines) - lines, channels), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + lines), (i % columns) * (width + lines)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def _show(axes: Axes, sheet: NDArray[np.uint8]) -> None:
    gray = sheet.shape[2] == 1
    axes.imshow(
        sheet[..., 0] if gray else sheet, cmap="gray" if gray else None, vmin=0, vmax=255, interpolation="nearest"
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _images(held: study.Study, *kinds: str) -> pl.DataFrame:
    frame = load.table(held.folder, "images").filter(pl.col("kind").is_in(kinds))
    if frame.is_empty():
        raise Missing(f"no {kinds[0]} has been stored yet")
    return frame


def samples(results: Results) -> tuple[Figure, Caption]:
    """Samples of every rate and generator size at its largest compute."""
    held = results.held
    frame = _images(held, "sample")
    points = held.points.filter(pl.col("run_id").is_in(frame["run_id"].unique().to_list()))
    if points.is_empty():
        raise Missing("no unguided sample has been stored yet")
    rates = study.arms(points)
    sizes = points.sort("params_core", nulls_last=True)["generator_size"].unique(maintain_order=True).to_list()
    side = min(WIDTH / len(sizes), CELL)
    figure, grid = plt.subplots(
        len(rates), len(sizes), figsize=(side * len(sizes) + 0.3, side * len(rates) + 0.3), squeeze=False
    )
    figure.set_layout_engine("compressed", wspace=0.04, hspace=0.04)
    for i, rate in enumerate(rates):
        for j, size in enumerate(sizes):
            axes = grid[i][j]
            cell = points.filter(pl.col("rate") == rate, pl.col("generator_size") == size)
            cell = cell.sort("tokenizer_seed", "generator_seed", "evaluation_seed", pl.col("flops_to_point").neg())
            if cell.is_empty():
                axes.set_axis_off()
                continue
            chosen = cell.row(0, named=True)
            rows = frame.filter(pl.col("run_id") == chosen["run_id"]).head(SHOWN)
            _show(axes, mosaic(rows.to_dicts(), math.isqrt(SHOWN)))
            value = chosen.get(held.main)
            if value is not None:
                axes.set_xlabel(f"gFID {value:.3g}", fontsize=7.5, labelpad=2)
            if i == 0:
                axes.set_title(size, loc="center")
            if j == 0:
                axes.set_ylabel(rate + ASTERISK[verdict([chosen["tokenizer_gate"]])], fontweight="bold")
    text = (
        "Samples at the largest compute of each generator size (columns) and tokenizer rate (rows), of the first "
        "tokenizer seed, one of each class in turn, not chosen. Below each, gFID of all samples of that checkpoint."
    )
    return figure, caption(results, "Samples", text, len(frame), extractors=held.extractors[:1], marks=SIGNS)


def reconstructions(results: Results) -> tuple[Figure, Caption]:
    """The same held-out images through every tokenizer."""
    held = results.held
    frame = _images(held, "reconstruction", "original")
    codes = held.codes.filter(pl.col("tokenizer").is_in(frame["checkpoint"].unique().to_list()))
    if codes.is_empty():
        raise Missing("no reconstruction by a tokenizer that generators use has been stored yet")
    main = f"rfid_{held.extractors[0]}" if held.extractors else ""
    codes = codes.sort("bits_nominal", "tokens", "tokenizer_seed", nulls_last=True)
    first = codes.unique(subset="rate", keep="first", maintain_order=True)
    here = frame.filter(pl.col("checkpoint") == first["tokenizer"][0])
    originals = here.filter(pl.col("kind") == "original").sort("index").unique(subset="index", maintain_order=True)
    shown = originals["index"].head(COLUMNS).to_list()
    rows = [("original", "", originals)]
    for row in first.iter_rows(named=True):
        made = frame.filter(pl.col("checkpoint") == row["tokenizer"], pl.col("kind") == "reconstruction").sort("index")
        value = f"rFID {row[main]:.3g}" if row.get(main) is not None else ""
        rows.append((row["rate"] + ASTERISK[verdict([row["gate"]])], value, made))
    rows = [row for row in rows if not row[2].is_empty()]
    count = max(len(shown), 1)
    figure, grid = plt.subplots(
        len(rows), 1, figsize=(WIDTH, 0.3 + len(rows) * (WIDTH - 1.6) / count * 1.08), squeeze=False
    )
    figure.set_layout_engine("compressed")  # pictures keep their shape; the labels at both sides need the room
    for axes, (name, value, pictures) in zip(grid[:, 0], rows, strict=True):
        wanted = pictures.unique(subset="index", keep="first", maintain_order=True)
        if shown:
            wanted = wanted.filter(pl.col("index").is_in(shown))
        _show(axes, mosaic(wanted.head(COLUMNS).to_dicts(), min(COLUMNS, len(wanted))))
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontweight="bold")
        if value:
            axes.annotate(value, (1.015, 0.5), xycoords="axes fraction", va="center", annotation_clip=False, fontsize=8)
    text = (
        f"{len(shown)} held-out images (top) and what each tokenizer makes of them, by rate, first tokenizer seed. "
        "rFID: decoded against real held-out images."
    )
    used = held.extractors[:1] if any(value for _, value, _ in rows) else ()
    return figure, caption(results, "Reconstructions", text, len(shown), of="tokenizer", extractors=used, marks=SIGNS)
