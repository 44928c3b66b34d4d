"""Can a name, a grid or a file of a study run a command, or be written where it should not?"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import load
from models import checkpoint, fidelity
from sweep import document, launch, plan, rundir, slots, stages, status, tables, worker
from sweep.attempt import Stop
from tests.sweep.test_grid import VALID, changed, written
from tests.sweep.test_worker import planned, runs
from tests.test_dependencies import files

ROOT = Path(plan.__file__).parents[1]
CANARY = "canary"  # what a command that ran would leave behind

TRAPS = [
    *("../x", "a/b", "/abs", "..", ".", "", "./a", "a/", "~", "~root", "a\\b", "%2e%2e", "{study}", "$HOME"),
    *("a\0b", "a\nb", "tiny\n", "\ntiny", "a\r", "a\tb", " tiny", "a b", "a\x1b[31m", "a\x7f", "a\x85b", "a\u2028b"),
    *("-rf", "--help", "-", "$(touch canary)", "`touch canary`", "a;touch canary", "a|touch canary", "a&touch canary"),
    *("'", '"', "a'b", "*", "?", "[a-z]", "a>canary", "#", "!x", "[/b]"),
    *("a\uff0fb", "\u202egpj", "\u2024\u2024", "\uff0e\uff0e", "\u2025", "a\u0301", "\u200b", "\u0430", "\ud800"),
    "a" * 300,
]


def everything(folder: Path, besides: Path | None = None) -> dict[str, bytes | None]:
    """All that lies below a folder, contents included, and what lies below one of its folders left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if besides is None or not path.is_relative_to(besides)
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with room above it for what should not be written there."""
    folder = tmp_path / "above" / "here"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "above"))
    monkeypatch.chdir(folder)
    return folder


# --- names in a grid -------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[str], Any]] = {
    "study": lambda trap: changed("study", trap),
    "arm": lambda trap: changed("tokenizer/name", trap),
    "size": lambda trap: changed("generator/sizes/1/name", trap),
    "ladder": lambda trap: changed("generator/sizes/0", trap),
    "evaluation": lambda trap: changed("evaluation/0/name", trap),
    "arm of an evaluation": lambda trap: changed("evaluation/1/arms", [trap]),
    "role": lambda trap: changed("generator/upstream", {trap: {"stage": "tokenizer"}}),
    "arm of a role": lambda trap: changed("generator/upstream", {"tokenizer": {"stage": "tokenizer", "arm": trap}}),
    "axis": lambda trap: changed("tokenizer/axes/0", {"product": {trap: [1]}}),
    "listed axis": lambda trap: changed("tokenizer/axes/0", {"list": [{trap: 1}]}),
    "field": lambda trap: changed("tokenizer/fields", {trap: 1}),
    "setting": lambda trap: changed("tokenizer/train", {"lr": 0.1, trap: 1}),
    "filter": lambda trap: changed("generator/where", {trap: {"min": 1}}),
    "section": lambda trap: {**copy.deepcopy(VALID), trap: {}},
    "family": lambda trap: changed("tokenizer/family", trap),
    "data": lambda trap: changed("data/family", trap),
    "extractor": lambda trap: changed("evaluation/0/extractors", [trap]),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_name_that_could_be_a_path_or_a_command_is_refused_in_one_line_and_nothing_is_written(here, place, capsys):
    for trap in TRAPS:
        file = written(here, PLACES[place](trap))
        before = everything(here.parent)
        assert plan.main([str(file)]) == 2, trap
        error = capsys.readouterr().err
        assert error.startswith(f"{file}: ")
        assert "; allowed: " in error
        assert error.count("\n") == 1
        assert error[:-1].isprintable() or trap in ("\u200b", "\u202egpj")
        assert everything(here.parent) == before, trap


FRAGMENTS = [
    *("..", "/", "\0", "\n", "$(touch canary)", "`", "|", "'", '"', "\uff0f", "\u2024", "-", "tiny", "\u202e", " "),
]
NAMES = st.lists(st.sampled_from(FRAGMENTS) | st.characters(), max_size=5).map("".join)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, place=st.sampled_from(["study", "arm", "size", "evaluation"]))
def test_any_name_is_refused_or_stays_within_its_study(here, name, place):
    shutil.rmtree(here / "results", ignore_errors=True)
    grid = PLACES[place](name)
    file = written(here, grid)
    before = everything(here.parent)
    code = plan.main([str(file)])
    assert code in (0, 2)
    if code == 2:
        assert everything(here.parent) == before
    else:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)
        assert everything(here.parent, here / "results" / grid["study"]) == before | {"here/results": None}


STRANGE = """
from models.config import VQ


