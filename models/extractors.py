"""How were the committed metric extractors trained? This script; on training images only, minutes on one thread.

    python -m models.extractors --train digits-supervised   # or several names, or all
    python -m models.extractors --check                     # files against their recorded hashes

An extractor is an artefact: its training alone changes the scale of every distance it measures, so the weights are
committed and named by their hash, and training again is for another artefact, not for reproducing a number (bits
follow the machine and the version of torch).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint import Checkpoints, load_point
from models.config import EXTRACTORS, DataFields, DeadLeaves, Digits, Recipe, Runtime
from models.data import Batch, Images, Split
from models.encoders import WEIGHTS, Classifier, ConvEncoder, SimCLR, record, sha256
from models.training import train

SEED = 20241216
PROBE = (6000, 3000)  # draws of the training and of the held-out split behind the linear probe


@dataclass(frozen=True)
class Sizes:
    """Images of several sizes as one stream: batch b of every ``len(sources)`` comes from source b."""

    sources: tuple[Images, ...]

    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch:
        return self.sources[position // count % len(self.sources)].draw(split, position, count, seed, device)


@dataclass(frozen=True)
class Training:
    """One artefact: on which data (the first is the one that is probed), which network, objective and recipe."""

    data: tuple[DataFields, ...]
    channels: int
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    objective: Callable[[ConvEncoder, int], nn.Module]
    options: dict[str, Any]
    recipe: Recipe
    steps: int

    def module(self) -> nn.Module:
        encoder = ConvEncoder(self.channels, self.widths, self.strides)
        if self.objective is Classifier:
            return Classifier(encoder, self.data[0].labels, **self.options)
        return SimCLR(encoder, **self.options)


DIGITS = {"data": (Digits(),), "channels": 1, "widths": (32, 64, 64, 64), "strides": (1, 1, 2, 1)}
# five batches of the default size, then one of twice the side: features hold at 64 px too
LEAVES = {
    "data": (*5 * (DeadLeaves(),), DeadLeaves(size=64)),
    "channels": 3,
    "widths": (16, 32, 64, 96, 128),
    "strides": (1, 2, 1, 2, 2),
}
TRAININGS: dict[str, Training] = {
    "digits-supervised": Training(
        **DIGITS, objective=Classifier, options={}, recipe=Recipe(batch=128, lr=2e-3), steps=800
    ),
    "digits-contrastive": Training(
        **DIGITS,
        objective=SimCLR,
        options={
            "crop": 1.0,
            "rotate_deg": 15,
            "scale": (0.75, 1.15),
            "shift": 0.15,
            "jitter": 0.2,
            "noise": 0.05,
            "flip": False,
        },
        recipe=Recipe(batch=256, lr=2e-3),
        steps=800,
    ),
    # short on purpose: after 900 steps it was 30 points more accurate, and found strong blur less far than weak blur
    "dead-leaves-supervised": Training(
        **LEAVES, objective=Classifier, options={}, recipe=Recipe(batch=64, lr=2e-3), steps=300
    ),
    "dead-leaves-contrastive": Training(
        **LEAVES,
        objective=SimCLR,
        options={
            "crop": 0.75,
            "rotate_deg": 0,
            "scale": (1.0, 1.0),
            "shift": 0,
            "jitter": 0.2,
            "noise": 0,
            "flip": True,
        },
        recipe=Recipe(batch=96, lr=2e-3),
        steps=400,
    ),
}


@torch.no_grad()
def features(encoder: ConvEncoder, images: Images, split: Split, count: int) -> tuple[Tensor, Tensor]:
    """Features [count, D] and labels [count] of a draw."""
    batch = images.draw(split, 0, count, SEED)
    return torch.cat([encoder(part) for part in batch["images"].split(250)]), batch["labels"]


def probe(encoder: ConvEncoder, images: Images) -> float:
    """Held-out accuracy of a logistic regression on features of training draws."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    line = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    seen, unseen = (
        features(encoder, images, split, count) for split, count in zip(("train", "heldout"), PROBE, strict=True)
    )
    line.fit(*(x.numpy() for x in seen))
    return float(line.score(*(x.numpy() for x in unseen)))


def make(name: str, folder: Path = WEIGHTS, steps: int | None = None) -> dict[str, Any]:
    """Train one artefact and write its weights and record into ``folder``; returns the record."""
    training = TRAININGS[name]
    steps = steps or training.steps
    sources = {fields: fields.build() for fields in set(training.data)}
    torch.manual_seed(SEED)
    module = training.module()
    logs: dict[str, float] = {}

    def report(step: int, trained: int, metrics: dict[str, float], point: int | None) -> None:
        logs.update(metrics)
        print(f"{name} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        points = Path(scratch) / "points"
        outcome = train(
            module,
            Sizes(tuple(sources[fields] for fields in training.data)),
            training.recipe,
            (steps,),
            seed=SEED,
            runtime=Runtime(device="cpu", threads=torch.get_num_threads(), log_every=100),
            checkpoints=Checkpoints(Path(scratch) / "ckpt", points),
            record=report,
        )
        assert outcome.state == "done", outcome
        load_point(points, steps, module, "raw")
    encoder: ConvEncoder = module.requires_grad_(False).eval().encoder
    accuracy = {}
    for fields in dict.fromkeys(training.data):
        accuracy[f"linear probe, {fields.resolution} px"] = probe(encoder, sources[fields])
        if isinstance(module, Classifier):
            values, labels = features(encoder, sources[fields], "heldout", PROBE[1])
            right = (module.head(values).argmax(1) == labels).double().mean()
            accuracy[f"classifier, {fields.resolution} px"] = float(right)
    path = folder / f"{name}.safetensors"
    staging = path.with_suffix(f".{os.getpid()}")
    save_file({key: value.contiguous() for key, value in encoder.state_dict().items()}, staging)
    os.replace(staging, path)
    held = {
        "sha256": sha256(path),
        "encoder": {"channels": training.channels, "widths": training.widths, "strides": training.strides},
        "objective": {"name": training.objective.__name__, **training.options},
        "data": [{"name": type(fields).__name__, **fields.identity()} for fields in training.data],
        "split": "train",
        "recipe": training.recipe.identity(),
        "steps": steps,
        "seed": SEED,
        "accuracy_heldout": {key: round(value, 4) for key, value in accuracy.items()},
        "loss_last": round(logs["loss"], 4),
        "seconds": round(time.perf_counter() - began),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path.with_suffix(".json").write_text(json.dumps(held, indent=2) + "\n")
    return held


def check(folder: Path = WEIGHTS) -> list[str]:
    """What is wrong with the committed artefacts, one line each; nothing when all is as recorded."""
    faults = []
    for extractor in EXTRACTORS.values():
        if extractor.weights is None:
            continue
        path = folder / extractor.weights
        if not path.is_file():
            faults.append(f"{path}: missing; python -m models.extractors --train {path.stem} makes one")
        elif sha256(path) != record(path)["sha256"]:
            faults.append(f"{path}: its sha256 is not the recorded one")
    return faults


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.extractors", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", nargs="+", choices=[*TRAININGS, "all"], metavar="NAME")
    what.add_argument("--check", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        faults = check()
        print("\n".join(faults) or f"{len(TRAININGS)} extractors are as recorded", file=sys.stderr if faults else None)
        return 2 if faults else 0
    torch.set_num_threads(1)
    for name in TRAININGS if "all" in chosen.train else chosen.train:
        print(json.dumps({name: make(name)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
