"""Does the notebook run from top to bottom, and is it stored without outputs?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).parents[2] / "analysis" / "notebooks" / "read_results.ipynb"

# in a process of its own: Jupyter's deprecation warnings are not ours to fail on
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
assert any("image/png" in output.get("data", {}) for output in outputs), "no figure was shown"
print(*(output.text for output in outputs if output.output_type == "stream"))
"""


def test_the_notebook_runs(digits):
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(NOTEBOOK.parent)]
    environment = {**os.environ, "STUDY": str(digits)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "y = E + A x^-a" in done.stdout
    assert "exponent over tokenizers: 0." in done.stdout


def test_no_outputs_are_stored():
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
