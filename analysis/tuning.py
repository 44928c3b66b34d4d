"""Which training setting suits which size of generator? The best of each sweep, flagged where it lies at an edge."""

from __future__ import annotations

from typing import Any

import polars as pl

from analysis.interval import short

# settings compete at one target, or at one point of a plan by steps
BUDGET = pl.coalesce("flops_target", pl.col("flops_to_point").round_sig_figs(3))
CELL = ("rate", "generator_size", "budget")


def sweeps(points: pl.DataFrame, metric: str) -> pl.DataFrame:
    """The settings that were swept, one row per rate, size, budget and setting, the best of a cell first.

    Columns: rate, generator_size, budget, setting ("lr=0.003"), value (geometric mean of ``metric`` over all
    seeds), runs (points behind it), best, edge (for the best: names of the numbers that are the lowest or the highest
    of their sweep; the optimum may lie outside). A setting that diverged or was measured on fewer seeds than another
    is never the best. Empty where nothing was swept.
    """
    if metric not in points.columns:
        points = points.with_columns(pl.lit(None, pl.Float64).alias(metric))
    known = points.with_columns(BUDGET.alias("budget")).filter(pl.col("setting") != "", pl.col(metric) > 0)
    value, runs = pl.col(metric).log().mean().exp().alias("value"), pl.len().alias("runs")
    table = known.group_by(*CELL, "setting").agg(value, runs)
    fewer = pl.col("runs") < pl.col("runs").max().over(CELL)
    table = table.sort(*CELL, fewer, "value", "setting", nulls_last=True)
    table = table.with_columns((pl.int_range(pl.len()).over(CELL) == 0).alias("best"))
    tried = {cell: rows["setting"].to_list() for cell, rows in table.group_by(CELL)}
    edges = [
        _edges(row["setting"], tried[tuple(row[name] for name in CELL)]) if row["best"] else []
        for row in table.iter_rows(named=True)
    ]
    return table.with_columns(pl.Series("edge", edges, pl.List(pl.String)))


def tuned(points: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """The points whose setting is the best of its sweep (``sweeps``), and those of cells without one."""
    if table.is_empty():
        return points
    lost = table.filter(~pl.col("best")).select(*CELL, "setting")
    on = [*CELL, "setting"]
    known = points.with_columns(BUDGET.alias("budget"))
    return known.join(lost, on=on, how="anti", nulls_equal=True, maintain_order="left").drop("budget")


def _values(setting: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in setting.split(" "))


def _edges(best: str, tried: list[str]) -> list[str]:
    found = []
    for name, text in _values(best).items():
        try:
            values = sorted({float(_values(other)[name]) for other in tried})
        except ValueError:  # words have no edges
            continue
        if len(values) > 1 and float(text) in (values[0], values[-1]):
            found.append(name)
    return found


def sentences(table: pl.DataFrame, metric: str) -> list[str]:
    """The best settings for the report; ``metric`` in words."""
    told = []
    for (rate, size, budget), rows in table.group_by(CELL, maintain_order=True):
        first: dict[str, Any] = rows.row(0, named=True)
        edge = f"; **{', '.join(first['edge'])} at the edge of the sweep**" if first["edge"] else ""
        others = ", ".join(f"{row['setting']} {row['value']:.3g}" for row in rows[1:].iter_rows(named=True))
        told.append(
            f"- {rate}, {size} at {short(float(budget))} FLOPs: {first['setting']}, {metric} {first['value']:.3g}"
        )
        told[-1] += f" ({others}){edge}."
    return told
