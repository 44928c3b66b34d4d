"""What will not come out of a study although it can run? Warnings, as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from models import config
from sweep.design import Run
from sweep.grid import Grid

WEIGHTS = Path(config.__file__).parent / "weights"
RATES = 5  # different rates that a law in rate needs
COLLINEAR = 0.98  # correlation of log N and log D beyond which their exponents are one


def identifiability(grid: Grid, runs: dict[str, Run]) -> list[str]:
    """Laws and contrasts that the design cannot support."""
    found: list[str] = []
    tokenizers = [run for run in runs.values() if run.stage == "tokenizer"]
    rates = {(run.variant.latent.tokens, run.variant.latent.codebook) for run in tokenizers}
    if "rate" in grid.laws and len(rates) < RATES:
        rated = f"{len(rates)} rate{'' if len(rates) == 1 else 's'}"
        found.append(f"tokenizer: {rated}; a law in rate needs {RATES} or more and will not be identifiable.")
    for stage in ("encoder", "tokenizer"):
        seeds: dict[str, set[int]] = {}
        for run in runs.values():
            if run.stage == stage:
                built = " + ".join(point.run.variant.named for point in run.upstream.values())
                seeds.setdefault(f"{built} > {run.variant.named}" if built else run.variant.named, set()).add(run.seed)
        single = [name for name, given in seeds.items() if len(given) == 1]
        if len(seeds) > 1 and single:
            found.append(
                f"{stage}: a single seed of {single[0]} ({len(single)} of {len(seeds)} {stage}s have one); contrasts "
                f"between {stage}s resample their seeds and will be refused."
            )
    if "compute" in grid.laws:
        found += _collinear(run for run in runs.values() if run.stage == "generator")
    return found


def _collinear(generators: Iterable[Run]) -> list[str]:
    """Tokenizers on which model size and training length cannot be told apart."""
    points: dict[str, set[tuple[float, float]]] = {}
    steps: dict[tuple[int, ...], set[int]] = {}  # seeds of a setting ask for the same
    for run in generators:
        setting = id(run.variant), *(id(point.run.variant) for point in run.upstream.values())
        known = steps.setdefault(setting, set())
        if not run.points.keys() <= known:
            known |= run.points.keys()
            built = " + ".join(point.run.variant.named for point in run.upstream.values())
            size, batch = math.log(max(run.variant.counts.params_core, 1)), run.variant.recipe.batch
            points.setdefault(built, set()).update((size, math.log(step * batch)) for step in known)
    reasons = {built: reason for built, group in points.items() if (reason := inseparable(sorted(group)))}
    if not reasons:
        return []
    built, reason = next(iter(reasons.items()))
    return [
        f"generator{f' on {built}' if built else ''}: {reason} ({len(reasons)} of {len(points)} designs); N and D "
        "cannot be told apart and a law in both will not be identifiable."
    ]


def inseparable(points: list[tuple[float, float]]) -> str:
    """Why log N and log D are collinear over these points; empty when they are not."""
    n, d = ([point[axis] for point in points] for axis in (0, 1))
    if len(set(n)) == 1 or len(set(d)) == 1:
        return "a single model size" if len(set(n)) == 1 else "a single training length"
    mean_n, mean_d = sum(n) / len(n), sum(d) / len(d)
    cross = sum((a - mean_n) * (b - mean_d) for a, b in points)
    correlation = cross / math.sqrt(sum((a - mean_n) ** 2 for a in n) * sum((b - mean_d) ** 2 for b in d))
    return f"log N and log D correlate at {correlation:+.3f}" if abs(correlation) > COLLINEAR else ""


def missing(grid: Grid) -> list[str]:
    """Files that the study needs and that are not here."""
    found: list[str] = []
    root = getattr(grid.data, "root", None)
    if root is not None and not Path(root).is_dir():
        found.append(f"data.root: the folder {root} is not here; the runs will need it.")
    names = {name for evaluation in grid.evaluations for name in evaluation.protocol.extractors}
    for name in sorted(names):
        if (file := weights_file(name)) is not None and not file.is_file():
            found.append(f"extractor {name}: the weights {file} are not here; the evaluations will need them.")
    return found


def weights_file(extractor: str) -> Path | None:
    """The weights file of an extractor, embedded or named by its path; None where it is loaded otherwise."""
    known = config.EXTRACTORS.get(extractor)
    if known is not None:
        return WEIGHTS / known.weights if known.weights else None
    path = extractor.rpartition(":")[2]
    return Path(path) if "/" in path else None
