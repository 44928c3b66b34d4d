"""Are distances between image sets what their definitions say, and equal to torch-fidelity's where it has them?"""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from models import encoders, fidelity
from models.config import EXTRACTORS
from models.fidelity import FeatureSet

COMMITTED = [name for name, extractor in EXTRACTORS.items() if extractor.weights]


def gaussian(count: int, dimension: int, seed: int, shift: float = 0.0, mixing: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(dimension) + mixing * torch.randn(dimension, dimension, generator=generator) / dimension**0.5
    return torch.randn(count, dimension, generator=generator) @ mix + shift


def upstream(first: FeatureSet, second: FeatureSet) -> float:
    """torch-fidelity's distance of the same features in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(x.double) for x in (first, second)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def distance(first: FeatureSet, second: FeatureSet) -> float:
    return fidelity.frechet(first.mean, first.covariance, second.mean, second.covariance)


# --- Frechet distance ---


@pytest.mark.parametrize("dimension", [64, 512, pytest.param(2048, marks=pytest.mark.slow)])
def test_frechet_equals_torch_fidelity(dimension: int) -> None:
    first = FeatureSet(gaussian(3 * dimension, dimension, 0))
    second = FeatureSet(gaussian(3 * dimension, dimension, 1, shift=0.05))
    expected = upstream(first, second)
    assert distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert fidelity.fid(first, second).value == pytest.approx(expected, rel=1e-6)


def test_frechet_of_known_gaussians() -> None:
    # commuting covariances: |m|^2 + sum (s1 - s2)^2
    s1, s2 = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 2.0, 0.5]).double()
    turn = torch.linalg.qr(gaussian(3, 3, 5).double())[0]
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    found = fidelity.frechet(shift, turn @ torch.diag(s1**2) @ turn.T, 0 * shift, turn @ torch.diag(s2**2) @ turn.T)
    assert found == pytest.approx(float((shift**2).sum() + ((s1 - s2) ** 2).sum()), rel=1e-12)
    # 2 x 2 that do not commute: tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB))
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    b = torch.tensor([[1.0, -0.5], [-0.5, 2.0]]).double()
    root = math.sqrt(float(torch.trace(a @ b)) + 2 * math.sqrt(float(torch.det(a) * torch.det(b))))
    zero = torch.zeros(2).double()
    assert fidelity.frechet(zero, a, zero, b) == pytest.approx(float(a.trace() + b.trace()) - 2 * root, rel=1e-12)


@pytest.mark.parametrize("counts", [(20, 20), (20, 35), (20, 500)])
def test_singular_covariances_are_finite_symmetric_and_agree_by_both_paths(counts: tuple[int, int]) -> None:
    first = FeatureSet(gaussian(counts[0], 64, 0))
    second = FeatureSet(gaussian(counts[1], 64, 1, shift=0.1))
    assert first.deficient
    by_matrix = distance(first, second)
    assert math.isfinite(by_matrix)
    assert by_matrix > 0
    assert distance(second, first) == pytest.approx(by_matrix, rel=1e-9)
    assert fidelity.fid(first, second).value == pytest.approx(by_matrix, rel=1e-9)
    assert fidelity.fid(second, first).value == pytest.approx(by_matrix, rel=1e-9)


def test_equal_sets_are_at_distance_zero_also_when_singular_or_wide_in_spectrum() -> None:
    spectrum = torch.logspace(0, -6, 64)
    for values in (gaussian(200, 64, 0), gaussian(30, 64, 0), gaussian(500, 64, 2) * spectrum):
        same = FeatureSet(values)
        scale = float(same.covariance.trace())
        assert distance(same, same) <= 1e-12 * scale
        assert fidelity.fid(same, same).value <= 1e-12 * scale
    constant = FeatureSet(torch.ones(10, 4))
    assert distance(constant, constant) == 0.0
    assert distance(constant, FeatureSet(torch.ones(10, 4) + 2)) == pytest.approx(16.0)


def test_tiny_negative_eigenvalues_are_dropped() -> None:
    covariance = torch.diag(torch.tensor([1.0, 1e-30, -1e-17]).double())
    assert fidelity.root(covariance).shape == (3, 1)
    zero = torch.zeros(3).double()
    assert fidelity.frechet(zero, covariance, zero, covariance) == pytest.approx(0.0, abs=1e-15)


def test_jackknife_error_is_the_spread_over_samples() -> None:
    reference = FeatureSet(gaussian(4000, 8, 99))
    generator = torch.Generator().manual_seed(0)
    pool = gaussian(100_000, 8, 99, shift=0.5)
    sets = [FeatureSet(pool[torch.randint(len(pool), (400,), generator=generator)]) for _ in range(100)]
    found = [fidelity.fid(sample, reference) for sample in sets]
    spread = np.std([value for value, _ in found])
    errors = np.mean([error for _, error in found])
    assert errors == pytest.approx(spread, rel=0.25)


def test_jackknife_resamples_source_images() -> None:
    reference = FeatureSet(gaussian(1000, 8, 1))
    once = gaussian(100, 8, 2)
    tenfold = FeatureSet(once.repeat_interleave(10, 0), torch.arange(100).repeat_interleave(10))
    alone = fidelity.fid(FeatureSet(once), reference).error
    assert alone is not None
    assert fidelity.fid(tenfold, reference).error == pytest.approx(alone, rel=0.15)
    assert fidelity.fid(FeatureSet(once.repeat_interleave(10, 0)), reference).error < alone / 2
    assert fidelity.fid(FeatureSet(once, torch.zeros(100).long()), reference).error is None


# --- other distances ---


def test_kid_and_precision_equal_torch_fidelity() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    sample, reference = FeatureSet(gaussian(300, 16, 0, shift=0.2)), FeatureSet(gaussian(300, 16, 1))
    options = {"kid_subsets": fidelity.KID_SUBSETS, "kid_subset_size": 150, "verbose": False}
    kid = kid_features_to_metric(sample.values, reference.values, **options)
    assert fidelity.kid(sample, reference) == pytest.approx(tuple(kid.values()), rel=1e-12)
    prc = prc_features_to_metric(sample.values, reference.values, prc_neighborhood=4, verbose=False)
    assert fidelity.precision_recall(sample, reference, 4) == (prc["precision"], prc["recall"])


def test_precision_is_of_samples_and_recall_of_the_reference() -> None:
    """One of two modes is never sampled: every sample is among real ones, half of the real ones are not reached."""
    modes = torch.cat((gaussian(150, 4, 0), gaussian(150, 4, 1, shift=100.0)))
    precision, recall = fidelity.precision_recall(FeatureSet(gaussian(300, 4, 2)), FeatureSet(modes), 5)
    assert precision > 0.8
    assert 0.35 < recall <= 0.5
    density, coverage = fidelity.density_coverage(FeatureSet(gaussian(300, 4, 2)), FeatureSet(modes), 5)
    assert density > 0.8
    assert 0.35 < coverage <= 0.5


def test_kid_error_is_the_spread_over_samples() -> None:
    pool, reference = gaussian(60_000, 8, 3), FeatureSet(gaussian(400, 8, 4))
    generator = torch.Generator().manual_seed(0)
    found = [
        fidelity.kid(
            FeatureSet(pool[torch.randint(len(pool), (400,), generator=generator)]),
            FeatureSet(pool[torch.randint(len(pool), (400,), generator=generator)] + 0.3),
        )
        for _ in range(60)
    ]
    assert np.mean([error for _, error in found]) == pytest.approx(np.std([value for value, _ in found]), rel=0.35)
    assert fidelity.kid(reference, reference).value < 0.01


def test_density_and_coverage_on_constructed_sets() -> None:
    # reference on a line at 0, 1, 2, 3; radii to the nearest other (k = 1) are 1
    reference = FeatureSet(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    # 0.25 lies in the balls of 0 and 1; 10 in none: density 2 / (1 x 2), coverage 2 of 4
    sample = FeatureSet(torch.tensor([[0.25], [10.0]]))
    assert fidelity.density_coverage(sample, reference, 1) == (1.0, 0.5)
    # the set itself: balls are closed, so the ends hold 2 points and the middle ones 3: 10 / 4
    assert fidelity.density_coverage(reference, reference, 1) == (2.5, 1.0)
    far = FeatureSet(torch.tensor([[100.0], [101.0]]))
    assert fidelity.density_coverage(far, reference, 1) == (0.0, 0.0)
    assert fidelity.nearest(sample, reference) == 0.25  # torch's median takes the lower of two
    assert fidelity.nearest(far, reference) == 97.0


def test_density_of_equal_distributions_is_about_one_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, reference = FeatureSet(gaussian(1500, 4, 0)), FeatureSet(gaussian(1500, 4, 0).flip(0) + 0.0)
    whole = fidelity.density_coverage(sample, reference, 5)
    assert whole[0] == pytest.approx(1.0, abs=0.25)
    assert whole[1] == 1.0
    monkeypatch.setattr(fidelity, "CHUNK", 77)
    assert fidelity.density_coverage(sample, reference, 5) == whole


# --- pixels ---


def test_residual_bits_are_a_code() -> None:
    """Masses of all levels about one value add up to 1; equal images cost next to nothing, others their difference."""
    told = math.log2(len(fidelity.SCALES))
    for value in (0, 3, 200, 255):
        levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
        bits = fidelity.residual_bits(fidelity.differences(levels, torch.full_like(levels, value))) - told / 256
        assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-9)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    equal = fidelity.residual_bits(fidelity.differences(images, images))
    assert float(equal.max()) < 192 * 0.06 + told
    noise = torch.randint(-8, 9, images.shape, generator=torch.Generator().manual_seed(1))
    near = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    bits = fidelity.residual_bits(fidelity.differences(images, near))
    assert math.log2(17) < float(bits.mean()) / 192 < math.log2(17) + 0.35  # a logistic for uniform noise
    unlike = fidelity.residual_bits(fidelity.differences(images, images.flip(0)))
    assert 7.5 < float(unlike.mean()) / 192 < 9


def test_residual_bits_do_not_depend_on_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (6, 4, 4, 1), dtype=torch.uint8, generator=generator) for _ in range(2))
    whole = fidelity.differences(a, b)
    parts = torch.cat([fidelity.differences(a[i : i + 2], b[i : i + 2]) for i in (0, 2, 4)])
    assert torch.equal(whole, parts)


def test_pixel_metrics_of_known_images() -> None:
    dark, light = torch.full((2, 1, 8, 8), 0.2), torch.full((2, 1, 8, 8), 0.7)
    assert fidelity.mse(dark, light).tolist() == pytest.approx([0.25, 0.25])
    assert fidelity.psnr(dark, light).tolist() == pytest.approx([6.0206, 6.0206], rel=1e-5)
    assert fidelity.psnr(dark, dark).isinf().all()
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.7 + c1) / (0.2**2 + 0.7**2 + c1)
    assert fidelity.ssim(dark, light).tolist() == pytest.approx([expected] * 2, rel=1e-6)
    noise = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert fidelity.ssim(noise, noise).tolist() == pytest.approx([1.0] * 3)
    assert (fidelity.ssim(noise, 1 - noise) < 0).all()


@pytest.mark.parametrize("side", [8, 16])
def test_ssim_equals_the_definition_written_out(side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    a = torch.rand(1, 1, side, side, generator=generator).double()
    b = (0.7 * a + 0.3 * torch.rand(1, 1, side, side, generator=generator)).double()
    size = min(11, side - 1)
    line = np.exp(-((np.arange(size) - size // 2) ** 2) / 4.5)
    window = np.outer(line, line) / np.outer(line, line).sum()
    x, y, found = a[0, 0].numpy(), b[0, 0].numpy(), []
    for row in range(side - size + 1):
        for col in range(side - size + 1):
            p, q = x[row : row + size, col : col + size], y[row : row + size, col : col + size]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            top = (2 * mp * mq + 1e-4) * (2 * both + 9e-4)
            found.append(top / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(fidelity.ssim(a, b)) == pytest.approx(np.mean(found), rel=1e-9)


def test_quantised_levels() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(fidelity.quantise(levels.float() / 127.5 - 1), levels)
    assert fidelity.quantise(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


# --- extractors ---


@pytest.mark.parametrize("name", COMMITTED)
def test_features_do_not_depend_on_the_batch(name: str) -> None:
    channels = 1 if name.startswith("digits") else 3
    shape = (37, channels, 8, 8) if channels == 1 else (37, channels, 32, 32)
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = fidelity.features(images, name)
    assert whole.shape == (37, 64 if channels == 1 else 128)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(fidelity.features(images, name, batch=5), whole, rtol=1e-5, atol=1e-6)
    first = FeatureSet(whole)
    again = FeatureSet(fidelity.features(images, name, batch=5))
    torch.testing.assert_close(first.covariance, again.covariance, rtol=1e-4, atol=1e-8)


def test_grey_images_are_repeated_for_a_colour_extractor() -> None:
    grey = torch.randint(256, (4, 1, 32, 32)).to(torch.uint8)
    name = "dead-leaves-supervised"
    assert torch.equal(fidelity.features(grey, name), fidelity.features(grey.repeat(1, 3, 1, 1), name))
    with pytest.raises(ValueError, match="digits-supervised reads 1-channel images; these have 3"):
        fidelity.features(grey.repeat(1, 3, 1, 1), "digits-supervised")


def brought() -> type:
    from torch_fidelity import FeatureExtractorBase

    class Means(FeatureExtractorBase):
        """Channel means."""

        def __init__(self, name: str, features_list: list[str], **options: object) -> None:
            super().__init__(name, features_list)
            self.register_buffer("scale", torch.tensor(0.5))

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("means",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "means"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (images.float().mean(dim=(2, 3)) * self.scale,)

    return Means


def test_an_extractor_brought_along(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("brought_along")
    module.Means = brought()  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "brought_along", module)
    images = torch.randint(256, (5, 3, 4, 4)).to(torch.uint8)
    found = fidelity.features(images, "brought_along:Means")
    torch.testing.assert_close(found, images.float().mean(dim=(2, 3)) / 2)
    assert len(fidelity.extractor_hash("brought_along:Means")) == 12
    with pytest.raises(ValueError, match=r"has to be a subclass of torch_fidelity\.FeatureExtractorBase"):
        fidelity.extractor("brought_along:number", "cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "'unknown' is not known; allowed: digits-supervised"),
        ("no.such.module:Class", "cannot be imported"),
        ("inception-v3-compat:/nowhere/weights.pth", "names a file that does not exist"),
    ],
)
def test_bad_names_say_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fidelity.extractor(name, "cpu")
    assert "\n" not in str(caught.value)


def test_inception_from_a_path_and_without_a_network(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    from torch_fidelity import feature_extractor_inceptionv3 as upstream_module

    net = upstream_module.FeatureExtractorInceptionV3

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(upstream_module, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match=r"cannot be had .*no network.*allowed: inception-v3-compat:/path"):
        fidelity.extractor("inception-v3-compat", "cpu")
    # random weights of the right shapes, as a downloaded file would hold them
    monkeypatch.setattr(net, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(upstream_module, "load_state_dict_from_url", lambda *_, **__: {})
    torch.manual_seed(0)
    state = net("inception-v3-compat", ["2048"]).state_dict()
    monkeypatch.undo()
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    name = f"inception-v3-compat:{path}"
    grey = torch.randint(256, (2, 1, 16, 16)).to(torch.uint8)
    found = fidelity.features(grey, name)
    assert found.shape == (2, 2048)
    assert torch.equal(found, fidelity.features(grey.repeat(1, 3, 1, 1), name))
    assert len(fidelity.extractor_hash(name)) == 12


def test_a_timm_space_from_local_weights(tmp_path) -> None:
    """Equal to calling the network on images resized and normalised as its own evaluation does."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    path = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), path)
    name = f"timm:test_vit:{path}"
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    config = timm.data.resolve_model_data_config(net)
    mean, deviation = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    resized = torch.nn.functional.interpolate(images / 255, config["input_size"][1:], mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = net((resized.clamp(0, 1) - mean) / deviation)
    torch.testing.assert_close(fidelity.features(images, name, batch=2), expected, rtol=1e-4, atol=1e-5)
    assert fidelity.features(images[:, :1], name).shape == expected.shape  # grey
    assert fidelity.extractor_hash(name) == encoders.sha256(path)[:12]
    for bad in ("timm:no_such_network", "timm:test_vit:/no/such/file"):
        with pytest.raises(ValueError, match="allowed"):
            fidelity.features(images, bad)


def test_importing_loads_nothing_heavy() -> None:
    heavy = "torch_fidelity torchvision timm sklearn scipy pandas polars matplotlib"
    code = (
        "import sys, models.fidelity, models.evaluation, models.encoders\n"
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
