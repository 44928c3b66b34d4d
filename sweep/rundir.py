"""Where does everything of a study lie, and who may write it? Paths, atomic writes, claims, status, journal.

``results/<study>/`` holds the plan, one folder per run, caches and tables. A run's folder belongs to whoever holds
its claim. A claim is a folder ``claim/<attempt>`` that appears by one rename with its holder's record inside, so
that two processes never hold the same attempt; whoever takes over a stale claim adds the next number and touches
nothing of the old one. The number is a fencing token: before it writes anything, a holder looks whether a higher
one exists. Claims only coordinate; what ``status.json`` says about a finished run is the truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BEAT_S = 15.0  # between two signs of life of a holder
STALE_S = 300.0  # without one, a holder on another machine counts as gone
START = "SWEEP_START"  # variable that names one start of a Slurm job, for all its processes
RUN_ID = re.compile(r"[a-z][0-9a-f]{12}")
FINAL = frozenset({"done", "diverged", "failed"})  # states that a launch leaves alone

# --- paths -----------------------------------------------------------------------------------------------------


def find(study: str | Path, results: str | Path = "results") -> Path:
    """The folder of a study given by path or by name; ValueError when there is no plan in it."""
    for folder in (Path(study), Path(results) / study):
        if plan_file(folder).is_file():
            return folder.resolve()
    raise ValueError(
        f"study: {str(study)!r} holds no plan.parquet; allowed: a folder that `python -m sweep.plan GRID` wrote"
    )


def plan_file(study: Path) -> Path:
    return study / "plan.parquet"


def lock_file(study: Path) -> Path:
    return study / "plan.lock.json"


def staging(study: Path) -> Path:
    """Where files are made before they are moved into place: same file system, outside every data set."""
    return study / ".staging"


def run_folder(study: Path, run_id: str) -> Path:
    if not RUN_ID.fullmatch(run_id):
        raise ValueError(f"run id: {run_id!r}; allowed: one letter and 12 hexadecimal digits")
    return study / "runs" / run_id


def config_file(study: Path, run_id: str) -> Path:
    return run_folder(study, run_id) / "config.json"


def status_file(study: Path, run_id: str) -> Path:
    return run_folder(study, run_id) / "status.json"


def journal_file(study: Path, run_id: str) -> Path:
    return run_folder(study, run_id) / "events.jsonl"


def points_folder(study: Path, run_id: str) -> Path:
    return run_folder(study, run_id) / "points"


def point_file(study: Path, run_id: str, point: int) -> Path:
    """The record of a checkpoint: it is there when the checkpoint is."""
    return points_folder(study, run_id) / f"{point:08d}" / "point.json"


def log_file(study: Path, run_id: str) -> Path:
    return run_folder(study, run_id) / "logs" / "output.log"


def launches_folder(study: Path) -> Path:
    """Private folders of launches: what submitit writes, the processes of each, its stop flag."""
    return study / ".submitit"


def code_folder(study: Path) -> Path:
    """Copies of the code that jobs run."""
    return launches_folder(study) / "code"


def codes_folder(study: Path, checkpoint: str, data_hash: str) -> Path:
    run_id, _, point = checkpoint.partition("@")
    return study / "cache" / "codes" / run_id / f"{point}-{data_hash[:12]}"


def encoded(study: Path, run_id: str) -> set[int]:
    """Points of a tokenizer whose codes are there: a cache may be deleted, and is then made again."""
    manifests = (study / "cache" / "codes" / run_id).glob("[0-9]*-*/manifest.json")
    return {int(path.parent.name.partition("-")[0]) for path in manifests}


def references_folder(study: Path) -> Path:
    return study / "cache" / "references"


def table_folder(study: Path, table: str) -> Path:
    return study / "tables" / table


def part_file(study: Path, table: str, run_id: str, attempt: int, seq: int) -> Path:
    folder = table_folder(study, table) / f"study={study.name}" / f"run={run_id}"
    return folder / f"{attempt}-{seq:04d}.parquet"


def compact_file(study: Path, table: str) -> Path:
    return study / "compact" / f"{table}.parquet"


def stamp_file(study: Path, stage: str, of: str | None = None) -> Path:
    return study / "stamps" / f"{stage}{f'-{of}' if of else ''}.json"


def check_version(study: Path, version: int) -> None:
    """ValueError, in one line, when another version of the layout wrote this folder."""
    try:
        written = json.loads(lock_file(study).read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{lock_file(study)}: version cannot be read ({error}); plan the study again") from None
    if written != version:
        raise ValueError(f"{lock_file(study)}: version: got {written}; allowed: {version}")


# --- writing ---------------------------------------------------------------------------------------------------


def atomic_write(study: Path, path: Path, content: bytes | dict[str, Any] | list[Any], sync: bool = True) -> None:
    """Put bytes, or JSON, at ``path`` so that readers see the old file or the new one, never a part of it.

    ``sync`` waits until the disk has it; what can be made again may do without.
    """
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    staging(study).mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=staging(study), prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def register(study: Path, config: dict[str, Any]) -> None:
    """Lay down what a worker needs to run ``config``; nothing is written when it is there already."""
    folder = run_folder(study, config["run_id"])
    for name, content in (("identity.json", config["identity"]), ("config.json", config)):
        if _read(folder / name) != content:
            atomic_write(study, folder / name, content, sync=False)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None when it is missing or unreadable."""
    try:
        held = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def config(study: Path, run_id: str) -> dict[str, Any]:
    held = _read(config_file(study, run_id))
    if held is None:
        raise ValueError(f"{config_file(study, run_id)}: missing or unreadable; launch or plan the study again")
    return held