class Odd(VQ):
    kernel: str = "plain"
"""


def free_text(folder: Path, *values: str) -> tuple[Path, dict[str, str]]:
    """A grid whose family, from outside the tree, takes any text; and the environment in which it is found."""
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    (modules / "strange.py").write_text(STRANGE)
    grid = changed("tokenizer/family", "strange:Odd")
    grid["tokenizer"]["axes"] = [{"product": {"kernel": [*values]}}]
    grid["tokenizer"]["fields"] = {"width": 4, "tokens": 4, "codebook": 16, "attention": False}
    grid["tokenizer"] |= {"steps": [2], "seeds": [0]}
    grid["data"] |= {"views": 1, "views_heldout": 1}
    return written(folder, grid), {"PYTHONPATH": f"{modules}{os.pathsep}{ROOT}"}


def test_free_text_is_a_label_and_nothing_else(here, monkeypatch, capsys):
    shown = [trap for trap in TRAPS if not document.HIDDEN.search(trap)]
    file, _ = free_text(here, *shown)
    monkeypatch.syspath_prepend(str(here / "modules"))
    before = everything(here.parent)
    assert plan.main([str(file)]) == 0
    study = here / "results" / "tiny"
    after = everything(here.parent, study)
    assert {name for name in after if "__pycache__" not in name} == {*before, "here/results"}
    labels = [row["label"] for row in tables.plan(study, ["label", "stage"]) if row["stage"] == "tokenizer"]
    assert labels == [f"Odd 4x16 kernel={trap} s0" for trap in shown]
    for run_id in runs(study, "tokenizer"):
        claim = rundir.claim(study, run_id)
        assert claim is not None
        claim.update(state="running")
    capsys.readouterr()
    assert status.main([str(study)]) == 0
    assert "kernel=../x" in capsys.readouterr().out
    failed = runs(study, "tokenizer")[shown.index("[/b]")]  # looks like the markup of a terminal
    assert status.main([str(study), "--why", failed]) == 0
    assert "kernel=[/b] s0" in capsys.readouterr().out
    assert not list(here.parent.rglob(CANARY))


@pytest.mark.parametrize("trap", [trap for trap in TRAPS if document.HIDDEN.search(trap)], ids=ascii)
def test_text_that_does_not_show_is_refused_wherever_it_stands(here, trap, monkeypatch, capsys):
    file, _ = free_text(here, trap)
    monkeypatch.syspath_prepend(str(here / "modules"))
    assert plan.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert "tokenizer.axes[0].product.kernel[0]: got " in error
    assert error.endswith("allowed: text without control characters\n")
    assert error.count("\n") == 1
    assert not (here / "results").exists()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(here: Path) -> Path:
    """A study that was only planned, in the working directory."""
    return planned(here)


WORDS = [trap for trap in TRAPS if trap and not re.search("[\0\ud800]", trap)]  # others are no arguments of a command
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "status": (status.main, ["TRAP"]),
    "status --why": (status.main, ["STUDY", "--why=TRAP"]),
    "status --tail": (status.main, ["STUDY", "--tail=TRAP"]),
    "launch": (launch.main, ["TRAP", "--stage", "tokenizer"]),
    "launch --only": (launch.main, ["STUDY", "--stage", "tokenizer", "--only=TRAP"]),
    "launch --only KEY=": (launch.main, ["STUDY", "--stage", "tokenizer", "--only=TRAP=1"]),
    "launch --only =VALUE": (launch.main, ["STUDY", "--stage", "tokenizer", "--only=seed=TRAP"]),
    "tables": (tables.main, ["verify", "TRAP"]),
    "worker": (worker.main, ["TRAP", "--results", "STUDY"]),
    "plan --explain": (plan.main, ["GRID", "--explain=TRAP"]),
    "plan": (plan.main, ["TRAP"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_argument_that_could_be_a_path_or_a_command_is_refused_and_nothing_is_written(here, study, name, capsys):
    main, words = COMMANDS[name]
    before = everything(here.parent)
    for trap in WORDS:
        arguments = [
            word.replace("TRAP", trap).replace("STUDY", str(study)).replace("GRID", str(here / "grid.yaml"))
            for word in words
        ]
        if trap in ("-rf", "--help") and "TRAP" in words:  # an option for argparse, which prints its usage too
            with pytest.raises(SystemExit):
                main(arguments)
            capsys.readouterr()
        else:
            assert main(arguments) == 2, arguments
            assert capsys.readouterr().err.count("\n") == 1, arguments
        assert everything(here.parent) == before, arguments


def test_a_results_folder_of_any_name_is_a_folder_of_that_name(here, capsys):
    """What stands in ``--results`` is a path, so ``..`` means what it says; nothing in it is expanded or run."""
    file = written(here, VALID)
    for trap in [trap for trap in WORDS if not trap.startswith("/")]:
        before = everything(here.parent)
        code = plan.main([str(file), f"--results={trap}", "--json"])
        capsys.readouterr()
        study = (here / trap).resolve() / "tiny"
        if code == 0:
            assert (study / "plan.parquet").exists()
            new = {here.parent / name for name in everything(here.parent).keys() - before.keys()}
            assert all(path.is_relative_to(study) or study.is_relative_to(path) for path in new), trap
            shutil.rmtree(study)
        else:
            assert code == 2
            assert everything(here.parent) == before
    assert not list(here.parent.rglob(CANARY))


def test_a_path_that_looks_like_the_markup_of_a_terminal_is_shown_as_it_is(here, capsys):
    folder = here / "[" / "x]"
    folder.mkdir(parents=True)
    assert plan.main([str(written(folder, VALID))]) == 0
    assert "[/x]/grid.yaml" in capsys.readouterr().out


# --- shells ----------------------------------------------------------------------------------------------------------

ODD_FOLDER = """it's "odd" $HOME $(touch canary) `touch canary`; touch canary & [x] * a#b"""


