"""Which runs would narrow an interval most for what they cost? The next grid, priced.

    python -m analysis.frontier results/digits --propose                            # for the best rate's exponent
    python -m analysis.frontier results/digits --propose --narrow crossing --hours 2

Every addition to the study's own grid is planned (``python -m sweep.plan --dry-run --json`` prices it and says which
points it measures); how wide the interval will be then is expected by ``analysis.target``. The grid with the addition
that narrows most per device-hour is written beside the study. What an addition costs is what the plan costs more than
before it: runs that are there already are not charged again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from analysis import addition
from analysis.addition import Draft
from analysis.amendment import AmendmentError, read
from analysis.arms import Arm, words
from analysis.curves import Law, law
from analysis.interval import short
from analysis.load import StudyError
from analysis.refusal import Refusal
from analysis.study import Study
from analysis.target import Design, Narrow, Scatter, Target, misses, scatter, target

FILE = "proposal.yaml"
MARK = "# Proposed by analysis.frontier --propose: "  # how a file starts that may be written over


class Plan(NamedTuple):
    """What ``sweep.plan`` says of a grid."""

    designs: dict[str, Design]  # by rate label of the study, else as the plan calls the rate
    rows: int
    hours: tuple[float, float]
    device: str
    refused: str | None  # a limit of the grid's own


@dataclass(frozen=True)
class Addition:
    """One thing more, what it costs, and how wide the interval will be with it."""

    draft: Draft
    rows: int  # more than before
    hours: tuple[float, float]
    width: float | None  # None: there will be no interval
    shrinkage: float  # share by which it is narrower than before; 0 where there was none before
    refused: str | None

    @property
    def rate(self) -> float:
        """Shrinkage per device-hour at the high price."""
        return self.shrinkage / max(self.hours[1], 1e-12)


def propose(
    held: Study,
    metric: str,
    arms: Sequence[Arm],
    narrow: Narrow,
    hours: float | None = None,
    out: str | None = None,
) -> None:
    """Prints what could be added and writes the next grid.

    ``Refusal`` where no law could be fitted, StudyError for a grid or an option that cannot be used.
    """
    if hours is not None and not hours > 0:
        raise StudyError(f"--hours: got {hours:g}; allowed: a number of device-hours above 0")
    source = held.folder / "grid.yaml"
    path = destination(held.folder, source, out)
    try:
        text = source.read_text()
        read(text)
    except (OSError, UnicodeDecodeError, AmendmentError) as error:
        raise StudyError(f"{source}: {getattr(error, 'strerror', None) or error}; it is the grid to add to") from None
    laws, reasons = fitted(arms)
    if not laws:
        raise Refusal("too_few", f"no law could be fitted ({'; '.join(reasons) or 'no rate has a curve'})")
    aim, scattered = target(arms, laws, narrow), scatter(arms, laws)
    drafts = addition.drafts(text, held, arms, laws)
    runs = [draft for draft in drafts if draft.kind == "optimum"]
    drafts = [draft for draft in drafts if draft.kind != "optimum"]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.yaml" for i in range(len(drafts) + 1)]
        before = planned(files[0], text, held, source)
        if lacking := [each.rate for each in arms if each.rate not in before.designs]:
            raise StudyError(
                f"{source}: plans no generators on {lacking[0]}, which were measured; plan the study again"
            )
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            tried = list(pool.map(lambda file, each: _tried(file, each.text, held, source), files[1:], drafts))
        for draft in runs:  # the nearest size that the grid's filters keep
            plan = _tried(files[0], draft.text, held, source)
            if isinstance(plan, Plan) or draft is runs[-1]:
                drafts, tried = [*drafts, draft], [*tried, plan]
                break
    width = aim.width(before.designs, scattered)
    added: list[Addition] = []
    left_out = []
    for draft, plan in zip(drafts, tried, strict=True):
        if isinstance(plan, str):
            left_out.append(f"{draft.words}: {plan}")
        elif plan.designs == before.designs:
            left_out.append(f"{draft.words}: measures nothing more")
        else:
            added.append(_addition(draft, plan, before, aim, width, scattered))
    kind = aim.first[0] if aim.first else None
    added.sort(key=lambda each: (each.draft.kind != kind, -each.rate, each.hours[1]))
    for line in _told(held, metric, aim, width, scattered, before, added):
        print(line)
    for line in left_out:
        print(f"Left out: {line}")
    for line in misses(laws):
        print(f"Not narrowed by seeds: {line}.")
    useful = [each for each in added if each.draft.kind == kind] if kind else [each for each in added if each.rate > 0]
    if not useful:
        raise Refusal("too_few", f"nothing that was tried narrows the {aim.words}")
    chosen = next((each for each in useful if not each.refused and each.hours[1] <= (hours or math.inf)), None)
    if chosen is None:
        least = min(useful, key=lambda each: (each.refused is not None, each.hours[1]))
        if least.refused:
            raise StudyError(f"{source}: {least.draft.words}: {least.refused}")
        needed = f"{short(least.hours[1])} {before.device}-hours or more ({least.draft.words})"
        raise StudyError(f"--hours: got {hours:g}; allowed: {needed}")
    _write(path, f"{MARK}{chosen.draft.words}\n{chosen.draft.text}")
    if chosen.draft.longer:
        print("Evaluations of the last point of a run move to its new one; those of the old one leave the plan.")
    print(f"wrote {path}: {chosen.draft.words}; python -m sweep.plan {path} plans it")


def fitted(arms: Sequence[Arm]) -> tuple[dict[str, Law], list[str]]:
    """The law of every rate, and why the others have none."""
    found: dict[str, Law] = {}
    reasons = []
    for each in arms:
        try:
            found[each.rate] = law(each)
        except Refusal as refusal:
            reasons.append(f"{each.rate}: {refusal.sentence}")
    return found, reasons


def _addition(draft: Draft, plan: Plan, before: Plan, aim: Target, width: float | None, scattered: Scatter) -> Addition:
    then = aim.width(plan.designs, scattered)
    low, high = (max(a - b, 0.0) for a, b in zip(plan.hours, before.hours, strict=True))
    shrinkage = 0.0 if then is None or width is None else 1 - then / width
    return Addition(draft, plan.rows - before.rows, (low, high), then, shrinkage, plan.refused)


# --- the planner -----------------------------------------------------------------------------------------------


def _tried(file: Path, text: str, held: Study, source: Path) -> Plan | str:
    """The plan of a grid, or what the planner says against it."""
    try:
        return planned(file, text, held, source)
    except StudyError as error:
        return str(error).removeprefix(f"{source}: ")


def planned(file: Path, text: str, held: Study, source: Path) -> Plan:
    """What ``sweep.plan`` says of a text, priced against the study's results; StudyError for a grid that is none."""
    file.write_text(text)
    command = [sys.executable, "-m", "sweep.plan", str(file), "--results", str(held.folder.resolve().parent)]
    run = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True, check=False)
    if run.returncode not in (0, 3):  # 3: beyond a limit of the grid, all the same priced
        said = (run.stderr.strip().splitlines() or ["sweep.plan failed without a word"])[-1]
        raise StudyError(said.replace(str(file), str(source)))
    told = json.loads(run.stdout)
    labels = dict(held.points.select("tokenizer", "rate").unique().iter_rows())
    designs = {}
    for curve in (told["expected"] or {"curves": []})["curves"]:
        known = [labels[name] for name in curve["tokenizers"] if name in labels]
        seeds, runs = len(curve["tokenizer_seeds"]), curve["generator_seeds"]
        designs[known[0] if known else curve["rate"]] = Design(curve["bits"], tuple(curve["budgets"]), seeds, runs)
    low, high = told["total"]["hours"]
    return Plan(designs, told["rows"], (low, high), told["device"], told["refused"])


