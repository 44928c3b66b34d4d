"""What does the plan say about each run? The rows of plan.parquet, priced, each with the config that a worker needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from models.config import Protocol, Runtime, TokenizerFields, steps_paid
from sweep import cost, identity
from sweep.advice import weights_file
from sweep.design import LIMIT, Checkpoint, Design, Run
from sweep.document import GridError
from sweep.given import file_hash
from sweep.grid import Evaluation, Grid
from sweep.identity import assemble, canonical
from sweep.schema import PLAN

Row = dict[str, Any]


def rows(grid: Grid, planned: Design, rates: cost.Rates) -> Iterator[Row]:
    """Rows with the columns of ``sweep.schema.PLAN``: all runs to train, in an order that works, then evaluations."""
    table = _Rows(grid, rates)
    for run in planned.runs.values():
        yield table.trained(run)
    seen: set[str] = set()  # two sections may ask for the same measurement
    for run in planned.runs.values():
        for evaluation in grid.evaluations:
            for row in table.evaluations(run, evaluation):
                if len(seen) >= LIMIT:
                    raise GridError("evaluation", f"got more than {LIMIT:,} of them; allowed: fewer points or seeds")
                if row["run_id"] not in seen:
                    seen.add(row["run_id"])
                    yield row


class _Rows:
    """Builds rows; what several of them share is computed, and encoded as JSON, once."""

    def __init__(self, grid: Grid, rates: cost.Rates) -> None:
        self.grid, self.rates = grid, rates
        self.data = canonical({"family": grid.data_family, **grid.data.model_dump(mode="json")})
        self.data_identity = canonical({"family": grid.data_family, **grid.data.identity()})
        self.empty: Row = dict.fromkeys(PLAN)
        self.runtimes: dict[Runtime, str] = {}  # as JSON
        self.settings: tuple[Run, Row, dict[str, str]] | None = None
        self.trunk: tuple[Run, Row, dict[str, str]] | None = None
        self.measuring: dict[tuple[int, int, str], tuple[cost.Measuring, float]] = {}
        self.referred: set[tuple[int, tuple[str, ...]]] = set()
        self.protocols: dict[str, tuple[str, str, dict[str, str]]] = {}

    # --- what rows share ---

    def trains(self, run: Run) -> Runtime:
        """How a run is trained: its parameters divided over its devices or not, alone on a device or not."""
        variant, device_gib = run.variant, self.grid.price.mem_gib
        runtime = cost.sharding(variant.counts, variant.recipe, variant.arm.runtime, device_gib)
        flops = variant.flops_per_step * max(run.points)
        hours = self.price(run, run.stage, flops)["gpu_h_high"] / runtime.devices
        return cost.packing(runtime, cost.memory_training(variant.counts, variant.recipe, runtime), hours, device_gib)

    def runtime(self, runtime: Runtime) -> str:
        if runtime not in self.runtimes:
            self.runtimes[runtime] = canonical(runtime.model_dump(mode="json"))
        return self.runtimes[runtime]

    def setting(self, run: Run) -> tuple[Row, dict[str, str]]:
        """Columns, and parts of the config as JSON, that the seeds of a setting and their evaluations share."""
        if self.settings is not None and _alike(run, self.settings[0]):
            return self.settings[1:]
        variant, tokenizer = run.variant, run.lineage.get("tokenizer")
        row = self.empty | {
            "study": self.grid.study,
            "stage": run.stage,
            "family": variant.arm.section.family,
            "data": self.grid.data_family,
            "fields": variant.fields_text,
            "recipe": variant.recipe_text,
            "params_core": variant.counts.params_core,
            "params_total": variant.counts.params_total,
            "batch": variant.recipe.batch,
            "lr": variant.recipe.lr,
            "axes": canonical(run.axes),
            "flags": _flags(run),
            "flops_upstream": sum(_flops(point) for point in {p.run.run_id: p for p in run.lineage.values()}.values()),
        }
        if tokenizer is not None:
            row |= {"tokenizer": tokenizer.id, "tokenizer_steps": tokenizer.step} | _tokenizer(tokenizer.run)
        parts = {
            "study": canonical(self.grid.study),
            "family": canonical(variant.arm.section.family),
            "fields": variant.fields_text,
            "data": self.data,
            "runtime": self.runtime(self.trains(run)),
            **{role: _module(point) for role, point in run.lineage.items()},
        }
        self.settings = run, row, parts
        return row, parts

    def own(self, run: Run) -> Row:
        """Columns that name a run and its seed, in its own row and in those of its evaluations."""
        if run.stage == "tokenizer":
            last = max(run.points)
            return {"tokenizer": Checkpoint(run, last).id, "tokenizer_steps": last} | _tokenizer(run)
        if run.stage == "generator":
            arm = run.variant.arm
            names = {"generator": run.run_id, "generator_family": arm.section.family}
            return names | {"generator_size": run.variant.choice.size, "generator_seed": run.seed}
        return {}

    def point(self, run: Run, step: int) -> Row:
        """Columns that say how far a point is."""
        images = float(step) * run.variant.recipe.batch
        unique = cost.images_unique(self.grid.data, _reads_codes(run))
        return {
            "steps": step,
            "images": images,
            "epochs": images / unique if unique else None,
            "flops_target": run.points[step],
            "flops_to_point": step * run.variant.flops_per_step,
        }

    def price(self, run: Run, stage: str, flops: float) -> Row:
        counts = run.variant.counts
        devices = run.variant.arm.runtime.devices if stage == run.stage else 1
        hours = self.rates.hours(stage, run.variant.arm.section.family, counts.params_total, flops, devices)
        return {"flops_total": flops, "gpu_h_low": hours.low, "gpu_h_high": hours.high, "price": hours.source}

    # --- trained runs ---

    def trained(self, run: Run) -> Row:
        shared, parts = self.training(run)
        label = run.label
        own = {
            "run_id": canonical(run.run_id),
            "label": canonical(label),
            "identity": run.identity,
            "seed": str(run.seed),
        }
        config = assemble(parts | own)
        return shared | self.own(run) | {"run_id": run.run_id, "label": label, "seed": run.seed, "config": config}

    def training(self, run: Run) -> tuple[Row, dict[str, str]]:
        """What the row and the config of a run share with those of other seeds."""
        last = self.trunk[0] if self.trunk is not None else None
        if last is not None and _alike(run, last) and (run.points, run.encode) == (last.points, last.encode):
            assert self.trunk is not None
            return self.trunk[1:]
        grid, variant = self.grid, run.variant
        points, encode = sorted(run.points), sorted(run.encode)
        pieces = steps_paid(tuple(points), variant.recipe)
        paid = pieces * variant.flops_per_step
        made = 0.0 if _reads_codes(run) else float(pieces) * variant.recipe.batch * grid.data.flops_image
        disk = cost.disk_training(variant.counts, variant.recipe, len(points))
        encoded = 0.0
        if encode:
            encoded = len(encode) * cost.encoding(cast(TokenizerFields, variant.fields), grid.data)
            disk += len(encode) * cost.disk_codes(grid.data, variant.latent)
        row, parts = self.setting(run)
        upstream = {role: point.id for role, point in run.upstream.items()}
        row = row | self.point(run, points[-1]) | self.price(run, run.stage, paid + made + encoded)
        row |= {
            "upstream": list(upstream.values()),
            "points": points,
            "encode": encode,
            "flops_paid": paid,
            "flops_data": made,
            "flops_encode": encoded,
            "mem_gib": cost.memory_training(variant.counts, variant.recipe, self.trains(run)),
            "disk_gib": disk,
        }
        planned = {
            "params_core": variant.counts.params_core,
            "params_total": variant.counts.params_total,
            "flops_per_step": variant.flops_per_step,
            "flops_paid": paid,
            "images_unique": cost.images_unique(grid.data, _reads_codes(run)),
            "points": {str(step): self.point(run, step) for step in points},
        }
        parts = parts | {
            "stage": canonical(run.stage),
            "recipe": variant.recipe_text,
            "points": canonical(points),
            "encode": canonical(encode),
            "upstream": canonical(upstream),
            "plan": canonical(planned),
        }
        self.trunk = run, row, parts
        return row, parts

    # --- evaluations ---

    def evaluations(self, run: Run, evaluation: Evaluation) -> Iterator[Row]:
        protocol = evaluation.protocol
        if protocol.of != run.stage or (evaluation.arms is not None and run.variant.arm.name not in evaluation.arms):
            return
        fields, protocol_id, weights = self.protocol(evaluation)
        part, memory = self.measured(run, evaluation)
        row, parts = self.setting(run)
        shared = row | self.own(run) | self.price(run, "evaluation", part.sample + part.measure)
        shared |= {
            "stage": "evaluation",
            "points": [],
            "encode": [],
            "protocol": evaluation.name,
            "protocol_id": protocol_id,
            "flops_sample": part.sample,
            "flops_measure": part.measure,
            "mem_gib": memory,
            "disk_gib": 0.0,
        }
        runtime = run.variant.arm.runtime.model_copy(update={"devices": 1, "shard": False})  # one device measures
        runtime = cost.packing(runtime, memory, shared["gpu_h_high"], self.grid.price.mem_gib)
        common = parts | {
            "stage": '"evaluation"',
            "recipe": "null",
            "runtime": self.runtime(runtime),
            "protocol": canonical(protocol.model_dump(mode="json")),
            "protocol_name": canonical(evaluation.name),
            "protocol_id": canonical(protocol_id),
            "points": "[]",
            "encode": "[]",
        }
        upstream = {role: point.id for role, point in run.upstream.items()}
        run_label = run.label
        for step in run.select(evaluation.points):
            measured = Checkpoint(run, step)
            at = shared | self.point(run, step) | {"checkpoint": measured.id, "point": step}
            if run.stage == "tokenizer":
                at |= {"tokenizer": measured.id, "tokenizer_steps": step}
            sources = {"checkpoint": measured.id, **upstream}
            at["upstream"] = list(sources.values())
            target = f"{run.points[step]:g}".replace("e+", "e") if run.points[step] else f"{step} steps"
            text = canonical(sources)
            here = assemble(
                common
                | {
                    "upstream": text,
                    "point": str(step),
                    "checkpoint": canonical(measured.id),
                    run.stage: _module(measured),
                }
            )
            plan = canonical({name: at[name] for name in PLANNED})
            title = f"{run_label} @ {target} {evaluation.name} s"
            quoted = canonical(title)[:-1]
            texts = identity.evaluations(self.data_identity, text, fields, evaluation.seeds, weights)
            for seed, what in zip(evaluation.seeds, texts, strict=True):
                run_id = identity.run_id("evaluation", what)
                row = at | {"run_id": run_id, "label": f"{title}{seed}", "seed": seed, "evaluation_seed": seed}
                if (real := self.references(protocol)) > 0:
                    row |= self.price(run, "evaluation", part.sample + part.measure + real)
                    row["flops_measure"] = part.measure + real
                planned = canonical({name: row[name] for name in PLANNED}) if real else plan
                # what is the run's own, then what its seeds share, as one object
                own = f'"run_id":"{run_id}","label":{quoted}{seed}","identity":{what},"seed":{seed},"plan":{planned}'
                row["config"] = f"{{{own},{here[1:]}"
                yield row

    def protocol(self, evaluation: Evaluation) -> tuple[str, str, dict[str, str]]:
        """Identity of a protocol as JSON, paths left out, its hash, and the known hashes of its extractors' weights."""
        if evaluation.name not in self.protocols:
            fields = evaluation.protocol.identity()
            weights = {name: held for name in fields["extractors"] if (held := weights_hash(name))}
            fields["extractors"] = [_pathless(name) for name in fields["extractors"]]
            hashes = {_pathless(name): held for name, held in weights.items()}
            text = canonical(fields)
            self.protocols[evaluation.name] = text, identity.fingerprint(text), hashes
        return self.protocols[evaluation.name]

    def references(self, protocol: Protocol) -> float:
        """FLOPs of the references, which fall to the first row that needs them."""
        key = protocol.samples, protocol.extractors
        if key in self.referred:
            return 0.0
        self.referred.add(key)
        return cost.references(protocol, self.grid.data)

    def measured(self, run: Run, evaluation: Evaluation) -> tuple[cost.Measuring, float]:
        """FLOPs and memory of one evaluation; equal for all seeds and points of a setting."""
        tokenizer = run.lineage.get("tokenizer")
        variants = [run.variant] + ([tokenizer.run.variant] if tokenizer else [])
        key = id(variants[0]), id(variants[-1]), evaluation.name
        if key not in self.measuring:
            counted = [variant.counts for variant in variants]
            decoder = cast(TokenizerFields, tokenizer.run.variant.fields) if tokenizer else None
            latent, data = run.variant.latent, self.grid.data
            part = cost.measuring(evaluation.protocol, run.variant.fields, decoder, counted[0], data, latent)
            self.measuring[key] = (
                part,
                cost.memory_measuring(
                    evaluation.protocol, run.variant.fields, counted, data, latent, run.variant.arm.runtime
                ),
            )
        return self.measuring[key]