@pytest.mark.timeout(600)
def test_a_stage_runs_in_a_folder_and_under_labels_that_a_shell_would_run(tmp_path):
    folder = tmp_path / ODD_FOLDER
    folder.mkdir()
    file, found = free_text(folder, "$(touch canary)", "';touch canary;'")

    def call(*words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, env=os.environ | found, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    call("sweep.plan", str(file))
    call("sweep.launch", "results/tiny", "--stage", "tokenizer", "--slots", "1")
    study = folder / "results" / "tiny"
    assert load.table(study, "runs")["status"].to_list() == ["done", "done"]
    assert not tables.verify(study)
    assert not list(tmp_path.rglob(CANARY))
    assert not (ROOT / CANARY).exists()


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--snakefile", str(ROOT / "Snakefile"), *arguments]
    command += ["--config", f"grid={folder / 'grid.yaml'}", f"results={folder / 'results'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_workflow_hands_the_paths_of_such_a_folder_to_its_shell_as_words(tmp_path):
    folder = tmp_path / ODD_FOLDER
    planned(tmp_path)
    folder.mkdir()
    (tmp_path / "grid.yaml").rename(folder / "grid.yaml")
    shown = snakemake(folder, "--dry-run", "--printshellcmds")
    assert shown.returncode == 0, shown.stdout
    commands = re.findall(r"^.*?(\S+ -m sweep\..*)$", shown.stdout, re.M)
    study = str(folder / "results" / "tiny")
    launched = [shlex.split(command) for command in commands if "sweep.launch" in command]
    assert [words[5] for words in launched] == ["tokenizer", "evaluation", "generator", "evaluation"]
    assert {words[3] for words in launched} == {study}
    (compacted,) = (shlex.split(command) for command in commands if "sweep.tables" in command)
    assert compacted[3:] == ["compact", study, ">", f"{study}/stamps/tables.txt"]
    assert not list(tmp_path.rglob(CANARY))


def test_every_path_in_a_command_of_the_workflow_is_quoted():
    """Those of rules without a command line of their own are not shown by a dry-run."""
    text = (ROOT / "Snakefile").read_text()
    plain = re.findall(
        r"\{((?:params\.\w+|input|output|log)[^{}]*)\}", "".join(re.findall(r'^ +"\{params.*$', text, re.M))
    )
    made_of_words = {"params.stage", "params.of", "params.place"}
    assert plain
    assert [name for name in plain if name not in made_of_words and not name.endswith(":q")] == []


def test_what_a_profile_says_is_handed_to_the_shell_as_words():
    place = stages.place({"place": "slurm", "slurm_partition": "a; touch canary", "launch": "time_min=1 $(touch x)"})
    words = ["--cluster", "slurm", "--slurm", "partition=a; touch canary", "time_min=1", "$(touch", "x)"]
    assert shlex.split(place) == words


@pytest.mark.parametrize("results", ["{b}/results", "a}b"])
def test_a_results_folder_that_a_workflow_would_take_for_a_pattern_is_refused_in_one_line(here, results):
    written(here, VALID)
    with pytest.raises(ValueError, match=r"^results: got .*; allowed: a path without braces"):
        stages.ensure("grid.yaml", results)
    assert [path.name for path in here.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize("trap", TRAPS, ids=ascii)
def test_a_workflow_looks_for_no_study_of_such_a_name(here, trap):
    written(here, changed("study", trap))
    before = everything(here.parent)
    with pytest.raises(ValueError, match=r"grid\.yaml: study: got .*; allowed: ") as refused:
        stages.ensure("grid.yaml", "results")
    assert "\n" not in str(refused.value)
    assert everything(here.parent) == before


# --- YAML ------------------------------------------------------------------------------------------------------------

TAGGED = [
    "!!python/object/apply:os.system [touch canary]",
    "!!python/object/apply:subprocess.check_call [[touch, canary]]",
    "!!python/object/new:os.system [touch canary]",
    "!!python/object:models.config.VQ {width: 4}",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
    "!!timestamp x",
    "!!int ''",
    "!command touch canary",
]


@pytest.mark.parametrize("tagged", TAGGED)
@pytest.mark.parametrize("place", ["study: {}", "study: tiny\ndata: {}", "study: tiny\n? {}\n: 1", "{}"])
def test_yaml_that_names_code_is_refused_in_one_line(here, tagged, place, capsys):
    file = written(here, place.format(tagged))
    assert plan.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{file}: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=r"grid\.yaml: .*allowed: a YAML mapping"):
        stages.ensure(str(file), "results")
    assert [path.name for path in here.iterdir()] == ["grid.yaml"]


BOMBS = {
    "repeated": "a: &a [x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "study: *i\n",
    "within itself": "study: &a [*a]\n",
    "a key within itself": "study: tiny\ndata: &a {b: *a}\n",
    "deep": "study: " + "[" * 5000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_that_grows_when_it_is_read_is_refused_in_one_short_line(here, name, capsys):
    assert plan.main([str(written(here, BOMBS[name]))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 2000


def test_a_grid_in_another_encoding_is_refused_in_one_line(here, capsys):
    file = here / "grid.yaml"
    file.write_bytes(yaml.safe_dump(VALID).encode("utf-16"))  # YAML would read it
    assert plan.main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{file}: the file: got no YAML")
    assert error.count("\n") == 1


# --- code that is data: what the source calls ------------------------------------------------------------------------

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "submitit"}
CALLS = {
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *(f"torch.distributed.{name}_object" for name in ("all_gather", "gather")),
    *(f"torch.distributed.{name}_object_list" for name in ("broadcast", "scatter", "send", "recv")),
}
METHODS = {"read_pickle", "to_pickle"}
ARGUMENTS = {"shell": False, "allow_pickle": False, "weights_only": True}  # each with the one value that is safe

ALLOWED = {
    ("sweep/slots.py", "submitit"): "pickles what it runs, into a folder that only its owner may enter",
    ("sweep/dispatch.py", "submitit"): "the same",
    ("sweep/document.py", "yaml.load"): "with a loader that is a SafeLoader",
    ("models/training.py", "torch.distributed.broadcast_object_list"): "between the ranks of one run",
}


def spelled(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name of a function, aliases of imports resolved; "" where it has none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (before := spelled(node.value, names)):
        return f"{before}.{node.attr}"
    return ""


def unsafe(text: str) -> set[str]:
    """What in a source text may run code that somebody else wrote down as data."""
    tree, names, found = ast.parse(text), dict[str, str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
            found |= {name for a in node.names if (name := a.name.partition(".")[0]) in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            found |= {node.module.partition(".")[0]} & MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = spelled(node.func, names)
        given = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
        if name in CALLS and not (name == "torch.load" and given.get("weights_only") is True):
            found.add(name)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            found.add(node.func.attr)
        for each in node.keywords:
            if each.arg in ARGUMENTS and given.get(each.arg) is not ARGUMENTS[each.arg]:
                found.add(f"{name or 'a call'}({each.arg}=)")
    return found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads as l", "pickle"),
        ("import cloudpickle as c", "cloudpickle"),
        ("def f():\n    from joblib import load", "joblib"),
        ("import torch\ntorch.load(p)", "torch.load"),
        ("import torch as t\nt.load(p, weights_only=flag)", "torch.load"),
        ("from torch import load\nload(p, weights_only=False)", "torch.load"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "numpy.load(allow_pickle=)"),
        ("import pandas as pd\npd.read_pickle(p)", "read_pickle"),
        ("import yaml\nyaml.load(t, yaml.Loader)", "yaml.load"),
        ("eval(text)", "eval"),
        ("from os import system\nsystem('x')", "os.system"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "subprocess.run(shell=)"),
        ("import torch.distributed as dist\ndist.broadcast_object_list(x)", "torch.distributed.broadcast_object_list"),
    ],
)
def test_code_that_unpickles_or_runs_text_is_found(text, what):
    assert what in unsafe(text)


def test_code_that_does_not_is_not_found():
    text = "import torch, numpy as np\ntorch.load(p, weights_only=True)\nnp.load(p)\nmodule.eval()\nre.compile(x)"
    assert unsafe(text) == set()


def test_nothing_is_unpickled_and_no_text_is_run_but_for_reasons_that_are_given():
    sources = [path for package in ("sweep", "models", "analysis") for path in files(package)]
    found = {(str(path.relative_to(ROOT)), what) for path in sources for what in unsafe(path.read_text())}
    assert found == ALLOWED.keys()
    assert issubclass(document._Loader, yaml.SafeLoader)


# --- code that is data: what the readers do --------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def as_pickle(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=2))  # which PyTorch writes, and reads without a warning


def as_torch(path: Path, payload: Payload) -> None:
    torch.save(payload, path)


def as_objects(path: Path, payload: Payload) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


def as_extension(path: Path, payload: Payload) -> None:
    """The same rows in a schema that names a type, which versions of Arrow before 14.0.1 built by unpickling."""
    held = pq.ParquetFile(path).read()
    names = {"name": b"arrow.py_extension_type", "metadata": pickle.dumps(payload)}
    place = held.schema.get_field_index("run_id")
    field = held.schema.field(place).with_metadata({f"ARROW:extension:{name}": told for name, told in names.items()})
    pq.write_table(pa.table(held.columns, schema=held.schema.set(place, field)), path)


Form = Callable[[Path, Payload], None]
FILES: dict[str, tuple[tuple[str, ...], tuple[Form, ...]]] = {
    "the grid": (("grid.yaml",), (as_pickle,)),
    "the lock of the plan": (("plan.lock.json",), (as_pickle,)),
    "the plan": (("plan.parquet",), (as_pickle, as_extension)),
    "configs": (("runs/*/config.json", "runs/*/identity.json"), (as_pickle,)),
    "records": (("runs/*/status.json", "runs/*/events.jsonl", "stamps/*", "figures/*"), (as_pickle,)),
    "checkpoints": (("runs/*/ckpt/*/*.safetensors", "runs/*/points/*/*.safetensors"), (as_pickle, as_torch)),
    "records of checkpoints": (("runs/*/ckpt/*/*.json", "runs/*/points/*/*.json"), (as_pickle,)),
    "codes": (("cache/codes/*/*/*.npy",), (as_pickle, as_objects)),
    "the manifest of codes": (("cache/codes/*/*/manifest.json",), (as_pickle,)),
    "references": (("cache/references/*",), (as_pickle, as_torch)),
    "parts": (("tables/*/*/*/*.parquet",), (as_pickle, as_extension)),
    "compact tables": (("compact/*", "prediction.parquet"), (as_pickle, as_extension)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that went through all its stages; not to be written to."""
    study = planned(tmp_path_factory.mktemp("finished"))
    for row in tables.plan(study, ["run_id"]):
        assert worker.work(study, row["run_id"], Stop()) == "done"
    tables.compact(study)
    assert launch.main([str(study), "--stage", "tokenizer"]) == 0
    shutil.copy(study / "plan.parquet", study / load.PREDICTION)
    (study / "figures").mkdir()
    (study / "figures" / "fig1.txt").write_text("a caption")
    return study


@pytest.fixture
def owned(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished study."""
    return Path(shutil.copytree(finished, tmp_path / "results" / finished.name))


def vouched(study: Path) -> None:
    """Let recorded checksums be those of what lies there, so that no reader stops at them."""
    for file in (*study.glob("runs/*/ckpt/*/*.safetensors"), *study.glob("runs/*/points/*/*.safetensors")):
        held = json.loads(file.with_suffix(".json").read_bytes())
        held |= {"crc32": checkpoint._checksum(file), "bytes": file.stat().st_size}
        file.with_suffix(".json").write_text(json.dumps(held))
    for manifest in study.glob("cache/codes/*/*/manifest.json"):
        held = json.loads(manifest.read_bytes())
        for name in held["files"]:
            held["files"][name] = hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest()
        manifest.write_text(json.dumps(held))


def reading(study: Path, sample: list[str]) -> Iterator[Callable[[], object]]:
    """Everything that reads a study."""
    name, grid, results = str(study), str(study / "grid.yaml"), str(study.parent)
    for words in (["--once"], ["--json"], ["--failures"], ["--why", sample[0]], ["--tail", sample[0]]):
        yield partial(status.main, [name, *words])
    yield partial(tables.main, ["verify", name])
    for table in tables.TABLES:
        yield partial(load.table, study, table)
    for reader in (load.points, load.tokenizers, load.prediction, stages.stamps, stages.captions):
        yield partial(reader, study)
    yield partial(stages.ensure, grid, results)
    yield partial(plan.main, [grid, "--results", results, "--dry-run"])
    yield partial(launch.main, [name, "--stage", "tokenizer"])
    for run_id in sample:
        yield partial(worker.work, study, run_id, Stop())
    yield partial(tables.main, ["compact", name])


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, (_, forms) in FILES.items() for form in forms])
def test_no_reader_of_a_study_runs_what_a_file_of_it_says(owned, tmp_path, name, form, monkeypatch):
    payload = Payload(tmp_path / CANARY)
    sample = [*runs(owned, "tokenizer"), *runs(owned, "generator"), runs(owned, "evaluation")[-1]]
    for run_id in sample:  # to be gone on with
        rundir.mark(owned, run_id, "planned")
    replaced = [path for pattern in FILES[name][0] for path in owned.glob(pattern)]
    assert replaced
    for path in replaced:
        form(path, payload)
    if name in ("checkpoints", "codes"):
        vouched(owned)

    def start(*_: Any) -> None:
        raise ChildProcessError("not here")

    monkeypatch.setattr(slots.Slots, "start", start)
    for read in reading(owned, sample):
        with contextlib.suppress(ValueError, OSError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        assert not payload.canary.exists(), read


def test_no_reader_of_a_claim_runs_what_its_holder_says(owned, tmp_path):
    payload = Payload(tmp_path / CANARY)
    (tokenizer,) = runs(owned, "tokenizer")
    claim = rundir.claim(owned, tokenizer)
    assert claim is not None
    as_pickle(claim.folder / "holder.json", payload)
    assert status.main([str(owned), "--why", tokenizer]) == 0
    rundir.holder(owned, tokenizer)
    rundir.claim(owned, tokenizer)
    assert not payload.canary.exists()


def test_the_payload_would_be_noticed(tmp_path):
    for form in (as_pickle, as_torch, as_objects):
        form(tmp_path / "file", payload := Payload(tmp_path / form.__name__))
        with contextlib.suppress(Exception):
            pickle.loads((tmp_path / "file").read_bytes())
        with contextlib.suppress(Exception):
            torch.load(tmp_path / "file", weights_only=False)
        with contextlib.suppress(Exception):
            np.load(tmp_path / "file", allow_pickle=True)
        assert payload.canary.exists()


@pytest.mark.parametrize("name", ["inception-v3-compat:{}", "timm:resnet10t:{}"])
@pytest.mark.parametrize("form", [as_pickle, as_torch])
def test_weights_that_a_grid_names_are_tensors_or_refused_in_one_line(tmp_path, name, form):
    """They come from somewhere else, and PyTorch's own format is a pickle."""
    payload = Payload(tmp_path / CANARY)
    form(tmp_path / "weights.pth", payload)
    with pytest.raises(ValueError, match="extractors: ") as refused:
        fidelity.extractor(name.format(tmp_path / "weights.pth"), "cpu")
    assert "\n" not in str(refused.value)
    assert not payload.canary.exists()


# --- links -----------------------------------------------------------------------------------------------------------
#
# Somebody who moves a part of a study to a larger disk, and leaves a link in its place, expects that all goes on as
# before. Whoever may put links into a folder owns it: nothing here guards against that.


def moved(path: Path, target: Path) -> Path:
    """A folder, elsewhere and with a link in its place."""
    target.mkdir(parents=True)
    path.rename(target / path.name)
    path.symlink_to(target / path.name)
    return target / path.name


def test_a_run_that_was_moved_and_linked_goes_on_where_it_is(owned, tmp_path):
    (tokenizer,) = runs(owned, "tokenizer")
    there = moved(rundir.run_folder(owned, tokenizer), tmp_path / "elsewhere")
    rundir.mark(owned, tokenizer, "planned")
    before = everything(there.parent).keys()
    assert worker.work(owned, tokenizer, Stop()) == "done"
    assert rundir.run_folder(owned, tokenizer).is_symlink()
    assert json.loads((there / "status.json").read_bytes())["state"] == "done"
    assert everything(there.parent).keys() - before == {
        f"{tokenizer}/claim/0002",
        f"{tokenizer}/claim/0002/released.json",
    }
    assert not tables.verify(owned)


def test_rows_that_were_moved_and_linked_are_read_by_all(owned, tmp_path):
    measured = runs(owned, "evaluation")[0]
    whole = load.table(owned, "curves").height
    shutil.rmtree(owned / "compact")
    moved(rundir.part_file(owned, "curves", measured, 1, 0).parent, tmp_path / "elsewhere")
    assert not tables.verify(owned)
    assert load.table(owned, "curves").height == whole
    assert not tables.compact(owned)
    assert load.table(owned, "curves").height == whole


def test_checkpoints_that_were_linked_to_a_folder_of_other_things_leave_those_alone(owned, tmp_path):
    (tokenizer,) = runs(owned, "tokenizer")
    there = tmp_path / "scratch"
    shutil.copytree(rundir.run_folder(owned, tokenizer) / "ckpt", there)
    (there / ".ssh").mkdir()
    (there / ".ssh" / "key").touch()
    left = there / ".trunk-00000008.123"  # by a writer that was killed
    left.mkdir()
    shutil.rmtree(rundir.run_folder(owned, tokenizer) / "ckpt")
    (rundir.run_folder(owned, tokenizer) / "ckpt").symlink_to(there)
    rundir.mark(owned, tokenizer, "planned")
    assert worker.work(owned, tokenizer, Stop()) == "done"
    assert (there / ".ssh" / "key").exists()
    assert not left.exists()


def test_files_that_are_made_elsewhere_arrive_while_it_is_the_same_disk(owned, tmp_path):
    measured = runs(owned, "evaluation")[0]
    there = moved(rundir.staging(owned), tmp_path / "elsewhere")
    (there / "notes").write_text("mine")
    rundir.mark(owned, measured, "planned")
    assert worker.work(owned, measured, Stop()) == "done"
    assert [path.name for path in there.iterdir()] == ["notes"]


def test_files_that_would_be_made_on_another_disk_are_refused_in_one_line(owned, tmp_path, capsys):
    """A rename between disks is a copy, which a reader could see a half of."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    shutil.rmtree(rundir.staging(owned))
    with tempfile.TemporaryDirectory(dir=other) as elsewhere:
        rundir.staging(owned).symlink_to(elsewhere)
        before = everything(owned)
        assert launch.main([str(owned), "--stage", "tokenizer"]) == 2
        assert capsys.readouterr().err.endswith("Invalid cross-device link\n")
        assert everything(owned) == before
        assert os.listdir(elsewhere) == []


def test_a_link_to_nowhere_is_one_line(owned, capsys):
    shutil.rmtree(rundir.staging(owned))
    rundir.staging(owned).symlink_to("gone")
    assert launch.main([str(owned), "--stage", "tokenizer"]) == 2
    error = capsys.readouterr().err
    assert ".staging: " in error
    assert error.count("\n") == 1
    (owned / "plan.parquet").unlink()
    (owned / "plan.parquet").symlink_to("gone")
    assert status.main([str(owned)]) == 2
    assert "holds no plan.parquet" in capsys.readouterr().err


def test_what_is_cleared_away_is_never_what_a_link_points_to(owned, tmp_path):
    """A damaged part is moved out of the tables, a damaged checkpoint is written again: links go, targets stay."""
    (tokenizer,) = runs(owned, "tokenizer")
    part = next(path for path in tables.parts(owned, "runs") if tokenizer in str(path))
    valuable = tmp_path / "valuable"
    valuable.write_text("not a table")
    part.unlink()
    part.symlink_to(valuable)
    assert tables.main(["verify", str(owned), "--quarantine"]) == 1
    assert worker.work(owned, tokenizer, Stop()) == "done"
    assert valuable.read_text() == "not a table"
    assert not part.is_symlink()
