"""What is asked of Slurm for a pack of runs? Devices, cores, memory and time from the plan, the rest from its user.

``--slurm KEY=VALUE`` says what a plan cannot know: where to run, on whose account, how many at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.config import Runtime
from sweep.batches import Pack
from sweep.slurm import Partition
from sweep.watch import Row

# One line, and nothing that could end a quoted word: these go into a script.
WORD = re.compile(r"[\w.,:;=+/@%()\[\]*|&!<> -]{1,200}", re.ASCII)
# Options of sbatch that are a launch's own: with other values it would not find its jobs, or they not their work.
OURS = frozenset(
    {"array", "dependency", "error", "export", "job-name", "no-requeue", "output", "parsable", "requeue", "signal"}
    | {"test-only", "wait", "wrap"}
)
TIMES_MIN = (15, 30, 60, 120, 240, 480, 720, 1440, 2880, 4320, 10080)
SPARE_MIN = 10.0  # for imports, data and the last checkpoint
HOST_GIB = 8.0  # of host memory for a process that works on a GPU, where the GPU's share of its node is not less
ALL = 0.95  # of a node's memory that may be asked for: some is the system's
SPARE = 1.5  # on top of the estimate of a process that works on the CPU


@dataclass(frozen=True)
class Site:
    """What a user says of a cluster; ``sbatch`` are options of sbatch that are handed on as they are."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gpu: str = "auto"  # "no", "yes", or a type as in gres; auto: where the partition has any and the run may use it
    gpus_per_node: int = 8
    cpus: int | None = None  # per process instead of run.threads
    mem_gib: int | None = None  # per node
    time_min: int | None = None
    parallel: int = 256  # jobs at a time, in all
    signal_s: int = 120  # between the warning and the end
    requeue: str = "yes"  # "no": a site that forbids it gets arrays whose tasks go on with each other's runs
    sbatch: Mapping[str, str] = field(default_factory=dict)


NUMBERS = frozenset({"gpus_per_node", "cpus", "mem_gib", "time_min", "parallel", "signal_s"})
CHOICES = {"requeue": ("yes", "no")}
KEYS = tuple(name for name in Site.__dataclass_fields__ if name != "sbatch")


def site(settings: Iterable[str]) -> Site:
    """Settings ``KEY=VALUE``, the later one wins; ValueError in one line."""
    values: dict[str, Any] = {}
    options: dict[str, str] = {}
    for setting in settings:
        key, mark, value = setting.partition("=")
        option = key.removeprefix("sbatch.")
        if not mark or (key == option and key not in KEYS) or not re.fullmatch(r"[a-z][a-z0-9_-]*", option):
            raise ValueError(f"--slurm: got {setting!r}; allowed: KEY=VALUE of {', '.join(KEYS)}, sbatch.OPTION")
        if key != option and option.replace("_", "-") in OURS:
            raise ValueError(f"--slurm: got {setting!r}; allowed: options of sbatch that a launch does not set itself")
        if not WORD.fullmatch(value):
            raise ValueError(f"--slurm {key}: got {value!r}; allowed: one line without quotes, $ and backslashes")
        if key != option:
            options[option] = value
        elif key in NUMBERS:
            if not (value.isdecimal() and int(value) > 0):
                raise ValueError(f"--slurm {key}: got {value!r}; allowed: a whole number from 1 on")
            values[key] = int(value)
        elif key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"--slurm {key}: got {value!r}; allowed: {', '.join(CHOICES[key])}")
        else:
            values[key] = value
    return Site(**values, sbatch=options)


class Request(NamedTuple):
    """What one job asks for; jobs that ask for the same are a bucket, and go into arrays together."""

    nodes: int
    tasks_per_node: int  # one per device of a run; one alone where runs have one device
    cpus_per_task: int
    gres: str | None
    mem_gib: int  # per node
    pack: int  # runs at a time
    exclude: str | None
    time_min: int


def predicted_min(rows: Iterable[Row], runtime: Runtime) -> float:
    """Minutes that runs take one after the other, by the high estimate of the plan."""
    return sum((row["gpu_h_high"] or 0.0) * 60 / runtime.devices for row in rows)


