"""What happens inside a job? A process claims runs one after the other, trains or measures, and says how each ended.

    python -m sweep.worker g0123456789ab                 # one run in the foreground, for debugging
    python -m sweep.worker g0123456789ab --results DIR   # DIR holds studies, or is one

Signals only set a flag, which is read between steps: the run saves, ends as ``cancelled`` (or ``interrupted``, where
its job goes on later) and is resumed. A failed run has its traceback in ``status.json``, and the process tries it
again where the policy of its failure says so, or goes on with the next one. Nothing heavy is imported before there is
a run to work on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from models import config as families
from sweep import failures, identity, ledger, rundir, tables
from sweep.attempt import Attempt, Ended, Stop, reset_peaks

if TYPE_CHECKING:
    from models.checkpoint import Checkpoints
    from models.data import CodeCache, Images
    from models.training import Outcome

Record = Callable[[int, int, dict[str, float], int | None], None]

# --- what to build -----------------------------------------------------------------------------------------------


def data_of(config: dict[str, Any]) -> families.DataFields:
    held = dict(config["data"])
    fields: families.DataFields = _fields("data", held.pop("family"), held)
    return fields


def module_of(config: dict[str, Any], stage: str) -> Any:
    """The untrained module of a stage that ``config`` was built from (one key per stage) or is about."""
    held = config.get(stage, config)
    fields, data = _fields(stage, held["family"], held["fields"]), data_of(config)
    if stage != "generator":
        return fields.build(data)
    return fields.build(latent_of(config), data.labels)


def latent_of(config: dict[str, Any]) -> families.Latent:
    held = config["tokenizer"]
    latent: families.Latent = _fields("tokenizer", held["family"], held["fields"]).latent(data_of(config))
    return latent


def _fields(kind: str, family: str, values: dict[str, Any]) -> Any:
    return families.family(kind, family)(**values)


def codes_of(study: Path, checkpoint: str, config: dict[str, Any]) -> Path:
    """Where the codes of a tokenizer checkpoint lie."""
    hashed = identity.digest({"family": config["data"]["family"], **data_of(config).identity()})
    return rundir.codes_folder(study, checkpoint, hashed)


# --- stages ------------------------------------------------------------------------------------------------------


class Team(Protocol):
    """The other processes of this job, where a run is trained by several (sweep.ranks)."""

    def gather(self, attempt: Attempt) -> None:
        """Let them train this attempt too; returns when all have met."""

    def dismiss(self) -> None:
        """Let them wait for the next one."""

    def blame(self) -> Ended | None:
        """How another of them failed, if one did."""


def train(attempt: Attempt) -> Ended:
    """Train a run to its points; a tokenizer then encodes the images that generators train on."""
    from models import checkpoint, data, training

    config, study = attempt.config, attempt.study
    recipe = families.Recipe(**config["recipe"])
    points, plan = tuple(config["points"]), config["plan"]
    total = families.steps_paid(points, recipe)
    checkpoints = checkpoints_of(attempt)

    def record(step: int, trained: int, metrics: dict[str, float], point: int | None) -> None:
        attempt.steps, attempt.train_s = trained, time.monotonic() - began
        at = {"step": step, "images": float(step * recipe.batch), "flops": step * plan["flops_per_step"]}
        at["epochs"] = at["images"] / plan["images_unique"] if plan["images_unique"] else None
        branch = "" if point is None else f"@{point}"
        attempt.curves.append(
            {**at, "split": "train", "metric": f"{name}{branch}", "value": value, "weights": "raw"}
            for name, value in metrics.items()
        )
        attempt.note("record", step=step, point=point, **metrics)
        attempt.progress(step=_paid(step, point, points, recipe), steps=total, points=saved())

    def saved() -> list[int]:
        return [point for point in points if checkpoints.has_point(point)]

    began = time.monotonic()
    if attempt.team is not None:
        attempt.team.gather(attempt)
    try:
        outcome, module, source = fit(attempt, checkpoints, record)
    finally:
        if attempt.team is not None:
            attempt.team.dismiss()
    attempt.steps, attempt.train_s = outcome.steps, outcome.seconds
    attempt.claim.update(points=saved(), steps=total)
    if outcome.state != "done":
        return Ended("cancelled" if outcome.state == "stopped" else "diverged", outcome.reason)
    attempt.claim.update(step=total)
    weights: Literal["ema", "raw"] = "ema" if recipe.ema else "raw"
    device = training.device_of(attempt.runtime)
    for point in config["encode"]:
        if attempt.should_stop():
            return Ended("cancelled", f"asked to stop before the codes of point {point}")
        checkpoint.load_point(checkpoints.points, point, module, weights, device)
        target = codes_of(study, f"{attempt.run_id}@{point}", config)
        batch = attempt.runtime.measure_batch
        cache = data.encode(module.eval(), source, target, seed=0, batch=batch, device=device)
        attempt.note("encoded", point=point, **cache.manifest["splits"])
    return Ended("done")


def checkpoints_of(attempt: Attempt) -> Checkpoints:
    from models import checkpoint

    folder = rundir.run_folder(attempt.study, attempt.run_id)
    return checkpoint.Checkpoints(folder / "ckpt", folder / "points", attempt.save)


def fit(attempt: Attempt, checkpoints: Checkpoints, record: Record) -> tuple[Outcome, Any, Images]:
    """Build and train the module of a run, on every rank alike; also the images that it or its tokenizer sees."""
    import torch

    from models import data, training

    config, study = attempt.config, attempt.study
    torch.manual_seed(training.mixed(config["seed"], "weights"))
    module = module_of(config, config["stage"])
    source = data_of(config).build()
    stream = source
    if config["stage"] == "generator":
        stream = data.CodeCache(codes_of(study, config["upstream"]["tokenizer"], config))
    outcome = training.train(
        module,
        stream,
        families.Recipe(**config["recipe"]),
        tuple(config["points"]),
        seed=config["seed"],
        runtime=attempt.runtime,
        checkpoints=checkpoints,
        record=record,
        should_stop=attempt.should_stop,
    )
    return outcome, module, source


def measure(attempt: Attempt) -> Ended:
    """Measure one checkpoint under one protocol."""
    from models import evaluation, training

    config, study = attempt.config, attempt.study
    protocol = families.Protocol(**config["protocol"])
    device = training.device_of(attempt.runtime)
    loaded = _loaded(study, json.dumps(_needed(study, config)), device)
    options = {"seed": config["seed"], "cache": rundir.references_folder(study), "device": device}
    options |= {"batch": attempt.runtime.measure_batch, "should_stop": attempt.should_stop}
    try:
        if protocol.of == "tokenizer":
            made = evaluation.evaluate_tokenizer(loaded.modules["tokenizer"], loaded.images, protocol, **options)
        elif protocol.of == "generator":
            assert loaded.codes is not None
            modules = loaded.modules["generator"], loaded.modules["tokenizer"]
            made = evaluation.evaluate_generator(*modules, loaded.images, loaded.codes, protocol, **options)
        else:
            raise ValueError(f"protocol.of: got {protocol.of!r}; allowed: tokenizer, generator")
    except evaluation.Stopped as stopped:
        return Ended("cancelled", f"asked to stop before it measured {stopped}")
    plan, checkpoint = config["plan"], {"checkpoint": config["checkpoint"], "step": config["point"]}
    shared = {**checkpoint, "protocol": config["protocol_name"], "protocol_id": config["protocol_id"]}
    shared |= {"images": plan["images"], "epochs": plan["epochs"], "flops": plan["flops_to_point"]}
    attempt.curves.append({**shared, **row} for row in made.rows)
    attempt.images.append({**checkpoint, **row} for row in made.images)
    attempt.note("measured", seconds=made.seconds)
    return Ended("done")


class Loaded(NamedTuple):
    """What evaluations of one checkpoint share."""

    modules: dict[str, Any]
    images: Images
    codes: CodeCache | None


def _needed(study: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The modules behind an evaluation: each with its checkpoint and which of its weights to load."""
    of = config["protocol"]["of"]
    needed = {of: config[of] | {"weights": config["protocol"]["weights"]}}
    if of == "generator":  # images are decoded with the weights that codes were made with
        tokenizer = config["tokenizer"]
        recipe = rundir.config(study, tokenizer["checkpoint"].partition("@")[0])["recipe"]
        needed["tokenizer"] = tokenizer | {"weights": "ema" if recipe["ema"] else "raw"}
    return {"data": config["data"], **needed}


