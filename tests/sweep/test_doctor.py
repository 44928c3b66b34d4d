"""Is what a cluster can and cannot do said in sentences that are true of it?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sweep import doctor, slurm
from tests.cluster import Cluster

CONFIG = """Configuration data as of 2026-11-23T10:00:00
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = hill
JobRequeue              = 1
MaxArraySize            = 1001
MinJobAge               = 300 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PreemptParameters       = preempt_send_user_signal
SLURM_VERSION           = 24.05.1
"""


@pytest.fixture
def shims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Commands on PATH that say what a test wants; ``{name: shell text}``, written by ``install``."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # and no Slurm that may be installed
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return {
        **dict.fromkeys(("sbatch", "squeue", "srun", "scancel"), "exit 0"),
        "scontrol": f"/bin/cat <<'END'\n{CONFIG}END",
        "sacct": "exit 0",
        "sinfo": 'case "$*" in *%P*) echo "gpu*|up|2-00:00:00|4|gpu:a100:8";; *) echo localhost;; esac',
    }


def install(folder: Path, shims: dict[str, str]) -> None:
    (folder / "bin").mkdir()
    for name, text in shims.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)


def found(folder: Path) -> dict[str, list[doctor.Finding]]:
    by_subject: dict[str, list[doctor.Finding]] = {}
    for each in doctor.examine(folder / "results"):
        by_subject.setdefault(each.about, []).append(each)
    return by_subject


def test_a_cluster_with_everything_has_nothing_in_the_way(tmp_path, shims):
    install(tmp_path, shims)
    held = found(tmp_path)
    assert held["Slurm"][0].sentence == "Slurm 24.05.1, cluster hill."
    assert held["accounting"][0].level == "good"
    assert held["MinJobAge"][0].setting == "slurm-init-seconds-before-status-checks: 40"
    assert held["MaxArraySize"][0].sentence == "Indices of an array go up to 1000."
    assert "announces itself" in held["preemption"][0].sentence
    assert held["partition"][0].sentence == "gpu, the default: up, time limit 2-00:00:00, 4 nodes, gpu:a100:8."
    assert not [each for group in held.values() for each in group if each.level == "problem"]


@pytest.mark.parametrize(
    ("command", "text", "about", "level", "says"),
    [
        ("sacct", "echo disabled >&2; exit 1", "accounting", "note", "sacct does not answer (sacct: disabled)"),
        ("sacct", None, "accounting", "note", "sacct: not found"),
        ("scontrol", "echo no contact >&2; exit 1", "Slurm", "problem", "does not answer (scontrol: no contact)"),
        ("scontrol", CONFIG.replace("= 1\n", "= 0\n"), "JobRequeue", "note", "not requeued unless they ask"),
        ("scontrol", CONFIG.replace("1001", "0"), "MaxArraySize", "problem", "switched off"),
        ("scontrol", CONFIG.replace("preempt_send_user_signal", "(null)"), "preemption", "note", "sends SIGTERM"),
        ("scontrol", CONFIG.replace("300", "10"), "MinJobAge", "note", "after 10 s"),
        ("scontrol", CONFIG.replace("slurmdbd", "none"), "accounting", "note", "Accounting is off"),
        ("sinfo", "echo 'cpu|up|1:00|4|(null)'", "GPUs", "note", "No partition has GPUs"),
        ("sinfo", "echo 'cpu|up|1:00|4|(null)'", "partition", "good", "no GPU"),
        ("sinfo", "exit 1", "partitions", "problem", "cannot be listed"),
        ("srun", None, "Slurm", "problem", "Commands are missing: srun."),
    ],
)
def test_what_is_wrong_is_said(tmp_path, shims, command, text, about, level, says):
    if text is None:
        del shims[command]
    else:
        shims[command] = f"/bin/cat <<'END'\n{text}END" if text.startswith("Conf") else text
    install(tmp_path, shims)
    (first, *_) = found(tmp_path)[about]
    assert first.level == level
    assert says in first.sentence


def test_a_launch_inside_a_job_that_holds_gpus_is_noticed(tmp_path, shims, monkeypatch):
    install(tmp_path, shims)
    assert "launcher" not in found(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert "holds GPUs" not in found(tmp_path)["launcher"][0].sentence
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    assert "inside job 77, which holds GPUs that it does not use" in found(tmp_path)["launcher"][0].sentence


def test_without_slurm_there_is_this_machine(tmp_path, shims, capsys):
    install(tmp_path, {})
    assert doctor.main(["--results", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    assert "There is no Slurm here; stages run on this machine" in said
    assert "a claim is made by one process only" in said
    assert not list((tmp_path / "results").iterdir())


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, shims, capsys):
    install(tmp_path, {})
    (tmp_path / "file").write_text("")
    assert doctor.main(["--results", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"--results: got {tmp_path / 'file'}; File exists\n"


def test_commands_are_asked_without_what_a_job_has_set(monkeypatch):
    inherited = {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "PMIX_RANK": "0", "SRUN_CPUS_PER_TASK": "9"}
    kept = {"SLURM_CONF": "/etc/slurm/slurm.conf", "PATH": "/usr/bin", "HOME": "/root"}
    assert slurm.scrubbed(inherited | kept) == kept


def test_an_answer_that_does_not_come_is_a_failure_and_not_nothing(tmp_path, shims, monkeypatch):
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.2)
    install(tmp_path, shims | {"squeue": "exec /bin/sleep 60"})
    answer = slurm.ask("squeue")
    assert answer == slurm.Answer("", "squeue: no answer within 0.2 s")
    assert slurm.ask("nothing-of-the-kind").failed == "nothing-of-the-kind: not found"
    assert slurm.ask("sacct") == slurm.Answer("", None)


def test_a_real_cluster_is_described(slurm: Cluster, tmp_path, monkeypatch, capsys):
    for name, value in slurm.environment().items():
        monkeypatch.setenv(name, value)
    assert doctor.main(["--results", str(tmp_path / "results"), "--json"]) == 0
    held: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    said = {each["about"]: each["sentence"] for each in held}
    assert said["Slurm"].endswith("cluster test.")
    assert said["accounting"].startswith("Accounting is off")
    assert said["partition"] == "main, the default: up, time limit 1:00:00, 2 nodes, gpu:2."
    assert "SLURM_CONF" in said
    assert "n1, n2" in said["addresses"]
    assert doctor.main(["--results", str(tmp_path / "results")]) == 0
    assert "\nfor your profile:\n  slurm-status-command: squeue\n" in capsys.readouterr().out
