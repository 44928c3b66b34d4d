"""Does one command lead from a grid to figures, start again after a kill, and find a cluster's profile?"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sweep import identity, plan, rundir, stages, tables

ROOT = Path(stages.__file__).parents[1]
GRID = """
study: tiny
data: {family: digits, views: 1, views_heldout: 1}
tokenizer:
  family: vq
  fields: {width: 4, attention: false, tokens: 16, codebook: 16}
  steps: [5, 10]
  train: {batch: 8, lr: 2.0e-3, warmup: 2}
  seeds: [0]
generator:
  family: llama
  sizes: [5k]
  steps: [4, 8]
  train: {batch: 8, lr: 3.0e-3, warmup: 2}
  seeds: [0]
evaluation:
  - {name: rebuilt, of: tokenizer, extractors: [digits-supervised], points: all, samples: 32}
  - {name: sampled, of: generator, extractors: [digits-supervised], points: last, samples: 32}
run: {threads: 1}
price: {device: core, devices: 2, peak_tflops: 0.06, mfu: [0.2, 0.7]}
"""


def gridded(folder: Path, text: str = GRID) -> Path:
    grid = folder / "grid.yaml"
    grid.write_text(text)
    return grid


def snakemake(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Snakemake on the grid in ``folder``, called in the root of the repository."""
    command = [*base(), *arguments, "--config", f"grid={folder / 'grid.yaml'}", f"results={folder / 'results'}"]
    return subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | more
    )


