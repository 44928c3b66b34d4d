"""How far is one set of images from another? Features through torch-fidelity's registry, and distances on them.

Features of an image set are computed once per extractor and serve every metric. Statistics and distances are
float64. Importing this module loads torch only; torch-fidelity (seconds) is loaded where it is first needed.

Extractor names: those in ``models.config.EXTRACTORS``; ``inception-v3-compat:/path/to/weights.pth`` for a local
copy; ``timm:NAME`` or ``timm:NAME:/path/to/weights`` for a network of timm's; ``package.module:Class`` for a subclass
of torch-fidelity's ``FeatureExtractorBase``, whose default layer for "fid" is taken.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import encoders
from models.config import EXTRACTORS

INCEPTION = "inception-v3-compat"
TIMM = "timm:"
KID_SUBSETS = 20
CHUNK = 1000  # rows of a distance matrix held at once


class Value(NamedTuple):
    """An estimate and its standard error (None where none is known)."""

    value: float
    error: float | None


# --- features --------------------------------------------------------------------------------------------------


def weights_path(name: str) -> Path:
    """The weights file of an embedded extractor."""
    file = EXTRACTORS[name].weights
    assert file is not None
    return encoders.WEIGHTS / file


@functools.cache
def extractor(name: str, device: str) -> nn.Module:
    """The extractor behind a name, frozen, through torch-fidelity's registry; ValueError says what is allowed."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
    from torch_fidelity.utils import create_feature_extractor

    registered, options = name, {}
    if name in EXTRACTORS and EXTRACTORS[name].weights:
        found = _pooled(lambda: encoders.load(weights_path(name)), lambda images: images / 127.5 - 1)
    elif name.startswith(TIMM):
        model, path = timm_parts(name)
        registered = name.replace("/", "_")  # the registry takes no paths
        found = _pooled(lambda: encoders.TimmEncoder(model, path), lambda images: images / 255)
    elif name == INCEPTION or name.startswith(INCEPTION + ":"):
        registered, _, path = name.partition(":")
        found = FEATURE_EXTRACTORS_REGISTRY[INCEPTION]
        if path:
            if not Path(path).is_file():
                raise ValueError(f"extractors: {name!r} names a file that does not exist; allowed: a weights file")
            encoders.only_tensors(Path(path))
            options["feature_extractor_weights_path"] = path
    else:
        found = _brought(name)
    if registered not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(registered, found)
    layer = found.get_default_feature_layer_for_metric("fid")
    try:
        made = create_feature_extractor(registered, [layer], cuda=False, verbose=False, **options)
    except OSError as error:  # a download that failed, or a file that cannot be opened
        raise ValueError(
            f"extractors: {name!r} cannot be had ({error}); allowed: {INCEPTION}:/path/to/weights.pth"
        ) from None
    return made.to(device)


def timm_parts(name: str) -> tuple[str, Path | None]:
    """Model name and local weights (None: published ones) of a ``timm:`` extractor."""
    model, _, path = name.removeprefix(TIMM).partition(":")
    if path and not Path(path).is_file():
        raise ValueError(f"extractors: {name!r} names a file that does not exist; allowed: a weights file")
    if path:
        encoders.only_tensors(Path(path))
    return model, Path(path) if path else None


def _pooled(load: Callable[[], nn.Module], scaled: Callable[[Tensor], Tensor]) -> type[Any]:
    from torch_fidelity import FeatureExtractorBase

    class Pooled(FeatureExtractorBase):
        """An encoder as torch-fidelity calls it: uint8 images in, a tuple of features out."""

        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list)
            self.encoder = load()
            self.channels = self.encoder.channels

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return True

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.encoder(scaled(images.float())),)

    return Pooled


def _brought(name: str) -> type[Any]:
    from torch_fidelity import FeatureExtractorBase

    module, _, attribute = name.partition(":")
    if not attribute:
        allowed = ", ".join(EXTRACTORS)
        raise ValueError(f"extractors: {name!r} is not known; allowed: {allowed}, timm:NAME, or package.module:Class")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"extractors: {name!r} cannot be imported ({error})") from None
    if not (isinstance(found, type) and issubclass(found, FeatureExtractorBase)):
        raise ValueError(f"extractors: {name!r} has to be a subclass of torch_fidelity.FeatureExtractorBase")
    return found


