"""How long does planning 100,000 runs take, and how much memory? Asked: less than 10 s and 1 GiB.

python tests/benchmarks/plan_100k.py               # 100,000 evaluations of 2,000 trunks, and 100,000 trunks
"""

from __future__ import annotations

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
    """Plan and write one case; print rows, seconds and the peak of memory."""
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
    wall, cpu = time.perf_counter() - start, time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{case}: {planned.table.num_rows:,} rows; with imports {wall:.1f} s, {cpu:.1f} s of CPU; {peak:.2f} GiB; "
        f"{size:.1f} MiB on disk"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for name in CASES:
            subprocess.run([sys.executable, __file__, name], check=True)
