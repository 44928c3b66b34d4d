"""What does the Snakefile have to know of a study? Its folder, planned again when the grid changed, and its stages."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    if {"{", "}"} & set(results):
        raise ValueError(f"results: got {results}; allowed: a path without braces, which Snakemake takes for wildcards")
    try:
        text = Path(grid).read_bytes()
        if (study := _named(text, results)) is not None and _planned(study, text):
            return study
        from sweep import plan  # only when it is needed: it reads the grid with pydantic

        planned = plan.plan(plan.load(grid), results)
        if refusal := planned.refusal():
            raise ValueError(refusal)
        written = plan.write(planned)
    except OSError as error:
        raise ValueError(f"{error.filename or results}: {error.strerror}") from None
    for warning in planned.warnings if written else ():
        print(f"{grid}: {warning}", file=sys.stderr)
    return planned.study


def _named(text: bytes, results: str) -> Path | None:
    """The folder that a grid names; None where only a full reading can say what is wrong with it."""
    try:
        held = yaml.safe_load(text)
    except Exception:  # YAML's own errors, and those of constructors of odd tags
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


# Resources of a rule that say where its runs are done: their names, which the Slurm executor gave them, and ours.
PLACES = {"slurm_partition": "partition", "slurm_account": "account"}


def place(resources: Mapping[str, Any]) -> str:
    """Options of ``sweep.launch`` from a rule's resources: ``place`` (local, slurm), those in ``PLACES``, ``launch``.

    ``launch`` holds any settings of ``--slurm`` in one string, "time_min=1440 parallel=64"; it wins.
    """
    if (cluster := resources.get("place", "local")) == "local":
        return ""
    settings = [f"{key}={resources[name]}" for name, key in PLACES.items() if resources.get(name)]
    settings += str(resources.get("launch", "")).split()
    return shlex.join(["--cluster", str(cluster), *(("--slurm", *settings) if settings else ())])


def captions(study: Path) -> dict[str, str]:
    """What the figures say of themselves, by file name, as reStructuredText."""
    return {path.stem: _plain(path.read_text()) for path in sorted((study / "figures").glob("*.txt"))}


def _plain(text: str) -> str:
    for mark in "\\*`|_":
        text = text.replace(mark, "\\" + mark)
    return text
