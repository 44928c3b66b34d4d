"""How is training state put on disk and read back? Safetensors and JSON, newest valid wins, nothing is unpickled.

Two kinds of folder. ``ckpt`` holds resumable states, ``trunk-<step>`` and ``branch-<point>-<step>``: the last two,
the trunk state that the branch in progress left from, and the furthest one. ``points`` holds the weights at
measurement points, raw and averaged, which evaluations and later stages load; they are kept.

A state is a folder that appears by one rename, so that a killed writer leaves nothing that looks valid; a file
that was damaged later fails its checksum and the one before it is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
STATE = re.compile(r"(?:trunk|branch-([0-9]+))-([0-9]+)")  # the name of a resumable state: point, step


class Damaged(ValueError):
    """A checkpoint that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Saved:
    """One resumable state on disk: on the trunk (``point`` None) or on the branch to ``point``."""

    path: Path
    point: int | None
    step: int


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(folder: Path, name: str, state: State, meta: dict[str, Any]) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json`` as one new folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        tensors = staging / f"{name}.safetensors"
        save_file({key: value.detach().contiguous().cpu() for key, value in state.items()}, tensors)
        record = {**meta, "crc32": _checksum(tensors), "bytes": tensors.stat().st_size}
        (staging / f"{name}.json").write_text(json.dumps(record, sort_keys=True))
        _sync(tensors)
        _sync(staging / f"{name}.json")
        if folder.exists():  # an earlier attempt got as far as here
            shutil.rmtree(folder)
        os.replace(staging, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read(folder: Path, name: str, device: str = "cpu") -> tuple[State, dict[str, Any]]:
    """Tensors and meta of a checkpoint folder; ``Damaged`` when any byte of it is not what was written."""
    tensors = folder / f"{name}.safetensors"
    try:
        meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_bytes())
        if tensors.stat().st_size != meta["bytes"] or _checksum(tensors) != meta["crc32"]:
            raise Damaged(f"{tensors}: its checksum is not the recorded one")
        with safe_open(tensors, framework="pt", device=device) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 (not a dict)
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"{tensors}: cannot be read ({error})") from None


class Checkpoints:
    """The checkpoints of one run.

    ``guard`` is called before anything is written; the worker passes a check that its attempt still owns the run.
    What a killed writer left half-written is removed when the next attempt opens them.
    """

    def __init__(self, ckpt: Path, points: Path, guard: Callable[[], None] = lambda: None, keep: int = 2) -> None:
        self.ckpt, self.points, self.guard, self.keep = ckpt, points, guard, keep
        for left in (*ckpt.glob(".trunk-*"), *ckpt.glob(".branch-*"), *points.glob(".[0-9]*")):
            shutil.rmtree(left, ignore_errors=True)

    def _saved(self) -> Iterator[Saved]:
        if not self.ckpt.is_dir():
            return
        for path in self.ckpt.iterdir():
            if found := STATE.fullmatch(path.name):  # what else lies there is somebody's copy
                yield Saved(path, int(found[1]) if found[1] else None, int(found[2]))

    def save(self, state: State, meta: dict[str, Any], step: int, point: int | None = None) -> None:
        """Save a resumable state, then drop those that are no longer needed.

        States of the trunk go when the trunk is saved (the furthest stays: a longer point can start there), those of a
        branch when it is saved, when its point is reached, or when the trunk has passed that point.
        """
        self.guard()
        name = f"trunk-{step:08d}" if point is None else f"branch-{point:08d}-{step:08d}"
        write(self.ckpt / name, "state", state, meta)
        alike = sorted((s for s in self._saved() if s.point == point), key=lambda s: s.step)
        if point is None:
            kept = [*[s for s in alike if s.step <= step][-self.keep :], alike[-1]]
            kept += [s for s in self._saved() if s.point is not None and s.point > step]
        else:
            kept = [*alike[-self.keep :], *(s for s in self._saved() if s.point is None)]
        for saved in self._saved():
            if saved not in kept:
                shutil.rmtree(saved.path, ignore_errors=True)

    def _newest(self, fits: list[Saved]) -> tuple[State, Saved] | None:
        for saved in sorted(fits, key=lambda s: s.step, reverse=True):
            try:
                return read(saved.path, "state")[0], saved
            except Damaged:
                continue
        return None

    def resume_trunk(self, leaves: int) -> tuple[State, Saved] | None:
        """The newest valid trunk state at or before step ``leaves``."""
        return self._newest([s for s in self._saved() if s.point is None and s.step <= leaves])

    def resume(self, point: int, leaves: int) -> tuple[State, Saved] | None:
        """The newest valid state on the way to ``point``: on its branch, else on the trunk before it."""
        return self._newest([s for s in self._saved() if s.point == point]) or self.resume_trunk(leaves)

    def has_point(self, point: int) -> bool:
        return (self.points / f"{point:08d}" / "point.json").exists()

    def save_point(self, point: int, state: State, meta: dict[str, Any]) -> None:
        self.guard()
        write(self.points / f"{point:08d}", "point", state, {**meta, "point": point})
        for saved in self._saved():
            if saved.point == point:
                shutil.rmtree(saved.path, ignore_errors=True)


def load_point(
    folder: Path, point: int, module: torch.nn.Module, weights: Literal["ema", "raw"], device: str = "cpu"
) -> dict[str, Any]:
    """Load the weights of a measurement point under ``folder`` (a run's ``points``) into ``module``; return its meta.

    The module moves to the device. ``ema`` takes the averaged parameters, and the raw tensors for what is not averaged
    (buffers).
    """
    state, meta = read(folder / f"{point:08d}", "point", device)
    chosen = {key.removeprefix("raw."): value for key, value in state.items() if key.startswith("raw.")}
    if weights == "ema":
        averaged = {key.removeprefix("ema."): value for key, value in state.items() if key.startswith("ema.")}
        if not averaged:
            raise ValueError(f"weights: ema asked for, but {folder}/{point:08d} was trained with ema 0; allowed: raw")
        chosen |= averaged
    module.to(device).load_state_dict(chosen)
    return meta
