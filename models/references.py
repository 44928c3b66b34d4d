"""What are images compared with? Fixed, hashed draws of the data, and their features, kept for every process.

A reference is drawn from the stream that training sees, augmentation included (``models.data.Images.draw``), so that
a perfect generator would score as well as the data themselves. A split with fewer images than the draw is visited
again under new augmentation.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models import fidelity
from models.config import DataFields
from models.data import Images, Split, quantise
from models.fidelity import FeatureSet

BATCH = 250  # images at once


class Features:
    """Features of an image set that arrives in parts, in every space, in one pass over the images."""

    def __init__(self, extractors: tuple[str, ...], device: str) -> None:
        self.parts: dict[str, list[Tensor]] = {name: [] for name in extractors}
        self.device = device

    def add(self, pixels: Tensor) -> None:
        """The next images, uint8 [B, H, W, C]."""
        for name, parts in self.parts.items():
            parts.append(fidelity.features(pixels.permute(0, 3, 1, 2), name, batch=BATCH, device=self.device))

    def sets(self, groups: Tensor | None = None) -> dict[str, FeatureSet]:
        return {name: FeatureSet(torch.cat(parts), groups) for name, parts in self.parts.items()}


class Reference(NamedTuple):
    """Features of a fixed draw, and 12 hex digits of the SHA-256 of its pixels."""

    features: FeatureSet
    hash: str


def references(
    images: Images,
    split: Split,
    count: int,
    seed: int,
    extractors: tuple[str, ...],
    *,
    cache: Path | None,
    device: str = "cpu",
) -> dict[str, Reference]:
    """The first ``count`` images of the stream (split, seed) in every space, as ``models.data.reference`` draws them.

    With ``cache`` (a folder) features are kept there, written by one rename, so that processes may share them; a file
    that cannot be read is made again.
    """
    found: dict[str, Reference] = {}
    paths: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name in extractors:
        drawn = {"data": _named(images.fields), "split": split, "count": count, "seed": seed}
        described = {**drawn, "extractor": name, "extractor_hash": fidelity.extractor_hash(name)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        if cache is not None:
            paths[name] = (cache / f"{digest}.safetensors", described)
            try:
                with safe_open(paths[name][0], framework="pt") as file:
                    values, groups = file.get_tensor("features"), file.get_tensor("index")
                    found[name] = Reference(FeatureSet(values, groups), file.metadata()["pixels"])
            except (OSError, SafetensorError, KeyError):
                continue
    missing = tuple(name for name in extractors if name not in found)
    if not missing:
        return found
    features, pixels, index = Features(missing, device), hashlib.sha256(), []
    for start in range(0, count, BATCH):
        batch = images.draw(split, start, min(BATCH, count - start), seed, device)
        part = quantise(batch["images"]).cpu()
        pixels.update(part.numpy().tobytes())
        features.add(part)
        index.append(batch["index"].cpu())
    made, short = features.sets(torch.cat(index)), pixels.hexdigest()[:12]
    for name in missing:
        found[name] = Reference(made[name], short)
        if name in paths:
            _keep(*paths[name], found[name])
    return found


def _named(fields: DataFields) -> dict[str, Any]:
    return {"family": f"{type(fields).__module__}:{type(fields).__qualname__}", **fields.identity()}


def _keep(path: Path, described: dict[str, Any], reference: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{uuid.uuid4().hex}")
    notes = path.with_name(f"{staging.name}.json")
    groups = reference.features.groups
    assert groups is not None
    tensors = {"features": reference.features.values.contiguous(), "index": groups}
    try:
        save_file(tensors, staging, metadata={"pixels": reference.hash})
        notes.write_text(json.dumps({**described, "pixels": reference.hash}, indent=1))
        os.replace(notes, path.with_suffix(".json"))
        os.replace(staging, path)
    finally:
        for left in (staging, notes):
            left.unlink(missing_ok=True)