# What an evaluation's worker copies into its rows.
PLANNED = (
    *("params_core", "params_total", "steps", "images", "epochs", "flops_target", "flops_to_point"),
    *("flops_upstream", "flops_sample", "flops_measure", "flops_total"),
)


def _module(point: Checkpoint) -> str:
    """What it takes to build the module behind a checkpoint, as JSON."""
    variant = point.run.variant
    parts = {"stage": point.run.stage, "checkpoint": point.id, "family": variant.arm.section.family}
    return assemble({name: canonical(part) for name, part in parts.items()} | {"fields": variant.fields_text})


def _alike(run: Run, other: Run) -> bool:
    """Whether two runs differ in their seed, and perhaps their points, only."""
    return run.variant is other.variant and run.lineage is other.lineage


def _tokenizer(run: Run) -> Row:
    latent = run.variant.latent
    return {
        "tokenizer_family": run.variant.arm.section.family,
        "tokenizer_seed": run.seed,
        "tokens": latent.tokens,
        "codebook": latent.codebook,
        "bits_nominal": latent.bits_nominal,
    }


def _flops(point: Checkpoint) -> float:
    return point.step * point.run.variant.flops_per_step


def _reads_codes(run: Run) -> bool:
    return run.stage == "generator" and "tokenizer" in run.upstream


def _flags(run: Run) -> str:
    """``lr_edge``: the learning rate is the lowest or the highest of a sweep over it."""
    swept = [float(rate) for rate in run.variant.arm.swept("train.lr")]
    return "lr_edge" if len(swept) > 1 and run.variant.recipe.lr in (min(swept), max(swept)) else ""


def _pathless(extractor: str) -> str:
    """A path says where weights are, not what they are."""
    return extractor.partition(":")[0] if weights_file(extractor) and ":" in extractor else extractor


def weights_hash(extractor: str) -> str | None:
    """12 hex digits of the SHA-256 of an extractor's weights file; None where there is no file to look at."""
    file = weights_file(extractor)
    return None if file is None else file_hash(file)
