"""What does Slurm say? Its commands, each asked once, and an answer that tells "it failed" from "there is nothing"."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

TIMEOUT_S = 30.0  # of a command; an overloaded controller answers late or never
# What a job would take over from its submitter: another job's settings, and caches that are another node's.
INHERITED = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMIX_", "PMI_", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
RANKS = frozenset({"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
KEPT = frozenset({"SLURM_CONF"})  # where the cluster is

# A job in one of these is over; in any other, and in those that are not known here, it may still do something.
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED"}
    | {"TIMEOUT"}
)
NEVER = frozenset(  # why a job waits that asks for what it will not get; sbatch takes such jobs on most clusters
    {"PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS"}
    | {"DependencyNeverSatisfied"}
)
HELD = "launch failed requeued held"  # a node could not start the job: nothing happens until somebody releases it


class Answer(NamedTuple):
    """Output of a command, or why there is none."""

    text: str
    failed: str | None

    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def ask(*command: str) -> Answer:
    """Run a command of Slurm's; never raises: a failure is an answer too."""
    if shutil.which(command[0]) is None:
        return Answer("", f"{command[0]}: not found")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=scrubbed(os.environ))
    except subprocess.TimeoutExpired:
        return Answer("", f"{command[0]}: no answer within {TIMEOUT_S:g} s")
    except OSError as error:
        return Answer("", f"{command[0]}: {error.strerror}")
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        return Answer(done.stdout, f"{command[0]}: {said.removeprefix(f'{command[0]}: ')}")
    return Answer(done.stdout, None)


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a surrounding job has set: it would bend the jobs that are submitted from it."""
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name in RANKS or name.startswith(INHERITED))
    }


@contextlib.contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """This process as a submitter: its environment scrubbed, with ``more`` in it, while the block runs."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(scrubbed(before) | dict(more))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def configuration() -> tuple[dict[str, str], str | None]:
    """``scontrol show config`` as a mapping, and why it could not be had."""
    answer = ask("scontrol", "show", "config")
    pairs = (line.partition("=") for line in answer.lines())
    return {key.strip(): value.strip() for key, mark, value in pairs if mark}, answer.failed


# --- jobs --------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A job, or one element of an array (``place`` is its index, 0 of a plain job), as squeue shows it."""

    job: str  # the array's id
    place: int
    state: str
    name: str
    why: str  # it waits


def queue() -> tuple[list[Task], str | None]:
    """This user's jobs, those that ended a while ago included; and why they could not be had."""
    answer = ask("squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%F|%K|%T|%j|%r")
    rows = [fields for line in answer.lines() if len(fields := line.split("|", 4)) == 5]  # a site may add a greeting
    return [Task(job, int(index) if index.isdecimal() else 0, *more) for job, index, *more in rows], answer.failed


def accounted(jobs: Collection[str]) -> dict[tuple[str, int | None], str]:
    """How jobs and elements of arrays ended, as far as sacct knows; nothing where it does not answer."""
    if not jobs:
        return {}
    answer = ask("sacct", "-n", "-X", "-P", "-o", "JobID,State", "-j", ",".join(sorted(jobs)))
    found: dict[tuple[str, int | None], str] = {}
    for line in answer.lines():
        name, _, state = line.partition("|")
        if (match := re.fullmatch(r"(\d+)(?:_(\d+))?", name)) and state.strip():
            found[match[1], int(match[2]) if match[2] else None] = state.split()[0]  # "CANCELLED by 0"
    return found


def told(job: str) -> dict[str, str]:
    """``scontrol show job`` as a mapping; empty where it does not answer."""
    lines = ask("scontrol", "-o", "show", "job", job).lines()
    return dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}


def requeue(job: str, without: Iterable[str] = ()) -> str | None:
    """Put a job back into the queue, away from some nodes; why not, where it is refused."""
    if (answer := ask("scontrol", "requeue", job)).failed:
        return answer.failed
    if nodes := ",".join(without):
        ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")
    return None


