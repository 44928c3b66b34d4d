"""Does a family from outside the tree go from a grid to figures like those inside?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from analysis import load

ROOT = Path(__file__).parent.parent
GRID = """
study: outside
data: {family: digits, views: 2, views_heldout: 1}
tokenizer:
  family: vq
  fields: {width: 4, attention: false}
  axes: [{list: [{tokens: 4, codebook: 8}, {tokens: 16, codebook: 8}]}]
  steps: [10]
  train: {batch: 32, lr: 1.0e-2, warmup: 2}
  seeds: [0, 1]
generator:
  family: example_family:Independent
  steps: [10, 20, 40]
  train: {batch: 64, lr: 0.1, warmup: 2}
evaluation:
  - {name: reconstruction, of: tokenizer, samples: 64, extractors: [digits-supervised]}
  - {name: unguided, of: generator, samples: 64, extractors: [digits-supervised], points: all}
run: {threads: 1}
price: {device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7]}
"""


def call(folder: Path, *arguments: str) -> str:
    """A command of the README in ``folder``, with the example on the path and one thread."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_plan_to_figure(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    call(tmp_path, "sweep.plan", "grid.yaml")
    for stage in (("tokenizer",), ("generator",), ("evaluation",)):
        call(tmp_path, "sweep.launch", "results/outside", "--stage", *stage, "--slots", "1")
    points = load.points(tmp_path / "results" / "outside")
    assert points.height == 2 * 2 * 3
    assert points["nll_bits"].is_not_null().all()
    assert (points["nll_bits"] < points["bits_nominal"]).all()
    rising = points.sort("point").group_by("tokenizer", maintain_order=True).agg("nll_bits")["nll_bits"]
    assert all(lengths[0] > lengths[-1] for lengths in rising.to_list())  # it learns
    call(tmp_path, "analysis.figures", "results/outside")
    figures = tmp_path / "results" / "outside" / "figures"
    drawn = {path.name for path in figures.iterdir()}
    assert {"fig1_generation.png", "fig4_samples.png", "report.md"} <= drawn
    # its generators have no named size and one of parameters for each rate; no cell is empty
    panels = json.loads((figures / "fig4_samples.json").read_text())["panels"]
    assert [len(panel["pictures"]) for panel in panels] == [1, 1]  # two rates, one size
    assert panels[0]["title"] == "one size"
    markers = json.loads((figures / "fig1_generation.json").read_text())["panels"][0]["lines"]
    assert sum(len(line["x"]) for line in markers if line["marker"] == "o") == points.height


def test_the_example_is_short():
    assert len((ROOT / "tests" / "example_family.py").read_text().splitlines()) <= 60
