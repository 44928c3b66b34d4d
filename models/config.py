"""What can be trained, measured and learnt from, and what it costs: family fields, counts, no torch.

A *family* is one class here (or one named ``package.module:Class`` in a grid). Its fields are what a grid may
set; its methods count parameters and FLOPs by arithmetic, so that a plan of 100,000 runs needs no tensor; its
``build`` imports torch and returns the module that is trained.

Units: FLOPs are floating-point operations (a multiply-accumulate is two), per image unless said otherwise,
float64 throughout. ``Flops.backward`` leaves out gradients that autograd does not compute (towards the input
image), so the sum agrees with ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from torch import nn

Stage = Literal["encoder", "tokenizer", "representation", "generator", "evaluation"]
STAGES: tuple[Stage, ...] = ("encoder", "tokenizer", "representation", "generator", "evaluation")


class Params(NamedTuple):
    """Parameters: ``core`` without embeddings, codebook and output head; ``total`` with everything."""

    core: int
    total: int


class Flops(NamedTuple):
    """FLOPs of one image in one training step."""

    forward: float
    backward: float

    @property
    def train(self) -> float:
        return self.forward + self.backward


class Latent(NamedTuple):
    """The space between tokenizer and generator: a grid of ids (``codebook``) or of vectors (``channels``)."""

    rows: int
    cols: int
    codebook: int | None = None
    channels: int | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.cols

    @property
    def bits_nominal(self) -> float | None:
        """tokens x log2 K; None for a continuous latent, which has no nominal rate."""
        return None if self.codebook is None else self.tokens * math.log2(self.codebook)


class Fields(BaseModel):
    """Base of everything that a grid may write down: unknown keys refused, immutable, hashable by content.

    ``outside`` names fields that cannot change a result (a path, say) and stay out of the run id.
    ``absent`` maps a field that was added later to the value at which it is left out of the hash, so that older
    ids survive the addition.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    outside: ClassVar[frozenset[str]] = frozenset()
    absent: ClassVar[dict[str, Any]] = {}

    def identity(self) -> dict[str, Any]:
        """The result-bearing fields, defaults included, as JSON values."""
        held: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in self.outside or (name in self.absent and value == self.absent[name]):
                continue
            held[name] = _plain(value)
        return held


def _plain(value: Any) -> Any:
    if isinstance(value, Fields):
        return value.identity()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# --- data ------------------------------------------------------------------------------------------------------


class DataFields(Fields):
    """A source of labelled images in [-1, 1]; a subclass says how large, how many classes, how many images."""

    views: int = Field(64, ge=1, description="augmented views of each training image in the code cache")
    views_heldout: int = Field(8, ge=1, description="views of each held-out image in the code cache")

    @property
    def resolution(self) -> int:
        raise NotImplementedError

    @property
    def channels(self) -> int:
        raise NotImplementedError

    @property
    def labels(self) -> int:
        """Number of classes; 0 when there are none."""
        raise NotImplementedError

    def images(self, split: Literal["train", "heldout"]) -> int | None:
        """Unique images of a split before augmentation; None when they never repeat."""
        raise NotImplementedError

    def images_cached(self, split: Literal["train", "heldout"]) -> int:
        """Images of a split that a code cache holds."""
        unique = self.images(split)
        assert unique is not None, "a source without a fixed number of images says how many it caches"
        return unique * (self.views if split == "train" else self.views_heldout)

    @property
    def flops_image(self) -> float:
        """FLOPs to make one image (0 when it is read, not computed)."""
        return 0.0

    def build(self) -> Any:
        """The data set (``models.data.Images``)."""
        raise NotImplementedError


