"""How long is a training step on a CPU, and how much of it is the loop's own? Ratios of one run: machines are shared.

python tests/benchmarks/train_step.py                    # the loop against a bare step of the same module
python tests/benchmarks/train_step.py --against main~5   # this tree against another commit, alternately
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS, STEPS, WARMUP = 5, 30, 10
CASES: dict[str, tuple[str, dict[str, Any], int]] = {  # kind of module, its fields, images per step
    "vq 4x256": ("tokenizer", {"tokens": 4, "codebook": 256, "width": 8, "attention": False}, 64),
    "vq 16x64": ("tokenizer", {"tokens": 16, "codebook": 64, "width": 8, "attention": False}, 64),
    "llama 5k": ("generator", {"layers": 1, "width": 20, "heads": 1}, 64),
    "llama 25k": ("generator", {"layers": 2, "width": 32, "heads": 2}, 64),
    "llama 120k": ("generator", {"layers": 2, "width": 72, "heads": 3}, 64),
    "llama 600k": ("generator", {"layers": 3, "width": 128, "heads": 4}, 64),
}


def steps(case: str) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """One training step by the loop, and one of the same module, data and optimiser with nothing around it."""
    import torch

    from models import config
    from models.training import Loop

    torch.set_num_threads(1)
    kind, fields, batch = CASES[case]
    data = config.Digits(views=64)
    tokenizer = config.VQ(**(fields if kind == "tokenizer" else {"tokens": 16, "codebook": 64}))
    source = data.build()

    class Codes:
        def draw(self, split: str, position: int, count: int, seed: int, device: str = "cpu") -> dict[str, Any]:
            drawn = torch.Generator().manual_seed(position)
            codes = torch.randint(0, tokenizer.codebook, (count, tokenizer.tokens), generator=drawn)
            return {"codes": codes, "labels": torch.randint(0, data.labels, (count,), generator=drawn)}

    def built() -> Any:
        torch.manual_seed(0)
        if kind == "tokenizer":
            return tokenizer.build(data)
        return config.Llama(**fields).build(tokenizer.latent(data), data.labels)

    stream = source if kind == "tokenizer" else Codes()
    recipe = config.Recipe(batch=batch, lr=1e-3)
    loop = Loop(built(), stream, recipe, seed=0, runtime=config.Runtime(threads=1))
    module = built().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    draws = {name: torch.rand(batch, *shape) for name, (_, shape) in getattr(module, "draws", {}).items()}

    def bare(step: int) -> None:
        module.loss(stream.draw("train", step * batch, batch, 0) | draws, step)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda step: loop.step(step, 10**6, None), bare


def clock(step: Callable[[int], Any], first: int) -> float:
    """Milliseconds per step."""
    began = time.perf_counter()
    for number in range(first, first + STEPS):
        step(number)
    return 1e3 * (time.perf_counter() - began) / STEPS


def measure(case: str) -> dict[str, Any]:
    """Medians of alternating rounds."""
    ours, bare = steps(case)
    for number in range(WARMUP):
        ours(number)
        bare(number)
    rounds = [(clock(ours, WARMUP + STEPS * i), clock(bare, WARMUP + STEPS * i)) for i in range(ROUNDS)]
    loop_ms, bare_ms = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    return {"case": case, "loop_ms": round(loop_ms, 2), "bare_ms": round(bare_ms, 2), "ratio": round(ratio, 3)}


def against(revision: str) -> None:
    """This tree's loop against that of ``revision``, in processes that take turns."""
    here = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--detach", folder, revision], cwd=here, check=True, text=True)
        try:
            for case in CASES:
                found: dict[str, list[float]] = {str(here): [], folder: []}
                for _ in range(ROUNDS):
                    for tree, values in found.items():
                        command = [sys.executable, __file__, "--case", case]
                        environment = {**os.environ, "PYTHONPATH": tree}
                        answer = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE)
                        values.append(json.loads(answer.stdout)["loop_ms"])
                new, old = (statistics.median(values) for values in found.values())
                print(json.dumps({"case": case, "ms": new, revision: old, "ratio": round(new / old, 3)}), flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=here, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="one case only")
    parser.add_argument("--against", metavar="REV", help="a commit to compare with")
    arguments = parser.parse_args()
    if arguments.against:
        against(arguments.against)
    else:
        for name in [arguments.case] if arguments.case else CASES:
            print(json.dumps(measure(name)), flush=True)
