"""Which small networks turn images into features here, and what are they trained on?

One convolutional network, two objectives: a classifier, and SimCLR (Chen et al. 2020, arXiv 2002.05709), which
never sees a label. ``models.extractors`` trains the committed metric extractors with them.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"


class ConvEncoder(nn.Module):
    """Convolutions and a mean over positions: [B, channels, H, W] in [-1, 1] to features [B, widths[-1]].

    Fully convolutional: any image of at least ``prod(strides)`` pixels a side. Batch normalisation, fixed after
    training, keeps what normalising each image would divide out: how much contrast and fine detail it has.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        assert len(widths) == len(strides)
        self.channels, self.widths, self.strides = channels, tuple(widths), tuple(strides)
        layers: list[nn.Module] = []
        for cin, cout, stride in zip((channels, *widths), widths, strides, strict=False):
            layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    @property
    def dimension(self) -> int:
        return self.widths[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).mean(dim=(2, 3))


class Classifier(nn.Module):
    """Cross-entropy on labels through one linear layer.

    No label smoothing: it pulls the features of a class together, and a distance would see less within classes.
    """

    def __init__(self, encoder: ConvEncoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dimension, classes)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = self.head(self.encoder(batch["images"]))
        accuracy = (logits.argmax(1) == batch["labels"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["labels"]), "accuracy": accuracy}


class SimCLR(nn.Module):
    """NT-Xent between two random views of each image; the batch is the set of negatives.

    Views: a random square of ``crop`` times the side, turned, scaled and shifted where the ranges say so, mirrored
    where ``flip``; random contrast and brightness (of colour images a random mixing of channels too), and noise.
    Crops keep pixels as they are; turning and scaling blur them, and features then learn to overlook blur.
    """

    def __init__(
        self,
        encoder: ConvEncoder,
        *,
        crop: float,
        rotate_deg: float,
        scale: tuple[float, float],
        shift: float,
        jitter: float,
        noise: float,
        flip: bool,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.crop = encoder, temperature, crop
        self.rotate, self.scale, self.shift = math.radians(rotate_deg), scale, shift
        self.jitter, self.noise, self.flip = jitter, noise, flip
        width = encoder.dimension
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64))
        self.draws = {"views": ("uniform", (2, 8 + encoder.channels**2))}

    def view(self, images: Tensor, draw: Tensor) -> Tensor:
        """One augmented view [B, C, H, W] from uniform numbers [B, 8 + C^2]."""
        (count, channels, side, _), device = images.shape, images.device
        kept = round(side * self.crop)
        line = torch.arange(kept, device=device)
        rows, cols = ((draw[:, i, None] * (side - kept + 1)).long() + line for i in (6, 7))
        every = torch.arange(count, device=device)[:, None, None]
        images = images[every, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        signed = 2 * draw - 1
        angle, shift = signed[:, 0] * self.rotate, signed[:, 1:3] * self.shift
        low, high = (math.log(s) for s in self.scale)
        size = torch.exp(low + (high - low) * draw[:, 3])  # below 1: a crop, enlarged
        mirror = torch.where(draw[:, 4] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(size)
        cos, sin = size * torch.cos(angle), size * torch.sin(angle)
        affine = torch.stack([mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]], 1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        # mirrored beyond the border, as most crops of a larger picture would look
        moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        mix = torch.eye(channels, device=device) + self.jitter * signed[:, 8:].view(-1, channels, channels)
        mixed = torch.einsum("bij,bjhw->bihw", mix, moved) + self.jitter * signed[:, 5, None, None, None]
        return (mixed + self.noise * torch.randn_like(mixed)).clamp(-1, 1)

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        images, draws = batch["images"], batch["views"]
        views = torch.cat([self.view(images, draws[:, 0]), self.view(images, draws[:, 1])])
        codes = F.normalize(self.head(self.encoder(views)), dim=1)
        logits = codes @ codes.T / self.temperature
        logits.fill_diagonal_(-1e9)
        count = len(images)
        partner = (torch.arange(2 * count, device=images.device) + count) % (2 * count)
        matched = (logits.argmax(1) == partner).float().mean()
        return {"loss": F.cross_entropy(logits, partner), "matched": matched}


class TimmEncoder(nn.Module):
    """A timm network by name: [B, 3, H, W] in [0, 1] to its pooled features [B, D].

    Images are resized as the network's own evaluation does (bicubic with antialiasing where it says so) and
    normalised with its mean and deviation. ``weights`` is a local file; None loads the published ones by name.
    """

    channels = 3

    def __init__(self, name: str, weights: Path | None = None) -> None:
        super().__init__()
        import timm
        from timm.data import resolve_model_data_config

        if name.partition(".")[0] not in timm.list_models():
            raise ValueError(f"extractors: timm has no model {name!r}; allowed: a name that timm.list_models() gives")
        try:
            self.net = timm.create_model(
                name, pretrained=weights is None, num_classes=0, checkpoint_path=str(weights) if weights else ""
            )
        except (OSError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise ValueError(f"extractors: weights of timm:{name} cannot be had ({line})") from None
        config = resolve_model_data_config(self.net)
        self.size, self.mode = config["input_size"][1:], config["interpolation"]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, self.size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        return self.net((resized - self.mean) / self.deviation)


def only_tensors(path: Path) -> None:
    """ValueError unless a file of weights holds tensors alone: PyTorch's own format may hold code, and would run it."""
    if path.suffix == ".safetensors":
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a file raises that is something else
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"extractors: {path} holds more than tensors, or something else ({line})") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(path: Path) -> dict[str, Any]:
    """What is written beside a committed weights file: its hash, network, recipe, seeds, accuracies."""
    held: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    return held


def load(path: Path) -> ConvEncoder:
    """A committed encoder, frozen; ValueError when the file is missing or not the one that was committed."""
    if not path.exists():
        raise ValueError(f"{path}: no such weights file; allowed: one that models.extractors wrote")
    held = record(path)
    if sha256(path) != held["sha256"]:
        raise ValueError(f"{path}: sha256 is not {held['sha256'][:12]}... as {path.with_suffix('.json').name} says")
    encoder = ConvEncoder(**held["encoder"])
    encoder.load_state_dict(load_file(path))
    return encoder.requires_grad_(False).eval()
