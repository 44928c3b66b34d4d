"""In which ways does a run fail, and what follows from each? A table; the launcher and the worker look it up."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """``retries``: further attempts in one launch. ``smaller``: each with half as many images at a time.

    ``stops_study``: no other run would fare better now. ``reopens``: the cause lies outside the run and may be gone, so
    the next launch tries again without ``--retry``.
    """

    means: str
    retries: int = 0
    smaller: bool = False
    stops_study: bool = False
    reopens: bool = False


POLICY: dict[str, Policy] = {
    "input": Policy("a setting or a file that the run cannot work with", reopens=True),
    "oom_gpu": Policy("the device's memory did not suffice", retries=4, smaller=True),
    "oom_host": Policy("the host's memory did not suffice", retries=1),
    "comms": Policy("processes of one run lost each other", retries=2),
    "storage": Policy("the disk is full or over quota", stops_study=True, reopens=True),
    "code": Policy("an exception that nobody foresaw"),
    "lost": Policy("the process that held the run is gone without a word", retries=1),
}


def kind(status: dict[str, Any]) -> str | None:
    """The class in which a run failed, from its status; null when it did not fail."""
    named = str(status.get("reason")).partition(":")[0]
    return named if status["state"] == "failed" and named in POLICY else None


def reopens(status: dict[str, Any]) -> bool:
    """Does the next launch try this run again although it failed?"""
    found = kind(status)
    return found is not None and POLICY[found].reopens


def halved(images: int, micro: int) -> int | None:
    """The largest number of images at a time that divides ``images`` and is at most half of ``micro``; null below 1."""
    return next((size for size in range(micro // 2, 0, -1) if images % size == 0), None)


def classify(error: BaseException) -> str:
    """The class of an exception that ended a run, by its causes too."""
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(seen):  # libraries in Rust and C++ wrap the code in a text
            return "storage"
        if type(seen).__name__ == "OutOfMemoryError":  # torch's, without torch
            return "oom_gpu"
        if isinstance(seen, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(seen):
            return "oom_host"
        if type(seen).__name__.startswith("Dist") and type(seen).__name__.endswith("Error"):  # torch.distributed's
            return "comms"
        seen = seen.__cause__ or seen.__context__
    return "input" if isinstance(error, ValueError | FileNotFoundError) else "code"