@functools.cache
def extractor_hash(name: str) -> str:
    """12 hex digits of the SHA-256 of the weights file (of name and tensors for a class brought along)."""
    if name in EXTRACTORS and EXTRACTORS[name].weights:
        return encoders.sha256(weights_path(name))[:12]
    if name.startswith(TIMM) and (path := timm_parts(name)[1]):
        return encoders.sha256(path)[:12]
    net = extractor(name, "cpu")
    if name.startswith(INCEPTION):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path = name.partition(":")[2] or f"{torch.hub.get_dir()}/checkpoints/{Path(URL_INCEPTION_V3).name}"
        return encoders.sha256(Path(path))[:12]
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.inference_mode()
def features(images: Tensor, name: str, *, batch: int = 250, device: str = "cpu") -> Tensor:
    """Features [N, D] float32 on the CPU of uint8 images [N, C, H, W]; grey images are repeated to three channels
    for an extractor of colour images. Raises ValueError where the extractor reads grey images and these are not."""
    assert images.dtype == torch.uint8, images.dtype
    assert images.ndim == 4, images.shape
    net = extractor(name, device)
    channels = getattr(net, "channels", 3)
    if images.shape[1] not in (1, channels):
        raise ValueError(f"extractors: {name} reads {channels}-channel images; these have {images.shape[1]}")
    parts = []
    for part in images.split(batch):
        part = part.to(device)
        parts.append(net(part.expand(-1, channels, -1, -1).contiguous())[0].float().cpu())
    return torch.cat(parts).clone()


