"""Where do images come from, and in which order? Digits, dead leaves, an image folder; and the cache of their codes.

Every source is an endless stream with random access: image i of a stream is a function of (split, seed, i) alone,
whatever batches it is read in. So a position is all that a resumed run has to know. Nothing is drawn in turn from
a generator; random numbers are counted off by an integer hash (SplitMix64, Steele, Lea and Flood 2014), which
gives the same bits on every device.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import DeadLeaves, Digits, ImageFolder, Latent
from models.tokenizers.vq import usage

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "heldout"]
Batch = dict[str, Tensor]
SPLITS: tuple[Split, ...] = ("train", "heldout")


def sent(value: Tensor, device: str) -> Tensor:
    """A tensor of the host on ``device``. The host goes on while a GPU fetches it, which takes pinned memory.

    The value may go out of use at once: torch does not hand the pinned memory out again before the copy is over.
    """
    if torch.device(device).type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


class Images(Protocol):
    """A source of labelled images."""

    fields: Any  # models.config.DataFields

    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch:
        """Images ``position`` to ``position + count`` of the stream (split, seed).

        ``images`` float32 [count, C, H, W] in [-1, 1], ``labels`` int64 [count], ``index`` int64 [count]: which
        image of the source this is a view of (of an infinite source: its number in the stream).
        """
        ...


# --- counted randomness ------------------------------------------------------------------------------------------


def key(*parts: int | str) -> int:
    """A 63-bit key from names and numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _hashed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (products wrap; shifts are made logical)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniforms(stream: int, number: Tensor, slots: int) -> Tensor:
    """Random numbers in [0, 1), float32 [B, slots]; row b depends on (stream, number[b]) only."""
    slot = torch.arange(slots, device=number.device) * (0x9E3779B97F4A7C15 - 2**64)
    bits = _hashed(_hashed(number ^ stream)[:, None] + slot)
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


@lru_cache(maxsize=4)
def permutation(stream: int, epoch: int, total: int) -> Tensor:
    """The order of ``total`` things in one epoch, int64 [total]; not to be written to."""
    return torch.argsort(_hashed(torch.arange(total) ^ key(stream, epoch)), stable=True)


def visits(stream: int, position: int, count: int, total: int) -> Tensor:
    """Which of ``total`` things the positions visit: each once per epoch, int64 [count]."""
    first, last = position // total, (position + count - 1) // total
    order = torch.cat([permutation(stream, epoch, total) for epoch in range(first, last + 1)])
    return order[position - first * total :][:count]


# --- digits ------------------------------------------------------------------------------------------------------


def scans() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: float32 [1797, 1, 8, 8] in [0, 1] (background 0) and labels int64 [1797].

    The file is read without importing scikit-learn, which takes seconds in every process.
    """
    package = importlib.util.find_spec("sklearn")
    file = Path((package and package.origin) or "").parent / "datasets/data/digits.csv.gz"
    if file.is_file():
        table = np.loadtxt(file, delimiter=",")
        pixels, labels = table[:, :-1], table[:, -1]
    else:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    return images, torch.from_numpy(labels.astype(np.int64))


def stratified(labels: Tensor, heldout: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the ``heldout`` images, every class in proportion (largest remainders)."""
    classes = int(labels.max()) + 1
    exact = torch.bincount(labels, minlength=classes).double() * heldout / len(labels)
    take = exact.long()
    take[torch.argsort(take - exact, stable=True)[: heldout - int(take.sum())]] += 1
    shuffled = permutation(key("split", seed), 0, len(labels))
    held = torch.cat([shuffled[labels[shuffled] == c][: int(take[c])] for c in range(classes)])
    inside = torch.ones(len(labels), dtype=torch.bool)
    inside[held] = False
    return inside.nonzero().flatten(), held.sort().values