@lru_cache(maxsize=1)  # evaluations of one checkpoint follow each other
def _loaded(study: Path, needed: str, device: str) -> Loaded:
    from models import checkpoint, data

    config, modules, codes = json.loads(needed), {}, None
    for stage in config.keys() - {"data"}:
        run_id, point = identity.split_checkpoint(config[stage]["checkpoint"])
        module = module_of(config, stage)
        folder = rundir.points_folder(study, run_id)
        checkpoint.load_point(folder, point, module, config[stage]["weights"], device)
        modules[stage] = module.to(device).eval()
    if "generator" in modules:
        codes = data.CodeCache(codes_of(study, config["tokenizer"]["checkpoint"], config))
    return Loaded(modules, data_of(config).build(), codes)


def _paid(step: int, point: int | None, points: tuple[int, ...], recipe: families.Recipe) -> int:
    """Steps of the whole program that are behind when ``step`` of a branch, or of the trunk (None), is done."""
    behind = 0
    for piece in families.segments(points, recipe):
        if piece.point == point and piece.start < step <= piece.stop:
            return behind + step - piece.start
        behind += piece.stop - piece.start
    return behind


STAGES: dict[str, Callable[[Attempt], Ended]] = {
    "encoder": train,
    "tokenizer": train,
    "representation": train,
    "generator": train,
    "evaluation": measure,
}

