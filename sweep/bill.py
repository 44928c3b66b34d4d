"""What does a plan cost, stage by stage? The sums over its rows, and the priced table that a person reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from models.config import STAGES
from sweep import arrow, rundir
from sweep.grid import Grid

# FLOPs by part: name here -> column of the plan
SOURCES = {
    "flops_train": "flops_paid",
    "flops_data": "flops_data",
    "flops_encode": "flops_encode",
    "flops_sample": "flops_sample",
    "flops_measure": "flops_measure",
}


@dataclass
class Stage:
    """Sums over the rows of one stage; FLOPs by part."""

    runs: int = 0
    done: int = 0
    params_core: tuple[int, int] = (0, 0)
    params_total: tuple[int, int] = (0, 0)
    flops_train: float = 0.0
    flops_data: float = 0.0
    flops_encode: float = 0.0
    flops_sample: float = 0.0
    flops_measure: float = 0.0
    hours: tuple[float, float] = (0.0, 0.0)
    hours_left: tuple[float, float] = (0.0, 0.0)
    mem_gib: float = 0.0
    disk_gib: float = 0.0
    measured: int = 0  # rows priced by measured throughput

    @classmethod
    def total(cls, stages: Iterable[Stage]) -> Stage:
        """The sums over several stages."""
        total = cls()
        for stage in stages:
            total += stage
        return total

    def __iadd__(self, other: Stage) -> Stage:
        for name in ("params_core", "params_total"):
            (low, high), (least, most) = getattr(self, name), getattr(other, name)
            setattr(self, name, (min(low, least) if self.runs else least, max(high, most)))
        for name in ("hours", "hours_left"):
            (low, high), (more_low, more_high) = getattr(self, name), getattr(other, name)
            setattr(self, name, (low + more_low, high + more_high))
        self.mem_gib = max(self.mem_gib, other.mem_gib)
        for name in ("runs", "done", "measured", "disk_gib", *SOURCES):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def bill(rows: pa.Table, study: Path, states: dict[str, dict[str, Any]]) -> dict[str, Stage]:
    """The sums by stage; ``states`` holds the recorded status of runs of ``study`` that have one."""
    names = [
        "params_core",
        "params_total",
        "gpu_h_low",
        "gpu_h_high",
        "mem_gib",
        "disk_gib",
        "price",
        *SOURCES.values(),
    ]
    figures = rows.select(names)
    stages: dict[str, Stage] = {
        stage: _stage(figures.filter(_among(rows["stage"], [stage])))
        for stage in STAGES
        if stage in rows["stage"].unique().to_pylist()
    }
    known = rows.filter(_among(rows["run_id"], list(states)))
    for row in known.select(["run_id", "stage", "points", "encode", "gpu_h_low", "gpu_h_high"]).to_pylist():
        status, stage = states[row["run_id"]], stages[row["stage"]]
        if rundir.finished(study, status, row["points"] or [], row["encode"] or []):
            low, high = stage.hours_left
            stage.hours_left = (
                _less(low, row["gpu_h_low"], stage.hours[0]),
                _less(high, row["gpu_h_high"], stage.hours[1]),
            )
            stage.done += status["state"] == "done"
    return stages


def _less(left: float, done: float, whole: float) -> float:
    """What is left when ``done`` goes off; what is but rounding of the whole is nothing."""
    return left - done if left - done > 1e-9 * whole else 0.0


def _among(column: pa.ChunkedArray, values: list[str]) -> pa.ChunkedArray:
    return pc.is_in(column, arrow.column(values, pa.string()))  # a Python value here would load pandas


def _stage(rows: pa.Table) -> Stage:
    def total(name: str) -> float:
        return float(pc.sum(rows[name]).as_py() or 0.0)

    def span(name: str) -> tuple[Any, Any]:
        ends = pc.min_max(rows[name]).as_py()
        return ends["min"], ends["max"]

    hours = total("gpu_h_low"), total("gpu_h_high")
    flops: dict[str, Any] = {name: total(column) for name, column in SOURCES.items()}
    return Stage(
        runs=rows.num_rows,
        params_core=span("params_core"),
        params_total=span("params_total"),
        hours=hours,
        hours_left=hours,
        mem_gib=span("mem_gib")[1],
        disk_gib=total("disk_gib"),
        measured=int(pc.sum(_among(rows["price"], ["measured"])).as_py()),
        **flops,
    )


def show(grid: Grid, stages: dict[str, Stage], removed: int, warnings: list[str]) -> None:
    """Print the bill, how many points the filters took out, and the warnings."""
    from rich.console import Console
    from rich.table import Table

    price, total = grid.price, Stage.total(stages.values())
    columns = [*stages.items(), ("all", total)]
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{grid.study}: {grid.file}", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right")
    lines: list[tuple[str, Callable[[Stage], str]]] = [
        ("runs", lambda stage: f"{stage.runs:,}"),
        ("  of these done", lambda stage: f"{stage.done:,}" if stage.done else ""),
        ("parameters, core", lambda stage: _range(stage.params_core)),
        ("parameters, total", lambda stage: _range(stage.params_total)),
        ("FLOPs of training", lambda stage: _flops(stage.flops_train)),
        ("  making images", lambda stage: _flops(stage.flops_data)),
        ("  encoding", lambda stage: _flops(stage.flops_encode)),
        ("  sampling", lambda stage: _flops(stage.flops_sample)),
        ("  measuring", lambda stage: _flops(stage.flops_measure)),
        (f"{price.device}-hours", lambda stage: _hours(stage.hours)),
        ("  as measured", lambda stage: f"{stage.measured:,} runs" if stage.measured else ""),
        ("GiB of memory", lambda stage: _amount(stage.mem_gib)),
        ("GiB of disk", lambda stage: _amount(stage.disk_gib)),
    ]
    for name, cell in lines:
        if any(cells := [cell(stage) for _, stage in columns]):
            table.add_row(name, *cells)
    console.print(table)
    low, high = total.hours_left
    wall = _hours((low / price.devices, high / price.devices))
    console.print(
        f"To do: {_hours((low, high))} {price.device}-hours, {wall} hours on {price.devices}, at "
        f"{price.mfu[0]:.0%}–{price.mfu[1]:.0%} of {price.peak_tflops:g} TFLOP/s or as measured on runs that are done."
    )
    if removed:
        console.print(f"{removed:,} point{'s' if removed > 1 else ''} left out by filters.")
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow")


def _flops(value: float) -> str:
    return f"{value:.2e}".replace("e+", "e") if value else ""


def _range(span: tuple[int, int]) -> str:
    low, high = (_short(value) for value in span)
    return low if low == high else f"{low}–{high}"


def _short(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _amount(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def _hours(span: tuple[float, float]) -> str:
    low, high = (_amount(value) for value in span)
    return low if low == high else f"{low}–{high}"