def status(study: Path, run_id: str) -> dict[str, Any]:
    """What is recorded about a run; state ``planned`` when nothing that can be read is."""
    held = _read(status_file(study, run_id)) or {}
    return held if isinstance(held.get("state"), str) else {"run_id": run_id, "state": "planned"}


class Records:
    """Statuses of many runs, each read again only when its file has changed."""

    def __init__(self, study: Path) -> None:
        self.study = study
        self.held: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def status(self, run_id: str) -> dict[str, Any]:
        """As ``rundir.status``."""
        try:
            stat = status_file(self.study, run_id).stat()
        except FileNotFoundError:
            return {"run_id": run_id, "state": "planned"}
        stamp = stat.st_mtime_ns, stat.st_ino
        if run_id not in self.held or self.held[run_id][0] != stamp:
            self.held[run_id] = stamp, status(self.study, run_id)
        return self.held[run_id][1]


def mark(study: Path, run_id: str, state: str, reason: str | None = None, **fields: Any) -> None:
    """Change the state of a run that nobody holds, without an attempt of its own."""
    before = status(study, run_id)
    held = before | {"state": state, "reason": reason} | fields
    if held != before:
        atomic_write(study, status_file(study, run_id), held | {"updated": now()}, sync=False)


def finished(study: Path, status: dict[str, Any], points: list[int] | None, encode: list[int] | None) -> bool:
    """Is there nothing left to do? A run that is done may have been given more points, or lost its codes, since."""
    if status["state"] == "done":
        there = set(points or ()) <= _points(study, status)
        return there and (not encode or set(encode) <= encoded(study, status["run_id"]))
    return status["state"] in FINAL


def _points(study: Path, status: dict[str, Any]) -> set[int]:
    """Points that a run has reached, without those that were deleted since."""
    reached = set(status.get("points", ()))
    if not reached or not points_folder(study, status["run_id"]).is_dir():
        return reached
    return {point for point in reached if point_file(study, status["run_id"], point).exists()}


def mark_of(study: Path, run_id: str) -> str:
    """What an attempt may go on from, in one word: it changes with every checkpoint, point and cache of codes."""
    folders = (run_folder(study, run_id) / "ckpt", points_folder(study, run_id), study / "cache" / "codes" / run_id)
    names = [name for folder in folders if folder.is_dir() for name in os.listdir(folder) if not name.startswith(".")]
    return hashlib.sha256(repr(sorted(names)).encode()).hexdigest()[:12]


def journal(study: Path, run_id: str, event: str, **fields: Any) -> None:
    """Append one line to the run's journal."""
    path = journal_file(study, run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        torn = file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n"  # by a full disk
        file.write(b"\n" * bool(torn) + json.dumps({"time": now(), "event": event, **fields}).encode() + b"\n")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# --- claims ----------------------------------------------------------------------------------------------------


class Superseded(RuntimeError):
    """Another attempt holds the run; nothing more may be written by this one."""


@dataclass(frozen=True)
class Lease:
    """The right to write into a folder, under a number: what a claim is for one run."""

    study: Path
    claims: Path
    attempt: int

    @property
    def folder(self) -> Path:
        return self.claims / f"{self.attempt:04d}"

    def guard(self) -> None:
        """Raise ``Superseded`` when a later attempt holds the folder."""
        if (newest := _newest(self.claims)) != self.attempt:
            name = self.claims.parent.name
            raise Superseded(f"{name}: attempt {self.attempt} was superseded by attempt {newest}")

    def beat(self) -> None:
        """Give a sign of life."""
        with contextlib.suppress(FileNotFoundError):  # given back
            os.utime(self.folder / "holder.json")

    def release(self) -> None:
        """Give the folder back; the record stays, so that the next attempt gets a higher number."""
        (self.folder / "holder.json").rename(self.folder / "released.json")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Give signs of life while the block runs, and give the folder back after it."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_S):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.release()


@dataclass(frozen=True)
class Claim(Lease):
    """The right to write into one run's folder, under an attempt number."""

    run_id: str

    def update(self, sync: bool = True, **fields: Any) -> None:
        """Change fields of the run's status."""
        self.guard()
        held = status(self.study, self.run_id) | {"attempt": self.attempt, "updated": now()} | fields
        atomic_write(self.study, status_file(self.study, self.run_id), held, sync)

    def cancelled(self) -> bool:
        """Did somebody ask this attempt to stop?"""
        return (self.folder / "cancel").exists()


@dataclass(frozen=True)
class Holder:
    """Who holds a run; ``job`` is the Slurm job of its process, if it belongs to one, and ``node`` where that runs."""

    attempt: int
    host: str
    pid: int
    job: str | None
    node: str | None
    alive: bool


def claim(study: Path, run_id: str, gone: int | None = None) -> Claim | None:
    """Take a run that nobody alive holds; None when somebody does, or was faster.

    ``gone`` is an attempt that the caller knows to be over, whatever its last sign of life.
    """
    attempt = _take(study, _claims(study, run_id), gone)
    return None if attempt is None else Claim(study, _claims(study, run_id), attempt, run_id)


def lease(study: Path, folder: Path) -> Lease | None:
    """Take a folder of the study that one process may work in at a time; None when another one does."""
    attempt = _take(study, folder / "claim")
    return None if attempt is None else Lease(study, folder / "claim", attempt)


def _take(study: Path, claims: Path, gone: int | None = None) -> int | None:
    """The number under which the folder is ours now; None when somebody alive has it, or was faster."""
    newest = _newest(claims)
    held = _holder(study, claims, newest)
    if held is not None and held.alive and newest != gone:
        return None
    claims.mkdir(parents=True, exist_ok=True)
    staging(study).mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=staging(study), prefix=f"{claims.parent.name}-claim"))
    number = (newest or _written(study, claims.parent.name)) + 1
    target = claims / f"{number:04d}"
    try:
        (staged / "holder.json").write_text(json.dumps({**myself(), "claimed": now()}))
        # The target of a rename has to be missing or empty; a claim never is. So one of two racers fails here.
        os.rename(staged, target)
    except OSError:
        shutil.rmtree(staged, ignore_errors=True)
        if not target.exists():
            raise
        return None
    return number


