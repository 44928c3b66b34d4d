"""Are the dependencies declared, pinned once, and really used?"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
# What a package is imported as, or the tracked file that names it.
USED = {"pyyaml": "yaml", "scikit-learn": "sklearn", "torch-fidelity": "torch_fidelity"}
NOT_IMPORTED = {
    "snakemake": "Snakefile",
    "snakemake-executor-plugin-slurm": "slurm/config.yaml",
    "torchvision": "pyproject.toml",  # what timm and torch-fidelity need beside torch
}


def names(specs: list[str]) -> list[str]:
    return [re.split(r"[<>=!~; \[]", spec)[0].lower() for spec in specs]


def test_pins_are_the_same_for_uv_and_pip():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == pins
    assert set(names(PROJECT["project"]["dependencies"])) <= set(names(pins))
    assert set(names(PROJECT["dependency-groups"]["dev"])) <= set(names(pins))


def test_no_file_names_a_registry():
    """Pins are names and versions; where packages come from is the reader's own setting."""
    hosts = re.compile(rb"(pypi|pythonhosted|debian|npmjs)\.(org|com)")
    for name in TRACKED:
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".parquet", ".safetensors"}:
            assert not hosts.search(path.read_bytes()), name


@pytest.mark.parametrize("package", names(PROJECT["project"]["dependencies"]))
def test_every_dependency_is_used(package):
    if package in NOT_IMPORTED:
        assert (ROOT / NOT_IMPORTED[package]).exists()
        return
    module = USED.get(package, package.replace("-", "_"))
    pattern = re.compile(rf"^\s*(import|from) {module}\b", re.MULTILINE)
    sources = [ROOT / name for name in TRACKED if name.split("/")[0] in {"sweep", "models", "analysis"}]
    assert any(pattern.search(path.read_text()) for path in sources if path.suffix == ".py"), package


def test_every_folder_with_code_is_packaged():
    folders = {str(Path(name).parent).replace("/", ".") for name in TRACKED if name.endswith("__init__.py")}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_package_init_files_are_empty():
    assert all((ROOT / name).stat().st_size == 0 for name in TRACKED if name.endswith("__init__.py"))
