"""Which runs does a grid ask for?

Stages are combined in order: every setting of an arm meets every combination of upstream checkpoints, once per seed.
Runs that agree in everything that can change a result are one run. Generators that differ in length only are one
run with several measurement points, unless their schedule needs the length beforehand.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from models import config
from models.config import Latent, Recipe
from sweep import cost, identity
from sweep.document import GridError, blame, build, join
from sweep.grid import TRAINED, Arm, Choice, Grid
from sweep.sections import Source

LIMIT = 5_000_000  # points, or evaluations, of one grid
STEPS = 10**12  # of one run
PARAMS, FLOPS = 10**15, 1e40  # of one module and image: far beyond use, and no product of them overflows


@dataclass(frozen=True)
class Variant:
    """What the seeds of a setting share."""

    arm: Arm
    choice: Choice
    fields: config.Family
    recipe: Recipe
    latent: Latent  # of a tokenizer its own, of others what they see
    counts: cost.Counts
    axes: dict[str, Any]

    # Canonical JSON of what thousands of rows repeat: whole, and as far as it is part of an id.

    @cached_property
    def fields_text(self) -> str:
        return identity.canonical(self.fields.model_dump(mode="json"))

    @cached_property
    def recipe_text(self) -> str:
        return identity.canonical(self.recipe.model_dump(mode="json"))

    @cached_property
    def identities(self) -> tuple[str, str]:
        return identity.canonical(self.fields.identity()), identity.canonical(self.recipe.identity())

    @property
    def flops_per_step(self) -> float:
        return self.counts.training * self.recipe.batch

    @cached_property
    def named(self) -> str:
        """Family, rate or size, and the other axes."""
        words = [self.arm.name]
        rest = dict(self.axes)
        if self.arm.stage == "tokenizer":
            depth = f"{self.latent.channels}c" if self.latent.codebook is None else str(self.latent.codebook)
            words.append(f"{self.latent.tokens}x{depth}")
            rest = {axis: value for axis, value in rest.items() if axis not in ("tokens", "codebook")}
        words += [rest.pop("size")] if "size" in rest else []
        settings = [f"{axis.removeprefix('train.')}={value}" for axis, value in rest.items() if value is not None]
        return " ".join(words + settings)


class Checkpoint(NamedTuple):
    """A run at one of its points."""

    run: Run
    step: int

    @property
    def id(self) -> str:
        return identity.checkpoint_id(self.run.run_id, self.step)


@dataclass(slots=True)
class Run:
    """A run to train: ``points`` maps the steps at which it is measured to the budgets that asked for them."""

    run_id: str
    identity: str  # canonical JSON
    variant: Variant
    seed: int
    upstream: dict[str, Checkpoint]
    lineage: dict[str, Checkpoint]  # upstream and what that was built from
    points: dict[int, float | None]
    longest: bool = True  # False for the shorter runs of a schedule that needs one run per length
    encode: set[int] = field(default_factory=set)

    @property
    def stage(self) -> config.Stage:
        return self.variant.arm.stage

    @property
    def label(self) -> str:
        before = " + ".join(point.run.label for point in self.upstream.values())
        return f"{before} > {self.variant.named} s{self.seed}" if before else f"{self.variant.named} s{self.seed}"

    @property
    def axes(self) -> dict[str, Any]:
        """Every axis that led here, as ``role.axis``."""
        axes: dict[str, Any] = {}
        for role, point in self.lineage.items():
            axes |= {f"{role}.{axis}": value for axis, value in point.run.variant.axes.items()}
        return axes | {f"{self.stage}.{axis}": value for axis, value in self.variant.axes.items()}

    def select(self, points: str) -> list[int]:
        """The steps meant by ``all`` or ``last``."""
        steps = sorted(self.points)
        return steps if points == "all" else steps[-1:] if self.longest else []


class Design(NamedTuple):
    """Trained runs by id in an order in which all can be trained, and how many points the filters took out."""

    runs: dict[str, Run]
    removed: int


def design(grid: Grid) -> Design:
    """All runs to train. GridError where a setting is impossible or a budget cannot be met."""
    runs: dict[str, Run] = {}
    removed = 0
    data = identity.canonical({"family": grid.data_family, **grid.data.identity()})
    for arm in (arm for stage in TRAINED for arm in grid.arms[stage]):
        asked = tried = 0
        combinations = list(_combinations(arm, list(runs.values())))
        for choice in arm.choices():
            variants: dict[Latent | None, Variant] = {}
            for upstream, lineage in combinations:
                seen = _latent_seen(grid, upstream)
                if seen not in variants:
                    variants[seen] = _variant(grid, arm, choice, seen)
                variant = variants[seen]
                if not _matches(arm, variant, upstream):
                    continue
                candidates = _candidates(variant)
                for seed in arm.section.seeds:
                    tried += len(candidates)
                    if tried > LIMIT:
                        raise GridError(arm.key, f"got more than {LIMIT:,} points; allowed: fewer axes or seeds")
                    if any("seed" in arm.upstream[role].match and p.run.seed != seed for role, p in upstream.items()):
                        continue
                    kept = candidates
                    if arm.section.where:
                        kept = [point for point in candidates if _kept(grid, variant, seed, lineage, point)]
                    removed += len(candidates) - len(kept)
                    asked += len(kept)
                    for point in kept:
                        _check(variant, point)
                    _add(runs, data, variant, seed, upstream, lineage, kept)
        if not asked:
            key, what = (
                ("where", "filters that remove") if tried else ("upstream", "sources and matches that leave out")
            )
            raise GridError(f"{arm.key}.{key}", f"got {what} every point; allowed: some left")
    _check_networks(grid, runs)
    return Design(runs, removed)


# --- what a run is built from ----------------------------------------------------------------------------------

Combination = tuple[dict[str, Checkpoint], dict[str, Checkpoint]]


def _combinations(arm: Arm, runs: Sequence[Run]) -> Iterator[Combination]:
    """Upstream checkpoints by role, with their common lineage; roles that disagree on an ancestor are left out."""
    columns = [[(role, point) for point in _points(source, runs)] for role, source in arm.upstream.items()]
    for row in itertools.product(*columns):
        upstream = dict(row)
        lineage: dict[str, Checkpoint] = {}
        agree = True
        for role, point in upstream.items():
            for name, ancestor in {**point.run.lineage, role: point}.items():
                agree &= lineage.setdefault(name, ancestor).id == ancestor.id
        if agree:
            yield upstream, lineage


def _points(source: Source, runs: Sequence[Run]) -> Iterator[Checkpoint]:
    for run in runs:
        if run.stage == source.stage and source.arm in (None, run.variant.arm.name):
            for step in run.select(source.points):
                yield Checkpoint(run, step)


def _matches(arm: Arm, variant: Variant, upstream: dict[str, Checkpoint]) -> bool:
    for role, point in upstream.items():
        for axis in arm.upstream[role].match:
            sides = [_setting(side, axis) for side in (variant, point.run.variant)]
            if axis != "seed" and any(side is None for side in sides):
                raise GridError.got(f"{arm.key}.upstream.{role}.match", axis, "seed, size, or a field of both families")
            if sides[0] != sides[1]:
                return False
    return True


def _setting(variant: Variant, axis: str) -> Any:
    return variant.choice.size if axis == "size" else getattr(variant.fields, axis, None)


def _latent_seen(grid: Grid, upstream: dict[str, Checkpoint]) -> Latent:
    """What a module sees: its tokenizer's latent, or pixels."""
    if "tokenizer" in upstream:
        return upstream["tokenizer"].run.variant.latent
    return Latent(grid.data.resolution, grid.data.resolution, channels=grid.data.channels)


