"""Which code runs? Its commit and what was changed since, and a copy of it that later edits do not reach.

Jobs may start hours after they were submitted. They import ``sweep`` and ``models`` from a copy below the study
(``.submitit/code/<hash>``), made when they are submitted, with the commit and the difference to it beside it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("sweep", "models")  # what a job imports
RECORD = "source.json"  # beside a copy: what it was copied from


def _git(*words: str) -> str | None:
    """Output of git on the code that runs; None where there is no repository or no git."""
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def changes() -> list[str] | None:
    """Files that differ from the commit, one ``git status`` line each, new ones of ours included; None without git."""
    tracked = _git("status", "--porcelain", "--untracked-files=no")
    new = _git("ls-files", "--others", "--exclude-standard", "--", *PACKAGES)
    if tracked is None or new is None:
        return None
    return [*tracked.splitlines(), *(f"?? {name}" for name in new.splitlines())]


@functools.cache
def provenance() -> dict[str, Any]:
    """Commit of the code that runs, whether it was changed since, and versions of what decides results."""
    try:  # a copy, away from its repository
        held = json.loads((ROOT / RECORD).read_text())
        commit, dirty = held["commit"], held["dirty"]
    except OSError:
        changed, head = changes(), _git("rev-parse", "HEAD")
        commit, dirty = head and head.strip(), None if changed is None else bool(changed)
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "torch-fidelity"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"commit": commit, "dirty": dirty, "versions": versions}


def _files() -> list[Path]:
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


def snapshot(folder: Path) -> Path:
    """A copy of the code below ``folder``, one per state of the code; made once, by whoever needs it first."""
    content = {path: (ROOT / path).read_bytes() for path in _files()}
    digest = hashlib.sha256()
    for path, data in content.items():
        digest.update(f"{path}\0{len(data)}\0".encode() + data)
    target = folder / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    staged = folder / f".{target.name}-{os.getpid()}"
    try:
        return _made(staged, target, content)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _made(staged: Path, target: Path, content: dict[Path, bytes]) -> Path:
    """The copy ``target``, made as ``staged`` first."""
    for path, data in content.items():
        (staged / path).parent.mkdir(parents=True, exist_ok=True)
        (staged / path).write_bytes(data)
    made_from = {name: provenance()[name] for name in ("commit", "dirty")}
    (staged / "changes.diff").write_text(_git("diff", "HEAD") or "")
    (staged / RECORD).write_text(json.dumps(made_from))
    try:
        os.rename(staged, target)
    except OSError:  # somebody else was faster
        if not target.is_dir():
            raise
    return target


def paths(code: Path) -> dict[str, str]:
    """Environment of a process that imports a copy; what else it could import here it still can."""
    before = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    # without the second, the working directory would come before the copy
    return {"PYTHONPATH": os.pathsep.join([str(code), *before]), "PYTHONSAFEPATH": "1"}
