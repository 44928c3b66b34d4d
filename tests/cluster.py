"""How does a real Slurm run on this machine, and how does it fail? Debian's daemons, in a temporary folder.

    python tests/cluster.py      # one to try things on, until Ctrl-C

As root (munge and slurmd want it), without systemd. Several nodes share the host, each with fake GPUs and a port of
its own. Settings trade robustness under load for seconds: see the comments. What breaks a cluster is a method here,
and each waits until Slurm shows the effect.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sweep.slurm import scrubbed

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo", "setpriv")
ACCOUNTING = ("mariadbd", "slurmdbd", "sacct")
ENDED = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
)  # states from which a job does not come back by itself

# settings of use in several tests
ANNOUNCED = {"SlurmctldParameters": "preempt_send_user_signal"}  # preemption sends what jobs asked for with --signal
IMPATIENT = {"SlurmdTimeout": 5, "MessageTimeout": 3}  # a node is given up after 12 s instead of 28

AT_START = frozenset({"MaxArraySize", "MaxJobCount"})  # settings that a controller reads when it starts, only


def missing(accounting: bool = False) -> str | None:
    """Why no cluster can be started here; None when one can."""
    wanted = [(PROGRAMS, "slurm-wlm, munge"), (ACCOUNTING, "slurmdbd, mariadb-server-core")]
    for programs, packages in wanted if accounting else wanted[:1]:
        if lacking := [name for name in programs if shutil.which(name, path=_path()) is None]:
            return f"not installed: {', '.join(lacking)} (Debian: {packages})"
    return None if os.geteuid() == 0 else "munge and slurmd want root"


@dataclass(frozen=True)
class Job:
    """A row of ``squeue``: a job, or an element of an array."""

    id: str  # its own; elements of an array that wait for their first start have none and show the array's
    array: str  # the array's; the job's own where there is none
    index: int | None
    state: str
    node: str  # empty while it waits
    reason: str
    name: str

    def goes_by(self, name: str) -> bool:
        """Is it meant by "7", or by "5_2"?"""
        return name in (self.id, f"{self.array}_{self.index}")


@dataclass
class Cluster:
    """munged, slurmctld and one slurmd a node; with ``accounting`` also mariadbd and slurmdbd.

    Partitions ``main`` (the default) and ``urgent`` share the nodes. With ``preempt`` a job in ``urgent`` sends those
    of ``main`` in its way back to the queue, after ``grace`` seconds, rounded up to a multiple of KillWait and
    MessageTimeout. ``settings`` are lines of slurm.conf and stronger than those here; an empty one removes a line.

    An array with an index of ``max_array`` or more is refused: "Batch job submission failed: Invalid job array
    specification".
    """

    folder: Path
    nodes: int = 3
    cpus: int = 8
    max_array: int = 1001
    preempt: bool = False
    grace: int = 5
    accounting: bool = False
    settings: Mapping[str, str | int] = field(default_factory=dict)
    changes: dict[str, str | int] = field(default_factory=dict)  # of settings, until the cluster is healed
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def names(self) -> list[str]:
        return [f"n{number + 1}" for number in range(self.nodes)]

    def environment(self) -> dict[str, str]:
        """What a command needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.conf), "PATH": f"{self.folder}/bin{os.pathsep}{_path()}"}

    # --- start and stop ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the daemons and wait for the nodes. They end with the thread that calls this, too."""
        listening = ["slurmctld", *self.names, "slurmdbd"]
        self.ports = dict(zip(listening, _ports(len(listening)), strict=True))
        for name in ("bin", "state", "spool", "log", "db"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        # Snakemake's job step starts srun without SLURM_CONF
        srun = self.folder / "bin" / "srun"
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.conf} exec {shutil.which("srun", path=_path())} "$@"\n')
        srun.chmod(0o755)
        self._write()
        for name in ("munged", *(("mariadbd", "slurmdbd") if self.accounting else ())):
            self._daemon(name)
            self._until(partial(self._answers, name), f"{name} answers")
        for name in ("slurmctld", *self.names):
            self._daemon(name)

        def started() -> bool:
            for name, process in self.daemons.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {(self.folder / 'log' / f'{name}.out').read_text()[-1000:]}")
            return list(self.states().values()) == ["idle"] * self.nodes

        self._until(started, "all nodes are idle")

    def stop(self) -> None:
        """End whatever runs here, at once: daemons, steps that have lost theirs, and what jobs have started."""
        _end(lambda: _family(self._processes()))
        for process in self.daemons.values():
            process.wait(timeout=30)

    def heal(self) -> None:
        """After a fault: every daemon alive, every node idle, no job left, settings as at the start."""
        for name, process in self.daemons.items():
            if process.poll() is not None:
                self.restart(name)
        changed = list(self.changes)
        self.changes.clear()
        if changed:
            self._configure(changed)
        self._until(lambda: self.ask("scancel", "--user=root").returncode == 0, "jobs are cancelled")
        _end(lambda: _family(pid for pid, held in self._processes().items() if "SLURM_JOB_ID" in held))

        def healed() -> bool:
            states = self.states()
            for node, state in states.items():
                if state.startswith(("down", "drain")):
                    self.ask("scontrol", "update", f"NodeName={node}", "State=RESUME")
            return set(states.values()) == {"idle"} and all(job.state in ENDED for job in self.jobs())

        self._until(healed, "all nodes are idle and no job is left")

    # --- faults ------------------------------------------------------------------------------------------------------

    def kill(self, name: str, noticed: bool = True) -> None:
        """SIGKILL for one daemon; steps of jobs live on.

        For a slurmd this waits until Slurm has given up its node and the jobs there (``IMPATIENT``: 12 s, else 28),
        unless that need not be ``noticed``. A controller forgets what it has not saved: see ``save``. Without munged
        each command takes 50 s to fail.
        """
        self.daemons[name].kill()
        self.daemons[name].wait(timeout=30)
        if noticed and name in self.names:
            self._until(lambda: self.states().get(name, "").startswith("down"), f"{name} is given up")

    def restart(self, name: str) -> None:
        """Start a daemon again, after an orderly end where it lives; a node that was given up comes back."""
        self.daemons[name].terminate()
        self.daemons[name].wait(timeout=30)
        self._daemon(name)
        self._until(partial(self._answers, name), f"{name} answers")

    def save(self) -> None:
        """Let the controller write its state, in up to 5 s; by itself it does so at a submission, not at a start.

        After a SIGKILL it undoes the rest: a job that has started since then waits again, and its processes get
        SIGKILL when their node registers.
        """
        state = self.folder / "state" / "job_state"
        before = state.stat().st_mtime_ns
        self._configure()
        self._until(lambda: state.stat().st_mtime_ns > before, "the state is saved")

    def down(self, node: str, reason: str = "test") -> None:
        """What an operator does to a node: jobs on it end or are requeued, although its slurmd lives."""
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", f"Reason={reason}")
        self._until(lambda: self.states()[node].startswith("down"), f"{node} is down")

    def resume(self, node: str) -> None:
        self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self._until(lambda: not self.states()[node].startswith(("down", "drain")), f"{node} is back")

    def reconfigure(self, **settings: str | int) -> None:
        """Other settings, until the cluster is healed."""
        self.changes |= settings
        self._configure(settings)

    # --- questions and jobs ------------------------------------------------------------------------------------------

    def ask(self, *command: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command as a user of this cluster would run it, whatever comes of it."""
        return subprocess.run(command, env=self._env(), input=given, capture_output=True, text=True, timeout=60)

    def call(self, *command: str, given: str | None = None) -> str:
        """What a command says that must not fail."""
        answer = self.ask(*command, given=given)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(command)}: {answer.stderr.strip()}")
        return answer.stdout

    def submit(self, script: str, *options: str) -> str:
        """Id of a job that runs lines of shell; its output goes to the log folder."""
        out = f"--output={self.folder}/log/job-%j.out"
        return self.call("sbatch", "--parsable", out, *options, given=f"#!/bin/bash\n{script}\n").strip()

    def states(self) -> dict[str, str]:
        """Of every node, as ``sinfo`` has it ("idle", "mixed", "down*" where the slurmd does not answer)."""
        return dict(line.split("|") for line in self.ask("sinfo", "-h", "-N", "-o", "%N|%T").stdout.split())

    def jobs(self) -> list[Job]:
        """All that ``squeue`` knows: those that have ended too, for MinJobAge."""
        held = []
        for line in self.call("squeue", "-h", "-r", "-t", "all", "-o", "%A|%F|%K|%T|%N|%r|%j").splitlines():
            own, array, index, *others = line.split("|", 6)
            held.append(Job(own, array, int(index) if index.isdigit() else None, *others))
        return held

    def job(self, name: str) -> Job:
        """One by its id ("7") or, of an array, by that and an index ("5_2")."""
        for job in self.jobs():
            if job.goes_by(name):
                return job
        raise LookupError(f"squeue does not know {name}")

    def wait(self, name: str, *states: str, seconds: float = 60.0) -> Job:
        """A job as soon as it is in one of some states."""
        until(lambda: self.job(name).state in states, f"{name} is {' or '.join(states)}", seconds)
        return self.job(name)

    def steps(self, job: str, node: str | None = None) -> list[int]:
        """Processes that a job runs (on one node), also those that Slurm has forgotten; its slurmstepd is not one."""
        wanted = {"SLURM_JOB_ID": job} | ({"SLURMD_NODENAME": node} if node else {})
        return _family(pid for pid, held in self._processes().items() if wanted.items() <= held.items())

    # --- inside ------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        host = socket.gethostname()
        gpus = "/dev/null,/dev/zero"  # any device file will do for a GPU that nobody touches
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.names)} Name=gpu File={gpus}\n")
        settings: dict[str, str | int] = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": self.ports["slurmctld"],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # a requeue waits for credentials to expire: two minutes by default
            "AuthInfo": f"socket={self.folder}/munge.socket,cred_expire=5",
            "CryptoType": "crypto/munge",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "JobAcctGatherType": "jobacct_gather/linux",
            "AccountingStorageType": "accounting_storage/none",
            "ReturnToService": 1,  # with 2 a node that an operator has set down comes back when it registers again
            "GresTypes": "gpu",
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{self.folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{self.folder}/log/slurmd-%n.log",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1",
            "SlurmdParameters": "config_overrides",
            "KillWait": 2,
            "SlurmdTimeout": 10,
            "MinJobAge": 60,
            "JobRequeue": 1,
            "MaxArraySize": self.max_array,
        }
        if self.preempt:
            settings |= {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}
        if self.accounting:
            settings |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": "127.0.0.1",
                "AccountingStoragePort": self.ports["slurmdbd"],
                "AccountingStoragePass": f"{self.folder}/munge.socket",
            }
        settings |= {**self.settings, **self.changes}
        lines = [f"{name}={value}" for name, value in settings.items() if value != ""]
        for name in self.names:
            lines.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[name]} CPUs={self.cpus} "
                "RealMemory=16000 Gres=gpu:2 State=UNKNOWN"
            )
        # sinfo lists partitions in this order
        lines.append("PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10")
        lines.append(f"PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime={self.grace}")
        self.conf.write_text("\n".join(lines) + "\n")
        if not self.accounting:
            return
        database = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder}/munge.socket",
            "DbdHost": "localhost",
            "DbdAddr": "127.0.0.1",
            "DbdPort": self.ports["slurmdbd"],
            "SlurmUser": "root",
            "LogFile": f"{self.folder}/log/slurmdbd.log",
            "PidFile": f"{self.folder}/slurmdbd.pid",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",  # by a socket: see MYSQL_UNIX_PORT
            "StorageUser": "root",
            "StorageLoc": "slurm",
        }
        conf = self.folder / "slurmdbd.conf"
        conf.touch(0o600)  # slurmdbd takes no other
        conf.write_text("".join(f"{name}={value}\n" for name, value in database.items()))

    def _configure(self, changed: Iterable[str] = ()) -> None:
        self._write()
        if not AT_START.isdisjoint(changed):
            self.restart("slurmctld")
        self.call("scontrol", "reconfigure")

    def _command(self, name: str) -> list[str]:
        folder = self.folder
        if name == "munged":
            files = {"key-file": "munge.key", "socket": "munge.socket", "seed-file": "munge.seed"}
            files |= {"pid-file": "munged.pid", "log-file": "log/munged.log"}
            return [name, "--foreground", "--force", *(f"--{key}={folder / path}" for key, path in files.items())]
        if name == "mariadbd":
            # an empty folder will do: without grant tables, the server's own are not missed
            options = "skip-networking skip-grant-tables innodb-flush-log-at-trx-commit=0 innodb-log-file-size=8M"
            options += f" user=root datadir={folder}/db socket={folder}/db.socket pid-file={folder}/db.pid"
            return [name, "--no-defaults", *(f"--{option}" for option in options.split())]
        return ["slurmd", "-D", "-N", name] if name in self.names else [name, "-D"]

    def _answers(self, name: str) -> bool:
        """Does a daemon do its work (again)?"""
        if name == "munged":
            return self.ask("munge", "--no-input", f"--socket={self.folder}/munge.socket").returncode == 0
        if name == "mariadbd":
            with socket.socket(socket.AF_UNIX) as link:
                return link.connect_ex(str(self.folder / "db.socket")) == 0
        with socket.socket() as link:
            listens = link.connect_ex(("127.0.0.1", self.ports[name])) == 0
        if name == "slurmdbd" or not listens:
            return listens
        states = self.states()
        if name in self.names:
            return not states.get(name, "").endswith("*")
        # a controller knows of a node when that has registered, seconds after both have started
        alive = [node for node in self.names if self.daemons[node].poll() is None]
        return bool(states) and not any(states[node].startswith("unknown") for node in alive)

    def _daemon(self, name: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *self._command(name)]  # tests that are killed do not clean up
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self._env(), stdout=log, stderr=log, start_new_session=True
            )

    def _env(self) -> dict[str, str]:
        return scrubbed(os.environ) | self.environment() | {"MYSQL_UNIX_PORT": f"{self.folder}/db.socket"}

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        until(ready, f"{what} (logs: {self.folder}/log)")

    def _processes(self) -> dict[int, dict[str, str]]:
        """Processes of this cluster, with their environments; its configuration's path tells them from all others."""
        return {pid: held for pid, _, held in _processes() if held.get("SLURM_CONF") == str(self.conf)}


def until(ready: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for something that has to come true."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.05)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _ports(count: int) -> list[int]:
    """Free ones below those that outgoing connections use: a daemon that starts again must find its own still free."""
    free: list[int] = []
    for port in random.sample(range(15000, 30000), 1000):
        with socket.socket() as held, contextlib.suppress(OSError):
            held.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise OSError("no free ports")


def _processes() -> Iterator[tuple[int, int, dict[str, str]]]:
    """Id, parent and first environment of all processes that have not ended."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        pairs = (each.partition("=") for each in environment)
        yield int(folder.name), parent, {name: value for name, _, value in pairs}


def _family(pids: Iterable[int]) -> list[int]:
    """Processes, and all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid, parent, _ in _processes():
        children.setdefault(parent, []).append(pid)
    found: dict[int, None] = {}
    todo = list(pids)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found[pid] = None
            todo += children.get(pid, [])
    return sorted(found)


def _end(find: Callable[[], list[int]]) -> None:
    """SIGKILL for processes, and for those that they have started meanwhile."""

    def ended() -> bool:
        pids = find()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    until(ended, "processes have ended")


def main() -> int:
    """Run a cluster until Ctrl-C, for somebody to try things on."""
    if why := missing():
        print(f"no Slurm: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        held = Cluster(Path(folder))
        try:
            held.start()
            told = " ".join(f"{name}={shlex.quote(value)}" for name, value in held.environment().items())
            print(f"{held.nodes} nodes are idle; in another terminal:\n\nexport {told}\n\nCtrl-C ends them", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            return 0
        finally:
            held.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
