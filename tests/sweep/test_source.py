"""Is what ran known afterwards, and does an edit reach jobs that were submitted before it?"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sweep import rundir, source

LOOK = "import sys; from sweep import source; print('torch' in sys.modules, source.ROOT, source.provenance()['commit'])"


def looked(**env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, cwd=source.ROOT, env=os.environ | env
    )
    return done.stdout.split()


def test_provenance_names_versions_without_importing_them():
    assert looked()[0] == "False"
    assert source.provenance()["versions"].keys() >= {"python", "torch", "numpy", "torch-fidelity"}
    assert rundir.myself()["host"] == socket.gethostname()


def test_a_copy_is_what_runs_and_knows_where_it_is_from(tmp_path):
    copy = source.snapshot(tmp_path)
    assert looked(**source.paths(copy)) == ["False", str(copy), str(source.provenance()["commit"])]
    assert (copy / "models" / "weights").is_dir()
    assert not list(copy.rglob("__pycache__")) or looked()  # made by the call above, not copied
    record = json.loads((copy / source.RECORD).read_text())
    assert record == {name: source.provenance()[name] for name in ("commit", "dirty")}
    assert source.snapshot(tmp_path) == copy
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own with the packages in it."""
    root = tmp_path / "checkout"
    for package in source.PACKAGES:
        shutil.copytree(source.ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x", "-C", str(root)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(source, "ROOT", root)
    source.provenance.cache_clear()
    yield root
    source.provenance.cache_clear()


def test_an_edit_is_another_copy_with_its_difference(checkout, tmp_path):
    clean = source.snapshot(tmp_path / "code")
    assert source.changes() == []
    assert not (clean / "changes.diff").read_text()
    edited = checkout / "sweep" / "ledger.py"
    edited.write_text(edited.read_text() + "# edited\n")
    (checkout / "models" / "new.py").write_text("")
    source.provenance.cache_clear()
    assert source.changes() == [" M sweep/ledger.py", "?? models/new.py"]
    changed = source.snapshot(tmp_path / "code")
    assert changed != clean
    assert "+# edited" in (changed / "changes.diff").read_text()
    assert json.loads((changed / source.RECORD).read_text())["dirty"] is True
    assert "# edited" not in (clean / "sweep" / "ledger.py").read_text()
    assert (changed / "models" / "new.py").exists()


def test_without_git_there_is_a_copy_all_the_same(checkout, tmp_path):
    shutil.rmtree(checkout / ".git")
    source.provenance.cache_clear()
    assert source.changes() is None
    assert source.provenance()["commit"] is None
    assert (source.snapshot(tmp_path / "code") / "sweep" / "source.py").exists()
