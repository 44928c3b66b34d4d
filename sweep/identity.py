"""What is a run's name made of? Canonical JSON, run ids, and what sets two runs apart.

A run id is one letter (its stage) and 12 hex digits of SHA-256 over the canonical JSON of the run's *identity*: the
resolved fields that can change a result, defaults and upstream checkpoints included. Device count, micro-batch,
paths and measurement points stay out, so that an interrupted run resumed elsewhere, or extended by a point, is the
same run. ``tests/sweep/golden_ids.json`` guards the function: a change there is an event, not a detail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

LETTERS = {"encoder": "e", "tokenizer": "t", "representation": "r", "generator": "g", "evaluation": "v"}
# raised when a stage's code changes what equal fields lead to
VERSIONS = dict.fromkeys(LETTERS, 1) | {"evaluation": 2}  # 2: references are of streams that no run trains on


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(value: Any) -> str:
    """JSON with sorted keys, no spaces, ASCII, floats by their shortest repr; ValueError for NaN and infinities.

    1 and 1.0 differ here. Fields are typed before they arrive (``models.config``), so that a float field reads
    1.0 whichever of the two a grid wrote.
    """
    return _ENCODER.encode(value)


def assemble(parts: Mapping[str, str]) -> str:
    """Canonical JSON of an object from that of its values: what many runs share is encoded once."""
    return "{" + ",".join([f'"{key}":{parts[key]}' for key in sorted(parts)]) + "}"


def digest(value: Any, digits: int = 12) -> str:
    """The first hex digits of SHA-256 over the canonical JSON of ``value``."""
    return fingerprint(canonical(value), digits)


def fingerprint(text: str, digits: int = 12) -> str:
    """The first hex digits of SHA-256 over canonical JSON."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def run_id(stage: str, identity: str) -> str:
    """The id of a run of ``stage`` from the canonical JSON of its identity.

    It starts with a letter: hex alone is read back from a path as a number.
    """
    return LETTERS[stage] + fingerprint(identity)


def checkpoint_id(run: str, step: int) -> str:
    """The id of a run's weights at a measurement point."""
    return f"{run}@{step}"


def split_checkpoint(checkpoint: str) -> tuple[str, int]:
    """Run id and step of a checkpoint id; ValueError when it is none."""
    run, mark, step = checkpoint.partition("@")
    if not mark or not step.isdecimal():
        raise ValueError(f"checkpoint: got {checkpoint!r}; allowed: RUN_ID@STEP")
    return run, int(step)


def trained(
    stage: str,
    family: str,
    fields: str,
    data: str,
    recipe: str,
    seed: int,
    upstream: Mapping[str, str],
    steps: int | None = None,
) -> str:
    """The identity of a trained run. ``steps`` only where the length shapes the whole run (a cosine schedule).

    ``fields``, ``data`` and ``recipe`` are canonical JSON, and so is the result.
    """
    parts = {
        "stage": canonical(stage),
        "version": str(VERSIONS[stage]),
        "family": canonical(family),
        "fields": fields,
        "data": data,
        "recipe": recipe,
        "seed": str(seed),
        "upstream": canonical(upstream),
    }
    return assemble(parts if steps is None else parts | {"steps": str(steps)})


def evaluations(
    data: str, upstream: str, protocol: str, seeds: Iterable[int], weights: Mapping[str, str]
) -> Iterator[str]:
    """The identities of evaluations that differ in their seed.

    ``weights`` maps extractors to the hash of their weights, where it is known. ``data``, ``upstream`` and
    ``protocol`` are canonical JSON, and so are the results.
    """
    parts = {
        "stage": '"evaluation"',
        "version": str(VERSIONS["evaluation"]),
        "data": data,
        "upstream": upstream,
        "protocol": protocol,
        "seed": "\0",  # never in JSON as it is, so it marks the place
    }
    before, _, after = assemble(parts | {"weights": canonical(weights)} if weights else parts).partition("\0")
    return (f"{before}{seed}{after}" for seed in seeds)


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted paths; lists are leaves."""
    if isinstance(value, Mapping) and value:
        for key in sorted(value):
            yield from flatten(value[key], f"{path}.{key}" if path else key)
    else:
        yield path, value


# Parts of a run's config that are no part of its id.
OUTSIDE = ("points", "encode", "runtime", "plan")


def _outside(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config holds beside the identity: how the run is run, and data fields such as a path."""
    kept = {key: config[key] for key in OUTSIDE if key in config}
    hashed = config["identity"]["data"]
    data = {key: value for key, value in config["data"].items() if key not in hashed}
    return kept | ({"data": data} if data else {})


def explain(row: Mapping[str, Any]) -> str:
    """What a planned run is and what its id is made of, as text. ``row`` is a row of the plan."""
    config = json.loads(row["config"])
    lines = [f"{row['run_id']}  {row['stage']}  {row['label']}", ""]
    lines.append(f"the id is {row['run_id'][0]!r} and the first 12 hex digits of SHA-256 over the canonical JSON of")
    lines += [f"  {path} = {canonical(value)}" for path, value in flatten(config["identity"])]
    lines += ["", "and not of"]
    lines += [f"  {path} = {canonical(value)}" for path, value in flatten(_outside(config))]
    return "\n".join(lines)


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What sets two planned runs apart, field by field, as text. ``a`` and ``b`` are rows of the plan."""
    configs = [json.loads(row["config"]) for row in (a, b)]
    lines = [f"a  {a['run_id']}  {a['label']}", f"b  {b['run_id']}  {b['label']}"]
    for title, parts in (
        ("in the id", [config["identity"] for config in configs]),
        ("outside the id", [_outside(config) for config in configs]),
    ):
        left, right = (dict(flatten(part)) for part in parts)
        apart = [key for key in sorted(left.keys() | right.keys()) if _shown(left, key) != _shown(right, key)]
        lines += ["", title] + [f"  {key}: {_shown(left, key)} | {_shown(right, key)}" for key in apart]
        lines += [] if apart else ["  nothing"]
    return "\n".join(lines)


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return canonical(leaves[key]) if key in leaves else "(absent)"
