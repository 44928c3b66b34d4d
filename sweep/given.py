"""What does a plan depend on besides its grid file? Environment variables, weights of extractors, code versions.

A plan is made again when one of them changed: its paths, its ids or both would be others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sweep import identity

ROOT = Path(__file__).parents[1]
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def given(text: str, weights: Iterable[Path]) -> dict[str, Any]:
    """What a grid's ``text`` and weights files lead to now, as JSON values; files of this project by relative path."""
    names = {plain or braced for plain, braced in VARIABLE.findall(text)} | ({"HOME"} if "~" in text else set())
    return {
        "versions": identity.VERSIONS,
        "environment": {name: os.environ.get(name) for name in sorted(names)},
        "weights": {
            str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file): file_hash(file)
            for file in sorted(weights)
        },
    }


def same(recorded: Any, text: str) -> bool:
    """Is it as it was when ``recorded`` was written?"""
    try:
        return bool(recorded == given(text, [ROOT / file for file in recorded["weights"]]))
    except (KeyError, TypeError):
        return False


def file_hash(file: Path) -> str | None:
    """12 hex digits of the SHA-256 of a file, or of what the record beside it says; None when it is not there."""
    try:
        return str(json.loads(file.with_suffix(".json").read_text())["sha256"])[:12]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        with file.open("rb") as held:
            return hashlib.file_digest(held, "sha256").hexdigest()[:12]
    except OSError:
        return None