def release(job: str) -> None:
    ask("scontrol", "release", job)


def cancel(jobs: Iterable[str]) -> str | None:
    """End jobs, or elements of arrays, at once; what Slurm says against it, first."""
    listed = sorted(jobs)
    parts = [listed[start : start + 500] for start in range(0, len(listed), 500)]  # a command line has a length
    answers = [ask("scancel", *part) for part in parts]  # all: one that is over by now is an error too
    return next((answer.failed for answer in answers if answer.failed), None)


def address() -> str | None:
    """Where the first node of the surrounding job can be reached: names of nodes need not resolve."""
    node = os.environ.get("SLURMD_NODENAME", "")
    answer = ask("scontrol", "show", "node", "-o", node)
    found = re.search(r"NodeAddr=(\S+)", answer.text)
    return found[1] if found else None


class Partition(NamedTuple):
    """What its nodes have, the least of them: None where nothing is known, or there is no limit."""

    limit_min: int | None = None
    mem_gib: float | None = None
    gpus: int = 0  # of the nodes that have any


def partition(name: str | None) -> tuple[Partition, str | None]:
    """A partition as sinfo shows it, the default one where none is named; and why that could not be had."""
    answer = ask("sinfo", "-h", "-e", "-o", "%P|%l|%m|%G", *(("-p", name) if name else ()))
    rows = [fields for line in answer.lines() if len(fields := line.split("|", 3)) == 4]
    ours = [(limit, mem, gres) for found, limit, mem, gres in rows if name or found.endswith("*")]
    limits = [limit for text, _, _ in ours if (limit := minutes(text)) is not None]
    counts = [count for *_, gres in ours if (count := _gpus(gres))]
    memory = [int(mem) / 1024 for _, mem, gres in ours if mem.isdecimal() and (_gpus(gres) or not counts)]
    found = Partition(max(limits, default=None), min(memory, default=None), min(counts, default=0))
    return found, answer.failed


def _gpus(gres: str) -> int:
    """GPUs in a text such as "gpu:a100:8(S:0-1),shard:16"."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))


def minutes(limit: str) -> int | None:
    """Slurm's ``[days-]hours:minutes:seconds`` in minutes; None for "infinite"."""
    if not (match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit.strip())):
        return None
    days, hours, whole, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + whole + (seconds > 0)


# --- refusals ----------------------------------------------------------------------------------------------------

# it may have been taken all the same; the last one is submitit's, of an answer without a number
UNSURE = ("timed out", "zero bytes were transmitted", "could not make sense of sbatch output")
CROWDED = ("submitjob", "maximum number of jobs")  # so many at a time are not allowed: AssocMaxSubmitJobLimit, ...
PASSING = (  # texts of sbatch after which the same request may be granted later
    *UNSURE,
    "unable to contact slurm controller",
    "temporarily unable to accept job",
    "resource temporarily unavailable",
    "connection refused",
    "connection reset",
    "protocol authentication error",
    "communication connection failure",
    "slurm backup controller in standby mode",
    "munge",
)
LIMIT = re.compile(r"\b(?:qos|assoc)[a-z]+\b")  # by which policy refuses; its own sentence names all there are


class Silent(RuntimeError):
    """Slurm does not answer, or takes nothing, for longer than anybody should wait."""


class Refused(RuntimeError):
    """sbatch did not take a job. The message is what it said."""

    @property
    def passing(self) -> bool:
        """May the same request be granted later?"""
        return self.crowded or any(words in str(self).lower() for words in PASSING)

    @property
    def crowded(self) -> bool:
        """Are there too many jobs, or would there be?"""
        text = str(self).lower()
        return any(words in text for words in CROWDED) or ("submit limit" in text and LIMIT.search(text) is None)

    @property
    def unsure(self) -> bool:
        """May the job have been taken all the same?"""
        return any(words in str(self).lower() for words in UNSURE)
