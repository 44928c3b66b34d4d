"""In which ways does a run fail, and what follows from each? A table; the launcher and the worker look it up."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """``retries``: further attempts in one launch. ``stops_study``: no other run would fare better now.

    ``reopens``: the cause lies outside the run and may be gone, so the next launch tries again without ``--retry``.
    """

    retries: int
    stops_study: bool
    reopens: bool
    means: str


POLICY: dict[str, Policy] = {
    "input": Policy(0, False, True, "a setting or a file that the run cannot work with"),
    "memory": Policy(0, False, False, "the host's or the device's memory did not suffice"),
    "storage": Policy(0, True, True, "the disk is full or over quota"),
    "code": Policy(0, False, False, "an exception that nobody foresaw"),
    "lost": Policy(1, False, False, "the process that held the run is gone without a word"),
}


def reopens(status: dict[str, Any]) -> bool:
    """Does a launch try this run again although it failed?"""
    kind = str(status.get("reason")).partition(":")[0]
    return status["state"] == "failed" and kind in POLICY and POLICY[kind].reopens


def classify(error: BaseException) -> str:
    """The class of an exception that ended a run, by its causes too."""
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(seen):  # libraries in Rust and C++ wrap the code in a text
            return "storage"
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":  # torch's, without torch
            return "memory"
        seen = seen.__cause__ or seen.__context__
    return "input" if isinstance(error, ValueError | FileNotFoundError) else "code"
