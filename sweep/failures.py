"""In which ways does a run fail, and what follows from each? A table; workers and launches look it up."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Where = Literal["here", "elsewhere"]


class Policy(NamedTuple):
    """What follows from one class of failure.

    ``retries`` counts further attempts. ``resumes``: the run was interrupted, and goes on for as long as each attempt
    leaves a checkpoint. ``where``: in the same process, or in another job. ``smaller``: with half as
    many images at a time. ``stops_study``: no other run would fare better now. ``reopens``: the cause lies outside the
    run and may be gone, so the next launch tries again without ``--retry``. ``mend``: it is the user's to mend (exit
    code 2).
    """

    means: str
    retries: int = 0
    where: Where = "here"
    smaller: bool = False
    resumes: bool = False
    stops_study: bool = False
    reopens: bool = False
    mend: bool = False


POLICY: dict[str, Policy] = {
    "preempted": Policy("its job had to make room", where="elsewhere", resumes=True, reopens=True),
    "timeout": Policy("its job reached the time limit", where="elsewhere", resumes=True, reopens=True),
    "ended": Policy("its job was ended, by somebody or by Slurm", where="elsewhere", resumes=True, reopens=True),
    "oom_gpu": Policy("the device's memory did not suffice", retries=4, smaller=True),
    "oom_host": Policy("the host's memory did not suffice; its next job asks for twice as much", 1, "elsewhere"),
    "node": Policy("the machine or its device is broken; its next job avoids it", 2, "elsewhere", reopens=True),
    "comms": Policy("processes of one run lost each other", retries=2, where="elsewhere", reopens=True),
    "storage": Policy("the disk is full or over quota", stops_study=True, reopens=True, mend=True),
    "submit": Policy("Slurm refused the job, or it ended before it began", reopens=True, mend=True),
    "data": Policy("a file is missing or is not what was written", reopens=True, mend=True),
    "input": Policy("a setting that the run cannot work with", reopens=True, mend=True),
    "code": Policy("an exception that nobody foresaw"),
    "lost": Policy("the process that held the run is gone without a word", retries=1, where="elsewhere", reopens=True),
}
# Not here: a run that diverged is a result. It has its row, is never tried again, and fits leave it out.

# What Slurm calls the end of a job, as a class; FAILED and COMPLETED say nothing of a run that is still open.
ENDED_AS = {
    "PREEMPTED": "preempted",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "oom_host",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
}

BROKEN = (  # texts of devices that fail, and would again
    "no cuda-capable device",
    "cuda-capable device(s) is/are busy or unavailable",
    "uncorrectable ecc",
    "cuda error: unspecified launch failure",
    "gpu has fallen off the bus",
    "device not ready",
    "system not yet initialized",
    "driver shutting down",
)
COMMS = ("nccl", "gloo", "connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout")


def kind(status: Mapping[str, Any]) -> str | None:
    """The class in which a run failed, from its status; null when it did not fail."""
    named = str(status.get("reason")).partition(":")[0]
    return named if status["state"] == "failed" and named in POLICY else None


def reopens(status: Mapping[str, Any]) -> bool:
    """Does the next launch try this run again although it failed?"""
    found = kind(status)
    return found is not None and POLICY[found].reopens


def again(kind: str, status: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What to change in a run's status for one more attempt after a failure; null where the policy grants none."""
    policy, spent = POLICY[kind], status.get("retries") or {}
    if spent.get(kind, 0) >= policy.retries:
        return None
    change = _smaller(config, status) if policy.smaller else {}
    return None if change is None else {"retries": {**spent, kind: spent.get(kind, 0) + 1}, **change}


def _smaller(config: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any] | None:
    """Half as many images at a time than in the last attempt of a run, which is the same run; null below one image."""
    runtime = config["runtime"]
    batch = min(status.get("measure_batch") or runtime["measure_batch"], runtime["measure_batch"]) // 2
    change: dict[str, Any] = {"measure_batch": batch} if batch else {}
    if config["stage"] != "evaluation":
        images = config["recipe"]["batch"] // runtime["devices"]
        sizes = (status.get("micro_batch"), runtime["micro_batch"], images)
        micro = halved(images, min(size for size in sizes if size))
        change |= {"micro_batch": micro} if micro else {}
    return change or None


def halved(images: int, micro: int) -> int | None:
    """The largest number of images at a time that divides ``images`` and is at most half of ``micro``; null below 1."""
    return next((size for size in range(micro // 2, 0, -1) if images % size == 0), None)


def classify(error: BaseException) -> str:
    """The class of an exception that ended a run, by its causes too."""
    seen: BaseException | None = error
    while seen is not None:
        name, text = type(seen).__name__, str(seen)
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in text:  # libraries in Rust and C++ wrap the code in a text
            return "storage"
        if name == "OutOfMemoryError":  # torch's, without torch
            return "oom_gpu"
        if isinstance(seen, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
            return "oom_host"
        if isinstance(seen, RuntimeError) and any(words in text.lower() for words in BROKEN):
            return "node"
        if name.startswith("Dist") and name.endswith("Error"):  # torch.distributed's
            return "comms"
        if isinstance(seen, RuntimeError) and any(words in text.lower() for words in COMMS):
            return "comms"
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "Damaged":
        return "data"
    return "input" if isinstance(error, ValueError) else "code"