# --- settings --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _asking(arm: Arm, choice: Choice) -> Iterator[None]:
    """What a family says against its own fields, as a GridError."""
    try:
        yield
    except GridError:
        raise
    except OverflowError:
        raise GridError(arm.key, "got sizes whose cost cannot be counted; allowed: smaller ones") from None
    except NotImplementedError:
        allowed = f"a class that implements what models.config.{config.BASES[arm.stage].__name__} asks for"
        raise GridError.got(f"{arm.key}.family", arm.section.family, allowed) from None
    except ValueError as error:
        raise blame(str(error), f"{arm.key}.fields", choice.paths) from None


def _variant(grid: Grid, arm: Arm, choice: Choice, seen: Latent) -> Variant:
    fields = build(arm.family, choice.fields, f"{arm.key}.fields", choice.paths)
    with _asking(arm, choice):
        latent = fields.latent(grid.data) if isinstance(fields, config.TokenizerFields) else seen
        counts = cost.counts(fields, grid.data, latent)
    if not (max(counts.params_core, counts.params_total) < PARAMS and counts.training < FLOPS):
        raise GridError(arm.key, "got sizes whose cost cannot be counted; allowed: smaller ones")
    recipe = _recipe(arm, choice, fields, latent)
    names = sorted(arm.section.axis_names)
    axes: dict[str, Any] = {"size": choice.size} if choice.size is not None else {}
    axes |= {n: getattr(recipe, n[6:]) if n.startswith("train.") else _plain(getattr(fields, n)) for n in names}
    return Variant(arm, choice, fields, recipe, latent, counts, axes)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _recipe(arm: Arm, choice: Choice, fields: config.Family, latent: Latent) -> Recipe:
    """The recipe, rules resolved; an axis (``train.lr``) stands above a rule."""
    known = {**{name: getattr(fields, name) for name in type(fields).model_fields}, "tokens": latent.tokens}
    known |= {"size": choice.size, "codebook": latent.codebook}
    settled = dict(choice.train)
    for name, rule in arm.rules.items():
        if name in settled:
            continue
        key = f"{arm.key}.train.{name}"
        try:
            settled[name] = rule.resolve(known)
        except KeyError as error:
            raise GridError(key, f"got a rule without a value for {error}; allowed: one for every run") from None
        except (OverflowError, ZeroDivisionError, TypeError) as error:
            raise GridError(key, f"got a rule that gives no number ({error}); allowed: a positive number") from None
    return build(Recipe, settled, f"{arm.key}.train", choice.paths)