def base() -> list[str]:
    return [sys.executable, "-m", "snakemake"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was run by Snakemake, killed in between and started again."""
    folder = tmp_path_factory.mktemp("finished")
    study = folder / "results" / "tiny"
    config = ["--config", f"grid={gridded(folder)}", f"results={folder / 'results'}"]
    with (folder / "first.log").open("w") as log:
        first = subprocess.Popen([*base(), "--cores", "2", *config], cwd=ROOT, stdout=log, stderr=log)
    deadline = time.monotonic() + 240
    while not list(study.glob("runs/t*/events.jsonl")):
        assert time.monotonic() < deadline, (folder / "first.log").read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = snakemake(folder, "--cores", "2")
    assert done.returncode == 0, done.stdout
    return folder


@pytest.mark.timeout(600)
def test_one_command_leads_from_a_grid_to_figures(finished):
    study = finished / "results" / "tiny"
    for row in tables.plan(study, ["run_id"]):
        assert rundir.status(study, row["run_id"])["state"] == "done"
        events = [
            json.loads(line)["event"] for line in rundir.journal_file(study, row["run_id"]).read_text().splitlines()
        ]
        assert events.count("started") == 1  # the kill of Snakemake cost no run
    assert not tables.verify(study)
    assert (study / "figures" / "fig1_generation.png").stat().st_size > 10_000
    assert (study / "figures" / "fig1_generation.svg").exists()
    assert sorted(path.name for path in (study / "stamps").iterdir()) == [
        "evaluation-generator.json",
        "evaluation-tokenizer.json",
        "generator.json",
        "tables.txt",
        "tokenizer.json",
    ]


def test_a_second_call_does_nothing(finished):
    again = snakemake(finished, "--cores", "2")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout


def test_the_report_is_one_page_that_needs_nothing_else(finished):
    page = finished / "report.html"
    made = snakemake(finished, "--report", str(page))
    assert made.returncode == 0, made.stdout
    text = page.read_text()
    figures = list((finished / "results" / "tiny" / "figures").glob("*.png"))
    assert figures
    assert text.count("data:image/png;") == len(figures)
    captions = stages.captions(finished / "results" / "tiny")
    assert captions.keys() >= {figure.stem for figure in figures}
    assert "against compute" in captions["fig1_generation"]
    assert "against compute" in text
    assert "the study <tt" in text
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(?:https?:)?//", text)


def test_a_dry_run_for_a_cluster_shows_every_stage_from_a_clean_home(tmp_path):
    gridded(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    clean = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}
    shown = snakemake(tmp_path, "--profile", "slurm", "--dry-run", **clean)
    assert shown.returncode == 0, shown.stdout
    counted = dict(re.findall(r"^(\w+) +(\d+)$", shown.stdout, re.M))
    rules = ["tokenizer", "gate", "generator", "evaluation", "tables", "figures", "all"]
    assert counted == {**dict.fromkeys(rules, "1"), "total": "7"}
    places = [shown.stdout.index(f"rule {name}:") for name in rules]
    assert places == sorted(places)


@pytest.mark.timeout(900)
def test_a_cluster_without_accounting_does_a_whole_study(slurm, tmp_path):
    gridded(tmp_path)
    home = {"HOME": str(tmp_path)} | {f"XDG_{kind}_HOME": str(tmp_path / kind) for kind in ("CONFIG", "CACHE")}
    site = tmp_path / "site"  # what a user adds for one cluster
    site.mkdir()
    (site / "config.yaml").write_text("set-resources:\n  generator:\n    launch: time_min=7\n")
    profiles = ["--profile", "slurm", "--profile", str(site)]
    done = snakemake(tmp_path, *profiles, **slurm.environment(), **home)
    assert done.returncode == 0, done.stdout
    study = tmp_path / "results" / "tiny"
    for row in tables.plan(study, ["run_id"]):
        status = rundir.status(study, row["run_id"])
        assert (status["state"], bool(status["job"])) == ("done", True)
    assert not tables.verify(study)
    assert done.stdout.count("has been submitted with SLURM jobid") == 1  # one of Snakemake's own, for the figures
    assert (study / "figures" / "fig1_generation.png").exists()
    told = slurm.call("squeue", "-h", "-t", "all", "-o", "%j %l").split("\n")
    assert [line.split()[1] for line in told if line.startswith("sweep-tiny-generator-")] == ["7:00"]
    assert "Nothing to be done" in snakemake(tmp_path, *profiles, **slurm.environment(), **home).stdout


def test_style():
    formatted = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile"], cwd=ROOT, capture_output=True
    )
    assert formatted.returncode == 0, formatted.stderr


def test_lint(tmp_path):
    gridded(tmp_path)
    linted = snakemake(tmp_path, "--lint")
    assert linted.returncode == 0, linted.stdout
    assert "good condition" in linted.stdout


def test_a_mistake_in_the_grid_is_one_line(tmp_path):
    gridded(tmp_path, GRID.replace("batch: 8", "bacth: 8", 1))
    refused = snakemake(tmp_path, "--cores", "2")
    assert refused.returncode == 1
    assert "grid.yaml: tokenizer.train.bacth: got" in refused.stdout
    assert "Traceback" not in refused.stdout
    assert not (tmp_path / "results").exists()


# --- the plan at parse time ------------------------------------------------------------------------------------------


def test_a_plan_is_made_when_there_is_none_and_when_the_grid_has_changed(tmp_path, monkeypatch):
    grid = gridded(tmp_path)
    study = stages.ensure(str(grid), str(tmp_path / "results"))
    assert study == tmp_path / "results" / "tiny"
    made = rundir.plan_file(study).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(plan, "plan", None)  # not needed again
        assert stages.ensure(str(grid), str(tmp_path / "results")) == study
    assert rundir.plan_file(study).stat().st_mtime_ns == made
    gridded(tmp_path, GRID.replace("seeds: [0]", "seeds: [0, 1]"))
    stages.ensure(str(grid), str(tmp_path / "results"))
    assert len(tables.plan(study, ["run_id"])) == 2 + 4 + 4 + 4


def test_a_plan_is_made_again_when_what_it_depends_on_has_changed(tmp_path, monkeypatch, capsys):
    folder = "{family: image_folder, name: pets, root: $PETS/all, size: 16, classes: 2, count: 9, count_heldout: 9}"
    text = GRID.replace("{family: digits, views: 1, views_heldout: 1}", folder)
    weights = tmp_path / "inception.pth"
    grid = gridded(tmp_path, text.replace("[digits-supervised]", f"['inception-v3-compat:{weights}']"))

    def plan_of() -> list[dict[str, Any]]:
        return tables.plan(stages.ensure(str(grid), str(tmp_path / "results")), ["run_id", "stage", "config"])

    def root() -> str:
        return str(json.loads(plan_of()[0]["config"])["data"]["root"])

    monkeypatch.delenv("PETS", raising=False)
    assert root() == "$PETS/all"
    assert f"{grid}: data.root: the folder $PETS/all is not here" in capsys.readouterr().err
    assert plan_of()
    assert not capsys.readouterr().err  # said once
    monkeypatch.setenv("PETS", str(tmp_path))
    assert root() == f"{tmp_path}/all"
    before = {row["run_id"] for row in plan_of()}
    weights.write_bytes(b"other weights")
    assert {row["run_id"] for row in plan_of()} != before
    with monkeypatch.context() as patch:
        patch.setattr(plan, "plan", None)
        plan_of()
    monkeypatch.setitem(identity.VERSIONS, "tokenizer", 2)
    assert not {row["run_id"] for row in plan_of()} & before


def test_a_plan_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
    grid = gridded(tmp_path)
    study = stages.ensure(str(grid), str(tmp_path / "results"))
    gridded(tmp_path, GRID.replace("seeds: [0]", "seeds: [0, 1]"))
    written = rundir.atomic_write

    def killed(folder: Path, path: Path, content: Any) -> None:
        if path == rundir.plan_file(study):
            raise KeyboardInterrupt
        written(folder, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "atomic_write", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.ensure(str(grid), str(tmp_path / "results"))
    stages.ensure(str(grid), str(tmp_path / "results"))
    assert len(tables.plan(study, ["run_id"])) == 2 + 4 + 4 + 4


def test_only_stages_with_runs_are_rules(tmp_path):
    grid = gridded(tmp_path)
    study = stages.ensure(str(grid), str(tmp_path / "results"))
    assert list(stages.stamps(study)) == ["tokenizer", "gate", "generator", "evaluation"]
    lines = GRID.splitlines()
    start, stop = lines.index("generator:"), lines.index("evaluation:")
    gridded(tmp_path, "\n".join(line for line in lines[:start] + lines[stop:] if "of: generator" not in line))
    study = stages.ensure(str(grid), str(tmp_path / "results"))
    assert list(stages.stamps(study)) == ["tokenizer", "gate"]


@pytest.mark.parametrize("text", ["", "study: [1]", "a: b: c", "study: ../../x\ndata: {family: digits}"])
def test_nonsense_is_a_one_line_error(tmp_path, text):
    grid = gridded(tmp_path, text)
    with pytest.raises(ValueError, match=r"grid\.yaml: ") as error:
        stages.ensure(str(grid), str(tmp_path / "results"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_a_plan_beyond_its_price_is_refused(tmp_path):
    grid = gridded(tmp_path, GRID.replace("mfu:", "max_gpu_hours: 1.0e-9, mfu:"))
    with pytest.raises(ValueError, match="max_gpu_hours"):
        stages.ensure(str(grid), str(tmp_path / "results"))
    assert not (tmp_path / "results").exists()


def test_five_thousand_runs_are_read_in_seconds(tmp_path):
    many = GRID.replace("seeds: [0]", f"seeds: {list(range(55))}")
    grid = gridded(tmp_path, many)
    study = stages.ensure(str(grid), str(tmp_path / "results"))
    assert len(tables.plan(study, ["run_id"])) >= 5000
    code = f"""
import time
began = time.perf_counter()
import sys
from sweep import stages
study = stages.ensure({str(grid)!r}, {str(tmp_path / "results")!r})
stages.stamps(study), stages.captions(study)
print(time.perf_counter() - began)
print([name for name in ("torch", "pandas", "polars", "matplotlib", "pydantic") if name in sys.modules])
"""
    seconds, loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert float(seconds) < 3
    assert loaded == "[]"