def warp(images: Tensor, angle: Tensor, scale: Tensor, shift: Tensor, shear: Tensor) -> Tensor:
    """Turn by ``angle`` (radians), scale and shear about the centre, then shift; bilinear, zeros from outside.

    images [B, C, S, S]; angle, scale, shear [B]; shift [B, 2] in pixels (right, down).
    """
    side = images.shape[-1]
    axis = (torch.arange(side, device=images.device) + 0.5) * 2 / side - 1
    shift = shift * 2 / side
    x = axis[None, None, :] - shift[:, 0, None, None]
    y = axis[None, :, None] - shift[:, 1, None, None]
    cos, sin, shear = (v[:, None, None] for v in (angle.cos() / scale, angle.sin() / scale, shear))
    back_y = cos * y - sin * x  # inverse of turn x scale x shear: where in the source a pixel comes from
    back_x = cos * x + sin * y - shear * back_y
    grid = torch.stack((back_x, back_y), dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class DigitImages:
    """The digits, both splits under the same small affine changes (a reference must know what it refers to)."""

    def __init__(self, fields: Digits) -> None:
        self.fields = fields
        self.scans, self.labels = scans()
        held = fields.images("heldout")
        assert held is not None
        train, heldout = stratified(self.labels, held, fields.split_seed)
        self.members = {"train": train, "heldout": heldout}

    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch:
        fields, members = self.fields, self.members[split]
        index = members[visits(key("digits", split, seed, "order"), position, count, len(members))]
        number = torch.arange(position, position + count)
        u = uniforms(key("digits", split, seed, "warp"), number, 5) * 2 - 1
        images = warp(
            self.scans[index],
            angle=u[:, 0] * math.radians(fields.rotate_deg),
            scale=1 + u[:, 1] * fields.scale,
            shift=u[:, 2:4] * fields.shift_px,
            shear=u[:, 4] * fields.shear,
        )
        batch = {"images": images * 2 - 1, "labels": self.labels[index], "index": index}
        return {name: sent(value, device) for name, value in batch.items()}


# --- dead leaves -------------------------------------------------------------------------------------------------


class Leaves(NamedTuple):
    """What is painted: B images of N leaves from front to back, lengths in units of the image side."""

    radius: Tensor  # [B, N] of the circle around the shape
    centre: Tensor  # [B, N, 2] right, down
    angle: Tensor  # [B, N] radians
    colour: Tensor  # [B, N + 1, 3] in [-1, 1]; the last is the ground


NOTCH = 0.45  # radius of a star's notches
WEDGE = math.pi / 5


def _star(u: Tensor, v: Tensor) -> Tensor:
    turn = torch.remainder(torch.atan2(v, u) + WEDGE, 2 * WEDGE) - WEDGE  # ten wedges folded onto one edge
    slope = (1 - NOTCH * math.cos(WEDGE)) / (NOTCH * math.sin(WEDGE))
    return torch.hypot(u, v) * (turn.cos() + slope * turn.abs().sin())


# Each shape as a function of (u, v), in units of the radius, that is at most 1 inside.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": lambda u, v: u * u + v * v,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) * math.sqrt(2),
    "triangle": lambda u, v: torch.maximum(2 * v, math.sqrt(3) * u.abs() - v),
    "ellipse": lambda u, v: u * u + 6.25 * v * v,
    "star": _star,
}