class Candidate(NamedTuple):
    """A point that a grid asks for, by steps or by a budget."""

    steps: int
    budget: float | None
    key: str


def _candidates(variant: Variant) -> list[Candidate]:
    section, key = variant.arm.section, variant.arm.key
    if section.steps is not None:
        return [Candidate(steps, None, f"{key}.steps[{i}]") for i, steps in enumerate(section.steps)]
    spent = variant.flops_per_step
    if not 0 < spent < math.inf:
        raise GridError(f"{key}.budgets", f"got a family whose step costs {spent:g} FLOPs; allowed: a positive cost")
    return [
        Candidate(round(min(budget / spent, 2.0 * STEPS)), budget, f"{key}.budgets[{i}]")
        for i, budget in enumerate(section.budgets or ())
    ]


def _kept(grid: Grid, variant: Variant, seed: int, lineage: dict[str, Checkpoint], point: Candidate) -> bool:
    """Whether the filters keep a point."""
    images = float(point.steps) * variant.recipe.batch
    unique = cost.images_unique(grid.data, "tokenizer" in lineage)
    tokenizer = lineage.get("tokenizer")
    known = {
        **variant.axes,
        "steps": point.steps,
        "images": images,
        "epochs": images / unique if unique else None,
        "flops_target": point.budget,
        "flops_to_point": point.steps * variant.flops_per_step,
        "params_core": variant.counts.params_core,
        "params_total": variant.counts.params_total,
        "batch": variant.recipe.batch,
        "lr": variant.recipe.lr,
        "seed": seed,
        "size": variant.choice.size,
        "arm": variant.arm.name,
        "tokens": variant.latent.tokens,
        "codebook": variant.latent.codebook,
        "bits_nominal": variant.latent.bits_nominal,
        "tokenizer_seed": tokenizer.run.seed if tokenizer else None,
        "tokenizer_steps": tokenizer.step if tokenizer else None,
    }
    for name, condition in variant.arm.section.where.items():
        try:
            if not condition.holds(known[name]):
                return False
        except TypeError:
            raise GridError.got(
                join(f"{variant.arm.key}.where", name), known[name], "in or not for what is no number"
            ) from None
    return True


def _check(variant: Variant, point: Candidate) -> None:
    """A budget has to buy a step, and whole steps have to spend it."""
    if point.budget is None:
        return
    spent = variant.flops_per_step
    remedy = "or a where that leaves this point out"
    if point.steps > STEPS:
        raise GridError.got(point.key, point.budget, f"at most {STEPS:.0e} steps of {variant.named}, {remedy}")
    if point.steps == 0:
        allowed = f"at least {spent:.3g} FLOPs, one step of {variant.named}, {remedy}"
        raise GridError.got(point.key, point.budget, allowed)
    off, tolerance = point.steps * spent / point.budget - 1, variant.arm.section.tolerance
    if abs(off) > tolerance:
        steps = f"{point.steps} step{'s' if point.steps > 1 else ''} of {variant.named}: {off:+.1%}"
        allowed = f"what whole steps spend within {tolerance:.3g} ({steps}), a larger tolerance, {remedy}"
        raise GridError.got(point.key, point.budget, allowed)


def _add(
    runs: dict[str, Run],
    data: str,
    variant: Variant,
    seed: int,
    upstream: dict[str, Checkpoint],
    lineage: dict[str, Checkpoint],
    kept: list[Candidate],
) -> None:
    """Add the run, or the run per length, to ``runs``; a run that is there already gets the points."""
    if not kept:
        return
    arm, alone = variant.arm, variant.recipe.one_run_per_length
    for group in [[point] for point in kept] if alone else [kept]:
        fields, recipe = variant.identities
        sources = {role: point.id for role, point in upstream.items()}
        steps = group[0].steps if alone else None
        what = identity.trained(arm.stage, arm.section.family, fields, data, recipe, seed, sources, steps)
        run_id = identity.run_id(arm.stage, what)
        points = {point.steps: point.budget for point in group}
        if run_id in runs:
            runs[run_id].points = {**points, **runs[run_id].points}
            continue
        longest = not alone or group[0].steps == max(point.steps for point in kept)
        runs[run_id] = Run(run_id, what, variant, seed, upstream, lineage, points, longest)
        if arm.stage == "generator" and "tokenizer" in upstream:
            upstream["tokenizer"].run.encode.add(upstream["tokenizer"].step)


def _check_networks(grid: Grid, runs: dict[str, Run]) -> None:
    """A network that takes part in training is no measure of it."""
    variants = {id(run.variant): run.variant for run in runs.values()}.values()
    trained = {name: variant.arm.key for variant in variants for name in variant.fields.networks()}
    for evaluation in grid.evaluations:
        for name in evaluation.protocol.extractors:
            where = trained.get(name) or trained.get(name.partition(":/")[0])
            if where is not None:
                allowed = f"an extractor that takes no part in training ({where} uses this one)"
                raise GridError.got(f"{evaluation.key}.extractors", name, allowed)