def holder(study: Path, run_id: str) -> Holder | None:
    """The holder of the newest claim; None when there is none or it was given back."""
    claims = _claims(study, run_id)
    return _holder(study, claims, _newest(claims))


def _holder(study: Path, claims: Path, attempt: int) -> Holder | None:
    path = claims / f"{attempt:04d}" / "holder.json"
    if not path.exists():
        return None
    held = {"born": None} | (_read(path) or {})
    if not isinstance(held.get("host"), str) or not (isinstance(held.get("pid"), int) and 0 < held["pid"] < 2**31):
        held |= {"host": "a host that cannot be told", "pid": 0}  # cut off, or of another version: its age tells
    return Holder(attempt, held["host"], held["pid"], held.get("job"), held.get("node"), _alive(study, held, path))


def cancel(study: Path, run_id: str) -> bool:
    """Ask whoever holds the run to save and stop; False when nobody alive does."""
    held = holder(study, run_id)
    if held is None or not held.alive:
        return False
    (_claims(study, run_id) / f"{held.attempt:04d}" / "cancel").touch()
    return True


def myself() -> dict[str, Any]:
    """What tells this process from any other; ``restart`` counts how often Slurm has started its job again."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    if job is None:
        return here
    if array is not None:  # the name that stays the same when Slurm starts it again
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    restart, node = int(os.environ.get("SLURM_RESTART_COUNT", "0")), os.environ.get("SLURMD_NODENAME")
    return here | {"job": job, "restart": restart, "start": os.environ.get(START), "node": node}


def alive(host: str, pid: int, born: int | None) -> bool | None:
    """Does that process run? None when it is another machine's."""
    if host != socket.gethostname():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return born is None or _born(pid) == born


def _alive(study: Path, held: dict[str, Any], path: Path) -> bool:
    mine = myself()
    if "job" in mine and held.get("job") == mine["job"]:
        # Slurm has taken the job away from it and given it to us, even where its process lives on. A controller that
        # lost its memory starts a job anew without counting.
        other = mine["start"] is not None and held.get("start") != mine["start"]
        before = held.get("restart", 0)
        if before < mine["restart"] or (other and before == mine["restart"]):
            return False
    here = alive(held["host"], held["pid"], held["born"])
    if here is not None:
        return here
    try:
        return _clock(study) - path.stat().st_mtime < STALE_S
    except FileNotFoundError:  # given back in the meantime
        return False


def _clock(study: Path) -> float:
    """The time by the clock of the file system, which may not be this host's; by this host's where it is read only."""
    try:
        staging(study).mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=staging(study)) as made:
            return os.fstat(made.fileno()).st_mtime
    except OSError:
        return time.time()


def _born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (Linux): tells it from a later one with its number.

    None where that cannot be known; a dead process that nobody has waited for counts as gone (-1).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def _claims(study: Path, run_id: str) -> Path:
    return run_folder(study, run_id) / "claim"


def _written(study: Path, run_id: str) -> int:
    """The highest attempt that has rows: they stay where the run's folder was deleted, and are to be superseded."""
    parts = (study / "tables").glob(f"*/study=*/run={run_id}/*.parquet")
    return max((int(number) for path in parts if (number := path.name.partition("-")[0]).isdecimal()), default=0)


def _newest(claims: Path) -> int:
    try:
        return max((int(name) for name in os.listdir(claims) if name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0