# --- runs --------------------------------------------------------------------------------------------------------


class Blocked(NamedTuple):
    """Why a run cannot start yet, and because of which other.

    ``diverged``: because training upstream did, which is a result, not a failure.
    """

    run_id: str
    reason: str
    diverged: bool


def blocked(study: Path, stage: str, upstream: Iterable[str]) -> Blocked | None:
    """A checkpoint that is not there, or codes made with it; None when the run can start."""
    for source in upstream:
        run_id, _, step = source.partition("@")
        status = rundir.status(study, run_id)
        there = rundir.point_file(study, run_id, int(step)).exists() if step else status["state"] == "done"
        coded = stage != "generator" or run_id[0] != "t" or int(step) in rundir.encoded(study, run_id)
        if not (there and coded):
            reason = f" ({status['reason']})" if status.get("reason") else ""
            diverged = status["state"] == "diverged" or bool(status.get("diverged_upstream"))
            what = "codes of " if there else ""
            return Blocked(run_id, f"{what}{source} missing: its run is {status['state']}{reason}", diverged)
    return None


def work(
    study: Path,
    run_id: str,
    stop: Stop,
    threads: int | None = None,
    siblings: Container[str] = frozenset(),
    team: Team | None = None,
) -> str:
    """Bring one run to an end: its state; ``over`` when nothing is to do.

    ``held`` when somebody else has it, ``early`` when it is built on one of ``siblings`` that is still to come,
    ``again`` when it failed and is to be tried once more here, ``elsewhere`` when another job has to do that.
    """
    config = rundir.config(study, run_id)
    runtime = families.Runtime(**config["runtime"])
    if threads is not None:
        runtime = runtime.model_copy(update={"threads": threads})
    status = rundir.status(study, run_id)
    smaller: dict[str, Any] = {  # after the device's memory did not suffice
        name: min(size, getattr(runtime, name) or size)
        for name in ("micro_batch", "measure_batch")
        if (size := status.get(name))
    }
    runtime = runtime.model_copy(update=smaller)
    if not _open(study, config):
        return "over"
    if why := blocked(study, config["stage"], config["upstream"].values()):
        if why.run_id in siblings and rundir.status(study, why.run_id)["state"] not in rundir.FINAL:
            return "early"
        rundir.mark(study, run_id, "blocked", why.reason, diverged_upstream=why.diverged)
        return "blocked"
    if (claim := rundir.claim(study, run_id)) is None:
        return "held"
    with claim.held():
        try:
            if not _open(study, config):  # it ended between the look and the claim
                return "over"
            return _attempt(Attempt(study, config, claim, stop, runtime, team))
        except rundir.Superseded as error:
            print(error, file=sys.stderr)
            return "superseded"


def _open(study: Path, config: dict[str, Any]) -> bool:
    status = rundir.status(study, config["run_id"])
    return status["state"] != "cancelled" and not rundir.finished(study, status, config["points"], config["encode"])


def _attempt(attempt: Attempt) -> str:
    """Run the stage; whatever it raises becomes the run's outcome."""
    limit_threads(attempt.runtime)
    reset_peaks()
    here = {name: value for name, value in rundir.myself().items() if name in ("host", "pid", "job")}
    if (why := attempt.begin(**here)) is not None:
        attempt.end(why)
        return why.state
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None  # a leaked mask shows here
    attempt.note("started", threads=attempt.runtime.threads, cores=cores, **here)
    trace: str | None = None
    fields: dict[str, Any] = {}
    try:
        ended = STAGES[attempt.config["stage"]](attempt)
        if ended.state == "cancelled" and attempt.stop.kind in failures.POLICY and not attempt.claim.cancelled():
            ended = Ended("interrupted", f"{attempt.stop.kind}: {ended.reason}")
    except rundir.Superseded:
        raise
    except Exception as error:
        ended, trace = failed(error), traceback.format_exc()
        print(trace, file=sys.stderr)
        if attempt.team is not None and failures.classify(error) == "comms":
            ended = attempt.team.blame() or ended
    outcome: str = ended.state
    try:
        if trace is not None:
            outcome, fields = attempt.retry(ended)
        attempt.end(ended, trace, **fields)
    except OSError as error:
        if failures.classify(error) != "storage":
            raise
        print(traceback.format_exc(), file=sys.stderr)
        attempt.stop.spread(f"storage: {error}")  # not even this fits into a record: the next launch finds out
        return "failed"
    if trace is not None:  # the exception is gone, and with it what its frames held of the device: let the next have it
        import torch

        gc.collect()
        torch.cuda.empty_cache()  # raises where the device is beyond use, which ends this process
    return outcome


