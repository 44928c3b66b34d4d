"""What would Slurm answer? Commands that a test scripts, for answers that no real cluster gives when asked to.

Jobs do not run here: a test says what becomes of them (``FakeSlurm.put``), or lets a ``Worker`` see to it. The commands
only pass on what they are asked, so that they are fast, and what they know lies in this process.
"""

from __future__ import annotations

import contextlib
import marshal
import re
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun", "sacct")
ACTIVE = frozenset({"PENDING", "RUNNING"})
PASS_ON = """
import _socket, marshal, os, sys
link = _socket.socket(_socket.AF_UNIX)
link.connect({address!r})
link.sendall(marshal.dumps((sys.argv[1:], dict(os.environ))))
link.shutdown(_socket.SHUT_WR)
code, out, err = marshal.loads(b"".join(iter(lambda: link.recv(65536), b"")))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class Failed(Exception):
    """What a command says when it does not do what it should."""


@dataclass
class Partition:
    name: str
    limit: str = "infinite"
    gres: str = "(null)"
    memory_mb: int = 512_000  # of a node


@dataclass
class Place:
    """Where a task is: its state, why it waits, and whether squeue still shows it."""

    state: str
    why: str
    shown: bool = True


@dataclass
class Submitted:
    """A job or an array, as sbatch got it and as it stands."""

    id: str
    script: str
    options: dict[str, str]  # the script's; of one that is given twice the last, as for sbatch
    environment: dict[str, str]
    at_once: int  # of its tasks
    behind: list[str]  # jobs that have to end before
    places: list[Place]

    @property
    def name(self) -> str:
        return self.options["job-name"]

    @property
    def tasks(self) -> int:
        return len(self.places)

    @property
    def elements(self) -> list[str]:
        """What Slurm calls its tasks."""
        return [f"{self.id}_{task}" for task in range(self.tasks)] if "array" in self.options else [self.id]

    @property
    def command(self) -> list[str]:
        return shlex.split(next(line for line in self.script.splitlines() if line.startswith("srun ")))

    @property
    def folder(self) -> Path:
        """Where submitit keeps what belongs to it."""
        return Path(self.command[-1])


@dataclass
class Answer:
    """What a command is to say next; a ``deed`` is done before, where it is to be done at all."""

    says: str
    code: int
    times: int | None
    obeys: bool
    mute: bool
    hangs_s: float


@dataclass
class FakeSlurm:
    """Commands in ``bin``, a folder for PATH, and what they know."""

    bin: Path
    max_array: int = 1001
    submit_limit: int = 100_000  # jobs at a time
    partitions: list[Partition] = field(default_factory=lambda: [Partition("main")])  # the first is the default
    accounting: bool = True
    jobs: list[Submitted] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)  # every command line so far
    scripted: dict[str, list[Answer]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    # --- start and stop ---

    def __enter__(self) -> FakeSlurm:
        self.bin.mkdir(parents=True)
        self.folder = tempfile.mkdtemp(prefix="slurm-")  # an address has to be short
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.folder}/socket")
        self.listener.listen()
        (self.bin / "pass_on.py").write_text(PASS_ON.format(address=f"{self.folder}/socket"))
        for name in COMMANDS:
            call = shlex.join([sys.executable, "-IS", str(self.bin / "pass_on.py"), name])
            (self.bin / name).write_text(f'#!/bin/sh\nexec {call} "$@"\n')
            (self.bin / name).chmod(0o755)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        shutil.rmtree(self.folder)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                link, _ = self.listener.accept()
                threading.Thread(target=self._pass_on, args=(link,), daemon=True).start()

    def _pass_on(self, link: socket.socket) -> None:
        with link, contextlib.suppress(ConnectionError):  # who asked may be gone
            words, environment = marshal.loads(b"".join(iter(lambda: link.recv(65536), b"")))
            link.sendall(marshal.dumps(self._told(words, environment)))

    # --- for tests: faults ---

    def answer(
        self,
        command: str,
        says: str = "",
        *,
        code: int = 1,
        times: int | None = 1,
        obeys: bool = False,
        mute: bool = False,
        hangs_s: float = 0.0,
    ) -> None:
        """Script an answer to come: ``says`` on stderr and an exit code, after a while; ``times`` None is for good.

        A command that ``obeys`` does what it should, and only then says so; one that is ``mute`` says nothing of it.
        """
        with self.lock:
            self.scripted.setdefault(command, []).append(Answer(says, code, times, obeys, mute, hangs_s))

    def heal(self, command: str) -> None:
        """Let a command work again."""
        with self.lock:
            self.scripted.pop(command)

    def remove(self, command: str) -> None:
        (self.bin / command).unlink()

    # --- for tests: jobs ---

    def put(self, state: str, elements: Iterable[str] | None = None, why: str = "None") -> None:
        """Let jobs, or elements of arrays, be in a state; all that are not over where none is named."""
        with self.lock:
            for place in self._places(elements):
                if elements is not None or place.state in ACTIVE:
                    place.state, place.why, place.shown = state, why, True

    def forget(self) -> None:
        """Let squeue know none of the jobs so far; sacct still has their last state."""
        with self.lock:
            for place in self._places():
                place.shown = False

    def states(self) -> dict[str, str]:
        """Of all elements, also those that squeue does not show."""
        with self.lock:
            return {
                element: place.state
                for job in self.jobs
                for element, place in zip(job.elements, job.places, strict=True)
            }

    def calls(self, command: str) -> list[list[str]]:
        """Arguments of each call of a command so far."""
        with self.lock:
            return [words for name, *words in self.asked if name == command]

    def startable(self) -> list[tuple[Submitted, int]]:
        """Waiting tasks that no job before them keeps from starting."""
        with self.lock:
            over = {job.id for job in self.jobs if all(place.state not in ACTIVE for place in job.places)}
            free = [job for job in self.jobs if over.issuperset(job.behind)]
            return [(job, task) for job in free for task, place in enumerate(job.places) if place.state == "PENDING"]

    # --- what commands do ---

    def _places(self, elements: Iterable[str] | None = None) -> Iterator[Place]:
        """By the name of a job (all of it) or of an element; of all jobs where none is named."""
        wanted = None if elements is None else set(elements)
        for job in self.jobs:
            for element, place in zip(job.elements, job.places, strict=True):
                if wanted is None or job.id in wanted or element in wanted:
                    yield place

    def _told(self, words: list[str], environment: dict[str, str]) -> tuple[int, str, str]:
        """Exit code, output and complaint of a command."""
        name = words[0]
        with self.lock:
            self.asked.append(words)
            scripted = self.scripted.get(name, [])
            answer = scripted[0] if scripted else None
            if answer is not None and answer.times is not None:
                answer.times -= 1
                if not answer.times:
                    del scripted[0]
            code, out, err = 0, "", ""
            if answer is None or answer.obeys:
                try:
                    out = getattr(self, f"_{name}")(words[1:], environment)
                except Failed as failed:
                    code, err = 1, f"{name}: error: {failed}\n"
        if answer is None:
            return code, out, err
        time.sleep(answer.hangs_s)
        return answer.code, "" if answer.code or answer.mute else out, f"{answer.says}\n" if answer.says else ""

    def _sbatch(self, words: list[str], environment: dict[str, str]) -> str:
        script = Path(words[-1]).read_text()
        given = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
        options = {key.removeprefix("--"): value for key, _, value in (text.partition("=") for text in given)}
        refused = "Batch job submission failed: "
        known = {partition.name: partition for partition in self.partitions}
        where = known.get(options.get("partition", self.partitions[0].name))
        if where is None:
            raise Failed(f"{refused}Invalid partition name specified")
        if where.limit != "infinite" and int(options["time"]) > _minutes(where.limit):
            raise Failed(f"{refused}Requested time limit is invalid (missing or exceeds some limit)")
        if "gres" in options and options["gres"].rpartition(":")[0] not in where.gres:
            raise Failed(f"{refused}Invalid generic resource (gres) specification")
        match = re.fullmatch(r"0-(\d+)%([1-9]\d*)", options.get("array", "0-0%1"))
        if match is None or ("array" in options and int(match[1]) >= self.max_array):
            raise Failed(f"{refused}Invalid job array specification")
        tasks, at_once = int(match[1]) + 1, int(match[2])
        if sum(place.state in ACTIVE for place in self._places()) + tasks > self.submit_limit:
            text = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
            raise Failed(f"AssocMaxSubmitJobLimit\nsbatch: error: {refused}{text}")
        behind = re.findall(r"afterany:(\d+)", options.get("dependency", ""))
        if not {job.id for job in self.jobs}.issuperset(behind):
            raise Failed(f"{refused}Job dependency problem")
        places = [Place("PENDING", "Dependency" if behind else "Resources") for _ in range(tasks)]
        job = Submitted(str(101 + len(self.jobs)), script, options, environment, at_once, behind, places)
        self.jobs.append(job)
        return f"Submitted batch job {job.id}\n"

    def _squeue(self, words: list[str], environment: dict[str, str]) -> str:
        rows = []
        for job in self.jobs:
            for task, place in enumerate(job.places):
                if place.shown and ("all" in words or place.state in ACTIVE):
                    index = str(task) if "array" in job.options else "N/A"
                    rows.append({"F": job.id, "K": index, "T": place.state, "j": job.name, "r": place.why})
        return _formatted(rows, words)

    def _scontrol(self, words: list[str], environment: dict[str, str]) -> str:
        if words == ["show", "config"]:
            return f"Configuration data\nMaxArraySize            = {self.max_array}\n"
        if words[0] == "release":
            for place in self._places(words[1:]):
                place.state, place.why = "PENDING", "Priority"
        return ""

    def _scancel(self, words: list[str], environment: dict[str, str]) -> str:
        for place in self._places(words):
            if place.state in ACTIVE:
                place.state, place.why = "CANCELLED", "None"
        known = {job.id for job in self.jobs}
        if unknown := [element for element in words if element.partition("_")[0] not in known]:
            raise Failed(f"Invalid job id {unknown[0]}")
        return ""

    def _sinfo(self, words: list[str], environment: dict[str, str]) -> str:
        wanted = words[words.index("-p") + 1] if "-p" in words else None
        rows = [
            {
                "P": f"{held.name}{'' if number else '*'}",
                "l": held.limit,
                "m": str(held.memory_mb),
                "G": held.gres,
            }
            for number, held in enumerate(self.partitions)
            if wanted in (None, held.name)
        ]
        return _formatted(rows, words)

    def _sacct(self, words: list[str], environment: dict[str, str]) -> str:
        if not self.accounting:
            raise Failed("Slurm accounting storage is disabled")
        jobs = words[words.index("-j") + 1].split(",")
        found = [(element, state) for element, state in self.states().items() if element.partition("_")[0] in jobs]
        return "".join(f"{element}|{state}{' by 0' if state == 'CANCELLED' else ''}\n" for element, state in found)


def _minutes(limit: str) -> int:
    days, _, clock = limit.rpartition("-")
    hours, minutes, _ = clock.split(":")
    return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)


def _formatted(rows: Iterable[Mapping[str, str]], words: list[str]) -> str:
    """Lines as ``-o`` wants them."""
    form = words[words.index("-o") + 1]
    return "".join(re.sub(r"%(\w)", lambda match: row[match[1]], form) + "\n" for row in rows)  # noqa: B023


class Worker(threading.Thread):
    """Starts what may start, has it done by ``work``, and lets it end as that says, while a block runs."""

    def __init__(self, slurm: FakeSlurm, work: Callable[[Submitted, int], str]) -> None:
        super().__init__(daemon=True)
        self.slurm, self.work, self.over = slurm, work, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.05):
            for job, task in self.slurm.startable():
                self.slurm.put("RUNNING", [job.elements[task]])
                self.slurm.put(self.work(job, task), [job.elements[task]])

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()