# --- words and files -------------------------------------------------------------------------------------------


def _told(
    held: Study,
    metric: str,
    aim: Target,
    width: float | None,
    scattered: Scatter,
    before: Plan,
    added: Sequence[Addition],
) -> list[str]:
    """What is to be narrowed, and the table of additions, best first."""
    expected = "no interval" if width is None else aim.say(width)
    seeds = "unknown, as there is one" if scattered.seed is None else f"{100 * scattered.seed:.2g} %"
    if scattered.seed == 0:
        seeds = "no more than that explains"
    lines = [
        f"{held.name}, {words(metric)}, {aim.words}: {aim.now}; expected of this design: {expected}.",
        f"Points scatter by {100 * scattered.point:.2g} % about their curves, tokenizer seeds by {seeds}.",
    ]
    if held.planned > len(held.points):
        lines.append(f"{held.progress}; the others count as if they were there.")
    if aim.first:
        lines.append(f"One more {aim.first[0]} comes first: {aim.first[1]}.")
    head = ("addition", "runs", f"{before.device}-hours", "expected", "narrower by")
    rows = [head, *(_row(each, aim, width) for each in added)]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [
            cell.ljust(size) if i == 0 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(each: Addition, aim: Target, width: float | None) -> tuple[str, ...]:
    low, high = (short(hours) for hours in each.hours)
    price = low if low == high else f"{low}–{high}"
    expected = "no interval" if each.width is None else aim.say(each.width)
    gains = ("" if width is None or each.width is None else f"{each.shrinkage:.0%}",)  # in the order of gain per hour
    return (each.draft.words, f"{each.rows:+d}", price + (" (too dear)" if each.refused else ""), expected, *gains)


def destination(folder: Path, source: Path, out: str | None) -> Path:
    """Where the proposal goes; StudyError for a file that is somebody's grid."""
    path = Path(out) if out else folder / FILE
    if not path.exists():
        return path
    taken = f"--out: got {path}; allowed: a new file, or a proposal that is not planned yet"
    try:
        held = path.read_bytes()
        lock = json.loads((folder / "plan.lock.json").read_text()) if (folder / "plan.lock.json").exists() else {}
    except (OSError, ValueError):
        raise StudyError(taken) from None
    in_use = lock.get("grid_sha256") == hashlib.sha256(held).hexdigest()
    if path.resolve() == source.resolve() or in_use or not held.startswith(MARK.encode()):
        raise StudyError(taken)
    return path


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    staged = path.with_name(f".{path.name}.tmp")
    try:
        staged.write_text(text)
        staged.replace(path)
    except OSError as error:
        raise StudyError(f"--out: got {path}; {error.strerror}") from None
