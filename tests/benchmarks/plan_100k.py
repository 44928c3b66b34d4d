"""How long does planning 100,000 runs take, and how much memory? Asked: less than 10 s and 1 GiB.

python tests/benchmarks/plan_100k.py               # 100,000 evaluations of 2,000 trunks, and 100,000 trunks
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = """
study: many
data: {{family: digits}}
tokenizer:
  family: vq
  fields: {{width: 16}}
  axes:
    - list:
        - {{tokens: 4, codebook: 16}}
        - {{tokens: 4, codebook: 64}}
        - {{tokens: 4, codebook: 256}}
        - {{tokens: 16, codebook: 8}}
        - {{tokens: 16, codebook: 64}}
  steps: [1000]
  train: {{lr: 2.0e-3}}
  seeds: [0, 1, 2, 3]
generator:
  family: llama
  sizes: [5k, 25k, 120k, 600k]
  axes:
    - product: {{train.lr: [0.001, 0.002, 0.004, 0.008, 0.016]}}
  steps: [200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000]
  train: {{batch: {{rule: tokens, tokens: 1024}}}}
  seeds: {seeds}
evaluation:
  - name: unguided
    of: generator
    extractors: [digits-supervised, digits-contrastive]
    points: all
    seeds: {evaluations}
price: {{peak_tflops: 0.06}}
"""
CASES = {
    "evaluations": {"seeds": list(range(5)), "evaluations": list(range(5))},
    "trunks": {"seeds": list(range(250)), "evaluations": [0]},
}


def measure(case: str) -> None:
    """Plan and write one case, and say what it took."""
    start = time.perf_counter()
    from sweep.plan import load, plan, write

    text = GRID.format(**CASES[case])
    if case == "trunks":
        text = text[: text.index("evaluation:")] + text[text.index("price:") :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grid.yaml"
        file.write_text(text)
        planned = plan(load(file), folder)
        write(planned)
        size = (planned.study / "plan.parquet").stat().st_size / 2**20
    told = {
        "case": case,
        "rows": planned.table.num_rows,
        "wall_s": round(time.perf_counter() - start, 2),
        "cpu_s": round(time.process_time(), 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "disk_mib": round(size, 2),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for name in CASES:
            subprocess.run([sys.executable, __file__, name], check=True)
