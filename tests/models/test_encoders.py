"""Are the committed extractors the recorded ones, do their distances rise with damage, do their objectives hold?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import encoders, extractors, fidelity
from models.config import EXTRACTORS, DeadLeaves, Digits
from models.data import quantise
from models.encoders import Classifier, ConvEncoder, SimCLR
from models.fidelity import FeatureSet

DATA = {"digits": Digits(), "dead-leaves": DeadLeaves(), "dead-leaves-64": DeadLeaves(size=64)}


def blur(images: Tensor, times: int) -> Tensor:
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(line, line).expand(images.shape[1], 1, 3, 3)
    for _ in range(times):
        images = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])
    return images


@pytest.fixture(scope="module")
def drawn() -> dict[str, dict[str, Tensor]]:
    """Images of each source: training reference, held-out, and damaged held-out images."""
    found = {}
    for name, fields in DATA.items():
        source, count = fields.build(), 200 if name == "dead-leaves-64" else 400
        held = source.draw("heldout", 0, count, 0)["images"]
        noise = torch.randn(held.shape, generator=torch.Generator().manual_seed(0))
        found[name] = {"reference": source.draw("train", 0, count, 0)["images"], "heldout": held}
        found[name] |= {f"noise {level}": held + level * noise for level in (0.2, 0.4, 0.8)}
        found[name] |= {f"blur {times}": blur(held, times) for times in (1, 2, 4)}
    return found


@pytest.mark.parametrize("objective", ["supervised", "contrastive"])
@pytest.mark.parametrize("data", DATA)
def test_distance_rises_with_damage(data: str, objective: str, drawn: dict[str, dict[str, Tensor]]) -> None:
    name = f"{data.removesuffix('-64')}-{objective}"
    sets = {
        kind: FeatureSet(fidelity.features(quantise(x).permute(0, 3, 1, 2), name)) for kind, x in drawn[data].items()
    }
    distance = {kind: fidelity.fid(x, sets["reference"]).value for kind, x in sets.items() if kind != "reference"}
    for damage in ("noise", "blur"):
        rising = [distance["heldout"], *(value for kind, value in distance.items() if kind.startswith(damage))]
        assert len(rising) == 4
        assert rising == sorted(rising), (damage, distance)
        # the floor of 200 images is high, and shape and palette survive a blur at 64 px (supervised, 800 images: 3.6x)
        assert rising[-1] > (2 if data.endswith("64") else 5) * rising[0], (damage, distance)


@pytest.mark.parametrize("name", [name for name, extractor in EXTRACTORS.items() if extractor.weights])
def test_committed_artefact(name: str) -> None:
    path = fidelity.weights_path(name)
    held = encoders.record(path)
    assert fidelity.extractor_hash(name) == held["sha256"][:12]
    assert path.stat().st_size < 2**20
    training = extractors.TRAININGS[name]
    encoder = encoders.load(path)
    assert (encoder.channels, encoder.widths, encoder.strides) == (
        training.channels,
        training.widths,
        training.strides,
    )
    assert held["recipe"] == training.recipe.identity()
    assert held["steps"] == training.steps
    assert held["split"] == "train"
    assert held["objective"] == {"name": training.objective.__name__, **json.loads(json.dumps(training.options))}
    accuracy = held["accuracy_heldout"]
    if name == "digits-supervised":
        assert accuracy["classifier, 8 px"] > 0.97
    assert accuracy[f"linear probe, {training.data[0].resolution} px"] > (0.95 if "digits" in name else 0.35)


def test_recorded_accuracy_is_that_of_the_weights() -> None:
    encoder = encoders.load(fidelity.weights_path("digits-contrastive"))
    held = encoders.record(fidelity.weights_path("digits-contrastive"))
    found = extractors.probe(encoder, Digits().build())
    assert found == pytest.approx(held["accuracy_heldout"]["linear probe, 8 px"], abs=0.003)


def test_damage_to_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert extractors.main(["--check"]) == 0
    assert capsys.readouterr().out == "4 extractors are as recorded\n"
    for path in encoders.WEIGHTS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoiled = tmp_path / "digits-supervised.safetensors"
    content = bytearray(spoiled.read_bytes())
    content[-1] ^= 1
    spoiled.write_bytes(content)
    (tmp_path / "dead-leaves-contrastive.safetensors").unlink()
    faults = extractors.check(tmp_path)
    assert [Path(fault.split(":")[0]).name for fault in faults] == [
        "digits-supervised.safetensors",
        "dead-leaves-contrastive.safetensors",
    ]
    with pytest.raises(ValueError, match="sha256 is not"):
        encoders.load(spoiled)
    with pytest.raises(ValueError, match="no such weights file"):
        encoders.load(tmp_path / "dead-leaves-contrastive.safetensors")


def test_training_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "PROBE", (300, 100))
    for name in ("digits-contrastive", "digits-supervised"):
        first = extractors.make(name, tmp_path, steps=3)
        assert encoders.load(tmp_path / f"{name}.safetensors").dimension == 64
        assert extractors.make(name, tmp_path, steps=3)["sha256"] == first["sha256"]


def test_training_sees_the_training_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = DATA["digits"].build(), DATA["dead-leaves"].build()
    stream = extractors.Sizes((first, first, second))
    shapes = [stream.draw("train", step * 24, 24, 0)["images"].shape[-1] for step in range(6)]
    assert shapes == [8, 8, 32, 8, 8, 32]
    seen = torch.cat([first.draw("train", step * 128, 128, extractors.SEED)["index"] for step in range(60)])
    assert not torch.isin(seen, first.members["heldout"]).any()


def test_features_of_an_image_do_not_depend_on_others_or_on_the_size() -> None:
    encoder = ConvEncoder(3, (8, 16), (2, 1)).eval()
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        whole = encoder(images)
        torch.testing.assert_close(encoder(images[2:3])[0], whole[2])
        assert encoder(torch.rand(2, 3, 40, 24)).shape == (2, encoder.dimension) == (2, 16)


def simclr(**changed: object) -> SimCLR:
    still = {
        "crop": 1.0,
        "rotate_deg": 0,
        "scale": (1.0, 1.0),
        "shift": 0.0,
        "jitter": 0.0,
        "noise": 0.0,
        "flip": False,
    }
    return SimCLR(ConvEncoder(1, (8, 8), (1, 2)), **{**still, **changed})


def test_a_view_without_augmentation_is_the_image() -> None:
    images, draw = torch.rand(3, 1, 8, 8) * 2 - 1, torch.rand(3, 9)
    torch.testing.assert_close(simclr().view(images, draw), images, atol=1e-5, rtol=1e-5)
    draw[:, 4] = 0.1
    torch.testing.assert_close(simclr(flip=True).view(images, draw), images.flip(-1), atol=1e-5, rtol=1e-5)
    draw[:, 0] = 1.0  # a quarter turn
    turned = simclr(rotate_deg=90).view(images, draw)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=1e-4, rtol=1e-4)
    draw[:, 6], draw[:, 7] = 0.0, 0.999  # a crop keeps pixels: the first rows, the last columns
    torch.testing.assert_close(simclr(crop=0.75).view(images, draw), images[:, :, :6, 2:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(simclr(jitter=0.5).view(images, draw), images, atol=0.05)


@torch.no_grad()
def test_nt_xent_by_hand() -> None:
    torch.manual_seed(0)
    module = simclr(jitter=0.3).eval()  # batch normalisation would see each side alone below
    batch = {"images": torch.rand(4, 1, 8, 8) * 2 - 1, "views": torch.rand(4, 2, 9)}
    found = module.loss(batch, 0)
    codes = []
    for side in (0, 1):
        code = module.head(module.encoder(module.view(batch["images"], batch["views"][:, side])))
        codes += list(code / code.norm(dim=1, keepdim=True))
    total = 0.0
    for i, code in enumerate(codes):
        partner = codes[(i + 4) % 8]
        others = sum(math.exp(float(code @ codes[j]) / 0.2) for j in range(8) if j != i)
        total -= math.log(math.exp(float(code @ partner) / 0.2) / others)
    assert float(found["loss"]) == pytest.approx(total / 8, rel=1e-4)


@torch.no_grad()
def test_a_classifier_learns_from_labels() -> None:
    torch.manual_seed(0)
    module = Classifier(ConvEncoder(1, (8,), (1,)), 3)
    batch = {"images": torch.rand(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    found = module.loss(batch, 0)
    logits = module.head(module.encoder(batch["images"]))
    assert float(found["loss"]) == pytest.approx(float(F.cross_entropy(logits, batch["labels"])))
    assert float(found["accuracy"]) == float((logits.argmax(1) == batch["labels"]).float().mean())