def quantise(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded to the nearest of 256 levels."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --- Frechet distance ------------------------------------------------------------------------------------------


def root(covariance: Tensor) -> Tensor:
    """R [D, r] with R R^T = covariance by symmetric eigenvalues; r is its numerical rank.

    Eigenvalues below D eps times the largest are rounding noise, of either sign, and are dropped.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()


def _trace_root(a: Tensor, b: Tensor) -> float:
    """tr (S_a^1/2 S_b S_a^1/2)^1/2 for S = R R^T: the sum of the singular values of R_a^T R_b.

    Singular values keep the small terms that squaring into S_a S_b would lose to rounding.
    """
    product = a.T @ b
    return float(torch.linalg.svdvals(product).sum()) if product.numel() else 0.0


def frechet(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Frechet distance of two Gaussians, |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64.

    Dowson and Landau 1982; the FID of Heusel et al. 2017 (arXiv 1706.08500) on Inception features. Means [D] and
    covariances [D, D]; singular covariances are allowed. Never negative.
    """
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    shift = (mean1 - mean2).square().sum()
    cross = _trace_root(root(covariance1), root(covariance2))
    return max(0.0, float(shift + covariance1.trace() + covariance2.trace()) - 2 * cross)


@dataclass(frozen=True)
class FeatureSet:
    """Features [N, D] of one image set and what the metrics derive from them, each computed once.

    ``groups`` [N] names the source image of each row where several rows come from one: errors resample groups.
    """

    values: Tensor
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.values.ndim == 2, self.values.shape
        assert self.count > 1

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def deficient(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.count <= self.values.shape[1]

    @cached_property
    def double(self) -> Tensor:
        return self.values.double()

    @cached_property
    def mean(self) -> Tensor:
        return self.double.mean(0)

    @cached_property
    def covariance(self) -> Tensor:
        """[D, D], unbiased (divided by N - 1), in two passes."""
        centred = self.double - self.mean
        return centred.T @ centred / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """R with R R^T = covariance: the centred features themselves where they are fewer than their dimension."""
        if self.deficient:
            return (self.double - self.mean).T / math.sqrt(self.count - 1)
        return root(self.covariance)

    def radius(self, neighbours: int) -> Tensor:
        """Distance [N] of each row to its k-th nearest other row."""
        return torch.cat([d.kthvalue(neighbours + 1).values for d in _distances(self.double, self.double)])


def fid(sample: FeatureSet, reference: FeatureSet, folds: int = 10) -> Value:
    """Frechet distance of two feature sets.

    The error is a delete-a-group jackknife over ``folds`` groups of the sample, the reference held fixed; it holds
    no bias of finite n, which is shared by sets of equal size.
    """
    cross = _trace_root(sample.root, reference.root)
    shift = (sample.mean - reference.mean).square().sum()
    value = float(shift + sample.root.square().sum() + reference.root.square().sum()) - 2 * cross
    group = torch.arange(sample.count) if sample.groups is None else sample.groups
    fold = group.unique(return_inverse=True)[1] % folds
    if len(fold.unique()) < folds:
        return Value(max(0.0, value), None)
    x = sample.double - sample.mean
    projected = x @ reference.root  # the nonzero eigenvalues of S1 S2 are those of R2^T S1 R2
    replicates = []
    for left_out in range(folds):
        kept = fold != left_out
        centred, count = projected[kept], int(kept.sum())
        centred = centred - centred.mean(0)
        gram = centred.T @ centred if count > centred.shape[1] else centred @ centred.T
        cross = torch.linalg.eigvalsh(gram / (count - 1)).clamp_min(0).sqrt().sum()
        mean = x[kept].mean(0)
        trace = (x[kept] - mean).square().sum() / (count - 1)
        replicates.append((sample.mean + mean - reference.mean).square().sum() + trace - 2 * cross)
    spread = torch.stack(replicates).var(correction=0)
    return Value(max(0.0, value), math.sqrt((folds - 1) * float(spread)))


# --- other distances on features -------------------------------------------------------------------------------


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of rows, [<= CHUNK, len(b)] at a time."""
    for part in a.split(CHUNK):
        yield torch.cdist(part, b)


def kid(sample: FeatureSet, reference: FeatureSet) -> Value:
    """Kernel distance (Binkowski et al. 2018, arXiv 1801.01401) by torch-fidelity, over subsets of half the images.

    The spread over subsets of m out of n images drawn without replacement, times sqrt(m / (n - m)), is the standard
    error of the whole; at m = n / 2 it is the spread itself. (Subsets of all n would have no spread.)
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    count = min(sample.count, reference.count)
    subset = min(1000, count // 2)
    found = kid_features_to_metric(
        sample.values, reference.values, kid_subsets=KID_SUBSETS, kid_subset_size=subset, verbose=False
    )
    error = found[KEY_METRIC_KID_STD] * math.sqrt(subset / (count - subset))
    return Value(found[KEY_METRIC_KID_MEAN], error)


def precision_recall(sample: FeatureSet, reference: FeatureSet, neighbours: int) -> tuple[float, float]:
    """Precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991) by torch-fidelity."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(
        sample.values,
        reference.values,
        prc_neighborhood=neighbours,
        prc_batch_size=CHUNK,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def density_coverage(sample: FeatureSet, reference: FeatureSet, neighbours: int) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797).

    Density: how many reference balls (radius to the k-th neighbour) hold a sample, over k, on average; may exceed 1.
    Coverage: share of reference balls that hold at least one sample.
    """
    radius = reference.radius(neighbours)
    held, covered = 0, torch.zeros(reference.count, dtype=torch.bool)
    for distances in _distances(sample.double, reference.double):
        inside = distances <= radius
        held += int(inside.sum())
        covered |= inside.any(0)
    return held / (neighbours * sample.count), float(covered.double().mean())


def nearest(sample: FeatureSet, others: FeatureSet) -> float:
    """Median over samples of the distance to the nearest of ``others``."""
    return float(torch.cat([d.min(1).values for d in _distances(sample.double, others.double)]).median())


# --- pixels ----------------------------------------------------------------------------------------------------


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error per image [B] of images [B, C, H, W] in [0, 1]."""
    return (a.double() - b.double()).square().mean(dim=(1, 2, 3))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image [B] in dB, of images in [0, 1] (peak 1); infinite for equal images."""
    return -10 * torch.log10(mse(a, b))


SCALES = tuple(2.0 ** (k / 2) for k in range(-6, 15))  # gray levels: 1/8 to 128 by steps of sqrt 2


def differences(a: Tensor, b: Tensor) -> Tensor:
    """How often each difference of levels occurs, per image [B, 3 x 511], of uint8 [B, H, W, C]: all that
    ``residual_bits`` needs. Levels 0 and 255 of ``a`` are counted apart from the others.
    """
    gap = a.long() - b.long() + 255 + 511 * (a == 0) + 2 * 511 * (a == 255)
    rows = torch.arange(len(a), device=a.device)[:, None] * 3 * 511
    counts = torch.bincount((gap.flatten(1) + rows).flatten(), minlength=len(a) * 3 * 511)
    return counts.view(len(a), 3 * 511).int().cpu()


def residual_bits(counts: Tensor) -> Tensor:
    """Bits per image [B] of images given others, from their ``differences``: a discretised logistic about each value.

    The mass of a level is that of the half level on either side of it (of the whole tail at 0 and 255), as in
    PixelCNN++ (Salimans et al. 2017). One scale of ``SCALES`` for all pixels of all images: the one that makes their
    code shortest; saying which costs log2 of their number, once. Together with a code of the other images it is a
    two-part code: a quality across rates that knows of no network.
    """
    gap = torch.arange(-255, 256, dtype=torch.float64)
    held, best = counts.double(), None
    for scale in SCALES:
        upper, lower = F.logsigmoid((gap + 0.5) / scale), F.logsigmoid((0.5 - gap) / scale)
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - e^(l - u)): no cancellation far out
        inner = upper + lower + math.log(-math.expm1(-1.0 / scale))
        bits = held @ torch.cat([inner, upper, lower]) / -math.log(2)
        best = bits if best is None or bits.sum() < best.sum() else best
    assert best is not None
    return best + math.log2(len(SCALES)) / len(best)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity per image [B] of images [B, C, H, W] in [0, 1] (Wang et al. 2004): data range 1.

    An 11 x 11 Gaussian window of sigma 1.5 (the largest odd window that fits, below 11 pixels), whole windows only,
    K = (0.01, 0.03), per channel, averaged.
    """
    channels, side = a.shape[1], min(a.shape[2:])
    size = min(11, side - 1 + side % 2)
    line = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    kernel = window.to(a.device).expand(channels, 1, size, size)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=channels)

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (ratio / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))
