"""What does Slurm say? Its commands, each asked once, and an answer that tells "it failed" from "there is nothing"."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

TIMEOUT_S = 30.0  # of a command; an overloaded controller answers late or never
INHERITED = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMIX_", "PMI_")  # what a job would take over from its submitter
KEPT = frozenset({"SLURM_CONF"})  # where the cluster is


class Answer(NamedTuple):
    """Output of a command, or why there is none."""

    text: str
    failed: str | None

    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def ask(*command: str, timeout_s: float = TIMEOUT_S) -> Answer:
    """Run a command of Slurm's; never raises: a failure is an answer too."""
    if shutil.which(command[0]) is None:
        return Answer("", f"{command[0]}: not found")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=scrubbed(os.environ))
    except subprocess.TimeoutExpired:
        return Answer("", f"{command[0]}: no answer within {timeout_s:g} s")
    except OSError as error:
        return Answer("", f"{command[0]}: {error.strerror}")
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        return Answer(done.stdout, f"{command[0]}: {said.removeprefix(f'{command[0]}: ')}")
    return Answer(done.stdout, None)


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a surrounding job has set: it would bend the jobs that are submitted from it."""
    return {name: value for name, value in environment.items() if name in KEPT or not name.startswith(INHERITED)}


def configuration() -> tuple[dict[str, str], str | None]:
    """``scontrol show config`` as a mapping, and why it could not be had."""
    answer = ask("scontrol", "show", "config")
    pairs = (line.partition("=") for line in answer.lines())
    return {key.strip(): value.strip() for key, mark, value in pairs if mark}, answer.failed
