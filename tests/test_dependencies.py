"""Do the layers stay apart, and does nothing load more than it needs?"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "timm", "torch_fidelity", "sklearn", "pandas", "polars", "matplotlib", "seaborn")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether at its top level."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("models"), ids=str)
def test_models_know_nothing_of_sweeps_or_analysis(path):
    assert not [name for name, _ in imports(path) if name.split(".")[0] in {"sweep", "analysis"}]


@pytest.mark.parametrize("path", files("sweep"), ids=str)
def test_sweep_imports_models_only_in_the_job(path):
    used = {name for name, _ in imports(path) if name.split(".")[0] == "models"}
    allowed = {name for name in used if name == "models" or name.startswith("models.config")}
    assert path.name in ("worker.py", "ranks.py") or used == allowed, used - allowed
    assert not [name for name, _ in imports(path) if name.split(".")[0] == "analysis"]


@pytest.mark.parametrize("path", files("analysis"), ids=str)
def test_analysis_reads_tables_only(path):
    used = [name for name, _ in imports(path)]
    assert not [name for name in used if name.split(".")[0] in {"models", "torch"}]
    schemas = ("sweep.schema", "sweep.tables")
    assert not [name for name in used if name.startswith("sweep.") and not name.startswith(schemas)]


def loaded(module: str) -> set[str]:
    """Top-level packages in memory after ``import module`` in a fresh process."""
    code = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("sweep.plan", HEAVY),
        ("sweep.launch", HEAVY),
        ("sweep.dispatch", HEAVY),
        ("sweep.status", HEAVY),
        ("sweep.tables", HEAVY),
        ("sweep.worker", tuple(name for name in HEAVY if name != "torch")),
        ("models.config", HEAVY),
        ("models.training", tuple(name for name in HEAVY if name != "torch")),
        ("models.evaluation", tuple(name for name in HEAVY if name != "torch")),
        ("analysis.load", ("torch", "matplotlib", "sklearn", "timm")),
        ("analysis.figures", ("torch", "timm", "torchvision")),
    ],
)
def test_an_import_is_light(module, banned):
    assert not loaded(module) & set(banned)
