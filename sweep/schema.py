"""Which columns does every table hold? Arrow types, the layout's version, and which attempt of a row counts.

Changes are additive, a type never changes, and a column's unit is in its name or its entry in
``results/README.md``. A missing value is null with a reason beside it, never 0.
"""

from __future__ import annotations

import functools

import pyarrow as pa

VERSION = 1  # of the layout of a results folder; readers refuse a folder that says another

S, I, F, B = pa.string(), pa.int64(), pa.float64(), pa.bool_()  # noqa: E741 (initials of the types)

# One row per planned run. Rows of later stages repeat what they were built from (tokenizer_*, generator_*), so
# that one file answers most questions without a join. A point is a step count of a run that is measured.
PLAN: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,
    "stage": S,
    "family": S,
    "label": S,  # what a person calls it: "vq 16x64 s0 > llama 120k s0 @ 1e11"
    "data": S,
    "seed": I,
    "upstream": pa.list_(S),  # checkpoints ("t0123456789ab@2000") or run ids that have to be done before
    "points": pa.list_(I),  # steps at which a trained run is measured, each with a checkpoint of its own
    "encode": pa.list_(I),  # points of a tokenizer whose codes generators train on
    "checkpoint": S,  # evaluation rows: the checkpoint that is measured
    "point": I,  # evaluation rows: its step
    "protocol": S,  # evaluation rows: name of the protocol in the grid
    "protocol_id": S,  # and the hash of its fields
    "fields": S,  # JSON of the family's fields
    "recipe": S,  # JSON of the training recipe
    "config": S,  # JSON of everything a worker needs
    "tokenizer": S,  # checkpoint id of the tokenizer that this row is or was built from
    "tokenizer_family": S,
    "tokenizer_seed": I,
    "tokenizer_steps": I,
    "tokens": I,
    "codebook": I,
    "bits_nominal": F,
    "generator": S,  # run id
    "generator_family": S,
    "generator_size": S,
    "generator_seed": I,
    "evaluation_seed": I,
    "params_core": I,
    "params_total": I,
    "batch": I,
    "lr": F,
    "steps": I,  # longest point
    "images": F,  # steps x batch, to the longest point (or to this point)
    "epochs": F,  # images / unique training images; null where images never repeat
    "flops_target": F,  # the budget that asked for this point
    "flops_to_point": F,  # training FLOPs of the path to this point, its decay branch included: the x of a law
    "flops_paid": F,  # training FLOPs of all pieces of this run, shared trunk once: the bill
    "flops_data": F,  # making the images
    "flops_encode": F,  # encoding the training images into codes, once per tokenizer checkpoint
    "flops_upstream": F,  # training FLOPs of the stages this row was built from, to their points
    "flops_sample": F,  # evaluation: sampling, search included
    "flops_measure": F,  # evaluation: decoding and metric features
    "flops_total": F,  # everything this row itself costs
    "mem_gib": F,
    "disk_gib": F,
    "gpu_h_low": F,
    "gpu_h_high": F,
    "price": S,  # "band" or "measured"
    "axes": S,  # JSON: grid axis -> value, for free-form grouping
    "flags": S,  # comma-separated: lr_edge, ...
}

# One row per (attempt of a) run that ended: what it was, what it cost, how it ended.
RUNS: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,
    "stage": S,
    "family": S,
    "label": S,
    "attempt": I,
    "status": S,  # done, diverged, failed, interrupted, cancelled
    "reason": S,  # why, when not done
    "seed": I,
    "steps": I,  # steps trained in all (every piece)
    "params_core": I,
    "params_total": I,
    "flops_paid": F,
    "wall_s": F,
    "train_s": F,  # spent in training steps
    "flops_per_s": F,  # achieved in training steps
    "mem_peak_gib": F,
    "device": S,
    "threads": I,
    "host": S,
    "started": pa.timestamp("us", tz="UTC"),
    "ended": pa.timestamp("us", tz="UTC"),
    "commit": S,
    "dirty": B,
    "versions": S,  # JSON: python, torch, numpy, torch-fidelity
}

# Long: one row per (run, step, split, metric, protocol). Training losses and evaluations alike.
CURVES: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,  # the run that wrote the row (an evaluation writes under its own id)
    "checkpoint": S,  # what was measured; null on rows written while training
    "attempt": I,
    "step": I,
    "images": F,
    "epochs": F,
    "flops": F,  # training FLOPs of the path to this step
    "split": S,  # train, heldout, or null for generated samples
    "metric": S,
    "value": F,
    "reason": S,  # why value is null
    "error": F,  # standard error of value where one is known
    "n": I,  # images behind the value
    "protocol": S,
    "protocol_id": S,
    "extractor": S,
    "extractor_hash": S,
    "reference": S,  # train or heldout: what generated or decoded images were compared with
    "reference_hash": S,
    "weights": S,
    "sampler": S,
    "sampler_steps": I,
    "temperature": F,
    "top_k": I,
    "top_p": F,
    "guidance": F,
    "guidance_from": S,  # fixed or search
    "labels": S,
    "seed": I,  # of the samples
}

# Small image grids, so that figures need nothing but tables. Pixels are uint8, row-major, height x width x channel.
IMAGES: dict[str, pa.DataType] = {
    "study": S,
    "run_id": S,
    "checkpoint": S,
    "attempt": I,
    "step": I,
    "kind": S,  # original, reconstruction, sample
    "index": I,
    "label": I,
    "guidance": F,
    "height": I,
    "width": I,
    "channels": I,
    "pixels": pa.binary(),
}

TABLES: dict[str, dict[str, pa.DataType]] = {"plan": PLAN, "runs": RUNS, "curves": CURVES, "images": IMAGES}


@functools.cache
def schema(table: str) -> pa.Schema:
    """The Arrow schema of a table; every column may be null."""
    return pa.schema([pa.field(name, kind) for name, kind in TABLES[table].items()])


# Which attempt of a row counts: the highest one with the same values here.
CURRENT: dict[str, tuple[str, ...]] = {
    "runs": ("run_id",),
    "curves": ("run_id", "step", "metric"),
    "images": ("run_id", "step", "kind"),
}
# Columns in which no two current rows agree.
DISTINCT: dict[str, tuple[str, ...]] = {
    "runs": ("run_id",),
    "curves": tuple(CURVES.keys() - {"value", "reason", "error", "images", "epochs", "flops", "attempt"}),
    "images": ("run_id", "checkpoint", "step", "kind", "index", "guidance"),
}
