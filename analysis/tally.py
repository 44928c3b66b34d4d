"""How many rows count? Rows dropped, rows of one protocol, answers all refused: the same words in all commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import table
from analysis.refusal import Refusal


def counted(count: int, nouns: str) -> str:
    """A number of things, of which one is no plural: 1 cut-off, 3 cut-offs."""
    return f"{count} {nouns.removesuffix('s') if count == 1 else nouns}"


def dropped(lacking: Mapping[str, NDArray[np.bool_]], things: str = "rows") -> str:
    """What is said of rows left out, from the flags [n] of rows that lack a column; empty where there are none."""
    names = [name for name, flags in lacking.items() if flags.any()]
    if not names:
        return ""
    count = int(np.logical_or.reduce([lacking[name] for name in names]).sum())
    return f"{counted(count, things)} dropped: no value of {', '.join(names)}"


def protocol(frame: pl.DataFrame, names: Sequence[str], used: Sequence[str]) -> dict[str, str]:
    """The one value of each column of --protocol; ``used``: columns that are there for something else.

    Raises ``TableError`` for a column that is not there, ``Refusal`` (no_protocol: missing in some rows;
    mixed_protocols, as ``analysis.table.alike``).
    """
    named = [] if list(names) == ["none"] else names
    for name in named:
        if missing := table.column(frame, name, "--protocol").null_count():
            raise Refusal("no_protocol", f"{name} is missing in {missing} of {counted(len(frame), 'rows')}")
    table.alike(frame, names, used)
    return {name: table.labels(frame, [name], "--protocol")[0] for name in named}


def refused(refusals: Sequence[Mapping[str, str] | None]) -> dict[str, str] | None:
    """Code and sentence for a command of which every answer was refused; None where one was not."""
    told = [each for each in refusals if each is not None]
    if not told or len(told) < len(refusals):
        return None
    alike = all(each == told[0] for each in told)
    sentence = told[0]["sentence"] if alike else f"all {len(told)} answers; the first: {told[0]['sentence']}"
    return {"code": told[0]["code"], "sentence": sentence}