def limit_threads(runtime: families.Runtime) -> None:
    """Compute with as many threads as the plan says: another number gives other bits."""
    import torch

    torch.set_num_threads(runtime.threads)


def failed(error: Exception) -> Ended:
    """A failure in one line: its class, and what was raised."""
    line = str(error).strip().splitlines()
    return Ended("failed", f"{failures.classify(error)}: {type(error).__name__}: {line[0] if line else ''}")


# --- many runs ---------------------------------------------------------------------------------------------------


def serve(
    study: Path,
    groups: Sequence[Sequence[str]],
    stop: Stop,
    threads: int | None = None,
    notes: Path | None = None,
    team: Team | None = None,
) -> bool:
    """Work off runs until none is left that this process could take; False when another one has to go on.

    The list is shared with other processes: whoever claims a run first has it. Runs of a group (evaluations of one
    checkpoint) stay together, so that what they load is loaded once. ``notes`` is where ends are written down, so that
    all stop when the first ones fail alike (sweep.ledger).
    """
    over: set[str] = set()
    siblings = frozenset(run_id for group in groups for run_id in group)
    while not stop():
        before = len(over)
        again = False
        for group in groups:
            for run_id in group:
                if run_id in over or stop():
                    continue
                outcome = _logged(study, run_id, stop, threads, siblings, team)
                if outcome == "elsewhere" or (team is not None and outcome == "failed"):  # its ranks are out of step
                    return False
                if outcome == "held":
                    break
                again = again or outcome == "again"
                if outcome not in ("again", "early"):
                    over.add(run_id)
                if notes is not None and outcome in ("done", "diverged", "failed"):
                    _note(study, run_id, notes, stop)
        if not again and len(over) == before:
            break
    return True


def _note(study: Path, run_id: str, notes: Path, stop: Stop) -> None:
    """Write down how a run ended; stop those that are like it when the first ones failed alike."""
    status = rundir.status(study, run_id)
    source = rundir.config(study, run_id).get("checkpoint") or run_id
    if why := ledger.note(notes, source, status["state"], status["reason"]):
        stop.spread(why, notes / "stop")


def _logged(
    study: Path, run_id: str, stop: Stop, threads: int | None, siblings: Container[str], team: Team | None
) -> str:
    """``work`` with its output in the run's own log."""
    log = rundir.log_file(study, run_id)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return work(study, run_id, stop, threads, siblings, team)


# --- one run in the foreground -----------------------------------------------------------------------------------


def _study_of(run_id: str, results: Path) -> Path:
    """The study under ``results`` (or ``results`` itself) whose plan holds a run."""
    rundir.run_folder(results, run_id)  # says what a run id looks like
    for study in (results, *sorted(path.parent for path in results.glob("*/plan.parquet"))):
        if rundir.plan_file(study).is_file() and tables.plan(study, ["run_id"], [run_id]):
            return study.resolve()
    raise ValueError(
        f"run id: {run_id} is in no plan under {results}; allowed: a run of a study that was planned there"
    )


def positive(text: str) -> int:
    """An option of the command line that counts something."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a whole number from 1 on")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep.worker", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run_id", metavar="RUN_ID")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="of studies, or a study")
    parser.add_argument("--threads", type=positive, metavar="N", help="instead of the plan's run.threads")
    options = parser.parse_args(argv)
    try:
        study = _study_of(options.run_id, options.results)
        config = json.loads(tables.plan(study, ["run_id", "config"], [options.run_id])[0]["config"])
        return _by_hand(study, config, options)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or options.results}: {error.strerror}", file=sys.stderr)
    return 2


def _by_hand(study: Path, config: dict[str, Any], options: argparse.Namespace) -> int:
    rundir.register(study, config)
    status, holder = rundir.status(study, options.run_id), rundir.holder(study, options.run_id)
    if status["state"] in ("failed", "cancelled") and not (holder and holder.alive):
        rundir.mark(study, options.run_id, "planned")  # to run it by hand is to ask for it
    stop = Stop()
    stop.listen()
    outcome = work(study, options.run_id, stop, options.threads)
    if outcome == "held" and (holder := rundir.holder(study, options.run_id)):
        print(f"{options.run_id} is held by process {holder.pid} on {holder.host}", file=sys.stderr)
        return 1
    status = rundir.status(study, options.run_id)
    reason = f": {status['reason']}" if status.get("reason") else ""
    print(f"{options.run_id} {config['label']}: {status['state']}{reason}")
    return 0 if status["state"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