def of(row: Row, config: Row, status: Row, where: Site, there: Partition) -> Request:
    """What a run asks for, ``there`` being what the nodes have; its time is that of the run alone, see ``packed``."""
    runtime = Runtime(**config["runtime"])
    on_gpu = runtime.device != "cpu" and (where.gpu not in ("auto", "no") or (where.gpu == "auto" and there.gpus > 0))
    per_node = min(runtime.devices, where.gpus_per_node, (there.gpus or runtime.devices) if on_gpu else runtime.devices)
    nodes = math.ceil(runtime.devices / per_node)
    pack = (runtime.pack or 1) if runtime.devices == 1 else 1
    kind = "gpu" if where.gpu in ("auto", "yes") else f"gpu:{where.gpu}"
    nodes_bad = {*([where.exclude] if where.exclude else ()), *status.get("exclude", ())}  # it may be n[1,3]: whole
    return Request(
        nodes=nodes,
        tasks_per_node=math.ceil(runtime.devices / nodes),
        cpus_per_task=where.cpus or runtime.threads * pack,
        gres=f"{kind}:{per_node}" if on_gpu else None,
        mem_gib=_memory(row, status, where, there, per_node, pack, on_gpu),
        pack=pack,
        exclude=",".join(sorted(nodes_bad)) or None,
        time_min=_rung(predicted_min([row], runtime), where, there),
    )


def _memory(row: Row, status: Row, where: Site, there: Partition, per_node: int, pack: int, on_gpu: bool) -> int:
    """GiB per node, in few steps so that few kinds of job differ by it; twice as much after it did not suffice."""
    wanted = HOST_GIB if on_gpu else SPARE * (row["mem_gib"] or 1.0)
    gib = float(where.mem_gib or 2 ** math.ceil(math.log2(1 + wanted * per_node * pack)))
    if on_gpu and there.mem_gib is not None and there.gpus and not where.mem_gib:
        gib = min(gib, ALL * there.mem_gib * per_node / there.gpus)
    gib *= 2 ** (status.get("retries") or {}).get("oom_host", 0)
    return max(1, int(min(gib, ALL * there.mem_gib) if there.mem_gib is not None and not where.mem_gib else gib))


def _rung(predicted: float, where: Site, there: Partition) -> int:
    """A time limit with room for twice what is predicted; a run that needs more is interrupted and goes on."""
    if where.time_min:
        return where.time_min
    wanted = next((rung for rung in TIMES_MIN if rung >= 2 * predicted + SPARE_MIN), TIMES_MIN[-1])
    return min(wanted, there.limit_min) if there.limit_min else wanted


def packed(
    held: list[tuple[list[Row], Request, Runtime]], where: Site, there: Partition
) -> dict[Request, list[tuple[float, Pack]]]:
    """Groups of runs as packs, longest first, by what a job for them asks for: (predicted minutes, pack).

    Short runs that ask for the same follow each other in one job until it is predicted to last ``run.job_min``.
    """
    alike: dict[Request, list[tuple[list[Row], Runtime]]] = {}
    for rows, request, runtime in held:
        alike.setdefault(request._replace(time_min=0), []).append((rows, runtime))
    found: dict[Request, list[tuple[float, Pack]]] = {}
    for request, members in alike.items():
        timed = sorted(((predicted_min(rows, runtime), rows, runtime) for rows, runtime in members), key=_longest)
        minutes, pack = 0.0, []
        for number, (predicted, rows, runtime) in enumerate(timed):
            minutes += predicted / request.pack
            pack.append([row["run_id"] for row in rows])
            full = minutes >= runtime.job_min and len(pack) >= request.pack
            if full or number == len(timed) - 1:
                asked = request._replace(time_min=_rung(minutes, where, there))
                found.setdefault(asked, []).append((minutes, pack))
                minutes, pack = 0.0, []
    return found


def _longest(member: tuple[float, list[Row], Runtime]) -> float:
    return -member[0]


def shares(parallel: int, sizes: list[int]) -> list[int]:
    """How many tasks of each array may run at a time, so that all together keep to ``parallel``.

    There are never more arrays here than ``parallel``: the others wait for one of these (see ``dispatch``).
    """
    free, caps = parallel, [0] * len(sizes)
    for settled, number in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        # the smallest first: what they leave of a fair share is for the others
        caps[number] = min(sizes[number], math.ceil(free / (len(sizes) - settled)))
        free -= caps[number]
    return caps
