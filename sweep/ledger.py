"""Do runs fail alike, so that the others need not be tried? A note per ended run, in the folder of those it stands for.

The first ``ALIKE`` runs that end speak for all of them when every one failed, and for one reason. Evaluations of one
checkpoint are one: a damaged file is one failure.
"""

from __future__ import annotations

from pathlib import Path

ALIKE = 3


def note(folder: Path, source: str, state: str, reason: str | None) -> str | None:
    """Write down how a run ended (``source``: its checkpoint, or itself); why the others need not be tried, if so."""
    good, bad = folder / "ended" / "well", folder / "ended" / "badly"
    target = (bad if state == "failed" else good) / source
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(reason or "")
    if state != "failed" or good.is_dir():
        return None
    reasons = [path.read_text() for path in bad.iterdir()]
    if len(reasons) < ALIKE or len(set(reasons)) > 1:
        return None
    return f"the first {len(reasons)} runs failed alike, {reasons[0]}"