class DeadLeafImages:
    """Occluding shapes with power-law sizes, infinite and made where they are used.

    The dead leaves model in the form that Lee, Mumford and Huang (2001, "Occlusion models for natural images",
    IJCV 41) fitted to photographs: leaves with density of radii ~ r^-exponent, laid over one another. Baradad et
    al. (2021, "Learning to see by looking at noise") train encoders on such images. A class is a shape family and
    a palette: hues around one of ``palettes`` points of the colour circle. Classes take turns along the stream.
    """

    # leaf x pixel tests at a time: a cache's worth, a GPU's worth
    PIXELS: ClassVar[dict[str, int]] = {"cpu": 2**17, "cuda": 2**26}

    def __init__(self, fields: DeadLeaves) -> None:
        self.fields = fields

    def labels(self, split: Split, position: int, count: int, seed: int) -> Tensor:
        """shape family x palettes + palette, int64 [count]."""
        offset = key("dead leaves", split, seed, "labels") % self.fields.labels
        return (torch.arange(position, position + count) + offset) % self.fields.labels

    def leaves(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Leaves:
        """The random part of images ``position`` to ``position + count``."""
        fields, total = self.fields, self.fields.leaves
        number = torch.arange(position, position + count, device=device)
        u = uniforms(key("dead leaves", split, seed), number, 8 * (total + 1)).view(count, total + 1, 8)
        low, high = (r ** (1 - fields.exponent) for r in (fields.radius_min, fields.radius_max))
        palette = sent(self.labels(split, position, count, seed), device) % fields.palettes
        hue = (palette[:, None] + u[..., 4] + u[..., 5] - 1) / fields.palettes  # neighbours overlap
        saturation, value = 0.3 + 0.7 * u[..., 6], 0.15 + 0.85 * u[..., 7]
        k = (torch.arange(5.0, 0.0, -2.0, device=device) + 6 * hue[..., None]) % 6  # 5, 3, 1: HSV to RGB
        chroma = (value * saturation)[..., None] * torch.minimum(k, 4 - k).clamp(0, 1)
        return Leaves(
            radius=(low + u[:, :-1, 0] * (high - low)) ** (1 / (1 - fields.exponent)),
            centre=u[:, :-1, 1:3],
            angle=2 * math.pi * u[:, :-1, 3],
            colour=(value[..., None] - chroma) * 2 - 1,
        )

    def paint(self, shape: str, leaves: Leaves) -> Tensor:
        """Images [B, 3, S, S]; a pixel takes the colour of the first leaf that covers its centre."""
        side = self.fields.size
        (count, total), device = leaves.radius.shape, leaves.radius.device
        axis = (torch.arange(side, device=device) + 0.5) / side
        cos, sin = (leaves.angle.cos() / leaves.radius, leaves.angle.sin() / leaves.radius)
        x, y = (axis - leaves.centre[..., i, None] for i in (0, 1))  # [B, N, S]
        ux, uy, vx, vy = cos[..., None] * x, sin[..., None] * y, -sin[..., None] * x, cos[..., None] * y
        front = torch.full((count, side, side), total, dtype=torch.int32, device=device)
        together = max(1, self.PIXELS.get(device.type, 2**17) // front.numel())
        for first in range(0, total, together):
            part = slice(first, first + together)
            u = ux[:, part, None, :] + uy[:, part, :, None]
            v = vx[:, part, None, :] + vy[:, part, :, None]
            layer = torch.arange(total, dtype=torch.int32, device=device)[part, None, None]
            covered = torch.where(SHAPES[shape](u, v) <= 1, layer, total)
            front = torch.minimum(front, covered.amin(1))
        chosen = front.view(count, -1, 1).long().expand(-1, -1, 3)
        return leaves.colour.gather(1, chosen).transpose(1, 2).reshape(count, 3, side, side)

    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch:
        fields = self.fields
        labels = self.labels(split, position, count, seed)
        leaves = self.leaves(split, position, count, seed, device)
        images = torch.empty(count, 3, fields.size, fields.size, device=device)
        most = max(1, self.PIXELS.get(images.device.type, 2**17) // fields.size**2)
        for number, shape in enumerate(fields.shapes):
            of_shape = (labels // fields.palettes == number).nonzero().flatten()  # on the host, which needs the count
            for first in range(0, len(of_shape), most):
                rows = sent(of_shape[first : first + most], device)
                images[rows] = self.paint(shape, Leaves(*(value[rows] for value in leaves)))
        index = torch.arange(position, position + count, device=device)
        return {"images": images, "labels": sent(labels, device), "index": index}


# --- image folder ------------------------------------------------------------------------------------------------

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def _reduced(image: Image, side: int) -> Image:
    """Shorter side resized to ``side`` as ADM does it: halved by boxes while that is possible, then bicubic."""
    from PIL.Image import Resampling

    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)


class FolderImages:
    """Images on disk. Cropping and flipping are the same for both splits; files are decoded by torch's threads.

    ``center`` is ADM's centre crop; ``random`` resizes the shorter side to 1 to 1.25 times the size and crops
    anywhere, as LlamaGen trains its tokenizers. ValueError names the path where something is missing, where counts
    are not those of the grid, where the splits differ in their classes, or where a file cannot be read.
    """

    def __init__(self, fields: ImageFolder) -> None:
        self.fields, self.root = fields, Path(fields.root)
        if not self.root.is_dir():
            raise ValueError(f"root: {self.root} is no folder; allowed: one with train/ and heldout/ (or val/)")

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(torch.get_num_threads(), "decode")

    @cached_property
    def _train(self) -> tuple[list[Path], Tensor]:
        return self._scan("train")

    @cached_property
    def _heldout(self) -> tuple[list[Path], Tensor]:
        return self._scan(self._other)

    @property
    def _other(self) -> str:
        return "heldout" if (self.root / "heldout").is_dir() else "val"

    @cached_property
    def _classes(self) -> list[str]:
        """Names of the folders in both splits: a label is a place in this list."""
        train, heldout = self._folders("train"), self._folders(self._other)
        for ours, theirs in zip(train, heldout, strict=True):
            if ours != theirs:
                raise ValueError(
                    f"root: {self.root / 'train'} has a folder {ours} where {self.root / self._other} has {theirs}; "
                    "allowed: the same classes in both"
                )
        return train

    def _folders(self, split: str) -> list[str]:
        folder = self.root / split
        if not folder.is_dir():
            raise ValueError(f"root: {folder} is missing; allowed: train/ and heldout/ (or val/), a folder per class")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if len(classes) != self.fields.classes:
            raise ValueError(f"classes: {self.fields.classes} in the grid, but {folder} has {len(classes)} folders")
        return classes

    def _scan(self, split: str) -> tuple[list[Path], Tensor]:
        folder = self.root / split
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self._classes):
            names = sorted(n for n in os.listdir(folder / name) if Path(n).suffix.lower() in SUFFIXES)
            if not names:
                raise ValueError(f"root: {folder / name} holds no image; allowed: {', '.join(sorted(SUFFIXES))}")
            files += [folder / name / n for n in names]
            labels += [label] * len(names)
        field = "count" if split == "train" else "count_heldout"
        if len(files) != (told := getattr(self.fields, field)):
            raise ValueError(f"{field}: {told} in the grid, but {folder} has {len(files)} images")
        return files, torch.tensor(labels)

    def _read(self, path: Path, u: list[float]) -> np.ndarray:
        """One image, uint8 [S, S, 3]."""
        from PIL import Image, UnidentifiedImageError

        fields, side = self.fields, self.fields.size
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
            raise ValueError(f"root: {path} cannot be read as an image ({str(error).splitlines()[0]})") from None
        if fields.crop == "random":
            image = _reduced(image, side + int(u[0] * (math.ceil(1.25 * side) - side + 1)))
            left, top = (int(u[i + 1] * (image.size[i] - side + 1)) for i in (0, 1))
        else:
            image = _reduced(image, side)
            left, top = (image.width - side) // 2, (image.height - side) // 2
        pixels = np.asarray(image)[top : top + side, left : left + side]
        return pixels[:, ::-1] if fields.flip and u[3] < 0.5 else pixels

    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch:
        files, labels = self._train if split == "train" else self._heldout
        index = visits(key("folder", split, seed, "order"), position, count, len(files))
        number = torch.arange(position, position + count)
        u = uniforms(key("folder", split, seed, "crop"), number, 4).tolist()
        read = self._pool.map(self._read, [files[i] for i in index.tolist()], u)
        pixels = sent(torch.from_numpy(np.stack(list(read))), device)
        images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"images": images, "labels": sent(labels[index], device), "index": sent(index, device)}


# --- references --------------------------------------------------------------------------------------------------


def quantise(images: Tensor) -> Tensor:
    """Images in [-1, 1] as metrics see them: uint8 [B, C, H, W] -> [B, H, W, C], rounded to the nearest level."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def reference(images: Images, split: Split, count: int, seed: int) -> tuple[Tensor, str]:
    """A fixed draw that metrics compare with: uint8 [count, H, W, C] and the SHA-256 of its pixels."""
    parts = [
        quantise(images.draw(split, start, min(512, count - start), seed)["images"]) for start in range(0, count, 512)
    ]
    pixels = torch.cat(parts)
    return pixels, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


# --- codes -------------------------------------------------------------------------------------------------------


class Codes(Protocol):
    """What the cache needs of a tokenizer."""

    latent: Latent

    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, codes: Tensor) -> Tensor: ...
    def reconstruct(self, images: Tensor) -> Tensor: ...


class CodeCache:
    """Codes of a tokenizer on disk, memory-mapped, one folder per (tokenizer, data).

    Opening it compares every file with its recorded SHA-256; ValueError names the one that differs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
            recorded: dict[str, str] = self.manifest["files"]
            changed = [name for name in recorded if _sha256(folder / name) != recorded[name]]
            self._held = {} if changed else {name: np.load(folder / name, mmap_mode="r") for name in recorded}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: no readable code cache ({error}); delete the folder") from None
        if changed:
            raise ValueError(f"{folder / changed[0]}: not the codes that were written; delete the folder")

    def rows(self, split: Split) -> int:
        """Cached views of a split."""
        return len(self._held[f"{split}_labels.npy"])

    def take(self, split: Split, rows: np.ndarray | slice) -> Batch:
        """Rows as they were encoded: ``codes`` int64 [B, L], ``labels`` int64 [B], ``index`` int64 [B]."""
        names = {"codes": f"{split}.npy", "labels": f"{split}_labels.npy", "index": f"{split}_index.npy"}
        return {name: torch.from_numpy(self._held[file][rows].astype(np.int64)) for name, file in names.items()}

    def draw(self, split: Split, position: int, count: int, seed: int, device: str = "cpu") -> Batch:
        """Rows ``position`` to ``position + count`` of an endless stream that visits every row once per epoch."""
        rows = visits(key("codes", split, seed), position, count, self.rows(split))
        return {name: sent(value, device) for name, value in self.take(split, rows.numpy()).items()}

    @torch.no_grad()
    def check(self, tokenizer: Codes, images: Images, device: str = "cpu") -> None:
        """Decode the first and the last batch of stored codes; ValueError unless they are those of the images."""
        for split in SPLITS:
            batch, rows = self.manifest["batch"], self.rows(split)
            for start in sorted({0, (rows - 1) // batch * batch}):
                count = min(batch, rows - start)  # as encoded, so that rounding is the same
                drawn = images.draw(split, start, count, self.manifest["seed"], device)
                stored = self.take(split, slice(start, start + count))
                codes = stored["codes"].to(device)
                if not torch.equal(stored["index"], drawn["index"].cpu()):
                    raise ValueError(f"{self.folder}: {split} rows from {start} are of other images")
                same = tokenizer.encode(drawn["images"]) == codes
                if (share := same.float().mean().item()) < 0.999:  # a tie may fall either way on a GPU
                    raise ValueError(f"{self.folder}: {share:.1%} of {split} codes from row {start} encode again")
                error = (tokenizer.decode(codes) - tokenizer.reconstruct(drawn["images"])).abs()
                if (worst := max([0.0, *error[same.all(1)].flatten(1).amax(1).tolist()])) > 1e-3:
                    raise ValueError(f"{self.folder}: {split} codes from row {start} decode {worst:.2g} off")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def encode(
    tokenizer: Codes, images: Images, folder: Path, *, seed: int, batch: int = 250, device: str = "cpu"
) -> CodeCache:
    """Encode both splits into ``folder``, decode-checked, whole or not at all; an existing folder is opened.

    ``batch`` images are encoded at a time. Raises ValueError where stored codes do not decode to what the tokenizer
    makes of the images.
    """
    if folder.exists():
        return CodeCache(folder)
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    staging = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}"
    staging.mkdir(parents=True)
    try:
        manifest = {"version": 1, "data": images.fields.identity(), "seed": seed, "batch": batch, "splits": {}}
        manifest |= {"codebook": tokenizer.latent.codebook, "tokens": tokenizer.latent.tokens}
        for split in SPLITS:
            manifest["splits"][split] = _encode_split(tokenizer, images, staging, split, seed, batch, device)
        manifest["files"] = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        manifest["hash"] = hashlib.sha256(json.dumps(manifest["files"]).encode()).hexdigest()
        (staging / "manifest.json").write_text(json.dumps(manifest, indent=1))
        CodeCache(staging).check(tokenizer, images, device)
        try:
            os.replace(staging, folder)
        except OSError:
            if not folder.exists():  # another process was first: its codes are as good
                raise
        return CodeCache(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _header(kind: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What stands before the values in a .npy file.

    Files are written here and not mapped, nor left to ``np.save``: on a full disk the first kills the process, and the
    second raises an error that does not say why.
    """
    made = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(made, described)
    return made.getvalue()


def _encode_split(
    tokenizer: Codes, images: Images, folder: Path, split: Split, seed: int, batch: int, device: str
) -> dict[str, Any]:
    """Write one split's files; return what there is to know about its codes."""
    size, tokens = tokenizer.latent.codebook, tokenizer.latent.tokens
    assert size is not None
    rows = images.fields.images_cached(split)
    kind = np.dtype(np.uint16 if size <= 2**16 else np.int32)
    labels, index, prints = (np.empty(rows, kind) for kind in (np.int32, np.int64, np.int64))
    counts = torch.zeros(size, dtype=torch.int64)
    place = torch.arange(tokens) * 2**40
    with (folder / f"{split}.npy").open("wb") as file:
        file.write(_header(kind, (rows, tokens)))
        for start in range(0, rows, batch):
            drawn = images.draw(split, start, min(batch, rows - start), seed, device)
            codes = tokenizer.encode(drawn["images"]).cpu()
            part = slice(start, start + len(codes))
            file.write(codes.numpy().astype(kind).tobytes())
            labels[part], index[part] = drawn["labels"].cpu(), drawn["index"].cpu()
            prints[part] = _hashed(codes + place).sum(1)
            counts += torch.bincount(codes.flatten(), minlength=size)
    for name, values in (("labels", labels), ("index", index)):
        (folder / f"{split}_{name}.npy").write_bytes(_header(values.dtype, values.shape) + values.tobytes())
    unique = {"images": len(np.unique(index)), "sequences": len(np.unique(prints))}
    return {"rows": rows, **unique, **usage(counts, tokens)}