class Digits(DataFields):
    """scikit-learn's 1,797 scans of hand-written digits, 8 x 8 grey, 10 classes, with small affine changes."""

    heldout: float = Field(0.2, gt=0, lt=1, description="share of the images that no training ever sees")
    split_seed: int = 0
    rotate_deg: float = Field(10.0, ge=0, le=45)
    scale: float = Field(0.1, ge=0, le=0.5, description="largest relative change of size")
    shift_px: float = Field(0.5, ge=0, le=2)
    shear: float = Field(0.1, ge=0, le=0.5)

    @property
    def resolution(self) -> int:
        return 8

    @property
    def channels(self) -> int:
        return 1

    @property
    def labels(self) -> int:
        return 10

    @model_validator(mode="after")
    def _both_splits(self) -> Digits:
        if not 10 <= round(1797 * self.heldout) <= 1787:
            raise ValueError(f"heldout: {self.heldout:g} leaves fewer images than classes in a split of 1797 images")
        return self

    def images(self, split: Literal["train", "heldout"]) -> int | None:
        held = round(1797 * self.heldout)
        return held if split == "heldout" else 1797 - held

    def build(self) -> Any:
        from models.data import DigitImages

        return DigitImages(self)


class DeadLeaves(DataFields):
    """Occluding shapes with power-law sizes (Lee, Mumford and Huang 2001): class = shape family x palette."""

    size: int = Field(32, ge=8, le=512)
    shapes: tuple[Literal["disk", "square", "triangle", "ellipse", "star"], ...] = (
        "disk",
        "square",
        "triangle",
    )
    palettes: int = Field(4, ge=1, le=12)
    exponent: float = Field(3.0, gt=1, le=6, description="density of radii ~ r^-exponent")
    radius_min: float = Field(0.04, gt=0, lt=1, description="smallest radius, as a share of the image side")
    radius_max: float = Field(0.5, gt=0, le=2)
    leaves: int = Field(64, ge=1, le=4096, description="shapes per image, front to back")
    cached: int = Field(50_000, ge=1, description="distinct training images that a code cache holds")
    cached_heldout: int = Field(5_000, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> DeadLeaves:
        if self.radius_min >= self.radius_max:
            raise ValueError(f"radius_min {self.radius_min} must lie below radius_max {self.radius_max}")
        return self

    @property
    def resolution(self) -> int:
        return self.size

    @property
    def channels(self) -> int:
        return 3

    @property
    def labels(self) -> int:
        return len(self.shapes) * self.palettes

    def images(self, split: Literal["train", "heldout"]) -> int | None:
        return None

    def images_cached(self, split: Literal["train", "heldout"]) -> int:
        return self.cached if split == "train" else self.cached_heldout

    @property
    def flops_image(self) -> float:
        return 20.0 * self.leaves * self.size**2  # distance, test and blend per leaf and pixel

    def build(self) -> Any:
        from models.data import DeadLeafImages

        return DeadLeafImages(self)


class ImageFolder(DataFields):
    """Images on disk, one folder per class under ``root/train`` and ``root/heldout`` (or ``root/val``)."""

    outside: ClassVar[frozenset[str]] = frozenset({"root"})
    name: str = Field(description="what the images are; part of the run id, as the path is not")
    root: str
    size: int = Field(256, ge=8, le=2048)
    classes: int = Field(ge=1)
    count: int = Field(ge=1, description="training images")
    count_heldout: int = Field(ge=1)
    crop: Literal["center", "random"] = "center"
    flip: bool = True
    views: int = Field(2, ge=1)
    views_heldout: int = Field(1, ge=1)

    @property
    def resolution(self) -> int:
        return self.size

    @property
    def channels(self) -> int:
        return 3

    @property
    def labels(self) -> int:
        return self.classes

    def images(self, split: Literal["train", "heldout"]) -> int | None:
        return self.count if split == "train" else self.count_heldout

    def build(self) -> Any:
        from models.data import FolderImages

        return FolderImages(self)


# --- how it is trained -----------------------------------------------------------------------------------------


class Recipe(Fields):
    """How one module is trained; every field is part of the run id.

    ``wsd`` is warm-up, a constant trunk, and at each measurement point a branch that decays linearly to zero over
    the last ``decay`` of the steps to that point. ``cosine`` needs the length beforehand: one run per length.
    """

    batch: int = Field(128, ge=1)
    lr: float = Field(gt=0)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps to a point over which the rate falls")
    weight_decay: float = Field(0.05, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.05, ge=0, lt=0.3, description="width of the weight average relative to the step; 0 is off")
    precision: Literal["float32", "bfloat16"] = "float32"
    diverged: float = Field(1e4, gt=0, description="a loss beyond this ends the run as diverged")

    @property
    def one_run_per_length(self) -> bool:
        return self.schedule == "cosine"


class Segment(NamedTuple):
    """Consecutive steps [start, stop) of a run; ``point`` is the measurement point a branch ends in."""

    start: int
    stop: int
    point: int | None  # None on the trunk
    decays: bool


def branch_start(point: int, recipe: Recipe) -> int:
    """The trunk step from which the branch to ``point`` leaves (``point`` itself without a decay)."""
    if recipe.schedule != "wsd":
        return point
    return max(min(recipe.warmup, point - 1), point - max(1, round(recipe.decay * point)))


def segments(points: tuple[int, ...], recipe: Recipe) -> list[Segment]:
    """The program of a run: trunk pieces and branches, in the order in which they are trained."""
    program: list[Segment] = []
    at = 0
    for point in sorted(set(points)):
        leaves = branch_start(point, recipe)
        if leaves > at:
            program.append(Segment(at, leaves, None, False))
            at = leaves
        program.append(Segment(leaves, point, point, recipe.schedule == "wsd"))
    return program


def steps_paid(points: tuple[int, ...], recipe: Recipe) -> int:
    """Steps that are computed for all points together: the trunk once, every branch."""
    return sum(piece.stop - piece.start for piece in segments(points, recipe))


class Runtime(Fields):
    """How a run is run; nothing here may change a result beyond rounding, and nothing is part of the run id."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = Field(1, ge=1)
    shard: bool | None = Field(
        None,
        description="divide parameters, gradients and optimiser state over the devices of a run (FSDP2); "
        "None: where the plan's memory estimate does not fit one device",
    )
    threads: int = Field(1, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="images per training pass; None is the whole batch")
    measure_batch: int = Field(250, ge=1, description="images at a time where codes are made or checkpoints measured")
    compile: bool = False
    log_every: int = Field(50, ge=1, description="steps between rows of the training loss")
    save_every_s: float = Field(120.0, gt=0, description="seconds between resumable checkpoints")
    pack: int | None = Field(None, ge=1, le=64, description="runs that share a device; None: the plan says, by memory")
    job_min: float = Field(
        10.0, ge=0, description="minutes of work for a job at least: short runs follow each other in one; 0: a job each"
    )

    @model_validator(mode="after")
    def _divisible(self) -> Runtime:
        if self.shard and self.devices == 1:
            raise ValueError("shard: got true with devices: 1; allowed: null, false, or devices of 2 and more")
        return self


# --- families --------------------------------------------------------------------------------------------------


class Family(Fields):
    """What every trained family shares.

    ``ladder`` names sizes that a grid may list under ``sizes``: name -> the fields that it sets.
    """

    ladder: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def networks(self) -> frozenset[str]:
        """Names of networks that take part in training as loss, latent, target, condition or teacher.

        None of them may be a metric extractor in the same study (the planner refuses).
        """
        return frozenset()


class EncoderFields(Family):
    """A network that turns images into features; trained by the encoder stage or loaded."""

    def params(self, data: DataFields) -> Params:
        raise NotImplementedError

    def flops(self, data: DataFields) -> Flops:
        raise NotImplementedError

    def activations(self, data: DataFields) -> float:
        raise NotImplementedError

    def build(self, data: DataFields) -> nn.Module:
        raise NotImplementedError


class TokenizerFields(Family):
    """Images to latents and back. ``build`` returns a module with loss, encode, decode (models.training)."""

    def latent(self, data: DataFields) -> Latent:
        """Shape of the latent; ValueError when the geometry is impossible."""
        raise NotImplementedError

    def params(self, data: DataFields) -> Params:
        raise NotImplementedError

    def flops(self, data: DataFields) -> Flops:
        raise NotImplementedError

    def flops_encode(self, data: DataFields) -> float:
        raise NotImplementedError

    def flops_decode(self, data: DataFields) -> float:
        raise NotImplementedError

    def activations(self, data: DataFields) -> float:
        """Numbers kept per image between forward and backward pass."""
        raise NotImplementedError

    def build(self, data: DataFields) -> nn.Module:
        raise NotImplementedError


class RepresentationFields(Family):
    """A generator of representations (vectors) that another generator is conditioned on."""

    def params(self, data: DataFields) -> Params:
        raise NotImplementedError

    def flops(self, data: DataFields) -> Flops:
        raise NotImplementedError

    def activations(self, data: DataFields) -> float:
        raise NotImplementedError

    def build(self, data: DataFields) -> nn.Module:
        raise NotImplementedError


class GeneratorFields(Family):
    """Latents from noise and a class. ``build`` returns a module with loss and sample (models.training)."""

    width: int

    def params(self, latent: Latent, classes: int) -> Params:
        raise NotImplementedError

    def flops(self, latent: Latent, classes: int) -> Flops:
        raise NotImplementedError

    def flops_sample(self, latent: Latent, classes: int, guided: bool) -> float:
        """FLOPs to draw one latent (decoding not included)."""
        raise NotImplementedError

    def activations(self, latent: Latent, classes: int) -> float:
        raise NotImplementedError

    def state_sample(self, latent: Latent, guided: bool) -> float:
        """Numbers that are kept for one latent while it is drawn (keys and values, say)."""
        return 0.0

    def build(self, latent: Latent, classes: int) -> nn.Module:
        raise NotImplementedError


class Layer(NamedTuple):
    """One counted layer: parameters, forward FLOPs, whether its input needs a gradient, stored outputs."""

    params: int
    forward: float
    input_grad: bool = True
    outputs: float = 0.0


def _conv(cin: int, cout: int, side: int, kernel: int = 3, first: bool = False) -> Layer:
    macs = kernel * kernel * cin * cout * side * side
    return Layer(macs // (side * side) + cout, 2.0 * macs, not first, float(cout * side * side))


def _norm(channels: int, side: int) -> Layer:
    return Layer(2 * channels, 0.0, True, float(2 * channels * side * side))


def _res(cin: int, cout: int, side: int) -> Iterator[Layer]:
    yield _norm(cin, side)
    yield _conv(cin, cout, side)
    yield _norm(cout, side)
    yield _conv(cout, cout, side)
    if cin != cout:
        yield _conv(cin, cout, side, kernel=1)


def _attention(channels: int, side: int) -> Iterator[Layer]:
    yield _norm(channels, side)
    for _ in range(4):  # q, k, v and the output projection
        yield _conv(channels, channels, side, kernel=1)
    positions = side * side
    yield Layer(0, 4.0 * positions * positions * channels, True, float(positions * positions))


def _sum(layers: list[Layer]) -> tuple[int, Flops, float]:
    params = sum(layer.params for layer in layers)
    forward = sum(layer.forward for layer in layers)
    backward = sum(layer.forward * (2 if layer.input_grad else 1) for layer in layers)
    return params, Flops(forward, backward), sum(layer.outputs for layer in layers)


MULTIPLIERS: dict[int, tuple[int, ...]] = {
    # channel multipliers by number of levels; 4 and 5 are LlamaGen's f8 and f16 tokenizers
    1: (1,),
    2: (1, 2),
    3: (1, 2, 2),
    4: (1, 2, 2, 4),
    5: (1, 1, 2, 2, 4),
    6: (1, 1, 2, 2, 4, 4),
}


class VQ(TokenizerFields):
    """Convolutional VQ tokenizer with the structure of VQGAN as LlamaGen uses it (arXiv 2406.06525, sec. 3.1).

    ``tokens`` must be a square number whose side divides the image side by a power of two. With ``input_size``
    the images are resized to that side first and back after decoding (256 px data through a 16-fold tokenizer give
    400 tokens at 320 px and 576 at 384); losses and metrics stay at the size of the data.
    """

    absent: ClassVar[dict[str, Any]] = {"input_size": None}
    tokens: int = Field(16, ge=1, description="tokens per image")
    codebook: int = Field(256, ge=2, le=2**24, description="K, entries of the codebook")
    code_dim: int = Field(8, ge=1, description="channels of a code")
    width: int = Field(32, ge=4, multiple_of=4, description="channels at full resolution")
    multipliers: tuple[Annotated[int, Field(ge=1, le=1024)], ...] | None = Field(
        None, description="width factor per level; None takes the table"
    )
    res_blocks: int = Field(1, ge=1, le=64, description="residual blocks per level (the decoder has one more)")
    attention: bool = Field(True, description="self-attention at the lowest resolution and in the middle")
    normalize: bool = Field(True, description="latents and codes on the unit sphere")
    commitment: float = Field(0.25, ge=0)
    reset_every: int = Field(100, ge=0, description="steps between resets of dead codes at a held rate; 0 is never")
    reset_below: float = Field(0.03, ge=0, lt=1, description="a code is dead below this share of even usage")
    input_size: int | None = Field(
        None, ge=8, le=2048, description="side in px of what the encoder sees; None is the data's"
    )

    def side(self, data: DataFields) -> int:
        """Pixels along the side of the image that the encoder sees and the decoder paints."""
        return self.input_size or data.resolution

    def levels(self, data: DataFields) -> int:
        side, pixels = math.isqrt(self.tokens), self.side(data)
        factor = pixels // side
        fits = side * side == self.tokens and factor * side == pixels and factor & (factor - 1) == 0
        if not fits:
            allowed = [str((pixels >> k) ** 2) for k in range(len(MULTIPLIERS)) if pixels % (1 << k) == 0]
            raise ValueError(
                f"tokens: {self.tokens} does not tile a {pixels} x {pixels} image; allowed here: {', '.join(allowed)}"
            )
        levels = factor.bit_length()
        if self.multipliers is None and levels not in MULTIPLIERS:
            raise ValueError(f"tokens: {self.tokens} needs {levels} levels; give multipliers for them")
        if self.multipliers is not None and len(self.multipliers) != levels:
            raise ValueError(f"multipliers: {list(self.multipliers)} has to name {levels} levels")
        return levels

    def channels(self, data: DataFields) -> tuple[int, ...]:
        levels = self.levels(data)
        return tuple(self.width * m for m in (self.multipliers or MULTIPLIERS[levels]))

    def latent(self, data: DataFields) -> Latent:
        self.levels(data)
        side = math.isqrt(self.tokens)
        return Latent(side, side, codebook=self.codebook)

    def _encoder(self, data: DataFields) -> list[Layer]:
        widths, side = self.channels(data), self.side(data)
        layers = [_conv(data.channels, widths[0], side, first=True)]
        cin = widths[0]
        for level, cout in enumerate(widths):
            last = level == len(widths) - 1
            for _ in range(self.res_blocks):
                layers += _res(cin, cout, side)
                cin = cout
                if last and self.attention:
                    layers += _attention(cout, side)
            if not last:
                side //= 2
                layers.append(_conv(cout, cout, side))
        layers += [
            *_res(cin, cin, side),
            *(_attention(cin, side) if self.attention else ()),
            *_res(cin, cin, side),
        ]
        between = 2 * self.width  # channels on both sides of the code, as in LlamaGen (256 at width 128)
        layers += [_norm(cin, side), _conv(cin, between, side), _conv(between, self.code_dim, side, kernel=1)]
        return layers

    def _lookup(self) -> Layer:
        # distances to all codes: one matrix product, outside autograd
        return Layer(0, 2.0 * self.tokens * self.codebook * self.code_dim)

    def _decoder(self, data: DataFields) -> list[Layer]:
        widths, side = self.channels(data), math.isqrt(self.tokens)
        cin, between = widths[-1], 2 * self.width
        layers = [_conv(self.code_dim, between, side, kernel=1), _conv(between, cin, side)]
        layers += [
            *_res(cin, cin, side),
            *(_attention(cin, side) if self.attention else ()),
            *_res(cin, cin, side),
        ]
        for level, cout in reversed(list(enumerate(widths))):
            for _ in range(self.res_blocks + 1):
                layers += _res(cin, cout, side)
                cin = cout
                if level == len(widths) - 1 and self.attention:
                    layers += _attention(cout, side)
            if level:
                side *= 2
                layers.append(_conv(cout, cout, side))
        layers += [_norm(cin, side), _conv(cin, data.channels, side)]
        return layers

    def params(self, data: DataFields) -> Params:
        core = _sum(self._encoder(data) + self._decoder(data))[0]
        return Params(core, core + self.codebook * self.code_dim)

    def flops(self, data: DataFields) -> Flops:
        forward, backward = _sum(self._encoder(data) + self._decoder(data))[1]
        return Flops(forward + self._lookup().forward, backward)

    def flops_encode(self, data: DataFields) -> float:
        return _sum(self._encoder(data))[1].forward + self._lookup().forward

    def flops_decode(self, data: DataFields) -> float:
        return _sum(self._decoder(data))[1].forward

    def activations(self, data: DataFields) -> float:
        return _sum(self._encoder(data) + self._decoder(data))[2] + float(self.tokens * self.codebook)

    def build(self, data: DataFields) -> nn.Module:
        from models.tokenizers.vq import VQTokenizer

        return VQTokenizer(self, data)


class Size(NamedTuple):
    layers: int
    width: int
    heads: int


# Named sizes of the autoregressive generator. The first column counts core parameters; from 52M on the names are
# totals at K = 16,384, as LlamaGen counts (B, L, XL, XXL and 3B are its table 1).
SIZES: dict[str, Size] = {
    "5k": Size(1, 20, 1),
    "25k": Size(2, 32, 2),
    "120k": Size(2, 72, 3),
    "600k": Size(3, 128, 4),
    "2M": Size(4, 224, 7),
    "10M": Size(6, 384, 6),
    "52M": Size(11, 512, 8),
    "76M": Size(12, 608, 8),
    "B": Size(12, 768, 12),
    "205M": Size(18, 896, 14),
    "L": Size(24, 1024, 16),
    "520M": Size(30, 1152, 18),
    "XL": Size(36, 1280, 20),
    "XXL": Size(48, 1536, 24),
    "3B": Size(24, 3200, 32),
}


class Llama(GeneratorFields):
    """Class-conditional Llama-style autoregressive transformer over code ids (LlamaGen, arXiv 2406.06525)."""

    ladder: ClassVar[Mapping[str, Mapping[str, Any]]] = {name: size._asdict() for name, size in SIZES.items()}
    layers: int = Field(2, ge=1)
    width: int = Field(64, ge=4)
    heads: int = Field(2, ge=1)
    ffn: int | None = Field(None, ge=1, description="hidden units of SwiGLU; None is 8/3 width rounded up")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys")
    class_dropout: float = Field(0.1, ge=0, lt=1, description="share of labels replaced by the null class")
    dropout: float = Field(0.0, ge=0, lt=1, description="token, residual and feed-forward dropout")
    rope_base: float = Field(10_000.0, gt=1)

    @model_validator(mode="after")
    def _heads(self) -> Llama:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width: {self.width} over {self.heads} heads; the width of a head has to be a multiple of 4 "
                "(2-D rotary positions)"
            )
        return self

    @property
    def hidden(self) -> int:
        multiple = 256 if self.width >= 256 else 8
        return self.ffn or multiple * math.ceil(self.width * 8 / 3 / multiple)

    @staticmethod
    def _codebook(latent: Latent) -> int:
        if latent.codebook is None:
            raise ValueError("family: llama reads code ids; its tokenizer gives continuous latents")
        return latent.codebook

    def _weights(self) -> int:
        """Weights of the matrix products of one block."""
        return 4 * self.width**2 + 3 * self.width * self.hidden

    def params(self, latent: Latent, classes: int) -> Params:
        norms = 2 * self.width + (2 * self.width // self.heads if self.qk_norm else 0)
        core = self.layers * (self._weights() + norms) + self.width
        return Params(core, core + self.width * (2 * self._codebook(latent) + classes + 1))

    def flops(self, latent: Latent, classes: int) -> Flops:
        length = latent.tokens
        block = 2.0 * length * self._weights() + 4.0 * length * length * self.width
        forward = self.layers * block + 2.0 * length * self.width * self._codebook(latent)
        return Flops(forward, 2.0 * forward)

    def flops_sample(self, latent: Latent, classes: int, guided: bool) -> float:
        length = latent.tokens
        block = 2.0 * length * self._weights() + 2.0 * length * (length + 1) * self.width
        forward = self.layers * block + 2.0 * length * self.width * self._codebook(latent)
        return forward * (2 if guided else 1)

    def activations(self, latent: Latent, classes: int) -> float:
        block = latent.tokens * (8 * self.width + 3 * self.hidden)
        return float(self.layers * block + 2 * latent.tokens * self._codebook(latent))

    def state_sample(self, latent: Latent, guided: bool) -> float:
        return 2.0 * self.layers * latent.tokens * self.width * (2 if guided else 1)

    def build(self, latent: Latent, classes: int) -> nn.Module:
        self._codebook(latent)
        from models.generators.autoregressive import Transformer

        return Transformer(self, latent, classes)


# --- evaluation ------------------------------------------------------------------------------------------------

SEQUENCES = 2000  # cached code sequences of a split behind a code length


class Protocol(Fields):
    """How a checkpoint is measured. The hash of these fields and the checkpoint's id name an evaluation.

    ``guidance`` holds one scale, or the candidates of a search: they are compared on ``search_samples`` samples
    of one seed and the best is reported on ``samples`` of another. Scale 1 is unguided.
    """

    of: Literal["tokenizer", "generator", "representation", "encoder"]
    samples: int = Field(1000, ge=16, description="images per Frechet distance")
    extractors: tuple[str, ...] = Field(min_length=1, description="names in models.config.EXTRACTORS, or paths")
    weights: Literal["ema", "raw"] = "ema"
    labels: Literal["balanced", "random"] = "balanced"
    guidance: tuple[float, ...] = Field((1.0,), min_length=1)
    search_samples: int = Field(500, ge=16)
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0, description="0 keeps all codes")
    top_p: float = Field(1.0, gt=0, le=1)
    neighbours: int = Field(5, ge=1, description="k of precision, recall, density and coverage")

    @model_validator(mode="after")
    def _scales(self) -> Protocol:
        if len(set(self.guidance)) != len(self.guidance) or min(self.guidance) < 0:
            raise ValueError(f"guidance: {list(self.guidance)} has to hold different scales >= 0")
        return self


class Extractor(NamedTuple):
    """A metric extractor: its weights under models/weights (None: downloaded or by path), what it was trained on.

    ``flops_image`` prices one image (Inception: 5.7 G multiply-accumulates at 299 px; the small ones rounded up).
    """

    weights: str | None
    trained: str
    flops_image: float = 0.0


EXTRACTORS: dict[str, Extractor] = {
    "digits-supervised": Extractor("digits-supervised.safetensors", "classifier of augmented training digits", 5e6),
    "digits-contrastive": Extractor("digits-contrastive.safetensors", "SimCLR on augmented training digits", 5e6),
    "dead-leaves-supervised": Extractor("dead-leaves-supervised.safetensors", "classifier of dead leaves", 1e8),
    "dead-leaves-contrastive": Extractor("dead-leaves-contrastive.safetensors", "SimCLR on dead leaves", 1e8),
    "inception-v3-compat": Extractor(None, "Inception v3 of the reference FID code, ImageNet labels", 1.14e10),
}


FAMILIES: dict[str, dict[str, type[Fields]]] = {
    "data": {"digits": Digits, "dead_leaves": DeadLeaves, "image_folder": ImageFolder},
    "encoder": {},
    "tokenizer": {"vq": VQ},
    "representation": {},
    "generator": {"llama": Llama},
}
BASES: dict[str, type[Fields]] = {
    "data": DataFields,
    "encoder": EncoderFields,
    "tokenizer": TokenizerFields,
    "representation": RepresentationFields,
    "generator": GeneratorFields,
}


def family(kind: str, name: str) -> type[Fields]:
    """The class behind a family name or ``package.module:Class``; ValueError says what is allowed."""
    if ":" not in name:
        if name not in FAMILIES[kind]:
            known = ", ".join(sorted(FAMILIES[kind])) or "none built in"
            raise ValueError(f"family: {name!r} is not a {kind} family; allowed: {known}, or package.module:Class")
        return FAMILIES[kind][name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"family: {name!r} cannot be imported ({error})") from None
    if not (isinstance(found, type) and issubclass(found, BASES[kind])):
        raise ValueError(f"family: {name!r} has to be a subclass of models.config.{BASES[kind].__name__}")
    return found
