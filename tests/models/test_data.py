"""Are streams stateless, splits disjoint, augmentation and dead leaves what they claim, caches checked?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.config import VQ, DataFields, DeadLeaves, Digits, ImageFolder
from models.data import (
    SHAPES,
    SPLITS,
    CodeCache,
    DeadLeafImages,
    DigitImages,
    Leaves,
    encode,
    key,
    permutation,
    quantise,
    reference,
    scans,
    stratified,
    uniforms,
    visits,
    warp,
)


@pytest.fixture(scope="module")
def digits() -> DigitImages:
    return DigitImages(Digits())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits, three classes, two images each, of different sizes; the pixel values tell which is which."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = np.zeros((40 + 30 * number, 50, 3), np.uint8)
                pixels[..., 0] = 20 * label + 100 * number + (10 if split == "val" else 0)
                pixels[:, 25:, 1] = 255  # the right half is green
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def fields(root: Path, **changed: Any) -> ImageFolder:
    base = {"name": "toy", "root": str(root), "size": 16, "classes": 3, "count": 6, "count_heldout": 6}
    return ImageFolder(**(base | changed))


# --- streams ---


def test_uniforms_are_uniform_and_independent_of_company() -> None:
    u = uniforms(key("a", 1), torch.arange(50_000), 4)
    assert u.min() >= 0
    assert u.max() < 1
    bins = torch.histc(u[:, 0], 50, 0, 1)
    assert ((bins - 1000) ** 2 / 1000).sum() < 90  # chi-squared, 49 degrees of freedom
    assert torch.corrcoef(torch.cat((u[:-1], u[1:]), 1).T).fill_diagonal_(0).abs().max() < 0.02
    assert torch.equal(u[123:125], uniforms(key("a", 1), torch.tensor([123, 124]), 4))
    assert torch.equal(u[:, :2], uniforms(key("a", 1), torch.arange(50_000), 2))
    assert (u[:100] == uniforms(key("a", 2), torch.arange(100), 4)).sum() <= 1


def test_hash_is_splitmix64() -> None:
    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    stream = key("known")
    inner = mixed(5 ^ stream)
    expected = [(mixed((inner + slot * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24 for slot in range(3)]
    assert uniforms(stream, torch.tensor([5]), 3)[0].tolist() == expected


def test_visits_are_permutations_per_epoch() -> None:
    order = visits(7, 0, 30, 10)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(order[:10], order[10:20])
    assert torch.equal(visits(7, 8, 13, 10), order[8:21])
    assert torch.equal(permutation(7, 1, 10), order[10:20])


SOURCES: list[DataFields] = [Digits(), DeadLeaves(size=16, leaves=12, shapes=("disk", "star", "ellipse"))]


@pytest.mark.parametrize("source", SOURCES)
def test_a_draw_does_not_depend_on_how_it_is_cut(source: DataFields) -> None:
    images = source.build()
    whole = images.draw("train", 1430, 24, 3)
    for parts in ((24,), (1, 7, 16), (8, 8, 8)):
        position, pieces = 1430, []
        for count in parts:
            pieces.append(images.draw("train", position, count, 3))
            position += count
        for name, value in whole.items():
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)
    for other in (images.draw("train", 1430, 24, 4), images.draw("heldout", 1430, 24, 3)):
        assert not torch.equal(other["images"], whole["images"])


@pytest.mark.parametrize("source", SOURCES)
def test_batches_are_as_the_protocol_says(source: DataFields) -> None:
    batch = source.build().draw("train", 5, 64, 0)
    assert batch["images"].shape == (64, source.channels, source.resolution, source.resolution)
    assert batch["images"].dtype == torch.float32
    assert batch["images"].abs().max() <= 1
    for name in ("labels", "index"):
        assert batch[name].shape == (64,)
        assert batch[name].dtype == torch.int64
    assert set(batch["labels"].tolist()) <= set(range(source.labels))


# --- digits ---


def test_scans_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    images, labels = scans()
    truth = load_digits()
    assert np.array_equal(images[:, 0].numpy() * 16, truth.images)
    assert np.array_equal(labels.numpy(), truth.target)


def test_split_is_disjoint_stratified_and_of_the_planned_size(digits: DigitImages) -> None:
    train, heldout = digits.members["train"], digits.members["heldout"]
    assert len(heldout) == digits.fields.images("heldout")
    assert sorted(torch.cat((train, heldout)).tolist()) == list(range(1797))
    share = torch.bincount(digits.labels[heldout]) / torch.bincount(digits.labels)
    assert (share - 0.2).abs().max() < 0.005
    assert not torch.equal(heldout, stratified(digits.labels, len(heldout), 1)[1])


def test_training_never_draws_a_heldout_image(digits: DigitImages) -> None:
    train = digits.draw("train", 0, 3 * 1438, 0)["index"]
    heldout = digits.draw("heldout", 0, 3 * 359, 0)["index"]
    assert set(train.tolist()).isdisjoint(heldout.tolist())
    assert (torch.bincount(train)[digits.members["train"]] == 3).all()
    assert (torch.bincount(heldout)[digits.members["heldout"]] == 3).all()


def test_augmented_digits_keep_label_and_likeness(digits: DigitImages) -> None:
    batch = digits.draw("train", 0, 500, 0)
    assert torch.equal(batch["labels"], digits.labels[batch["index"]])
    source = digits.scans * 2 - 1
    distance = torch.cdist(batch["images"].flatten(1), source.flatten(1))
    assert (digits.labels[distance.argmin(1)] == batch["labels"]).double().mean() > 0.97
    assert (distance.gather(1, batch["index"][:, None])[:, 0] > 0.1).double().mean() > 0.99  # and do change
    plain = DigitImages(Digits(rotate_deg=0, scale=0, shift_px=0, shear=0)).draw("train", 0, 50, 0)
    torch.testing.assert_close(plain["images"], source[plain["index"]])


def affine(images: Tensor, **changed: Any) -> Tensor:
    count = len(images)
    still = {"angle": torch.zeros(count), "scale": torch.ones(count), "shear": torch.zeros(count)}
    return warp(images, **(still | {"shift": torch.zeros(count, 2)} | changed))


def test_warp_moves_pixels_as_named() -> None:
    image = torch.rand(1, 1, 8, 8)
    right_down = affine(image, shift=torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(right_down[..., 2:, 1:], image[..., :-2, :-1])
    assert right_down[..., :2, :].eq(0).all()  # background comes in
    quarter = affine(image, angle=torch.tensor([math.pi / 2]))
    torch.testing.assert_close(quarter, image.rot90(-1, (2, 3)), atol=1e-5, rtol=0)
    ramp = ((torch.arange(8) + 0.5) / 8 - 0.5).expand(1, 1, 8, 8)  # value = x
    wide = affine(ramp, scale=torch.tensor([2.0]))
    torch.testing.assert_close(wide[..., 1:-1], ramp[..., 1:-1] / 2)
    sheared = affine(ramp, shear=torch.tensor([0.5]))
    y = ramp.transpose(2, 3)
    torch.testing.assert_close(sheared[..., 3:5], (ramp - 0.5 * y)[..., 3:5])


# --- dead leaves ---


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.5])
def test_radii_follow_the_power_law(exponent: float) -> None:
    source = DeadLeafImages(DeadLeaves(exponent=exponent, radius_min=0.05, radius_max=0.6))
    r = source.leaves("train", 0, 1000, 0).radius.flatten().double()
    assert r.min() >= 0.05 - 1e-6
    assert r.max() <= 0.6 + 1e-6
    # maximum likelihood of a truncated power law, by bisection on its score
    low, high = 1.01, 10.0
    for _ in range(60):
        e = (low + high) / 2
        x = torch.linspace(0.05, 0.6, 20_001, dtype=torch.float64)
        density = x**-e
        expected = torch.trapezoid(density * x.log(), x) / torch.trapezoid(density, x)
        low, high = (e, high) if expected > r.log().mean() else (low, e)
    assert e == pytest.approx(exponent, abs=0.05)


def leaf(*stack: tuple[float, float, float]) -> Leaves:
    """(radius, x, y) from front to back; leaf i has the colour i / 10, the ground -1."""
    count = len(stack)
    colour = torch.cat((torch.arange(count) / 10, torch.tensor([-1.0])))
    return Leaves(
        radius=torch.tensor([[r for r, _, _ in stack]]),
        centre=torch.tensor([[(x, y) for _, x, y in stack]]),
        angle=torch.zeros(1, count),
        colour=colour[None, :, None].expand(1, count + 1, 3),
    )


@pytest.mark.parametrize("budget", [1, 2**20])
def test_the_first_leaf_is_in_front(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeadLeafImages, "PIXELS", {"cpu": budget})
    source = DeadLeafImages(DeadLeaves(size=32))
    image = source.paint("disk", leaf((0.2, 0.5, 0.5), (0.4, 0.5, 0.5), (0.3, 0.2, 0.5)))[0, 0]
    assert image[16, 16] == 0.0
    assert image[16, 26] == pytest.approx(0.1)  # outside the small disk, inside the large one
    assert image[16, 1] == pytest.approx(0.2)  # where only the last one reaches
    assert image[0, 31] == -1.0
    other = source.paint("disk", leaf((0.4, 0.5, 0.5), (0.2, 0.5, 0.5)))
    assert not other.eq(0.1).any()  # wholly hidden


AREAS = {
    "disk": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "ellipse": 0.4 * math.pi,
    "star": 10 * 0.5 * 0.45 * math.sin(math.pi / 5),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_shapes_have_their_areas_and_fill_their_circle(shape: str) -> None:
    axis = torch.linspace(-1.2, 1.2, 1201)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    inside = SHAPES[shape](u, v) <= 1
    assert inside.double().mean().item() * 2.4**2 == pytest.approx(AREAS[shape], rel=0.01)
    assert torch.hypot(u, v)[inside].max().item() == pytest.approx(1.0, abs=0.01)


def test_turning_and_scaling_a_shape() -> None:
    source = DeadLeafImages(DeadLeaves(size=64))
    one = leaf((0.4, 0.5, 0.5))
    flat = source.paint("ellipse", one)[0, 0] == 0
    upright = source.paint("ellipse", one._replace(angle=torch.full((1, 1), math.pi / 2)))[0, 0] == 0
    assert torch.equal(flat.T, upright)
    assert flat.any(0).sum() == pytest.approx(2 * 0.4 * 64, abs=1)
    assert flat.any(1).sum() == pytest.approx(2 * 0.4 * 0.4 * 64, abs=2)


def test_classes_differ_in_shape_and_palette() -> None:
    fields = DeadLeaves(size=32, shapes=("disk", "triangle"), palettes=3)
    source = DeadLeafImages(fields)
    batch = source.draw("train", 0, 600, 0)
    assert torch.bincount(batch["labels"]).tolist() == [100] * 6
    colour = batch["images"].mean((2, 3))
    palette = batch["labels"] % 3
    for p in range(3):  # palettes around red, green, blue
        assert colour[palette == p].mean(0).argmax() == p
    nearest = torch.cdist(colour, torch.stack([colour[palette == p].mean(0) for p in range(3)])).argmin(1)
    assert (nearest == palette).double().mean() > 0.8
    leaves = source.leaves("train", 0, 60, 0)
    disks, triangles = (source.paint(shape, leaves) for shape in ("disk", "triangle"))
    ground = [(x == leaves.colour[:, -1, :, None, None]).all(1).double().mean() for x in (disks, triangles)]
    assert ground[1] > ground[0] * 1.5  # triangles of the same radii cover less


def test_dead_leaves_splits_share_no_image() -> None:
    source = DeadLeafImages(DeadLeaves(size=16))
    train, heldout = (source.draw(split, 0, 200, 0)["images"].flatten(1) for split in ("train", "heldout"))
    assert torch.cdist(train, heldout).min() > 1


# --- image folder ---


def test_folder_reads_classes_in_order(folder: Path) -> None:
    images = fields(folder, flip=False).build()
    batch = images.draw("train", 0, 6, 0)
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]
    red = ((batch["images"][:, 0] + 1) * 127.5).mean((1, 2))
    expected = 20 * batch["labels"] + 100 * (batch["index"] % 2)
    torch.testing.assert_close(red, expected.float(), atol=0.5, rtol=0)
    green = batch["images"][:, 1]
    assert green[:, :, :7].eq(-1).all()
    assert green[:, :, 9:].eq(1).all()
    heldout = images.draw("heldout", 0, 6, 0)
    shifted = ((heldout["images"][:, 0] + 1) * 127.5).mean((1, 2))
    torch.testing.assert_close(shifted, 10 + 20.0 * heldout["labels"] + 100 * (heldout["index"] % 2), atol=0.5, rtol=0)


def test_centre_crop_is_adms(folder: Path) -> None:
    """Boxes, bicubic, centre: against the same three operations written out with Pillow."""
    pixels = (np.random.default_rng(0).random((70, 50, 3)) * 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "train/ant/0.png")
    halved = image.resize((25, 35), Image.Resampling.BOX)
    resized = halved.resize((16, round(35 * 16 / 25)), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[3:19]
    batch = fields(folder, flip=False).build().draw("train", 0, 6, 0)
    found = quantise(batch["images"][batch["index"] == 0])[0].numpy()
    assert np.array_equal(found, expected)


def test_folder_flips_and_crops_by_position_only(folder: Path) -> None:
    images = fields(folder, crop="random").build()
    whole = images.draw("train", 0, 60, 1)
    parts = [images.draw("train", start, 7, 1)["images"] for start in range(0, 56, 7)]
    assert torch.equal(torch.cat(parts), whole["images"][:56])
    green_left = whole["images"][:, 1, :, 0].mean(1) > 0
    assert 10 < green_left.sum() < 50  # flipped about half of the time
    straight = fields(folder, crop="random", flip=False).build().draw("train", 0, 60, 1)["images"]
    edge = (straight[:, 1] > 0).double().mean((1, 2))
    assert edge.std() > 0.02  # crops differ


def read(source: ImageFolder) -> None:
    images = source.build()
    for split in SPLITS:
        images.draw(split, 0, 6, 0)


def test_folder_mistakes_are_one_line_with_the_path(folder: Path) -> None:
    def refused(match: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            read(fields(changed.pop("root", folder), **changed))
        assert "\n" not in str(caught.value)

    refused(r"^root: .*nowhere is no folder", root=folder / "nowhere")
    refused(r"^classes: 4 in the grid, but .*train has 3 folders", classes=4)
    (folder / "val/bee").rename(folder / "val/bug")
    refused(r"^root: .*train has a folder bee where .*val has bug; allowed: the same classes in both")
    (folder / "val/bug").rename(folder / "val/bee")
    refused(r"^count: 7 in the grid, but .*train has 6 images", count=7)
    refused(r"^count_heldout: 5 in the grid, but .*val has 6 images", count_heldout=5)
    (folder / "train/bee/1.png").write_bytes(b"no image")
    refused(r"^root: .*train/bee/1\.png cannot be read as an image")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "train/bee/1.png")
    held = (folder / "train/bee/1.png").read_bytes()
    (folder / "train/bee/1.png").write_bytes(held[: len(held) // 2])
    refused(r"^root: .*train/bee/1\.png cannot be read as an image")
    for file in (folder / "train/bee").iterdir():
        file.unlink()
    refused(r"^root: .*train/bee holds no image")
    (folder / "val").rename(folder / "elsewhere")
    (folder / "train/bee/0.png").write_bytes(held)
    refused(r"^root: .*val is missing", count=5)


# --- references ---


def test_reference_is_the_augmented_stream_and_its_hash() -> None:
    images = Digits().build()
    pixels, digest = reference(images, "train", 600, 5)
    assert pixels.shape == (600, 8, 8, 1)
    assert pixels.dtype == torch.uint8
    drawn = images.draw("train", 590, 10, 5)["images"]
    assert torch.equal(pixels[590:], quantise(drawn))
    assert reference(images, "train", 600, 5)[1] == digest
    assert len({digest, *(reference(images, s, n, k)[1] for s, n, k in (("train", 600, 6), ("heldout", 600, 5)))}) == 3


def test_quantise_rounds_and_clamps() -> None:
    images = torch.tensor([-2.0, -1.0, -1 + 1.2 / 255, 0.999, 1.0, 1.5]).view(1, 1, 1, 6)
    assert quantise(images).flatten().tolist() == [0, 0, 1, 255, 255, 255]


# --- codes ---


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    torch.manual_seed(0)
    return VQ(tokens=4, codebook=64, width=8, attention=False).build(Digits()).eval()


SMALL = Digits(views=2, views_heldout=1)


def test_cache_holds_what_the_tokenizer_says(tmp_path: Path, tokenizer: Any) -> None:
    images = SMALL.build()
    cache = encode(tokenizer, images, tmp_path / "a/codes", seed=4, batch=200)
    assert (cache.rows("train"), cache.rows("heldout")) == (2 * 1438, 359)
    assert np.load(tmp_path / "a/codes/train.npy").dtype == np.uint16
    drawn = images.draw("train", 1500, 40, 4)
    held = cache.take("train", slice(1500, 1540))
    assert torch.equal(held["codes"], tokenizer.encode(drawn["images"]))
    assert torch.equal(held["labels"], drawn["labels"])
    assert torch.equal(held["index"], drawn["index"])
    told = cache.manifest["splits"]
    assert told["train"]["images"] == 1438
    every = np.load(tmp_path / "a/codes/heldout.npy")
    assert told["heldout"]["sequences"] == len(np.unique(every, axis=0))
    share = np.bincount(every.ravel(), minlength=64) / every.size
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert told["heldout"]["bits_used"] == pytest.approx(4 * entropy)
    assert told["heldout"]["perplexity"] == pytest.approx(2**entropy)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["codes"]  # nothing half-written is left
    again = encode(tokenizer, images, tmp_path / "b", seed=4, batch=200)
    assert again.manifest["hash"] == cache.manifest["hash"]


def test_cache_stream_is_stateless(tmp_path: Path, tokenizer: Any) -> None:
    cache = encode(tokenizer, SMALL.build(), tmp_path / "codes", seed=0)
    epoch = cache.draw("heldout", 0, 359, 9)
    assert sorted(epoch["index"].tolist()) == sorted(cache.take("heldout", slice(None))["index"].tolist())
    parts = [cache.draw("heldout", start, 50, 9)["codes"] for start in range(300, 450, 50)]
    assert torch.equal(torch.cat(parts), cache.draw("heldout", 300, 150, 9)["codes"])
    assert not torch.equal(cache.draw("heldout", 359, 359, 9)["index"], epoch["index"])
    assert not torch.equal(cache.draw("heldout", 0, 359, 8)["index"], epoch["index"])


def test_large_books_need_more_than_two_bytes(tmp_path: Path) -> None:
    class Large:
        latent = VQ(tokens=4, codebook=70_000).latent(Digits())

        def encode(self, images: Tensor) -> Tensor:
            return (images.flatten(1)[:, :4] * 900).long() + 69_000

        def decode(self, codes: Tensor) -> Tensor:
            return codes.float()

        def reconstruct(self, images: Tensor) -> Tensor:
            return self.encode(images).float()

    cache = encode(Large(), SMALL.build(), tmp_path / "codes", seed=0)
    assert np.load(tmp_path / "codes/train.npy").dtype == np.int32
    assert cache.draw("train", 0, 500, 0)["codes"].max() > 65_535


def test_a_tokenizer_whose_codes_decode_to_something_else_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    class Mixed:
        """Decodes tokens in another order than it encodes them."""

        latent, encode, reconstruct = tokenizer.latent, tokenizer.encode, tokenizer.reconstruct

        def decode(self, codes: Tensor) -> Tensor:
            return tokenizer.decode(codes.flip(1))

    with pytest.raises(ValueError, match=r"train codes from row 0 decode .* off"):
        encode(Mixed(), SMALL.build(), tmp_path / "codes", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    cache = encode(tokenizer, SMALL.build(), tmp_path / "codes", seed=0)
    cache.check(tokenizer, SMALL.build())
    torch.manual_seed(1)
    other = VQ(tokens=4, codebook=64, width=8, attention=False).build(Digits()).eval()
    with pytest.raises(ValueError, match="of train codes from row 0 encode again"):
        cache.check(other, SMALL.build())
    with pytest.raises(ValueError, match="rows from 0 are of other images"):
        cache.check(tokenizer, Digits(split_seed=1).build())


def test_damaged_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    encode(tokenizer, SMALL.build(), tmp_path / "codes", seed=0)
    file = tmp_path / "codes/heldout.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"heldout\.npy: not the codes that were written"):
        CodeCache(tmp_path / "codes")
    file.unlink()
    with pytest.raises(ValueError, match=r"no readable code cache .*heldout\.npy"):
        encode(tokenizer, SMALL.build(), tmp_path / "codes", seed=0)
    with pytest.raises(ValueError, match="no readable code cache"):
        CodeCache(tmp_path / "absent")


def test_the_process_that_was_first_wins(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, target = SMALL.build(), tmp_path / "codes"
    check = CodeCache.check

    def overtaken(self: CodeCache, *rest: Any) -> None:
        check(self, *rest)
        monkeypatch.setattr(CodeCache, "check", check)
        encode(tokenizer, images, target, seed=7)  # another process finishes now

    monkeypatch.setattr(CodeCache, "check", overtaken)
    found = encode(tokenizer, images, target, seed=0)
    assert found.manifest["seed"] == 7
    assert json.loads((target / "manifest.json").read_text())["seed"] == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes"]


def test_infinite_sources_cache_the_planned_number(tmp_path: Path) -> None:
    data = DeadLeaves(size=8, leaves=4, cached=30, cached_heldout=20)
    torch.manual_seed(0)
    net = VQ(tokens=4, codebook=16, width=4, attention=False).build(data).eval()
    cache = encode(net, data.build(), tmp_path / "codes", seed=0, batch=16)
    assert (cache.rows("train"), cache.rows("heldout")) == (30, 20)
    assert cache.manifest["splits"]["train"]["images"] == 30


# --- on a GPU ---


class PretendGPU(TorchFunctionMode):
    """Does on the CPU what is asked of a GPU, and notes where the host would wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if func is Tensor.to and args[1] == "cuda":
            if not (kwargs.get("non_blocking") and any(args[0] is value for value in self.pinned)):
                self.waits.append("to")
            return args[0].clone()
        if kwargs.get("device") == "cuda":
            if func is torch.tensor:  # a copy of host memory
                self.waits.append("tensor")
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def streams(folder: Path, tokenizer: Any) -> list[Any]:
    """Everything that training draws from."""
    files = fields(folder).build()
    return [*(source.build() for source in SOURCES), files, encode(tokenizer, SMALL.build(), folder / "codes", seed=0)]


def test_a_draw_never_waits_for_a_gpu(folder: Path, tokenizer: Any) -> None:
    for stream in streams(folder, tokenizer):
        with PretendGPU() as gpu:
            drawn = stream.draw("train", 5, 12, 3, "cuda")
        assert gpu.waits == []
        assert gpu.pinned
        expected = stream.draw("train", 5, 12, 3)
        assert all(torch.equal(drawn[name], value) for name, value in expected.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_draw_on_a_gpu_is_that_on_the_cpu(folder: Path, tokenizer: Any) -> None:
    for stream in streams(folder, tokenizer):
        drawn, expected = (stream.draw("train", 5, 12, 3, device) for device in ("cuda", "cpu"))
        for name, value in expected.items():
            assert drawn[name].is_cuda
            if name == "images":  # at an edge a pixel may fall to either side
                assert (drawn[name].cpu() - value).abs().mean() < 1e-2
            else:
                assert torch.equal(drawn[name].cpu(), value)
