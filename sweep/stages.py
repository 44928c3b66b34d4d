"""What does the Snakefile have to know of a study? Its folder, planned again when the grid changed, and its stages."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from sweep import given, rundir, tables


class Stage(NamedTuple):
    """What ``sweep.launch`` is called with, and after which others."""

    stage: str
    of: str | None = None


# Rules in the order in which their runs need each other. The gate measures tokenizers before generators train.
RULES: dict[str, Stage] = {
    "encoder": Stage("encoder"),
    "probe": Stage("evaluation", "encoder"),
    "tokenizer": Stage("tokenizer"),
    "gate": Stage("evaluation", "tokenizer"),
    "representation": Stage("representation"),
    "generator": Stage("generator"),
    "evaluation": Stage("evaluation", "generator"),
}


def ensure(grid: str, results: str) -> Path:
    """The study of a grid file, planned if there is no plan of it as it is now; ValueError in one line.

    What the plan warns of is printed once, when it is made.
    """
    try:
        text = Path(grid).read_bytes()
    except OSError as error:
        raise ValueError(f"{grid}: {error.strerror}") from None
    if (study := _named(text, results)) is not None and _planned(study, text):
        return study
    from sweep import plan  # only when it is needed: it reads the grid with pydantic

    planned = plan.plan(plan.load(grid), results)
    if refusal := planned.refusal():
        raise ValueError(refusal)
    if plan.write(planned):
        for warning in planned.warnings:
            print(f"{grid}: {warning}", file=sys.stderr)
    return planned.study


def _named(text: bytes, results: str) -> Path | None:
    """The folder that a grid names; None where only a full reading can say what is wrong with it."""
    try:
        held = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    name = held.get("study") if isinstance(held, dict) else None
    return Path(results) / name if isinstance(name, str) else None


def _planned(study: Path, text: bytes) -> bool:
    try:
        lock = json.loads(rundir.lock_file(study).read_text())
        same = lock["grid_sha256"] == hashlib.sha256(text).hexdigest() and lock["version"] == tables.VERSION
        same = same and given.same(lock.get("given"), text.decode())
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(same) and rundir.plan_file(study).is_file()


def stamps(study: Path) -> dict[str, str]:
    """The stamp of each rule that has runs in the plan, in order."""
    rows = tables.plan(study, ["stage", "checkpoint"])
    present = {(row["stage"], (row["checkpoint"] or " ")[0].strip()) for row in rows}
    return {
        rule: str(rundir.stamp_file(study, stage, of))
        for rule, (stage, of) in RULES.items()
        if (stage, of[0] if of else "") in present
    }


def captions(study: Path) -> dict[str, str]:
    """What the figures say of themselves, by file name, as reStructuredText."""
    return {path.stem: _plain(path.read_text()) for path in sorted((study / "figures").glob("*.txt"))}


def _plain(text: str) -> str:
    for mark in "\\*`|_":
        text = text.replace(mark, "\\" + mark)
    return text
