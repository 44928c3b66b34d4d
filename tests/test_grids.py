"""Do the paths of the larger grids run, a few steps each, with small modules and stand-in images?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from PIL import Image

from analysis import figures, load
from sweep import grid, plan, rundir, tables, worker
from sweep.attempt import Stop

ROOT = Path(__file__).parent.parent
EXTRACTORS = ["dead-leaves-supervised", "dead-leaves-contrastive"]


def photographs(folder: Path) -> None:
    """Two classes of noise in odd sizes: four images to train on, two held out, each."""
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("n01", "n02"):
            for number in range(count):
                shape = (260 + 20 * number, 300, 3)
                pixels = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
                path = folder / split / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)


def small(name: str, folder: Path) -> dict[str, Any]:
    """A shipped grid with few steps, narrow modules and little data; axes, precision and protocols as they are."""
    held: dict[str, Any] = yaml.safe_load((ROOT / "grids" / f"{name}.yaml").read_text())
    data, tokenizer, generator = held["data"], held["tokenizer"], held["generator"]
    if data["family"] == "image_folder":
        photographs(folder / "images")
        data |= {"root": str(folder / "images"), "classes": 2, "count": 8, "count_heldout": 4}
        tokenizer["axes"][1]["product"]["codebook"] = [16]
        for section in (tokenizer, generator):  # bfloat16 convolutions of this size take minutes on a CPU
            section["train"]["precision"] = "float32"
    else:
        data |= {"leaves": 8, "cached": 64, "cached_heldout": 32}
    tokenizer["fields"] |= {"width": 4}
    tokenizer |= {"steps": [1, 2], "seeds": [0]}
    tokenizer["train"] |= {"batch": 4, "warmup": 1}
    generator |= {"sizes": [{"name": "tiny", "layers": 1, "width": 16, "heads": 1}], "steps": [1, 2]}
    generator.pop("budgets", None)
    generator.pop("where", None)
    generator["train"] |= {"batch": 4, "warmup": 1}
    for section in (tokenizer, generator):
        section["run"] = {"micro_batch": 2}
    for protocol in held["evaluation"]:
        protocol |= {"samples": 16, "extractors": EXTRACTORS, "seeds": [0]}
        if "guidance" in protocol:
            protocol |= {"search_samples": 16, "guidance": protocol["guidance"][:2], "points": "last"}
    return held | {"run": {"device": "cpu", "measure_batch": 8}}


@pytest.mark.parametrize(
    "name", ["compression_dead_leaves64", "compression_dead_leaves64_short", "compression_imagenet256"]
)
def test_a_few_steps(name, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(small(name, tmp_path), sort_keys=False))
    planned = plan.plan(grid.load(file), tmp_path / "results")
    plan.write(planned)
    study = planned.study
    rows = tables.plan(study, ["run_id", "stage", "config"])
    stages = {
        stage: [row for row in rows if row["stage"] == stage] for stage in ("tokenizer", "generator", "evaluation")
    }
    assert len(stages["tokenizer"]) == {"compression_dead_leaves64": 5, "compression_imagenet256": 3}.get(name, 3)
    for row in (row for held in stages.values() for row in held):
        rundir.register(study, yaml.safe_load(row["config"]))
        assert worker.work(study, row["run_id"], Stop()) == "done", rundir.status(study, row["run_id"])
    points = load.points(study)
    assert len(points) == len([row for row in stages["evaluation"] if '"of":"generator"' in row["config"]])
    for extractor in map(load.slug, EXTRACTORS):
        assert points[f"fid_{extractor}"].is_not_null().all()
    assert load.tokenizers(study)["psnr"].is_finite().all()
    losses = load.table(study, "curves").filter(pl.col("split") == "train", pl.col("metric").str.starts_with("loss"))
    assert losses["value"].is_finite().all()
    if name == "compression_imagenet256":  # 400 and 576 tokens are those of larger input
        assert set(points["tokens"]) == {256, 400, 576}
        # planned by steps, with one tokenizer seed: curves without a target, intervals or contrasts
        assert figures.main([str(study)]) == 0
        written = (study / "figures" / "report.md").read_text()
        assert all(f"- gFID ({name}), {tokens}x16" in written for name in EXTRACTORS for tokens in (256, 400, 576))
        assert (study / "figures" / "fig1_generation.png").exists()
